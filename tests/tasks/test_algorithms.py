"""Tasks of a chosen number of sequential steps: answers by brute force, difficulties, ranges, the same rows by seed."""

import numpy as np
import pytest

from src.errors import UserError
from src.losses import IGNORE
from src.tasks.algorithms import Carries, Chains

FAMILIES = [Carries(), Carries(5), Chains(), Chains(6, 3)]


def name(family):
    return f"{family.name}-{family.length}"


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_instances_have_the_shape_and_range_of_their_family(family):
    low, high = 2, family.hardest
    batch = family.generate(40, low, high, rng())
    assert batch.inputs.shape == batch.targets.shape == (40, family.length) and batch.difficulty.shape == (40,)
    assert batch.inputs.min() >= 0 and batch.inputs.max() < family.vocab_size
    has_answer = batch.targets != IGNORE
    assert batch.targets[has_answer].min() >= 0 and batch.targets.max() < family.vocab_size
    assert set(batch.difficulty) <= set(range(low, high + 1)) and len(set(batch.difficulty)) > 1
    assert (family.generate(9, 2, 2, rng()).difficulty == 2).all()


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_verify_accepts_the_targets_and_nothing_else(family):
    batch = family.generate(30, 1, family.hardest, rng(1))
    assert family.verify(batch.inputs, batch.targets).all()
    wrong = np.where(batch.targets == IGNORE, IGNORE, batch.targets + 1)
    assert np.array_equal(family.verify(batch.inputs, wrong), batch.targets == IGNORE)


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_a_seed_gives_the_same_instances(family):
    one, same, other = (family.generate(20, 1, family.hardest, rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not np.array_equal(one.inputs, other.inputs)


@pytest.mark.parametrize("small", [Carries(2), Chains(3)], ids=name)
def test_no_answer_depends_on_later_tokens(small):
    """The first tokens of an instance decide their own answers: a causal model can solve the task."""
    seen = {}
    batch = small.generate(2000, 1, small.hardest, rng(5))
    for inputs, targets in zip(batch.inputs, batch.targets):
        for length in range(1, small.length + 1):
            answer = seen.setdefault((*inputs[:length],), targets[length - 1])
            assert answer == targets[length - 1]


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_impossible_difficulties(family):
    for low, high in ((0, 2), (3, 2), (1, family.hardest + 1)):
        with pytest.raises(UserError, match=f"{family.name} of difficulty {low} to {high}"):
            family.generate(3, low, high, rng())


def test_impossible_sizes():
    with pytest.raises(UserError, match="1 columns"):
        Carries(1)
    with pytest.raises(UserError, match="3 roots"):
        Chains(3, 3)


# ---- carries ----


def test_carries_by_hand():
    """7 + 5, 4 + 5, 0 + 9, 1 + 1 from the least significant digits: 1947 + 1055 = 3002 digit by digit."""
    inputs = np.array([[Carries.bos, 12, 9, 9, 2]])
    assert Carries(4).verify(inputs, np.array([[IGNORE, 2, 0, 0, 3]])).all()
    assert Carries(4).verify(inputs, np.array([[IGNORE, 2, 9, 0, 3]]))[0].tolist() == [True, True, False, True, True]


def test_carries_add_two_numbers():
    task = Carries(20)
    batch = task.generate(50, 1, 19, rng(2))
    for sums, targets in zip(batch.inputs[:, 1:].tolist(), batch.targets[:, 1:].tolist()):
        first = [min(total, 9) for total in sums]
        second = [total - digit for total, digit in zip(sums, first)]
        a, b = (int("".join(map(str, reversed(digits)))) for digits in (first, second))
        assert f"{a + b:021d}"[::-1][:20] == "".join(map(str, targets))
    assert (batch.inputs[:, 0] == task.bos).all() and (batch.targets[:, 0] == IGNORE).all()


def test_the_difficulty_of_carries_is_the_longest_run_of_nines():
    batch = Carries().generate(200, 1, 31, rng(3))
    for sums, difficulty in zip(batch.inputs[:, 1:], batch.difficulty):
        runs = "".join("9" if total == 9 else " " for total in sums).split()
        assert max(map(len, runs)) == difficulty
        assert sums[0] != 9  # the first run follows a column that decides its carry


def test_half_of_the_carries_are_ones():
    """Guessing the carry into the longest run is right half of the time."""
    batch = Carries().generate(1000, 24, 24, rng(4))
    deciding = batch.inputs[:, 1:][batch.inputs[:, 1:] != 9]
    assert 0.45 < (deciding > 9).mean() < 0.55
    assert set(deciding) == set(range(19)) - {9}


# ---- chains ----


def test_chains_by_hand():
    """0 is a root, 1 leads to 0, 3 to 1; 2 is a root."""
    edges = [(0, 0), (1, 0), (2, 2), (3, 1)]
    inputs = np.array([[child * 4 + parent for child, parent in edges]])
    assert Chains(4).verify(inputs, np.array([[0, 0, 2, 0]])).all()
    assert Chains(4).verify(inputs, np.array([[0, 0, 2, 1]]))[0].tolist() == [True, True, True, False]


def test_the_difficulty_of_chains_is_the_most_steps_to_a_root():
    task = Chains()
    batch = task.generate(100, 1, task.hardest, rng(6))
    for edges, difficulty in zip(batch.inputs.tolist(), batch.difficulty):
        parent, steps = {}, {}
        for child, above in (divmod(edge, task.nodes) for edge in edges):
            assert above == child or above in parent, "a parent comes before its children"
            parent[child] = above
            steps[child] = 0 if above == child else steps[above] + 1
        assert max(steps.values()) == difficulty and len(parent) == task.nodes
        assert sum(child == above for child, above in parent.items()) == task.roots
