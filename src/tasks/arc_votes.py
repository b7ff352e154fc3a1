"""Voting over the augmentations of ARC tasks: counts predictions, ranks them, and scores them as pass@K.

The augmentation of each prediction is undone first. Then equal grids are one candidate. Candidates are ranked by their
count, and at equal count by the mean halting probability, as in the authors' code for arXiv:2510.04871.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from src.tasks.arc import Task, crop, parse_puzzle_name

PASS_KS = (1, 2, 5, 10, 100, 1000)
SUBMITTED = 2  # attempts that ARC-AGI allows


class Candidate(NamedTuple):
    grid: UInt8[np.ndarray, "h w"]
    count: int
    halt: float  # mean halting probability


class Votes:
    """Collects predictions for test inputs. Each may be made under any augmentation."""

    def __init__(self):
        self._votes = {}  # (task, input grid) -> {predicted grid -> (grid, count, sum of halting probabilities)}

    def add(self, name: str, board: UInt8[np.ndarray, "l"], answer: UInt8[np.ndarray, "l"], halt: float):
        """Count a predicted answer to the input board of the puzzle `name`; halt is its halting probability."""
        task, augmentation = parse_puzzle_name(name)
        grid = augmentation.undo(crop(answer))
        candidates = self._votes.setdefault((task, _key(augmentation.undo(crop(board)))), {})
        _, count, total = candidates.get(_key(grid), (grid, 0, 0.0))
        candidates[_key(grid)] = grid, count + 1, total + halt

    def ranked(self, task: str, grid: UInt8[np.ndarray, "h w"]) -> list[Candidate]:
        """Returns the candidates for the test input `grid` of a task, the best one first; [] if there are none."""
        candidates = self._votes.get((task, _key(grid)), {}).values()
        found = [Candidate(grid, count, total / count) for grid, count, total in candidates]
        return sorted(found, key=lambda candidate: candidate[1:], reverse=True)


def pass_at(votes: Votes, tasks: Iterable[Task], ks: Iterable[int] = PASS_KS) -> dict[int, float]:
    """Returns {K: the mean over tasks of the share of test pairs whose output is among the first K candidates}.

    Test pairs whose output is not known are left out, and so are tasks that have only such pairs."""
    ranks = []  # per task, one entry per pair: the position of the right grid, or infinity
    for task in tasks:
        pairs = [pair for pair in task.test if pair[1] is not None]
        if pairs:
            ranks.append([_rank(votes.ranked(task.name, grid), output) for grid, output in pairs])
    return {k: float(np.mean([np.mean([rank < k for rank in task]) for task in ranks])) if ranks else 0.0 for k in ks}


def _rank(candidates, output):
    keys = [_key(candidate.grid) for candidate in candidates]
    return keys.index(_key(output)) if _key(output) in keys else float("inf")


def submission(votes: Votes, tasks: Iterable[Task]) -> dict[str, list[dict[str, list[list[int]]]]]:
    """Returns the JSON form of ARC-AGI: attempt_1 and attempt_2 for each test pair of each task.

    If there is only one candidate, both attempts are equal. If there is none, they are a grid of one black cell."""
    result = {}
    for task in tasks:
        result[task.name] = []
        for grid, _ in task.test:
            attempts = [candidate.grid.tolist() for candidate in votes.ranked(task.name, grid)[:SUBMITTED]] or [[[0]]]
            attempts += attempts[:1] * (SUBMITTED - len(attempts))
            result[task.name].append({f"attempt_{i + 1}": attempt for i, attempt in enumerate(attempts)})
    return result


def _key(grid):
    return grid.shape, grid.tobytes()
