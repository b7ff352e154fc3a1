"""One record per row: BOS, the prompt, the answer, EOS. The loss covers the answer and EOS."""

import sys

import numpy as np
from torch.utils.data import Dataset

from src.data.records import RecordFields
from src.data.samples import record_sample
from src.data.token_store import TokenStore, tokenize_corpus
from src.errors import UserError


class RecordDataset(Dataset):
    """Records of at most `seq_len` inputs, padded by `collate_batch`; longer ones are dropped, never cut.

    `paths` is as in `tokenize_corpus`, or a TokenStore made with a RecordFields. The prompt is tokenized by itself, so
    its tokens are those that generation starts from. most: keep only so many, the first ones. numbers (n,) int64 says
    which records are kept, from 0. Prints on stderr how many were dropped. Raises UserError if none is left.
    """

    pads = True

    def __init__(
        self, paths, tokenizer, seq_len, question_field=None, answer_field=None, most=None, report=True, **options
    ):
        fields = RecordFields(question_field, answer_field)
        self.store = paths if isinstance(paths, TokenStore) else tokenize_corpus(paths, tokenizer, fields, **options)
        self.tokenizer, self.seq_len, self.most = tokenizer, seq_len, most
        ends = self.store.doc_ends
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts + len(tokenizer.start([0])) - 2  # with BOS, and without EOS, which is only a target
        kept = np.flatnonzero(lengths <= seq_len)
        if not len(kept):
            raise UserError(
                f"none of the {len(ends)} records fits in max_seq_len {seq_len}: the shortest has {lengths.min()} "
                "tokens; raise max_seq_len"
            )
        if len(kept) < len(ends) and report:
            print(f"{len(ends) - len(kept)} of {len(ends)} records dropped: over {seq_len} tokens", file=sys.stderr)
        self.numbers = kept = kept[:most]
        # start of the prompt, of the answer, and end of each kept record in the store
        self._places = np.stack([starts, ends - self.store.last_tokens, ends], axis=1)[kept]
        self.n_targets, self._n_bytes = (
            int(sizes[kept].sum()) for sizes in (self.store.last_tokens, self.store.last_bytes)
        )

    def __len__(self):
        return len(self._places)

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of the answers per target token."""
        return self.store.bytes_per_token(self._n_bytes, self.n_targets)

    def __getitem__(self, index):
        start, answer, end = self._places[index].tolist()
        return record_sample(self.store[start:end].tolist(), answer - start, self.tokenizer)

    def prompt(self, index):
        """Returns the text of a record's prompt."""
        start, answer, _ = self._places[index].tolist()
        return self.tokenizer.decode(self.store[start:answer].tolist())

    def with_seq_len(self, seq_len):
        """Returns the same records without those that are longer than another length."""
        return RecordDataset(self.store, self.tokenizer, seq_len, most=self.most, report=seq_len != self.seq_len)

    def __str__(self):
        return f"{len(self)} records of at most {self.seq_len} tokens"
