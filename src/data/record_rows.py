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
    its tokens are those that generation starts from. Prints on stderr how many records were dropped. Raises UserError
    if none is left.
    """

    def __init__(self, paths, tokenizer, seq_len, question_field=None, answer_field=None, report=True, **options):
        fields = RecordFields(question_field, answer_field)
        self.store = paths if isinstance(paths, TokenStore) else tokenize_corpus(paths, tokenizer, fields, **options)
        self.tokenizer, self.seq_len = tokenizer, seq_len
        ends = self.store.doc_ends
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts + len(tokenizer.start([0])) - 2  # with BOS, and without EOS, which is only a target
        is_kept = lengths <= seq_len
        self.n_dropped = len(ends) - int(is_kept.sum())
        if self.n_dropped == len(ends):
            raise UserError(
                f"none of the {len(ends)} records fits in max_seq_len {seq_len}: the shortest has {lengths.min()} "
                "tokens; raise max_seq_len"
            )
        if self.n_dropped and report:
            print(f"{self.n_dropped} of {len(ends)} records dropped: over {seq_len} tokens", file=sys.stderr)
        # start of the prompt, of the answer, and end of each kept record in the store
        self._places = np.stack([starts, ends - self.store.last_tokens, ends], axis=1)[is_kept]
        self.n_targets, self._n_bytes = (
            int(sizes[is_kept].sum()) for sizes in (self.store.last_tokens, self.store.last_bytes)
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
        return RecordDataset(self.store, self.tokenizer, seq_len, report=seq_len != self.seq_len)

    def __str__(self):
        return f"{len(self)} records of at most {self.seq_len} tokens"
