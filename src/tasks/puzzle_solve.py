"""Solves boards with a trained model: supervision steps, early stopping, noisy starts, votes over symmetries.

    for step in run_steps(model, inputs): ...                      the model's own outputs after each supervision step
    for attempt in attempts(model, kind, inputs, ids, effort): ... the answers chosen among several copies of a board

A board is solved in `votes * starts` copies. A vote is the board under a symmetry of its kind. A start is a copy of a
vote whose first state has noise. Of the starts of a vote, the one with the highest halting logit is taken
(arXiv:2605.19943 searches in this way). Then the symmetries are undone, and the votes are counted as in the authors'
code for arXiv:2510.04871: equal answers are one candidate, and candidates are ranked by their count, then by their mean
halting probability.
"""

from collections.abc import Iterator
from itertools import zip_longest
from math import inf, log
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64, UInt8
from torch import Tensor

from src.errors import UserError
from src.model import Carry, TRMModel
from src.runtime import autocast, mix_seed
from src.tasks.puzzles import PuzzleKind, Symmetries

LEAST = 64  # symmetries that are drawn at once
IDLE = 8  # after so many draws without a new symmetry, there is no other: missing one of 8 has a chance of 1e-29


# ---- the steps of a model -------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a model answers after a step to the R boards of a batch that took it.

    A step is a supervision step (trm), a visit (loop), or the only pass (none)."""

    rows: Int64[Tensor, "r"]  # in the batch
    logits: Float[Tensor, "r l v"]
    halt_logits: Float[Tensor, "r"] | None  # None without a halting head
    ce_loss: Float[Tensor, ""] | None  # nats per target; None without targets; of a loop, that of all its visits

    @property
    def answers(self) -> Int64[Tensor, "r l"]:
        return self.logits.argmax(-1)

    @property
    def certainty(self) -> Float32[Tensor, "r l"]:
        """The probability of the chosen token in each cell."""
        return self.logits.float().softmax(-1).amax(-1)


def run_steps(
    model: TRMModel,
    inputs: Int[Tensor, "b l"],
    puzzle_ids: Int[Tensor, "b"] | None = None,
    steps: int | None = None,
    targets: Int[Tensor, "b l"] | None = None,
    noise: Float[Tensor, "2 b t d"] | None = None,
    halt_logit: float = inf,
    precision: str = "fp32",
) -> Iterator[Step]:
    """Runs a model in eval mode on a batch and yields each step, one by one, so that memory does not grow.

    steps: supervision steps of trm; default as many as in training. noise: added to the first y and z (trm only).
    A row whose halting logit exceeds halt_logit leaves the batch, so that later steps compute fewer rows (trm only)."""
    config, device = model.config, model.embed.weight.device
    is_trm = config.recursion == "trm"
    rows, carry = torch.arange(len(inputs), device=device), None
    puzzle_ids = puzzle_ids if config.prefix_tokens else None
    if noise is not None:
        carry = Carry(model.y_init + noise[0], model.z_init + noise[1], 0)
    for _ in range((steps or config.train_steps) if is_trm else 1):
        with torch.no_grad(), autocast(device, precision):
            out = model(inputs, targets, supervision_steps=1, carry=carry, return_steps=True, puzzle_ids=puzzle_ids)
        halts = [None] * len(out.logits) if out.halt_logits is None else out.halt_logits
        for logits, halt in zip(out.logits, halts, strict=True):
            yield Step(rows, logits, halt, out.ce_loss)
        if not is_trm:
            return
        carry = Carry(out.carry.y, out.carry.z, 0)
        if halts[-1] is None or halt_logit == inf:  # no row can leave: a GPU need not be asked
            continue
        stays = ~(halts[-1] > halt_logit)
        if not stays.all():
            batch = (rows, inputs, carry.y, carry.z, puzzle_ids, targets)
            rows, inputs, y, z, puzzle_ids, targets = (None if each is None else each[stays] for each in batch)
            carry = Carry(y, z, 0)
        if not len(rows):
            return


# ---- copies of a board ----------------------------------------------------------------------------------------------


class Effort(NamedTuple):
    """How much computation a board gets."""

    steps: int | None = None  # supervision steps; None = as in training
    halts: bool = False  # a copy stops when its halting probability exceeds halt_threshold
    halt_threshold: float = 0.5
    votes: int = 1
    starts: int = 1
    start_noise: float = 0.0  # standard deviation, per element of y and z
    seed: int = 0
    batch_size: int = 256  # copies in a batch
    precision: str = "fp32"

    @property
    def copies(self) -> int:
        return self.votes * self.starts

    @property
    def halt_logit(self) -> float:
        p = self.halt_threshold
        return inf if p == 1 or not self.halts else -inf if p == 0 else log(p / (1 - p))

    def check(self, model: TRMModel, kind: PuzzleKind):
        """Raises UserError if this model or its kind of puzzle cannot do this."""
        recursion = model.config.recursion
        for name, is_wanted in (("steps", self.steps), ("exit halt", self.halts), ("starts", self.starts > 1)):
            if is_wanted and recursion != "trm":
                raise UserError(f"--{name} is for recursion trm, and this model has {recursion}: leave it out")
        for name, is_wanted in (("exit halt", self.halts), ("starts", self.starts > 1)):
            if is_wanted and model.q_head is None:
                raise UserError(f"--{name} needs a halting head, which this model does not have: leave it out")
        if self.votes > 1:
            if not kind.has_symmetries:
                raise UserError(f"--votes needs symmetries, and a board of {kind.name} alone has none: leave it out")
            _draw_different(kind, self.votes, np.random.default_rng(self.seed))


class Attempt(NamedTuple):
    """The answers to N boards after a step. A copy that has stopped keeps its answer."""

    answers: UInt8[np.ndarray, "n l"]
    certainty: Float32[np.ndarray, "n l"]  # probability of each token, from the surest copy with this answer
    halt: Float32[np.ndarray, "n"] | None  # halting probability: the mean over the votes for this answer
    steps: Float64[np.ndarray, "n"]  # steps taken so far, the mean over the copies of a board


def attempts(
    model: TRMModel,
    kind: PuzzleKind,
    inputs: UInt8[np.ndarray, "n l"],
    puzzle_ids: Int[np.ndarray, "n"],
    effort: Effort,
    first: int = 0,
) -> Iterator[Attempt]:
    """Yields the answers to N boards after each step, until every copy has stopped.

    If the copies are more than a batch, all batches take a step before any takes the next one. `first` is the number of
    the first board; the random numbers for a board depend only on the seed and its number. The first copy of a board is
    the board as it is, without noise."""
    n, (votes, starts) = len(inputs), (effort.votes, effort.starts)
    symmetries = _symmetries_of(kind, range(first, first + n), effort)
    boards = np.repeat(inputs, votes, axis=0)
    boards = np.repeat(boards if symmetries is None else symmetries.apply(boards), starts, axis=0)
    ids = np.repeat(puzzle_ids, votes * starts)
    parts = [slice(start, start + effort.batch_size) for start in range(0, len(boards), effort.batch_size)]
    running = [_run(model, boards[part], ids[part], effort, first * effort.copies + part.start) for part in parts]
    copies = _Copies(*boards.shape, model.q_head is not None)
    for steps in zip_longest(*running):
        for part, step in zip(parts, steps, strict=True):
            if step is not None:
                copies.take(part.start, step)
        attempt = copies.best_starts(starts)
        yield attempt if symmetries is None else _elect(attempt, votes, symmetries)


def _run(model, boards, ids, effort, first):
    """Returns the steps of some copies. `first` is the number of the first of them among the copies of all boards."""
    device = model.embed.weight.device
    batch = [torch.from_numpy(array.astype(np.int64)).to(device) for array in (boards, ids)]
    noise = None
    if effort.starts > 1:
        shape = 2, model.config.prefix_tokens + boards.shape[1], model.config.d_model
        noise = torch.zeros(len(boards), *shape)
        for row, number in enumerate(range(first, first + len(boards))):
            if number % effort.starts:  # else the first start, which has no noise
                generator = torch.Generator().manual_seed(mix_seed(effort.seed, number))
                noise[row] = effort.start_noise * torch.randn(shape, generator=generator)
        noise = noise.transpose(0, 1).to(device)
    options = {"halt_logit": effort.halt_logit, "precision": effort.precision}
    return run_steps(model, *batch, effort.steps, noise=noise, **options)


class _Copies:
    """The newest answers of the copies, in the order (board, vote, start)."""

    def __init__(self, n, cells, has_head):
        self.answers, self.certainty = np.zeros((n, cells), np.uint8), np.zeros((n, cells), np.float32)
        self.halts = np.zeros(n, np.float32) if has_head else None  # logits
        self.steps = np.zeros(n)

    def take(self, start, step: Step):
        rows = start + step.rows.cpu().numpy()
        self.answers[rows] = step.answers.cpu().numpy()
        self.certainty[rows] = step.certainty.cpu().numpy()
        if self.halts is not None:
            self.halts[rows] = step.halt_logits.float().cpu().numpy()
        self.steps[rows] += 1

    def best_starts(self, starts) -> Attempt:
        """Returns, for each vote, the answer of the start with the highest halting logit."""
        chosen, steps = np.arange(0, len(self.steps), starts), self.steps.reshape(-1, starts).mean(1)
        if starts > 1:
            chosen = chosen + self.halts.reshape(-1, starts).argmax(1)
        halts = None if self.halts is None else torch.from_numpy(self.halts[chosen]).sigmoid().numpy()
        return Attempt(self.answers[chosen], self.certainty[chosen], halts, steps)


def _elect(ballots: Attempt, votes: int, symmetries: Symmetries) -> Attempt:
    """Returns the answer of each board with the most votes, after the symmetries are undone."""
    answers, certainty = symmetries.undo(ballots.answers), symmetries.undo_cells(ballots.certainty)
    halts = np.zeros(len(answers), np.float32) if ballots.halt is None else ballots.halt
    chosen, means = [], []
    for start in range(0, len(answers), votes):
        candidates = {}
        for row in range(start, start + votes):
            candidates.setdefault(answers[row].tobytes(), []).append(row)
        rows = max(candidates.values(), key=lambda rows: (len(rows), halts[rows].mean()))
        chosen.append(max(rows, key=halts.__getitem__))
        means.append(halts[rows].mean())
    means = None if ballots.halt is None else np.array(means, np.float32)
    return Attempt(answers[chosen], certainty[chosen], means, ballots.steps.reshape(-1, votes).mean(1))


def _symmetries_of(kind, numbers, effort) -> Symmetries | None:
    """Returns the symmetries of all votes for the boards with these numbers, or None if there is one vote per board."""
    if effort.votes == 1:
        return None
    drawn = [_draw_different(kind, effort.votes, np.random.default_rng((effort.seed, number))) for number in numbers]
    return Symmetries(*map(np.concatenate, zip(*drawn, strict=True)))


def _draw_different(kind, n, rng) -> Symmetries:
    """Returns n different symmetries, the identity first. Raises UserError if the kind does not have so many."""
    cells, tokens = np.arange(kind.cells)[None], np.arange(kind.vocab_size, dtype=np.uint8)[None]
    idle = 0
    while idle < IDLE:
        drawn, before = kind.draw_symmetries(rng, max(LEAST, 2 * n)), len(cells)
        cells, tokens = np.concatenate([cells, drawn.cells]), np.concatenate([tokens, drawn.tokens])
        _, first = np.unique(np.concatenate([cells, tokens], axis=1), axis=0, return_index=True)
        first.sort()
        cells, tokens = cells[first[:n]], tokens[first[:n]]
        if len(cells) == n:
            return Symmetries(cells, tokens)
        idle = idle + 1 if len(cells) == before else 0
    raise UserError(f"--votes is {n}, but {kind.name} has only {len(cells)} symmetries: set it to {len(cells)} or less")
