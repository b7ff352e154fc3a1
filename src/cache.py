"""Key/value cache of a looped model.

A looped layer is visited many times per token, each time with other keys and values, so a cache with one slot per layer
would be overwritten from visit to visit. This one has a slot per (visit, layer).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from src.exits import max_depth, visits_per_recursion_step


class KVCache:
    """Keys and values of every slot, preallocated.  The caller owns it; the model advances it once per forward call.

    Slots: the prelude's layers, then `prelude_layers + visit * n_layers + layer`, then the coda's layers for each
    recursion step that is read out: the last `read_steps`, or under an exit rule each of `depth`. `length` counts the
    columns filled so far, padding included. With `last_only` a forward call gives the logits of its last column alone,
    (B, 1, V), because generation reads nothing else of a prompt.
    """

    def __init__(
        self, config, batch: int, max_len: int | None, read_steps: int, dtype, device, depth=None, last_only=False
    ):
        if not config.causal or config.mixer != "attention":
            raise ValueError("only a causal attention model decodes with a cache")
        self.config, self.depth, self.last_only = config, depth, last_only
        if depth is None:
            self.read_steps, self.steps = read_steps, max_depth(config)
        else:  # under an exit rule any step may be a token's last, so each is read out
            self.read_steps, self.steps = depth, depth
        slots, self.coda = cache_slots(config, self.read_steps, depth), cache_slots(config, 0, depth)
        max_len = max_len or config.max_seq_len
        shape = (slots, batch, config.n_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        with torch.enable_grad():  # views made once, as making them costs as much as the copy; writable in any mode
            self.slots = [(self.keys[slot], self.values[slot]) for slot in range(slots)]
        self.segments: Tensor | None = None  # (B, max_len) attention_mask of all columns, once one has been given
        self.length = 0
        self.decoding = None  # decode.DecodingTables of this text, once a single token has been decoded
        self.stopped: Bool[Tensor, "b t"] | None = None  # new tokens that left the recursion before this step

    def coda_slot(self, step: int) -> int:
        """First slot of the coda for a recursion step; ValueError if the cache was not made to read that step out."""
        nth = step - (self.steps - self.read_steps)
        if not 0 <= nth < self.read_steps:
            raise ValueError(f"the cache reads out the last {self.read_steps} recursion steps, not step {step}")
        return self.coda + nth * self.config.coda_layers

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def update(self, slot: int, k: Float[Tensor, "b h t e"], v: Float[Tensor, "b h t e"]) -> tuple[Tensor, Tensor]:
        """Write the new columns of one slot; returns keys and values (B, K, length + T, E) of all columns so far.

        Tokens that have stopped repeat those of the same phase one recursion step before."""
        (keys, values), new = self.slots[slot], k.shape[2]
        if self.stopped is not None:
            before, stopped = self.slots[slot - self._stride(slot)], self.stopped[:, None, :, None]
            k, v = (torch.where(stopped, old.narrow(2, self.length, new), now) for old, now in zip(before, (k, v)))
        keys.narrow(2, self.length, new).copy_(k)
        values.narrow(2, self.length, new).copy_(v)
        return keys.narrow(2, 0, self.length + new), values.narrow(2, 0, self.length + new)

    def _stride(self, slot):
        """Slots between one phase of a recursion step and the same phase of the next."""
        c = self.config
        return c.coda_layers if slot >= self.coda else visits_per_recursion_step(c) * c.n_layers

    def fill_from(self, step: int, new: int):
        """All new tokens stopped after a recursion step: at the later ones they repeat its keys and values."""
        prelude, strides = self.config.prelude_layers, (self._stride(0), self.config.coda_layers)
        for held in (self.keys, self.values):
            for part, stride in zip((held[prelude : self.coda], held[self.coda :]), strides):
                if stride:
                    columns = part.narrow(3, self.length, new).unflatten(0, (-1, stride))  # (step, phase, B, K, T, E)
                    columns[step + 1 :] = columns[step]

    def extend_mask(self, mask: Int[Tensor, "b t"] | None, batch: int, new: int) -> Tensor | None:
        """The attention mask (B, length + T) over old and new columns; None while every column is a real token.

        New tokens without a mask of their own are real and belong to the document of the row's last column."""
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
            mask = self.segments[:, self.length - 1 : self.length].clamp(min=1)
        self.segments[:, self.length : end] = mask
        return self.segments[:, :end]

    def advance(self, new: int):
        self.length, self.stopped = self.length + new, None


def cache_slots(config, read_steps: int = 1, depth: int | None = None) -> int:
    """Slots of an exact cache of a TRMConfig's model that reads out read_steps recursion steps; or, given a depth, of
    one under an exit rule, which takes up to `depth` steps and reads out each."""
    visits = visits_per_recursion_step(config) * (max_depth(config) if depth is None else depth)
    return config.prelude_layers + visits * config.n_layers + read_steps * config.coda_layers
