"""Maths problems as plain tensors, in the form that Hugging Face's models take: for training code of your own.

train_trm_lm.py trains on the same rows with --records true.
"""

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from src.data.record_rows import RecordDataset
from src.losses import IGNORE


class MathDataset(Dataset):
    """Records (questions with answers) as rows of `max_length` tokens: BOS, prompt, answer, EOS, padding.

    Each item is a dict of tensors (max_length,) int64:

        input_ids         the tokens of the row, padded on the right
        attention_mask    1, or 0 at padding
        labels            input_ids where a token belongs to the answer or is its EOS, else -100. They are not shifted:
                          position t is to be predicted from the positions before it

    paths: files, globs or folders; question_field and answer_field: as in `read_records`. A record that does not fit is
    dropped and counted on stderr. More options are those of `tokenize_corpus`, such as cache_dir. Raises UserError if
    no record is left."""

    def __init__(self, paths, tokenizer, max_length, question_field=None, answer_field=None, **options):
        # the last token of a row is only a target in RecordDataset, and an input here
        self.rows = RecordDataset(paths, tokenizer, max_length - 1, question_field, answer_field, **options)
        self.max_length, self.pad_id = max_length, tokenizer.pad_id

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        inputs, targets, _ = self.rows[index]
        ids = torch.cat([inputs, targets[-1:]])
        gap = (0, self.max_length - len(ids))
        return {
            "input_ids": F.pad(ids, gap, value=self.pad_id),
            "attention_mask": F.pad(torch.ones_like(ids), gap),
            "labels": F.pad(targets, (1, gap[1]), value=IGNORE),
        }
