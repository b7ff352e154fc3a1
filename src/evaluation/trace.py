"""Traces of generation: the next-token distribution after each recursion step, for every generated token.

    trace = Trace(tokenizer)
    for ids in generate(model, prompt_ids, 40, thoughts=trace): ...    # `generate` appends to the trace
    print_table(trace, sys.stderr)
    write_json(trace, "out.json", prompt)
    draw_trace(trace, "out.png", prompt)                               # in src/evaluation/trace_picture.py

A trace is a list of plain dicts, one per token (see `read_thought`), so it can be written as JSON directly.
Probabilities are those of the model at temperature 1, before top_k and top_p.
"""

import json
import os
import re
import shutil
from math import log
from pathlib import Path

import torch

from src.config import check_writable
from src.errors import UserError
from src.files.text import text_width
from src.losses import kl_divergence
from src.sampling import Thought
from src.tokenizer import REPLACEMENT

FORMATS = (".png", ".pdf", ".svg")

# ---- reading from the model -----------------------------------------------------------------------------------------


def read_thought(thought: Thought, tokenizer, row: int = 0, top: int = 5, limit: int | None = None) -> dict:
    """Returns the per-step predictions behind one row's new token, as a dict of plain values.

    token, text: the chosen token.
    depth: recursion steps that it took.
    halted: whether depth is below `limit`, the most steps allowed (default: the most that any row took).
    probability, rank, entropy, kl, halt: lists with one value per step. The first two are those of the chosen token
        (rank 1 = the likeliest); entropy is in bits; kl is in nats, relative to the step before (None at the first
        step); halt is the halting probability (None without a halting head).
    candidates: the chosen token and the `top` likeliest tokens of every step, each as a dict of token, text and its
        probability at every step; sorted by highest probability at any step.
    """
    depth, written = int(thought.depth[row]), int(thought.token[row])
    logits = thought.logits[:depth, row].cpu().double()
    p = logits.softmax(-1)
    # the ids of all candidates, sorted by their highest probability at any step
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
    """The trace of one row up to its EOS. Converts each Thought when it is appended, so that no logits are kept.

    ends: ids that end the row; default those that end a text"""

    def __init__(self, tokenizer, row: int = 0, top: int = 5, limit: int | None = None, ends=None):
        super().__init__()
        self.tokenizer, self.options = tokenizer, {"row": row, "top": top, "limit": limit}
        self.ends = tokenizer.end_ids if ends is None else ends

    def append(self, thought: Thought):
        if not self or self[-1]["token"] not in self.ends:
            token = read_thought(thought, self.tokenizer, **self.options)
            super().append({"position": len(self), **token})


def likeliest(token: dict) -> list[dict]:
    """Returns the most probable candidate at each step of a token."""
    return [max(token["candidates"], key=lambda c: c["probability"][s]) for s in range(token["depth"])]


def changes_of_mind(token: dict) -> list[bool]:
    """Returns, for each step, whether the likeliest token differs from that of the step before."""
    ids = [candidate["token"] for candidate in likeliest(token)]
    return [False, *(a != b for a, b in zip(ids, ids[1:]))]


def is_single(trace: list[dict]) -> bool:
    """Returns whether every token was limited to one recursion step. Then its candidates are shown, likeliest first."""
    return all(token["depth"] == 1 and not token["halted"] for token in trace)


def summary(trace: list[dict]) -> str:
    """Returns one line: number of tokens, their depth, and how many changed their likeliest token between steps."""
    n, deepest = len(trace), max(token["depth"] for token in trace)
    tokens, steps = (f"{k:,} {what}{'s' * (k > 1)}" for k, what in ((n, "token"), (deepest, "recursion step")))
    if is_single(trace):
        return f"{tokens}, one recursion step; a recursive model takes more with --max_recursion_depth 4"
    mean = sum(token["depth"] for token in trace) / n
    depth = steps if mean == deepest else f"{mean:.2f} recursion steps on average, {deepest} at most"
    return f"{tokens}, {depth}; {sum(any(changes_of_mind(token)) for token in trace):,} changed on the way"


def token_text(tokenizer, index: int) -> str:
    """Returns the text of an id: bytes of an incomplete character as <0xE4>, ids without text as <eos> or similar."""
    data = tokenizer.id_to_bytes(index)
    if data in (b"", REPLACEMENT):
        t = tokenizer
        return {t.pad_id: "<pad>", t.unk_id: "<unk>", t.bos_id: "<bos>", t.eos_id: "<eos>"}.get(index, f"<{index}>")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)


def visible(text: str) -> str:
    """Returns text with white space as symbols, its long runs as counts, and unprintable characters as code points."""
    text = re.sub(r"([ \n\t])\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", text)
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else f"<U+{ord(c):04X}>") for c in text)


def clip(text: str, width: int) -> str:
    """Cuts a text to `width` columns; marks the cut with an ellipsis."""
    if text_width(text) <= width:
        return text
    while text_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def write_json(trace: list[dict], path, prompt: str = ""):
    """Writes {"prompt", "tokens": the trace}, one token per line. Raises UserError if that fails."""
    head, *tokens = (json.dumps(part, ensure_ascii=False) for part in (prompt, *trace))
    text = f'{{"prompt": {head}, "tokens": [\n' + ",\n".join(tokens) + "\n]}\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from None


def check_path(path: str):
    """Raises UserError if a picture or its JSON file cannot be written there. Checked before a long generation."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        advice = f"name a file that ends in {', '.join(FORMATS)}; write the checkpoint's folder before --trace"
        raise UserError(f"--trace {path}: {advice}")
    for file in (path, path.with_suffix(".json")):
        check_writable(file)


# ---- the table ------------------------------------------------------------------------------------------------------

# ANSI 256-colour codes for each fifth of probability, readable on black and on white terminals
BLUES = ("38;5;32", "97;48;5;18", "97;48;5;25", "97;48;5;32", "30;48;5;39")
ORANGES = ("38;5;166", "97;48;5;94", "97;48;5;130", "30;48;5;172", "30;48;5;208")


def print_table(trace: list[dict], stream, color: bool | None = None):
    """Prints one line per token: its text, its depth, and the likeliest token of each step with its probability.

    If all tokens took a single step, a line shows that step's likeliest tokens side by side instead. The table is as
    wide as the terminal; if not all steps fit, it shows the first, the last and some between. By default it has colour
    if the stream is a terminal and NO_COLOR is not set (no-color.org)."""
    if color is None:
        color = stream.isatty() and not os.environ.get("NO_COLOR")
    single, deepest = is_single(trace), max(token["depth"] for token in trace)
    names = [clip(visible(token["text"]), 14) for token in trace]
    name_width = max(5, *map(text_width, names))
    columns = shutil.get_terminal_size().columns - name_width - 7  # left for the steps
    count = 5 if single else deepest
    shown = min(count, max(1, columns // 14))
    longest = max(text_width(visible(c["text"])) for token in trace for c in likeliest(token))
    width = max(6, min(longest, 16, columns // shown - 8))  # of a token's text in a step's column
    if single:
        chosen, heads = range(shown), ["likeliest", "2nd", "3rd", "4th", "5th"]
    else:
        chosen = [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]
        heads = [f"step {s + 1}" for s in range(count)]
    print(_pad("token", name_width), "depth ", *(_pad(f" {heads[i]}", width + 7) for i in chosen), file=stream)
    for token, name in zip(trace, names):
        if single:
            cells = [(c, c["probability"][0], False) for c in token["candidates"]]
        else:
            both = zip(likeliest(token), changes_of_mind(token))
            cells = [(c, c["probability"][s], is_new) for s, (c, is_new) in enumerate(both)]
        line = [_cell(*cells[i], token["token"], width, color) for i in chosen if i < len(cells)]
        print(_pad(name, name_width), f"{token['depth']:5}{'■' if token['halted'] else ' '}", *line, file=stream)
    legend = []
    if color:
        blue, orange = (_shade(f" {name} ", 0.5, name == "blue") for name in ("blue", "orange"))
        legend.append(f"{blue} the token written, {orange} another")
    if deepest > 1:
        legend.append("▸ the likeliest token differs from the step before")
    if any(token["halted"] for token in trace):
        legend.append("■ halted early")
    if shown < count and not single:
        legend.append(f"{shown} of {count} steps fit this terminal")
    if legend:
        print(", ".join(legend), file=stream)
    print(summary(trace), file=stream)


def _cell(candidate, p, is_new, written, width, color):
    text = f"{'▸' if is_new else ' '}{_pad(clip(visible(candidate['text']), width), width)} {100 * p:3.0f}% "
    return _shade(text, p, candidate["token"] == written) if color else text


def _shade(text, p, is_written):
    return f"\033[{(BLUES if is_written else ORANGES)[min(4, int(5 * p))]}m{text}\033[0m"


def _pad(text, width):
    return text + " " * (width - text_width(text))
