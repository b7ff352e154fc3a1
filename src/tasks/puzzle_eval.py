"""Evaluation of a puzzle model: exact, cell and halting accuracy after each supervision step, and by difficulty.

`answer` and `figures_of` are those of a training run, which compares with the labels. `solve` is that of
solve_puzzles.py, which judges by the rules.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from src.model import TRMModel
from src.tasks.puzzle_data import difficulty_bins
from src.tasks.puzzle_rows import targets_of
from src.tasks.puzzle_solve import Attempt, Effort, attempts, run_steps
from src.tasks.puzzles import Grids, PuzzleKind


class Answers(NamedTuple):
    """What a model answered to N puzzles after each of S steps."""

    rows: np.ndarray  # (N,) row numbers of the puzzles
    is_exact: np.ndarray  # (S, N) whether all target cells are right
    cells: np.ndarray  # (S, N) fraction of the target cells that are right
    halts: np.ndarray | None  # (S, N) whether the halting head calls the answer right; None without a head
    loss: np.ndarray  # (N,) loss after the last step, in nats per cell; the mean over its batch. NaN if not measured


def answer(model: TRMModel, grids: Grids, rows: np.ndarray, steps: int | None, precision: str, batch_size) -> Answers:
    """Solves the puzzles with these row numbers.  steps: supervision steps; default those of the model."""
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = [torch.from_numpy(array[part].astype(np.int64)).to(device) for array in grids[:3]]
        # a compiled model has one shape; compiling it again for the last, smaller batch would take longer than it saves
        with torch.compiler.set_stance("default" if len(part) == batch_size else "force_eager"):
            parts.append((part, *_solve(model, *batch, steps, precision)))
    model.train(was_training)
    rows, is_exact, cells, halts, loss = zip(*parts, strict=True)
    halts = None if halts[0] is None else np.concatenate(halts, 1)
    is_exact, cells = np.concatenate(is_exact, 1), np.concatenate(cells, 1)
    return Answers(np.concatenate(rows), is_exact, cells, halts, np.concatenate(loss))


def _solve(model, inputs, labels, puzzle_ids, steps, precision):
    n_wrong, halts = [], []
    for step in run_steps(model, inputs, puzzle_ids, steps, targets_of(labels), precision=precision):
        is_right = (step.answers == labels) | (labels == 0)
        n_wrong.append((~is_right).sum(-1))
        halts.append(None if step.halt_logits is None else step.halt_logits > 0)
    # only now to the CPU: a GPU then gets all steps without waiting
    n_wrong = torch.stack(n_wrong).cpu().numpy()
    halts = None if halts[0] is None else torch.stack(halts).cpu().numpy()
    n_cells = np.maximum(1, (labels != 0).sum(-1).cpu().numpy())
    return n_wrong == 0, 1 - n_wrong / n_cells, halts, np.full(len(inputs), step.ce_loss.item())


def figures_of(grids: Grids, answers: list[Answers]) -> dict:
    """Figures for metrics.jsonl from the answers of all processes.

    valid_loss, valid_exact_accuracy, valid_cell_accuracy and valid_halt_accuracy are those after the last step;
    valid_exact_step_N and the like those after step N; valid_exact_clues_6 and the like are exact accuracy after the
    last step among the puzzles of a difficulty."""
    is_exact, cells = (np.concatenate([getattr(a, name) for a in answers], 1) for name in ("is_exact", "cells"))
    rows, loss = (np.concatenate([getattr(a, name) for a in answers]) for name in ("rows", "loss"))
    by_step = {"exact": is_exact.mean(1), "cell": cells.mean(1)}
    if answers[0].halts is not None:
        by_step["halt"] = (np.concatenate([a.halts for a in answers], 1) == is_exact).mean(1)
    figures = {"valid_loss": loss.mean()} | {f"valid_{name}_accuracy": values[-1] for name, values in by_step.items()}
    for name, values in by_step.items():
        figures |= {f"valid_{name}_step_{step}": value for step, value in enumerate(values, start=1)}
    for name, is_in in difficulty_bins(grids.difficulty).items():
        if is_in[rows].any():
            figures[f"valid_exact_{name}"] = is_exact[-1][is_in[rows]].mean()
    return {name: float(value) for name, value in figures.items()}


def describe(figures: dict) -> str:
    """One line of an evaluation: accuracies after the last step, and exact accuracy after each step."""
    by_step = [figures[name] for name in figures if name.startswith("valid_exact_step_")]
    line = f"exact {figures['valid_exact_accuracy']:.4f}, cells {figures['valid_cell_accuracy']:.4f}"
    if "valid_halt_accuracy" in figures:
        line += f", halting {figures['valid_halt_accuracy']:.4f}"
    steps = shown_steps(len(by_step), most=0)
    return f"{line}; exact by step: " + ", ".join(f"{step}: {by_step[step - 1]:.3f}" for step in steps)


def shown_steps(n, most=16):
    """Returns the numbers 1 to n, or, if n is more than `most`, only the powers of two and n."""
    return [step for step in range(1, n + 1) if n <= most or step & (step - 1) == 0 or step == n]


# ---- boards whose answer is judged by the rules ---------------------------------------------------------------------


class Solved(NamedTuple):
    """A part of the boards, solved: n boards, S steps."""

    answers: Answers  # is_exact: whether the answer is right, as `judge` says
    halting: np.ndarray | None  # (S, n) halting probabilities; None without a halting head
    last: Attempt
    seconds: float


def solve(model: TRMModel, kind: PuzzleKind, grids: Grids, effort: Effort, watch=None) -> Iterator[Solved]:
    """Solves boards part by part, in order.  `watch` is called with each attempt at the first part."""
    size = max(1, effort.batch_size // effort.copies)
    for start in range(0, grids.n_rows, size):
        rows, began, found = np.arange(start, min(start + size, grids.n_rows)), time.perf_counter(), []
        part = grids.take(rows)
        n_cells = (part.labels != 0).sum(1)
        for attempt in attempts(model, kind, part.inputs, part.puzzle_ids, effort, start):
            n_right = ((attempt.answers == part.labels) & (part.labels != 0)).sum(1)
            cells = np.where(n_cells, n_right / np.maximum(1, n_cells), np.nan)
            found.append((judge(kind, part, attempt.answers), cells, attempt.halt))
            if watch is not None and start == 0:
                watch(attempt)
        is_exact, cells, halting = zip(*found, strict=True)
        halting = None if halting[0] is None else np.stack(halting)
        halts = None if halting is None else halting > effort.halt_threshold
        answers = Answers(rows, np.stack(is_exact), np.stack(cells), halts, np.full(len(rows), np.nan))
        yield Solved(answers, halting, attempt, time.perf_counter() - began)


def judge(kind: PuzzleKind, grids: Grids, answers: np.ndarray) -> np.ndarray:
    """Returns (N,) numbers: 1.0 for a right answer, 0.0 for a wrong one, NaN if that is not known.

    The rules of the kind decide, or, for a kind without known rules, the labels."""
    if kind.has_rules:
        return kind.are_right(grids.inputs, answers).astype(np.float64)
    is_right = ((answers == grids.labels) | (grids.labels == 0)).all(1)
    return np.where(grids.labels.any(1), is_right, np.nan)
