"""The parts of a TinyNet: injection, RMSNorm, rotary positions, grouped-query attention, SwiGLU, the sequence mixer."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from src.attention import attention
from src.cache import KVCache


class Injection:
    """How the streams that a visit reads become h, the input of the network's blocks.  (B, T, D) each -> (B, T, D).

    The base class returns the last stream, so that x does not come in again (`none`). TinyNet keeps the weights of an
    injection, one `layer` per kind of visit, and hands them to `mix`; FLOPs and width growth ask for the rest.
    """

    @staticmethod
    def layer(streams: int, dim: int) -> nn.Module | None:
        """Weights for visits that read so many streams, or None.  Their first dimension is the D channels of h."""
        return None

    @staticmethod
    def mix(layer: nn.Module | None, *streams: Tensor) -> Tensor:
        return streams[-1]

    @staticmethod
    def macs(streams: int, dim: int) -> int:
        """Multiply-adds of a visit, per token."""
        return 0

    @staticmethod
    def parts(streams: int, dim: int) -> list[int]:
        """The sizes of the parts, one per stream, that the second dimension of its weights is made of."""
        return [dim] * streams


class SumInjection(Injection):
    """h = x + y + z, as in the TRM paper."""

    @staticmethod
    def mix(layer, *streams):
        h = streams[0]
        for stream in streams[1:]:
            h = h + stream
        return h


class ConcatInjection(Injection):
    """h = W [x; y; z]: a linear layer over the streams, side by side."""

    @staticmethod
    def layer(streams, dim):
        return nn.Linear(streams * dim, dim, bias=False)

    @staticmethod
    def mix(layer, *streams):
        return layer(torch.cat(streams, dim=-1))

    @staticmethod
    def macs(streams, dim):
        return streams * dim**2


# A new injection is a subclass and its name here, its name in TRMConfig, and its equation in tests/reference.py.
INJECTIONS = {"sum": SumInjection, "concat": ConcatInjection, "none": Injection}


def injection_of(config) -> type[Injection]:
    """The injection of a TRMConfig's model.  A plain transformer reads x alone: a sum of one stream is that stream."""
    return SumInjection if config.recursion == "none" else INJECTIONS[config.injection]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, arXiv:1910.07467.  (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # under autocast queries and keys come in bf16
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def rotary_table(
    positions: Int[Tensor, "b t"],
    head_dim: int,
    theta: float,
    scaling: float | None,
    dtype: torch.dtype,
    trained_len: int | None = None,
) -> tuple[Float[Tensor, "b 1 t e"], Float[Tensor, "b 1 t e"]]:
    """cos and sin of every position and channel, arXiv:2104.09864, made anew from the positions so that no table
    bounds the length.  `scaling` divides the positions (position interpolation, arXiv:2306.15595), or acts by YaRN
    where the context trained on is given."""
    exact = dtype if dtype == torch.float64 else torch.float32  # bf16 cannot hold a position
    channel = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact)
    frequency, size = theta ** (-channel / head_dim), 1.0
    if scaling is not None and trained_len is not None:
        frequency, size = yarn(frequency, theta, scaling, trained_len)
    elif scaling is not None:
        frequency = frequency / scaling
    angle = positions.to(exact)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # (B, 1, T, E): rotate-half pairs channel i with i + E/2
    return angle.cos() * size, angle.sin() * size


def yarn(frequency: Float[Tensor, "e"], theta: float, scaling: float, trained_len: int) -> tuple[Tensor, float]:
    """Frequencies of rotary channels in a context `scaling` times as long, and the factor of cos and sin (so that
    scores grow by its square), arXiv:2309.00071.

    A channel pair that turns more than 32 times in trained_len tokens tells near positions apart and keeps its
    frequency; one that turns less than once would meet unseen angles and is slowed by `scaling`. Between them the
    mixture is linear in the channel, as in the authors' code; in the paper it is linear in the number of turns."""
    channels = len(frequency)
    first, last = (channels * math.log(trained_len / (turns * 2 * math.pi), theta) for turns in (32, 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * channels - 1)
    index = torch.arange(channels, device=frequency.device, dtype=frequency.dtype)
    slowed = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (1 - slowed + slowed / scaling), 0.1 * math.log(max(scaling, 1.0)) + 1


def apply_rotary_emb(
    x: Float[Tensor, "b h t e"], cos: Float[Tensor, "#b 1 t e"], sin: Float[Tensor, "#b 1 t e"]
) -> Float[Tensor, "b h t e"]:
    """Rotate the channel pairs (i, i + E/2) of queries or keys by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Context(NamedTuple):
    """What every attention layer of one forward call shares."""

    rotary: tuple[Tensor, Tensor] | None  # cos, sin: (B or 1, 1, T, E)
    mask: Bool[Tensor, "b 1 t s"] | None  # True = may attend; None = causal or everything
    is_causal: bool  # lower-triangular attention where mask is None
    cache: KVCache | None

    def read(self, h: Tensor) -> Tensor:
        """Of states or logits (B, T, ...), those of the columns whose logits the caller wants."""
        return h[:, -1:] if self.cache is not None and self.cache.last_only else h


def positions_and_mask(
    input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None, cache: KVCache | None, causal: bool
) -> tuple[Int[Tensor, "_ t"], Bool[Tensor, "_ 1 t s"] | None]:
    """positions (B or 1, T), counting the real tokens of each document; mask (B or 1, 1, T, S), None if none is needed.

    A token attends to its own number in attention_mask (its document) and never to 0 (padding)."""
    B, T = input_ids.shape
    past = 0 if cache is None else cache.length
    index = torch.arange(past + T, device=input_ids.device)
    segments = attention_mask if cache is None else cache.extend_mask(attention_mask, B, T)
    if segments is None:
        is_later_chunk = causal and past > 0 and T > 1
        return index[None, past:], (index[past:, None] >= index)[None, None] if is_later_chunk else None
    is_past = index[past:, None] >= index[None, :]  # (T, S)
    real = (segments != 0).cumsum(-1) - 1
    document = segments.gather(-1, torch.where(segments != 0, index, 0).cummax(-1).values)  # padding: the one before
    begins = document.diff(dim=-1, prepend=torch.zeros_like(segments[:, :1])) != 0
    positions = (real - torch.where(begins, real, 0).cummax(-1).values).clamp(min=0)[:, past:]
    mask = (segments[:, past:, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    mask = mask & is_past if causal else mask
    mask = mask | (index[past:, None] == index[None, :])  # padding sees itself, so that no row is empty
    return positions, mask[:, None]


def make_context(config, input_ids, attention_mask, cache, dtype) -> tuple[Tensor, Context]:
    """positions (B or 1, T) and the Context of one forward call of a TRMConfig's model."""
    positions, mask = positions_and_mask(input_ids, attention_mask, cache, config.causal)
    rotary = rotary_of(config, dtype)
    is_causal = config.causal and mask is None and input_ids.shape[1] > 1
    return positions, Context(None if rotary is None else rotary(positions), mask, is_causal, cache)


def rotary_of(config, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """`rotary_table` as a function of the positions alone; None for a model that has no rotary positions."""
    c = config
    if c.positions != "rope" or c.mixer != "attention":
        return None
    return lambda positions: rotary_table(
        positions, c.head_dim, c.rope_theta, c.rope_scaling, dtype, c.rope_trained_len
    )


class Attention(nn.Module):
    """Grouped-query attention, arXiv:2305.13245: H query heads share K key/value heads.  (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, self.dropout, self.head_dim = config.d_model, config.dropout, config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.qkv = nn.Linear(D, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, slot: int) -> Float[Tensor, "b t d"]:
        B, T, D = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, E)
        H, K = self.n_heads, self.n_kv_heads
        qk, v = heads.split((H + K, K), dim=1)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), dim=1).to(v.dtype)
        if ctx.rotary is not None:
            qk = apply_rotary_emb(qk, *ctx.rotary)
        q, k = qk.split((H, K), dim=1)
        if ctx.cache is not None:
            k, v = ctx.cache.update(slot, k, v)  # (B, K, S, E): everything seen so far
        y = attention(q, k, v, ctx.mask, ctx.is_causal, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), arXiv:2002.05202, over the last dimension.  (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLPMixer1D(nn.Module):
    """SwiGLU across the sequence in place of attention, arXiv:2105.01601.  (B, L, D) -> same, for the one length L."""

    def __init__(self, seq_len: int, hidden: int):
        super().__init__()
        self.mlp = SwiGLU(seq_len, hidden)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, slot: int) -> Float[Tensor, "b t d"]:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def init_weights(model: nn.Module):
    """Starting weights of a TRMModel: linear N(0, 1/fan_in); embedding N(0, 1), or N(0, 1/D) if it is also the head.

    The halting head starts at no (as in the paper), the gate open, so that new states pass."""
    c = model.config
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    model.embed.weight.normal_(std=c.d_model**-0.5 if c.tie_embeddings else 1.0)
    if model.pos_embed is not None:
        model.pos_embed.weight.normal_(std=0.02)
    if c.recursion == "trm":
        model.q_head.weight.zero_()
        model.q_head.bias.fill_(-5.0)
        nn.init.trunc_normal_(model.y_init)
        nn.init.trunc_normal_(model.z_init)
    if model.net.gate is not None:
        model.net.gate.bias.fill_(4.0)
