"""In which order samples are drawn: a function of the seed and the number of the sample, so any may be the first."""

import itertools

import numpy as np
from torch.utils.data import Sampler

from src.runtime import mix_seed

DRAWS = 10_000  # in as many draws of a mixture, every corpus has its share to one window


class EndlessSampler(Sampler):
    """Indices of epoch after epoch, each in an order of its own that depends on (seed, epoch) alone. `start` samples
    are taken as seen, so a resumed run goes on exactly where it was."""

    def __init__(self, n, seed=0, start=0):
        self.n, self.seed, self.start = n, seed, start

    def __iter__(self):
        epoch, position = divmod(self.start, self.n)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            yield from order[position:].tolist()
            epoch, position = epoch + 1, 0


class MixtureSampler(Sampler):
    """Indices into corpora of `sizes` that lie one after the other: which corpus is next is `mixture_order`, and each
    has its own EndlessSampler. A function of (seed, number of the sample), so `start` works as there."""

    def __init__(self, sizes, weights, seed=0, start=0):
        self.sizes, self.weights, self.seed, self.start = sizes, weights, seed, start

    def __iter__(self):
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
    """(n_corpora,) int64: how many of DRAWS draws each corpus has; at least one."""
    exact = np.array(weights) / sum(weights) * DRAWS
    counts = np.maximum(1, exact.astype(np.int64))
    while counts.sum() > DRAWS:
        counts[counts.argmax()] -= 1
    while counts.sum() < DRAWS:
        counts[(exact - counts).argmax()] += 1
    return counts


def mixture_order(weights, seed, start=0):
    """Endless numbers of corpora from draw `start` on; each block of DRAWS is mixture_counts, shuffled."""
    block, position = divmod(start, DRAWS)
    draws = np.repeat(np.arange(len(weights)), mixture_counts(weights))
    while True:
        yield from np.random.default_rng((seed, block)).permutation(draws)[position:].tolist()
        block, position = block + 1, 0


class RankBatches:
    """One rank's indices of batch after batch."""

    def __init__(self, sampler, batch_size, rank, world):
        self.sampler, self.batch_size, self.rank, self.world = sampler, batch_size, rank, world

    def __iter__(self):
        indices = iter(self.sampler)
        while batch := list(itertools.islice(indices, self.batch_size)):
            yield batch[self.rank :: self.world]
