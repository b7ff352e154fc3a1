"""The Tiny Recursive Model (arXiv:2510.04871) as a language model. Looped and plain transformers use the same class.

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
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.cache import KVCache
from src.decode import OneTokenContext, decode_one_token, one_token_context
from src.dropout import Dropout
from src.exits import Leaving, max_depth, stops, visits_per_recursion_step
from src.layers import (
    Attention,
    Context,
    MLPMixer1D,
    SequenceRMSNorm,
    SwiGLU,
    init_weights,
    injection_of,
    make_context,
    norm_of,
)
from src.losses import IGNORE, halting_loss, token_loss_of
from src.model_config import ExitRule, TRMConfig, loss_weights
from src.sampling import generate_ids


class Carry(NamedTuple):
    """The recursive state between supervision steps."""

    y: Float[Tensor, "b t d"]
    z: Float[Tensor, "b t d"] | None  # trm only
    steps: int | Tensor  # int: supervision steps done. Tensor (B, T), after an exit rule: recursion steps of each token


class TRMOutput(NamedTuple):
    """The result of `TRMModel.forward`. Losses are means over target tokens (or rows: loss_mean), in nats.

    With return_steps, logits and halt_logits have a leading dimension: one entry per recursion step."""

    loss: Float[Tensor, ""] | None
    ce_loss: Float[Tensor, ""] | None
    act_loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "*s b t v"]
    halt_logits: Tensor | None  # (B, T) causal, (B,) otherwise; None without a halting head
    carry: Carry


class TRMModel(nn.Module):
    """ids (B, T) -> logits (B, T, V), by recursion of one TinyNet.

    Training and inference call only `forward`, because DDP and FSDP act on calls of `forward`."""

    def __init__(self, config: TRMConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: take it from the tokenizer")
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.pos_embed = nn.Embedding(c.positions_per_row, c.d_model) if c.positions == "learned" else None
        self.puzzle_embed = nn.Embedding(max(1, c.puzzle_ids), c.puzzle_dim) if c.prefix_tokens else None
        self.prelude = nn.ModuleList(TinyBlock(c) for _ in range(c.prelude_layers))
        self.net = TinyNet(c)
        self.coda = nn.ModuleList(TinyBlock(c) for _ in range(c.coda_layers))
        self.coda_norm = norm_of(c) if c.coda_layers and c.norm != "post" else None
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.token_loss = token_loss_of(c)  # an attribute, so that runtime.compile_parts can replace it
        self.q_head = nn.Linear(c.d_model, 1) if c.halting else None
        if c.recursion == "trm":
            # the initial state is fixed and random, as in the paper: buffers are saved, but not trained
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
        puzzle_ids: Int[Tensor, "b"] | None = None,
    ) -> TRMOutput:
        """Runs `supervision_steps` steps from `carry`: by default, all steps of the config from the initial state.

        target_ids: target_ids[t] is the token after input_ids[t]; IGNORE (-100) has no loss.
        attention_mask: 0 marks padding. Different numbers mark packed documents, which do not attend to each other.
        return_steps: return the logits of every recursion step (a supervision step of trm, a visit of the loop).
        exit: inference with an exit rule, from the initial state and without targets. carry.steps (B, T) then holds the
            number of recursion steps that each token took.
        puzzle_ids: identifiers of the puzzles, for the prefix; default 0.
        """
        c = self.config
        if exit is not None:
            if target_ids is not None:
                raise ValueError("an exit rule is for inference: it takes no targets")
            return self._forward_under_rule(input_ids, attention_mask, cache, exit, return_steps, puzzle_ids)
        steps = c.train_steps if supervision_steps is None else supervision_steps
        x, ctx = self._enter(input_ids, attention_mask, cache, puzzle_ids)
        y, z, done = self.initial_state(x) if carry is None else carry
        self._check_steps(steps, done, cache)
        # `step` counts recursion steps: the loop has one supervision step, but an answer after each of its visits
        per_step = c.visits_per_step // visits_per_recursion_step(c)
        first, end = done * per_step, (done + steps) * per_step
        weights = loss_weights(c, end, first)
        loss = ce_loss = act_loss = None if target_ids is None else x.new_zeros(())
        read = []
        for step, weight in zip(range(first, end), weights):
            y_before = y
            y, z = self.recursion_step(x, y, z, ctx, step)
            # with a large vocabulary the head costs as much as a visit, so it is skipped where the weight is 0
            has_loss = target_ids is not None and weight > 0
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
            # detach between supervision steps, so that memory does not grow with their number
            if not c.full_bptt and (step + 1) % per_step == 0:
                y, z = _detach(y, z)
        if cache is not None:  # only now: during the call, all layers write to the same columns
            cache.advance(input_ids.shape[1])
        logits, halt = _stack_steps(read) if return_steps else (logits, halt)
        return TRMOutput(loss, ce_loss, act_loss, logits, halt, Carry(y, z, done + steps))

    def _check_steps(self, steps, done, cache):
        if steps < 1 or (cache is not None and done + steps > self.config.train_steps):
            most = f" and, with a cache, {self.config.train_steps - done} at most" if cache is not None else ""
            raise ValueError(f"supervision_steps is {steps}: set it to 1 or more{most}")
        if done and cache is not None and cache.length:  # the call would add the tokens of the carry a second time
            raise ValueError("a carry is of tokens that this cache has already: give a new cache, or none")

    @torch.no_grad()
    def _forward_under_rule(self, input_ids, attention_mask, cache, rule: ExitRule, return_steps, puzzle_ids):
        """Inference in which each token stops recursing when `rule` decides.  Returns carry.steps as Int (B, T)."""
        depth = max_depth(self.config, rule.check(self.config))
        if rule.adapts and cache is None:  # the cache keeps keys and values of stopped tokens for the others
            cache = self.new_cache(*input_ids.shape, depth=depth)
        x, ctx = self._enter(input_ids, attention_mask, cache, puzzle_ids)
        carry = self.initial_state(x)
        tokens = Leaving(input_ids, attention_mask, rule.patience)
        h = logits = None
        read = []
        for step in range(depth):
            is_last = step == depth - 1
            before, logits_before = carry, logits
            carry = self._inference_step(x, before, ctx)
            carry = carry._replace(y=tokens.keep(before.y, carry.y), z=tokens.keep(before.z, carry.z))
            tokens.count()
            if rule.adapts or return_steps or is_last:  # a fixed depth needs the answer of its last step only
                h = tokens.keep(h, self.before_head(carry.y, ctx, step))
            logits = None
            if rule.exit == "kl":  # every token compares its own distributions, so all columns need logits
                logits = self.head(h)
            elif return_steps or is_last:
                logits = self.head(ctx.read(h))
            if return_steps:
                read.append((ctx.read(logits), self._halt(carry.y)))
            if rule.adapts and not is_last:
                halt = self._halt(carry.y) if rule.exit == "halt" else None
                if tokens.stop(stops(rule, self.config, halt, logits, logits_before)):
                    cache.fill_from(step, input_ids.shape[1])  # a later token that runs more steps attends there
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
    def _inference_step(self, x, carry: Carry, ctx) -> Carry:
        """Runs one recursion step without gradient. Here carry.steps counts recursion steps."""
        y, z = self.recursion_step(x, carry.y, carry.z, ctx, carry.steps)
        return Carry(y, z, carry.steps + 1)

    def recursion_step(self, x, y, z, ctx, step: int):
        """Runs one recursion step, from one answer to the next: chooses the computation by family.

        trm: a supervision step of T cycles. loop: one visit. none: the only visit. x, y, z: (B, T, D) -> y, z."""
        c, net = self.config, self.net
        visit = step * visits_per_recursion_step(c)
        if c.recursion == "trm":
            return self.deep_recursion(x, y, z, ctx, visit)
        if c.recursion == "loop":
            with self._gradient(step % c.deep_steps):
                new = self._visit(net.inject_y, (x, y), y, ctx, visit)  # y = net(x, y)
                if c.visit_dropout and self.training and step > 0:
                    skips = torch.rand(y.shape[:2], device=y.device) < c.visit_dropout
                    new = torch.where(skips[..., None], y, new)
                return new, None
        return self._visit(None, (x,), None, ctx, visit), None  # y = net(x)

    def deep_recursion(self, x, y, z, ctx, visit=0):
        """Runs T cycles; only the last grad_deep_steps carry gradient.  x, y, z: (B, T, D) -> y, z."""
        for t in range(self.config.deep_steps):  # T in the paper
            with self._gradient(t):
                y, z = self.latent_recursion(x, y, z, ctx, visit)
            visit += self.config.latent_steps + 1
        return y, z

    def latent_recursion(self, x, y, z, ctx, visit=0):
        """Updates the latent z n times, then the answer y once.  (B, T, D) each.  arXiv:2510.04871, section 4."""
        net, n = self.net, self.config.latent_steps  # n in the paper
        for i in range(n):
            z = self._visit(net.inject_z, (x, y, z), z, ctx, visit + i)  # z = net(x, y, z)
        y = self._visit(net.inject_y, (y, z), y, ctx, visit + n)  # y = net(y, z)
        return y, z

    def _gradient(self, t: int):
        """Enables gradients if t, a cycle of trm or a visit of the loop, is among the last grad_deep_steps."""
        carries = t >= self.config.deep_steps - self.config.grad_deep_steps
        return torch.set_grad_enabled(carries and torch.is_grad_enabled())

    def _visit(self, inject, inputs, old, ctx, visit):
        """Applies the network once to `inputs`, combined by `inject`; returns what replaces `old`, (B, T, D)."""
        c = self.config
        slot = c.prelude_layers + visit * c.n_layers if ctx.cache is not None else 0
        if c.gradient_checkpointing and torch.is_grad_enabled() and ctx.cache is None:
            return checkpoint(self.net, inject, inputs, old, ctx, slot, use_reentrant=False)
        return self.net(inject, inputs, old, ctx, slot)

    def _enter(self, input_ids, attention_mask, cache, puzzle_ids=None) -> tuple[Tensor, Context | OneTokenContext]:
        """Runs embedding and prelude.  Returns x (B, P + T, D), with P prefix tokens, and the context of this call.

        All attention layers share the context. Its type selects the implementation of the blocks in `run_blocks`:
        OneTokenContext if each row adds one new token to a cache, else Context."""
        c = self.config
        x = self.embed(input_ids) * c.embed_scale
        if self.puzzle_embed is not None:
            prefix = self._prefix(input_ids, puzzle_ids)
            x = torch.cat((prefix, x), dim=1)
            input_ids = input_ids.new_zeros(x.shape[:2])  # below, only the shape of input_ids is used
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (c.prefix_tokens, 0), value=1)
        is_plain = not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        decodes_one_token = cache is not None and input_ids.shape[1] == 1 and is_plain
        context = one_token_context if decodes_one_token else make_context
        positions, ctx = context(c, input_ids, attention_mask, cache, x.dtype)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        return run_blocks(self.prelude, None, x, ctx, 0), ctx

    def _prefix(self, input_ids, puzzle_ids):
        """Returns the prefix (B, P, D): the embedding of each puzzle, padded with zeros."""
        c = self.config
        ids = input_ids.new_zeros(len(input_ids)) if puzzle_ids is None else puzzle_ids
        prefix = self.puzzle_embed(ids) * c.embed_scale
        prefix = F.pad(prefix, (0, c.prefix_tokens * c.d_model - c.puzzle_dim))
        return prefix.view(len(ids), c.prefix_tokens, c.d_model)

    def initial_state(self, x) -> Carry:
        """Returns the state before the first step.  With injection `none`, the loop reads x only here."""
        if self.config.recursion == "trm":
            return Carry(self.y_init.to(x.dtype).expand_as(x), self.z_init.to(x.dtype).expand_as(x), 0)
        if self.config.injection == "none":
            return Carry(x, None, 0)
        noise = self.config.start_noise if self.training else 0
        return Carry(noise * torch.randn_like(x) if noise else torch.zeros_like(x), None, 0)

    def before_head(self, y, ctx, step):
        """Runs the coda on the answer y (B, P + T, D) of a recursion step. The head reads the result (B, T, D)."""
        slot = 0 if ctx.cache is None or not self.coda else ctx.cache.coda_slot(step)
        return run_blocks(self.coda, self.coda_norm, y, ctx, slot)[:, self.config.prefix_tokens :]

    def _read_out(self, y, ctx, step):
        """Returns logits (B, T, V) and halting logits for the answer y (B, T, D) of a recursion step."""
        return self.head(ctx.read(self.before_head(y, ctx, step))), self._halt(y)

    def _halt(self, y):
        if self.q_head is not None:
            return self.q_head(y if self.config.causal else y[:, 0]).squeeze(-1)

    def _halting_loss(self, y_before, step, logits, halt, target_ids, right, ctx):
        """Returns the halting loss of one recursion step.

        With act_target `stable`, step s + 1 shows whether the answer of step s was stable. So each step computes the
        loss of the step before it, and step 0 has none."""
        valid = target_ids != IGNORE
        if halt is None or (self.config.act_target == "stable" and step == 0):
            return logits.new_zeros(())
        if self.config.act_target == "stable":
            logits_before, halt = self._read_out(y_before, ctx, step - 1)
            right = logits_before.argmax(-1) == logits.argmax(-1)
        if not self.config.causal:  # the sequence halts as a whole: every target must be right
            right = (right | ~valid).all(-1)
        return halting_loss(halt, right, valid, self.config.loss_mean)

    def new_cache(self, batch: int, max_len: int | None = None, read_steps=1, depth=None, last_only=False) -> KVCache:
        """Returns an empty cache of `batch` rows and max_len columns. With an exit rule, depth is `exits.max_depth`."""
        w = self.embed.weight
        return KVCache(self.config, batch, max_len, read_steps, w.dtype, w.device, depth, last_only)

    def generate(self, prompt_ids: Int[Tensor, "b t"], max_new_tokens: int, **options) -> Int[Tensor, "b u"]:
        """Generates text: (B, T) -> (B, T + max_new_tokens).

        Options are those of sampling.generate: temperature=1.0, top_k, top_p, use_cache=True, seed, eos_id,
        attention_mask (0 marks padding on the left)."""
        return generate_ids(self, prompt_ids, max_new_tokens, **options)


def _detach(*streams):
    return (None if stream is None else stream.detach() for stream in streams)


def _stack_steps(read):
    """Stacks [(logits, halting logits), ...] of several steps: each gets a leading dimension of steps."""
    logits, halt = zip(*read)
    return torch.stack(logits), None if halt[0] is None else torch.stack(halt)


def run_blocks(blocks, norm: nn.Module | None, h, ctx: Context | OneTokenContext, slot: int) -> Float[Tensor, "b t d"]:
    """Runs the blocks in order, then the norm.  (B, T, D) -> (B, T, D).  slot: cache slot of the first block."""
    if isinstance(ctx, OneTokenContext):  # the same result in fewer operations
        return decode_one_token(blocks, norm, h, ctx, slot)
    for layer, block in enumerate(blocks):
        h = block(h, ctx, slot + layer)
    return h if norm is None else norm(h)


class TinyNet(nn.Module):
    """The network that is applied at every visit: injection, n_layers blocks, gate.  (B, T, D) each -> (B, T, D)."""

    def __init__(self, c: TRMConfig):
        super().__init__()
        D = c.d_model
        self.injection = injection_of(c)
        self.inject_z = self.injection.layer(3, D) if c.recursion == "trm" else None  # reads x, y, z
        # reads y, z (trm) or x, y (loop)
        self.inject_y = self.injection.layer(2, D) if c.recursion != "none" else None
        self.blocks = nn.ModuleList(TinyBlock(c) for _ in range(c.n_layers))
        self.norm = norm_of(c) if c.norm != "post" else None  # the output of post-norm blocks is already normalised
        self.gate = nn.Linear(2 * D, D) if c.gate and c.recursion != "none" else None

    def forward(self, inject: nn.Module | None, inputs: tuple[Tensor, ...], old: Tensor | None, ctx, slot: int):
        """Returns the new value of the stream `old`.  inject: inject_z or inject_y.  inputs: the streams to read."""
        h = self.injection.mix(inject, *inputs)
        h = self.apply_blocks(h.to(inputs[0].dtype), ctx, slot)  # autocast may give bf16
        if self.gate is None:
            return h
        openness = torch.sigmoid(self.gate(torch.cat((old, h), dim=-1)))
        return torch.lerp(old, h, openness.to(h.dtype))

    def apply_blocks(self, h, ctx, slot):
        """The part that torch.compile compiles: one graph serves every visit, with any injection."""
        return run_blocks(self.blocks, self.norm, h, ctx, slot)


class TinyBlock(nn.Module):
    """Attention (or MLPMixer1D), then SwiGLU, each with a residual and RMSNorm: post, pre or sandwich.

    (B, T, D) -> (B, T, D)."""

    def __init__(self, c: TRMConfig):
        super().__init__()
        is_mixer, sandwich = c.mixer == "mlp", c.norm == "sandwich"
        self.attn = MLPMixer1D(c.positions_per_row, c.mixer_ff) if is_mixer else Attention(c)
        self.mlp = SwiGLU(c.d_model, c.d_ff)
        self.attn_norm, self.mlp_norm = norm_of(c), norm_of(c)
        if is_mixer and c.norm == "post":  # as in the authors' code: over positions, not channels
            self.attn_norm = SequenceRMSNorm(c.positions_per_row, c.norm_eps, c.norm_gain)
        self.attn_out_norm = norm_of(c) if sandwich else nn.Identity()
        self.mlp_out_norm = norm_of(c) if sandwich else nn.Identity()
        self.post = c.norm == "post"
        self.drop = Dropout(c.dropout)

    def forward(self, h: Float[Tensor, "b t d"], ctx: Context, slot: int) -> Float[Tensor, "b t d"]:
        if self.post:
            h = self.attn_norm(h + self.drop(self.attn(h, ctx, slot)))
            return self.mlp_norm(h + self.drop(self.mlp(h)))
        h = h + self.drop(self.attn_out_norm(self.attn(self.attn_norm(h), ctx, slot)))
        return h + self.drop(self.mlp_out_norm(self.mlp(self.mlp_norm(h))))
