"""Loaders of training batches, for tokenized sets and for streams. Both can resume at any batch."""

import functools
import warnings

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from src.data.stream import RankStream, StreamingDataset
from src.dataset import create_dataloader, leave_group
from src.errors import UserError


def create_train_loader(train_set, batch_size, seed=0, rank=0, world=1, num_workers=0, pad_id=0):
    """Returns an endless iterator over training batches: `collate_batch` dicts of this rank's batch_size / world rows.

    train_set is tokenized (PackedDataset, WikiJsonlDataset, MixedDataset) or a StreamingDataset. With a tokenized set,
    rank r gets rows r, r + world, ... of the batch that a single process would get. Both kinds of loader have

        samples            number of rows so far, over all ranks
        epoch              number of finished passes over the text; with a stream, those of the process that made the
                           last batch
        state_dict()       numbers, strings, lists and dicts; with a stream, it differs between ranks
        load_state_dict()  continues after the last batch before the state was taken

    A state may be loaded with another batch_size: the loader continues with the next row. It may also be loaded with
    another seq_len (`train_set.with_seq_len(...)`): a tokenized set continues at the same fraction of an epoch, and a
    stream after the same number of tokens of its current shuffle block.

    The numbers of ranks and workers may change with a tokenized set. With a stream they may not, because they decide
    which process reads which text; load_state_dict then raises UserError.
    """
    if isinstance(train_set, StreamingDataset):
        return StreamLoader(train_set, batch_size, seed, rank, world, num_workers)
    return IndexLoader(train_set, batch_size, seed, rank, world, num_workers, pad_id)


class IndexLoader:
    """Training loader of a tokenized set.

    Sample k depends only on (seed, k), so the number of samples so far is the whole state."""

    def __init__(self, train_set, batch_size, seed=0, rank=0, world=1, num_workers=0, pad_id=0):
        self.train_set, self.batch_size, self.samples = train_set, batch_size, 0
        self._batches = None  # made by the first __next__, because load_state_dict may change the start
        options = {"seed": seed, "num_workers": num_workers, "pad_id": pad_id, "rank": rank, "world": world}
        self._load = functools.partial(create_dataloader, train_set, batch_size, **options)

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            self._batches = iter(self._load(start=self.samples))
        batch = next(self._batches)
        self.samples += self.batch_size
        return batch

    @property
    def epoch(self):
        return self.samples // len(self.train_set)

    def state_dict(self):
        return {"samples": self.samples, "epoch_samples": len(self.train_set)}

    def load_state_dict(self, state):
        if "epoch_samples" not in state:
            raise UserError("the saved run was streaming: resume it with --streaming true")
        # the same fraction of an epoch, if another seq_len gives another number of windows
        self.samples = state["samples"] * len(self.train_set) // state["epoch_samples"]
        self._batches = None


class StreamLoader:
    """Training loader of a StreamingDataset. Batch k of a rank is made by its worker process k % num_workers.

    Raises UserError if a file can no longer be read. The loader is unusable after that: resume from the last state.
    """

    def __init__(self, train_set, batch_size, seed=0, rank=0, world=1, num_workers=0):
        self.batch_size, self.samples, self.epoch = batch_size, 0, 0
        self._batches = None
        # these values decide which windows this rank reads, so a resumed run must have the same ones
        self._reads = train_set.identity | {"seed": seed, "processes": world, "rank": rank, "num_workers": num_workers}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata uses it internally
            self._loader = StatefulDataLoader(
                RankStream(train_set, batch_size // world, seed, rank, world),
                batch_size=None,
                num_workers=num_workers,
                collate_fn=_unchanged,
                worker_init_fn=leave_group,
                generator=torch.Generator().manual_seed(seed),  # else it draws from the global random state
            )

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            try:
                self._batches = iter(self._loader)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
                raise UserError(
                    f"the stream position in the checkpoint is invalid ({error!r}): resume from another checkpoint"
                ) from None
        batch, self.epoch = next(self._batches)
        if isinstance(batch, str):
            self._batches = self._loader = None  # ends the workers now, not when the exception is garbage-collected
            raise UserError(batch)
        self.samples += self.batch_size
        return batch

    def state_dict(self):
        return {"samples": self.samples, "epoch": self.epoch, "reads": self._reads, "loader": self._loader.state_dict()}

    def load_state_dict(self, state):
        if "reads" not in state:
            raise UserError("the saved run was not streaming: resume it with --streaming false")
        for name, now in self._reads.items():
            if state["reads"][name] != now:
                raise UserError(
                    f"{name} was {state['reads'][name]} in the saved run and is {now} now: a stream resumes only with "
                    "the same files, settings and processes; restore the old value"
                )
        self.samples, self.epoch, self._batches = state["samples"], state["epoch"], None
        self._loader.load_state_dict(state["loader"])


def _unchanged(batch):
    return batch
