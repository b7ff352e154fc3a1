"""Fill-in-the-middle: rows from which a model learns to write the text between a prefix and a suffix.

A document is cut at two places, between characters, and its three parts change their order (arXiv:2207.14255). There
are two orders, "PSM" and "SPM":

    plain  BOS a document EOS
    psm    BOS <prefix> a do <suffix> ment <middle> cu EOS
    spm    BOS <prefix> <suffix> ment <middle> a do cu EOS

In the order spm, the middle directly continues the prefix, as in plain text. The paper calls this form variant 2, and
Code Llama reads it, too.

A model reads this from left to right as before, so it needs no other network and no other loss. Rows are rearranged
when a batch is made, so that another epoch cuts the same text elsewhere. Each part of a row that belongs to another
document is rearranged by itself, as if it were a whole document.

The tokens of a row are decoded, cut and encoded again, because a user's cursor can be inside a token: with cuts between
tokens only, a model would never see the pieces of tokens at such a place. The loss covers all tokens except the
sentinels, which a model never has to write; without this, it would begin half of its own texts with one. This departs
from the paper, which trains on all tokens.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from src.data.samples import Sample
from src.errors import UserError
from src.losses import IGNORE

LEAST_CHARS = 16  # shorter parts of a row stay plain: the sentinels would be most of their tokens


class FillInMiddle:
    """Rearranges rows for fill-in-the-middle, as the docstring of this module explains.

    rate: probability that a document, or the part of it that is in a row, is rearranged; 0 to 1. The order is that of
    the tokenizer, which keeps it because the model must be asked in the same one. Raises UserError if the tokenizer has
    no sentinels.
    """

    def __init__(self, tokenizer, rate):
        if tokenizer.fim is None:
            advice = "train one by train_tokenizer.py --fim true or train_spm.py --fim true, or use --tokenizer byte"
            raise UserError(f"fim_rate {rate} needs a tokenizer with the sentinels of fill-in-the-middle: {advice}")
        self.tokenizer, self.rate = tokenizer, rate

    def __call__(self, sample, seed, most):
        """Returns the rearranged Sample: at least as long as `sample`, and at most `most` tokens.

        The last document of the row is shortened to make room for the sentinels. seed (a tuple of ints) decides which
        documents are cut, and where. A row of which a part is not a target stays as it is.
        """
        targets = sample.target_ids.tolist()
        if IGNORE in targets:  # the last window of a text repeats the window before, of which it must not train again
            return sample
        tokenizer, first = self.tokenizer, int(sample.input_ids[0])
        draws = np.random.default_rng(seed)
        starts = first in (tokenizer.bos_id, tokenizer.eos_id)  # whether the row starts with the start of a document
        row = [first] if starts else []
        for part in _parts(targets if starts else [first, *targets], tokenizer.eos_id):
            if len(row) > most:
                break
            draw, *cuts = draws.random(3)
            new = self._rearranged(part, starts, cuts, most + 1 - len(row)) if draw < self.rate else None
            row += new or part
            starts = True
        return self._sample(row[: most + 1], len(targets), sample.attention_mask is not None)

    def _rearranged(self, part, starts, cuts, room):
        """Returns at most `room` tokens: a document with its end in front of its middle; None if it is too short.

        part: the document's tokens. starts: whether they begin with the document's first token. cuts: two numbers from
        0 to 1, where to cut. The document loses its end if there are too many tokens."""
        tokenizer = self.tokenizer
        begin = [tokenizer.bos_id] if tokenizer.add_bos and not starts else []  # generation starts with BOS, too
        while True:
            text = tokenizer.decode_bytes(part).decode(errors="ignore")  # a row may cut a character in two
            text = text.removeprefix(tokenizer.prefix) if starts else text
            if len(text) < LEAST_CHARS:
                return None
            a, b = sorted(int(cut * (len(text) + 1)) for cut in cuts)
            encode = tokenizer.encode_batch if starts else tokenizer.encode_inside
            prefix, (middle, suffix) = encode([text[:a]])[0], tokenizer.encode_inside([text[a:b], text[b:]])
            row = [*begin, *tokenizer.around(prefix, suffix), *middle, tokenizer.eos_id]
            if len(row) <= room:
                return row
            part = part[: max(0, len(part) - (len(row) - room))]

    def _sample(self, row, least, masks):
        """Returns the Sample of a row of tokens in which EOS ends each document, filled up to `least` tokens.

        masks: whether it has an attention_mask, which numbers the documents."""
        tokenizer, n_tokens = self.tokenizer, len(row) - 1
        row = torch.tensor(row + [tokenizer.pad_id] * (least - n_tokens))
        inputs, targets = row[:-1], row[1:].clone()
        is_start = inputs == tokenizer.eos_id
        targets[torch.isin(targets, torch.tensor(tokenizer.fim[:3]))] = IGNORE
        targets[n_tokens:] = IGNORE
        inputs = torch.where(is_start, tokenizer.bos_id, inputs)
        return Sample(inputs, targets, is_start.cumsum(0) + 1 - is_start[0].long() if masks else None)


def _parts(ids, eos_id):
    """Returns the documents of a row of tokens, each with its EOS; the last one may end without it."""
    ends = [at + 1 for at, index in enumerate(ids) if index == eos_id]
    parts = [ids[start:end] for start, end in zip([0, *ends], [*ends, len(ids)])]
    return [part for part in parts if part]


class RearrangedDataset(Dataset):
    """The rows of a training set, rearranged by a FillInMiddle: dataset[index, seed] is row `index` with that seed.

    rows: a PackedDataset, WikiJsonlDataset or MixedDataset, whose figures it keeps. bytes_per_token is therefore that
    of the plain text: the cuts make a small difference, which is neglected."""

    def __init__(self, rows, fim):
        self.rows, self.fim, self.seq_len, self.pads = rows, fim, rows.seq_len, rows.pads

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        index, seed = key
        return self.fim(self.rows[index], seed, self.seq_len)

    @property
    def bytes_per_token(self):
        return self.rows.bytes_per_token

    def with_seq_len(self, seq_len):
        """Returns the same text in rows of another length."""
        return RearrangedDataset(self.rows.with_seq_len(seq_len), self.fim)

    def __str__(self):
        return f"{self.rows}, {self.fim.rate:.0%} of the documents rearranged"
