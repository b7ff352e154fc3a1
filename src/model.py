"""The Tiny Recursive Model as a language model, arXiv:2510.04871; looped and plain transformers are the same class.

    x = prelude(embed(ids))
    for s in range(supervision_steps):               # N_sup in the paper
        for t in range(deep_steps):                  # T: only the last grad_deep_steps carry gradient
            for i in range(latent_steps):            # n
                z = net(x, y, z)
            y = net(y, z)
        logits = head(coda(y));  halt = q_head(y)
        y, z = y.detach(), z.detach()                # unless full_bptt

Shapes: B batch, T tokens, D width, H query heads, K key/value heads, E = D/H, V vocabulary.
"""

from dataclasses import asdict, dataclass
from math import inf
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.cache import KVCache
from src.config import literal_fields
from src.decode import run_blocks
from src.exits import ExitRule, recur, visits_per_recursion_step
from src.layers import Attention, Context, MLPMixer1D, RMSNorm, SwiGLU, init_weights, make_context
from src.losses import IGNORE, halting_loss, step_weights, token_loss, valid_weights
from src.sampling import generate_ids


@dataclass
class TRMConfig:
    """The model. `recursion` picks the family; fields that a family does not use are ignored.

    Args:
        vocab_size: V, number of tokens; taken from the tokenizer where not given
        d_model: D, width of the residual stream
        n_heads: H, query heads; the head size is D/H
        n_kv_heads: K, key/value heads, shared by groups of H/K query heads; default n_heads
        n_layers: blocks of the one network that is applied again and again
        d_ff: hidden width of SwiGLU; default 8/3 D rounded up to 64
        max_seq_len: context length in tokens
        causal: each token sees only the past (a language model); false for puzzles
        mixer: what mixes tokens; mlp is for fixed-length, non-causal inputs
        positions: rope (rotary), learned (an embedding, part of x), or none
        rope_theta: base of the rotary frequencies
        rope_scaling: how many times longer than trained the context is: divides the rotary positions; none = 1
        rope_trained_len: context in tokens that was trained on; where given, rope_scaling acts by YaRN instead
        norm: place of RMSNorm: post as in the TRM paper, pre as in Llama, sandwich = both
        norm_eps: epsilon inside RMSNorm
        qk_norm: RMSNorm on queries and keys, per head
        dropout: probability of dropping, on attention weights and on each sublayer's output
        tie_embeddings: the output head is the embedding matrix
        embed_scale: factor of the embedding as it enters; default sqrt(d_model) where tied and recursive, else 1
        recursion: none = plain transformer (Llama), loop = looped transformer, trm = the two-stream recursion
        prelude_layers: untied blocks before the recursion
        coda_layers: untied blocks after it
        injection: how x re-enters at each visit: sum (the paper), concat (a linear layer), none (loop only: y0 = x)
        gate: element-wise gate between the old and the new state at each visit
        latent_steps: n, updates of z before each update of y (trm)
        deep_steps: T, cycles of a supervision step (trm), or visits (loop)
        supervision_steps: N_sup, deep supervision steps (trm)
        grad_deep_steps: how many of the last deep steps carry gradient; default 1 for trm, all for loop
        full_bptt: back-propagate through all supervision and deep steps (memory grows with them)
        supervision_weights: weights of the steps' losses: equal, linear, last, or numbers such as 0.3,1.0
        act_weight: weight of the halting loss
        act_target: what the halting head learns: correct = the argmax is right, stable = one more step keeps it
        act_threshold: a token halts where the halting probability exceeds this
        gradient_checkpointing: recompute each visit in the backward pass: less memory, more time
        pad_token_id: id that fills rows after their end
    """

    vocab_size: int | None = None
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int | None = None
    n_layers: int = 2
    d_ff: int | None = None
    max_seq_len: int = 256
    causal: bool = True
    mixer: Literal["attention", "mlp"] = "attention"
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: float | None = None
    rope_trained_len: int | None = None
    norm: Literal["post", "pre", "sandwich"] = "post"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = False
    embed_scale: float | None = None
    recursion: Literal["none", "loop", "trm"] = "trm"
    prelude_layers: int = 0
    coda_layers: int = 0
    injection: Literal["sum", "concat", "none"] = "sum"
    gate: bool = False
    latent_steps: int = 2
    deep_steps: int = 2
    supervision_steps: int = 2
    grad_deep_steps: int | None = None
    full_bptt: bool = False
    supervision_weights: str = "equal"
    act_weight: float = 1.0
    act_target: Literal["correct", "stable"] = "correct"
    act_threshold: float = 0.95
    gradient_checkpointing: bool = False
    pad_token_id: int | None = None

    def __post_init__(self):
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.d_ff = -(-8 * self.d_model // (3 * 64)) * 64 if self.d_ff is None else self.d_ff
        if self.grad_deep_steps is None:
            self.grad_deep_steps = 1 if self.recursion == "trm" and not self.full_bptt else self.deep_steps
        if self.embed_scale is None:  # a tied matrix is small, as the head needs it; states have unit size
            self.embed_scale = self.d_model**0.5 if self.tie_embeddings and self.recursion != "none" else 1.0
        for problem, advice in self._problems():
            if problem:
                raise ValueError(advice)

    def _problems(self):
        """(is it wrong?, what to change) for every combination that cannot work."""
        sizes = ["d_model", "n_heads", "n_kv_heads", "n_layers", "d_ff", "max_seq_len", "latent_steps", "deep_steps"]
        optional = [name for name in ("vocab_size", "rope_trained_len") if getattr(self, name) is not None]
        for name in [*sizes, "supervision_steps", "grad_deep_steps", *optional]:
            yield getattr(self, name) < 1, f"{name} is {getattr(self, name)}: set it to 1 or more"
        for name in ("prelude_layers", "coda_layers", "act_weight"):
            yield not 0 <= getattr(self, name) < inf, f"{name} is {getattr(self, name)}: set it to 0 or more"
        for name, allowed in literal_fields(type(self)).items():
            yield getattr(self, name) not in allowed, f"{name} is {getattr(self, name)!r}: choose {', '.join(allowed)}"
        D, H, K, G, T = self.d_model, self.n_heads, self.n_kv_heads, self.grad_deep_steps, self.deep_steps
        yield D % H != 0, f"d_model {D} does not divide into n_heads {H}: make d_model a multiple of n_heads"
        yield H % K != 0, f"n_heads {H} is no multiple of n_kv_heads {K}: make n_kv_heads a divisor of n_heads"
        odd = self.positions == "rope" and self.mixer == "attention" and (D // H) % 2
        yield odd, f"rotary positions pair channels, but the head size {D // H} is odd: change d_model or n_heads"
        yield not 0 <= self.dropout < 1, f"dropout is {self.dropout}: set it to 0 or more and under 1"
        yield not 0 < self.act_threshold <= 1, f"act_threshold is {self.act_threshold}: set it over 0 and up to 1"
        for name in ["norm_eps", "rope_theta", "embed_scale"] + ["rope_scaling"] * (self.rope_scaling is not None):
            yield not 0 < getattr(self, name) < inf, f"{name} is {getattr(self, name)}: set it over 0"
        outside = self.vocab_size is not None and not 0 <= (self.pad_token_id or 0) < self.vocab_size
        yield outside, f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}: correct it"
        sees_all = self.mixer == "mlp" and self.causal
        yield sees_all, "mixer mlp sees all positions: set causal to false, or mixer to attention"
        is_bare = self.injection == "none"
        yield is_bare and self.recursion == "trm", "injection none is for recursion loop: choose sum or concat"
        yield self.recursion != "none" and G > T, f"grad_deep_steps {G} is more than deep_steps {T}: lower it"
        cut = is_bare and self.recursion == "loop" and G < T
        yield cut, f"injection none gives the embedding no gradient under grad_deep_steps {G}: set it to deep_steps {T}"
        weights, wrong = self.supervision_weights, not valid_weights(self.supervision_weights, self.supervision_steps)
        yield wrong, f"supervision_weights is {weights!r}: choose equal, linear, last, or such as 0.3,1.0"

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def head_dim(self) -> int:
        """E, channels of one attention head."""
        return self.d_model // self.n_heads

    @property
    def train_steps(self) -> int:
        """Supervision steps of one batch: only the trm family has more than one."""
        return self.supervision_steps if self.recursion == "trm" else 1

    @property
    def visits_per_step(self) -> int:
        """Applications of the network in one supervision step."""
        return {"none": 1, "loop": self.deep_steps, "trm": self.deep_steps * (self.latent_steps + 1)}[self.recursion]


class Carry(NamedTuple):
    """What one supervision step hands to the next."""

    y: Float[Tensor, "b t d"]
    z: Float[Tensor, "b t d"] | None  # trm only
    steps: int | Tensor  # supervision steps done; under an exit rule the recursion steps of each token, (B, T)


class TRMOutput(NamedTuple):
    """Losses in nats per target token.  With return_steps the logits have a leading dimension of supervision steps."""

    loss: Float[Tensor, ""] | None
    ce_loss: Float[Tensor, ""] | None
    act_loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "*s b t v"]
    halt_logits: Tensor | None  # (B, T) causal, (B,) otherwise; None without a halting head
    carry: Carry


class TRMModel(nn.Module):
    """ids (B, T) -> logits (B, T, V), by recursion of one TinyNet.  All work goes through `forward`."""

    def __init__(self, config: TRMConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: take it from the tokenizer")
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.pos_embed = nn.Embedding(c.max_seq_len, c.d_model) if c.positions == "learned" else None
        self.prelude = nn.ModuleList(TinyBlock(c) for _ in range(c.prelude_layers))
        self.net = TinyNet(c)
        self.coda = nn.ModuleList(TinyBlock(c) for _ in range(c.coda_layers))
        self.coda_norm = RMSNorm(c.d_model, c.norm_eps) if c.coda_layers and c.norm != "post" else None
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.token_loss = token_loss
        if c.recursion == "trm":
            self.q_head = nn.Linear(c.d_model, 1)
            self.register_buffer("y_init", torch.empty(c.d_model))
            self.register_buffer("z_init", torch.empty(c.d_model))
        self.cycle = self.latent_recursion if c.recursion == "trm" else self._loop_cycle
        init_weights(self)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        target_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Int[Tensor, "b t"] | None = None,
        supervision_steps: int | None = None,
        carry: Carry | None = None,
        return_steps: bool = False,
        cache: KVCache | None = None,
        exit: ExitRule | None = None,
    ) -> TRMOutput:
        """Run supervision steps from `carry` (default: the initial state, all steps of the config).

        attention_mask: None = every token is real; 0 = padding; different numbers 1, 2, ... keep attention inside
        documents packed into one row. target_ids[t] is the token after input_ids[t], IGNORE (-100) has no loss.
        exit: inference under a rule, from the initial state and without targets; the steps returned are recursion
        steps, and carry.steps (B, T) has how many each token took.
        """
        if exit is not None and target_ids is not None:
            raise ValueError("an exit rule is for inference: it takes no targets")
        if exit is not None:
            return TRMOutput(None, None, None, *recur(self, input_ids, attention_mask, cache, exit, return_steps))
        steps = self.config.train_steps if supervision_steps is None else supervision_steps
        x, ctx = self._enter(input_ids, attention_mask, cache)
        y, z, done = carry if carry is not None else self._initial_state(x)
        if steps < 1 or (cache is not None and done + steps > self.config.train_steps):
            raise ValueError(f"supervision_steps is {steps} after {done}: 1 or more, within the config's with a cache")
        weights = step_weights(self.config.supervision_weights, done + steps)[done:]
        weights = weights if any(weights) else [1.0] * steps  # a step of weight 0, run by itself
        loss = ce_loss = act_loss = None if target_ids is None else x.new_zeros(())
        read = []  # (logits, halting logits) of every step, for return_steps
        for s in range(steps):
            y_before = y
            y, z = self.deep_recursion(x, y, z, ctx, (done + s) * self.config.visits_per_step)
            if target_ids is not None or return_steps or s == steps - 1:
                logits, halt = self._read_out(y, ctx, done + s)
                read += [(logits, halt)] if return_steps else []
            if target_ids is not None:
                w = weights[s] / sum(weights)
                ce, is_right = self.token_loss(logits, target_ids)
                act = self._halting_loss(y_before, done + s, logits, halt, target_ids, is_right, ctx)
                ce_loss, act_loss = ce_loss + w * ce, act_loss + w * act
                loss = loss + w * (ce + self.config.act_weight * act)
            if not self.config.full_bptt:
                y, z = y.detach(), None if z is None else z.detach()
        if cache is not None:
            cache.advance(input_ids.shape[1])
        if return_steps:
            logits, halt = (None if part[0] is None else torch.stack(part) for part in zip(*read))
        return TRMOutput(loss, ce_loss, act_loss, logits, halt, Carry(y, z, done + steps))

    def deep_recursion(self, x, y, z, ctx, visit=0):
        """T cycles, of which only the last grad_deep_steps carry gradient.  x, y, z: (B, T, D) -> y, z."""
        deep_steps = 1 if self.config.recursion == "none" else self.config.deep_steps  # T in the paper
        for t in range(deep_steps):
            frozen = self.config.recursion != "none" and t < deep_steps - self.config.grad_deep_steps
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                y, z = self.cycle(x, y, z, ctx, visit)
            visit += self.config.visits_per_step // deep_steps
        return y, z

    def latent_recursion(self, x, y, z, ctx, visit=0):
        """n updates of the latent z, then one of the answer y.  x, y, z: (B, T, D).  arXiv:2510.04871, section 4."""
        for i in range(self.config.latent_steps):  # n in the paper
            z = self._visit((x, y, z), ctx, visit + i)
        y = self._visit((y, z), ctx, visit + self.config.latent_steps, state=0)
        return y, z

    def _loop_cycle(self, x, y, z, ctx, visit=0):
        """One visit of the loop, or the only one of the plain transformer, which has no state."""
        states = () if self.config.recursion == "none" else (y,)
        return self._visit(states if self.config.injection == "none" and states else (x, *states), ctx, visit), z

    @torch.no_grad()
    def _inference_cycle(self, x, carry: Carry, ctx) -> Carry:
        """One recursion step without gradient: a supervision step, or a visit of the loop."""
        cycle = self.cycle if self.config.recursion == "loop" else self.deep_recursion
        visit = carry.steps * visits_per_recursion_step(self.config)
        return Carry(*cycle(x, carry.y, carry.z, ctx, visit), carry.steps + 1)

    def _visit(self, inputs, ctx, visit, state=-1):
        """One application of the network to its inputs; inputs[state] is the stream that it updates."""
        c = self.config
        slot = c.prelude_layers + visit * c.n_layers if ctx.cache is not None else 0
        if c.gradient_checkpointing and torch.is_grad_enabled() and ctx.cache is None:
            return checkpoint(self.net, inputs, ctx, slot, state, use_reentrant=False)
        return self.net(inputs, ctx, slot, state)

    def _enter(self, input_ids, attention_mask, cache) -> tuple[Tensor, Context]:
        """Embedding and prelude: x (B, T, D), and what all attention layers share."""
        c = self.config
        x = self.embed(input_ids) * c.embed_scale
        positions, ctx = make_context(c, input_ids, attention_mask, cache, x.dtype, self.training)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        return run_blocks(self.prelude, x, ctx, 0), ctx

    def _initial_state(self, x) -> Carry:
        if self.config.recursion == "trm":
            return Carry(self.y_init.to(x.dtype).expand_as(x), self.z_init.to(x.dtype).expand_as(x), 0)
        return Carry(x if self.config.injection == "none" else torch.zeros_like(x), None, 0)

    def _read_out(self, y, ctx, step):
        """logits (B, T, V) and halting logits of the answer y (B, T, D) of a supervision step."""
        return self.head(ctx.read(self._before_head(y, ctx, step))), self._halt(y)

    def _before_head(self, y, ctx, step):
        slot = 0 if ctx.cache is None or not self.coda else ctx.cache.coda_slot(step)
        return run_blocks(self.coda, y, ctx, slot, self.coda_norm)

    def _halt(self, y):
        if self.config.recursion == "trm":
            return self.q_head(y if self.config.causal else y[:, 0]).squeeze(-1)

    def _halting_loss(self, y_before, step, logits, halt, target_ids, right, ctx):
        """Halting BCE of one supervision step; `stable` judges the step before, from the carry (none at step 0)."""
        valid = target_ids != IGNORE
        if halt is None or (self.config.act_target == "stable" and step == 0):
            return logits.new_zeros(())
        if self.config.act_target == "stable":
            logits_before, halt = self._read_out(y_before, ctx, step - 1)
            right = logits_before.argmax(-1) == logits.argmax(-1)
        if not self.config.causal:
            right, valid = (right | ~valid).all(-1), valid.any(-1)
        return halting_loss(halt, right, valid)

    def new_cache(self, batch: int, max_len: int | None = None, read_steps=1, depth=None, last_only=False) -> KVCache:
        """An empty cache of `batch` rows x max_len columns; for an exit rule, `depth` is `exits.max_depth`."""
        w = self.embed.weight
        return KVCache(self.config, batch, max_len, read_steps, w.dtype, w.device, depth, last_only)

    def generate(self, prompt_ids: Int[Tensor, "b t"], max_new_tokens: int, **options) -> Int[Tensor, "b u"]:
        """(B, T) -> (B, T + max_new_tokens); options as in sampling.generate: temperature=1.0, top_k, top_p,
        use_cache=True, seed, eos_id, attention_mask (0 = padding, on the left)."""
        return generate_ids(self, prompt_ids, max_new_tokens, **options)


class TinyNet(nn.Module):
    """The one network: inputs are injected, n_layers blocks follow.  Each input: (B, T, D) -> (B, T, D)."""

    def __init__(self, c: TRMConfig):
        super().__init__()
        D, concat = c.d_model, c.injection == "concat" and c.recursion != "none"
        self.inject_z = nn.Linear(3 * D, D, bias=False) if concat and c.recursion == "trm" else None
        self.inject_y = nn.Linear(2 * D, D, bias=False) if concat else None
        self.blocks = nn.ModuleList(TinyBlock(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(D, c.norm_eps) if c.norm != "post" else None  # post-norm blocks end normalised
        self.gate = nn.Linear(2 * D, D) if c.gate and c.recursion != "none" else None

    def forward(self, inputs, ctx: Context, slot: int, state: int = -1) -> Tensor:
        inject = {3: self.inject_z, 2: self.inject_y}.get(len(inputs))
        h = sum(inputs[1:], inputs[0]) if inject is None else inject(torch.cat(inputs, dim=-1))
        h = self.apply_blocks(h.to(inputs[0].dtype), ctx, slot)  # autocast narrows the injection, not the stream
        if self.gate is None:
            return h
        old = inputs[state]
        return torch.lerp(old, h, torch.sigmoid(self.gate(torch.cat((old, h), dim=-1))).to(h.dtype))

    def apply_blocks(self, h, ctx, slot):
        return run_blocks(self.blocks, h, ctx, slot, self.norm)


class TinyBlock(nn.Module):
    """Attention (or the sequence mixer), then SwiGLU, each with RMSNorm: post, pre or sandwich.  (B, T, D) -> same."""

    def __init__(self, c: TRMConfig):
        super().__init__()
        self.attn = MLPMixer1D(c.max_seq_len, c.d_ff) if c.mixer == "mlp" else Attention(c)
        self.mlp = SwiGLU(c.d_model, c.d_ff)
        self.attn_norm, self.mlp_norm = RMSNorm(c.d_model, c.norm_eps), RMSNorm(c.d_model, c.norm_eps)
        sandwich = c.norm == "sandwich"
        self.attn_out_norm = RMSNorm(c.d_model, c.norm_eps) if sandwich else nn.Identity()
        self.mlp_out_norm = RMSNorm(c.d_model, c.norm_eps) if sandwich else nn.Identity()
        self.post = c.norm == "post"
        self.drop = nn.Dropout(c.dropout)

    def forward(self, h: Float[Tensor, "b t d"], ctx: Context, slot: int) -> Float[Tensor, "b t d"]:
        if self.post:
            h = self.attn_norm(h + self.drop(self.attn(h, ctx, slot)))
            return self.mlp_norm(h + self.drop(self.mlp(h)))
        h = h + self.drop(self.attn_out_norm(self.attn(self.attn_norm(h), ctx, slot)))
        return h + self.drop(self.mlp_out_norm(self.mlp(self.mlp_norm(h))))
