"""The rows of a training batch of puzzles: each keeps its own puzzle, state and number of supervision steps.

A row works on one puzzle for several training steps. It halts when the halting head says that its answer is right, or
when it has taken all supervision steps. Then it gets a new puzzle and the initial state (arXiv:2510.04871, section 4).
"""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from src.errors import UserError
from src.losses import IGNORE
from src.model import TRMModel
from src.tasks.puzzle_data import PuzzleDraws

SAVED = ("inputs", "labels", "puzzle_ids", "steps", "least", "is_done", "y", "z", "drawn", "world", "counts")


def targets_of(labels: Tensor) -> Tensor:
    """Labels with IGNORE in place of 0: these cells are no targets."""
    return labels.masked_fill(labels == 0, IGNORE)


class PuzzleRows:
    """An endless iterator over the batches of one process, with `state_dict` and `load_state_dict`.

    n_rows: B, rows of this process. The k-th puzzle that process `rank` of `world` takes has the number
    k * world + rank. explore: probability that a new row draws a least number of steps from 2 to the most; it cannot
    halt before. A family without a state between supervision steps (loop, none) takes a new puzzle at every step."""

    def __init__(self, draws: PuzzleDraws, n_rows: int, model: TRMModel, explore: float = 0.1, rank=0, world=1):
        self.draws, self.model, self.explore, self.rank, self.world = draws, model, explore, rank, world
        self.device = model.embed.weight.device
        cells = draws.grids.inputs.shape[1]
        self.inputs, self.labels = (torch.zeros(n_rows, cells, dtype=torch.int64) for _ in range(2))
        self.puzzle_ids, self.steps, self.least = (torch.zeros(n_rows, dtype=torch.int64) for _ in range(3))
        self.is_done = torch.ones(n_rows, dtype=torch.bool)  # these rows take a new puzzle before the next step
        self.y = self.z = None
        if model.config.recursion == "trm":
            shape = n_rows, model.config.prefix_tokens + cells, model.config.d_model
            self.y, self.z = (torch.zeros(shape, device=self.device) for _ in range(2))
        self.drawn = 0  # puzzles that this process has taken
        self.counts = torch.zeros(3, dtype=torch.int64)  # since `take_counts`: rows that halted, right ones, steps

    @property
    def epoch(self) -> int:
        return self.drawn * self.world // self.draws.epoch_size

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        """The batch of the next training step, after the rows that are done have taken new puzzles."""
        if self.is_done.any():
            self._refill()
        batch = {"input_ids": self.inputs, "target_ids": targets_of(self.labels), "puzzle_ids": self.puzzle_ids}
        return batch if self.y is None else batch | {"y": self.y, "z": self.z}

    def _refill(self):
        rows = self.is_done.nonzero().squeeze(1)
        own = self.drawn + np.arange(len(rows))
        boards = self.draws.take(own * self.world + self.rank)
        for old, new in zip((self.inputs, self.labels, self.puzzle_ids), boards, strict=True):
            old[rows] = torch.from_numpy(new.astype(np.int64))
        self.steps[rows] = 0
        self.least[rows] = torch.from_numpy(self._draw_least(len(rows)))
        if self.y is not None:
            is_new = self.is_done.to(self.device)[:, None, None]
            self.y = torch.where(is_new, self.model.y_init, self.y)
            self.z = torch.where(is_new, self.model.z_init, self.z)
        self.drawn += len(rows)
        self.is_done = torch.zeros_like(self.is_done)

    def _draw_least(self, n):
        rng = np.random.default_rng((self.draws.seed, self.drawn, self.rank, 2))
        explores, most = rng.random(n) < self.explore, max(2, self.model.config.train_steps)
        return np.where(explores, rng.integers(2, most + 1, n), 0)

    def advance(self, y: Tensor | None, z: Tensor | None, halts: Bool[Tensor, "b"], is_right: Bool[Tensor, "b"]):
        """Take the result of a supervision step: new states, halting decisions, and which rows are right as a whole."""
        if self.y is not None:
            self.y, self.z = y.to(self.y.dtype), z.to(self.z.dtype)
        self.steps += 1
        halts, is_right = torch.stack((halts, is_right)).cpu()  # one copy: a GPU waits once
        self.is_done = (halts & (self.steps >= self.least)) | (self.steps >= self.model.config.train_steps)
        counts = self.is_done, self.is_done & is_right, self.is_done * self.steps
        self.counts = self.counts + torch.stack([count.sum() for count in counts])

    def take_counts(self) -> list[int]:
        """Since the last call: rows that halted, right ones among them, and their supervision steps."""
        counts, self.counts = self.counts.tolist(), torch.zeros_like(self.counts)
        return counts

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state: dict):
        """Restore a state that `state_dict` returned.  Raises UserError if the rows were divided in another way."""
        if (state["world"], state["inputs"].shape) != (self.world, self.inputs.shape):
            parts = f"{state['world']} processes with {len(state['inputs'])} rows each"
            raise UserError(f"the saved run had {parts}: resume it with the same number of processes")
        for name in SAVED:
            value = state[name]
            if isinstance(value, torch.Tensor):
                value = value.to(self.device if name in ("y", "z") else "cpu").clone()
            setattr(self, name, value)
