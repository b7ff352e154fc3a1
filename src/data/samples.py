"""Rows of tokens and their targets: what data sets are made of, and how rows become a batch."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from src.losses import IGNORE


class Sample(NamedTuple):
    """One row. input_ids (T,) int64; target_ids (T,) int64, target_ids[t] follows input_ids[t], -100 is not counted;
    attention_mask (T,) int64 or None: the number of each token's document in the row, 1, 2, ..., 0 for padding."""

    input_ids: Int[Tensor, "t"]
    target_ids: Int[Tensor, "t"]
    attention_mask: Int[Tensor, "t"] | None


def window_sample(ids, documents=None, bos_eos=None):
    """Sample of T + 1 consecutive tokens `ids` (int64 array), the last of which is a target only.

    documents (T,) numbers the document of each target, in rising order; bos_eos: see PackedDataset.
    """
    ids = torch.from_numpy(ids)
    inputs, targets = ids[:-1], ids[1:].clone()
    if bos_eos is not None:
        bos_id, eos_id = bos_eos
        inputs = torch.where(inputs == eos_id, bos_id, inputs)
    # an EOS as input is the BOS of the document to which its target belongs
    return Sample(inputs, targets, None if documents is None else torch.from_numpy(documents - documents[0] + 1))


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
