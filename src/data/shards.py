"""The files of one or more corpora, for streaming: their documents, those held back for validation, and a sample."""

import contextlib
import hashlib
import itertools
import math
import os

from src.data.corpus import MAX_DOC_MB, NoDocument, read_pieces
from src.data.records import RecordFields
from src.data.token_store import held_back, hold_back_share
from src.errors import UserError

LEAST_FILES = 32  # a sample of the text is taken from at least this many files, if there are so many


class Shards:
    """The files of one or more corpora.

    corpora is a list of lists of files. text_field is that of `read_pieces`, or a list with one for each corpus. With
    holds_back, some documents of each corpus's first file are validation text (`held_back_store`) and are not used for
    training; if some corpora are records, only these are held back. Their other files are then read without the
    questions that would be held back, because the same question may be in several files. A file may be in several
    corpora, which read it each in its own way. Raises UserError if the size of a file cannot be read. Reading a file
    raises UserError if it is gone, has another size than before, or cannot be read to the end.
    """

    def __init__(self, corpora, text_field="text", strict=False, holds_back=False, max_doc_mb=MAX_DOC_MB):
        self.corpora, self.text_field, self.strict, self.max_doc_mb = corpora, text_field, strict, max_doc_mb
        self.fields = text_field if isinstance(text_field, list) else [text_field] * len(corpora)
        self.files = sorted(set(itertools.chain(*corpora)))
        self._sizes = {path: _size(path) for path in self.files}
        self.are_records = [isinstance(field, RecordFields) for field in self.fields]
        self._holds_back = [holds_back and (are or not any(self.are_records)) for are in self.are_records]
        self._held = sorted({files[0] for files, holds in zip(corpora, self._holds_back) if holds})
        self._share = hold_back_share(self._held)

    def pieces(self, corpus, path, report=False):
        """Yields (piece, is_last) pairs of the training documents of one file, as the corpus of that number reads it.

        report is that of `read_pieces`."""
        self._check(path)
        field = self.fields[corpus]
        if self._holds_back[corpus] and (self.are_records[corpus] or path in self._held):
            yield from held_back([path], field, self.strict, "train", self._share, self.max_doc_mb, report)
        else:
            yield from read_pieces([path], field, self.strict, None, report, self.max_doc_mb)
        self._check(path)

    def _check(self, path):
        if (size := _size(path)) != self._sizes[path]:
            raise UserError(f"{path} had {self._sizes[path]} bytes when the run began and has {size} now: restore it")

    def sample(self, n_bytes, weights=None):
        """Yields pieces of the corpora, about n_bytes of text in total, in proportion to weights (default: equal)."""
        weights = weights or [1.0] * len(self.corpora)
        for corpus, weight in enumerate(weights):
            for piece, _ in self.heads(n_bytes * weight / sum(weights), corpus):
                yield piece

    def heads(self, n_bytes, corpus):
        """Yields (piece, is_last) pairs of a corpus's documents, about n_bytes of text in total, from files at equal
        distances.

        Whole small files are taken rather than the start of many: source files begin with licences and imports. Of
        large files, the same amount is taken from the start of each. Raises NoDocument if there is no text."""
        files = self.corpora[corpus]
        total = sum(self._sizes[path] for path in files)
        count = min(len(files), max(LEAST_FILES, math.ceil(len(files) * n_bytes / max(1, total))))
        found, why, left = False, None, n_bytes
        for number in range(count):
            quota = left / (count - number)  # what small files leave goes to those after them
            try:
                for piece, is_last in self.pieces(corpus, files[number * len(files) // count]):
                    yield piece, is_last
                    found, size = True, len(piece.encode())
                    left, quota = left - size, quota - size
                    if quota <= 0:
                        break
            except NoDocument as error:  # a few empty files do no harm
                why = error
        if not found:
            raise why

    def held_back_store(self, store_of, seq_len):
        """Returns the TokenStore of the held-back documents; store_of(files, part=..., share=...) makes it.

        Raises UserError if they do not fill one window."""
        with contextlib.suppress(NoDocument):
            store = store_of(self._held, part="valid", share=self._share)
            if any(self.are_records) or len(store) > seq_len:
                return store
        raise UserError(f"{', '.join(self._held)}: too few documents to hold some back: set --valid_paths")

    def __str__(self):
        return f"{len(self.files)} files, {sum(self._sizes.values()) / 1e6:.1f} MB"

    @property
    def fingerprint(self):
        """Returns a hash (hex) of the files' names and sizes."""
        names = [[(os.path.basename(path), self._sizes[path]) for path in files] for files in self.corpora]
        return hashlib.sha256(repr((names, self.text_field, bool(self._held))).encode()).hexdigest()[:16]


def _size(path):
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it") from None
