"""A fast implementation of the blocks, for a forward call that adds one token per row to a cache.

With one token per row, little time is spent on arithmetic. Most of it goes to reading weights, starting operations and
looking up attributes of modules. So `decode_one_token` runs each TinyBlock in fewer, larger operations, on weights that
it looks up once per text. The equations are those of src/model.py and src/layers.py, and tests compare the two.
`store_for_decoding` prepares the memory layout of the weights. `TRMModel._enter` selects this implementation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from src.cache import KVCache
from src.layers import head_factors, positions_and_mask, rotary_of


class BlockParts(NamedTuple):
    """The parts of a TinyBlock as functions of tensors (B, ...).

    Looking up a module attribute costs half as much as a tensor operation on one token, so it is done once."""

    post: bool
    attn_norm: Callable
    attn_out_norm: Callable
    mlp_norm: Callable
    mlp_out_norm: Callable
    qkv: Callable
    q_norm: Callable | None
    k_norm: Callable | None
    heads: tuple[int, int, int]  # H, K, E
    head_gate: Callable | None
    out: Callable
    gate_up: Callable
    down: Callable


class DecodingTables:
    """What decoding looks up or computes once per text.  Kept by the KVCache of that text."""

    def __init__(self, rotary: Tensor | None):
        self.rotary = rotary  # (L, 2, 1, 2, E/2): for every column cos, and sin with the sign of rotate-half
        self.blocks: dict[nn.Module, BlockParts] = {}
        self.norms: dict[nn.Module | None, Callable] = {}


class OneTokenContext(NamedTuple):
    """What all blocks of one decoding call share. All other calls use layers.Context instead."""

    cache: KVCache
    rotary: tuple[Tensor, Tensor] | None  # cos and signed sin of the new tokens: (B or 1, 1, 2, E/2)
    mask: Float[Tensor, "b 1 1 s"] | None  # 0 = may attend, -inf = may not

    def read(self, h: Tensor) -> Tensor:
        """Selects the columns whose logits the caller needs. Here there is only one."""
        return h


def one_token_context(config, input_ids, attention_mask, cache: KVCache, dtype) -> tuple[Tensor, OneTokenContext]:
    """Returns positions (B or 1, 1) and the context for a call with one new token per row: input_ids (B, 1)."""
    positions, mask = positions_and_mask(input_ids, attention_mask, cache, config.causal, config.attention_window)
    if cache.decoding is None:
        cache.decoding = DecodingTables(_rotary_of_columns(config, cache, input_ids.device, dtype))
    rotary = cache.decoding.rotary
    if rotary is not None:
        rotary = rotary.index_select(0, positions[:, 0]).unbind(1)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return positions, OneTokenContext(cache, rotary, mask)


def _rotary_of_columns(config, cache, device, dtype):
    rotary = rotary_of(config, dtype)
    if rotary is None:
        return None
    cos, sin = rotary(torch.arange(cache.max_len, device=device)[None])
    cos, sin = (t.view(-1, 1, 2, cos.shape[-1] // 2) for t in (cos, sin))  # (L, 1, 2, E/2)
    return torch.stack((cos, torch.cat((-sin[:, :, :1], sin[:, :, 1:]), dim=2)), dim=1)


def decode_one_token(
    blocks, norm: nn.Module | None, h: Float[Tensor, "b 1 d"], ctx: OneTokenContext, slot: int
) -> Float[Tensor, "b 1 d"]:
    """Runs one new token per row through all `blocks` and then `norm`.  slot: cache slot of the first block."""
    tables, h = ctx.cache.decoding, h[:, 0]
    for layer, block in enumerate(blocks):
        if block not in tables.blocks:
            tables.blocks[block] = _look_up(block)
        h = decode_block(tables.blocks[block], h, ctx, slot + layer)
    if norm not in tables.norms:
        tables.norms[norm] = _norm(norm)
    return tables.norms[norm](h)[:, None]


def decode_block(block: BlockParts, h: Float[Tensor, "b d"], ctx: OneTokenContext, slot: int) -> Float[Tensor, "b d"]:
    """Runs a TinyBlock for one new token per row. Its keys and values are written to the slot of the cache."""
    if block.post:  # add_ is safe: it writes into the new tensor that the sublayer returned
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
        # rotate all heads at once: channel i pairs with channel i + E/2; the sign is already in the table's sin
        cos, sin = ctx.rotary
        pairs = qk.view(B, H + K, 2, -1)
        qk = torch.addcmul(pairs * cos, pairs.flip(2), sin).view(B, H + K, 1, E).to(x.dtype)
    keys, values = ctx.cache.update(slot, qk.narrow(1, H, K), qkv.narrow(1, H + K, K))
    # queries of a group share keys and values, so each group is one matrix product with H/K rows
    q = qk.narrow(1, 0, H).view(B, K, H // K, E)
    y = F.scaled_dot_product_attention(q, keys, values, ctx.mask)
    if block.head_gate is not None:
        y = y.reshape(B, H, E) * head_factors(block.head_gate(x))
    return block.out(y.reshape(B, -1))


def _swiglu(block, x):
    gate, up = block.gate_up(x).chunk(2, dim=-1)
    return block.down(F.silu(gate).mul_(up))


def _look_up(block) -> BlockParts:
    attn, mlp = block.attn, block.mlp
    return BlockParts(
        block.post,
        *(_norm(n) for n in (block.attn_norm, block.attn_out_norm, block.mlp_norm, block.mlp_out_norm)),
        _linear(attn.qkv),
        *(None if n is None else _norm(n) for n in (attn.q_norm, attn.k_norm)),
        (attn.n_heads, attn.n_kv_heads, attn.head_dim),
        None if attn.head_gate is None else _linear(attn.head_gate),
        *(_linear(linear) for linear in (attn.out, mlp.gate_up, mlp.down)),
    )


def _linear(module):
    return functools.partial(_product, module.weight.t()) if type(module) is nn.Linear else module.forward


def _product(weight, x):
    return torch.mm(x, weight)


def _norm(module):
    """Returns an RMSNorm as a function. For fp32 on a CPU it takes four operations, whereas F.rms_norm takes nine."""
    if module is None or type(module) is nn.Identity:
        return _same
    if module.weight.device.type != "cpu" or module.weight.dtype not in (torch.float32, torch.float64):
        return module.forward
    # x / sqrt(mean(x^2) + eps) = sqrt(D) x / hypot(|x|, sqrt(D eps)); sqrt(D) is multiplied into the weight
    size = len(module.weight)
    eps = torch.tensor((size * module.eps) ** 0.5, dtype=module.weight.dtype)
    return functools.partial(_rms_norm, module.weight * size**0.5, eps)


def _rms_norm(weight, eps, x):
    return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(eps)).mul_(weight)


def _same(x):
    return x


@torch.no_grad()
def store_for_decoding(model: nn.Module) -> nn.Module:
    """Stores fp32 weights whose output is at least as wide as their input column by column; their shapes stay.

    A CPU multiplies a single fp32 row by such weights faster; other types would be slower. Use it for inference only,
    because products are rounded differently. Returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= module.in_features:
            is_tied = module.weight is model.embed.weight  # the embedding reads it by rows
            if module.weight.dtype == torch.float32 and not is_tied:
                module.weight.data = module.weight.t().contiguous().t()
    return model
