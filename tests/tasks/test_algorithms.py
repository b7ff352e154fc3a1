"""Tasks of a chosen number of sequential steps: answers by brute force, difficulties, ranges, the same rows by seed."""

import numpy as np
import pytest

from src.errors import UserError
from src.losses import IGNORE
from src.tasks.algorithms import Carries, Chains, Regions, Words

FAMILIES = [Carries(), Carries(5), Words(), Words(4), Regions(), Regions(4), Chains(), Chains(6)]


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


@pytest.mark.parametrize("small", [Carries(2), Words(2), Chains(4)], ids=name)
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
    with pytest.raises(UserError, match="1 columns"):
        Words(1)
    with pytest.raises(UserError, match="size 3"):
        Regions(3)
    with pytest.raises(UserError, match="3 nodes"):
        Chains(3)


@pytest.mark.parametrize("family", [Carries(), Words(), Regions(), Chains()], ids=name)
def test_length_and_alphabet_do_not_depend_on_the_difficulty(family):
    """Tokens of hard instances are as in easy ones: no token is new, and none becomes rare."""
    easy, hard = (family.generate(400, d, d, rng(7)).inputs for d in (2, 12))
    assert easy.shape == hard.shape and set(np.unique(easy)) == set(np.unique(hard))
    if family.name == "regions":  # words and carries have longer runs, so fewer tokens that begin one
        share = [(inputs == family.wall).mean() for inputs in (easy, hard)]
        assert share == pytest.approx([share[0]] * 2, abs=0.08)


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


# ---- words ----


def test_words_by_hand():
    """Permutation 1 swaps the last two of three objects, 2 the first two; the order of two swaps matters."""
    task = Words(4)
    swap_last, swap_first = task.permutations.index((0, 2, 1)), task.permutations.index((1, 0, 2))
    inputs = np.array([[task.bos, 6 + swap_last, swap_first, 6 + swap_first, swap_last]])
    places = [(0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 0, 1)]  # of the objects 0, 1, 2 after each column
    answers = [IGNORE, *(task.permutations.index(place) for place in places)]
    assert task.verify(inputs, np.array([answers])).all()
    answers[2], answers[4] = answers[4], answers[2]
    assert task.verify(inputs, np.array([answers]))[0].tolist() == [True, True, False, True, False]


def test_products_of_words_are_a_group_that_does_not_commute():
    products = Words().products
    assert all(len(set(line)) == 6 for table in (products, products.T) for line in table.tolist())
    assert not np.array_equal(products, products.T)
    assert np.array_equal(products[products[2, 3], 4], products[2, products[3, 4]])
    assert np.array_equal(products[0], np.arange(6)) and np.array_equal(
        products[:, 0], np.arange(6)
    )  # 0 changes nothing


def test_the_difficulty_of_words_is_the_number_of_products_in_the_longest():
    batch = Words().generate(200, 1, 31, rng(8))
    for tokens, difficulty in zip(batch.inputs[:, 1:], batch.difficulty):
        assert tokens[0] >= 6
        assert max(map(len, "".join("b" if token >= 6 else "c" for token in tokens).split("b"))) == difficulty
    answers = batch.targets[:, 1:]
    assert all(0.13 < (answers == number).mean() < 0.2 for number in range(6))


# ---- regions ----


def test_regions_by_hand():
    """S: start, #: wall, .: open. The open cells on the right are cut off, though they follow in reading order."""
    task = Regions(4)
    rows = ["S.#.", "#.##", "..#.", "##.."]
    token = {"#": task.wall, ".": task.open, "S": task.start}
    inputs = np.array([[token[cell] for row in rows for cell in row + "#"]])
    reached = ["11 0", " 1  ", "11 0", "  00"]
    answers = np.array([[{"1": 1, "0": 0, " ": IGNORE}[cell] for row in reached for cell in row + " "]])
    assert task.verify(inputs, answers).all()
    assert not task.verify(inputs, np.where(answers == 0, 1, answers)).all()
    assert not task.verify(inputs, np.where(answers == 1, 0, answers)).all()


def test_the_difficulty_of_regions_is_the_distance_to_the_farthest_cell():
    task = Regions()
    batch = task.generate(60, 1, task.hardest, rng(9))
    assert (batch.targets == 0).any(1).mean() > 0.8  # nearly every grid has cells that cannot be reached
    for tokens, targets, difficulty in zip(batch.inputs, batch.targets, batch.difficulty):
        grid = tokens.reshape(task.size, task.size + 1)
        assert (grid[:, -1] == task.wall).all() and (grid == task.start).sum() == 1
        distance = {tuple(map(int, np.argwhere(grid == task.start)[0])): 0}
        for row, column in (queue := list(distance)):  # breadth first; the queue grows
            for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                is_inside = 0 <= cell[0] < task.size and 0 <= cell[1] < task.size
                if is_inside and grid[cell] != task.wall and cell not in distance:
                    distance[cell] = distance[row, column] + 1
                    queue.append(cell)
        assert max(distance.values()) == difficulty
        assert set(map(tuple, np.argwhere(targets.reshape(grid.shape) == 1).tolist())) == set(distance)


# ---- chains ----


def test_chains_by_hand():
    """Node 0 is a root of colour 3, node 1 one of colour 1; node 2 leads to 0, node 3 to 2, node 4 to 1."""
    inputs = np.array([[3, 1, Chains.colours + 1, Chains.colours, Chains.colours + 2]])
    assert Chains(5).verify(inputs, np.array([[3, 1, 3, 3, 1]])).all()
    assert Chains(5).verify(inputs, np.array([[3, 1, 3, 1, 3]]))[0].tolist() == [True, True, True, False, False]


def test_the_difficulty_of_chains_is_the_most_steps_to_a_root():
    task = Chains()
    batch = task.generate(200, 1, task.hardest, rng(6))
    for tokens, difficulty in zip(batch.inputs.tolist(), batch.difficulty):
        steps = []
        for node, token in enumerate(tokens):
            distance = max(0, token - task.colours + 1)
            assert distance <= node, "a parent comes before its children"
            steps.append(steps[node - distance] + 1 if distance else 0)
        assert max(steps) == difficulty
    assert all(0.2 < (batch.targets == colour).mean() < 0.3 for colour in range(task.colours))


def test_chains_of_all_difficulties_point_equally_far():
    """Up to twice the usual training, the tokens have the same shares; only the longest paths need short steps."""
    easy, hard = (np.bincount(Chains().generate(500, d, d, rng(10)).inputs.ravel(), minlength=12) for d in (4, 6))
    assert np.abs(easy - hard).max() < 0.02 * easy.sum()
