"""Documents -> tokens -> windows -> batches.

1. `src.data.corpus` reads files as a stream of documents.
2. `src.data.token_store` keeps their tokens on disk, one flat stream with EOS after each document, keyed by the content
   of files and tokenizer, so the second time it is only opened; `TokenStore` is that stream, memory-mapped.
3. `PackedDataset` cuts it into full windows; `WikiJsonlDataset` is the padded form, one document per row;
   `MixedDataset` is several corpora, drawn from by weight.
4. `create_dataloader` makes batches, in an order that is a pure function of (seed, epoch, index).
5. `prepare_data` does all of it from `DataConfig`, the flags.

`src.data.samples` has the rows of 3, `src.data.order` the orders of 4. `src.data.stream` reads while training what is
too large for 2; training takes its batches from `src.data.loader`.
"""

import itertools
import os
import sys

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from src.data.corpus import NoDocument, content_hash, find_files, fingerprint_files, stdlib_files
from src.data.order import EndlessSampler, MixtureSampler, RankBatches
from src.data.samples import Sample, collate_batch, window_sample
from src.data.stream import Shards, StreamingDataset
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
from src.errors import UserError
from src.losses import IGNORE
from src.tokenizer import read_tokenizer, warn_of_loss
from src.training.train_config import DataConfig

MOST_VALID_TOKENS = 1_000_000  # of the tail that is held back where documents are few


class PackedDataset(Dataset):
    """Full windows of a TokenStore, `seq_len` inputs each: every token after the first is a target exactly once.

    Nothing is padded: the last window ends with the store, and its targets that the window before already had are
    -100. The EOS between two documents is a target as EOS and an input as BOS (where bos_eos gives both ids): a model
    learns to begin from BOS. segment=True numbers the documents within the window in attention_mask, which keeps
    attention inside them.
    Raises UserError for a store that is shorter than one window.
    """

    def __init__(self, store, seq_len, segment=False, bos_eos=None):
        if len(store) < seq_len + 1:
            raise UserError(
                f"the text has {len(store)} tokens, one window needs {seq_len + 1}: "
                "give more text or a smaller max_seq_len"
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
        wanted = index % len(self) * self.seq_len
        start = min(wanted, self.n_targets - self.seq_len)
        stop = start + self.seq_len + 1
        documents = self.store.documents_of(start + 1, stop) if self.segment else None
        sample = window_sample(self.store[start:stop], documents, self.bos_eos)
        sample.target_ids[: wanted - start] = IGNORE
        return sample

    def with_seq_len(self, seq_len):
        """The same text in windows of another length."""
        return PackedDataset(self.store, seq_len, self.segment, self.bos_eos)

    def __str__(self):
        return f"{len(self)} windows of {self.seq_len} tokens"


class WikiJsonlDataset(Dataset):
    """One document per row, cut at `seq_len`, for padding in `collate_batch`: BOS and the text in, text and EOS out.

    `paths` as in `tokenize_corpus`, or a TokenStore.
    """

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
        """UTF-8 bytes of the text that is kept per target token."""
        if self._bytes_per_token is None:
            kept = (self[i].target_ids.tolist() for i in range(len(self)))
            n_bytes = sum(len(self.tokenizer.decode_bytes(ids)) for ids in kept)
            self._bytes_per_token = self.store.bytes_per_token(n_bytes, self.n_targets)
        return self._bytes_per_token

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self.store.doc_ends[index])
        targets = torch.from_numpy(self.store[start : min(end, start + self.seq_len)])
        inputs = torch.cat([torch.tensor([self.tokenizer.bos_id]), targets[:-1]])
        return Sample(inputs, targets, None)

    def with_seq_len(self, seq_len):
        """The same documents, cut at another length."""
        return WikiJsonlDataset(self.store, self.tokenizer, seq_len)

    def __str__(self):
        return f"{len(self)} documents of at most {self.seq_len} tokens"


class MixedDataset(ConcatDataset):
    """Several corpora (datasets of windows or rows), of which create_dataloader draws each by its weight."""

    def __init__(self, corpora, weights):
        super().__init__(corpora)
        self.weights, self.seq_len = list(weights), corpora[0].seq_len

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text per target token, as the corpora are drawn."""
        tokens = [w * corpus.n_targets / len(corpus) for w, corpus in zip(self.weights, self.datasets)]
        return sum(n * corpus.bytes_per_token for n, corpus in zip(tokens, self.datasets)) / sum(tokens)

    def with_seq_len(self, seq_len):
        """The same corpora at another length."""
        return MixedDataset([corpus.with_seq_len(seq_len) for corpus in self.datasets], self.weights)

    def __str__(self):
        return " + ".join(f"{w:g} x ({corpus})" for w, corpus in zip(self.weights, self.datasets))


def create_dataloader(dataset, batch_size, seed=0, shuffle=True, start=0, num_workers=0, pad_id=0, rank=0, world=1):
    """DataLoader of `collate_batch` dicts: rows rank, rank + world, ... of each batch of `batch_size` rows.

    shuffle=True: endless, full batches across the ends of epochs, after `start` samples; batch k is the same for every
    num_workers. shuffle=False: one pass in order, the last batch may be small.
    """
    if not shuffle:
        sampler = range(start, len(dataset))
    elif isinstance(dataset, MixedDataset):
        sampler = MixtureSampler([len(corpus) for corpus in dataset.datasets], dataset.weights, seed, start)
    else:
        sampler = EndlessSampler(len(dataset), seed, start)
    return DataLoader(
        dataset,
        batch_sampler=RankBatches(sampler, batch_size, rank, world),
        num_workers=num_workers,
        collate_fn=_Collate(pad_id),
        worker_init_fn=leave_group,
        generator=torch.Generator().manual_seed(seed),  # so that making an iterator does not touch the global state
    )


def leave_group(worker_id):
    """In a loading process: Ctrl-C, or a signal to the whole group, asks the training process alone to end; it may want
    more batches until its step is done, and ends its loading processes itself."""
    if hasattr(os, "setpgid"):  # Windows has no such groups
        os.setpgid(0, 0)


class _Collate:
    """collate_batch with its pad_id, in a form that worker processes can be sent."""

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, samples):
        return collate_batch(samples, self.pad_id)


def prepare_data(data: DataConfig, vocab_size, seq_len, save_dir=None, files=None):
    """(tokenizer, train_set, valid_set) of a DataConfig; windows or rows of `seq_len` tokens.

    vocab_size is the size of a SentencePiece model that is trained on the spot (None = ON_THE_SPOT_VOCAB); the
    vocabulary in use is tokenizer.vocab_size. save_dir: a folder that the tokenizer's file is written to; files: what
    `find_text` found, where it was asked before. Raises UserError for every fault of the input.
    """
    corpora, valid_files = files or find_text(data)
    files = sorted(set(itertools.chain(*corpora)))
    part = "whole" if valid_files else "train"  # else validation documents come out of the training files
    if data.streaming:
        shards = Shards(corpora, data.text_field, data.strict, not valid_files, data.max_doc_mb)
        tokenizer = _tokenizer_of(data, vocab_size, (piece for piece, _ in shards.heads(ON_THE_SPOT_BYTES)))
    else:
        tokenizer = _tokenizer_of(data, vocab_size, sampled(files, data.text_field, part, data.max_doc_mb), files, part)
    if save_dir is not None:
        tokenizer.save(save_dir)

    def store_of(files, part="whole", share=None):
        options = (data.text_field, data.strict, data.num_proc, data.cache_dir, part, share, data.max_doc_mb)
        return tokenize_corpus(files, tokenizer, *options)

    def rows_of(store):
        if data.packing:
            return PackedDataset(store, seq_len, data.document_mask, (tokenizer.bos_id, tokenizer.eos_id))
        return WikiJsonlDataset(store, tokenizer, seq_len)

    if data.streaming:
        train_set = StreamingDataset(shards, tokenizer, seq_len, data.mixture, data.document_mask, data.shuffle_buffer)
        valid = store_of(valid_files) if valid_files else shards.held_back_store(store_of, seq_len)
        warn_of_loss(valid.n_lost, valid.n_bytes)
        return tokenizer, train_set, rows_of(valid)
    if valid_files:
        stores, valid = [store_of(corpus) for corpus in corpora], store_of(valid_files)
    else:
        stores, valid = _split_stores(store_of, corpora, files, tokenizer, seq_len)
    warn_of_loss(*(sum(getattr(store, name) for store in [*stores, valid]) for name in ("n_lost", "n_bytes")))
    sets = [rows_of(store) for store in stores]
    return tokenizer, MixedDataset(sets, data.mixture) if data.mixture else sets[0], rows_of(valid)


def find_text(data):
    """(training files, a list per corpus; validation files) of a DataConfig."""
    if not data.train_paths:
        train_files, valid_files = stdlib_files()
        print(f"no train_paths: the Python standard library, {len(train_files)} files", file=sys.stderr)
        corpora = [train_files]
    else:
        corpora = [find_files(path) for path in data.train_paths] if data.mixture else [find_files(data.train_paths)]
        valid_files = []
    if not data.valid_paths:
        return corpora, valid_files
    valid_files = find_files(data.valid_paths)
    _warn_of_training_text(valid_files, sorted(set(itertools.chain(*corpora))))
    return corpora, valid_files


def _warn_of_training_text(valid_files, train_files):
    """Say by name which validation files are training files too, or have the content of one."""
    sizes = {os.path.getsize(path) for path in valid_files}
    train = [path for path in train_files if os.path.getsize(path) in sizes]  # others need not be opened
    names = {found[1:]: path for path, found in zip(train, fingerprint_files(train))}
    for path, found in zip(valid_files, fingerprint_files(valid_files)):
        if found[1:] in names:
            also = f" (there {names[found[1:]]})" if names[found[1:]] != path else ""
            why = "is training text too, so that its loss is no measure"
            print(f"warning: validation file {path}{also} {why}", file=sys.stderr)


def _split_stores(store_of, corpora, files, tokenizer, seq_len):
    """Training stores and validation store by document; where documents are too few, by the end of the text."""
    share = hold_back_share(files)
    try:
        stores, valid = [store_of(corpus, "train", share) for corpus in corpora], store_of(files, "valid", share)
        if min(map(len, [*stores, valid])) > seq_len:
            return stores, valid
    except NoDocument:
        pass
    if len(corpora) > 1:
        raise UserError("the train_paths have too few documents to hold some of each back: give --valid_paths")
    whole = store_of(files)
    if len(whole) < 2 * (seq_len + 1):
        raise UserError(
            f"the text has {len(whole)} tokens, too few for a training and a validation window of {seq_len + 1}: "
            "give more text, --valid_paths, or a smaller max_seq_len"
        )
    n_valid = max(seq_len + 1, min(len(whole) // HOLD_BACK, MOST_VALID_TOKENS))
    print(f"too few documents to hold some back: the last {n_valid} tokens are for validation", file=sys.stderr)
    train, valid = whole.split(len(whole) - n_valid, tokenizer)
    return [train], valid


def _tokenizer_of(data, vocab_size, texts, files=None, part=None):
    """The tokenizer that is asked for; or one trained on `texts`, kept by the content of `files`, else of the texts."""
    if data.sp_model is not None or data.tokenizer != "sentencepiece":
        return read_tokenizer(data.sp_model or data.tokenizer)
    vocab_size = vocab_size or ON_THE_SPOT_VOCAB
    if files is not None:
        key = content_key(files, "spm", data.text_field, data.strict, part, vocab_size, data.max_doc_mb)
    else:
        texts = list(texts)
        key = f"{content_hash(chr(0).join(texts).encode()):016x}-{vocab_size}"
    return on_the_spot(texts, key, vocab_size, data.cache_dir)
