"""One new token per row, quickly: the blocks of a forward call with a cache in as few operations as a CPU likes.

At one token a row the arithmetic is small, and the time goes to starting operations and reading weights.
`decode_block` is TinyBlock in fewer, larger operations (the same equations: tests hold it to the plain form),
`store_for_decoding` lays the weights out for it.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from src.cache import KVCache


class OneToken(NamedTuple):
    """What every block of one decoding call shares."""

    cache: KVCache
    rotary: tuple[Tensor, Tensor] | None  # cos, and sin with the sign of rotate-half: (B or 1, 1, 2, E/2)
    mask: Float[Tensor, "b 1 1 s"] | None  # 0 = may attend, -inf = may not


def one_token_context(cache: KVCache, rotary, mask, dtype) -> OneToken:
    """From the rotary table (B or 1, 1, 1, E) and the mask (B or 1, 1, 1, S) of a call with one token per row."""
    if rotary is not None:
        cos, sin = (t[:, 0].unflatten(-1, (2, -1)) for t in rotary)  # (B, 1, 2, E/2)
        rotary = cos, torch.cat((-sin[:, :, :1], sin[:, :, 1:]), dim=2)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return OneToken(cache, rotary, mask)


def run_blocks(blocks, h, ctx, slot: int) -> Float[Tensor, "b t d"]:
    """One block after the other, each with its own slot of the cache.  (B, T, D) -> same."""
    if ctx.one_token is not None and not blocks.training:
        h = h[:, 0]
        for layer, block in enumerate(blocks):
            h = decode_block(block, h, ctx.one_token, slot + layer)
        return h[:, None]
    for layer, block in enumerate(blocks):
        h = block(h, ctx, slot + layer)
    return h


def decode_block(block, h: Float[Tensor, "b d"], ctx: OneToken, slot: int) -> Float[Tensor, "b d"]:
    """TinyBlock of one new token per row, whose keys and values are added to the cache's slot."""
    if block.post:
        h = _rms_norm(block.attn_norm, _attention(block.attn, h, ctx, slot).add_(h))
        return _rms_norm(block.mlp_norm, _swiglu(block.mlp, h).add_(h))
    a = _attention(block.attn, _rms_norm(block.attn_norm, h), ctx, slot)
    h = h + _norm_out(block.attn_out_norm, a)
    return _norm_out(block.mlp_out_norm, _swiglu(block.mlp, _rms_norm(block.mlp_norm, h))).add_(h)


def _norm_out(norm, x):
    return x if type(norm) is nn.Identity else _rms_norm(norm, x)


def _rms_norm(norm, x):
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return norm(x)
    # F.rms_norm is nine small operations on a CPU
    square = torch.linalg.vecdot(x, x)
    scale = torch.add(_scalar(norm.eps, x.dtype), square, alpha=1 / x.shape[-1]).rsqrt_()
    return (x * scale.unsqueeze(-1)).mul_(norm.weight)


@functools.cache  # a Python number costs an operation as much as two more
def _scalar(value, dtype):
    return torch.tensor(value, dtype=dtype)


def _attention(attn, x, ctx, slot):
    B, H, K = len(x), attn.n_heads, attn.n_kv_heads
    qkv = F.linear(x, attn.qkv.weight).view(B, H + 2 * K, attn.head_dim)
    qk = qkv.narrow(1, 0, H + K)
    if attn.q_norm is not None:
        qk = torch.cat((_rms_norm(attn.q_norm, qk[:, :H]), _rms_norm(attn.k_norm, qk[:, H:])), dim=1)
    if ctx.rotary is not None:
        cos, sin = ctx.rotary
        pairs = qk.view(B, H + K, 2, -1)  # rotate-half pairs channel i with i + E/2
        qk = torch.addcmul(pairs * cos, pairs.flip(2), sin).view(qk.shape)
    keys, values = ctx.cache.update(slot, qk.narrow(1, H, K).unsqueeze(2), qkv.narrow(1, H + K, K).unsqueeze(2))
    q = qk.narrow(1, 0, H).view(B, K, H // K, -1)  # a group's queries share their keys: rows of one small product
    return F.linear(F.scaled_dot_product_attention(q, keys, values, ctx.mask).reshape(B, -1), attn.out.weight)


def _swiglu(mlp, x):
    gate, up = F.linear(x, mlp.gate_up.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), mlp.down.weight)


@torch.no_grad()
def store_for_decoding(model: nn.Module) -> nn.Module:
    """Keep each projection's weights input-major in memory, under the same shapes: CPUs multiply a single row by them
    faster. For models that are not trained any more, as products are then rounded otherwise; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not model.embed.weight:  # a tied one is read by rows
            module.weight.data = module.weight.t().contiguous().t()
    return model
