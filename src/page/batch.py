"""A batch of texts that rows join and leave between tokens (continuous batching).

    start = Start(model, rule, rows)          # encodes the prompts of some rows, in pieces if there is one row
    while (chosen := start.encode(256)) is None: ...
    for number in range(len(rows)): batch.join(start, number)
    chosen = batch.step()                     # one more token of every row
    batch.leave(row)

The tokens are those of `sampling.generate`: a row has a generator of its own, seeded as row 0 there, and its logits do
not depend on the other rows. All rows of a batch have the same exit rule. The caller appends a chosen token to
`row.ids`; a row with more than max_seq_len tokens must leave, and starts again with its last max_seq_len // 2 tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from src.exits import max_depth
from src.model_config import ExitRule
from src.runtime import device_of
from src.sampling import choose_token, left_padded

FEWEST_COLUMNS = 64  # of the first cache of a batch, which has one row; each size is doubled when it is too small


@dataclass(eq=False)
class Row:
    """One text that is being written."""

    ids: list[int]  # the tokens that the model sees: the prompt and what was written after it
    choice: tuple[float, int | None, float | None] = (1.0, None, None)  # temperature, top_k, top_p
    generator: torch.Generator | None = None  # not needed at temperature 0
    reads_steps: bool = False  # whether the logits of every recursion step are needed
    scores_prompt: bool = False  # whether `read_prompt` is called

    def read_prompt(self, first: int, logits: Float[Tensor, "t v"]):
        """Gets the logits after the tokens ids[first], ids[first + 1] and so on, once for each piece of the prompt."""


class Chosen(NamedTuple):
    """The new token of each of B rows, and what it was chosen from."""

    tokens: list[int]
    depths: list[int]  # recursion steps that were taken
    logits: Float[Tensor, "s b v"]  # after each recursion step; only after the last one if no row reads the steps
    halt_logits: Float[Tensor, "s b"] | None


def _choose(rows: list[Row], output, has_steps: bool) -> Chosen:
    """Chooses the next token of every row from the model's output for its last token."""
    logits = output.logits[..., -1, :] if has_steps else output.logits[None, :, -1]
    halt = output.halt_logits
    if halt is not None:
        halt = halt[..., -1] if has_steps else halt[None, :, -1]
    last, alike = logits[-1], {}
    for number, row in enumerate(rows):
        alike.setdefault(row.choice, []).append(number)
    tokens = [0] * len(rows)
    for choice, numbers in alike.items():
        part = last if len(alike) == 1 else last[numbers]
        new = choose_token(part, *choice, [rows[number].generator for number in numbers])
        for number, token in zip(numbers, new.tolist()):
            tokens[number] = token
    return Chosen(tokens, output.carry.steps[:, -1].tolist(), logits, halt)


class Start:
    """Encodes the tokens of rows in a cache of their own, and chooses the first new token of each."""

    def __init__(self, model, rule: ExitRule, rows: list[Row]):
        self.model, self.rule, self.rows = model, rule, rows
        self.ids, mask = left_padded([row.ids for row in rows], 0, device_of(model))
        self.mask = None if bool(mask.all()) else mask
        depth = max_depth(model.config, rule)
        self.scores = any(row.scores_prompt for row in rows)
        self.cache = model.new_cache(len(rows), self.ids.shape[1], depth=depth, last_only=not self.scores)
        self.done = 0  # columns

    @property
    def left(self) -> int:
        """Columns that are not encoded yet."""
        return self.ids.shape[1] - self.done

    def encode(self, most: int) -> Chosen | None:
        """Encodes at most so many columns if this is one row, else all. Returns the first tokens at the end."""
        is_single = len(self.rows) == 1 and self.cache.takes_pieces
        end = min(self.ids.shape[1], self.done + most) if is_single else self.ids.shape[1]
        reads_steps = any(row.reads_steps for row in self.rows)
        if not self.model.config.coda_layers:  # else the coda of every step needs its keys of all pieces
            reads_steps = reads_steps and end == self.ids.shape[1]
        part = slice(self.done, end)
        output = self.model(
            self.ids[:, part], attention_mask=self.mask, cache=self.cache, exit=self.rule, return_steps=reads_steps
        )
        if self.scores:
            self._keep_logits(output, part, reads_steps)
        self.done = end
        return None if self.left else _choose(self.rows, output, reads_steps)

    def _keep_logits(self, output, part, has_steps):
        logits = output.logits[-1] if has_steps else output.logits
        if logits.shape[1] < part.stop - part.start:  # an ONNX graph with a cache returns those of the last column
            logits = self.model(self.ids, attention_mask=self.mask, exit=self.rule).logits
        for number, row in enumerate(self.rows):
            if row.scores_prompt:
                padding = self.ids.shape[1] - len(row.ids)
                row.read_prompt(max(0, part.start - padding), logits[number, max(0, padding - part.start) :])


def capacity_of(rows: int, least: int = 0) -> int:
    """Returns the rows of the cache of a batch that has so many rows.  least: rows of its cache so far"""
    capacity = max(1, least)
    while capacity < rows:
        capacity *= 2
    return capacity


class RunningBatch:
    """Rows that get one more token in each step, all under one exit rule."""

    def __init__(self, model, rule: ExitRule, most_rows: int):
        self.model, self.rule, self.most_rows, self.rows = model, rule, most_rows, []
        self.cache: Any = None
        self.capacity = 0  # rows of the cache

    def join(self, start: Start, number: int):
        """Takes over a row of a Start that has ended. row.ids must contain its first new token."""
        row = start.rows[number]
        self._fit(len(self.rows) + 1, len(row.ids))
        self.cache.adopt(start.cache, number, len(row.ids) - 1)
        self.rows.append(row)

    def leave(self, row: Row):
        """Removes a row. The last row takes its place."""
        number = self.rows.index(row)
        self.cache.drop(number)
        last = self.rows.pop()
        if last is not row:
            self.rows[number] = last
        if not self.rows:
            self.cache, self.capacity = None, 0

    def step(self) -> Chosen:
        """Encodes the last token of every row, and chooses the next one."""
        if self.cache.length == self.cache.max_len:
            self.cache.trim()
        self._fit(len(self.rows), self.cache.length + 1)
        reads_steps = any(row.reads_steps for row in self.rows)
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=device_of(self.model))
        output = self.model(ids, cache=self.cache, exit=self.rule, return_steps=reads_steps)
        return _choose(self.rows, output, reads_steps)

    def _fit(self, rows: int, columns: int):
        """Replaces the cache by a larger one if it is too small for so many rows and columns."""
        context, old = self.model.config.max_seq_len, self.cache
        if old is not None and rows <= self.capacity and columns <= old.max_len:
            return
        capacity, width = capacity_of(rows, self.capacity), FEWEST_COLUMNS if old is None else old.max_len
        while width < columns:
            width *= 2
        depth = max_depth(self.model.config, self.rule)
        capacity = min(capacity, self.most_rows)
        self.cache = self.model.new_cache(capacity, min(width, context), depth=depth, last_only=True)
        self.cache.be_empty()
        for number, row in enumerate(self.rows):
            self.cache.adopt(old, number, len(row.ids) - 1)
        self.capacity = capacity
