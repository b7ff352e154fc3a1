"""The module that is traced for an ONNX export: one graph for prefill and decoding. It takes and returns the cache.

templates/values.yaml describes each input and output. Past and present may use the same buffer, which avoids a copy. A
call either begins all rows or adds one token to each row. A graph without a cache has no inputs after `read`, and every
call passes the whole text.

There are two forms of attention; everything else is the same. `fused` is ONNX Runtime's GroupQueryAttention for CPUs,
one operator that splits heads, rotates, writes the cache and attends. `standard` uses standard ONNX operators, for CUDA
and other runtimes.
"""

import copy

import torch
from torch import Tensor, nn

from src.cache import cache_slots
from src.exits import max_depth
from src.layers import Context, head_factors, rotary_table
from src.model import TRMModel

FUSED_HEAD = 16  # GroupQueryAttention can rotate heads only if their size is a multiple of this


class MatMul(nn.Module):
    """A linear layer whose weight is stored as (in, out), so that the graph needs no transpose.

    Otherwise, if several visits share a weight, the exporter would keep its transpose as a node of the graph, and the
    quantizer would skip that weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().t().contiguous()), bias

    def forward(self, x):
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Norm(nn.Module):
    """RMSNorm in elementary operations, which ONNX Runtime fuses at any opset."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Gated(nn.Module):
    """SwiGLU with separate gate and up products, because a fused product needs Split, which changed in opset 18."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate, self.up = (MatMul(part) for part in mlp.gate_up.weight.chunk(2))
        self.down = MatMul(mlp.down.weight)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class GraphAttention(nn.Module):
    """Attention whose heads and cache are handled by ctx.cache. (B, T, D) -> (B, T, D)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv, self.out = MatMul(attention.qkv.weight), MatMul(attention.out.weight)
        norms = attention.q_norm, attention.k_norm
        self.q_norm, self.k_norm = (None if norm is None else Norm(norm) for norm in norms)
        self.head_gate = None if attention.head_gate is None else MatMul(attention.head_gate.weight)

    def forward(self, x, ctx, slot):
        y = ctx.cache.attend(self, self.qkv(x), slot)
        if self.head_gate is not None:
            factors = head_factors(self.head_gate(x))
            y = (y.unflatten(-1, (factors.shape[-2], -1)) * factors).flatten(-2)
        return self.out(y)


PARTS = {  # class name in the model -> its replacement in the graph
    "Linear": lambda layer: MatMul(layer.weight, layer.bias),
    "RMSNorm": Norm,
    "SwiGLU": Gated,
    "Attention": GraphAttention,
}


def _rebuilt(module: nn.Module) -> nn.Module:
    """Replaces the submodules that have another form in a graph (PARTS), and returns the module."""
    for name, child in module.named_children():
        part = PARTS.get(type(child).__name__)
        setattr(module, name, _rebuilt(child) if part is None else part(child))
    return module


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class StandardSlots:
    """The cache inside a graph, in standard ONNX operators. `present` collects the new keys and values of each slot."""

    def __init__(self, graph: "Graph", last, total, positions, past):
        self.config, self.past, self.present = graph.config, past, [None] * len(past)
        length = past[0][0].shape[2] if past else positions.shape[1]
        is_hidden = torch.arange(length)[None, None] > positions[:, :, None]  # (B, T, S)
        self.is_hidden, self.columns = is_hidden[:, None, None], positions[:, None, :, None]
        self.rotary = [table[positions][:, None] for table in graph.rotary]  # cos, sin: (B, 1, T, E)

    def coda_slot(self, step: int) -> int:
        return cache_slots(self.config, 0)  # coda and head run only after the last step

    def attend(self, attention, qkv, slot) -> Tensor:
        """qkv (B, T, (H + 2K) E) -> (B, T, D); the new columns go into the slot."""
        c, (B, T, _) = self.config, qkv.shape
        H, K = c.n_heads, c.n_kv_heads
        heads = qkv.view(B, T, H + 2 * K, c.head_dim).transpose(1, 2)
        q, k, v = heads[:, :H], heads[:, H : H + K], heads[:, H + K :]
        if c.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if self.rotary:
            q, k = _rotate(q, *self.rotary), _rotate(k, *self.rotary)
        if self.past:
            columns = self.columns.expand_as(k)
            k, v = self.present[slot] = [past.scatter(2, columns, new) for past, new in zip(self.past[slot], (k, v))]
        q = q.reshape(B, K, H // K, T, c.head_dim)
        scores = q @ k[:, :, None].transpose(-1, -2) * c.head_dim**-0.5  # (B, K, H/K, T, S)
        y = scores.masked_fill(self.is_hidden, -torch.inf).softmax(-1) @ v[:, :, None]
        return y.reshape(B, H, T, -1).transpose(1, 2).reshape(B, T, -1)


class FusedSlots(StandardSlots):
    """The same with ONNX Runtime's GroupQueryAttention, which takes the lengths of the rows instead of a mask."""

    def __init__(self, graph, last, total, positions, past):
        self.config, self.past, self.present = graph.config, past, [None] * len(past)
        self.last, self.total = last, total
        self.rotary = [table[:, : graph.config.head_dim // 2] for table in graph.rotary] or [None, None]

    def attend(self, attention, qkv, slot) -> Tensor:
        c, (B, T, _) = self.config, qkv.shape
        q, k, v = qkv, None, None  # the operator accepts them packed; qk_norm needs them separate
        if c.qk_norm:
            D, size = c.d_model, c.n_kv_heads * c.head_dim
            q, k, v = qkv[..., :D], qkv[..., D : D + size], qkv[..., D + size :]
            q, k = (
                norm(heads.unflatten(-1, (-1, c.head_dim))).flatten(-2)
                for norm, heads in ((attention.q_norm, q), (attention.k_norm, k))
            )
        past = self.past[slot] if self.past else (None, None)
        shape = past[0].shape if self.past else (B, c.n_kv_heads, T, c.head_dim)
        y, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (q, k, v, *past, self.last, self.total, *self.rotary),
            {"num_heads": c.n_heads, "kv_num_heads": c.n_kv_heads, "do_rotary": int(c.positions == "rope")},
            dtypes=[qkv.dtype] * 3,
            shapes=[(B, T, c.d_model), shape, shape],
            version=1,
        )
        if self.past:
            self.present[slot] = present
        return y


class Graph(nn.Module):
    """A TRMModel rebuilt for export. values.yaml describes the inputs; `past` is a list of (key, value) per slot."""

    def __init__(self, model: TRMModel, fused: bool):
        super().__init__()
        self.config, self.slots = model.config, FusedSlots if fused else StandardSlots
        self.model, c = _rebuilt(copy.deepcopy(model)), model.config
        every = torch.arange(c.max_seq_len)[None]
        rope = c.head_dim, c.rope_theta, c.rope_scaling, model.embed.weight.dtype, c.rope_trained_len
        tables = [t[0, 0] for t in rotary_table(every, *rope)] if c.positions == "rope" else []  # (max_seq_len, E)
        self.rotary = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in tables)

    def forward(self, input_ids, last, total, read, past):
        m, c, T = self.model, self.config, input_ids.shape[1]
        start = (last.long() + 1 - T).clamp(min=0)  # a row that begins here may be shorter than T
        positions = start[:, None] + torch.arange(T)
        x = m.embed(input_ids) * c.embed_scale
        x = x if m.pos_embed is None else x + m.pos_embed(positions)
        slots = self.slots(self, last, total, positions, past)
        ctx = Context(None, None, False, slots)
        for layer, block in enumerate(m.prelude):
            x = block(x, ctx, layer)
        y, z, _ = m.initial_state(x)
        depth = max_depth(c)
        for step in range(depth):
            y, z = m.recursion_step(x, y, z, ctx, step)
        h = m.before_head(y, ctx, depth - 1)
        return m.head(h.flatten(0, 1).index_select(0, read)), slots.present
