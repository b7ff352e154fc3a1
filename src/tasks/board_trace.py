"""How the answer to one board changes from step to step: as data, as JSON and as text for a terminal.

trace = BoardTrace(kind, inputs, labels)            one board: arrays (L,)
for attempt in attempts(...): trace.add(attempt)    the first board of each attempt
print_trace(trace, sys.stderr)
write_trace(trace, "board.json")
draw_trace(trace, "board.png")                      in src/tasks/board_picture.py
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from src.config import check_writable, write_text
from src.errors import UserError
from src.tasks.puzzle_eval import judge
from src.tasks.puzzle_solve import Attempt
from src.tasks.puzzles import PuzzleKind, make_grids
from src.tasks.sudoku import Sudoku
from src.tasks.sudoku_solver import BLANK, BOXES

FORMATS = (".png", ".gif", ".pdf", ".svg", ".json")
MOST_SHOWN = 16  # steps in a picture or in a terminal; the JSON file has all of them
# ANSI 256-colour codes for each fourth of certainty, readable on black and on white terminals
BLUES = ("38;5;110", "38;5;74", "38;5;33", "38;5;27")
CLUE, WRONG = "1", "1;38;5;166"


class BoardTrace:
    """`steps` is a list of plain dicts, one per step:

    step: number, from 1. board: the answer as text, without line breaks.
    probability: list of L numbers, the probability of the answer's token in each cell.
    halt: halting probability; None without a halting head.
    changed: cells (from 0) whose token differs from that of the step before; at the first step there are none.
    wrong: cells that differ from the known answer; None if it is not known. Empty if the board is right by the rules.
    right: whether the board is right; None if that is not known."""

    def __init__(self, kind: PuzzleKind, inputs: UInt8[np.ndarray, "l"], labels: UInt8[np.ndarray, "l"]):
        self.kind, self.inputs, self.labels = kind, inputs, labels
        self.answers, self.steps, self.taken = [], [], 0

    def add(self, attempt: Attempt):
        """Appends a step: that of the first board of an attempt, unless all its copies have stopped before."""
        if attempt.steps[0] == self.taken:
            return
        self.taken = attempt.steps[0]
        answer, before = attempt.answers[0], self.answers[-1:] or attempt.answers[:1]
        verdict = judge(self.kind, make_grids(self.inputs[None], self.labels[None]), answer[None])[0]
        is_right, wrong = None if np.isnan(verdict) else bool(verdict), None
        if is_right or self.labels.any():
            wrong = [] if is_right else np.flatnonzero((answer != self.labels) & (self.labels != 0)).tolist()
        self.answers.append(answer)
        self.steps.append(
            {
                "step": len(self.answers),
                "board": "".join(self.kind.symbols[token] for token in answer),
                "probability": [float(f"{p:.6g}") for p in attempt.certainty[0].tolist()],
                "halt": None if attempt.halt is None else float(f"{attempt.halt[0]:.6g}"),
                "changed": np.flatnonzero(answer != before[0]).tolist(),
                "wrong": wrong,
                "right": is_right,
            }
        )

    @property
    def is_clue(self) -> np.ndarray:
        """(L,) whether the question gives the answer of a cell."""
        return self.inputs > BLANK if isinstance(self.kind, Sudoku) else np.zeros(len(self.inputs), bool)

    def shown(self) -> list[int]:
        """Returns the numbers (from 0) of the steps to show: all, or MOST_SHOWN of them, evenly spaced."""
        n = len(self.steps)
        return np.unique(np.linspace(0, n - 1, min(n, MOST_SHOWN)).round().astype(int)).tolist()

    def summary(self) -> str:
        """Returns a phrase such as "right from step 4 of 8 on"."""
        verdicts, n = [step["right"] for step in self.steps], len(self.steps)
        of_all = f"{n} step{'s' * (n > 1)}"
        if verdicts[-1] is None:
            return f"{of_all}, not judged: the answer is not known"
        if not verdicts[-1]:
            return f"wrong after {of_all}" + (", right on the way" if any(verdicts) else "")
        first = n - ([not verdict for verdict in reversed(verdicts)] + [True]).index(True)
        return "right after the only step" if n == 1 else f"right from step {first + 1} of {n} on"


def verdict_of(step: dict) -> str:
    """Returns "right", "3 wrong" (cells) or "wrong", or an empty text if the answer is not known."""
    if step["right"] or step["wrong"] is None:
        return {True: "right", False: "wrong", None: ""}[step["right"]]
    return f"{len(step['wrong'])} wrong" if step["wrong"] else "wrong"


# ---- JSON -----------------------------------------------------------------------------------------------------------


def check_trace_path(path: str):
    """Raises UserError if a trace cannot be written to this path. Scripts call it before they load a model."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--trace {path}: name a file that ends in {', '.join(FORMATS)}, or - for the terminal")
    for file in {path, path.with_suffix(".json")}:
        check_writable(file)


def write_trace(trace: BoardTrace, path):
    """Writes {"kind", "height", "width", "question", "answer": text or null, "steps"}, one step per line."""
    kind, known = trace.kind, trace.labels.any()
    question, answer = ("".join(kind.symbols[token] for token in board) for board in (trace.inputs, trace.labels))
    facts = {"kind": kind.name, "height": kind.height, "width": kind.width, "question": question}
    facts |= {"answer": answer if known else None}
    steps = ",\n".join(map(json.dumps, trace.steps))
    write_text(path, json.dumps(facts)[:-1] + f', "steps": [\n{steps}\n]}}\n')


# ---- text -----------------------------------------------------------------------------------------------------------


def has_colour(stream) -> bool:
    """Returns whether the stream is a terminal with colours and NO_COLOR is not set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def board_text(kind: PuzzleKind, board: UInt8[np.ndarray, "l"]) -> str:
    """Returns a board to print: a Sudoku with spaces, and with lines between its boxes; others as `to_text`."""
    if not isinstance(kind, Sudoku):
        return kind.to_text(board)
    return "\n".join(line[:-1] for line in _lines(kind, [f"{kind.symbols[token]} " for token in board]))


def _lines(kind, cells):
    """Returns the lines of a board whose cells are texts two columns wide."""
    rows = [cells[start : start + kind.width] for start in range(0, len(cells), kind.width)]
    if not isinstance(kind, Sudoku):
        return ["".join(row) for row in rows]
    height, width = BOXES[kind.size]
    between = "+-".join(["--" * width] * (kind.size // width))
    lines = []
    for number, row in enumerate(rows):
        if number and number % height == 0:
            lines.append(between)
        lines.append("| ".join("".join(row[start : start + width]) for start in range(0, kind.size, width)))
    return lines


def print_trace(trace: BoardTrace, stream=None, colour: bool | None = None):
    """Prints the board after each step, side by side as far as the terminal is wide, and a legend.

    A mark after a cell says that it changed (*), is wrong (!), or both (?). By default there is colour if the stream
    has it. If there are many steps, some are left out."""
    stream = sys.stderr if stream is None else stream
    colour = has_colour(stream) if colour is None else colour
    shown, columns = trace.shown(), shutil.get_terminal_size().columns
    panels = [_panel(trace, number, colour) for number in shown]
    width = panels[0][0]
    per_row = max(1, (columns + 3) // (width + 3))
    for start in range(0, len(panels), per_row):
        for line in zip(*(lines for _, lines in panels[start : start + per_row]), strict=True):
            print("   ".join(line).rstrip(), file=stream)
        print(file=stream)
    legend = ["* changed since the step before"]
    if any(step["wrong"] for step in trace.steps):
        legend.append("! wrong, ? changed and wrong")
    if colour:
        shades = " ".join(_painted(f"{25 * i}%", code, True) for i, code in enumerate(BLUES, start=1))
        legend.append(f"certainty up to {shades}, {_painted('clue', CLUE, True)}, {_painted('wrong', WRONG, True)}")
    if len(shown) < len(trace.steps):
        legend.append(f"{len(shown)} of {len(trace.steps)} steps shown")
    print("; ".join(legend), file=stream)
    print(f"{trace.kind.name}: {trace.summary()}", file=stream)


def _panel(trace, number, colour):
    """Returns (width, lines) of one step: its number, the board, its halting probability and verdict."""
    kind, step, clues = trace.kind, trace.steps[number], trace.is_clue
    changed, wrong = set(step["changed"]), set(step["wrong"] or ())
    cells = []
    for cell, (token, p) in enumerate(zip(trace.answers[number].tolist(), step["probability"])):
        mark = {(0, 0): " ", (1, 0): "*", (0, 1): "!", (1, 1): "?"}[cell in changed, cell in wrong]
        code = WRONG if cell in wrong else CLUE if clues[cell] else BLUES[min(3, int(4 * p))]
        symbol = kind.symbols[token].replace(" ", "·")  # a floor that can be seen
        cells.append(_painted(f"{symbol}{mark}", code, colour))
    lines = _lines(kind, cells)
    boxes = kind.width // BOXES[kind.size][1] if isinstance(kind, Sudoku) else 1
    width = max(2 * kind.width + 2 * (boxes - 1), 18)
    pad = width - 2 * kind.width - 2 * (boxes - 1)
    below = [] if step["halt"] is None else [f"halt {step['halt']:.2f}"]
    below += [verdict_of(step)] if verdict_of(step) else []
    head, foot = f"step {step['step']}", ", ".join(below)
    return width, [head.ljust(width), *(line + " " * pad for line in lines), foot.ljust(width)]


def _painted(text, code, colour):
    return f"\033[{code}m{text}\033[0m" if colour else text
