"""Documents -> tokens -> windows -> batches.

1. `src.corpus` reads files as a stream of documents.
2. `src.token_store` keeps their tokens on disk, one flat stream with EOS after each document, keyed by the content of
   files and tokenizer, so the second time it is only opened; `TokenStore` is that stream, memory-mapped.
3. `PackedDataset` cuts it into full windows; `WikiJsonlDataset` is the padded form, one document per row.
4. `create_dataloader` makes batches, in an order that is a pure function of (seed, epoch, index).
5. `prepare_data` does all of it from `DataConfig`, the flags.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.config import UserError
from src.corpus import NoDocument, find_files, stdlib_files
from src.losses import IGNORE
from src.token_store import (
    HOLD_BACK,
    TokenStore,
    content_key,
    default_cache_dir,
    held_back,
    hold_back_share,
    text_bytes,
    tokenize_corpus,
)
from src.tokenizer import load_tokenizer, train_sentencepiece

MOST_VALID_TOKENS = 1_000_000  # of the tail that is held back where documents are few
ON_THE_SPOT_VOCAB = 4096
ON_THE_SPOT_BYTES = 10_000_000  # as much text is enough for a vocabulary, and takes seconds


class Sample(NamedTuple):
    """One row. input_ids (T,) int64; target_ids (T,) int64, target_ids[t] follows input_ids[t], -100 is not counted;
    attention_mask (T,) int64 or None: the number of each token's document in the row, 1, 2, ..., 0 for padding."""

    input_ids: Int[Tensor, "t"]
    target_ids: Int[Tensor, "t"]
    attention_mask: Int[Tensor, "t"] | None


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
        return self.store.n_bytes / self.n_targets

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        wanted = index % len(self) * self.seq_len
        start = min(wanted, self.n_targets - self.seq_len)
        ids = torch.from_numpy(self.store[start : start + self.seq_len + 1])
        targets = ids[1:].clone()
        targets[: wanted - start] = IGNORE
        mask = None
        if self.segment:  # an EOS as input is the BOS of the document to which its target belongs
            documents = self.store.documents_of(start + 1, start + 1 + self.seq_len)
            mask = torch.from_numpy(documents - documents[0] + 1)
        inputs = ids[:-1]
        if self.bos_eos is not None:
            bos_id, eos_id = self.bos_eos
            inputs = torch.where(inputs == eos_id, bos_id, inputs)
        return Sample(inputs, targets, mask)


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
            self._bytes_per_token = n_bytes / self.n_targets
        return self._bytes_per_token

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self.store.doc_ends[index])
        targets = torch.from_numpy(self.store[start : min(end, start + self.seq_len)])
        inputs = torch.cat([torch.tensor([self.tokenizer.bos_id]), targets[:-1]])
        return Sample(inputs, targets, None)


def collate_batch(samples, pad_id=0):
    """Samples -> {"input_ids", "target_ids"} (B, T) int64, padded on the right with pad_id and -100; "attention_mask"
    (B, T) int64, 0 = padding, only where a sample has one or lengths differ."""
    length = max(len(s.input_ids) for s in samples)
    needs_mask = any(s.attention_mask is not None or len(s.input_ids) < length for s in samples)
    masks = [torch.ones_like(s.input_ids) if s.attention_mask is None else s.attention_mask for s in samples]
    batch = {
        "input_ids": _stack([s.input_ids for s in samples], length, pad_id),
        "target_ids": _stack([s.target_ids for s in samples], length, IGNORE),
    }
    return batch | ({"attention_mask": _stack(masks, length, 0)} if needs_mask else {})


def _stack(rows, length, fill):
    out = torch.full((len(rows), length), fill, dtype=torch.int64)
    for row, values in zip(out, rows):
        row[: len(values)] = values
    return out


class EndlessSampler(Sampler):
    """Indices of epoch after epoch, each in an order of its own that depends on (seed, epoch) alone. `start` samples
    are taken as seen, so a resumed run goes on exactly where it was."""

    def __init__(self, n, seed=0, start=0):
        self.n, self.seed, self.start = n, seed, start

    def __iter__(self):
        epoch, position = divmod(self.start, self.n)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            yield from order[position:].tolist()
            epoch, position = epoch + 1, 0


def create_dataloader(dataset, batch_size, seed=0, shuffle=True, start=0, num_workers=0, pad_id=0):
    """DataLoader of `collate_batch` dicts. shuffle=True: endless, full batches across the ends of epochs, after `start`
    samples; batch k is the same for every num_workers. shuffle=False: one pass in order, the last batch may be small.
    """
    sampler = EndlessSampler(len(dataset), seed, start) if shuffle else range(start, len(dataset))
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_Collate(pad_id),
        persistent_workers=False,
        generator=torch.Generator().manual_seed(seed),  # so that making an iterator does not touch the global state
    )


class _Collate:
    """collate_batch with its pad_id, in a form that worker processes can be sent."""

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, samples):
        return collate_batch(samples, self.pad_id)


@dataclass
class DataConfig:
    """What is read, and how it becomes windows of tokens.

    Args:
        train_paths: files, globs, folders of .jsonl .jsonl.gz .parquet .txt .py; none = this Python's standard library
        valid_paths: validation text, likewise; none = a part of the training text that is held back
        text_field: name of the text field (jsonl) or column (parquet)
        tokenizer: sentencepiece, byte, or the path of a tokenizer.json, a .model or a checkpoint folder
        sp_model: SentencePiece .model file (from train_spm.py); none = one is trained on the spot
        document_mask: keep attention inside documents
        packing: cut the joined documents into full windows; false = one document per row, padded
        strict: a bad line of a data file is an error, not skipped
        num_workers: processes that load batches; 0 = the training process itself
        num_proc: processes that tokenize; they share the files
        cache_dir: folder for tokenized text; none = $HF_DATASETS_CACHE or ~/.cache/generative-trm
    """

    train_paths: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    tokenizer: str = "sentencepiece"
    sp_model: str | None = None
    document_mask: bool = False
    packing: bool = True
    strict: bool = False
    num_workers: int = 0
    num_proc: int = 1
    cache_dir: str | None = None

    def __post_init__(self):
        if self.sp_model is not None and self.tokenizer != "sentencepiece":
            raise ValueError(f"sp_model is for tokenizer sentencepiece, not {self.tokenizer}: leave out one of the two")
        if self.num_workers < 0 or self.num_proc < 1:
            raise ValueError("num_workers must be 0 or more, num_proc 1 or more")
        if self.document_mask and not self.packing:
            raise ValueError("document_mask needs packing: with packing false a row holds one document anyway")


def prepare_data(data, vocab_size, seq_len, save_dir=None):
    """(tokenizer, train_set, valid_set) of a DataConfig; windows or rows of `seq_len` tokens.

    vocab_size is the size of a SentencePiece model that is trained on the spot (None = ON_THE_SPOT_VOCAB); the
    vocabulary in use is tokenizer.vocab_size. save_dir: a folder that the tokenizer's file is written to. Raises
    UserError for every fault of the input.
    """
    train_files, valid_files = _train_and_valid_files(data)
    is_split = not valid_files  # validation documents come out of the training files
    tokenizer = _tokenizer_of(data, train_files, "train" if is_split else "whole", vocab_size)
    if save_dir is not None:
        tokenizer.save(save_dir)

    def store_of(files, part="whole"):
        return tokenize_corpus(files, tokenizer, data.text_field, data.strict, data.num_proc, data.cache_dir, part)

    def rows_of(store):
        if data.packing:
            return PackedDataset(store, seq_len, data.document_mask, (tokenizer.bos_id, tokenizer.eos_id))
        return WikiJsonlDataset(store, tokenizer, seq_len)

    if is_split:
        train, valid = _split_stores(store_of, train_files, tokenizer, seq_len)
    else:
        train, valid = store_of(train_files), store_of(valid_files)
    return tokenizer, rows_of(train), rows_of(valid)


def _train_and_valid_files(data):
    if not data.train_paths:
        train_files, valid_files = stdlib_files()
        print(f"no train_paths: the Python standard library, {len(train_files)} files", file=sys.stderr)
    else:
        train_files, valid_files = find_files(data.train_paths), []
    return train_files, find_files(data.valid_paths) if data.valid_paths else valid_files


def _split_stores(store_of, files, tokenizer, seq_len):
    """Training and validation text by document; where documents are too few for that, the tail of the text."""
    try:
        train, valid = store_of(files, "train"), store_of(files, "valid")
        if min(len(train), len(valid)) > seq_len:
            return train, valid
    except NoDocument:
        pass
    whole = store_of(files)
    if len(whole) < 2 * (seq_len + 1):
        raise UserError(
            f"the text has {len(whole)} tokens, too few for a training and a validation window of {seq_len + 1}: "
            "give more text, --valid_paths, or a smaller max_seq_len"
        )
    n_valid = max(seq_len + 1, min(len(whole) // HOLD_BACK, MOST_VALID_TOKENS))
    print(f"too few documents to hold some back: the last {n_valid} tokens are for validation", file=sys.stderr)
    return whole.split(len(whole) - n_valid, tokenizer)


def _tokenizer_of(data, files, part, vocab_size):
    if data.sp_model is not None or data.tokenizer != "sentencepiece":
        return load_tokenizer(data.sp_model or data.tokenizer)
    vocab_size = vocab_size or ON_THE_SPOT_VOCAB
    key = content_key(files, "spm", data.text_field, data.strict, part, vocab_size)
    prefix = os.path.join(data.cache_dir or default_cache_dir(), f"spm-{key}")
    if not Path(f"{prefix}.model").exists():
        print(f"training a SentencePiece model of {vocab_size} pieces on the training text", file=sys.stderr)
        train_sentencepiece(_sampled(files, data.text_field, part), prefix, vocab_size)
    return load_tokenizer(f"{prefix}.model")


def _sampled(files, text_field, part):
    """Pieces of the training documents from all over the corpus, about ON_THE_SPOT_BYTES of them."""
    share = min(1.0, ON_THE_SPOT_BYTES / max(1, text_bytes(files)))
    for number, (piece, _) in enumerate(_any_part(files, text_field, part)):
        if int((number + 1) * share) > int(number * share):
            yield piece


def _any_part(files, text_field, part):
    """One part of the documents, or all where they are too few to be parted."""
    try:
        yield from held_back(files, text_field, part=part, share=hold_back_share(files), report=False)
    except NoDocument:
        yield from held_back(files, text_field, report=False)
