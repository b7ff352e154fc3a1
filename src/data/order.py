"""The order of training samples. It is a function of (seed, sample number), so reading can start at any sample."""

import itertools

import numpy as np
from torch.utils.data import Sampler

from src.runtime import mix_seed

DRAWS = 10_000  # in each block of this many draws from a mixture, the shares are exact up to one window


class EndlessSampler(Sampler):
    """Yields the indices 0 ... n - 1 in a new order each epoch, which depends on (seed, epoch) alone.

    Skips the first `start` samples, so a resumed run continues exactly where it stopped."""

    def __init__(self, n, seed=0, start=0):
        self.n, self.seed, self.start = n, seed, start

    def __iter__(self):
        epoch, position = divmod(self.start, self.n)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            yield from order[position:].tolist()
            epoch, position = epoch + 1, 0


class MixtureSampler(Sampler):
    """Yields indices into the concatenation of corpora with these sizes.

    `mixture_order` chooses the corpus of each sample, and an EndlessSampler per corpus chooses the index in it. `start`
    skips samples as in EndlessSampler."""

    def __init__(self, sizes, weights, seed=0, start=0):
        self.sizes, self.weights, self.seed, self.start = sizes, weights, seed, start

    def __iter__(self):
        # count the samples of each corpus before `start`: those of whole blocks, then those of the block it is in
        block, position = divmod(self.start, DRAWS)
        begun = itertools.islice(mixture_order(self.weights, self.seed, block * DRAWS), position)
        drawn = block * mixture_counts(self.weights) + np.bincount(list(begun), minlength=len(self.sizes)).astype(int)
        first = np.cumsum([0, *self.sizes]).tolist()
        orders = [
            iter(EndlessSampler(size, mix_seed(self.seed, corpus), int(done)))
            for corpus, (size, done) in enumerate(zip(self.sizes, drawn))
        ]
        for corpus in mixture_order(self.weights, self.seed, self.start):
            yield first[corpus] + next(orders[corpus])


def mixture_counts(weights):
    """Returns (n_corpora,) int64: how many draws of a block of DRAWS each corpus gets, at least one."""
    exact = np.array(weights) / sum(weights) * DRAWS
    counts = np.maximum(1, exact.astype(np.int64))
    while counts.sum() > DRAWS:
        counts[counts.argmax()] -= 1
    while counts.sum() < DRAWS:
        counts[(exact - counts).argmax()] += 1
    return counts


def mixture_order(weights, seed, start=0):
    """Yields an endless sequence of corpus numbers, starting with draw number `start`.

    A block of DRAWS draws is a random order of the numbers, each as often as `mixture_counts` says."""
    block, position = divmod(start, DRAWS)
    draws = np.repeat(np.arange(len(weights)), mixture_counts(weights))
    while True:
        yield from np.random.default_rng((seed, block)).permutation(draws)[position:].tolist()
        block, position = block + 1, 0


class SeededIndices(Sampler):
    """Yields (index, (seed, k)) for sample k, the indices of a sampler that starts at sample `start`.

    They are for a dataset that takes a seed with each index."""

    def __init__(self, indices, seed, start=0):
        self.indices, self.seed, self.start = indices, seed, start

    def __iter__(self):
        return ((index, (self.seed, number)) for number, index in enumerate(self.indices, self.start))


class RankBatches:
    """Yields this rank's part of each batch of `batch_size` indices: every `world`-th index, starting at `rank`."""

    def __init__(self, sampler, batch_size, rank, world):
        self.sampler, self.batch_size, self.rank, self.world = sampler, batch_size, rank, world

    def __iter__(self):
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.batch_size)):
            yield batch[self.rank :: self.world]
