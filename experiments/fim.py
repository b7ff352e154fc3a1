"""Measure fill-in-the-middle: a line of code written from the text on both sides, or from the text before it alone.

    python experiments/fim.py runs/code                             # lines of the standard library's validation files
    python experiments/fim.py runs/code --paths ~/src/other_project --lines 500 --output runs/fim.jsonl

Lines are drawn from files that the model was not trained on, by a seed, and each is taken out of its file. Its
indentation stays before it, because tokenizers join line breaks and spaces: a text that ends between the two has tokens
that models hardly ever see. The model writes the line greedily, in four ways:

    both        from the text before and after the line
    left        from the same text before it, without a suffix
    left_long   from twice as much text before it: as many tokens as `both` reads
    wrong       as `both`, but with the text that follows another line

`both` against `left` shows what the suffix adds, `both` against `left_long` whether it is worth its tokens, and `wrong`
whether it is the suffix that helps or the form of the prompt. The first line of an answer counts. It is exact if it
equals the line that was taken out, up to spaces at its end; the edit similarity is 1 - (Levenshtein distance) / (length
of the longer line). A line that also stands within 4,000 characters before or after it can be copied, so `new` is the
exact match of the other lines. `ends` is the share of exact answers after which the model stopped by itself. Prints a
table, then one JSON line with the figures, and with the number of lines that only `both`, or only the other way, wrote
exactly.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import records  # noqa: E402
from src.checkpoint import load_model, resolve  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.data.corpus import read_documents  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.evaluation.capability_answers import edit_similarity  # noqa: E402
from src.runtime import choose_device  # noqa: E402
from src.sampling import generate, left_padded  # noqa: E402

ARMS = ("both", "left", "left_long", "wrong")
LEAST_CHARS = 10  # shorter lines, such as `else:`, say little
NEAR = 4000  # a line that stands within so many characters before or after it counts as copied


@dataclass
class InfillConfig:
    """What to measure.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out
        paths: text that the model was not trained on: files, globs, folders, or a word as in train_paths
        lines: number of lines
        seed: random seed for drawing lines
        max_new_tokens: most tokens of a line; longer lines are not drawn
        batch_size: lines that are written at once
        output: file to which one JSON line is appended
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
    """

    checkpoint: str = "runs/code"
    paths: list[str] = field(default_factory=lambda: ["stdlib-valid"])
    lines: int = 400
    seed: int = 0
    max_new_tokens: int = 40
    batch_size: int = 16
    output: str | None = None
    device: str = "auto"

    def __post_init__(self):
        for name in ("lines", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: set it to 0 or more")


class Line(NamedTuple):
    """A line that was taken out of its document, without indentation and line break, and the text on both sides."""

    text: str
    before: str
    after: str


def parse_args(argv=None) -> InfillConfig:
    return parse_flags(__doc__, InfillConfig, argv=argv, positional="checkpoint")[0]


def draw_lines(documents, tokenizer, n: int, seed: int, most_tokens: int) -> list[Line]:
    """Returns n lines, drawn from all lines of the documents with equal probability, in the order of the draw."""
    texts, places = [], []
    for number, text in enumerate(documents):
        texts.append(text)
        at = 0
        for line in text.split("\n"):
            end, bare = at + len(line.rstrip("\r")), line.strip()
            if at and end + 2 < len(text) and len(bare) >= LEAST_CHARS and any(map(str.isalpha, bare)):
                places.append((number, at + line.index(bare[0]), end))
            at += len(line) + 1
    drawn = []
    for index in np.random.default_rng(seed).permutation(len(places)):
        number, start, end = places[index]
        line = Line(texts[number][start:end], texts[number][:start], texts[number][end:])
        if len(tokenizer.encode_inside([line.text])[0]) <= most_tokens:
            drawn.append(line)
        if len(drawn) == n:
            return drawn
    raise UserError(f"the text has only {len(drawn)} usable lines: set a smaller --lines, or give more --paths")


def prompt_ids(tokenizer, line: Line, other: Line, arm: str, room: int) -> list[int]:
    """Returns the tokens after which the model writes the line. They are at most room + 4.

    other: a line whose suffix takes the place of the right one in the arm `wrong`."""
    half = room // 2
    if arm in ("left", "left_long"):
        before = _end(tokenizer, line.before, half if arm == "left" else 2 * half)
        ids = tokenizer.encode_inside([before])[0][-room:]
        return ids if len(before) < len(line.before) else tokenizer.start(ids)
    after = (other if arm == "wrong" else line).after
    before = tokenizer.encode_inside([_end(tokenizer, line.before, half)])[0][-half:]
    suffix = tokenizer.encode_inside([after[: 12 * half]])[0][:half]
    return tokenizer.start(tokenizer.around(before, suffix))


def _end(tokenizer, text: str, n: int) -> str:
    """Returns the end of a text that has about n tokens."""
    ids = tokenizer.encode_inside([text[-12 * n :]])[0][-n:]
    return tokenizer.decode_bytes(ids).decode(errors="ignore")


def write_lines(model, tokenizer, rows: list[list[int]], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Returns the greedy answer to each row of tokens: (its first line, whether the model ended after that line)."""
    ids, mask = left_padded(rows, tokenizer.pad_id, model.embed.weight.device)
    ends, written, open_rows = tokenizer.infill_ends, [[] for _ in rows], set(range(len(rows)))
    ended = [False] * len(rows)
    for column in generate(model, ids, max_new_tokens, 0.0, eos_id=ends, attention_mask=mask):
        for row in list(open_rows):
            index = int(column[row])
            ended[row] = index in ends
            written[row] += [] if ended[row] else [index]
            if ended[row] or b"\n" in tokenizer.id_to_bytes(index):
                open_rows.remove(row)
        if not open_rows:
            break
    texts = (tokenizer.decode_bytes(made).decode(errors="replace").split("\n")[0] for made in written)
    return list(zip(texts, ended))


def measure(model, tokenizer, lines: list[Line], config: InfillConfig) -> dict:
    """Returns {arm: [(exact, edit similarity, whether the model ended after the line) of each line]}."""
    room = model.config.max_seq_len - config.max_new_tokens - 4  # BOS and three sentinels
    if room < 32:
        raise UserError(f"the context of {model.config.max_seq_len} tokens is too short: lower --max_new_tokens")
    results = {arm: [] for arm in ARMS}
    with tqdm(total=len(lines) * len(ARMS), desc="lines", disable=not sys.stderr.isatty()) as bar:
        for arm in ARMS:
            for start in range(0, len(lines), config.batch_size):
                part = lines[start : start + config.batch_size]
                others = [lines[(start + i + len(lines) // 2) % len(lines)] for i in range(len(part))]
                rows = [prompt_ids(tokenizer, line, other, arm, room) for line, other in zip(part, others)]
                answers = write_lines(model, tokenizer, rows, config.max_new_tokens)
                for line, (answer, ended) in zip(part, answers):
                    want, answer = line.text.rstrip(), answer.rstrip()
                    results[arm].append((answer == want, edit_similarity(answer, want), ended))
                bar.update(len(part))
    return results


def figures(results: dict, lines: list[Line]) -> dict:
    """Returns the figures of each arm, and how often only `both` or only the other arm was exact."""
    new = np.array([line.text.strip() not in line.before[-NEAR:] + line.after[:NEAR] for line in lines])
    exact = {arm: np.array([r[0] for r in rows]) for arm, rows in results.items()}
    found = {"n_new": int(new.sum()), "arms": {}, "only_one_is_exact": {}}
    for arm, rows in results.items():
        ends = [ended for right, _, ended in rows if right]
        found["arms"][arm] = {
            "exact": float(exact[arm].mean()),
            "edit": float(np.mean([r[1] for r in rows])),
            "new": float(exact[arm][new].mean()) if new.any() else None,
            "ends": float(np.mean(ends)) if ends and arm in ("both", "wrong") else None,
        }
    for arm in ARMS[1:]:
        only = (exact["both"] & ~exact[arm], exact[arm] & ~exact["both"])
        found["only_one_is_exact"][arm] = {"both": int(only[0].sum()), arm: int(only[1].sum())}
    return found


def print_figures(found: dict):
    print(f"{'':10}  {'exact':>7}  {'edit':>7}  {'new':>7}  {'ends':>7}")
    for arm, row in found["arms"].items():
        print(f"{arm:10}", *("      -" if value is None else f"{value:7.3f}" for value in row.values()), sep="  ")
    print()


def main(argv=None):
    config = parse_args(argv)
    model, tokenizer = load_model(config.checkpoint, choose_device(config.device))
    if tokenizer.fim is None:
        raise UserError(f"{config.checkpoint} has no sentinels of fill-in-the-middle: train it with --fim_rate")
    lines = draw_lines(read_documents(config.paths), tokenizer, config.lines, config.seed, config.max_new_tokens)
    found = figures(measure(model, tokenizer, lines, config), lines)
    print_figures(found)
    record = {"experiment": "fim", "checkpoint": os.path.relpath(resolve(config.checkpoint)), "paths": config.paths}
    record |= {"lines": len(lines), "seed": config.seed, **found}
    print(json.dumps(record))
    if config.output:
        records.keep(config.output, record)


if __name__ == "__main__":
    run(main)
