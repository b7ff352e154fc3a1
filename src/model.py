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

from typing import NamedTuple

import torch
import torch.nn as nn
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.cache import KVCache
from src.decode import run_blocks
from src.exits import recur, visits_per_recursion_step
from src.layers import Attention, Context, MLPMixer1D, RMSNorm, SwiGLU, init_weights, make_context
from src.losses import IGNORE, halting_loss, token_loss
from src.model_config import ExitRule, TRMConfig, step_weights
from src.sampling import generate_ids


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
