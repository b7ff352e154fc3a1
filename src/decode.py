"""One new token per row, quickly: the blocks of a forward call with a cache in as few operations as a CPU likes.

At one token a row the arithmetic is small, and the time goes to reading weights, starting operations and looking up
what a module holds. `decode_block` is TinyBlock in fewer, larger operations, on `Parts` that are looked up once a text
(the same equations: tests hold it to the plain form); `store_for_decoding` lays the weights out for it.
"""

import functools
from collections.abc import Callable
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


class Parts(NamedTuple):
    """A TinyBlock as functions of tensors (B, ...): the way from a module to its weight costs half an operation."""

    post: bool
    attn_norm: Callable
    attn_out_norm: Callable
    mlp_norm: Callable
    mlp_out_norm: Callable
    qkv: Callable
    q_norm: Callable | None
    k_norm: Callable | None
    heads: tuple[int, int, int]  # H, K, E
    out: Callable
    gate_up: Callable
    down: Callable


def one_token_context(cache: KVCache, positions, mask, rotary_table: Callable | None, dtype) -> OneToken:
    """Of a call with one token per row: positions (B or 1, 1), mask (B or 1, 1, 1, S) or None, and what makes cos and
    sin (1, 1, L, E) of positions (1, L), or None.  It is asked once, for all columns of the cache."""
    if rotary_table is not None and "rotary" not in cache.parts:
        cos, sin = rotary_table(torch.arange(cache.max_len, device=positions.device)[None])
        cos, sin = (t.view(-1, 1, 2, cos.shape[-1] // 2) for t in (cos, sin))  # (L, 1, 2, E/2)
        cache.parts["rotary"] = torch.stack((cos, torch.cat((-sin[:, :, :1], sin[:, :, 1:]), dim=2)), dim=1)
    rotary = None if rotary_table is None else cache.parts["rotary"].index_select(0, positions[:, 0]).unbind(1)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return OneToken(cache, rotary, mask)


def run_blocks(blocks, h, ctx, slot: int, norm: nn.Module | None = None) -> Float[Tensor, "b t d"]:
    """One block after the other, each with its own slot of the cache, then the norm.  (B, T, D) -> same."""
    if ctx.one_token is not None:
        return _decode(blocks, h[:, 0], ctx.one_token, slot, norm)[:, None]
    for layer, block in enumerate(blocks):
        h = block(h, ctx, slot + layer)
    return h if norm is None else norm(h)


def _decode(blocks, h, ctx, slot, norm):
    parts = ctx.cache.parts
    for layer, block in enumerate(blocks):
        if block not in parts:
            parts[block] = _look_up(block)
        h = decode_block(parts[block], h, ctx, slot + layer)
    if norm not in parts:
        parts[norm] = _norm(norm)
    return parts[norm](h)


def decode_block(block: Parts, h: Float[Tensor, "b d"], ctx: OneToken, slot: int) -> Float[Tensor, "b d"]:
    """TinyBlock of one new token per row, whose keys and values are added to the cache's slot."""
    if block.post:
        h = block.attn_norm(_attention(block, h, ctx, slot).add_(h))
        return block.mlp_norm(_swiglu(block, h).add_(h))
    h = block.attn_out_norm(_attention(block, block.attn_norm(h), ctx, slot)).add_(h)
    return block.mlp_out_norm(_swiglu(block, block.mlp_norm(h))).add_(h)


def _attention(block, x, ctx, slot):
    B, (H, K, E) = len(x), block.heads
    qkv = block.qkv(x).view(B, H + 2 * K, 1, E)
    qk = qkv.narrow(1, 0, H + K)
    if block.q_norm is not None:
        qk = torch.cat((block.q_norm(qk[:, :H]), block.k_norm(qk[:, H:])), dim=1)
    if ctx.rotary is not None:
        cos, sin = ctx.rotary
        pairs = qk.view(B, H + K, 2, -1)  # rotate-half pairs channel i with i + E/2
        qk = torch.addcmul(pairs * cos, pairs.flip(2), sin).view(B, H + K, 1, E).to(x.dtype)
    keys, values = ctx.cache.update(slot, qk.narrow(1, H, K), qkv.narrow(1, H + K, K))
    q = qk.narrow(1, 0, H).view(B, K, H // K, E)  # a group's queries share their keys: rows of one small product
    return block.out(F.scaled_dot_product_attention(q, keys, values, ctx.mask).reshape(B, -1))


def _swiglu(block, x):
    gate, up = block.gate_up(x).chunk(2, dim=-1)
    return block.down(F.silu(gate).mul_(up))


def _look_up(block) -> Parts:
    attn, mlp = block.attn, block.mlp
    return Parts(
        block.post,
        *(_norm(n) for n in (block.attn_norm, block.attn_out_norm, block.mlp_norm, block.mlp_out_norm)),
        _linear(attn.qkv),
        *(None if n is None else _norm(n) for n in (attn.q_norm, attn.k_norm)),
        (attn.n_heads, attn.n_kv_heads, attn.head_dim),
        *(_linear(linear) for linear in (attn.out, mlp.gate_up, mlp.down)),
    )


def _linear(module):
    return functools.partial(_product, module.weight.t()) if type(module) is nn.Linear else module.forward


def _product(weight, x):
    return torch.mm(x, weight)


def _norm(module):
    """RMSNorm as a function; on a CPU in four operations, where F.rms_norm is nine."""
    if module is None or type(module) is nn.Identity:
        return _same
    if module.weight.device.type != "cpu" or module.weight.dtype not in (torch.float32, torch.float64):
        return module.forward
    size = len(module.weight)  # its root is taken out of the mean of squares, and of the epsilon beside it
    eps = torch.tensor((size * module.eps) ** 0.5, dtype=module.weight.dtype)
    return functools.partial(_rms_norm, module.weight * size**0.5, eps)


def _rms_norm(weight, eps, x):
    return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(eps)).mul_(weight)


def _same(x):
    return x


@torch.no_grad()
def store_for_decoding(model: nn.Module) -> nn.Module:
    """Keep the weights of each projection that is at least as wide as its input input-major in memory, under the same
    shapes: CPUs multiply a single fp32 row by them faster.  Other types stay as they are: they would be slower.

    For models that are not trained any more, as products are then rounded otherwise; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= module.in_features:
            is_tied = module.weight is model.embed.weight  # it is read by rows, too
            if module.weight.dtype == torch.float32 and not is_tied:
                module.weight.data = module.weight.t().contiguous().t()
    return model
