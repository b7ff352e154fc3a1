"""Streaming: reads and tokenizes the training text during training, for corpora too large to tokenize beforehand.

1. `Shards` (`src.data.shards`) holds the files of one or more corpora; a shard is one file. `src.data.corpus` reads
   their documents.
2. A reader is a worker process of a rank, or the rank itself if it has no workers. `share_of` divides the shards of
   each epoch among all readers, in an order that depends on (seed, epoch) alone. A shard that falls to several readers
   is divided among them, piece by piece.
3. `_Windows` joins a reader's documents, cuts full windows, and shuffles one block of `shuffle_buffer` windows at a
   time.
   `_Rows` does the same with records, each of which is a row.
4. `ReaderBatches` draws windows from the corpora by weight. `src.data.loader` runs it in worker processes.

A checkpoint does not save the shuffle buffer. The order within a block is a function of (seed, reader, block), so the
state is only the start of the block and how much of it was used. To resume, a reader parses its shard up to that start
without tokenizing it, and then tokenizes one to two blocks again.
"""

import collections
import copy
import itertools
import math
import sys
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from src.data.corpus import NoDocument
from src.data.order import mixture_order
from src.data.samples import collate_batch, record_sample, window_sample
from src.errors import UserError
from src.runtime import mix_seed

ENCODED = 16  # pieces per call of the tokenizer
MEASURED_BYTES = 1_000_000  # size of the text sample from which bytes_per_token of a stream is estimated
MOST_EMPTY = 10  # a reader raises an error if it gets no document in this many epochs in a row


class StreamingDataset:
    """Endless windows of `seq_len` tokens, read from Shards and packed as in PackedDataset.

    weights are those of the corpora, equal by default. With segment, attention_mask numbers the documents of a window.
    Each reader shuffles shuffle_buffer windows of a corpus at a time. fim: a FillInMiddle to rearrange windows.
    bytes_per_token is estimated once, from about MEASURED_BYTES of text at the start of the files. Raises NoDocument if
    a corpus has no document in that text.
    """

    def __init__(self, shards, tokenizer, seq_len, weights=None, segment=False, shuffle_buffer=2048, fim=None):
        self.shards, self.tokenizer, self.seq_len = shards, tokenizer, seq_len
        self.weights = list(weights or [1.0] * len(shards.corpora))
        self.segment, self.shuffle_buffer, self.fim = segment, shuffle_buffer, fim
        self.pads = any(shards.are_records)
        measures = (self._measure_records if are else self._measure for are in shards.are_records)
        sizes = [measure(corpus) for corpus, measure in enumerate(measures)]
        targets = [w * n for w, (_, n) in zip(self.weights, sizes)]  # of a record there are fewer than of a window
        self.bytes_per_token = sum(n * size for n, (size, _) in zip(targets, sizes)) / sum(targets)

    def _measure(self, corpus):
        """Returns the bytes per token of a corpus of text, and the targets of a row."""
        pieces = list(self.shards.heads(MEASURED_BYTES / len(self.weights), corpus))
        n_bytes = sum(len(piece.encode()) for piece, _ in pieces)
        ids = self.tokenizer.encode_batch([piece for piece, _ in pieces])
        if any(self.tokenizer.lost_bytes(piece, i) for i, (piece, _) in zip(ids, pieces)):
            return math.nan, self.seq_len  # bits per byte would be too low
        return n_bytes / sum(len(i) + is_last for i, (_, is_last) in zip(ids, pieces)), self.seq_len

    def _measure_records(self, corpus):
        """Returns the bytes per target token of the records that fit, and the targets of a row.

        Prints on stderr how many records do not fit."""
        pairs = list(_pairs(self.shards.heads(MEASURED_BYTES / len(self.weights), corpus)))
        rows = list(self.rows_of(pairs))
        kept = [(pair, row) for pair, row in zip(pairs, rows) if row]
        if not kept:
            first = self.shards.corpora[corpus][0]
            raise UserError(f"{first}: no record fits in max_seq_len {self.seq_len} tokens: raise max_seq_len")
        if len(kept) < len(pairs):
            dropped = f"{len(pairs) - len(kept)} of the first {len(pairs)} records"
            print(f"{dropped} are over {self.seq_len} tokens: training drops such records", file=sys.stderr)
        n_targets = sum(len(ids) - n_prompt for _, (ids, n_prompt) in kept)
        n_bytes = sum(len(answer.encode()) for (_, answer), _ in kept)
        if any(self.tokenizer.decode(ids) != "".join(pair) for pair, (ids, _) in kept):
            n_bytes = math.nan
        return n_bytes / n_targets, n_targets / len(kept)

    def rows_of(self, pairs):
        """Yields (ids of prompt, answer and EOS, length of the prompt) of each (prompt, answer); None if it is too
        long."""
        prompts = self.tokenizer.encode_batch([prompt for prompt, _ in pairs])
        answers = self.tokenizer.encode_batch([self.tokenizer.continuing(answer) for _, answer in pairs])
        for prompt, answer in zip(prompts, answers):
            fits = len(self.tokenizer.start(prompt)) + len(answer) <= self.seq_len
            yield (prompt + answer + [self.tokenizer.eos_id], len(prompt)) if fits else None

    @property
    def identity(self):
        """Returns what the order of windows depends on, apart from the seed and the number of readers.

        The form is {name for error messages: value}."""
        return {
            "the hash of the training files": self.shards.fingerprint,
            "the hash of the tokenizer": self.tokenizer.fingerprint[:16],
            "shuffle_buffer": self.shuffle_buffer,
            "mixture": self.weights,
        }

    def with_seq_len(self, seq_len):
        """Returns the same stream with windows of another length."""
        other = copy.copy(self)
        other.seq_len = seq_len
        return other

    def __str__(self):
        return f"a stream of {self.shards} in windows of {self.seq_len} tokens"


class RankStream(IterableDataset):
    """One rank's batches. In a worker process, iterating gives only the batches of that worker."""

    def __init__(self, data, rows, seed, rank, world):
        self.data, self.rows, self.seed, self.rank, self.world = data, rows, seed, rank, world

    def __iter__(self):
        worker = get_worker_info()
        number, n = (worker.id, worker.num_workers) if worker else (0, 1)
        return ReaderBatches(self.data, self.rows, self.seed, self.rank * n + number, self.world * n)


class ReaderBatches:
    """Endless (batch, epoch) pairs of one reader.

    After a UserError, its message (str) is returned in place of the batch, because an exception raised in a worker
    process would reach the user as a traceback."""

    def __init__(self, data, rows, seed, reader, readers):
        kinds = (_Rows if are else _Windows for are in data.shards.are_records)
        self.windows = [kind(data, n, mix_seed(seed, n), reader, readers) for n, kind in enumerate(kinds)]
        self.weights, self.rows, self.seed, self.drawn = data.weights, rows, mix_seed(seed, reader), 0
        self.pad_id = data.tokenizer.pad_id
        self._samples = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._samples is None:
            self._samples = self._draw()
        try:
            batch = collate_batch(list(itertools.islice(self._samples, self.rows)), self.pad_id)
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
    """A reader's position in a corpus.

    epoch counts from 0; shard is a number within this reader's share of the epoch; piece is a number within the shard,
    and token within the piece."""

    epoch: int
    shard: int
    piece: int
    token: int


class Window(NamedTuple):
    """T + 1 tokens.

    place is that of the first token, ids is (T + 1,) int32, and ends is (T + 1,) bool: whether a token ends a
    document."""

    place: Place
    ids: np.ndarray
    ends: np.ndarray


class _Windows:
    """One reader's endless windows of one corpus.

    Its state is the place where the current block starts, the number of that block, and `given`, the number of its
    tokens that were used. It counts tokens rather than windows, because seq_len may change."""

    def __init__(self, data, corpus, seed, reader, readers):
        self.data, self.corpus, self.files = data, corpus, data.shards.corpora[corpus]
        self.seed, self.reader, self.readers = seed, reader, readers
        self.start, self.block, self.given = Place(0, 0, 0, 0), 0, 0

    @property
    def _unit(self):
        return self.data.seq_len

    def state_dict(self):
        return {"start": list(self.start), "block": self.block, "given": self.given}

    def load_state_dict(self, state):
        self.start, self.block, self.given = Place(*state["start"]), state["block"], state["given"]

    def shuffled(self):
        """Yields samples block by block, each block in its own random order.

        With each sample, one window of the next block is read, so that no step has to wait for a whole block."""
        skip = self.given // self._unit  # samples of the first block that were used before the resume
        self._windows = self._in_order(self.start)
        self._head = next(self._windows)
        block = self._fill([], self.data.shuffle_buffer)
        while True:
            following = []
            order = np.random.default_rng((self.seed, self.reader, self.block)).permutation(len(block))
            for given, index in enumerate(order.tolist(), 1):
                self._fill(following, given)
                self.given = given * self._unit
                if skip:
                    skip -= 1
                else:
                    yield self._sample(block[index])
            # this reads the rest of the next block, if the current one was short because its epoch ended
            block = self._fill(following, self.data.shuffle_buffer)
            self.start, self.block, self.given = block[0].place, self.block + 1, 0

    def _fill(self, block, size):
        """Adds windows to a block until it has `size` of them. A block never extends into the next epoch."""
        while len(block) < size and (not block or self._head.place.epoch == block[0].place.epoch):
            block.append(self._head)
            self._head = next(self._windows)
        return block

    def _sample(self, window):
        documents = np.cumsum(window.ends[:-1], dtype=np.int64) if self.data.segment else None
        tokenizer, fim = self.data.tokenizer, self.data.fim
        sample = window_sample(window.ids.astype(np.int64), documents, (tokenizer.bos_id, tokenizer.eos_id))
        # the place of a window in the epoch is a seed that a resumed run finds again
        return fim(sample, (self.seed, self.reader, *window.place), self.data.seq_len) if fim else sample

    def _in_order(self, start):
        """Yields windows from a place on.

        Each window starts with the last token of the window before, in which that token was only a target."""
        size = self.data.seq_len
        # tokens that are not in a window yet, and (index of the first token, place) of each piece they come from
        ids, ends, begins = np.zeros(0, np.int32), np.zeros(0, bool), collections.deque()
        at = start.token  # index of the next window's first token
        for place, piece, ends_document in self._pieces(start):
            begins.append((len(ids), place))
            ids = np.concatenate([ids, piece])
            ends = np.concatenate([ends, np.zeros(len(piece), bool)])
            if ends_document:
                ends[-1] = True
            while len(ids) - at > size:
                while len(begins) > 1 and begins[1][0] <= at:  # ends when begins[0] is the piece that has token `at`
                    begins.popleft()
                first, place = begins[0]
                stop = at + size + 1
                yield Window(place._replace(token=at - first), ids[at:stop].copy(), ends[at:stop].copy())
                at += size
            cut = min(at, len(ids))  # drop the tokens before the next window
            ids, ends, at = ids[cut:], ends[cut:], at - cut
            begins = collections.deque((first - cut, place) for first, place in begins)

    def _pieces(self, start):
        """Yields (place of the first token, ids (n,) int32, whether they end a document) of each piece from `start`
        on."""
        epoch, first_shard, first, _ = start
        empty, why = 0, None  # epochs in a row without a document, and the last error of an empty file
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
                except NoDocument as error:  # a few empty files do no harm
                    why = error
                first = 0
            if empty == MOST_EMPTY:
                raise why or UserError(
                    f"{self.files[0]} and the other training files have too few documents for {self.readers} readers "
                    "(processes x num_workers): set a smaller num_workers"
                )
            epoch, first_shard = epoch + 1, 0

    def _read(self, path, low, high, first, report):
        """Yields (number, ids, ends_document) of the pieces of a file that belong to this reader.

        A piece belongs to it if its number is at least `first`, and number % readers is in low ... high - 1."""
        pieces = enumerate(self.data.shards.pieces(self.corpus, path, report))
        mine = (piece for piece in pieces if piece[0] >= first and low <= piece[0] % self.readers < high)
        # each piece of a shared shard ends with EOS, because another reader may get the next piece of its document
        is_shared = high - low < self.readers
        while batch := list(itertools.islice(mine, ENCODED)):
            encoded = self.data.tokenizer.encode_batch([text for _, (text, _) in batch])
            for (number, (_, is_last)), ids in zip(batch, encoded):
                ends = is_last or is_shared
                yield number, np.array(ids + [self.data.tokenizer.eos_id] * ends, np.int32), ends


class _Rows(_Windows):
    """One reader's endless records of one corpus, each a row of its own. `given` counts records.

    In a Window, ids are the tokens of prompt, answer and EOS, and `ends` is the length of the prompt."""

    _unit = 1

    def _in_order(self, start):
        for place, ids, n_prompt in self._pieces(start):
            yield Window(place, ids, n_prompt)

    def _sample(self, window):
        return record_sample(window.ids.tolist(), window.ends, self.data.tokenizer)

    def _read(self, path, low, high, first, report):
        """Yields (number, ids, length of the prompt) of the records of a file that belong to this reader and fit."""
        pairs = enumerate(_pairs(self.data.shards.pieces(self.corpus, path, report)))
        mine = (pair for pair in pairs if pair[0] >= first and low <= pair[0] % self.readers < high)
        while batch := list(itertools.islice(mine, ENCODED)):
            rows = self.data.rows_of([pair for _, pair in batch])
            yield from ((number, np.array(row[0], np.int32), row[1]) for (number, _), row in zip(batch, rows) if row)


def _pairs(pieces):
    """Yields the (prompt, answer) pairs of the pieces of records. A prompt without an answer is left out."""
    prompt = ""
    for text, is_last in pieces:
        if is_last:
            yield prompt, text
        prompt = text


def share_of(n_shards, reader, readers):
    """Yields (position in the epoch's order, low, high) for each shard that a reader reads.

    Of such a shard, the reader takes the pieces whose number % readers is in low ... high - 1. All readers have equal,
    contiguous shares: reader r has the shards from r * n_shards / readers to (r + 1) * n_shards / readers. If such a
    border is a fraction, it lies inside a shard, and the pieces of that shard are divided in that proportion."""
    for position in range(reader * n_shards // readers, -(-(reader + 1) * n_shards // readers)):
        before = position * readers
        yield position, max(0, reader * n_shards - before), min(readers, (reader + 1) * n_shards - before)
