"""Sudoku: rules, symmetries, canonical forms against brute force, and the generator."""

from collections import Counter
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from src.errors import UserError
from src.tasks import sudoku_solver as solver
from src.tasks.puzzles import check_leak, make_grids, read_csv, split_by_orbit
from src.tasks.sudoku import Sudoku, generate, random_solutions
from src.tasks.sudoku_solver import BLANK, BOXES

DATA = Path(__file__).parents[3] / "shared" / "data" / "sudoku"
QUESTION = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def every_4x4():
    return solver.all_solutions(4, np.full(16, BLANK, np.uint8))


def slow_canonical(grid, size):
    """The least board over every transposition, first row and order of columns, with all other rows sorted."""
    height, width = BOXES[size]
    stacks = permutations(range(size // width))
    inner = list(permutations(range(width)))
    orders = [
        [stack * width + i for stack, order in zip(outer, each) for i in order]
        for outer in stacks
        for each in product(inner, repeat=size // width)
    ]
    boards = []
    for view in [grid, grid.T] if height == width else [grid]:
        for first, order in product(range(size), orders):
            rows = view[first, order].argsort()[view[:, order]]  # digits renamed so that row `first` is 0, 1, 2, ...
            bands = [sorted(map(tuple, rows[start : start + height].tolist())) for start in range(0, size, height)]
            boards.append([row for band in sorted(bands) for row in band])
    return np.array(min(boards), np.uint8).tobytes()


def test_tokens_are_those_of_the_authors():
    nine = Sudoku(9)
    assert (nine.vocab_size, nine.cells, nine.name) == (11, 81, "sudoku9")
    assert nine.from_text(QUESTION)[:5].tolist() == [6, 4, 1, 1, 8]
    assert [Sudoku(size).vocab_size for size in BOXES] == [6, 8, 11]


def test_blanks_may_be_written_in_three_ways():
    board = Sudoku(4).from_text("12 34\n.0_.\n....\n....")
    assert board.tolist() == [2, 3, 4, 5] + [BLANK] * 12
    assert Sudoku(4).to_text(board) == "1234\n....\n....\n...."


def test_answers_are_verified():
    nine = Sudoku(9)
    board, answer = nine.from_text(QUESTION), nine.from_text(ANSWER)
    assert nine.verify(board, answer) is None
    twice, blank, changed = answer.copy(), answer.copy(), board.copy()
    twice[0], blank[2], changed[0] = answer[1], BLANK, 7
    assert nine.verify(board, twice) == "row 1 has 3 twice"
    assert nine.verify(board, blank) == "row 1, column 3 is blank"
    assert nine.verify(changed, answer) == "row 1, column 1 is 5, but its clue is 6"
    column = answer.copy()
    column[[0, 1]] = answer[[1, 0]]
    assert nine.verify(board * 0 + BLANK, column) == "column 1 has 3 twice"
    outside = answer.copy()
    outside[80] = 0
    answers = np.stack([answer, twice, blank, answer, outside])
    questions = np.stack([board, board, board, changed, board * 0 + BLANK])
    assert nine.are_right(questions, answers).tolist() == [True, False, False, False, False]
    right = [nine.verify(*pair) is None for pair in zip(questions, answers)]
    assert right == nine.are_right(questions, answers).tolist()


def test_questions_are_judged():
    nine = Sudoku(9)
    assert nine.question_problem(nine.from_text(QUESTION)) is None
    assert nine.question_problem(nine.from_text("5" + "." * 80)) == "it has several solutions"
    assert nine.question_problem(nine.from_text("12345678." + "." * 8 + "9" + "." * 63)) == "it has no solution"
    assert nine.question_problem(nine.from_text("5" + "." * 9 + "5" + "." * 70)) == "box 1 has 5 twice"


@pytest.mark.parametrize("args, message", [((5,), "size is 5"), ((9, "some"), "symmetries is 'some'")])
def test_impossible_kinds_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        Sudoku(*args)


@pytest.mark.parametrize("symmetries", ["all", "relabel"])
@pytest.mark.parametrize("size", BOXES)
def test_augmentation_keeps_puzzles_right_and_their_orbit(size, symmetries):
    kind = Sudoku(size, symmetries)
    grids = generate(size, 40, (size * 2, size * size // 2), seed=3)
    inputs, labels = kind.augment(np.random.default_rng(1), grids.inputs, grids.labels)
    assert inputs.dtype == labels.dtype == np.uint8 and inputs.shape == grids.inputs.shape
    assert kind.are_right(inputs, labels).all() and (solver.count_solutions(size, inputs) == 1).all()
    assert (inputs != grids.inputs).any(1).all()
    assert ((inputs > BLANK).sum(1) == grids.difficulty["clues"]).all()
    assert kind.orbits(inputs, labels) == kind.orbits(grids.inputs, grids.labels)
    for name, values in kind.difficulty(inputs, labels).items():
        assert (values == grids.difficulty[name]).all(), name
    again = kind.augment(np.random.default_rng(1), grids.inputs, grids.labels)
    assert (again[0] == inputs).all() and (again[1] == labels).all()


def test_relabelling_moves_no_cell():
    kind = Sudoku(6, "relabel")
    grids = generate(6, 20, (12, 20), seed=0)
    inputs, _ = kind.augment(np.random.default_rng(1), grids.inputs, grids.labels)
    assert ((inputs == BLANK) == (grids.inputs == BLANK)).all()


def test_augmentation_reaches_every_board_of_an_orbit():
    """The 96 and the 192 boards of the two 4 x 4 orbits, from one board each."""
    kind, every = Sudoku(4), every_4x4()
    for key, size in Counter(kind.orbits(every, every)).items():
        start = every[kind.orbits(every, every).index(key)]
        many = np.repeat(start[None], 5000, axis=0)
        assert len(np.unique(kind.augment(np.random.default_rng(0), many, many)[1], axis=0)) == size


def test_orbits_of_4x4_are_the_known_ones():
    every = every_4x4()
    assert sorted(Counter(Sudoku(4).orbits(every, every)).values()) == [96, 192]
    assert list(Counter(Sudoku(4, "relabel").orbits(every, every)).values()) == [24] * 12


def test_orbits_of_6x6_are_the_known_49():
    """All 28,200,960 solutions are relabellings of the 39,168 whose first row is 1 to 6."""
    first_row = np.array([*range(2, 8), *[BLANK] * 30], np.uint8)
    every = solver.all_solutions(6, first_row)
    assert len(every) == 39_168 and len(set(Sudoku(6).orbits(every, every))) == 49


@pytest.mark.parametrize("size, n", [(4, 6), (6, 4), (9, 1)])
def test_canonical_forms_are_those_of_brute_force(size, n):
    solutions = random_solutions(size, n, np.random.default_rng(8))
    expected = [slow_canonical(board.reshape(size, size) - 2, size) for board in solutions]
    assert Sudoku(size).orbits(solutions, solutions) == expected


def test_canonical_forms_of_9x9_agree_under_each_symmetry_and_differ_otherwise():
    kind, rng = Sudoku(9), np.random.default_rng(2)
    solutions = random_solutions(9, 60, rng)
    keys = kind.orbits(solutions, solutions)
    assert len(set(keys)) == 60
    grids = solutions.reshape(-1, 9, 9)
    digits = np.array([0, 1, *(rng.permutation(9) + 2)], np.uint8)
    rows = {"band": [3, 4, 5, 0, 1, 2, 6, 7, 8], "row": [1, 0, 2, 3, 4, 5, 6, 8, 7]}
    changes = [digits[grids], grids.transpose(0, 2, 1)]
    changes += [grids[:, order] for order in rows.values()] + [grids[:, :, order] for order in rows.values()]
    for change in changes:
        boards = np.ascontiguousarray(change).reshape(60, 81)
        assert kind.orbits(boards, boards) == keys
    no_symmetry = grids[:, [0, 3, 2, 1, 4, 5, 6, 7, 8]].reshape(60, 81)  # rows of two bands exchanged
    assert not kind.are_right(no_symmetry * 0 + BLANK, no_symmetry).any()


@pytest.mark.parametrize("symmetries", ["all", "relabel"])
def test_boards_that_are_no_solution_have_no_orbit(symmetries):
    boards = every_4x4()[:5].copy()
    boards[3, 0] = BLANK
    with pytest.raises(UserError, match="row 3 .from 0. is no sudoku4 solution"):
        Sudoku(4, symmetries).orbits(boards, boards)


def test_splits_hold_out_whole_orbits():
    every = every_4x4()
    grids = make_grids(every, every)
    for symmetries, sizes in (("all", {96, 192}), ("relabel", {72})):
        kind = Sudoku(4, symmetries)
        train, test = split_by_orbit(kind, grids, 0.25, seed=1)
        assert test.n_rows in sizes and train.n_rows + test.n_rows == 288
        check_leak(kind, train, test)
    with pytest.raises(UserError, match="72 of 72 test grids are training grids under a symmetry of sudoku4"):
        check_leak(Sudoku(4), train, test)  # apart under relabelling, but not under all symmetries


@pytest.mark.parametrize(
    "size, clues, difficulty",
    [(4, (4, 8), "any"), (6, (8, 14), "any"), (6, (9, 12), "guess"), (9, (24, 34), "singles")],
)
def test_generated_puzzles_are_what_was_asked_for(size, clues, difficulty):
    kind = Sudoku(size)
    grids = generate(size, 60, clues, seed=4, difficulty=difficulty)
    assert grids.n_rows == 60 and kind.are_right(grids.inputs, grids.labels).all()
    assert (solver.count_solutions(size, grids.inputs) == 1).all()
    n_clues = (grids.inputs > BLANK).sum(1)
    assert (n_clues == grids.difficulty["clues"]).all() and clues[0] <= n_clues.min() and n_clues.max() <= clues[1]
    assert difficulty == "any" or set(grids.difficulty["guess"]) == {difficulty == "guess"}
    again = generate(size, 60, clues, seed=4, difficulty=difficulty)
    assert (again.inputs == grids.inputs).all()
    assert (generate(size, 60, clues, seed=5, difficulty=difficulty).inputs != grids.inputs).any()


@pytest.mark.parametrize(
    "args, message",
    [
        ((9, 1, (16, 20), 0), "clues 16 to 20 do not fit a sudoku of size 9: set both from 17"),
        ((9, 1, (30, 20), 0), "the lower one first"),
        ((9, 1, (30, 82), 0), "to 81"),
        ((4, 1, (5, 8), 0, "hard"), "difficulty is 'hard': set it to one of any, singles, guess"),
        ((7, 1, (5, 8), 0), "size is 7"),
        ((9, 0, (30, 40), 0), "the number of puzzles is 0"),
        (
            (4, 5, (16, 16), 0, "guess"),
            "tries gave 0 of 5 sudoku4 puzzles of difficulty guess with 16 to 16 clues: allow more",
        ),
    ],
)
def test_the_generator_refuses_what_it_cannot_make(args, message):
    with pytest.raises(UserError, match=message):
        generate(*args)


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data/sudoku is not here")
def test_real_puzzles_are_read_and_rated():
    grids = read_csv(Sudoku(9), DATA / "magictour_top1465.csv.gz")
    assert grids.n_rows == 1465 and set(grids.difficulty) == {"clues", "rounds", "guess", "rating"}
    assert grids.difficulty["rating"][:2].tolist() == [112, 168] and grids.difficulty["clues"][:2].tolist() == [18, 18]
    assert grids.difficulty["guess"].mean() > 0.99
    some = grids.take(np.arange(50))
    assert (solver.solve(9, some.inputs) == some.labels).all() and (solver.count_solutions(9, some.inputs) == 1).all()


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data/sudoku is not here")
def test_leaks_among_real_puzzles_are_named():
    """500 training puzzles under a random symmetry each, given as the test set."""
    kind = Sudoku(9)
    train = read_csv(kind, DATA / "hardest_test.csv.gz").take(np.arange(500))
    moved = make_grids(*kind.augment(np.random.default_rng(0), *train[:2]))
    with pytest.raises(UserError, match="test rows 0, 1, 2 and 497 more; row 0 is training row 0;"):
        check_leak(kind, train, moved)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_the_only_answer_is_found_and_answers_are_counted(size):
    kind, grids = Sudoku(size), generate(size, 20, (size * size // 2, size * size - 1), seed=3)
    answers, counts = kind.solve(grids.inputs)
    assert np.array_equal(answers, grids.labels) and (counts == 1).all()
    wrong, empty = grids.inputs[:1].copy(), np.full((1, size * size), BLANK, np.uint8)
    first, second = np.flatnonzero(wrong[0] == BLANK)[0], grids.labels[0]
    wrong[0, first] = second[first] % size + 2  # another digit than that of the answer
    answers, counts = kind.solve(np.concatenate([wrong, empty]))
    assert counts.tolist() == [0, 2] and not answers[0].any() and kind.are_right(empty, answers[1:]).all()


@pytest.mark.parametrize("size", [4, 6, 9])
def test_invariants_are_equal_within_an_orbit(size):
    kind, grids = Sudoku(size), generate(size, 60, {4: (4, 8), 6: (8, 20), 9: (30, 36)}[size], seed=3)
    values = kind.invariants(*grids[:2])
    for seed in range(5):
        assert kind.invariants(*kind.augment(np.random.default_rng(seed), *grids[:2])) == values
    orbits = kind.orbits(*grids[:2])
    assert len(set(values)) <= len(set(orbits)) and len(set(values)) > {4: 1, 6: 15, 9: 55}[size]


def test_invariants_by_hand():
    """Rows 0 1 2 3 / 2 3 0 1 / 1 0 3 2 / 3 2 1 0: all permutations between rows are two swaps, between columns too."""
    board = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [3, 2, 1, 0]], np.uint8).reshape(1, 16) + 2
    (value,) = Sudoku(4).invariants(board, board)
    two_swaps = 0 * 125 + 4 * 25 + 0 * 5 + 4  # fixed points of the powers 1, 2, 3, 4
    assert np.frombuffer(value, np.int64).tolist() == [two_swaps] * 12
