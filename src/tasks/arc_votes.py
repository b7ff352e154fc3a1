"""Voting over the augmentations of ARC tasks: solves them, counts predictions, ranks them, and scores them as pass@K.

    attempts, line = solve_tasks(model, tasks, names, Effort(votes=100))   a submission, and a line of figures

The augmentation of each prediction is undone first. Then equal grids are one candidate. Candidates are ranked by their
count, and at equal count by the mean halting probability, as in the authors' code for arXiv:2510.04871.
"""

import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from src.errors import UserError, few
from src.model import TRMModel
from src.tasks.arc import IDENTITY, Arc, Task, crop, draw_augmentations, frame, parse_puzzle_name, puzzle_name
from src.tasks.puzzle_solve import Effort, attempts
from src.training.progress import progress_bar

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


def solve_tasks(model: TRMModel, tasks: list[Task], names: list[str], effort: Effort) -> tuple[dict, str]:
    """Returns the submission for these tasks, and a line with its figures. Raises UserError as `puzzles_of` does.

    names: those of the model's puzzle ids, from its checkpoint."""
    n_ids, began = model.config.puzzle_ids, time.perf_counter()
    if n_ids and not 1 < len(names) <= n_ids:
        raise UserError(
            f"the model has {n_ids} puzzle ids, but its checkpoint names {len(names)} in identifiers.json: copy "
            "that file from the folder that the model was trained on"
        )
    puzzles = puzzles_of(tasks, effort.votes, names if n_ids else [], effort.seed)
    votes, steps = vote(model, tasks, puzzles, effort)
    seconds = time.perf_counter() - began
    line = f"{len(tasks):,} task{'s' * (len(tasks) != 1)} of arc, up to {effort.votes:,} votes"
    if known := sum(any(output is not None for _, output in task.test) for task in tasks):
        ks = [k for k in PASS_KS if k <= max(SUBMITTED, effort.votes)]
        figures = ", ".join(f"pass@{k} {share:.4f}" for k, share in pass_at(votes, tasks, ks).items())
        line += f": {figures} on the {known:,} whose outputs are known"
    return submission(votes, tasks), f"{line}; mean steps {steps:.2f}, {seconds:.1f} s"


def puzzles_of(tasks: list[Task], n: int, names: list[str], seed: int = 0) -> dict[str, list[tuple[int, str]]]:
    """Returns up to n puzzles (id, name) for each task, by its name: the task as it is, then augmentations of it.

    names: those of the puzzle ids that the model has learned; [] if it has none. A task that is among them gets its own
    augmentations. For any other task, augmentations are drawn, and their id is 0. Raises UserError if the model has
    learned none of the tasks."""
    puzzles = {task.name: [] for task in tasks}
    for puzzle_id, name in enumerate(names):
        task, _ = parse_puzzle_name(name)
        if task in puzzles and len(puzzles[task]) < n:
            puzzles[task].append((puzzle_id, name))
    unknown = [task for task in tasks if not puzzles[task.name]]
    if names and len(unknown) == len(tasks):
        raise UserError("the model has a puzzle id for none of these tasks: give tasks that it was trained on")
    if names and unknown:
        which = few(task.name for task in unknown)
        print(f"no puzzle id for {len(unknown)} of {len(tasks)} tasks ({which}): they get id 0", file=sys.stderr)
    for task in unknown:
        drawn = draw_augmentations(task, n - 1, np.random.default_rng((seed, *task.name.encode())))
        puzzles[task.name] = [(0, puzzle_name(task.name, each)) for each in (IDENTITY, *drawn)]
    return puzzles


def vote(
    model: TRMModel, tasks: list[Task], puzzles: dict[str, list[tuple[int, str]]], effort: Effort
) -> tuple[Votes, float]:
    """Solves each test pair under each puzzle of its task. Returns the votes and the mean supervision steps of a copy.

    effort.votes is not used: a vote is a puzzle."""
    ballots = [(*puzzle, grid) for task in tasks for grid, _ in task.test for puzzle in puzzles[task.name]]
    votes, steps, size = Votes(), 0.0, max(1, effort.batch_size // effort.starts)
    for start in progress_bar(range(0, len(ballots), size), desc="voting", unit="batch"):
        ids, names, grids = zip(*ballots[start : start + size], strict=True)
        boards = np.array([frame(parse_puzzle_name(name)[1].apply(grid)) for name, grid in zip(names, grids)])
        *_, last = attempts(model, Arc(), boards, np.array(ids), effort._replace(votes=1), start)
        halts = np.zeros(len(ids)) if last.halt is None else last.halt
        for name, board, answer, halt in zip(names, boards, last.answers, halts.tolist(), strict=True):
            votes.add(name, board, answer, halt)
        steps += last.steps.sum()
    return votes, steps / len(ballots)


def pass_at(votes: Votes, tasks: Iterable[Task], ks: Iterable[int]) -> dict[int, float]:
    """Returns {K: the mean over tasks of the share of test pairs whose output is among the first K candidates}.

    Test pairs whose output is not known are left out, and so are tasks that have only such pairs."""
    ranks = []  # per task, one entry per pair: the position of the right grid, or infinity
    for task in tasks:
        pairs = [pair for pair in task.test if pair[1] is not None]
        if pairs:
            ranks.append([_rank(votes.ranked(task.name, grid), output) for grid, output in pairs])
    return {k: float(np.mean([np.mean([rank < k for rank in task]) for task in ranks])) if ranks else 0.0 for k in ks}


def _rank(candidates, output):
    keys = [_key(candidate.grid) for candidate in candidates if candidate.grid.size]  # as in `submission`
    return keys.index(_key(output)) if _key(output) in keys else float("inf")


def submission(votes: Votes, tasks: Iterable[Task]) -> dict[str, list[dict[str, list[list[int]]]]]:
    """Returns the JSON form of ARC-AGI: attempt_1 and attempt_2 for each test pair of each task.

    Candidates without cells are left out. If only one is left, both attempts are equal; if none is, they are a grid of
    one black cell."""
    result = {}
    for task in tasks:
        result[task.name] = []
        for grid, _ in task.test:
            answers = [candidate.grid for candidate in votes.ranked(task.name, grid) if candidate.grid.size]
            answers = answers[:SUBMITTED] or [np.zeros((1, 1), np.uint8)]
            answers += answers[:1] * (SUBMITTED - len(answers))
            result[task.name].append({f"attempt_{i + 1}": answer.tolist() for i, answer in enumerate(answers)})
    return result


def _key(grid):
    return grid.shape, grid.tobytes()
