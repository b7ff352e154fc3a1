"""llama2.c: `.pt` as its training writes them, and the legacy `.bin` and tokenizer file that its run.c reads.

A legacy .bin is a header of seven int32 (dim, hidden, layers, heads, key/value heads, vocabulary, context; a negative
vocabulary means that the head is not tied), then float32: the embedding, each part of the blocks for all layers, the
last norm, cosines and sines of all positions, and the head where it is not tied.

run.c begins every text with token 1 (BOS) and ends it where token 1 comes again. It knows 0 as unknown, 2 as EOS, and
3 to 258 as the bytes; a prompt is a space and its text, in which the pair of pieces that makes the piece of the best
score is joined, again and again. It prints no single byte over 127.
"""

import json
import pickle
import struct
from dataclasses import replace
from math import inf, prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.checkpoint import check_tensors, load_pt
from src.errors import UserError
from src.interop.hf_tokenizer import to_hf
from src.interop.llama import BLOCK, LLAMA2C, from_llama, part_shapes, plain_config, to_llama, weight_name
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
    return c, from_llama(c, check_tensors(tensors, path), LLAMA2C, path), {}


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


def tokenizer_file(path) -> Path:
    """Where the tokenizer of a .bin lies, for run.c's -z: m.tokenizer.bin beside m.bin."""
    return Path(path).with_name(f"{Path(path).stem}.tokenizer.bin")


def for_run_c(c: TRMConfig, weights: dict[str, Tensor], tokenizer, where) -> tuple[TRMConfig, dict, bytes, list[str]]:
    """(config and weights in run.c's order of tokens, content of its tokenizer file, what differs there in sentences).

    Where a text ends with EOS, not BOS, the two change places in the head, so that run.c ends it too. UserError for a
    tokenizer without a token for each byte."""
    order, names, scores = _run_c_tokens(tokenizer, where)
    bos, eos, swaps = *order[1:3], tokenizer.bos_id not in tokenizer.end_ids
    read, written = (bos, bos) if swaps else (bos, eos), (eos, bos) if swaps else (bos, eos)
    head = weights["embed.weight" if c.tie_embeddings else "head.weight"]
    head = _rows(head, [order[0], *written, *order[3:]])
    embed = _rows(weights["embed.weight"], [order[0], *read, *order[3:]])
    c = replace(c, vocab_size=len(order), tie_embeddings=c.tie_embeddings and not swaps, pad_token_id=None)
    weights = weights | {"embed.weight": embed} | ({} if c.tie_embeddings else {"head.weight": head})
    entries = (struct.pack("<fi", score, len(name)) + name for name, score in zip(names, scores))
    data = struct.pack("<i", max(map(len, names))) + b"".join(entries)
    said = {
        "run.c puts a space before a prompt, which this tokenizer does not": not tokenizer.prefix,
        "run.c begins every text with BOS, this model none": not tokenizer.add_bos,
        "run.c knows one end of a text, this model several": len(tokenizer.end_ids) > 1 and swaps,
    }
    return c, weights, data, [sentence for sentence, is_so in said.items() if is_so]


def _rows(tensor, order):
    """Rows in another order; None is the mean of all, which is never the likeliest token."""
    rows = tensor[[index or 0 for index in order]]
    rows[[index is None for index in order]] = tensor.float().mean(0).to(tensor.dtype)
    return rows


def _run_c_tokens(tokenizer, where) -> tuple[list[int | None], list[bytes], list[float]]:
    """(this model's id, or None; name; score) of every token in run.c's order."""
    hf = to_hf(tokenizer)
    model = json.loads(hf.json)["model"]
    falls_back, merges, vocab = model.get("byte_fallback"), model.get("merges", []), model["vocab"]
    tokens = vocab if isinstance(vocab, dict) else {name: i for i, (name, _) in enumerate(vocab)}
    score = {i: float(s) for i, (_, s) in enumerate(vocab)} if model["type"] == "Unigram" else {}
    for rank, (a, b) in reversed([*enumerate(merges)]):
        score[tokens[a + b]] = -1.0 - rank
    single = {hf.id_to_bytes(i): i for i in reversed(range(hf.vocab_size))}
    of_bytes = [tokens.get(f"<0x{b:02X}>") if falls_back else single.get(bytes([b])) for b in range(256)]
    if None in of_bytes:
        raise UserError(f"{where}: llama2.c needs a token for each byte, which this tokenizer has not: choose --to hf")
    unk, bos, eos = tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id
    first = [None if unk in (bos, eos) else unk, bos, None if eos == bos else eos, *of_bytes]
    order = first + [i for i in range(tokenizer.vocab_size) if i not in set(first)]
    is_raw = bool(merges) and not falls_back  # then bytes join as well
    names = [b"<unk>", b"\n<s>\n", b"\0</s>"]  # one that begins with NUL prints nothing; BOS, which never prints, may
    # not: a prompt's ids begin with it, and nothing and a piece would be that piece
    names += [bytes([b]) if is_raw and b else b"<0x%02X>" % b for b in range(256)]
    names += [hf.id_to_bytes(i) or b"\0<%d>" % i for i in order[len(names) :]]
    if b" " not in names:
        names[3 + ord(" ")] = b" "  # run.c looks it up for every prompt, and fails without
    return order, names, [score.get(i, 0.0) for i in order]


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
        saved = load_pt(path, mmap=True)
        args, tensors = dict(saved["model_args"]), dict(saved["model"])
        tables = ("freqs_cos", "freqs_sin")
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
        tensors = check_tensors({name: tensor for name, tensor in tensors.items() if name not in tables}, path)
        dim, heads, layers, context = (args[name] for name in ("dim", "n_heads", "n_layers", "max_seq_len"))
        head, embed, hidden = (tensors[f"{n}.weight"] for n in ("output", "tok_embeddings", "layers.0.feed_forward.w1"))
        c = plain_config(
            f"{path}, model_args", d_model=dim, n_layers=layers, n_heads=heads, vocab_size=len(embed),
            n_kv_heads=args.get("n_kv_heads") or heads, d_ff=len(hidden), max_seq_len=context,
            norm_eps=args.get("norm_eps", FIXED["norm_eps"]), rope_theta=FIXED["rope_theta"],
            tie_embeddings=torch.equal(head, embed),
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds
        reason = "it holds more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise UserError(f"{path} is no llama2.c checkpoint, or is broken ({reason}): copy it again") from None
    figures = {"step": saved.get("iter_num"), "best_valid_loss": saved.get("best_val_loss")}
    info = {name: _figure(value, f"{path}: its {name}") for name, value in figures.items() if value is not None}
    return c, from_llama(c, tensors, LLAMA2C, path), info


def _figure(value, where):
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if type(value) not in (int, float) or not abs(value) < inf:
        raise UserError(f"{where} is {value!r}: it should be a number; correct it")
    return value
