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
from src.decode import OneTokenContext, decode_one_token, one_token_context
from src.exits import Leaving, max_depth, stops, visits_per_recursion_step
from src.layers import Attention, Context, MLPMixer1D, RMSNorm, SwiGLU, init_weights, injection_of, make_context
from src.losses import IGNORE, halting_loss, token_loss
from src.model_config import ExitRule, TRMConfig, loss_weights
from src.sampling import generate_ids


class Carry(NamedTuple):
    """What one supervision step hands to the next."""

    y: Float[Tensor, "b t d"]
    z: Float[Tensor, "b t d"] | None  # trm only
    steps: int | Tensor  # supervision steps done; under an exit rule the recursion steps of each token, (B, T)


class TRMOutput(NamedTuple):
    """Losses in nats per target token.  With return_steps the logits have a leading dimension of recursion steps."""

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
        self.token_loss = token_loss  # an attribute, so that runtime.compile_parts can replace it
        if c.recursion == "trm":
            self.q_head = nn.Linear(c.d_model, 1)
            # fixed random vectors, as in the paper: buffers, so that they are saved but not trained
            self.register_buffer("y_init", torch.empty(c.d_model))
            self.register_buffer("z_init", torch.empty(c.d_model))
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
        return_steps: the logits of every recursion step, which is a supervision step of trm and a visit of the loop.
        exit: inference under a rule, from the initial state and without targets; carry.steps (B, T) then has how many
        recursion steps each token took.
        """
        c = self.config
        if exit is not None:
            if target_ids is not None:
                raise ValueError("an exit rule is for inference: it takes no targets")
            return self._forward_under_rule(input_ids, attention_mask, cache, exit, return_steps)
        steps = c.train_steps if supervision_steps is None else supervision_steps
        x, ctx = self._enter(input_ids, attention_mask, cache)
        y, z, done = self.initial_state(x) if carry is None else carry
        if steps < 1 or (cache is not None and done + steps > c.train_steps):
            raise ValueError(f"supervision_steps is {steps} after {done}: 1 or more, within the config's with a cache")
        per_step = c.visits_per_step // visits_per_recursion_step(c)  # answers that can be read out of each
        first, end = done * per_step, (done + steps) * per_step
        weights = loss_weights(c, end)[first:]
        if not any(weights):  # a step of weight 0, run by itself
            weights = [1.0] * len(weights)
        loss = ce_loss = act_loss = None if target_ids is None else x.new_zeros(())
        read = []
        for step, weight in zip(range(first, end), weights):
            y_before = y
            y, z = self.recursion_step(x, y, z, ctx, step)
            # reading out is as expensive as a visit where the vocabulary is large: the loop skips visits of weight 0
            has_loss = target_ids is not None and (weight > 0 or c.recursion == "trm")
            if has_loss or return_steps or step == end - 1:
                logits, halt = self._read_out(y, ctx, step)
            if return_steps:
                read.append((logits, halt))
            if has_loss:
                share = weight / sum(weights)
                ce, is_right = self.token_loss(logits, target_ids)
                act = self._halting_loss(y_before, step, logits, halt, target_ids, is_right, ctx)
                ce_loss, act_loss = ce_loss + share * ce, act_loss + share * act
                loss = loss + share * (ce + c.act_weight * act)
            # between supervision steps the gradient is cut, so that memory does not grow with their number
            if not c.full_bptt and (step + 1) % per_step == 0:
                y, z = y.detach(), None if z is None else z.detach()
        if cache is not None:  # once per call: until here every layer has written beside the same old columns
            cache.advance(input_ids.shape[1])
        if return_steps:
            logits, halt = _stack_steps(read)
        return TRMOutput(loss, ce_loss, act_loss, logits, halt, Carry(y, z, done + steps))

    @torch.no_grad()
    def _forward_under_rule(self, input_ids, attention_mask, cache, rule: ExitRule, return_steps) -> TRMOutput:
        """Inference where each token leaves the recursion when `rule` says so.  carry.steps: Int (B, T)."""
        depth = max_depth(self.config, rule.check(self.config))
        if rule.adapts and cache is None:  # tokens that go on attend to the last keys and values of those that left
            cache = self.new_cache(*input_ids.shape, depth=depth)
        x, ctx = self._enter(input_ids, attention_mask, cache)
        carry, tokens = self.initial_state(x), Leaving(input_ids, attention_mask)
        h = logits = None
        read = []
        for step in range(depth):
            is_last, before, logits_before = step == depth - 1, carry, logits
            carry = self._inference_cycle(x, before, ctx)
            carry = carry._replace(y=tokens.keep(before.y, carry.y), z=tokens.keep(before.z, carry.z))
            tokens.count()
            if rule.adapts or return_steps or is_last:  # else nobody reads the answer of this step
                h = tokens.keep(h, self.before_head(carry.y, ctx, step))
            logits = None
            if rule.exit == "kl":  # each token compares its own distributions, so all columns are needed
                logits = self.head(h)
            elif return_steps or is_last:
                logits = self.head(ctx.read(h))
            if return_steps:
                read.append((ctx.read(logits), self._halt(carry.y)))
            if rule.adapts and not is_last:
                halt = self._halt(carry.y) if rule.exit == "halt" else None
                if tokens.stop(stops(rule, self.config, halt, logits, logits_before)):
                    cache.fill_from(step, input_ids.shape[1])  # later tokens may go deeper, and attend there
                    break
                cache.stopped = tokens.stopped
        if cache is not None:
            cache.advance(input_ids.shape[1])
        logits = self.head(ctx.read(h)) if logits is None else ctx.read(logits)
        halt = self._halt(carry.y)
        if return_steps:
            logits, halt = _stack_steps(read)
        return TRMOutput(None, None, None, logits, halt, carry._replace(steps=tokens.steps))

    @torch.no_grad()
    def _inference_cycle(self, x, carry: Carry, ctx) -> Carry:
        """One recursion step without gradient; here the carry counts recursion steps."""
        y, z = self.recursion_step(x, carry.y, carry.z, ctx, carry.steps)
        return Carry(y, z, carry.steps + 1)

    def recursion_step(self, x, y, z, ctx, step: int):
        """What lies between two answers that can be read out: the one dispatch by family.  (B, T, D) each -> y, z.

        T cycles of trm, which are a supervision step; one visit of the loop; the only visit of a plain transformer."""
        c, net = self.config, self.net
        visit = step * visits_per_recursion_step(c)
        if c.recursion == "trm":
            return self.deep_recursion(x, y, z, ctx, visit)
        if c.recursion == "loop":
            with self._gradient(step % c.deep_steps):
                return self._visit(net.inject_y, (x, y), y, ctx, visit), None  # y = net(x, y)
        return self._visit(None, (x,), None, ctx, visit), None  # y = net(x)

    def deep_recursion(self, x, y, z, ctx, visit=0):
        """T cycles, of which only the last grad_deep_steps carry gradient.  x, y, z: (B, T, D) -> y, z."""
        for t in range(self.config.deep_steps):  # T in the paper
            with self._gradient(t):
                y, z = self.latent_recursion(x, y, z, ctx, visit)
            visit += self.config.latent_steps + 1
        return y, z

    def latent_recursion(self, x, y, z, ctx, visit=0):
        """n updates of the latent z, then one of the answer y.  x, y, z: (B, T, D).  arXiv:2510.04871, section 4."""
        net, n = self.net, self.config.latent_steps  # n in the paper
        for i in range(n):
            z = self._visit(net.inject_z, (x, y, z), z, ctx, visit + i)  # z = net(x, y, z)
        y = self._visit(net.inject_y, (y, z), y, ctx, visit + n)  # y = net(y, z)
        return y, z

    def _gradient(self, t: int):
        """Context of cycle t of a supervision step (trm) or visit t of the loop: only the last ones carry gradient."""
        carries = t >= self.config.deep_steps - self.config.grad_deep_steps
        return torch.set_grad_enabled(carries and torch.is_grad_enabled())

    def _visit(self, inject, inputs, old, ctx, visit):
        """One application of the network: it reads `inputs`, joined by `inject`, and returns the new value of `old`."""
        c = self.config
        slot = c.prelude_layers + visit * c.n_layers if ctx.cache is not None else 0
        if c.gradient_checkpointing and torch.is_grad_enabled() and ctx.cache is None:
            return checkpoint(self.net, inject, inputs, old, ctx, slot, use_reentrant=False)
        return self.net(inject, inputs, old, ctx, slot)

    def _enter(self, input_ids, attention_mask, cache) -> tuple[Tensor, Context | OneTokenContext]:
        """Embedding and prelude: x (B, T, D), and what all attention layers share.

        This is where the way of the blocks is chosen: `run_blocks` sees it by the type of the context."""
        c = self.config
        x = self.embed(input_ids) * c.embed_scale
        is_plain = not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        decodes_one_token = cache is not None and input_ids.shape[1] == 1 and is_plain
        context = one_token_context if decodes_one_token else make_context
        positions, ctx = context(c, input_ids, attention_mask, cache, x.dtype)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        return run_blocks(self.prelude, None, x, ctx, 0), ctx

    def initial_state(self, x) -> Carry:
        """The state before the first step.  Without injection the loop begins with x, and never sees it again."""
        if self.config.recursion == "trm":
            return Carry(self.y_init.to(x.dtype).expand_as(x), self.z_init.to(x.dtype).expand_as(x), 0)
        return Carry(x if self.config.injection == "none" else torch.zeros_like(x), None, 0)

    def before_head(self, y, ctx, step):
        """The coda of the answer y (B, T, D) of a recursion step: what the head reads."""
        slot = 0 if ctx.cache is None or not self.coda else ctx.cache.coda_slot(step)
        return run_blocks(self.coda, self.coda_norm, y, ctx, slot)

    def _read_out(self, y, ctx, step):
        """logits (B, T, V) and halting logits of the answer y (B, T, D) of a recursion step."""
        return self.head(ctx.read(self.before_head(y, ctx, step))), self._halt(y)

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
        if not self.config.causal:  # the whole sequence halts together
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


def _stack_steps(read):
    """[(logits, halting logits) of each step] -> both with a leading dimension of steps."""
    logits, halt = zip(*read)
    return torch.stack(logits), None if halt[0] is None else torch.stack(halt)


def run_blocks(blocks, norm: nn.Module | None, h, ctx: Context | OneTokenContext, slot: int) -> Float[Tensor, "b t d"]:
    """One block after the other, the first at a slot of the cache, then the norm.  (B, T, D) -> same."""
    if isinstance(ctx, OneTokenContext):  # one new token per row beside a cache: the same in fewer operations
        return decode_one_token(blocks, norm, h, ctx, slot)
    for layer, block in enumerate(blocks):
        h = block(h, ctx, slot + layer)
    return h if norm is None else norm(h)


class TinyNet(nn.Module):
    """The one network: the inputs are injected, n_layers blocks follow, then the gate.  (B, T, D) each -> (B, T, D)."""

    def __init__(self, c: TRMConfig):
        super().__init__()
        D = c.d_model
        self.injection = injection_of(c)
        self.inject_z = self.injection.layer(3, D) if c.recursion == "trm" else None  # reads x, y, z
        # reads y, z (trm) or x, y (loop)
        self.inject_y = self.injection.layer(2, D) if c.recursion != "none" else None
        self.blocks = nn.ModuleList(TinyBlock(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(D, c.norm_eps) if c.norm != "post" else None  # post-norm blocks end normalised
        self.gate = nn.Linear(2 * D, D) if c.gate and c.recursion != "none" else None

    def forward(self, inject: nn.Module | None, inputs: tuple[Tensor, ...], old: Tensor | None, ctx, slot: int):
        """inject: inject_z or inject_y; inputs: the streams that are read; old: the one whose new value is returned."""
        h = self.injection.mix(inject, *inputs)
        h = self.apply_blocks(h.to(inputs[0].dtype), ctx, slot)  # autocast narrows the injection, not the stream
        if self.gate is None:
            return h
        openness = torch.sigmoid(self.gate(torch.cat((old, h), dim=-1)))
        return torch.lerp(old, h, openness.to(h.dtype))

    def apply_blocks(self, h, ctx, slot):
        """The part that is compiled: one graph serves every visit, whatever was injected."""
        return run_blocks(self.blocks, self.norm, h, ctx, slot)


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
