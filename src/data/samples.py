"""Samples (rows of tokens with their targets), and how they are collated into a batch."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from src.losses import IGNORE


class Sample(NamedTuple):
    """One row of T tokens.

    input_ids (T,) int64
    target_ids (T,) int64: target_ids[t] is the token after input_ids[t]; the loss ignores -100
    attention_mask (T,) int64 or None: number of each token's document within the row: 1, 2, ...; 0 is padding"""

    input_ids: Int[Tensor, "t"]
    target_ids: Int[Tensor, "t"]
    attention_mask: Int[Tensor, "t"] | None


def window_sample(ids, documents=None, bos_eos=None):
    """Returns the Sample of T + 1 consecutive tokens `ids` (int64 array); the last token is only a target.

    documents (T,) holds the document number of each target, ascending. If bos_eos = (BOS id, EOS id) is given, each EOS
    in the input is replaced by BOS, as PackedDataset explains.
    """
    ids = torch.from_numpy(ids)
    inputs, targets = ids[:-1], ids[1:].clone()
    if bos_eos is not None:
        bos_id, eos_id = bos_eos
        inputs = torch.where(inputs == eos_id, bos_id, inputs)
    # An EOS in the input acts as the BOS of the next document, so each input belongs to the document of its target.
    return Sample(inputs, targets, None if documents is None else torch.from_numpy(documents - documents[0] + 1))


def record_sample(ids, n_prompt, tokenizer):
    """Returns the Sample of a record: ids are the tokens of its prompt (the first n_prompt), its answer and EOS.

    BOS comes first if the model's texts start with it. The loss covers the answer and EOS, not the prompt."""
    row = torch.tensor(tokenizer.start(list(ids)))
    targets = row[1:].clone()
    targets[: len(row) - len(ids) + n_prompt - 1] = IGNORE
    return Sample(row[:-1], targets, None)


def collate_batch(samples, pad_id=0):
    """Collates samples into {"input_ids", "target_ids"} (B, T) int64, padded on the right with pad_id and -100.

    Adds "attention_mask" (B, T) int64, 0 = padding, if a sample has a mask or the lengths differ."""
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
