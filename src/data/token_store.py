"""Tokenizes documents once and keeps the tokens on disk. `tokenize_corpus` writes the cache; `TokenStore` reads it.

`on_the_spot` trains a tokenizer on the corpus if none is given.
"""

import collections
import functools
import hashlib
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from src.data.corpus import MAX_DOC_MB, NoDocument, content_hash, find_files, read_pieces, suffixes_of
from src.data.records import RecordFields
from src.data.tokenizer_training import train_sentencepiece
from src.errors import UserError
from src.tokenizer import read_tokenizer

HOLD_BACK = 20  # without valid_paths, one document in this many is validation text
HOLD_BACK_BYTES = 2_000_000  # at most about this many bytes of text, which is a smaller share of a large corpus
PACKED_RATIO = 3  # estimated bytes of text per byte of a compressed file
MOST_UNEVEN = 1.5  # files are not divided among processes if one is larger than this times a process's share
ROWS = 200  # pieces per Arrow chunk and per call of the tokenizer; limits memory
CACHE_VERSION = "3"  # increase it when cached tokens get another meaning, so that old caches are not used
ON_THE_SPOT_VOCAB = 4096
ON_THE_SPOT_BYTES = 10_000_000  # enough text to train a vocabulary, and training takes seconds


def default_cache_dir():
    """Returns $HF_DATASETS_CACHE if it is set, else ~/.cache/generative-trm, or a folder in /tmp without a home."""
    home = os.path.expanduser("~")
    usual = os.path.join(home, ".cache", "generative-trm")
    if home == "~":  # no $HOME, and a user id that the system does not know, as in some containers
        usual = os.path.join(tempfile.gettempdir(), f"generative-trm-{os.getuid()}")
    return os.environ.get("HF_DATASETS_CACHE") or usual


def content_key(files, *settings):
    """Returns a hash (hex) of the settings and of the files' contents, types and order, but not names and dates."""
    key = hashlib.sha256(repr((CACHE_VERSION, *settings)).encode())
    for path in files:
        try:
            info = os.stat(path)
            key.update(_digest(path, info.st_size, info.st_mtime_ns))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        kind = os.fspath(path).lower()
        key.update(kind.removesuffix(".gz").rpartition(".")[2].encode() + kind[-3:].encode())
    return key.hexdigest()[:32]


@functools.cache  # a run computes several keys from the same files, which it then reads only once
def _digest(path, size, mtime_ns):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def text_bytes(files):
    """Returns an estimate of the bytes of text in the files."""
    return sum(
        os.path.getsize(f) * (PACKED_RATIO if os.fspath(f).lower().endswith((".gz", ".parquet")) else 1) for f in files
    )


def tokenize_corpus(
    paths,
    tokenizer,
    text_field="text",
    strict=False,
    num_proc=1,
    cache_dir=None,
    part="whole",
    share=None,
    max_doc_mb=MAX_DOC_MB,
):
    """Returns the TokenStore of the documents in files, globs and folders: their tokens, with EOS after each document.

    part "valid" is `share` of the documents (hold_back_share by default), chosen by their content; "train" is the rest.
    The tokens are cached in cache_dir (default_cache_dir()) under a hash of the files' content and the tokenizer. After
    a kill, an incomplete cache is never used. If two runs need the same cache at once, one waits. num_proc processes
    share the files; if there are too few files for that, one process reads and the others tokenize. Raises UserError as
    `read_pieces` does, and NoDocument if the part is empty.
    """
    import datasets
    from filelock import FileLock

    files = find_files(paths, suffixes_of(text_field))
    cache_dir = cache_dir or default_cache_dir()
    options = (text_field, strict, part, hold_back_share(files) if share is None else share, max_doc_mb)
    key = content_key(files, *options, tokenizer.fingerprint)
    id_type = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
    groups = _groups(files, num_proc)
    n_encoders = num_proc if len(groups) == 1 < num_proc else 0
    encoder = _Encoder(tokenizer, id_type, isinstance(text_field, RecordFields))
    try:
        os.makedirs(cache_dir, exist_ok=True)
        with FileLock(os.path.join(cache_dir, f"{key}.lock")):
            rows = datasets.Dataset.from_generator(
                functools.partial(_rows, encoder=encoder, options=options, n_encoders=n_encoders),
                gen_kwargs={"groups": groups},
                features=datasets.Features(
                    input_ids=datasets.Value("binary"),  # much faster to write than a list
                    n_bytes=datasets.Value("int64"),
                    n_lost=datasets.Value("int64"),
                    ends=datasets.Value("bool"),
                ),
                cache_dir=cache_dir,
                fingerprint=key,
                split=datasets.NamedSplit(part),
                num_proc=len(groups) if len(groups) > 1 else None,
                writer_batch_size=ROWS,
            )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        if len(groups) > 1:  # the child process does not pass on its UserError: read here, to raise it again
            collections.deque(held_back(files, *options, report=False), maxlen=0)
        raise _user_error_of(error, cache_dir) from None
    store = TokenStore(rows, id_type)
    if not len(store):  # read all files once more: this raises NoDocument with the reason
        next(held_back(files, *options, report=False))
    return store


def _user_error_of(error, cache_dir):
    """Returns the cause of an error in `datasets`: the reader's own UserError, or one about an unwritable cache."""
    while not isinstance(error, (UserError, OSError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        return UserError(f"cannot write to cache_dir {cache_dir} ({error.strerror or error}): set another --cache_dir")
    return error


def _groups(files, num_proc):
    """Splits the files, in order, into num_proc lists of about equal size; into one list if a file is too large."""
    sizes = np.array([text_bytes([file]) for file in files])
    if num_proc == 1 or sizes.max() > MOST_UNEVEN * sizes.sum() / num_proc:
        return [files]
    # the text is divided into equal shares; a file goes to the process whose share has the middle of the file
    owners = (np.cumsum(sizes) - sizes / 2) * num_proc // max(1, sizes.sum())
    return [[file for file, owner in zip(files, owners) if owner == number] for number in range(num_proc)]


def hold_back_share(files):
    """Returns the share of documents for validation. It depends on the files alone, so that both parts agree on it."""
    return min(1 / HOLD_BACK, HOLD_BACK_BYTES / max(1, text_bytes(files)))


def held_back(files, text_field="text", strict=False, part="whole", share=0.0, max_doc_mb=MAX_DOC_MB, report=True):
    """Yields (piece, is_last) pairs of one part of the documents, see `tokenize_corpus`.

    Raises NoDocument if the part is empty."""
    is_first, is_empty, is_valid = True, True, False
    for piece, is_last in read_pieces(files, text_field, strict, report=report, max_doc_mb=max_doc_mb):
        if is_first:
            is_valid = content_hash(piece.encode()) < share * 2**64  # the first piece decides for the whole document
        is_first = is_last
        if part == "whole" or is_valid == (part == "valid"):
            is_empty = False
            yield piece, is_last
    if is_empty:
        raise NoDocument(f"too few documents to hold some back as {part} text: set --valid_paths")


def _rows(groups, encoder, options, n_encoders):
    """Yields rows for `datasets`, one per piece; `_Encoder` makes them.

    `groups` is this process's share: a list with one list of files. An empty share yields one empty row, because
    `datasets` cannot open a cache without rows.
    """
    (files,) = groups
    pieces = held_back(files, *options, report=options[2] != "valid")  # the training part already reports bad lines
    first = _take(pieces, ROWS) or [("", False)]
    batches = itertools.chain([first], iter(lambda: _take(pieces, ROWS), []))
    # DataLoader serves as a parallel map: it keeps the order, limits the batches in flight and stops its workers
    rows = DataLoader(
        encoder,
        batch_size=None,
        sampler=batches,
        num_workers=n_encoders,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else it draws from the global random state
    )
    for batch in rows:
        yield from batch


def _take(pieces, n):
    """Returns the next n pieces, or as many as there are."""
    try:
        return list(itertools.islice(pieces, n))
    except NoDocument:  # this process's files are empty, but those of another process may not be
        return []


def _unchanged(rows):
    return rows


class _Encoder(Dataset):
    """Tokenizes a list of pieces, encoder[[(text, is_last), ...]], into rows of the cache.

    The last row of a document ends with EOS. With `of_records`, the last piece of each is an answer."""

    def __init__(self, tokenizer, id_type, of_records):
        self.tokenizer, self.id_type, self.of_records = tokenizer, id_type, of_records

    def __getitem__(self, pieces):
        continues = [self.of_records and is_last for _, is_last in pieces]
        texts = [self.tokenizer.continuing(text) if c else text for (text, _), c in zip(pieces, continues)]
        batch, eos = self.tokenizer.encode_batch(texts), [self.tokenizer.eos_id]
        return [
            {
                "input_ids": np.array(ids + eos * is_last, dtype=self.id_type).tobytes(),
                "n_bytes": len(text.encode()),
                "n_lost": self.tokenizer.lost_bytes(encoded, ids),
                "ends": is_last,
            }
            for ids, encoded, (text, is_last) in zip(batch, texts, pieces)
        ]


class TokenStore:
    """A flat, memory-mapped stream of `len(store)` tokens on disk; `store[a:b]` is an int64 array.

    `doc_ends` (n_documents,) int64 holds the position after each document's EOS. `n_bytes` is the size of all texts in
    UTF-8 bytes. `n_lost` is the number of these bytes that are lost when the tokens are decoded. `last_tokens` and
    `last_bytes` (n_documents,) int64 are the sizes of each document's last piece, with its EOS.
    """

    def __init__(self, dataset, id_type):
        self._dataset, self._id_type = dataset, np.dtype(id_type)
        size = self._id_type.itemsize
        self._chunks, lengths = [], [np.zeros(0, np.int64)]
        for chunk in dataset.data.column("input_ids").chunks:  # views of the mapped file, no copy
            _, offsets, data = chunk.buffers()
            offsets = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1] // size
            ids = np.frombuffer(data or b"", self._id_type)
            self._chunks.append(ids[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets).astype(np.int64))
        self._starts = np.cumsum([0] + [len(c) for c in self._chunks])
        is_end = np.concatenate([np.zeros(0, bool), *map(_to_bool, dataset.data.column("ends").chunks)])
        lengths = np.concatenate(lengths)
        n_bytes, n_lost = (
            np.concatenate([np.zeros(0, np.int64), *(c.to_numpy() for c in dataset.data.column(name).chunks)])
            for name in ("n_bytes", "n_lost")
        )
        self.doc_ends, self.last_tokens, self.last_bytes = np.cumsum(lengths)[is_end], lengths[is_end], n_bytes[is_end]
        self.n_bytes, self.n_lost = int(n_bytes.sum()), int(n_lost.sum())
        self._start, self._stop = 0, int(self._starts[-1])

    def __getstate__(self):  # a worker process maps the file again instead of copying the tokens
        return {k: v for k, v in self.__dict__.items() if k != "_chunks"}

    def __setstate__(self, state):
        self.__init__(state["_dataset"], state["_id_type"])
        self.__dict__.update(state)

    def __len__(self):
        return self._stop - self._start

    def bytes_per_token(self, n_bytes, n_tokens):
        """Returns n_bytes / n_tokens, or NaN (no bits per byte) if the tokenizer loses some of the text."""
        return math.nan if self.n_lost else n_bytes / n_tokens

    @property
    def n_documents(self):
        return len(self.doc_ends)

    def __getitem__(self, index):
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError("a TokenStore has no slices with a step")
        out = np.empty(max(0, stop - start), np.int64)
        at, first = 0, self._start + start
        chunk = int(np.searchsorted(self._starts, first, side="right")) - 1
        while at < len(out):
            offset = first + at - int(self._starts[chunk])
            part = self._chunks[chunk][offset : offset + len(out) - at]
            out[at : at + len(part)] = part
            at, chunk = at + len(part), chunk + 1
        return out

    def documents_of(self, start, stop):
        """Returns (stop - start,) int64: the document number of each token in a range.

        An EOS belongs to the document that it ends."""
        return np.searchsorted(self.doc_ends, np.arange(start, stop), side="right")

    def split(self, position, tokenizer):
        """Returns two stores: the tokens before `position`, and the tokens from it on.

        Their n_bytes are found by decoding the second part."""
        cuts = range(position, len(self), 1 << 16)  # in parts, because a Python list takes tens of bytes per token
        tail_bytes = sum(len(tokenizer.decode_bytes(self[at : at + (1 << 16)].tolist())) for at in cuts)
        begins = np.concatenate([[0], self.doc_ends[:-1]])
        # a space that the tokenizer adds before each document is not part of the text
        tail_bytes -= len(tokenizer.prefix) * int(((begins >= position) & (begins < len(self))).sum())
        pair = []
        for start, stop, n_bytes in ((0, position, self.n_bytes - tail_bytes), (position, len(self), tail_bytes)):
            store = object.__new__(TokenStore)
            store.__dict__.update(self.__dict__)
            store._start, store._stop, store.n_bytes = self._start + start, self._start + stop, n_bytes
            inside = self.doc_ends[(self.doc_ends > start) & (self.doc_ends <= stop)] - start
            cut = [] if len(inside) and inside[-1] == stop - start else [stop - start]  # a document that is cut in two
            store.doc_ends = np.concatenate([inside, np.array(cut, np.int64)])
            pair.append(store)
        return tuple(pair)


def _to_bool(chunk):
    return chunk.to_numpy(zero_copy_only=False)  # Arrow stores booleans as bits


def on_the_spot(texts, key, vocab_size, cache_dir=None, fim=False):
    """Returns a SentencePiece model trained on `texts` (an iterable of str), cached in cache_dir under `key`.

    fim: with the sentinels of fill-in-the-middle."""
    key += "-fim" * fim
    prefix = os.path.join(cache_dir or default_cache_dir(), f"spm-{key}")
    if not Path(f"{prefix}.model").exists():
        print(f"training a SentencePiece model of {vocab_size} pieces on the training text", file=sys.stderr)
        train_sentencepiece(texts, prefix, vocab_size, fim=fim)
    return read_tokenizer(f"{prefix}.model")


def sampled(files, text_field, part, max_doc_mb=MAX_DOC_MB, n_bytes=ON_THE_SPOT_BYTES):
    """Yields pieces of the training documents, about n_bytes in total, evenly spread over the corpus."""
    share = min(1.0, n_bytes / max(1, text_bytes(files)))
    together = 2 if isinstance(text_field, RecordFields) else 1  # a prompt and its answer
    for number, (piece, _) in enumerate(_any_part(files, text_field, part, max_doc_mb)):
        if int((number // together + 1) * share) > int(number // together * share):
            yield piece


def _any_part(files, text_field, part, max_doc_mb):
    """Yields one part of the documents, or all of them if they are too few to hold some back."""
    try:
        yield from held_back(files, text_field, False, part, hold_back_share(files), max_doc_mb, report=False)
    except NoDocument:
        yield from held_back(files, text_field, max_doc_mb=max_doc_mb, report=False)
