"""The loader of training batches: one for tokenized sets and streams, and resumable at any batch."""

import functools
import warnings

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from src.data.stream import RankStream, StreamingDataset
from src.dataset import create_dataloader, leave_group
from src.errors import UserError


def create_train_loader(train_set, batch_size, seed=0, rank=0, world=1, num_workers=0, pad_id=0):
    """Endless iterator over training batches: `collate_batch` dicts of this rank's batch_size / world rows.

    train_set is tokenized (PackedDataset, WikiJsonlDataset, MixedDataset) or a StreamingDataset. Of the first kind,
    rank r has rows r, r + world, ... of the batch that one process would have. Both have

        samples            rows given so far, over all ranks
        epoch              how often the text was read whole; of a stream, by the process that gave the last batch
        state_dict()       numbers, strings, lists and dicts; of a stream, each rank has its own
        load_state_dict()  goes on after the last batch that was given

    A state fits a loader of another batch_size: it goes on with the next rows. And one of another seq_len (train_set is
    `train_set.with_seq_len(...)`): a tokenized set goes on after the same part of an epoch, a stream after the same
    number of tokens of the block that it shuffles. A tokenized set moves between any number of ranks and workers; a
    stream is dealt to its readers, and raises UserError for a state of other ones.
    """
    if isinstance(train_set, StreamingDataset):
        return StreamLoader(train_set, batch_size, seed, rank, world, num_workers)
    return IndexLoader(train_set, batch_size, seed, rank, world, num_workers, pad_id)


class IndexLoader:
    """The training loader of a tokenized set: sample k is known by k, so that the position is all its state."""

    def __init__(self, train_set, batch_size, seed=0, rank=0, world=1, num_workers=0, pad_id=0):
        self.train_set, self.batch_size, self.samples, self._batches = train_set, batch_size, 0, None
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
            raise UserError("the saved run was streaming: go on with --streaming true")
        self.samples, self._batches = state["samples"] * len(self.train_set) // state["epoch_samples"], None


class StreamLoader:
    """The training loader of a StreamingDataset; batch k of a rank comes from its loading process k % num_workers.

    Raises UserError for a file that cannot be read on; then it is of no more use, and the last state is to be resumed.
    """

    def __init__(self, train_set, batch_size, seed=0, rank=0, world=1, num_workers=0):
        self.batch_size, self.samples, self.epoch, self._batches = batch_size, 0, 0, None
        self._reads = train_set.identity | {"seed": seed, "processes": world, "rank": rank, "num_workers": num_workers}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's own affair
            self._loader = StatefulDataLoader(
                RankStream(train_set, batch_size // world, seed, rank, world),
                batch_size=None,
                num_workers=num_workers,
                collate_fn=_unchanged,
                worker_init_fn=leave_group,
                generator=torch.Generator().manual_seed(seed),  # so that the global state is not touched
            )

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            try:
                self._batches = iter(self._loader)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
                raise UserError(
                    f"the stream's position is no such thing ({error!r}): go on from another checkpoint"
                ) from None
        batch, self.epoch = next(self._batches)
        if isinstance(batch, str):
            self._batches = self._loader = None  # the processes end now, not when the error is forgotten
            raise UserError(batch)
        self.samples += self.batch_size
        return batch

    def state_dict(self):
        return {"samples": self.samples, "epoch": self.epoch, "reads": self._reads, "loader": self._loader.state_dict()}

    def load_state_dict(self, state):
        if "reads" not in state:
            raise UserError("the saved run was not streaming: go on with --streaming false")
        for name, now in self._reads.items():
            if state["reads"][name] != now:
                raise UserError(
                    f"{name} was {state['reads'][name]} in the saved run and is {now} now: a stream goes on only as it "
                    "was dealt to its readers; set it back"
                )
        self.samples, self.epoch, self._batches = state["samples"], state["epoch"], None
        self._loader.load_state_dict(state["loader"])


def _unchanged(batch):
    return batch
