"""Key/value cache of a looped model.

A looped layer is visited several times per token, and every visit has other keys and values. With one slot per layer,
each visit would overwrite the one before. This cache has one slot per (visit, layer).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from src.exits import max_depth, visits_per_recursion_step


class KVCache:
    """Keys and values of every slot, preallocated.  The caller owns it; the model advances it once per forward call.

    Slots, in order:
    - prelude_layers slots of the prelude;
    - n_layers slots for each visit: slot `prelude_layers + visit * n_layers + layer`;
    - coda_layers slots for each recursion step whose answer is read: the last `read_steps`, or all with an exit rule.

    A column is one token position of every row; `length` counts the filled columns, including padding. depth: with an
    exit rule, the most recursion steps of a token (`exits.max_depth`). last_only: a forward call returns logits for its
    last column only, (B, 1, V), because generation needs no others.
    """

    takes_pieces = True  # a text can be encoded in several calls

    def __init__(
        self, config, batch: int, max_len: int | None, read_steps: int, dtype, device, depth=None, last_only=False
    ):
        if not config.causal or config.mixer != "attention":
            raise ValueError("only a causal attention model decodes with a cache")
        self.config, self.depth, self.last_only = config, depth, last_only
        if depth is None:
            self.read_steps, self.steps = read_steps, max_depth(config)
        else:  # with an exit rule, any step may be the last of a token, so the answer of each is read
            self.read_steps, self.steps = depth, depth
        slots, self.coda = cache_slots(config, self.read_steps, depth), cache_slots(config, 0, depth)
        max_len = max_len or config.max_seq_len
        shape = (slots, batch, config.n_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._use_rows(batch)
        self.segments: Tensor | None = None  # (B, max_len) attention_mask of all columns, if one was ever given
        self.length = 0
        self.starts: list[int] = []  # only after `be_empty`: the first real column of each row
        self.decoding = None  # decode.DecodingTables of this text, from the first decoded token on
        self.stopped: Bool[Tensor, "b t"] | None = None  # tokens of this call that stopped at an earlier step

    def _use_rows(self, rows: int):
        # A view costs as much as the copy into it, so views are made once. They are made under enable_grad, because a
        # view that is made in inference mode may not be written in another mode.
        with torch.enable_grad():
            self.slots = [(self.keys[slot, :rows], self.values[slot, :rows]) for slot in range(len(self.keys))]

    def coda_slot(self, step: int) -> int:
        """Returns the first coda slot of a recursion step.  Raises ValueError if the cache has no slots for it."""
        nth = step - (self.steps - self.read_steps)
        if not 0 <= nth < self.read_steps:
            raise ValueError(f"the cache has coda slots for the last {self.read_steps} recursion steps, not for {step}")
        return self.coda + nth * self.config.coda_layers

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def update(self, slot: int, k: Float[Tensor, "b h t e"], v: Float[Tensor, "b h t e"]) -> tuple[Tensor, Tensor]:
        """Writes the new columns of one slot; returns keys and values (B, K, length + T, E) of all columns so far.

        A token that has stopped reuses the keys and values that the same visit and layer wrote one recursion step
        before."""
        (keys, values), new = self.slots[slot], k.shape[2]
        if self.stopped is not None:
            before, stopped = self.slots[slot - self._stride(slot)], self.stopped[:, None, :, None]
            k, v = (torch.where(stopped, old.narrow(2, self.length, new), now) for old, now in zip(before, (k, v)))
        keys.narrow(2, self.length, new).copy_(k)
        values.narrow(2, self.length, new).copy_(v)
        return keys.narrow(2, 0, self.length + new), values.narrow(2, 0, self.length + new)

    def _stride(self, slot):
        """Returns how many slots lie between a visit and layer in one recursion step and the same ones in the next."""
        c = self.config
        return c.coda_layers if slot >= self.coda else visits_per_recursion_step(c) * c.n_layers

    def fill_from(self, step: int, new: int):
        """Copies the new columns of recursion step `step` to all later steps, once every new token has stopped."""
        prelude, strides = self.config.prelude_layers, (self._stride(0), self.config.coda_layers)
        for held in (self.keys, self.values):
            for part, stride in zip((held[prelude : self.coda], held[self.coda :]), strides):
                if stride:
                    columns = part.narrow(3, self.length, new).unflatten(
                        0, (-1, stride)
                    )  # (step, slot in the step, B, K, T, E)
                    columns[step + 1 :] = columns[step]

    def extend_mask(self, mask: Int[Tensor, "b t"] | None, batch: int, new: int) -> Tensor | None:
        """Returns the attention mask (B, length + T) over old and new columns, or None if all columns are real tokens.

        New tokens without a mask are real and continue the document that the row ended with. Raises ValueError if the
        cache is full."""
        if self.length + new > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} columns, {self.length} are used and {new} more were given"
            )
        if mask is None and self.segments is None:
            return None
        if self.segments is None:
            self.segments = torch.ones(batch, self.max_len, dtype=torch.long, device=self.keys.device)
        end = self.length + new
        if mask is None:
            old = self.segments[:, : self.length]
            last = (old.ne(0) * torch.arange(1, self.length + 1, device=old.device)).argmax(1, keepdim=True)
            mask = old.gather(1, last).clamp(min=1)  # padding does not end a document
        self.segments[:, self.length : end] = mask
        return self.segments[:, :end]

    def advance(self, new: int):
        """Counts `new` more columns as filled."""
        self.length, self.stopped = self.length + new, None

    # ---- rows that come and go between calls ----

    def be_empty(self):
        """Removes all rows. From then on, the batch consists of the rows that `adopt` adds."""
        self.starts, self.length, self.segments = [], 0, None

    def adopt(self, other: "KVCache", row: int, tokens: int):
        """Adds a row: the last `tokens` columns of a row of another cache, all of them real tokens.

        The columns end where those of the other rows end. The caller makes sure that row and columns fit."""
        if not self.starts:
            self.length = tokens
        elif tokens > self.length:
            self._shift(tokens - self.length)
        start = self.length - tokens
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, len(self.starts), :, start : self.length] = theirs.narrow(3, other.length - tokens, tokens)[:, row]
        self._begin_at([*self.starts, start])

    def drop(self, row: int):
        """Removes a row. The last row takes its number."""
        last = len(self.starts) - 1
        for held in (self.keys, self.values):
            if row != last:
                held[:, row, :, : self.length] = held[:, last, :, : self.length]
        starts = self.starts[:-1]
        if row != last:
            starts[row] = self.starts[last]
        self._begin_at(starts)

    def trim(self):
        """Removes the padding that all rows have in common."""
        self._shift(-min(self.starts, default=self.length))
        self._begin_at(self.starts)

    def _shift(self, by: int):
        """Moves all columns to the right, or to the left for a negative number."""
        first, rows = max(0, -by), len(self.starts)
        if by and rows:
            for keys, values in self.slots:  # slot by slot, so that little memory is needed for the copy
                for held in (keys[:rows], values[:rows]):
                    moved = held.narrow(2, first, self.length - first).clone()
                    held.narrow(2, first + by, self.length - first).copy_(moved)
        self.length, self.starts = self.length + by, [start + by for start in self.starts]

    def _begin_at(self, starts: list[int]):
        """Sets the first real column of every row, and with it which rows there are."""
        self.starts = starts
        self._use_rows(len(starts))
        self.segments = None
        if any(starts):
            columns = torch.arange(self.max_len, device=self.keys.device)
            self.segments = (columns >= torch.tensor(starts, device=self.keys.device)[:, None]).long()


def cache_slots(config, read_steps: int = 1, depth: int | None = None) -> int:
    """Returns the number of cache slots of a model with this TRMConfig.

    read_steps: the answers of this many recursion steps are read, counted from the last. depth: the most recursion
    steps that an exit rule allows; default as many as in training."""
    visits = visits_per_recursion_step(config) * (max_depth(config) if depth is None else depth)
    return config.prelude_layers + visits * config.n_layers + read_steps * config.coda_layers
