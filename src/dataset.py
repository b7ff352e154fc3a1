"""Documents -> tokens -> windows -> batches.

1. `src.data.corpus` reads files as a stream of documents.
2. `src.data.token_store` keeps their tokens on disk, as one flat stream with EOS after each document. The cache key is
   a hash of the files and the tokenizer, so a second run only opens it. `TokenStore` is that stream, memory-mapped.
3. `PackedDataset` cuts the stream into full windows. `WikiJsonlDataset` is the padded alternative, one document per
   row. `RecordDataset` has one question with its answer per row. `MixedDataset` draws from several corpora by weight.
4. `create_dataloader` makes batches, in an order that is a pure function of (seed, epoch, index).
5. `prepare_data` does all of this, as `DataConfig` (the flags) says.

The rows of step 3 are in `src.data.samples`, the orders of step 4 in `src.data.order`. With `fim_rate`, the training
rows are rearranged for fill-in-the-middle (`src.data.fim`) when step 4 reads them. For a corpus too large for step
2, `src.data.stream` tokenizes during training. `src.data.loader` gives the trainer its batches.
"""

import functools
import itertools
import os
import sys

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from src.data.corpus import NoDocument, content_hash, find_files, fingerprint_files, stdlib_files, without
from src.data.fim import FillInMiddle, RearrangedDataset
from src.data.order import EndlessSampler, MixtureSampler, RankBatches, SeededIndices
from src.data.readers import SUFFIXES
from src.data.record_rows import RecordDataset
from src.data.records import RECORD_SUFFIXES, RecordFields
from src.data.samples import Collate, Sample, window_sample
from src.data.shards import Shards
from src.data.shift import ShiftedDataset
from src.data.stream import StreamingDataset
from src.data.token_store import (
    HOLD_BACK,
    ON_THE_SPOT_BYTES,
    ON_THE_SPOT_VOCAB,
    TokenStore,
    content_key,
    hold_back_share,
    on_the_spot,
    sampled,
    tokenize_corpus,
)
from src.errors import UserError, few
from src.losses import IGNORE
from src.tokenizer import ByteLevelTokenizer, read_tokenizer, warn_of_loss
from src.training.train_config import DataConfig

MOST_VALID_TOKENS = 1_000_000  # limit for the end of the text that is held back if there are too few documents


class PackedDataset(Dataset):
    """Full windows of a TokenStore, with `seq_len` inputs each. Every token after the first is a target exactly once.

    There is no padding. The last window ends at the end of the store, and its targets that overlap with the window
    before are -100. bos_eos: (BOS id, EOS id). If given, the EOS between two documents becomes BOS where it is an
    input, so that a model learns to start from BOS. As a target it stays EOS. segment: let attention_mask number the
    documents of a window, which limits attention to one document. Raises UserError if the store is shorter than one
    window.
    """

    pads = False  # whether rows differ in length, so that batches are padded

    def __init__(self, store, seq_len, segment=False, bos_eos=None):
        if len(store) < seq_len + 1:
            raise UserError(
                f"the text has {len(store)} tokens, one window needs {seq_len + 1}: "
                "use more text or set a smaller max_seq_len"
            )
        self.store, self.seq_len, self.segment, self.bos_eos = store, seq_len, segment, bos_eos
        self.n_targets = len(store) - 1

    def __len__(self):
        return (self.n_targets + self.seq_len - 1) // self.seq_len

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text per target token: bits per byte = loss in nats / ln 2 / bytes_per_token."""
        return self.store.bytes_per_token(self.store.n_bytes, self.n_targets)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.window(index % len(self) * self.seq_len)

    def window(self, wanted):
        """Returns the window whose first input is token `wanted`, or the last one if the text ends before."""
        start = min(wanted, self.n_targets - self.seq_len)
        stop = start + self.seq_len + 1
        documents = self.store.documents_of(start + 1, stop) if self.segment else None
        sample = window_sample(self.store[start:stop], documents, self.bos_eos)
        sample.target_ids[: wanted - start] = IGNORE  # in the last window: targets of the one before
        return sample

    def with_seq_len(self, seq_len):
        """Returns the same text in windows of another length."""
        return PackedDataset(self.store, seq_len, self.segment, self.bos_eos)

    def __str__(self):
        return f"{len(self)} windows of {self.seq_len} tokens"


class WikiJsonlDataset(Dataset):
    """One document per row, cut at `seq_len` and padded by `collate_batch`: input BOS + text, target text + EOS.

    `paths` is as in `tokenize_corpus`, or a TokenStore.
    """

    pads = True

    def __init__(self, paths, tokenizer, seq_len, text_field="text", **options):
        self.store = (
            paths if isinstance(paths, TokenStore) else tokenize_corpus(paths, tokenizer, text_field, **options)
        )
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self._starts = np.concatenate([[0], self.store.doc_ends[:-1]])
        self.n_targets = int(np.minimum(self.store.doc_ends - self._starts, seq_len).sum())
        self._bytes_per_token = None

    def __len__(self):
        return self.store.n_documents

    @property
    def bytes_per_token(self):
        """UTF-8 bytes per target token, without the text that was cut off."""
        if self._bytes_per_token is None:
            kept = (self.tokenizer.decode_bytes(self[i].target_ids.tolist()) for i in range(len(self)))
            n_bytes = sum(len(data.removeprefix(self.tokenizer.prefix.encode())) for data in kept)
            self._bytes_per_token = self.store.bytes_per_token(n_bytes, self.n_targets)
        return self._bytes_per_token

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self.store.doc_ends[index])
        targets = torch.from_numpy(self.store[start : min(end, start + self.seq_len)])
        inputs = torch.cat([torch.tensor([self.tokenizer.bos_id]), targets[:-1]])
        return Sample(inputs, targets, None)

    def with_seq_len(self, seq_len):
        """Returns the same documents, cut at another length."""
        return WikiJsonlDataset(self.store, self.tokenizer, seq_len)

    def __str__(self):
        return f"{len(self)} documents of at most {self.seq_len} tokens"


class MixedDataset(ConcatDataset):
    """Several corpora (datasets of windows or rows). create_dataloader draws from each in proportion to its weight."""

    def __init__(self, corpora, weights):
        super().__init__(corpora)
        self.weights, self.seq_len = list(weights), corpora[0].seq_len
        self.pads = any(corpus.pads for corpus in corpora)

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text per target token, averaged with the weights by which the corpora are drawn."""
        tokens = [w * corpus.n_targets / len(corpus) for w, corpus in zip(self.weights, self.datasets)]
        return sum(n * corpus.bytes_per_token for n, corpus in zip(tokens, self.datasets)) / sum(tokens)

    def with_seq_len(self, seq_len):
        """Returns the same corpora with windows or rows of another length."""
        return MixedDataset([corpus.with_seq_len(seq_len) for corpus in self.datasets], self.weights)

    def __str__(self):
        return " + ".join(f"{w:g} x ({corpus})" for w, corpus in zip(self.weights, self.datasets))


def create_dataloader(dataset, batch_size, seed=0, shuffle=True, start=0, num_workers=0, pad_id=0, rank=0, world=1):
    """Returns a DataLoader of `collate_batch` dicts: rows rank, rank + world, ... of each batch of `batch_size` rows.

    With shuffle=True it is endless and starts after `start` samples. All batches are full and may span two epochs;
    batch k is the same for every num_workers. With shuffle=False it makes one pass in order, and the last batch may be
    smaller.
    """
    rows = getattr(dataset, "rows", dataset)  # RearrangedDataset and ShiftedDataset take a seed with each index
    if not shuffle:
        sampler = range(start, len(rows))
    elif isinstance(rows, MixedDataset):
        sampler = MixtureSampler([len(corpus) for corpus in rows.datasets], rows.weights, seed, start)
    else:
        sampler = EndlessSampler(len(rows), seed, start)
    if rows is not dataset:
        sampler = SeededIndices(sampler, seed, start)
    return DataLoader(
        dataset,
        batch_sampler=RankBatches(sampler, batch_size, rank, world),
        num_workers=num_workers,
        collate_fn=Collate(pad_id),
        worker_init_fn=leave_group,
        generator=torch.Generator().manual_seed(seed),  # else iter() draws from the global random state
    )


def leave_group(worker_id):
    """Moves a DataLoader worker out of the process group, so that Ctrl-C reaches the training process alone.

    That process may need more batches to finish its step, and stops its workers itself."""
    if hasattr(os, "setpgid"):  # Windows has no process groups
        os.setpgid(0, 0)


def prepare_data(data: DataConfig, vocab_size, seq_len, save_dir=None, files=None):
    """Returns (tokenizer, train_set, valid_set) for a DataConfig, with windows or rows of `seq_len` tokens.

    If no tokenizer is given, a SentencePiece model of vocab_size pieces is trained (None = ON_THE_SPOT_VOCAB). The
    actual vocabulary size is tokenizer.vocab_size. save_dir is a folder for a copy of the tokenizer. files is the
    result of `find_text`, if the caller already has it. Raises UserError for every problem with the input.
    """
    corpora, valid_files = files or find_text(data)
    fields = fields_of(data, corpora)
    valid_field = _record_fields(data) if data.records else data.text_field

    def store_of(files, field, part="whole", share=None):
        options = (field, data.strict, data.num_proc, data.cache_dir, part, share, data.max_doc_mb)
        return tokenize_corpus(files, tokenizer, *options)

    def rows_of(store, field):
        if isinstance(field, RecordFields):
            return RecordDataset(store, tokenizer, seq_len)
        if data.packing:
            return PackedDataset(store, seq_len, data.document_mask, (tokenizer.bos_id, tokenizer.eos_id))
        return WikiJsonlDataset(store, tokenizer, seq_len)

    if data.streaming:
        shards = Shards(
            corpora, fields if data.records else data.text_field, data.strict, not valid_files, data.max_doc_mb
        )
        tokenizer = _tokenizer_of(data, vocab_size, shards.sample(ON_THE_SPOT_BYTES, data.mixture))
    else:
        tokenizer = _tokenizer_of(data, vocab_size, *_text_for_tokenizer(data, corpora, fields, not valid_files))
    if data.fim_order is not None:
        tokenizer.suffix_first = data.fim_order == "spm"
    if save_dir is not None:
        tokenizer.save(save_dir)
    fim = FillInMiddle(tokenizer, data.fim_rate) if data.fim_rate else None
    if data.streaming:
        options = (data.mixture, data.document_mask, data.shuffle_buffer, fim)
        train_set = StreamingDataset(shards, tokenizer, seq_len, *options)
        held_back = functools.partial(store_of, field=valid_field)
        valid = store_of(valid_files, valid_field) if valid_files else shards.held_back_store(held_back, seq_len)
        warn_of_loss(valid.n_lost, valid.n_bytes)
        return tokenizer, train_set, rows_of(valid, valid_field)
    if valid_files:
        stores, valid = list(map(store_of, corpora, fields)), store_of(valid_files, valid_field)
    elif data.records:
        stores, valid = _split_records(store_of, corpora, fields, valid_field)
    else:
        stores, valid = _split_stores(store_of, corpora, data.text_field, tokenizer, seq_len)
    warn_of_loss(*(sum(getattr(store, name) for store in [*stores, valid]) for name in ("n_lost", "n_bytes")))
    sets = list(map(rows_of, stores, fields))
    train_set = MixedDataset(sets, data.mixture) if data.mixture else sets[0]
    if fim or data.shift_windows:
        train_set = RearrangedDataset(train_set, fim) if fim else ShiftedDataset(train_set)
    return tokenizer, train_set, rows_of(valid, valid_field)


def _record_fields(data):
    return RecordFields(data.question_field, data.answer_field)


def fields_of(data, corpora):
    """Returns how each corpus is read: the name of its text field, or RecordFields if it has records.

    In a mixture with records, the first record of a corpus decides. Raises UserError if none of them has records."""
    if not data.records:
        return [data.text_field] * len(corpora)
    records = _record_fields(data)
    if not data.mixture:
        return [records]
    are_records = [any(map(records.fit, files)) for files in corpora]
    if not any(are_records):
        raise UserError(f"none of the mixture's train_paths has {records}: correct --question_field and --answer_field")
    text = few(path for path, are in zip(data.train_paths, are_records) if not are)
    if text:
        print(f"the mixture has records, and plain text in {text}", file=sys.stderr)
    return [records if are else data.text_field for are in are_records]


def _of_held_back(corpora, fields):
    """Returns the corpora from which validation text is held back: those of records, or all if there are none."""
    return [files for files, field in zip(corpora, fields) if isinstance(field, RecordFields)] or corpora


def _text_for_tokenizer(data, corpora, fields, holds_back):
    """Returns the last three arguments of `_tokenizer_of` for the training text: (texts, settings of the key, files).

    Each corpus of a mixture gives text by its weight. Without validation files, some training documents are held back,
    which are then not part of the texts."""
    part, weights = "train" if holds_back else "whole", data.mixture or [1.0] * len(corpora)
    texts = []
    for files, field, weight in zip(corpora, fields, weights):
        is_split = files in _of_held_back(corpora, fields)
        size = ON_THE_SPOT_BYTES * weight / sum(weights)
        texts.append(sampled(files, field, part if is_split else "whole", data.max_doc_mb, size))
    own = map(content_key, corpora) if data.mixture else ()  # which corpus has which weight
    key = (fields if data.records else data.text_field, data.strict, part, *data.mixture, *own)
    return itertools.chain(*texts), sorted(set(itertools.chain(*corpora))), key


def first_records(data, vocab_size, seq_len, files, n):
    """Returns (tokenizer, RecordDataset of the first n records of `files` that fit)."""
    fields = [_record_fields(data)]
    tokenizer = _tokenizer_of(data, vocab_size, *_text_for_tokenizer(data, [files], fields, False))
    options = {"strict": data.strict, "num_proc": data.num_proc, "cache_dir": data.cache_dir}
    store = tokenize_corpus(files, tokenizer, *fields, **options, max_doc_mb=data.max_doc_mb)
    return tokenizer, RecordDataset(store, tokenizer, seq_len, most=n)


def find_text(data):
    """Returns (training files as one list per corpus, validation files) for a DataConfig."""
    suffixes = RECORD_SUFFIXES if data.records else SUFFIXES

    @functools.cache
    def find_valid():
        return find_files(data.valid_paths, suffixes)

    own = []
    if not data.train_paths:
        library, own = stdlib_files()
        corpora = [without(library, find_valid() if data.valid_paths else ())]
        print(f"no train_paths: using the Python standard library, {len(corpora[0])} files", file=sys.stderr)
    elif data.mixture:
        either = tuple(dict.fromkeys(SUFFIXES + suffixes))
        corpora = [find_files(path, either, find_valid) for path in data.train_paths]
        corpora = list(map(_record_fields(data).alike, corpora)) if data.records else corpora
    else:
        corpora = [find_files(data.train_paths, suffixes, find_valid)]
    if not data.valid_paths:
        return corpora, own
    _warn_of_training_text(find_valid(), sorted(set(itertools.chain(*corpora))))
    return corpora, find_valid()


def _warn_of_training_text(valid_files, train_files):
    """Warns about each validation file that is also a training file, or has the same content as one."""
    sizes = {os.path.getsize(path) for path in valid_files}
    train = [path for path in train_files if os.path.getsize(path) in sizes]  # other sizes cannot match
    names = {found[1:]: path for path, found in zip(train, fingerprint_files(train))}
    for path, found in zip(valid_files, fingerprint_files(valid_files)):
        if found[1:] in names:
            other = f" (as {names[found[1:]]})" if names[found[1:]] != path else ""
            why = "its loss will be too low"
            print(f"warning: validation file {path} is also training text{other}: {why}", file=sys.stderr)


def _split_records(store_of, corpora, fields, record_fields):
    """Returns (training stores, validation store); some records are held back for validation, but no plain text."""
    held = _of_held_back(corpora, fields)
    files = sorted(set(itertools.chain(*held)))
    share = hold_back_share(files)
    parts = (("train", share) if corpus in held else () for corpus in corpora)
    stores = [store_of(corpus, field, *part) for corpus, field, part in zip(corpora, fields, parts)]
    return stores, store_of(files, record_fields, "valid", share)


def _split_stores(store_of, corpora, field, tokenizer, seq_len):
    """Returns (training stores, validation store), made from text without validation files.

    Some documents are held back for validation; if there are too few, the end of the text is held back instead."""
    files = sorted(set(itertools.chain(*corpora)))
    share = hold_back_share(files)
    try:
        stores = [store_of(corpus, field, "train", share) for corpus in corpora]
        valid = store_of(files, field, "valid", share)
        if min(map(len, [*stores, valid])) > seq_len:
            return stores, valid
    except NoDocument:
        pass
    if len(corpora) > 1:
        raise UserError("the train_paths have too few documents to hold back some of each: set --valid_paths")
    whole = store_of(files, field)
    if len(whole) < 2 * (seq_len + 1):
        raise UserError(
            f"the text has {len(whole)} tokens, too few for a training and a validation window of {seq_len + 1}: "
            "use more text, set --valid_paths, or set a smaller max_seq_len"
        )
    n_valid = max(seq_len + 1, min(len(whole) // HOLD_BACK, MOST_VALID_TOKENS))
    print(f"too few documents to hold some back: using the last {n_valid} tokens for validation", file=sys.stderr)
    train, valid = whole.split(len(whole) - n_valid, tokenizer)
    return [train], valid


def _tokenizer_of(data, vocab_size, texts, files=None, settings=()):
    """Returns the configured tokenizer, or a SentencePiece model trained on `texts`.

    The cache key of the trained model is a hash of `files` and the settings by which they are read, or of `texts` if
    there are no files."""
    if data.tokenizer == "byte" and data.fim_rate:
        return ByteLevelTokenizer({"fill_in_the_middle": True})
    if data.sp_model is not None or data.tokenizer != "sentencepiece":
        return read_tokenizer(data.sp_model or data.tokenizer)
    vocab_size = vocab_size or ON_THE_SPOT_VOCAB
    if files is not None:
        key = content_key(files, "spm", *settings, vocab_size, data.max_doc_mb)
    else:
        texts = list(texts)
        key = f"{content_hash(chr(0).join(texts).encode()):016x}-{vocab_size}"
    return on_the_spot(texts, key, vocab_size, data.cache_dir, data.fim_rate > 0)
