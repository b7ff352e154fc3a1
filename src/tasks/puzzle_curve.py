"""Exact accuracy against the mean number of supervision steps: what to spend them on, and when to stop.

The first four rules are compared on the same answers: those of N boards after each of S steps, which
`solve_puzzles.py --curve` collects. The others solve several copies of each board; a copy counts with all its steps.

    fixed    every board stops after the same number of steps
    halt     a board stops after the first step whose halting probability is over a threshold
    random   the numbers of steps of `halt`, shuffled among the boards: the same mean, without the head's knowledge
    oracle   a board stops after the first step from which on it stays right; a board that never gets right stops
             after its first step. No rule: a bound, which needs the solution
    starts, votes            noisy starts and votes over symmetries, as in puzzle_solve.py; each copy takes as many
                             steps as in training
    starts+halt, votes+halt  the same, but a copy stops when its halting probability is over the threshold

    curve = curve_of("runs/sudoku4", kind, grids, parts, 8, 0.5)
    curve.points.extend(points_of_copies(model, kind, grids, effort, [2, 4, 8]))

Files, tables and pictures of curves are in curve_report.py.
"""

import sys
from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from src.errors import UserError
from src.model import TRMModel
from src.tasks.puzzle_data import difficulty_bins, digest_of
from src.tasks.puzzle_eval import Solved, solve
from src.tasks.puzzle_solve import Effort
from src.tasks.puzzles import Grids, PuzzleKind

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
COPIES = ("starts", "starts+halt", "votes", "votes+halt")
SHUFFLES = 20  # of random, averaged


class Point(NamedTuple):
    """One setting of a rule: its cost and its accuracy."""

    rule: str
    setting: float  # steps (of oracle: the most), threshold, or number of copies
    steps: float  # mean supervision steps per board, those of all its copies added
    exact: float  # fraction of the boards whose answer is right


class Bin(NamedTuple):
    """The boards of one range of difficulty: the main rules."""

    name: str
    boards: int
    full: float  # exact accuracy after all steps of the training
    halt: float  # exact accuracy of the halting head at one threshold
    halt_steps: float  # its mean steps
    fixed: float  # exact accuracy after the same mean number of steps for all boards, rounded up
    oracle_steps: float  # mean steps of oracle


class Curve(NamedTuple):
    """The comparison of one model."""

    checkpoint: str
    kind: str
    boards: int
    trained: int  # supervision steps in training
    threshold: float  # of the bins, and of copies that halt
    points: list[Point]
    bins: list[Bin]  # the first has all boards; [] without a halting head
    digest: str | None = None  # of the boards; None in files of older versions

    @property
    def full(self) -> Point:
        """The point of the number of steps that the model was trained with."""
        return next(point for point in self.points if (point.rule, point.setting) == ("fixed", self.trained))


def stops_of(halts: Float[np.ndarray, "s n"], threshold: float) -> Int[np.ndarray, "n"]:
    """The step (from 0) at which each board stops: the first one over the threshold, or else the last."""
    over = halts > threshold
    return np.where(over.any(0), over.argmax(0), len(halts) - 1)


def oracle_stops(is_exact: Bool[np.ndarray, "s n"]) -> Int[np.ndarray, "n"]:
    """The first step (from 0) from which on each board is right; 0 if it is wrong after the last step."""
    tail = np.cumprod(is_exact[::-1], axis=0).sum(0)  # right steps at the end
    return np.where(tail > 0, len(is_exact) - tail, 0)


def curve_of(
    checkpoint: str, kind: PuzzleKind, grids: Grids, parts: list[Solved], trained: int, threshold: float
) -> Curve:
    """Returns the curve of boards that were solved part by part, all with a fixed number of steps, in one copy.

    Boards whose answer is not known are left out. Raises UserError if no answer is known."""
    is_exact = np.concatenate([part.answers.is_exact for part in parts], 1)
    known = ~np.isnan(is_exact[-1])
    if not known.any():
        raise UserError("--curve needs boards whose answer is known: give a file with answers")
    is_exact, halts, bins = is_exact[:, known] == 1, None, []
    trained = min(trained, len(is_exact))
    if parts[0].halting is not None:
        halts = np.concatenate([part.halting for part in parts], 1)[:, known]
        bins = bins_of(is_exact, halts, grids.take(known).difficulty, trained, threshold)
    points, digest = points_of(is_exact, halts), digest_of(grids)
    return Curve(checkpoint, kind.name, int(known.sum()), trained, threshold, points, bins, digest)


def points_of(is_exact: Bool[np.ndarray, "s n"], halts: Float[np.ndarray, "s n"] | None, seed: int = 0) -> list[Point]:
    """Returns the points of the rules for one copy, from answers that are right or not and halting probabilities."""
    n_steps = len(is_exact)
    points = [Point("fixed", step, step, is_exact[step - 1].mean()) for step in range(1, n_steps + 1)]
    if halts is not None:
        rng = np.random.default_rng(seed)
        for threshold in THRESHOLDS:
            stops = stops_of(halts, threshold)
            mean = float(stops.mean() + 1)
            points.append(Point("halt", threshold, mean, _exact_at(is_exact, stops)))
            shuffled = [_exact_at(is_exact, rng.permutation(stops)) for _ in range(SHUFFLES)]
            points.append(Point("random", threshold, mean, float(np.mean(shuffled))))
    stops = oracle_stops(is_exact)
    points.append(Point("oracle", n_steps, float(stops.mean() + 1), _exact_at(is_exact, stops)))
    return [Point(rule, float(setting), float(steps), float(exact)) for rule, setting, steps, exact in points]


def _exact_at(is_exact, stops) -> float:
    return float(is_exact[stops, np.arange(len(stops))].mean())


def points_of_copies(
    model: TRMModel, kind: PuzzleKind, grids: Grids, effort: Effort, counts: Iterable[int]
) -> Iterable[Point]:
    """Yields the points of starts and votes for these numbers of copies; effort has the steps of copies that halt.

    If the model or the kind of puzzle cannot do one of them, a line on stderr says why, and it is left out."""
    for rule in COPIES:
        option, halts = rule.removesuffix("+halt"), rule.endswith("+halt")
        for n in counts:
            own = effort._replace(**{option: n, "halts": halts}, steps=effort.steps if halts else None)
            try:
                own.check(model, kind)
            except UserError as error:
                print(f"not in the curve: {rule} {n}: {error}", file=sys.stderr)
                break
            parts = list(solve(model, kind, grids, own))
            exact, steps = (
                np.concatenate(each) for each in zip(*((p.answers.is_exact[-1], p.last.steps) for p in parts))
            )
            known = ~np.isnan(exact)
            yield Point(rule, float(n), float(n * steps[known].mean()), float(exact[known].mean()))


def bins_of(is_exact, halts, difficulty: dict[str, np.ndarray], trained: int, threshold: float) -> list[Bin]:
    """Returns the bins of the boards whose answers and halting probabilities are given, (S, N) each."""
    stops, oracle, boards = stops_of(halts, threshold), oracle_stops(is_exact), np.arange(is_exact.shape[1])
    values = np.stack(
        [
            is_exact[trained - 1],
            is_exact[stops, boards],
            stops + 1,
            is_exact[ceil(stops.mean() + 1) - 1],
            oracle + 1,
        ]
    )
    found = {"all": boards >= 0} | difficulty_bins(difficulty)
    return [
        Bin(name, int(is_in.sum()), *values[:, is_in].mean(1).tolist()) for name, is_in in found.items() if is_in.any()
    ]
