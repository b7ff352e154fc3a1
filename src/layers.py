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

TRUNCATED_STD = 0.8796256610342398  # of a standard normal distribution that is cut off at -2 and 2


class Injection:
    """Combines the streams that a visit reads into h, the input of the blocks.  (B, T, D) each -> (B, T, D).

    The base class is the injection `none`: it returns the last stream, the state, so x enters only at the start.
    TinyNet keeps the weights, one `layer` for visits that update z and one for visits that update y, and passes them to
    `mix`. `macs` serves the count of FLOPs; `parts` serves a curriculum that widens the model.
    """

    @staticmethod
    def layer(streams: int, dim: int) -> nn.Module | None:
        """Returns the weights for visits that read `streams` streams, or None.  Their first dimension has size D."""
        return None

    @staticmethod
    def mix(layer: nn.Module | None, *streams: Tensor) -> Tensor:
        return streams[-1]

    @staticmethod
    def macs(streams: int, dim: int) -> int:
        """Returns the multiply-adds per token of one injection."""
        return 0

    @staticmethod
    def parts(streams: int, dim: int) -> list[int]:
        """Returns the sizes of the parts into which the weights' second dimension divides, one part per stream."""
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
    """h = W [x; y; z]: a linear layer over the concatenated streams."""

    @staticmethod
    def layer(streams, dim):
        return nn.Linear(streams * dim, dim, bias=False)

    @staticmethod
    def mix(layer, *streams):
        return layer(torch.cat(streams, dim=-1))

    @staticmethod
    def macs(streams, dim):
        return streams * dim**2


# docs/architecture.md lists the files to change for a new injection
INJECTIONS = {"sum": SumInjection, "concat": ConcatInjection, "none": Injection}


def injection_of(config) -> type[Injection]:
    """Returns the injection class for a TRMConfig.

    A plain transformer reads only x. It uses the sum, because the sum of one stream is that stream."""
    return SumInjection if config.recursion == "none" else INJECTIONS[config.injection]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, arXiv:1910.07467.  (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float, gain: bool = True):
        """gain: whether `weight` is learned; without it, it stays 1 and is not saved."""
        super().__init__()
        self.eps = eps
        if gain:
            self.weight = nn.Parameter(torch.ones(dim))
        else:
            self.register_buffer("weight", torch.ones(dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # autocast passes queries and keys in bf16
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def norm_of(config, dim: int | None = None) -> RMSNorm:
    """Returns a new RMSNorm as a TRMConfig says, over `dim` channels (default d_model)."""
    return RMSNorm(dim or config.d_model, config.norm_eps, config.norm_gain)


class SequenceRMSNorm(RMSNorm):
    """RMSNorm over the positions of a sequence, separately for each channel.  (B, L, D) -> (B, L, D)."""

    def forward(self, x: Tensor) -> Tensor:
        # not by transposing twice: the next linear layer would get a transposed input (see MLPMixer1D)
        x = x.to(self.weight.dtype).contiguous()
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.weight[:, None]


def rotary_table(
    positions: Int[Tensor, "b t"],
    head_dim: int,
    theta: float,
    scaling: float | None,
    dtype: torch.dtype,
    trained_len: int | None = None,
) -> tuple[Float[Tensor, "b 1 t e"], Float[Tensor, "b 1 t e"]]:
    """Returns cos and sin for every position and channel, arXiv:2104.09864.

    They are computed from the positions in every call, so that no table limits the length. `scaling` divides the
    positions (position interpolation, arXiv:2306.15595); with trained_len it scales the frequencies by YaRN instead."""
    exact = dtype if dtype == torch.float64 else torch.float32  # bf16 cannot represent large positions
    channel = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact)
    frequency, size = theta ** (-channel / head_dim), 1.0
    if scaling is not None and trained_len is not None:
        frequency, size = yarn(frequency, theta, scaling, trained_len)
    elif scaling is not None:
        frequency = frequency / scaling
    angle = positions.to(exact)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # (B, 1, T, E); channels i and i + E/2 form a pair
    return angle.cos() * size, angle.sin() * size


def yarn(frequency: Float[Tensor, "e"], theta: float, scaling: float, trained_len: int) -> tuple[Tensor, float]:
    """Returns the rotary frequencies for a context `scaling` times as long, and a factor for cos and sin: YaRN,
    arXiv:2309.00071.

    A channel pair that turns more than 32 times in trained_len tokens keeps its frequency, because it distinguishes
    near positions. A pair that turns less than once is slowed by `scaling`, because it would otherwise reach angles not
    seen in training. In between, the two are mixed linearly in the channel index, as in the authors' code (the paper
    mixes linearly in the number of turns). Attention scores grow by the square of the factor."""
    channels = len(frequency)
    first, last = (channels * math.log(trained_len / (turns * 2 * math.pi), theta) for turns in (32, 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * channels - 1)
    index = torch.arange(channels, device=frequency.device, dtype=frequency.dtype)
    slowed = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (1 - slowed + slowed / scaling), 0.1 * math.log(max(scaling, 1.0)) + 1


def apply_rotary_emb(
    x: Float[Tensor, "b h t e"], cos: Float[Tensor, "#b 1 t e"], sin: Float[Tensor, "#b 1 t e"]
) -> Float[Tensor, "b h t e"]:
    """Rotates the channel pairs (i, i + E/2) of queries or keys by the angle of their position."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Context(NamedTuple):
    """What all attention layers of one forward call share."""

    rotary: tuple[Tensor, Tensor] | None  # cos, sin: (B or 1, 1, T, E)
    mask: Bool[Tensor, "b 1 t s"] | None  # True = may attend; None = causal or everything
    is_causal: bool  # lower-triangular attention where mask is None
    cache: KVCache | None

    def read(self, h: Tensor) -> Tensor:
        """Selects the columns of states or logits (B, T, ...) whose logits the caller needs."""
        return h[:, -1:] if self.cache is not None and self.cache.last_only else h


def positions_and_mask(
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    cache: KVCache | None,
    causal: bool,
    window: int | None = None,
) -> tuple[Int[Tensor, "_ t"], Bool[Tensor, "_ 1 t s"] | None]:
    """Returns positions (B or 1, T) and mask (B or 1, 1, T, S), where True means may attend; None if none is needed.

    Positions count the real tokens of each document. A token attends to tokens with its own number in attention_mask
    (its document), and never to padding (0). window: the attention_window of a TRMConfig, counted in columns."""
    B, T = input_ids.shape
    past = 0 if cache is None else cache.length
    index = torch.arange(past + T, device=input_ids.device)
    segments = attention_mask if cache is None else cache.extend_mask(attention_mask, B, T)
    distance = index[past:, None] - index  # (T, S)
    is_visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        is_visible = is_visible & (distance.abs() < window)
    if segments is None:
        is_later_chunk = causal and past > 0 and T > 1
        return index[None, past:], is_visible[None, None] if is_later_chunk or window is not None else None
    real = (segments != 0).cumsum(-1) - 1
    # padding belongs to the document before it
    document = segments.gather(-1, torch.where(segments != 0, index, 0).cummax(-1).values)
    begins = document.diff(dim=-1, prepend=torch.zeros_like(segments[:, :1])) != 0
    positions = (real - torch.where(begins, real, 0).cummax(-1).values).clamp(min=0)[:, past:]
    mask = (segments[:, past:, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    mask = mask & is_visible
    mask = mask | (index[past:, None] == index[None, :])  # padding attends to itself: a row without any key gives NaN
    return positions, mask[:, None]


def make_context(config, input_ids, attention_mask, cache, dtype) -> tuple[Tensor, Context]:
    """Returns positions (B or 1, T) and the Context of one forward call.

    Raises ValueError for mixer mlp with a mask, which it cannot follow."""
    if attention_mask is not None and config.mixer == "mlp" and not bool((attention_mask == 1).all()):
        raise ValueError("mixer mlp mixes all positions: leave out the attention_mask, or set mixer to attention")
    positions, mask = positions_and_mask(input_ids, attention_mask, cache, config.causal, config.attention_window)
    rotary = rotary_of(config, dtype)
    is_causal = config.causal and mask is None and input_ids.shape[1] > 1
    return positions, Context(None if rotary is None else rotary(positions), mask, is_causal, cache)


def rotary_of(config, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Returns `rotary_table` as a function of positions only, or None if the model has no rotary positions."""
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
        self.q_norm = norm_of(config, self.head_dim) if config.qk_norm else None
        self.k_norm = norm_of(config, self.head_dim) if config.qk_norm else None
        self.head_gate = nn.Linear(D, self.n_heads, bias=False) if config.attention_gate else None

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
            k, v = ctx.cache.update(slot, k, v)  # (B, K, S, E): all columns so far
        y = attention(q, k, v, ctx.mask, ctx.is_causal, self.dropout if self.training else 0.0).transpose(1, 2)
        if self.head_gate is not None:
            y = y * head_factors(self.head_gate(x))
        return self.out(y.reshape(B, T, D))


def head_factors(logits: Float[Tensor, "*b h"]) -> Float[Tensor, "*b h 1"]:
    """Returns the factors, from 0 to 2, on the outputs of attention heads: a gate per head, as in arXiv:2505.06708,
    but times 2, so that it starts at 1 if its weights start at 0."""
    return (2 * torch.sigmoid(logits))[..., None]


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
    """SwiGLU across the sequence instead of attention, arXiv:2105.01601.  (B, L, D) -> (B, L, D), for one fixed L."""

    def __init__(self, seq_len: int, hidden: int):
        super().__init__()
        self.mlp = SwiGLU(seq_len, hidden)

    def forward(self, x: Float[Tensor, "b t d"], ctx: Context, slot: int) -> Float[Tensor, "b t d"]:
        # contiguous: for a transposed input, torch multiplies row by row, each with a copy of the weights
        return self.mlp(x.transpose(1, 2).contiguous()).transpose(1, 2)


@torch.no_grad()
def init_weights(model: nn.Module):
    """Initialises a TRMModel: linear layers N(0, 1/fan_in); embedding N(0, 1), or N(0, 1/D) if tied to the head.

    With embed_mean, the embeddings' mean is not 0 but one random vector: embed_mean times a draw of that distribution.
    With weight_init `truncated`, all of these are truncated normal distributions with the same variances, except that
    the embedding has variance 1/D and learned positions have variance 1. The halting head starts at "do not halt" (as
    in the paper). The gate starts open, so that new states pass. Puzzle embeddings and attention gates start at 0."""
    c = model.config
    is_truncated = c.weight_init == "truncated"
    draw = _truncated_normal if is_truncated else lambda weight, std: weight.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, Attention) and module.head_gate is not None:
            module.head_gate.weight.zero_()
    embed_std = c.d_model**-0.5 if c.tie_embeddings or is_truncated else 1.0
    draw(model.embed.weight, embed_std)
    if model.pos_embed is not None:
        # a board's cells mean nothing without their places, so these start as large as the scaled token embeddings
        draw(model.pos_embed.weight, 1.0 if is_truncated else 0.02)
    if model.puzzle_embed is not None:
        model.puzzle_embed.weight.zero_()
    if c.halting:
        model.q_head.weight.zero_()
        model.q_head.bias.fill_(-5.0)
    if c.recursion == "trm":
        nn.init.trunc_normal_(model.y_init)
        nn.init.trunc_normal_(model.z_init)
    if model.net.gate is not None:
        model.net.gate.bias.fill_(4.0)
    if c.embed_mean:  # last, so that the other weights are those of the same seed without it
        model.embed.weight += c.embed_mean * embed_std * torch.randn_like(model.embed.weight[0])


def _truncated_normal(weight, std):
    """Fills a weight from a normal distribution that is cut off at twice its standard deviation.

    The numbers are scaled so that their standard deviation is `std`."""
    nn.init.trunc_normal_(weight, std=std / TRUNCATED_STD, a=-2 * std / TRUNCATED_STD, b=2 * std / TRUNCATED_STD)
