"""Finds the files of an index that are copies or near copies of a given text, by the lines that they share.

Without this, an evaluation would retrieve the answer itself: repositories hold vendored, generated and moved copies.
"""

import numpy as np

LEAST_CHARS = 12  # shorter lines, such as `return None`, are the same in unrelated files
LEAST_SHARED = 3
SHARE = 0.5  # of the lines of the shorter text
_COMMON = ("import ", "from ", "#", "//", '"""', "'''")  # imports and licence headers are alike in unrelated files


def line_hashes(text: str) -> np.ndarray:
    """Returns the sorted hashes (n,) int64 of a text's distinct lines that say something about where it comes from.

    The hashes are Python's own, so they differ between processes."""
    lines = {line.strip() for line in text.split("\n")}
    return np.sort(np.array([hash(x) for x in lines if len(x) >= LEAST_CHARS and not x.startswith(_COMMON)], np.int64))


class LineIndex:
    """The lines of many texts, for exact overlaps with another text."""

    def __init__(self, texts):
        self._numbers, each = {}, []
        for number, text in enumerate(texts):
            self._numbers.setdefault(hash(text), []).append(number)
            each.append(line_hashes(text))
        self.sizes = np.array([len(hashes) for hashes in each], np.int64)
        hashes = np.concatenate([np.zeros(0, np.int64), *each])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], np.repeat(np.arange(len(each)), self.sizes)[order]

    def near_copies(self, text: str) -> list[int]:
        """Returns the numbers of the texts that share over half of the lines of the shorter one with `text`.

        A text with fewer than LEAST_SHARED such lines has no near copies but those that are equal to it."""
        wanted, equal = line_hashes(text), self._numbers.get(hash(text), [])
        if len(wanted) < LEAST_SHARED or not len(self._hashes):
            return equal
        low, high = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        ranges = [self._owners[a:b] for a, b in zip(low.tolist(), high.tolist()) if b > a]
        shared = np.bincount(np.concatenate([np.zeros(0, np.int64), *ranges]), minlength=len(self.sizes))
        shorter = np.maximum(1, np.minimum(self.sizes, len(wanted)))
        copies = np.flatnonzero((shared >= LEAST_SHARED) & (shared >= SHARE * shorter))
        return np.union1d(copies, np.array(equal, np.int64)).tolist()
