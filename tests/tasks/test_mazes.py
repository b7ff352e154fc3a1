"""Mazes: rules on boards drawn by hand, symmetries, files, and the generator against a search of its own."""

from collections import deque

import numpy as np
import pytest

from src.errors import UserError
from src.tasks import mazes
from src.tasks.mazes import FLOOR, GOAL, PATH, START, WALL, Maze, generate
from src.tasks.puzzles import DIHEDRAL, check_leak, dihedral, make_grids, read_csv, split_by_orbit

BOARD = "S  #" + "## #" + "G  #" + "## #"
ANSWER = "Soo#" + "##o#" + "Goo#" + "## #"
ROUND = "S G" + "   " + "   "  # beside the path of 2 steps, there are longer ones
TWO = "S #" + "   " + "# G"  # two shortest paths of 4 steps, through the middle


def solve(kind, board):
    """(fewest steps, number of shortest paths) from S to G by an ordinary search."""
    grid = board.reshape(kind.height, kind.width)
    start = tuple(int(i) for i in np.argwhere(grid == START)[0])
    distance, count, queue = {start: 0}, {start: 1}, deque([start])
    while queue:
        row, column = queue.popleft()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not (0 <= near[0] < kind.height and 0 <= near[1] < kind.width) or grid[near] == WALL:
                continue
            if near not in distance:
                distance[near], count[near] = distance[row, column] + 1, 0
                queue.append(near)
            if distance[near] == distance[row, column] + 1:
                count[near] += count[row, column]
    goal = tuple(int(i) for i in np.argwhere(grid == GOAL)[0])
    return distance[goal], count[goal]


def test_tokens_are_those_of_the_authors():
    kind = Maze(30)
    assert (kind.name, kind.vocab_size, kind.cells) == ("maze30x30", 6, 900)
    assert Maze(2, 3).from_text("# SGo#").tolist() == [1, 2, 3, 4, 5, 1]
    assert Maze(2, 3).from_text("# S\r\nGo#\n").tolist() == [1, 2, 3, 4, 5, 1]
    with pytest.raises(UserError, match="has 2 lines of 3 cells, this one has 3 lines of 2 cells"):
        Maze(2, 3).from_text("# \nSG\no#\n")
    assert (WALL, FLOOR, START, GOAL, PATH) == (1, 2, 3, 4, 5)


def test_symmetries_are_numbered_as_numpy_names_them():
    grid = np.arange(6).reshape(2, 3)
    expected = [grid, np.rot90(grid), np.rot90(grid, 2), np.rot90(grid, 3)]
    expected += [np.fliplr(grid), np.flipud(grid), grid.T, np.fliplr(np.rot90(grid))]
    for number, each in enumerate(expected):
        assert dihedral(grid, number).tolist() == each.tolist()
        assert dihedral(grid[None], number)[0].tolist() == each.tolist()
    assert len(set(DIHEDRAL)) == 8


@pytest.mark.parametrize(
    "board, answer, problem",
    [
        (BOARD, ANSWER, None),
        (ROUND, "SoG      ", None),
        (TWO, "So# oo# G", None),
        (TWO, "S #oo # G", "the cells marked o do not connect S with G"),
        (TWO, "S #ooo# G", None),
        (BOARD, BOARD, "the cells marked o do not connect S with G"),
        (ROUND, "S Gooo   ", "the path has 4 steps, the shortest 2"),
        (ROUND, "SoGo     ", "the number of cells marked o is 2, a shortest path has 1"),
        (BOARD, ANSWER.replace("#", "o", 1), "row 1, column 4 is 'o', the question has '#'"),
        (BOARD, ANSWER.replace("G", " "), "row 3, column 1 is ' ', the question has 'G'"),
        ("S##G", "S##G", "no path leads from S to G"),
        ("S  S", "SooS", "it has 2 cells S, not one"),
        ("S#G ", "S#Go", "the number of cells marked o is 1, a shortest path has 0"),
        ("S  #", "Soo#", "it has 0 cells G, not one"),
        ("SG  ", "SG  ", None),
    ],
)
def test_answers_are_verified(board, answer, problem):
    kind = Maze({4: 2, 9: 3, 16: 4}[len(board)])
    board, answer = kind.from_text(board), kind.from_text(answer)
    assert kind.verify(board, answer) == problem
    assert kind.are_right(board[None], answer[None]).tolist() == [problem is None]


def test_a_question_with_a_path_in_it_is_refused():
    kind = Maze(2)
    assert kind.question_problem(kind.from_text("SooG")) == "cell 2 is no wall, floor, start or goal"
    assert kind.question_problem(kind.from_text("S##G")) == "no path leads from S to G"
    assert kind.question_problem(kind.from_text("S G ")) is None


@pytest.mark.parametrize("height, width", [(7, 7), (6, 9), (8, 8)])
def test_augmentation_keeps_mazes_right_and_their_orbit(height, width):
    kind = Maze(height, width)
    grids = generate(height, width, 60, (2, 20), seed=1)
    inputs, labels = kind.augment(np.random.default_rng(0), grids.inputs, grids.labels)
    assert kind.are_right(inputs, labels).all() and inputs.dtype == np.uint8
    assert kind.orbits(inputs, labels) == kind.orbits(grids.inputs, grids.labels)
    same = [np.flatnonzero((inputs == grids.inputs).all(1)).size, len(inputs)]
    assert 0 < same[0] < same[1] / 2
    n_images = 8 if height == width else 4
    many = [np.repeat(array[:1], 400, axis=0) for array in grids[:2]]
    assert len(np.unique(kind.augment(np.random.default_rng(0), *many)[1], axis=0)) == n_images


def test_the_orbit_does_not_depend_on_which_shortest_path_is_marked():
    kind = Maze(3)
    board, *answers = (kind.from_text(text)[None] for text in (TWO, "So# oo# G", "S #ooo# G"))
    assert kind.orbits(board, answers[0]) == kind.orbits(board, answers[1])


def test_splits_and_leaks():
    kind, grids = Maze(6), generate(6, 6, 300, (1, 12), seed=2)
    train, test = split_by_orbit(kind, grids, 0.2, 0)
    check_leak(kind, train, test)
    moved = make_grids(*kind.augment(np.random.default_rng(0), *train[:2]))
    with pytest.raises(UserError, match="under a symmetry of maze6x6"):
        check_leak(kind, train, moved)


@pytest.mark.parametrize(
    "height, width, path, loops",
    [(5, 5, (1, 8), 0.0), (9, 6, (4, 30), 0.3), (30, 30, (110, 300), 0.05), (3, 3, (1, 3), 1.0)],
)
def test_generated_mazes_are_what_was_asked_for(height, width, path, loops):
    kind = Maze(height, width)
    grids = generate(height, width, 25, path, seed=3, loops=loops)
    assert grids.n_rows == 25 and kind.are_right(grids.inputs, grids.labels).all()
    for board, steps in zip(grids.inputs, grids.difficulty["path"]):
        assert solve(kind, board) == (steps, 1) and path[0] <= steps <= path[1]
    assert (generate(height, width, 25, path, seed=3, loops=loops).inputs == grids.inputs).all()
    assert (generate(height, width, 25, path, seed=4, loops=loops).inputs != grids.inputs).any()


def test_all_mazes_at_once_are_searched_as_one_by_one(monkeypatch):
    kind, rng = Maze(7, 6), np.random.default_rng(0)
    boards = np.where(rng.random((200, 42)) < 0.3, WALL, FLOOR).astype(np.uint8)
    boards[:, 0], boards[:, 41] = START, GOAL
    alone = [kind.question_problem(board) is None for board in boards]
    monkeypatch.setattr(mazes, "CHUNK", 7)
    steps = kind._steps(boards != WALL, boards)
    assert (steps >= 0).tolist() == alone and 20 < sum(alone) < 180
    assert steps[alone].tolist() == [solve(kind, board)[0] for board in boards[alone]]


def test_loops_are_opened():
    trees, loops = (generate(15, 15, 5, (10, 60), 0, loops=share) for share in (0.0, 0.5))
    assert (loops.inputs != WALL).sum() > (trees.inputs != WALL).sum()
    rooms = 64
    assert ((trees.inputs != WALL).sum(1) == 2 * rooms - 1).all()  # a tree: as many open walls as rooms, less one


@pytest.mark.parametrize(
    "args, message",
    [
        ((5, 5, 1, (0, 3), 0), "path 0 to 3 is no range of steps"),
        ((5, 5, 1, (4, 3), 0), "the lower one first"),
        ((5, 5, 0, (1, 3), 0), "the number of mazes is 0"),
        ((5, 5, 1, (100, 200), 0), "200 mazes of 5 x 5 have no path of 100 to 200 steps: allow shorter paths"),
        ((5, 5, 1, (1, 3), 0, 2.0), "loops is 2.0: set it from 0 to 1"),
        ((1, 5, 1, (1, 3), 0), "a maze of 1 x 5 is too small"),
    ],
)
def test_the_generator_refuses_what_it_cannot_make(args, message):
    with pytest.raises(UserError, match=message):
        generate(*args)


def test_files_of_mazes(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text(f"source,question,answer,rating\nx,{BOARD},{ANSWER},3\nx,{BOARD},{BOARD},3\n")
    kind = Maze(4)
    grids = read_csv(kind, path)
    assert grids.n_rows == 1
    assert kind.to_text(grids.labels[0], False) == ANSWER
    assert grids.difficulty["path"].tolist() == [6] and grids.difficulty["rating"].tolist() == [3]
    assert "skipped line 3, wrong answer: the cells marked o do not connect S with G" in capsys.readouterr().err


def test_a_maze_with_line_breaks_inside_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"S #\n# G","So#\n#oG"\n')
    assert read_csv(Maze(2, 3), path).difficulty["path"].tolist() == [3]


def test_shortest_paths_are_found_and_counted():
    kind = Maze(3)
    closed = "S# " + "## " + "  G"
    boards = np.array([kind.from_text(text) for text in (ROUND, TWO, closed, "G  " + "###" + "   ")])
    answers, counts = kind.solve(boards)
    assert counts.tolist() == [1, 2, 0, 0]
    assert kind.are_right(boards[:2], answers[:2]).all() and not answers[2:].any()
    grids = generate(9, 7, 30, (1, 20), seed=4, loops=0.3)
    answers, counts = Maze(9, 7).solve(grids.inputs)
    assert np.array_equal(answers, grids.labels) and (counts == 1).all()


def test_difficulty_is_measured_without_an_answer():
    grids = generate(9, 7, 30, (1, 20), seed=4)
    labels = grids.labels.copy()
    labels[::2] = 0
    assert np.array_equal(Maze(9, 7).difficulty(grids.inputs, labels)["path"], grids.difficulty["path"])
