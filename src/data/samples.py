"""Samples (rows of tokens with their targets), how they are collated into a batch, and how a text becomes a row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from src.losses import IGNORE

QUERY_MARKER = "# ---- current file ----"  # a line between the retrieved code and the file that is being written


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


class Collate:
    """`collate_batch` with its pad_id, as an object that can be pickled for worker processes."""

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, samples):
        return collate_batch(samples, self.pad_id)


def prepare_code_input(context: str, query: str, query_marker: str = QUERY_MARKER) -> str:
    """Returns the text for a model that continues `query` after it has read `context`, code from other files.

    Each part starts on a line of its own, and the marker is the line between them. Without context, the text is the
    query alone."""
    if not context:
        return query
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in (context, query_marker) if part) + query


def pad_sequence(
    sequence: Sequence[int],
    max_len: int,
    pad_id: int = 0,
    pad: str = "right",
    truncate: str = "right",
) -> tuple[Int[Tensor, "t"], Int[Tensor, "t"]]:
    """Returns (ids, attention mask) of exactly `max_len` tokens; the mask is 0 at padding.

    pad: the side where a short sequence gets pad_id. truncate: the side where a long sequence loses tokens."""
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}: set it to 1 or more")
    for name, side in (("pad", pad), ("truncate", truncate)):
        if side not in ("left", "right"):
            raise ValueError(f"{name} is {side!r}: choose left or right")
    kept = list(sequence[-max_len:] if truncate == "left" else sequence[:max_len])
    fill, ones = [pad_id] * (max_len - len(kept)), [1] * len(kept)
    gaps = [0] * len(fill)
    ids, mask = (fill + kept, gaps + ones) if pad == "left" else (kept + fill, ones + gaps)
    return torch.tensor(ids), torch.tensor(mask)


def tokenize_and_pad(
    tokenizer,
    text: str,
    max_seq_len: int,
    bos: bool = True,
    eos: bool = False,
    pad: str = "right",
    truncate: str = "left",
) -> tuple[Int[Tensor, "t"], Int[Tensor, "t"]]:
    """Returns (ids, attention mask) of a text as a row of exactly `max_seq_len` tokens; see `pad_sequence`.

    bos, eos: add them as `tokenizer.encode` does. They are never cut off: a long text loses only tokens of its own. By
    default it loses its start, because the end is what a model continues."""
    ids, end = tokenizer.encode(text), [tokenizer.eos_id] * eos
    start = [tokenizer.bos_id] * (tokenizer.start(ids) != ids) if bos else []
    room = max_seq_len - len(start) - len(end)
    if room < 0:
        raise ValueError(f"max_seq_len is {max_seq_len}: set it to {len(start) + len(end)} or more, for BOS and EOS")
    kept = ids[len(ids) - min(room, len(ids)) :] if truncate == "left" else ids[:room]
    return pad_sequence(start + kept + end, max_seq_len, tokenizer.pad_id, pad, truncate)
