"""Seeing it think: the next-token distribution of every written token, recursion step by recursion step.

    trace = Trace(tokenizer)
    for ids in generate(model, prompt_ids, 40, thoughts=trace): ...    # `generate` adds to it what it reads
    print_table(trace, sys.stderr)
    write_json(trace, "out.json", prompt)
    draw_trace(trace, "out.png", prompt)                               # of src/evaluation/trace_picture.py

A trace is a list of plain dicts, one per token (`read_thought`), so it is its own JSON. Probabilities are the model's,
at temperature 1 and before top_k and top_p.
"""

import json
import os
import re
import shutil
import unicodedata
from math import log
from pathlib import Path

import torch

from src.config import check_writable
from src.errors import UserError
from src.losses import kl_divergence
from src.sampling import Thought
from src.tokenizer import REPLACEMENT

FORMATS = (".png", ".pdf", ".svg")

# ---- what is read from the model ------------------------------------------------------------------------------------


def read_thought(thought: Thought, tokenizer, row: int = 0, top: int = 5, limit: int | None = None) -> dict:
    """What became of one row's new token while the model thought about it: a dict of plain values.

    token, text: the one written; depth: recursion steps it took; halted: whether that is under `limit`, the most it
    could take (default: as many as any row took). Then one value per step: probability and rank (1 = the likeliest)
    of the token written, entropy in bits, kl in nats to the step before (None at the first), halt = the halting
    probability (None without a halting head). candidates: the token written and the `top` likeliest of every step,
    each with token, text and its probability at every step; first the one that was ever the most probable.
    """
    depth, written = int(thought.depth[row]), int(thought.token[row])
    logits = thought.logits[:depth, row].cpu().double()
    p = logits.softmax(-1)
    seen = torch.cat((p.topk(min(top, p.shape[-1])).indices.flatten(), torch.tensor([written]))).unique()
    seen = seen[p[:, seen].amax(0).argsort(descending=True, stable=True)].tolist()
    halt = None if thought.halt_logits is None else thought.halt_logits[:depth, row].cpu().double().sigmoid()
    return {
        "token": written,
        "text": token_text(tokenizer, written),
        "depth": depth,
        "halted": depth < (len(thought.logits) if limit is None else limit),
        "probability": _plain(p[:, written]),
        "rank": (1 + (p > p[:, [written]]).sum(-1)).tolist(),
        "entropy": _plain(torch.special.entr(p).sum(-1) / log(2)),
        "kl": [None, *_plain(kl_divergence(logits[1:], logits[:-1]).clamp(min=0))],
        "halt": [None] * depth if halt is None else _plain(halt),
        "candidates": [{"token": i, "text": token_text(tokenizer, i), "probability": _plain(p[:, i])} for i in seen],
    }


def _plain(values):
    return [float(f"{value:.6g}") for value in values.tolist()]


class Trace(list):
    """The thoughts behind one row's tokens, up to its end, each read as it comes so that no logits are kept."""

    def __init__(self, tokenizer, row: int = 0, top: int = 5, limit: int | None = None):
        super().__init__()
        self.tokenizer, self.options = tokenizer, {"row": row, "top": top, "limit": limit}

    def append(self, thought: Thought):
        if not self or self[-1]["token"] not in self.tokenizer.end_ids:
            token = read_thought(thought, self.tokenizer, **self.options)
            super().append({"position": len(self), **token})


def likeliest(token: dict) -> list[dict]:
    """The candidate with the most probability, for each step of a token."""
    return [max(token["candidates"], key=lambda c: c["probability"][s]) for s in range(token["depth"])]


def changes_of_mind(token: dict) -> list[bool]:
    """For each step, whether the likeliest token is another one than a step before."""
    ids = [candidate["token"] for candidate in likeliest(token)]
    return [False, *(a != b for a, b in zip(ids, ids[1:]))]


def is_single(trace: list[dict]) -> bool:
    """Whether no token could take more than one recursion step: then its candidates are shown, likeliest first."""
    return all(token["depth"] == 1 and not token["halted"] for token in trace)


def summary(trace: list[dict]) -> str:
    """How many tokens, how deep, and for how many of them the likeliest one changed on the way."""
    n, deepest = len(trace), max(token["depth"] for token in trace)
    tokens, steps = (f"{k:,} {what}{'s' * (k > 1)}" for k, what in ((n, "token"), (deepest, "recursion step")))
    if is_single(trace):
        return f"{tokens}, one recursion step; a recursive model takes more with --max_recursion_depth 4"
    mean = sum(token["depth"] for token in trace) / n
    depth = steps if mean == deepest else f"{mean:.2f} recursion steps on average, {deepest} at most"
    return f"{tokens}, {depth}; {sum(any(changes_of_mind(token)) for token in trace):,} changed on the way"


def token_text(tokenizer, index: int) -> str:
    """The text of one id; <0xE4> for the bytes of part of a character, <eos> and the like for what has no text."""
    data = tokenizer.id_to_bytes(index)
    if data in (b"", REPLACEMENT):
        t = tokenizer
        return {t.pad_id: "<pad>", t.unk_id: "<unk>", t.bos_id: "<bos>", t.eos_id: "<eos>"}.get(index, f"<{index}>")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)


def visible(text: str) -> str:
    """Text with its blanks as signs, long runs of them counted; what cannot be seen as its code point."""
    text = re.sub(r"([ \n\t])\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", text)
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else f"<U+{ord(c):04X}>") for c in text)


def text_width(text: str) -> int:
    """Columns that a text takes in a terminal: East Asian wide characters two, combining ones none."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def clip(text: str, width: int) -> str:
    """Text cut to `width` columns, the cut marked with an ellipsis."""
    if text_width(text) <= width:
        return text
    while text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def write_json(trace: list[dict], path, prompt: str = ""):
    """{"prompt", "tokens": the trace}, one token a line.  UserError where it cannot be written."""
    head, *tokens = (json.dumps(part, ensure_ascii=False) for part in (prompt, *trace))
    text = f'{{"prompt": {head}, "tokens": [\n' + ",\n".join(tokens) + "\n]}\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from None


def check_path(path: str):
    """UserError where a picture and its JSON cannot be written there: asked before a long generation, not after."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--trace {path}: name a file that ends in {', '.join(FORMATS)}; a checkpoint goes before it")
    for file in (path, path.with_suffix(".json")):
        check_writable(file)


# ---- the table ------------------------------------------------------------------------------------------------------

# foreground and background of the 256 colours, by fifths of probability; they stand out from black and from white
BLUES = ("38;5;32", "97;48;5;18", "97;48;5;25", "97;48;5;32", "30;48;5;39")
ORANGES = ("38;5;166", "97;48;5;94", "97;48;5;130", "30;48;5;172", "30;48;5;208")


def print_table(trace: list[dict], stream, color: bool | None = None):
    """One line per token: text, depth, and the likeliest token of each step with its probability.

    After a single step the likeliest tokens side by side. As wide as the terminal; where not all steps fit, the first,
    the last and some between. Colour where the stream is a terminal, unless NO_COLOR is set (no-color.org)."""
    color = stream.isatty() and not os.environ.get("NO_COLOR") if color is None else color
    single, deepest = is_single(trace), max(token["depth"] for token in trace)
    names = [clip(visible(token["text"]), 14) for token in trace]
    first = max(5, *map(text_width, names))
    room = shutil.get_terminal_size().columns - first - 7
    count = 5 if single else deepest
    shown = min(count, max(1, room // 14))
    longest = max(text_width(visible(c["text"])) for token in trace for c in likeliest(token))
    cell = max(6, min(longest, 16, room // shown - 8))
    chosen = range(shown) if single else [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]
    heads = ["likeliest", "2nd", "3rd", "4th", "5th"] if single else [f"step {s + 1}" for s in range(count)]
    print(_pad("token", first), "depth ", *(_pad(f" {heads[i]}", cell + 7) for i in chosen), file=stream)
    for token, name in zip(trace, names):
        cells = [(c, c["probability"][0], False) for c in token["candidates"]]
        if not single:
            both = zip(likeliest(token), changes_of_mind(token))
            cells = [(c, c["probability"][s], is_new) for s, (c, is_new) in enumerate(both)]
        told = [_cell(*cells[i], token["token"], cell, color) for i in chosen if i < len(cells)]
        print(_pad(name, first), f"{token['depth']:5}{'■' if token['halted'] else ' '}", *told, file=stream)
    blue, orange = (_shade(f" {name} ", 0.5, name == "blue") for name in ("blue", "orange"))
    legend = [f"{blue} the token written, {orange} another"] * color
    legend += ["▸ the likeliest token is another than a step before"] * (deepest > 1)
    legend += ["■ halted early"] * any(token["halted"] for token in trace)
    legend += [f"{shown} of {count} steps fit this terminal"] * (shown < count and not single)
    print(*filter(None, (", ".join(legend), summary(trace))), sep="\n", file=stream)


def _cell(candidate, p, is_new, written, width, color):
    text = f"{'▸' if is_new else ' '}{_pad(clip(visible(candidate['text']), width), width)} {100 * p:3.0f}% "
    return _shade(text, p, candidate["token"] == written) if color else text


def _shade(text, p, is_written):
    return f"\033[{(BLUES if is_written else ORANGES)[min(4, int(5 * p))]}m{text}\033[0m"


def _pad(text, width):
    return text + " " * (width - text_width(text))
