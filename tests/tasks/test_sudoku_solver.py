"""The Sudoku solver against known numbers, known puzzles and brute force."""

from itertools import product

import numpy as np
import pytest

from src.tasks import sudoku_solver as solver
from src.tasks.puzzles import GIVEN_UP
from src.tasks.sudoku import Sudoku, random_solutions

EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "4...3.......6..8..........1....5..9..8....6...7.2........1.27..5.3....4.9........"  # magictour, first line
HARD_SOLVED = "468931527751624839392578461134756298289413675675289314846192753513867942927345186"


def boards(size, *texts):
    return np.stack([Sudoku(size).from_text(text) for text in texts])


def empty(size):
    return np.full((1, size * size), solver.BLANK, np.uint8)


def test_every_4x4_solution_is_found():
    """288 is known; brute force over the rows of digits agrees, board by board."""
    found = solver.all_solutions(4, empty(4)[0])
    assert found.shape == (288, 16) and len(np.unique(found, axis=0)) == 288
    rows = [row for row in product(range(2, 6), repeat=4) if len(set(row)) == 4]
    units = solver.layout(4).units
    brute = [
        np.array(grid).ravel()
        for grid in product(rows, repeat=4)
        if all(len(set(np.array(grid).ravel()[unit])) == 4 for unit in units[4:])
    ]
    assert (found == np.array(sorted(map(tuple, brute)))).all()


def test_units_of_6x6_have_boxes_of_2_rows_and_3_columns():
    units = solver.layout(6).units
    assert units[12].tolist() == [0, 1, 2, 6, 7, 8] and units[13].tolist() == [3, 4, 5, 9, 10, 11]
    assert units[0].tolist() == list(range(6)) and units[6].tolist() == list(range(0, 36, 6))


def test_known_puzzles_are_solved():
    assert (solver.solve(9, boards(9, EASY, HARD)) == boards(9, SOLVED, HARD_SOLVED)).all()
    assert solver.count_solutions(9, boards(9, EASY, HARD)).tolist() == [1, 1]


def test_boards_of_no_one_and_several_solutions_are_told_apart():
    none, several = "55" + EASY[2:], EASY.replace("5", ".").replace("9", ".")  # 5 and 9 can change places
    puzzles = np.concatenate([boards(9, none, EASY, several), empty(9)])
    assert solver.count_solutions(9, puzzles).tolist() == [0, 1, 2, 2]
    assert solver.count_solutions(9, puzzles, most=500).tolist() == [0, 1, 484, 500]
    assert len(solver.all_solutions(9, puzzles[2])) == 484
    assert (solver.solve(9, boards(9, none)) == 0).all()


def test_a_search_that_is_too_long_is_given_up():
    """This board has no solution, but no clue says so: the whole search takes minutes."""
    hopeless = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    masks = solver.candidates(9, boards(9, hopeless, EASY, HARD))
    found = solver.search(9, masks, 2, effort=5000)
    assert found.given_up.tolist() == [True, False, False] and sorted(found.owners.tolist()) == [1, 2]
    answers, counts = Sudoku(9).solve(boards(9, hopeless, EASY))
    assert counts.tolist() == [GIVEN_UP, 1] and not answers[0].any() and (answers[1] == boards(9, SOLVED)[0]).all()
    assert Sudoku(9).question_problem(boards(9, hopeless)[0]) is None


def test_a_contradiction_without_equal_digits_is_found():
    """Row 1 has 1 to 8 left of its last cell, whose column has the 9: no solution, though no unit has a digit twice."""
    board = boards(9, "12345678." + "." * 8 + "9" + "." * 63)
    assert solver.propagate(9, solver.candidates(9, board)).is_wrong.tolist() == [True]
    assert solver.count_solutions(9, board).tolist() == [0]


def test_counts_agree_with_the_list_of_all_4x4_solutions():
    """For random parts of solutions, the number of solutions is the number of the 288 that agree with them."""
    rng, every = np.random.default_rng(5), solver.all_solutions(4, empty(4)[0])
    puzzles = np.where(rng.random((200, 16)) < 0.3, every[rng.integers(288, size=200)], solver.BLANK).astype(np.uint8)
    agree = ((puzzles[:, None] == every) | (puzzles[:, None] == solver.BLANK)).all(2).sum(1)
    assert (solver.count_solutions(4, puzzles, most=1000) == agree).all() and agree.max() > 20
    assert (solver.count_solutions(4, puzzles, most=2) == np.minimum(agree, 2)).all()


def test_chunks_do_not_change_the_answer(monkeypatch):
    puzzles = np.concatenate([boards(9, EASY, HARD)] * 5)
    monkeypatch.setattr(solver, "CHUNK", 3)
    assert solver.count_solutions(9, puzzles).tolist() == [1] * 10
    assert (solver.solve(9, puzzles)[1::2] == boards(9, HARD_SOLVED)).all()
    assert len(solver.all_solutions(4, empty(4)[0])) == 288
    assert solver.rate(9, puzzles)["guess"].tolist() == [False, True] * 5


def test_a_round_places_all_singles_at_once():
    """Singles that are visible at the start are one round; one that depends on another takes a second round."""
    solved = boards(9, SOLVED)[0]
    one = solved.copy()
    one[[0, 40]] = solver.BLANK
    assert solver.rate(9, np.stack([solved, one]))["rounds"].tolist() == [0, 1]
    # Row 1 lacks 1, 2, 3. Column 1 has 2 and 3, so cell 1 is 1; column 2 has 3, so cell 2 is 2 only after cell 1 is 1.
    # But 3 has its only place in cell 3 from the start: cells 1 and 3 are round 1, cell 2 is round 2.
    chain = empty(9)[0]
    chain[3:9] = np.arange(5, 11)
    chain[[27, 36, 55]] = [3, 4, 4]
    result = solver.propagate(9, solver.candidates(9, chain[None]))
    assert solver.boards_of(result.masks)[0, :3].tolist() == [2, 3, 4]
    assert result.rounds.tolist() == [2] and not result.is_solved[0] and not result.is_wrong[0]


def test_difficulty_of_known_puzzles():
    easy, hard = boards(9, EASY, HARD)
    ratings = solver.rate(9, np.stack([easy, hard]))
    assert ratings["clues"].tolist() == [30, 18]
    assert ratings["guess"].tolist() == [False, True] and 3 <= ratings["rounds"][0] <= 15
    nothing = solver.rate(9, empty(9)[:0])
    assert {name: values.shape for name, values in nothing.items()} == dict.fromkeys(("clues", "rounds", "guess"), (0,))


@pytest.mark.parametrize("size", solver.BOXES)
def test_masks_and_boards_are_inverse(size):
    board = random_solutions(size, 3, np.random.default_rng(0))
    board[:, ::3] = solver.BLANK
    masks = solver.candidates(size, board)
    assert masks.shape == (size * size, 3) and masks.dtype == np.uint16
    assert (solver.boards_of(masks) == board).all()
