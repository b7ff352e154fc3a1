"""llama2.c's checkpoints: `.pt` as its training writes them, and the legacy `.bin` that its run.c reads.

A legacy .bin is a header of seven int32 (dim, hidden, layers, heads, key/value heads, vocabulary, context; a negative
vocabulary means that the head is not tied), then float32: the embedding, each part of the blocks for all layers, the
last norm, cosines and sines of all positions, and the head where it is not tied.
"""

import pickle
import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError
from src.llama import BLOCK, LLAMA2C, from_llama, part_shapes, plain_config, to_llama, weight_name
from src.model import TRMConfig

HEADER = struct.Struct("<7i")
FIXED = {"rope_theta": 10000.0, "norm_eps": 1e-5, "rope_scaling": None}  # the formats have no place for others
LATER = b"24ka"  # magic number of the .bin versions after the legacy one


def is_bin(start: bytes) -> bool:
    """Whether a file's first bytes are the header of a legacy .bin (or of a later version, which is refused)."""
    if start[:4] == LATER or len(start) < HEADER.size:
        return start[:4] == LATER
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack(start[: HEADER.size])
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    return all(0 < size < 2**24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0


def read_bin(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """(config, this model's weights, no figures) of a legacy .bin.  UserError where it does not fit its header."""
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    if start[:4] == LATER:
        raise UserError(f"{path} is of a later .bin version of llama2.c: give the .pt, or export it with --version 0")
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack(start)
    sizes = {"d_model": dim, "d_ff": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads}
    c = plain_config(path, vocab_size=abs(vocab), max_seq_len=context, tie_embeddings=vocab > 0, **sizes, **FIXED)
    layout = _layout(c)
    size, needed = Path(path).stat().st_size, HEADER.size + 4 * sum(prod(shape) for shape in layout.values())
    if size != needed:
        raise UserError(f"{path} has {size} bytes, but its header asks for {needed}: it is cut short; copy it again")
    values = torch.from_numpy(np.fromfile(path, "<f4", offset=HEADER.size))
    parts = values.split([prod(shape) for shape in layout.values()])
    tensors = {name: part.view(shape) for (name, shape), part in zip(layout.items(), parts)}
    del tensors["cos"], tensors["sin"]  # this model makes its own
    return c, from_llama(c, tensors, LLAMA2C, path), {}


def write_bin(path, c: TRMConfig, weights: dict[str, Tensor], where):
    """Write a plain model as a legacy .bin, in float32.  UserError for settings that the format cannot hold."""
    for name, value in FIXED.items():
        if getattr(c, name) != value:
            raise UserError(f"{where}: {name} is {getattr(c, name)}, but llama2.c has {value}: choose --to hf")
    tensors = to_llama(c, weights, LLAMA2C)
    tensors["cos"], tensors["sin"] = rotary_tables(c)
    vocab = c.vocab_size if c.tie_embeddings else -c.vocab_size
    with open(path, "wb") as file:
        file.write(HEADER.pack(c.d_model, c.d_ff, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.max_seq_len))
        for name in _layout(c):
            file.write(tensors[name].float().contiguous().numpy().astype("<f4", copy=False).tobytes())


def rotary_tables(c: TRMConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (max_seq_len, E/2) of a .bin, computed as llama2.c does, so that the bytes are the same."""
    frequencies = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim))
    angle = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
    return angle.cos(), angle.sin()


def _layout(c) -> dict[str, tuple]:
    """Name and shape of every tensor of a legacy .bin, in the file's order."""
    shapes, table = part_shapes(c), (c.max_seq_len, c.head_dim // 2)
    blocks = {weight_name(LLAMA2C, part, layer): shapes[part] for part in BLOCK for layer in range(c.n_layers)}
    first, last = ({weight_name(LLAMA2C, part): shapes[part]} for part in ("embed", "norm"))
    head = {} if c.tie_embeddings else {weight_name(LLAMA2C, "head"): shapes["head"]}
    return first | blocks | last | {"cos": table, "sin": table} | head


def read_pt(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """(config, this model's weights, figures of its training) of a llama2.c .pt.  Nothing in it is run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        args, tensors = dict(saved["model_args"]), dict(saved["model"])
        heads, tables = args["n_heads"], ("freqs_cos", "freqs_sin")
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tables}
        head, embed, hidden = (tensors[f"{n}.weight"] for n in ("output", "tok_embeddings", "layers.0.feed_forward.w1"))
        c = plain_config(
            path, d_model=args["dim"], n_layers=args["n_layers"], n_heads=heads, vocab_size=len(embed),
            n_kv_heads=args.get("n_kv_heads") or heads, d_ff=len(hidden), max_seq_len=args["max_seq_len"],
            norm_eps=args.get("norm_eps", FIXED["norm_eps"]), rope_theta=FIXED["rope_theta"],
            tie_embeddings=torch.equal(head, embed),
        )  # fmt: skip
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        reason = "it holds more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise UserError(f"{path} is no llama2.c checkpoint, or is broken ({reason}): copy it again") from None
    figures = {"step": saved.get("iter_num"), "best_valid_loss": saved.get("best_val_loss")}
    info = {name: torch.as_tensor(value).item() for name, value in figures.items() if value is not None}
    return c, from_llama(c, tensors, LLAMA2C, path), info
