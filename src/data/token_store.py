"""Documents to tokens on disk, once: `tokenize_corpus` fills a cache through `datasets`, `TokenStore` maps it.

`on_the_spot` trains the tokenizer where there is none yet.
"""

import collections
import functools
import hashlib
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from src.data.corpus import MAX_DOC_MB, NoDocument, content_hash, find_files, read_pieces
from src.data.tokenizer_training import train_sentencepiece
from src.errors import UserError
from src.tokenizer import read_tokenizer

HOLD_BACK = 20  # one document in this many is validation text where no valid_paths are given
HOLD_BACK_BYTES = 2_000_000  # or fewer, so that it is about this much text at most
PACKED_RATIO = 3  # a guess of the bytes of text per byte of a compressed file
MOST_UNEVEN = 1.5  # a file of more than this times a share of the text is not left to one process
ROWS = 200  # pieces of documents per Arrow chunk and per call of the tokenizer: bounds memory
CACHE_VERSION = "2"  # raise it when the meaning of cached tokens changes
ON_THE_SPOT_VOCAB = 4096
ON_THE_SPOT_BYTES = 10_000_000  # as much text is enough for a vocabulary, and takes seconds


def default_cache_dir():
    """$HF_DATASETS_CACHE, or ~/.cache/generative-trm."""
    return os.environ.get("HF_DATASETS_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "generative-trm")


def content_key(files, *settings):
    """Hash (hex) of the content and kind of files in their order, and of settings; names and dates do not count."""
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


@functools.cache  # several keys of one run are made from the same files
def _digest(path, size, mtime_ns):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def text_bytes(files):
    """About how many bytes of text the files hold."""
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
    """TokenStore of the documents of files, globs and folders: their tokens, EOS after each document.

    part "valid" is `share` of the documents (hold_back_share), chosen by their content; "train" is the rest. Kept in
    cache_dir (default_cache_dir()) by content of files and tokenizer; a run that was killed leaves nothing that a later
    one takes for whole, and of two at once one waits. num_proc processes share the files; where those are too few, one
    process reads and the others tokenize. Raises UserError as `read_pieces` does, NoDocument where the part is empty.
    """
    import datasets
    from filelock import FileLock

    files = find_files(paths)
    cache_dir = cache_dir or default_cache_dir()
    options = (text_field, strict, part, hold_back_share(files) if share is None else share, max_doc_mb)
    key = content_key(files, *options, tokenizer.fingerprint)
    id_type = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
    groups = _groups(files, num_proc)
    n_encoders = num_proc if len(groups) == 1 < num_proc else 0
    try:
        os.makedirs(cache_dir, exist_ok=True)
        with FileLock(os.path.join(cache_dir, f"{key}.lock")):
            rows = datasets.Dataset.from_generator(
                functools.partial(_rows, encoder=_Encoder(tokenizer, id_type), options=options, n_encoders=n_encoders),
                gen_kwargs={"groups": groups},
                features=datasets.Features(
                    input_ids=datasets.Value("binary"),  # much quicker to write than a list
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
        if len(groups) > 1:  # the cause stays in the other process, so it is looked for here
            collections.deque(held_back(files, *options, report=False), maxlen=0)
        raise _user_error_of(error, cache_dir) from None
    store = TokenStore(rows, id_type)
    if not len(store):  # the reader says why, now that it sees all files at once
        next(held_back(files, *options, report=False))
    return store


def _user_error_of(error, cache_dir):
    """What a fault inside `datasets` was at bottom: the reader's own UserError, or a cache that cannot be written."""
    while not isinstance(error, (UserError, OSError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        return UserError(f"cache_dir {cache_dir}: {error.strerror or error}; choose another with --cache_dir")
    return error


def _groups(files, num_proc):
    """The files in their order, in num_proc lists of about as much text, or in one if a file is too large for that."""
    sizes = np.array([text_bytes([file]) for file in files])
    if num_proc == 1 or sizes.max() > MOST_UNEVEN * sizes.sum() / num_proc:
        return [files]
    owners = (np.cumsum(sizes) - sizes / 2) * num_proc // max(1, sizes.sum())  # by the middle of a file
    return [[file for file, owner in zip(files, owners) if owner == number] for number in range(num_proc)]


def hold_back_share(files):
    """Share of the documents that is validation text: a function of the files alone, so that both parts agree."""
    return min(1 / HOLD_BACK, HOLD_BACK_BYTES / max(1, text_bytes(files)))


def held_back(files, text_field="text", strict=False, part="whole", share=0.0, max_doc_mb=MAX_DOC_MB, report=True):
    """(piece, is_last) pairs of one part of the documents; see `tokenize_corpus`. NoDocument where it is empty."""
    is_first, is_empty, is_valid = True, True, False
    for piece, is_last in read_pieces(files, text_field, strict, report=report, max_doc_mb=max_doc_mb):
        if is_first:
            is_valid = content_hash(piece.encode()) < share * 2**64
        is_first = is_last
        if part == "whole" or is_valid == (part == "valid"):
            is_empty = False
            yield piece, is_last
    if is_empty:
        raise NoDocument(f"too few documents to hold some back as {part} text; give --valid_paths")


def _rows(groups, encoder, options, n_encoders):
    """Rows for `datasets`, one per piece: ids, EOS after a document's last piece; bytes; is it the last.

    `groups` is this process's share, one list of files. An empty share gives one empty row, because `datasets` does
    not open a cache that holds none.
    """
    (files,) = groups
    pieces = held_back(files, *options, report=options[2] != "valid")  # bad lines are named with the training part
    first = _take(pieces, ROWS) or [("", False)]
    batches = itertools.chain([first], iter(lambda: _take(pieces, ROWS), []))
    # torch's loader as a map over processes: in order, a few batches under way, and no process outlives this one
    rows = DataLoader(
        encoder,
        batch_size=None,
        sampler=batches,
        num_workers=n_encoders,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # so that the global state is not touched
    )
    for batch in rows:
        yield from batch


def _take(pieces, n):
    """The next n pieces, or as many as there are."""
    try:
        return list(itertools.islice(pieces, n))
    except NoDocument:  # raised before any piece: a share of the files may be empty where others are not
        return []


def _unchanged(rows):
    return rows


class _Encoder(Dataset):
    """Pieces to rows: encoder[[(text, is_last), ...]]."""

    def __init__(self, tokenizer, id_type):
        self.tokenizer, self.id_type = tokenizer, id_type

    def __getitem__(self, pieces):
        batch, eos = self.tokenizer.encode_batch([text for text, _ in pieces]), [self.tokenizer.eos_id]
        return [
            {
                "input_ids": np.array(ids + eos * is_last, dtype=self.id_type).tobytes(),
                "n_bytes": len(text.encode()),
                "n_lost": self.tokenizer.lost_bytes(text, ids),
                "ends": is_last,
            }
            for ids, (text, is_last) in zip(batch, pieces)
        ]


class TokenStore:
    """A flat stream of tokens on disk, memory-mapped: `len(store)` tokens, `store[a:b]` an int64 array.

    `doc_ends` (n_documents,) int64 is the position after each document's EOS, `n_bytes` the UTF-8 bytes of all texts,
    `n_lost` those that the tokens do not give back.
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
        self.doc_ends = np.cumsum(np.concatenate(lengths))[is_end]
        self.n_bytes, self.n_lost = (
            sum(int(c.to_numpy().sum()) for c in dataset.data.column(name).chunks) for name in ("n_bytes", "n_lost")
        )
        self._start, self._stop = 0, int(self._starts[-1])

    def __getstate__(self):  # a worker process maps the file again
        return {k: v for k, v in self.__dict__.items() if k != "_chunks"}

    def __setstate__(self, state):
        self.__init__(state["_dataset"], state["_id_type"])
        self.__dict__.update(state)

    def __len__(self):
        return self._stop - self._start

    def bytes_per_token(self, n_bytes, n_tokens):
        """Of a part of this text; NaN, so that there are no bits per byte, where the tokens do not give it back."""
        return math.nan if self.n_lost else n_bytes / n_tokens

    @property
    def n_documents(self):
        return len(self.doc_ends)

    def __getitem__(self, index):
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError("a TokenStore is sliced without a step")
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
        """(stop - start,) int64: for each token of a range, the number of its document in the store; EOS belongs to
        the document that it ends."""
        return np.searchsorted(self.doc_ends, np.arange(start, stop), side="right")

    def split(self, position, tokenizer):
        """Two stores, the tokens before and from `position`; byte counts follow the tokens."""
        cuts = range(position, len(self), 1 << 16)  # a few at a time: a token in a Python list is tens of bytes
        tail_bytes = sum(len(tokenizer.decode_bytes(self[at : at + (1 << 16)].tolist())) for at in cuts)
        pair = []
        for start, stop, n_bytes in ((0, position, self.n_bytes - tail_bytes), (position, len(self), tail_bytes)):
            store = object.__new__(TokenStore)
            store.__dict__.update(self.__dict__)
            store._start, store._stop, store.n_bytes = self._start + start, self._start + stop, n_bytes
            inside = self.doc_ends[(self.doc_ends > start) & (self.doc_ends <= stop)] - start
            cut = [] if len(inside) and inside[-1] == stop - start else [stop - start]
            store.doc_ends = np.concatenate([inside, np.array(cut, np.int64)])
            pair.append(store)
        return tuple(pair)


def _to_bool(chunk):
    return chunk.to_numpy(zero_copy_only=False)  # Arrow keeps booleans as bits


def on_the_spot(texts, key, vocab_size, cache_dir=None):
    """SentencePiece model of `texts` (an iterable of str), trained where cache_dir has none of that key yet."""
    prefix = os.path.join(cache_dir or default_cache_dir(), f"spm-{key}")
    if not Path(f"{prefix}.model").exists():
        print(f"training a SentencePiece model of {vocab_size} pieces on the training text", file=sys.stderr)
        train_sentencepiece(texts, prefix, vocab_size)
    return read_tokenizer(f"{prefix}.model")


def sampled(files, text_field, part, max_doc_mb=MAX_DOC_MB):
    """Pieces of the training documents from all over the corpus, about ON_THE_SPOT_BYTES of them."""
    share = min(1.0, ON_THE_SPOT_BYTES / max(1, text_bytes(files)))
    for number, (piece, _) in enumerate(_any_part(files, text_field, part, max_doc_mb)):
        if int((number + 1) * share) > int(number * share):
            yield piece


def _any_part(files, text_field, part, max_doc_mb):
    """One part of the documents, or all where they are too few to be parted."""
    try:
        yield from held_back(files, text_field, False, part, hold_back_share(files), max_doc_mb, report=False)
    except NoDocument:
        yield from held_back(files, text_field, max_doc_mb=max_doc_mb, report=False)
