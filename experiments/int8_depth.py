"""Measure what bf16 and int8 cost at each recursion depth: the increase of the loss over fp32.

    python experiments/int8_depth.py                                   # the released checkpoint
    python experiments/int8_depth.py runs/trm runs/loop --max_recursion_depth 12 --max_tokens 50000
    python experiments/int8_depth.py runs/trm --paths data/valid.txt   # on your own text

Each recursion step passes its rounding error on to the next, so the error could grow with depth. Each model is loaded
in fp32, in bf16 (weights and arithmetic) and with int8 weights (src/quantize.py). It scores the same text at every
fixed depth from 1 to max_recursion_depth, which may exceed the trained depth. Prints a table per checkpoint, then one
JSON line: nats per token and bits per byte in fp32, and how much bf16 and int8 add to them.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

import torch  # noqa: E402

from src.checkpoint import load_model, resolve  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.data.corpus import read_pieces, stdlib_files  # noqa: E402
from src.evaluation.scoring import score_corpus  # noqa: E402
from src.exits import ExitRule, max_depth, visits_per_recursion_step  # noqa: E402
from src.quantize import quantize  # noqa: E402

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass
class DepthConfig:
    """What to measure.

    Args:
        checkpoints: checkpoint folders or run folders; the flag name may be left out. If not given, the released
            checkpoint is measured
        paths: text files to score; if not given, the validation files of this Python's standard library
        max_tokens: number of tokens to score
        max_recursion_depth: deepest recursion to measure; if not given, twice the trained depth, but at least 4
    """

    checkpoints: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    max_tokens: int = 20_000
    max_recursion_depth: int | None = None

    def __post_init__(self):
        if self.max_tokens < 1 or (self.max_recursion_depth or 1) < 1:
            raise ValueError("max_tokens and max_recursion_depth must be 1 or more: correct them")


def parse_args(argv=None) -> DepthConfig:
    return parse_flags(__doc__, DepthConfig, argv=argv, positional="checkpoints")[0]


def load(folder, precision):
    model, tokenizer = load_model(folder, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return quantize(model) if precision == "int8" else model, tokenizer


def measure(folder, config: DepthConfig) -> list[dict]:
    """Returns one row for each recursion step of a checkpoint."""
    scores, rule = {}, None
    for precision in PRECISIONS:
        model, tokenizer = load(folder, precision)
        trained = max_depth(model.config)
        deepest = config.max_recursion_depth or max(4, 2 * trained)
        rule = ExitRule("fixed", 1 if model.config.recursion == "none" else deepest)
        text = read_pieces(config.paths or stdlib_files()[1])
        scores[precision] = score_corpus(
            model, tokenizer, text, rule=rule, per_step=True, max_tokens=config.max_tokens
        ).steps
    rows = []
    for step, exact in enumerate(scores["fp32"]):
        row = {"step": step + 1, "visits": (step + 1) * visits_per_recursion_step(model.config)}
        row |= {"trained": step + 1 == trained, "nats": exact.loss, "bits_per_byte": exact.bits_per_byte}
        for precision in PRECISIONS[1:]:
            rounded = scores[precision][step]
            row[f"{precision}_nats"] = rounded.loss - exact.loss
            row[f"{precision}_bits_per_byte"] = rounded.bits_per_byte - exact.bits_per_byte
        rows.append(row)
    return rows


def print_rows(folder, rows):
    print(f"{folder}: nats/token (bits/byte) in fp32, and what bf16 and int8 add\n")
    print(f"{'step':>7}  {'visits':>6}  {'fp32':>17}  {'bf16':>19}  {'int8':>19}")
    for row in rows:
        cells = [f"{row['nats']:.4f} ({row['bits_per_byte']:.4f})"]
        cells += [f"{row[f'{p}_nats']:+.4f} ({row[f'{p}_bits_per_byte']:+.4f})" for p in PRECISIONS[1:]]
        print(f"{row['step']:>6}{'*' if row['trained'] else ' '}  {row['visits']:>6}  ", end="")
        print(f"{cells[0]:>17}  {cells[1]:>19}  {cells[2]:>19}")
    print("\n* the trained depth\n")


def main(argv=None):
    config = parse_args(argv)
    found = {}
    for folder in config.checkpoints or [None]:
        name = os.path.relpath(resolve(folder))
        found[name] = measure(folder, config)
        print_rows(name, found[name])
    print(json.dumps({"experiment": "int8_depth", "max_tokens": config.max_tokens, "checkpoints": found}))


if __name__ == "__main__":
    run(main)
