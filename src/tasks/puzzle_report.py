"""What solve_puzzles.py writes about solved boards: solutions, a line per board, tables of accuracies."""

import csv
import sys

import numpy as np

from src.tasks.board_trace import board_text
from src.tasks.puzzle_data import difficulty_bins
from src.tasks.puzzle_eval import Answers, Solved, figures_of, shown_steps
from src.tasks.puzzles import Grids, PuzzleKind


class Writer:
    """Writes the solutions of each part at once: to a .csv file, or to stdout if no path is given."""

    def __init__(self, path: str | None, kind: PuzzleKind, grids: Grids):
        self.path, self.kind, self.grids, self.file = path, kind, grids, None

    def __enter__(self):
        if self.path is not None:
            self.file = open(self.path, "w", encoding="utf-8", newline="")  # noqa: SIM115
            self.csv = csv.writer(self.file)
            self.csv.writerow(["question", "answer", "right", "steps", "halting"])
        return self

    def __exit__(self, *exc):
        if self.file:
            self.file.close()

    def write(self, part: Solved):
        for i, row in enumerate(part.answers.rows):
            answer, question = part.last.answers[i], self.grids.inputs[row]
            if self.file is None:
                print(self._as_text(answer))
            else:
                verdict = {1.0: "yes", 0.0: "no"}.get(float(part.answers.is_exact[-1, i]), "")
                halt = "" if part.last.halt is None else f"{part.last.halt[i]:.6g}"
                texts = (self.kind.to_text(board, line_breaks=not self.kind.has_rules) for board in (question, answer))
                self.csv.writerow([*texts, verdict, f"{part.last.steps[i]:g}", halt])
        (self.file or sys.stdout).flush()

    def _as_text(self, answer):
        if self.grids.n_rows == 1 and sys.stdout.isatty():
            return board_text(self.kind, answer)
        return self.kind.to_text(answer, line_breaks=not self.kind.has_rules)


def describe(kind: PuzzleKind, grids: Grids, part: Solved) -> list[str]:
    """Returns a line for each board of a part: right or what is wrong, steps, halting probability, seconds."""
    lines = []
    for i, row in enumerate(part.answers.rows):
        is_right = part.answers.is_exact[-1, i]
        verdict = "right" if is_right == 1 else "not judged: its answer is not known"
        if is_right == 0:
            verdict = f"wrong: {kind.verify(grids.inputs[row], part.last.answers[i]) or 'it is not the known answer'}"
        halt = "" if part.last.halt is None else f", halting probability {part.last.halt[i]:.2f}"
        seconds, steps = part.seconds / len(part.answers.rows), float(part.last.steps[i])
        steps = f"{steps:g} step{'s' * (steps != 1)}"
        lines.append(f"board {row + 1}: {verdict}; {steps}{halt}, {seconds:.3f} s")
    return lines


def summary(kind: PuzzleKind, grids: Grids, parts: list[Solved]) -> list[str]:
    """Returns a line with the figures of all boards, then tables of exact accuracy by step and by difficulty."""
    deepest = max(len(part.answers.is_exact) for part in parts)
    is_exact, cells = (np.concatenate([_deepened(part.answers[i], deepest) for part in parts], 1) for i in (1, 2))
    halts = None
    if parts[0].answers.halts is not None:
        halts = np.concatenate([_deepened(part.answers.halts, deepest) for part in parts], 1)
    steps, seconds = np.concatenate([part.last.steps for part in parts]), sum(part.seconds for part in parts)
    judged = ~np.isnan(is_exact[-1])
    speed = f"mean steps {steps.mean():.2f}, {len(steps) / max(seconds, 1e-9):,.1f} boards/s"
    if not judged.any():
        return [f"{_count(len(steps))} of {kind.name}, whose answers are not known: {speed}"]
    known, halts = grids.take(judged), None if halts is None else halts[:, judged]
    rows, is_exact, cells = np.arange(known.n_rows), is_exact[:, judged], cells[:, judged]
    figures = figures_of(known, [Answers(rows, is_exact, cells, halts, np.full(len(rows), np.nan))])
    line = f"{_count(len(rows))} of {kind.name}: exact {figures['valid_exact_accuracy']:.4f}"
    if not np.isnan(cells[-1]).all():
        line += f", cells {np.nanmean(cells[-1]):.4f}"
    line += f", halting {figures['valid_halt_accuracy']:.4f}" if halts is not None else ""
    names = shown_steps(deepest)
    lines = [f"{line}, {speed}", *_table("after step", names, exact=[is_exact[step - 1].mean() for step in names])]
    bins = {name: is_in for name, is_in in difficulty_bins(known.difficulty).items() if is_in.any()}
    for prefix in known.difficulty:
        own = {name.removeprefix(f"{prefix}_"): name for name in bins if name.startswith(f"{prefix}_")}
        if len(own) < 2:
            continue
        exact = [figures[f"valid_exact_{name}"] for name in own.values()]
        lines += _table(prefix, [name.replace("_", " ") for name in own], [bins[own[n]].sum() for n in own], exact)
    if len(rows) < len(steps):
        lines.append(f"not judged, because no answer is known: {_count(len(steps) - len(rows))}")
    return lines


def _count(n):
    return f"{n:,} board{'s' * (n != 1)}"


def _deepened(values, deepest):
    """Returns values (S, N) for `deepest` steps. After the last step of a part, its answers stay the same."""
    return np.concatenate([values, np.repeat(values[-1:], deepest - len(values), axis=0)])


def _table(head, columns, boards=None, exact=()):
    rows = {head: columns} | ({} if boards is None else {"boards": [f"{n:,}" for n in boards]})
    rows |= {"exact": [f"{value:.3f}" for value in exact]}
    widths = [max(len(str(row[i])) for row in rows.values()) for i in range(len(columns))]
    return [
        f"{name:<11} " + "  ".join(f"{value!s:>{width}}" for value, width in zip(row, widths))
        for name, row in rows.items()
    ]
