"""Finds the chunks of an index that are most similar to a query, which is the code before the place to write at.

A file never retrieves itself or a near copy: the caller passes the text of the query's own file, and all files that
share most of its lines are left out.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from src.data.samples import QUERY_MARKER
from src.errors import UserError
from src.rag.chunks import Chunk, Source
from src.rag.embedder import terms_of
from src.rag.near_copies import LineIndex

EMBEDDED = 256  # queries embedded and searched at once


class Hit(NamedTuple):
    """A retrieved chunk. score: cosine, or for bm25 the score divided by the largest one that the query can have."""

    chunk: Chunk
    score: float
    path: str

    def where(self, lines: int | None = None) -> str:
        """Returns path, lines and score; lines: how many of the chunk's lines are meant, all by default."""
        last = self.chunk.last if lines is None else self.chunk.first + lines - 1
        return f"{self.path}:{self.chunk.first}-{last}, score {self.score:.2f}"


class VectorSearch:
    """Search by the cosine of an embedder's vectors."""

    def __init__(self, embedder, store):
        self.embedder, self.store = embedder, store

    def __call__(self, queries, k, excluded):
        return self.store.search(self.embedder.embed(queries), k, excluded)


class Bm25Search:
    """Search by BM25 over identifiers and their parts, with the package bm25s."""

    def __init__(self, texts: Sequence[str]):
        try:
            import bm25s
        except ImportError:
            raise UserError("method bm25 needs the package bm25s: pip install bm25s==0.3.16") from None
        documents = [terms_of(text) for text in texts]
        seen = Counter(term for terms in documents for term in set(terms))
        self._idf = {term: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for term, n in seen.items()}
        self._rarest = math.log(1 + (len(texts) + 0.5) / 0.5)  # the idf of a term that no chunk has
        self._n, self._index = len(texts), bm25s.BM25(method="lucene") if seen else None
        if self._index is not None:
            self._index.index(documents, show_progress=False)

    def __call__(self, queries, k, excluded):
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for number, query in enumerate(queries):
            terms = sorted(set(terms_of(query)))
            if self._index is None or not self._idf.keys() & set(terms):
                continue
            allowed = np.ones(self._n, np.float32)
            for start, stop in excluded[number] if excluded else ():
                allowed[start:stop] = 0
            most = sum(self._idf.get(term, self._rarest) for term in terms)
            found = self._index.get_scores(terms, weight_mask=allowed) / most
            least = np.partition(found, -k)[-k] if k < self._n else 0
            best = np.flatnonzero(found >= max(least, np.finfo(found.dtype).tiny))
            order = best[np.argsort(-found[best], kind="stable")][:k]
            scores[number, : len(order)], rows[number, : len(order)] = found[order], order
        return scores, rows


class RAGRetriever:
    """Chunks of source files with a way to search them.

    search: VectorSearch or Bm25Search over the texts of `chunks`, which are in the order of `sources`."""

    def __init__(self, sources: list[Source], chunks: list[Chunk], search):
        self.sources, self.chunks, self._search, self._lines = sources, chunks, search, None
        firsts = np.searchsorted([chunk.file for chunk in chunks], np.arange(len(sources) + 1)).tolist()
        self._rows = list(zip(firsts, firsts[1:]))  # (first chunk, first chunk after it) of each source

    def near_copies(self, text: str) -> list[int]:
        """Returns the numbers of the sources that are copies or near copies of a text; see `LineIndex`."""
        if self._lines is None:
            self._lines = LineIndex([source.text for source in self.sources])
        return self._lines.near_copies(text)

    def retrieve(self, queries: Sequence[str], k: int = 1, excluded=None) -> list[list[Hit]]:
        """Returns the k best chunks for each query, best first; fewer if the index has no more.

        excluded: for each query, the numbers of the sources that it must not retrieve from; see `near_copies`."""
        found = []
        for start in range(0, len(queries), EMBEDDED):
            part = slice(start, start + EMBEDDED)
            hidden = excluded and [[self._rows[number] for number in files] for files in excluded[part]]
            for scores, rows in zip(*self._search(queries[part], k, hidden)):
                pairs = [(self.chunks[row], score) for row, score in zip(rows.tolist(), scores.tolist()) if row >= 0]
                found.append([Hit(chunk, score, self.sources[chunk.file].path) for chunk, score in pairs])
        return found


class Context(NamedTuple):
    """What fits into a prompt: the text of chunks, and the lines that were kept of each given chunk (0 = left out)."""

    text: str
    kept: list[int]


def fit_context(tokenizer, texts: Sequence[str], budget: int, marker: str = QUERY_MARKER) -> Context:
    """Returns chunks, given best first, as a context of at most `budget` tokens including the marker.

    The best chunk comes last, next to the query. It loses lines at its end if it is too long; others are left out."""
    room = budget - len(tokenizer.encode(f"{marker}\n" if marker else ""))
    parts, kept = [], [0] * len(texts)
    for number, text in enumerate(texts):
        lines = text.rstrip("\n").split("\n")
        used = np.cumsum([len(ids) for ids in tokenizer.encode_batch([f"{line}\n" for line in lines])])
        n = int(np.searchsorted(used, room, side="right"))
        if n == len(lines) or (n and not number):
            parts.insert(0, "\n".join(lines[:n]) + "\n")
            room, kept[number] = room - int(used[n - 1]), n
    return Context("".join(parts), kept)
