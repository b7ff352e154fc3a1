"""llama2.c: the `.pt` that its training writes, and the legacy `.bin` and tokenizer file that its run.c reads.

A legacy .bin starts with a header of seven int32: dim, hidden, layers, heads, key/value heads, vocabulary, context. A
negative vocabulary means that the head is not tied. Then follow float32 values: the embedding, each part of the blocks
for all layers, the last norm, cosines and sines of all positions, and the head if it is not tied.

run.c starts every text with token 1 (BOS) and stops when token 1 comes again. Token 0 is the unknown token, 2 is EOS,
and 3 to 258 are the bytes. run.c adds a space before the prompt. It splits the result into characters and repeatedly
merges the adjacent pair whose merged piece has the best score. It does not print single bytes above 127.
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
FIXED = {"rope_theta": 10000.0, "norm_eps": 1e-5, "rope_scaling": None}  # these formats cannot store other values
LATER = b"24ka"  # magic number of .bin versions newer than the legacy one


def is_bin(start: bytes) -> bool:
    """Whether a file's first bytes are the header of a legacy .bin, or of a later version, which read_bin refuses."""
    if start[:4] == LATER or len(start) < HEADER.size:
        return start[:4] == LATER
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack(start[: HEADER.size])
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    return all(0 < size < 2**24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0


def read_bin(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """Returns (config, weights with this project's names, {}) of a legacy .bin.

    Raises UserError if the size of the file does not match its header."""
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    if start[:4] == LATER:
        raise UserError(
            f"{path} has a later .bin version of llama2.c: give the .pt, or export it again with --version 0"
        )
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack(start)
    sizes = {"d_model": dim, "d_ff": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads}
    c = plain_config(path, vocab_size=abs(vocab), max_seq_len=context, tie_embeddings=vocab > 0, **sizes, **FIXED)
    layout = _layout(c)
    size, needed = Path(path).stat().st_size, HEADER.size + 4 * sum(prod(shape) for shape in layout.values())
    if size != needed:
        raise UserError(f"{path} has {size} bytes, but its header requires {needed}: it is broken; copy it again")
    values = torch.from_numpy(np.fromfile(path, "<f4", offset=HEADER.size))
    parts = values.split([prod(shape) for shape in layout.values()])
    tensors = {name: part.view(shape) for (name, shape), part in zip(layout.items(), parts)}
    del tensors["cos"], tensors["sin"]  # this project computes them itself
    return c, from_llama(c, check_tensors(tensors, path), LLAMA2C, path), {}


def write_bin(path, c: TRMConfig, weights: dict[str, Tensor], where):
    """Writes a plain model as a legacy .bin, in float32. Raises UserError for settings that the format cannot store."""
    for name, value in FIXED.items():
        if getattr(c, name) != value:
            raise UserError(f"{where}: {name} is {getattr(c, name)}, but llama2.c requires {value}: choose --to hf")
    tensors = to_llama(c, weights, LLAMA2C)
    tensors["cos"], tensors["sin"] = rotary_tables(c)
    vocab = c.vocab_size if c.tie_embeddings else -c.vocab_size
    with open(path, "wb") as file:
        file.write(HEADER.pack(c.d_model, c.d_ff, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.max_seq_len))
        for name in _layout(c):
            file.write(tensors[name].float().contiguous().numpy().astype("<f4", copy=False).tobytes())


def tokenizer_file(path) -> Path:
    """Returns the path of a .bin's tokenizer, for run.c's -z: m.tokenizer.bin beside m.bin."""
    return Path(path).with_name(f"{Path(path).stem}.tokenizer.bin")


def for_run_c(c: TRMConfig, weights: dict[str, Tensor], tokenizer, where) -> tuple[TRMConfig, dict, bytes, list[str]]:
    """Returns (config, weights, content of the tokenizer file, sentences that describe how run.c will differ).

    The weights are in run.c's order of tokens. run.c stops at BOS only. If the model ends a text with EOS, the two rows
    of the head are swapped, so that run.c stops too. Raises UserError if the tokenizer lacks a token for some byte."""
    order, names, scores = _run_c_tokens(tokenizer, where)
    bos, eos = order[1:3]
    swaps = tokenizer.bos_id not in tokenizer.end_ids
    if swaps:
        read, written = (bos, bos), (eos, bos)  # token 1 is read as BOS, but its logit is that of EOS
    else:
        read, written = (bos, eos), (bos, eos)
    head = weights["embed.weight" if c.tie_embeddings else "head.weight"]
    head = _rows(head, [order[0], *written, *order[3:]])
    embed = _rows(weights["embed.weight"], [order[0], *read, *order[3:]])
    c = replace(c, vocab_size=len(order), tie_embeddings=c.tie_embeddings and not swaps, pad_token_id=None)
    weights = weights | {"embed.weight": embed}
    if not c.tie_embeddings:
        weights["head.weight"] = head
    entries = (struct.pack("<fi", score, len(name)) + name for name, score in zip(names, scores))
    data = struct.pack("<i", max(map(len, names))) + b"".join(entries)
    differences = {
        "run.c puts a space before a prompt, but this tokenizer does not": not tokenizer.prefix,
        "run.c begins every text with BOS, but this model does not": not tokenizer.add_bos,
        "run.c stops at one end token, but this model has several": len(tokenizer.end_ids) > 1 and swaps,
    }
    return c, weights, data, [sentence for sentence, is_so in differences.items() if is_so]


def _rows(tensor, order):
    """Returns the rows in another order. None gives the mean of all rows, whose token is never the most likely one."""
    rows = tensor[[index or 0 for index in order]]
    rows[[index is None for index in order]] = tensor.float().mean(0).to(tensor.dtype)
    return rows


def _run_c_tokens(tokenizer, where) -> tuple[list[int | None], list[bytes], list[float]]:
    """Returns (ids in this project, names, scores) of all tokens in run.c's order. The id is None if there is none."""
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
        raise UserError(f"{where}: llama2.c needs a token for each byte, which this tokenizer lacks: choose --to hf")
    unk, bos, eos = tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id
    first = [None if unk in (bos, eos) else unk, bos, None if eos == bos else eos, *of_bytes]
    order = first + [i for i in range(tokenizer.vocab_size) if i not in set(first)]
    is_raw = bool(merges) and not falls_back  # byte-level BPE: bytes can be merged too, so they keep their own names
    # run.c prints nothing for a name that begins with NUL. The name of BOS must not: run.c tries to merge BOS with the
    # first piece of the prompt, and an empty name joined with that piece would give that piece again
    names = [b"<unk>", b"\n<s>\n", b"\0</s>"]
    names += [bytes([b]) if is_raw and b else b"<0x%02X>" % b for b in range(256)]
    names += [hf.id_to_bytes(i) or b"\0<%d>" % i for i in order[len(names) :]]
    if b" " not in names:
        names[3 + ord(" ")] = b" "  # run.c looks it up for every prompt, and crashes without it
    return order, names, [score.get(i, 0.0) for i in order]


def rotary_tables(c: TRMConfig) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (max_seq_len, E/2) for a .bin, computed exactly as llama2.c does."""
    frequencies = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim))
    angle = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
    return angle.cos(), angle.sin()


def _layout(c) -> dict[str, tuple]:
    """Returns name -> shape of all tensors of a legacy .bin, in the order of the file."""
    shapes, table = part_shapes(c), (c.max_seq_len, c.head_dim // 2)
    blocks = {weight_name(LLAMA2C, part, layer): shapes[part] for part in BLOCK for layer in range(c.n_layers)}
    first, last = ({weight_name(LLAMA2C, part): shapes[part]} for part in ("embed", "norm"))
    head = {} if c.tie_embeddings else {weight_name(LLAMA2C, "head"): shapes["head"]}
    return first | blocks | last | {"cos": table, "sin": table} | head


def read_pt(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """Returns (config, weights with this project's names, training step and loss) of a llama2.c .pt.

    No code in the file is executed."""
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
    except Exception as error:  # torch.load raises many types
        reason = (
            "it contains more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else repr(error)
        )
        raise UserError(f"{path} is not a llama2.c checkpoint, or it is broken ({reason}): copy it again") from None
    figures = {"step": saved.get("iter_num"), "best_valid_loss": saved.get("best_val_loss")}
    info = {name: _figure(value, f"{path}: its {name}") for name, value in figures.items() if value is not None}
    return c, from_llama(c, tensors, LLAMA2C, path), info


def _figure(value, where):
    """Returns a number, which may be stored as a tensor of one element. Raises UserError if it is not finite."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if type(value) not in (int, float) or not abs(value) < inf:
        raise UserError(f"{where} is {value!r}: it should be a finite number; correct it")
    return value
