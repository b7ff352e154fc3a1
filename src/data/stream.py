"""Training text straight from its files: read and tokenized while training, where a corpus is too large to be so first.

1. `Shards` are the files of one or more corpora, which `src.data.corpus` reads one document after the other.
2. A reader is a loading process of a rank (or the rank itself). `share_of` deals the shards of each epoch to all
   readers, in an order that depends on (seed, epoch) alone; where they do not divide, a shard is shared by document.
3. `_Windows` joins a reader's documents, cuts full windows, and shuffles them a block (shuffle_buffer) at a time.
4. `ReaderBatches` draws windows from the corpora by weight; `src.data.loader` runs it in processes.

The shuffle is replayed rather than saved: the order within a block is a function of (seed, reader, block), so where the
block begins and how much of it is given are all the state, a few numbers whatever the buffer holds. To resume, a reader
passes over its shard up to there, which is parsing alone, and tokenizes one to two blocks again.
"""

import collections
import contextlib
import copy
import hashlib
import itertools
import math
import os
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from src.data.corpus import MAX_DOC_MB, NoDocument, read_pieces
from src.data.order import mixture_order
from src.data.samples import collate_batch, window_sample
from src.data.token_store import held_back, hold_back_share
from src.errors import UserError
from src.runtime import mix_seed

ENCODED = 16  # pieces of documents per call of the tokenizer
MEASURED_BYTES = 1_000_000  # of text, on which bytes_per_token of a stream is measured
MOST_EMPTY = 10  # epochs in a row that hold no document for a reader, until it gives up
LISTED_FILES = 256  # spread over all, that samples of the text are taken from


class Shards:
    """The files of one or more corpora.

    corpora is a list of lists of files. holds_back: some documents of each corpus's first file are validation text
    (`held_back_store`) and not read for training. Raises UserError for a file that cannot be looked at; while reading,
    for one that is gone, changed its size, or cannot be read to its end.
    """

    def __init__(self, corpora, text_field="text", strict=False, holds_back=False, max_doc_mb=MAX_DOC_MB):
        self.corpora, self.text_field, self.strict, self.max_doc_mb = corpora, text_field, strict, max_doc_mb
        self.files = sorted(set(itertools.chain(*corpora)))
        self._sizes = {path: _size(path) for path in self.files}
        self._held = sorted({files[0] for files in corpora}) if holds_back else []
        self._share = hold_back_share(self._held)

    def pieces(self, path, report=False):
        """(piece, is_last) pairs of the training documents of one file, see `read_pieces`; report names bad lines."""
        self._check(path)
        if path in self._held:
            yield from held_back([path], self.text_field, self.strict, "train", self._share, self.max_doc_mb, report)
        else:
            yield from read_pieces([path], self.text_field, self.strict, None, report, self.max_doc_mb)
        self._check(path)

    def _check(self, path):
        if (size := _size(path)) != self._sizes[path]:
            raise UserError(f"{path} had {self._sizes[path]} bytes when the run began and has {size} now: put it back")

    def heads(self, n_bytes, files=None):
        """(piece, is_last) pairs from the starts of the files, or of LISTED_FILES spread over them, about as much of
        each; n_bytes of text in all where there is as much. Raises NoDocument where there is none."""
        files = self.files if files is None else files
        files, found, why = files[:: -(-len(files) // LISTED_FILES)], False, None
        for path in files:
            left = n_bytes / len(files)
            try:
                for piece, is_last in self.pieces(path):
                    yield piece, is_last
                    found, left = True, left - len(piece.encode())
                    if left <= 0:
                        break
            except NoDocument as error:  # an empty file among others
                why = error
        if not found:
            raise why

    def held_back_store(self, store_of, seq_len):
        """TokenStore of the documents that are held back: store_of(files, part, share)."""
        with contextlib.suppress(NoDocument):
            store = store_of(self._held, "valid", self._share)
            if len(store) > seq_len:
                return store
        raise UserError(f"{', '.join(self._held)}: too few documents to hold some back; give --valid_paths")

    def __str__(self):
        return f"{len(self.files)} files, {sum(self._sizes.values()) / 1e6:.1f} MB"

    @property
    def fingerprint(self):
        """Names and sizes of the files, hashed (hex)."""
        names = [[(os.path.basename(path), self._sizes[path]) for path in files] for files in self.corpora]
        return hashlib.sha256(repr((names, self.text_field, bool(self._held))).encode()).hexdigest()[:16]


def _size(path):
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put it back") from None


class StreamingDataset:
    """Endless windows of `seq_len` tokens, read from Shards, packed as in PackedDataset.

    weights: of the corpora, an equal one each by default; segment numbers the documents of a window in attention_mask;
    shuffle_buffer windows (per reader and corpus) are shuffled at a time. bytes_per_token is measured on about
    MEASURED_BYTES of text from the starts of the files, once. Raises NoDocument for a corpus that has none there.
    """

    def __init__(self, shards, tokenizer, seq_len, weights=None, segment=False, shuffle_buffer=2048):
        self.shards, self.tokenizer, self.seq_len = shards, tokenizer, seq_len
        self.weights = list(weights or [1.0] * len(shards.corpora))
        self.segment, self.shuffle_buffer = segment, shuffle_buffer
        measured = zip(self.weights, map(self._measure, shards.corpora))
        self.bytes_per_token = sum(w * n for w, n in measured) / sum(self.weights)

    def _measure(self, files):
        pieces = list(self.shards.heads(MEASURED_BYTES / len(self.weights), files))
        n_bytes = sum(len(piece.encode()) for piece, _ in pieces)
        ids = self.tokenizer.encode_batch([piece for piece, _ in pieces])
        if any(self.tokenizer.lost_bytes(piece, i) for i, (piece, _) in zip(ids, pieces)):
            return math.nan
        return n_bytes / sum(len(i) + is_last for i, (_, is_last) in zip(ids, pieces))

    @property
    def identity(self):
        """What the order of windows depends on, besides seed and readers: {name for the user: value}."""
        return {
            "the hash of the training files": self.shards.fingerprint,
            "the hash of the tokenizer": self.tokenizer.fingerprint[:16],
            "shuffle_buffer": self.shuffle_buffer,
            "mixture": self.weights,
        }

    def with_seq_len(self, seq_len):
        """The same stream in windows of another length."""
        other = copy.copy(self)
        other.seq_len = seq_len
        return other

    def __str__(self):
        return f"a stream of {self.shards} in windows of {self.seq_len} tokens"


class RankStream(IterableDataset):
    """One rank's batches, in whichever loading process it is asked for them."""

    def __init__(self, data, rows, seed, rank, world):
        self.data, self.rows, self.seed, self.rank, self.world = data, rows, seed, rank, world

    def __iter__(self):
        worker = get_worker_info()
        number, n = (worker.id, worker.num_workers) if worker else (0, 1)
        return ReaderBatches(self.data, self.rows, self.seed, self.rank * n + number, self.world * n)


class ReaderBatches:
    """Endless (batch, epoch) of one reader. The message of a UserError takes the place of a batch: raised in a loading
    process, it would reach the user as a traceback."""

    def __init__(self, data, rows, seed, reader, readers):
        corpora = range(len(data.weights))
        self.windows = [_Windows(data, n, mix_seed(seed, n), reader, readers) for n in corpora]
        self.weights, self.rows, self.seed, self.drawn = data.weights, rows, mix_seed(seed, reader), 0
        self._samples = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._samples is None:
            self._samples = self._draw()
        try:
            batch = collate_batch(list(itertools.islice(self._samples, self.rows)))
        except UserError as error:
            batch = str(error)
        return batch, min(windows.start.epoch for windows in self.windows)

    def _draw(self):
        sources = [windows.shuffled() for windows in self.windows]
        for number in mixture_order(self.weights, self.seed, self.drawn):
            self.drawn += 1
            yield next(sources[number])

    def state_dict(self):
        return {"drawn": self.drawn, "windows": [windows.state_dict() for windows in self.windows]}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]
        for windows, saved in zip(self.windows, state["windows"], strict=True):
            windows.load_state_dict(saved)


class Place(NamedTuple):
    """Where a reader is in a corpus: epoch, number of the shard in its share of it, piece in the shard, token in it."""

    epoch: int
    shard: int
    piece: int
    token: int


class Window(NamedTuple):
    """T + 1 tokens: where the first is, ids (T + 1,) int32, and which of them ends a document (T + 1,) bool."""

    place: Place
    ids: np.ndarray
    ends: np.ndarray


class _Windows:
    """One reader's windows of one corpus, endless. Its state is where the block begins that is being given, the block's
    number, and the tokens of it that are given."""

    def __init__(self, data, corpus, seed, reader, readers):
        self.data, self.files = data, data.shards.corpora[corpus]
        self.seed, self.reader, self.readers = seed, reader, readers
        self.start, self.block, self.given = Place(0, 0, 0, 0), 0, 0

    def state_dict(self):
        return {"start": list(self.start), "block": self.block, "given": self.given}

    def load_state_dict(self, state):
        self.start, self.block, self.given = Place(*state["start"]), state["block"], state["given"]

    def shuffled(self):
        """Samples, a block after the other, each in an order of its own; for each that is given one of the next block
        is read, so that the work is even."""
        skip = self.given // self.data.seq_len
        self._windows = self._in_order(self.start)
        self._head = next(self._windows)
        block = self._fill([], self.data.shuffle_buffer)
        while True:
            following = []
            order = np.random.default_rng((self.seed, self.reader, self.block)).permutation(len(block))
            for given, index in enumerate(order.tolist(), 1):
                self._fill(following, given)
                self.given = given * self.data.seq_len
                if skip:
                    skip -= 1
                else:
                    yield self._sample(block[index])
            block = self._fill(following, self.data.shuffle_buffer)
            self.start, self.block, self.given = block[0].place, self.block + 1, 0

    def _fill(self, block, size):
        """Windows are added to a block up to `size` of them, all of one epoch."""
        while len(block) < size and (not block or self._head.place.epoch == block[0].place.epoch):
            block.append(self._head)
            self._head = next(self._windows)
        return block

    def _sample(self, window):
        documents = np.cumsum(window.ends[:-1], dtype=np.int64) if self.data.segment else None
        tokenizer = self.data.tokenizer
        return window_sample(window.ids.astype(np.int64), documents, (tokenizer.bos_id, tokenizer.eos_id))

    def _in_order(self, start):
        """Windows from a place on; each begins with the last token of the one before, which there is a target only."""
        size = self.data.seq_len
        ids, ends, begins = np.zeros(0, np.int32), np.zeros(0, bool), collections.deque()
        at = start.token
        for place, piece, ends_document in self._pieces(start):
            begins.append((len(ids), place))
            ids = np.concatenate([ids, piece])
            ends = np.concatenate([ends, np.zeros(len(piece), bool)])
            if ends_document:
                ends[-1] = True
            while len(ids) - at > size:
                while len(begins) > 1 and begins[1][0] <= at:
                    begins.popleft()
                first, place = begins[0]
                stop = at + size + 1
                yield Window(place._replace(token=at - first), ids[at:stop].copy(), ends[at:stop].copy())
                at += size
            cut = min(at, len(ids))
            ids, ends, at = ids[cut:], ends[cut:], at - cut
            begins = collections.deque((first - cut, place) for first, place in begins)

    def _pieces(self, start):
        """(place of its first token, ids (n,) int32, whether they end a document) from the start of a piece on."""
        epoch, first_shard, first, _ = start
        empty, why = 0, None  # epochs in a row without a document
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist()
            shares = list(share_of(len(self.files), self.reader, self.readers))
            empty += 1
            for shard, (position, low, high) in list(enumerate(shares))[first_shard:]:
                mine = self._read(self.files[order[position]], low, high, first, report=epoch == 0 and low == 0)
                try:
                    for number, ids, ends_document in mine:
                        empty = 0
                        yield Place(epoch, shard, number, 0), ids, ends_document
                except NoDocument as error:  # an empty file among others
                    why = error
                first = 0
            if empty == MOST_EMPTY:
                raise why or UserError(
                    f"{self.files[0]} and the other training files have too few documents for {self.readers} readers "
                    "(processes x num_workers): set a smaller num_workers"
                )
            epoch, first_shard = epoch + 1, 0

    def _read(self, path, low, high, first, report):
        """(number, ids, ends_document) of the pieces from `first` on whose number % readers is in low ... high - 1."""
        pieces = enumerate(self.data.shards.pieces(path, report))
        mine = (piece for piece in pieces if piece[0] >= first and low <= piece[0] % self.readers < high)
        is_shared = high - low < self.readers  # then what follows in a long document may be another reader's
        while batch := list(itertools.islice(mine, ENCODED)):
            encoded = self.data.tokenizer.encode_batch([text for _, (text, _) in batch])
            for (number, (_, is_last)), ids in zip(batch, encoded):
                ends = is_last or is_shared
                yield number, np.array(ids + [self.data.tokenizer.eos_id] * ends, np.int32), ends


def share_of(n_shards, reader, readers):
    """(position, low, high) of each shard that a reader reads of an epoch's order: the pieces of that shard whose
    number % readers is in low ... high - 1. Readers have equal shares, each in one row: reader r's begins at shard
    r * n_shards / readers, whose fraction is a part of the pieces."""
    for position in range(reader * n_shards // readers, -(-(reader + 1) * n_shards // readers)):
        before = position * readers
        yield position, max(0, reader * n_shards - before), min(readers, (reader + 1) * n_shards - before)
