"""The order of samples: it depends on (seed, number) alone, and gives each corpus its share."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from src.data import order
from src.data.order import EndlessSampler, MixtureSampler, RankBatches, mixture_counts, mixture_order


def head(sampler, n):
    return list(islice(iter(sampler), n))


@pytest.mark.parametrize(
    "weights, counts",
    [
        ([1], [10_000]),
        ([0.7, 0.3], [7000, 3000]),
        ([2, 1], [6667, 3333]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([1e9, 1e-9], [9999, 1]),
        ([5, 1e-9, 1e-9], [9998, 1, 1]),
    ],
)
def test_counts_are_the_weights_and_leave_no_corpus_out(weights, counts):
    assert sorted(mixture_counts(weights).tolist()) == sorted(counts)
    assert mixture_counts(weights)[0] == counts[0]


def test_a_mixture_has_its_share_in_every_block_and_can_begin_anywhere(monkeypatch):
    monkeypatch.setattr(order, "DRAWS", 10)
    draws = list(islice(mixture_order([0.7, 0.3], 3), 50))
    assert [Counter(draws[i : i + 10]) for i in range(0, 50, 10)] == [{0: 7, 1: 3}] * 5
    assert len({tuple(draws[i : i + 10]) for i in range(0, 50, 10)}) > 1
    for start in (1, 9, 10, 11, 37):
        assert list(islice(mixture_order([0.7, 0.3], 3, start), 10)) == draws[start : start + 10]
    assert list(islice(mixture_order([0.7, 0.3], 4), 50)) != draws


def test_every_corpus_of_a_mixture_has_epochs_of_its_own(monkeypatch):
    monkeypatch.setattr(order, "DRAWS", 10)
    sizes, weights = (7, 30), (0.7, 0.3)
    drawn = head(MixtureSampler(sizes, weights, seed=5), 400)
    small, large = [i for i in drawn if i < 7], [i for i in drawn if i >= 7]
    assert (len(small), len(large)) == (280, 120)
    for part, size, first in ((small, 7, 0), (large, 30, 7)):
        epochs = [tuple(part[i : i + size]) for i in range(0, len(part), size)]
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs) and len(set(epochs)) > 1
    for start in (1, 10, 99, 263):
        assert head(MixtureSampler(sizes, weights, 5, start), 60) == drawn[start : start + 60]
    assert head(MixtureSampler(sizes, weights, seed=6), 400) != drawn


def test_an_epoch_is_a_permutation_of_its_own():
    drawn = head(EndlessSampler(10, seed=3), 40)
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert epochs[2] == np.random.default_rng((3, 2)).permutation(10).tolist()
    assert head(EndlessSampler(10, 3, start=23), 17) == drawn[23:]


def test_ranks_have_the_rows_of_one_batch():
    ranks = [head(RankBatches(range(100), 6, rank, 2), 3) for rank in range(2)]
    assert ranks == [[[0, 2, 4], [6, 8, 10], [12, 14, 16]], [[1, 3, 5], [7, 9, 11], [13, 15, 17]]]
    assert head(RankBatches(range(5), 4, 0, 1), 9) == [[0, 1, 2, 3], [4]]
