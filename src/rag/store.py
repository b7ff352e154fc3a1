"""Unit vectors with exact search by cosine, in memory or memory-mapped from disk."""

import json
from pathlib import Path

import numpy as np

from src.errors import UserError
from src.files.folders import replacing
from src.files.text import read_object

BLOCK = 8192  # rows that are compared at once, which limits memory
VECTORS, FACTS = "vectors.npy", "store.json"


class MemoryVectorStore:
    """`len(store)` vectors of `dim` components, kept as float16.

    identity: what the vectors are, as {name: value}, with the embedder's name, parameters and dimension. `load` refuses
    the vectors of another embedder, because a search among them would return nonsense."""

    def __init__(self, dim: int, identity: dict):
        self.dim, self.identity = dim, identity
        self._parts = []  # arrays (n, dim) float16; the first one may be memory-mapped

    def __len__(self):
        return sum(map(len, self._parts))

    def add(self, vectors: np.ndarray):
        """Appends (n, dim) unit vectors. Raises ValueError for another shape, or if they are not finite."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"vectors of shape {vectors.shape} do not fit a store of {self.dim} components")
        if not np.isfinite(vectors).all():
            raise ValueError("a vector is not finite")
        self._parts.append(vectors.astype(np.float16))

    @property
    def array(self) -> np.ndarray:
        """The vectors, (n, dim) float16; a copy if they were added in several parts."""
        return (
            self._parts[0]
            if len(self._parts) == 1
            else np.concatenate([np.zeros((0, self.dim), np.float16), *self._parts])
        )

    def take(self, rows) -> "MemoryVectorStore":
        """Returns a new store that holds copies of these rows, in this order."""
        rows, other = np.asarray(rows, np.int64), MemoryVectorStore(self.dim, self.identity)
        out, first = np.empty((len(rows), self.dim), np.float16), 0
        for part in self._parts:
            inside = (rows >= first) & (rows < first + len(part))
            out[inside] = part[rows[inside] - first]
            first += len(part)
        other._parts.append(out)
        return other

    def search(self, queries: np.ndarray, k: int, excluded=None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (scores (q, k) float32, rows (q, k) int64) of the most similar vectors, best first.

        queries: (q, dim) unit vectors. excluded: for each query, a list of (start, stop) ranges of rows to leave out.
        Where fewer than k rows are left, the row is -1 and the score -inf. Ties go to the lower row."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        # most components of a short query are 0, and the conversion from float16 takes most of the time
        used = np.flatnonzero(queries.any(0))
        queries, first = np.ascontiguousarray(queries[:, used], np.float32), 0
        for part in self._parts:
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                block = (block if len(used) == self.dim else block.take(used, 1)).astype(np.float32)
                for low in range(0, len(queries), BLOCK):  # many queries at once, as for training windows
                    each = slice(low, low + BLOCK)
                    hidden = None if excluded is None else excluded[each]
                    found = _best(queries[each] @ block.T, first + start, k, hidden)
                    scores[each], rows[each] = _merged(scores[each], rows[each], *found, k)
            first += len(part)
        return scores, rows

    def save(self, folder):
        """Writes the store as a folder, which replaces an old one completely or not at all."""
        with replacing(folder, {VECTORS, FACTS}.__contains__) as new:
            self.write(new)

    def write(self, folder: Path):
        """Writes vectors.npy and store.json into a folder that exists."""
        np.save(folder / VECTORS, self.array)
        (folder / FACTS).write_text(json.dumps({"rows": len(self), "identity": self.identity}), encoding="utf-8")

    @classmethod
    def load(cls, folder, identity: dict) -> "MemoryVectorStore":
        """Returns the store in a folder, memory-mapped. Raises UserError if it is broken or of another embedder."""
        folder = Path(folder)
        facts, advice = read_object(folder / FACTS), f"build the index again (delete {folder})"
        if facts.get("identity") != identity:
            kept = facts.get("identity")
            raise UserError(f"{folder} is an index of another embedder ({_few(kept)}, not {_few(identity)}): {advice}")
        try:
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder / VECTORS} cannot be read ({error}): {advice}") from None
        if vectors.shape != (facts.get("rows"), identity["dim"]) or vectors.dtype != np.float16:
            raise UserError(f"{folder / VECTORS} is not complete: {advice}")
        store = cls(identity["dim"], identity)
        store._parts.append(vectors)
        return store


def _few(identity):
    if not isinstance(identity, dict):
        return "unknown"
    return ", ".join(f"{name} {str(value)[:16]}" for name, value in identity.items())


def _best(scores, first, k, excluded):
    """Returns (scores, rows), the k best columns of a block; `first` is the row number of its first column."""
    for row, ranges in enumerate(excluded or ()):
        for start, stop in ranges:
            scores[row, max(0, start - first) : max(0, stop - first)] = -np.inf
    # the vectors are kept as float16, so further digits say nothing, and copies of a chunk must tie in any block
    scores, kept = np.round(scores, 4), min(k, scores.shape[1])
    columns = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
    best = np.take_along_axis(scores, columns, 1)
    for row in np.flatnonzero((scores >= best.min(1, keepdims=True)).sum(1) > kept):  # ties at the border
        columns[row] = np.argsort(-scores[row], kind="stable")[:kept]
    best = np.take_along_axis(scores, columns, 1)
    return best, np.where(np.isneginf(best), -1, columns + first)


def _merged(scores, rows, more_scores, more_rows, k):
    """Returns the k best of both, best first; of equal scores, the lower row first."""
    scores, rows = np.concatenate((scores, more_scores), 1), np.concatenate((rows, more_rows), 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
