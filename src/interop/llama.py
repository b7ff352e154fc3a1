"""Translates weights between the plain family and Llama, and checks whether a model is a Llama.

    recursion none, norm pre, positions rope  =  Llama (arXiv:2302.13971)

Queries and keys are rotated in pairs of channels. This project and Hugging Face pair channel i with i + E/2, where E is
the head size; llama2.c and GGUF pair the adjacent channels 2i and 2i + 1. The conversion permutes the rows of the query
and key weights accordingly. No other values change.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from src.config import build
from src.errors import UserError
from src.model_config import LIMITS, TRMConfig


class Dialect(NamedTuple):
    """How a file format names and orders the weights of a Llama."""

    blocks: str  # prefix before the block number
    adjacent: bool  # whether it rotates adjacent channels
    names: dict[str, str]  # part -> name, without `blocks` and `.weight`


ENDS = ("embed", "norm", "head")
BLOCK = ("attn_norm", "q", "k", "v", "out", "mlp_norm", "gate", "down", "up")
# name here -> part of a Llama, for the weights that are not fused here; q, k, v and gate, up are
WHOLE = {"attn_norm": "attn_norm", "attn.out": "out", "mlp_norm": "mlp_norm", "mlp.down": "down"}


def _dialect(blocks, adjacent, names):
    return Dialect(blocks, adjacent, dict(zip(ENDS + BLOCK, names.split())))


HF = _dialect(
    "model.layers",
    False,
    """model.embed_tokens model.norm lm_head
    input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
    post_attention_layernorm mlp.gate_proj mlp.down_proj mlp.up_proj""",
)
LLAMA2C = _dialect(
    "layers",
    True,
    """tok_embeddings norm output
    attention_norm attention.wq attention.wk attention.wv attention.wo
    ffn_norm feed_forward.w1 feed_forward.w2 feed_forward.w3""",
)
GGUF = _dialect(
    "blk",
    True,
    """token_embd output_norm output
    attn_norm attn_q attn_k attn_v attn_output
    ffn_norm ffn_gate ffn_down ffn_up""",
)


def weight_name(dialect: Dialect, part: str, layer: int | None = None) -> str:
    """Returns the name of a part's weight; `layer` is the block number, None for parts outside the blocks."""
    block = "" if layer is None else f"{dialect.blocks}.{layer}."
    return f"{block}{dialect.names[part]}.weight"


def part_shapes(c: TRMConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every part of a Llama: embedding, last norm and head, and the parts of a block."""
    D, F, kv = c.d_model, c.d_ff, c.n_kv_heads * c.head_dim
    ends = {"embed": (c.vocab_size, D), "norm": (D,), "head": (c.vocab_size, D)}
    attention = {"attn_norm": (D,), "q": (D, D), "k": (kv, D), "v": (kv, D), "out": (D, D)}
    return ends | attention | {"mlp_norm": (D,), "gate": (F, D), "down": (D, F), "up": (F, D)}


def halves_from_adjacent(weight: Float[Tensor, "n d"], heads: int) -> Float[Tensor, "n d"]:
    """Reorders the rows of a query or key weight: from rotating (2i, 2i + 1) to rotating (i, i + E/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def adjacent_from_halves(weight: Float[Tensor, "n d"], heads: int) -> Float[Tensor, "n d"]:
    """The inverse of halves_from_adjacent."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def count(value, where, most=LIMITS["d_model"]) -> int:
    """Returns a size from a file as an int (16.0 counts as 16). Raises UserError, starting with `where`, if invalid."""
    if type(value) not in (int, float) or not 1 <= value <= most or value != int(value):
        raise UserError(f"{where} is {value!r}: it should be a whole number from 1 to {most:,}")
    return int(value)


def plain_config(where, **settings) -> TRMConfig:
    """Returns the TRMConfig of a Llama with these sizes. Raises UserError if they are invalid."""
    return build(TRMConfig, {"recursion": "none", "norm": "pre", **settings}, where=f"{where}: ")


def from_llama(c: TRMConfig, tensors: dict[str, Tensor], dialect: Dialect, where) -> dict[str, Tensor]:
    """Converts Llama weights to this project's. Raises UserError for a missing, extra or wrongly shaped weight."""
    head = weight_name(dialect, "head")
    if c.tie_embeddings and head in tensors:
        embed = tensors.get(weight_name(dialect, "embed"))
        if embed is not None and not torch.equal(tensors[head], embed):
            raise UserError(
                f"{where}: {head} differs from the embedding, but the settings tie the two: correct the settings"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name != head}
    _check_names(c, tensors, dialect, where)

    def get(part, layer=None):
        return tensors[weight_name(dialect, part, layer)]

    def rotated(part, layer, heads):
        return halves_from_adjacent(get(part, layer), heads) if dialect.adjacent else get(part, layer)

    own = {"embed.weight": get("embed"), "net.norm.weight": get("norm")}
    if not c.tie_embeddings:
        own["head.weight"] = get("head")
    for i in range(c.n_layers):
        q, k = rotated("q", i, c.n_heads), rotated("k", i, c.n_kv_heads)
        block = {name: get(part, i) for name, part in WHOLE.items()}
        block["attn.qkv"] = torch.cat((q, k, get("v", i)))
        block["mlp.gate_up"] = torch.cat((get("gate", i), get("up", i)))
        own |= {f"net.blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    return own


def to_llama(c: TRMConfig, weights: dict[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """Converts this project's weights to Llama weights; a tied head is left out."""
    ends = {"embed": weights["embed.weight"], "norm": weights["net.norm.weight"]}
    if not c.tie_embeddings:
        ends["head"] = weights["head.weight"]
    llama = {weight_name(dialect, part): tensor for part, tensor in ends.items()}
    for i in range(c.n_layers):
        own = {name: weights[f"net.blocks.{i}.{name}.weight"] for name in (*WHOLE, "attn.qkv", "mlp.gate_up")}
        block = {part: own[name] for name, part in WHOLE.items()}
        kv = c.n_kv_heads * c.head_dim
        block["q"], block["k"], block["v"] = own["attn.qkv"].split((c.d_model, kv, kv))
        block["gate"], block["up"] = own["mlp.gate_up"].chunk(2)
        if dialect.adjacent:
            block["q"] = adjacent_from_halves(block["q"], c.n_heads)
            block["k"] = adjacent_from_halves(block["k"], c.n_kv_heads)
        llama |= {weight_name(dialect, part, i): tensor for part, tensor in block.items()}
    return llama


def _check_names(c, tensors, dialect, where):
    """Raises UserError unless `tensors` are exactly those of a Llama with these settings."""
    shapes = part_shapes(c)
    expected = {weight_name(dialect, part): shapes[part] for part in ENDS if part != "head" or not c.tie_embeddings}
    for layer in range(c.n_layers):
        expected |= {weight_name(dialect, part, layer): shapes[part] for part in BLOCK}
    for name in sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{where} lacks {name}: settings and weights belong to different models; copy both again")
    for name in sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{where} contains {name}, which a Llama without biases does not have: it cannot be converted")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            is_shape = list(tensors[name].shape)
            raise UserError(f"{where}: {name} has shape {is_shape}, but its settings require {list(shape)}")


def is_plain(c: TRMConfig) -> bool:
    """Whether the model is a Llama."""
    try:
        check_plain(c, "", "")
    except UserError:
        return False
    return True


def check_plain(c: TRMConfig, where, wanted: str):
    """Raises UserError if the model is not a Llama; `wanted` is the target format, for the message."""
    if c.recursion != "none":
        raise UserError(f"{where}: a recursive model (recursion {c.recursion}) is not a Llama: choose --to hub")
    llama = {"norm": "pre", "positions": "rope", "mixer": "attention", "causal": True, "qk_norm": False}
    llama |= {"attention_window": None, "prelude_layers": 0, "coda_layers": 0, "embed_scale": 1.0}
    llama |= {"attention_gate": False, "norm_gain": True}
    for name, value in llama.items():
        if getattr(c, name) != value:
            has = f"its {name} is {getattr(c, name)}, but a Llama has {value}"
            raise UserError(f"{where} cannot be written as {wanted}: {has}; choose --to hub")
