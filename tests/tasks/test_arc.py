"""ARC tasks: reading, frames, augmentations and voting, on tasks made by hand and on the real files where they are."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.errors import UserError
from src.model import Carry, TRMConfig, TRMModel, TRMOutput
from src.tasks import arc
from src.tasks.arc import (
    IDENTITY,
    INVERSE,
    Arc,
    ArcSet,
    Augmentation,
    Task,
    crop,
    draw_augmentations,
    frame,
    parse_puzzle_name,
    place,
    puzzle_name,
    read_grid,
    read_tasks,
)
from src.tasks.arc_votes import Votes, pass_at, solve_tasks, submission
from src.tasks.puzzle_solve import Effort
from src.tasks.puzzles import check_leak, dihedral

DATA = Path(__file__).parents[3] / "shared" / "data" / "arc_agi"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/arc_agi is not here")


def grid(*rows):
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def random_grid(rng, height=None, width=None):
    return rng.integers(10, size=(height or rng.integers(1, 31), width or rng.integers(1, 31))).astype(np.uint8)


TASK = Task("abc", [(grid("12", "30"), grid("1", "2", "3")), (grid("45"), grid("5"))], [(grid("678"), grid("87"))])
DOTS = Task("dot", [(grid("10", "00"), grid("1"))], [(grid("01"), None)])  # one colour


def as_json(task):
    pairs = {"train": task.train, "test": task.test}
    return {
        part: [
            {"input": i.tolist()} | ({} if o is None else {"output": o.tolist()}) for i, o in rows
        ]
        for part, rows in pairs.items()
    }  # fmt: skip


def same(one, other):
    pairs = [pair for task in (one, other) for pair in (*task.train, *task.test)]
    half = len(pairs) // 2
    return one.name == other.name and all(
        (a is None and b is None) or np.array_equal(a, b)
        for pair, twin in zip(pairs[:half], pairs[half:])
        for a, b in zip(pair, twin)
    )


# ---- files ----


def test_challenges_and_solutions_are_joined(tmp_path):
    hidden = TASK._replace(test=[(TASK.test[0][0], None)])
    path = tmp_path / "arc_challenges.json"
    path.write_text(json.dumps({"abc": as_json(hidden), "dot": as_json(DOTS)}))
    assert same(read_tasks(path)[0], hidden) and same(read_tasks(path)[1], DOTS)
    solutions = {"abc": [TASK.test[0][1].tolist()]}
    (tmp_path / "arc_solutions.json").write_text(json.dumps(solutions))
    first, second = read_tasks(path)
    assert same(first, TASK) and same(second, DOTS)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(solutions).encode()))
    assert same(read_tasks(path, tmp_path / "b.json.gz")[0], TASK)


def test_single_tasks_and_folders_of_them_are_read(tmp_path):
    (tmp_path / "dot.json").write_text(json.dumps(as_json(DOTS)))
    (tmp_path / "abc.json.gz").write_bytes(gzip.compress(json.dumps(as_json(TASK)).encode()))
    assert same(read_tasks(tmp_path / "dot.json")[0], DOTS)
    assert [task.name for task in read_tasks(tmp_path)] == ["abc", "dot"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .json file"):
        read_tasks(tmp_path / "empty")


def pair(value, part="input"):
    good = {"input": [[1]], "output": [[2]]}
    return {"a": {"train": [good | {part: value}], "test": [good]}}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "is no ARC file: its JSON must be an object of tasks"),
        ("{}", "is no ARC file"),
        ("{", "is broken JSON"),
        ('{"a": [1]}', "task a: it must be an object with the lists train and test"),
        ('{"a": {"train": [], "test": [1]}}', "task a: it must be an object with the lists train and test, neither"),
        ('{"a": {"train": [{"input": [[1]]}], "test": [{}]}}', "task a: train pair 1 must be an object with input and"),
        (json.dumps({"a": {"train": pair([[1]])["a"]["train"], "test": [3]}}), "test pair 1 must be an object"),
        (json.dumps(pair([])), "train pair 1, input is no grid: give 1 to 30 rows of one length, 1 to 30"),
        (json.dumps(pair([[]])), "is no grid"),
        (json.dumps(pair([[1], [1, 2]])), "is no grid"),
        (json.dumps(pair([[1] * 31])), "is no grid"),
        (json.dumps(pair([[1]] * 31)), "is no grid"),
        (json.dumps(pair("12")), "is no grid"),
        (json.dumps(pair([[10]], "output")), "train pair 1, output holds something other than colours 0 to 9"),
        (json.dumps(pair([[-1]])), "colours 0 to 9"),
        (json.dumps(pair([[1.5]])), "colours 0 to 9"),
        (json.dumps(pair([[True]])), "colours 0 to 9"),
        (json.dumps(pair([["1"]])), "colours 0 to 9"),
        (json.dumps(pair(None, "output")), "output is no grid"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_tasks(tmp_path / "a.json")
    assert "\n" not in str(error.value) and "a.json" in str(error.value)


@pytest.mark.parametrize(
    "solutions, message",
    [
        ("[]", "is no ARC solutions file"),
        ('{"abc": []}', "solutions are no list of 1 grids"),
        ('{"abc": [[[77]]]}', "colours"),
    ],
)
def test_solutions_of_another_form_are_refused(tmp_path, solutions, message):
    (tmp_path / "a_challenges.json").write_text(json.dumps({"abc": as_json(TASK)}))
    (tmp_path / "a_solutions.json").write_text(solutions)
    with pytest.raises(UserError, match=message):
        read_tasks(tmp_path / "a_challenges.json")


def test_a_folder_of_challenges_and_their_solutions(tmp_path):
    challenge = as_json(TASK) | {"test": [{"input": TASK.test[0][0].tolist()}]}
    (tmp_path / "a_challenges.json").write_text(json.dumps({"abc": challenge}))
    (tmp_path / "a_solutions.json").write_text(json.dumps({"abc": [TASK.test[0][1].tolist()]}))
    (tmp_path / "dot.json").write_text(json.dumps(as_json(DOTS)))
    tasks = read_tasks(tmp_path)
    assert [task.name for task in tasks] == ["abc", "dot"] and same(tasks[0], TASK)
    (tmp_path / "test_puzzles.json").write_text(json.dumps({"other": as_json(DOTS)}))
    assert [task.name for task in read_tasks(tmp_path)] == ["other"]


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    data = gzip.compress(json.dumps({"abc": as_json(TASK)}).encode())
    (tmp_path / "a.json.gz").write_bytes(data[:-20])
    with pytest.raises(UserError, match="truncated"):
        read_tasks(tmp_path / "a.json.gz")


# ---- frames ----


def test_a_frame_is_the_authors():
    """Colours are 2..11. EOS is below and to the right, without a corner; at the 30th row or column there is none."""
    board = frame(grid("09", "12", "34")).reshape(30, 30)
    assert board[:4, :3].tolist() == [[2, 11, 1], [3, 4, 1], [5, 6, 1], [1, 1, 0]]
    assert (board > 0).sum() == 6 + 5
    moved = frame(grid("7"), 28, 29).reshape(30, 30)
    assert moved[28, 29] == 9 and moved[29, 29] == 1 and (moved > 0).sum() == 2
    full = frame(np.full((30, 30), 4, np.uint8))
    assert (full == 6).all()


def test_crop_is_the_inverse_of_frame():
    rng = np.random.default_rng(0)
    for _ in range(50):
        each = random_grid(rng)
        assert np.array_equal(crop(frame(each)), each)


def test_crop_takes_the_largest_rectangle_of_colours():
    board = np.zeros((30, 30), np.uint8)
    board[:2, :5], board[2:6, :3] = 4, 5
    assert crop(board.ravel()).shape == (6, 3)
    board[2:6, :3] = 1
    assert crop(board.ravel()).tolist() == [[2] * 5] * 2
    board[0, 0] = 0
    assert crop(board.ravel()).shape == (0, 0)
    board[0, :4], board[1, :4] = [3, 3, 0, 3], [3, 0, 3, 3]
    assert crop(board.ravel()).shape == (1, 2)  # 2 x 1 has the same area and more rows


def test_text_is_lines_of_digits():
    kind = Arc()
    board = kind.from_text("012\n345")
    np.testing.assert_array_equal(board, kind.from_text("0 1 2 \r\n\n 3 4 5\n"))
    assert np.array_equal(crop(board), grid("012", "345")) and kind.to_text(board) == "012\n345"
    assert kind.verify(board, board) is None and kind.verify(board, board * 0).startswith("it is not one grid")
    assert len(kind.to_text(board * 0)) == 900 + 29
    for text in ("", "12\n3", "1x", "1" * 31):
        with pytest.raises(UserError, match="this board"):
            kind.from_text(text)
    assert (kind.vocab_size, kind.cells) == (12, 900)


# ---- augmentations ----


def test_an_augmentation_is_undone():
    rng = np.random.default_rng(1)
    for number in range(8):
        augmentation = Augmentation(number, (0, *(rng.permutation(9) + 1).tolist()))
        each = random_grid(rng)
        moved = augmentation.apply(each)
        assert np.array_equal(augmentation.undo(moved), each)
        colours = np.array(augmentation.colours, np.uint8)
        assert np.array_equal(moved, dihedral(colours[each], number))
        assert np.array_equal(dihedral(dihedral(each, number), INVERSE[number]), each)
        assert parse_puzzle_name(puzzle_name("a|||b", augmentation)) == ("a|||b", augmentation)
    assert puzzle_name("abc", IDENTITY) == "abc" and parse_puzzle_name("abc") == ("abc", IDENTITY)
    assert parse_puzzle_name("abc|||t3|||0213456789") == ("abc", Augmentation(3, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)))


@pytest.mark.parametrize(
    "name", ["a|||t8|||0123456789", "a|||t1|||0123456788", "a|||t1", "a|||b|||012", "a|||tx|||0123456789"]
)
def test_names_of_another_form_are_refused(name):
    with pytest.raises(UserError, match="is not of the form"):
        parse_puzzle_name(name)


def test_many_boards_are_placed_as_each_grid_is():
    """`place` for all rows at once against `Augmentation.apply` and `frame` for one."""
    rng = np.random.default_rng(2)
    pairs = [(random_grid(rng), random_grid(rng)) for _ in range(60)]
    pairs += [(random_grid(rng, 30, 1), random_grid(rng, 1, 30)), (random_grid(rng, 30, 30), random_grid(rng, 2, 3))]
    boards = [np.stack([frame(pair[i]) for pair in pairs]) for i in (0, 1)]
    boards[1][3] = 0  # no target
    transforms, colours = rng.integers(8, size=len(pairs)), arc._shuffled_colours(rng, len(pairs))
    placed = place(*boards, transforms, colours)
    moved = place(*boards, transforms, colours, np.random.default_rng(3))
    offsets = set()
    for row, pair in enumerate(pairs):
        augmentation = Augmentation(int(transforms[row]), tuple(colours[row].tolist()))
        images = [augmentation.apply(each) for each in pair]
        assert (placed[0][row] == frame(images[0])).all()
        if row == 3:
            assert not placed[1][row].any() and not moved[1][row].any()
            continue
        assert (placed[1][row] == frame(images[1])).all()
        corner = np.argwhere(moved[0][row].reshape(30, 30) >= 2).min(0).tolist()
        offsets.add(tuple(corner))
        assert all((board[row] == frame(image, *corner)).all() for board, image in zip(moved, images))
        room = [30 - max(image.shape[axis] for image in images) for axis in (0, 1)]
        assert corner[0] <= room[0] and corner[1] <= room[1]
    assert len(offsets) > 10 and placed[0].dtype == np.uint8


def test_augmentations_of_a_task_are_all_different():
    def images(augmentations):
        pairs = [pair for pair in (*TASK.train, *TASK.test)]
        return {
            tuple((each.apply(g).shape, each.apply(g).tobytes()) for pair in pairs for g in pair)
            for each in augmentations
        }

    drawn = draw_augmentations(TASK, 300, np.random.default_rng(0))
    assert len(drawn) == 300 and len(images([IDENTITY, *drawn])) == 301
    # One colour, 9 ways to paint it; the 2 x 2 grid with a dot and the 1 x 2 one have 8 images, less those that agree.
    few = draw_augmentations(DOTS, 1000, np.random.default_rng(0))
    views = {
        tuple(
            (dihedral(g, number).shape, dihedral(g, number).tobytes())
            for g in (grid("10", "00"), grid("1"), grid("01"))
        )
        for number in range(8)
    }
    assert len(few) == 9 * len(views) - 1


def test_ids_belong_to_tasks_and_augmentations():
    data = ArcSet([TASK], [DOTS], 20, seed=0)
    assert data.names[0] == "<blank>" and data.names[1] == "abc" and data.names[22] == "dot"
    assert data.first_ids.tolist() == [1, 22, 43] and len(data.names) == 43
    assert data.train.groups.tolist() == [0, 0, 0, 1] and data.train.puzzle_ids.tolist() == [1, 1, 1, 22]
    assert data.test.groups.tolist() == [1] and not data.test.labels.any()
    assert np.array_equal(
        crop(data.train.labels[2]), TASK.test[0][1]
    )  # of a training task, test pairs are training data
    rng = np.random.default_rng(0)
    many = data.train.take(np.repeat(np.arange(4), 100))
    ids = rng.integers(data.first_ids[many.groups], data.first_ids[many.groups + 1])
    assert set(ids[:300]) == set(range(1, 22)) and set(ids[300:]) == set(range(22, 43))
    placed = data.place(many, ids)
    assert (placed.puzzle_ids == ids).all() and placed.puzzle_ids.dtype == np.int32
    for row in (0, 150, 399):
        _, augmentation = parse_puzzle_name(data.names[ids[row]])
        assert np.array_equal(augmentation.undo(crop(placed.inputs[row])), crop(many.inputs[row]))
    again = ArcSet([TASK], [DOTS], 20, seed=0)
    assert again.names == data.names and ArcSet([TASK], [DOTS], 20, seed=1).names != data.names


def test_every_row_meets_every_puzzle_of_its_task():
    data = ArcSet([TASK], [DOTS], 3, seed=0)
    rows, ids = data.every_puzzle(data.train)
    assert rows.tolist() == [0, 1, 2] * 4 + [3] * 4 and ids.tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [
        5,
        6,
        7,
        8,
    ]
    rows, ids = data.every_puzzle(data.test)
    assert rows.tolist() == [0] * 4 and ids.tolist() == [5, 6, 7, 8]


def test_a_task_is_given_once():
    with pytest.raises(UserError, match="task abc is given twice"):
        ArcSet([TASK, DOTS], [TASK], 1)


def test_orbits_do_not_change_under_augmentation():
    data, kind, rng = ArcSet([TASK], [], 0), Arc(), np.random.default_rng(0)
    keys = kind.orbits(data.train.inputs, data.train.labels)
    assert len(set(keys)) == 3
    for number in range(8):
        colours = arc._shuffled_colours(rng, 3)
        assert kind.orbits(*place(*data.train[:2], np.full(3, number), colours)) == keys
        moved = place(*data.train[:2], np.full(3, number), colours, rng)
        assert kind.orbits(*moved) == keys and kind.to_text(moved[0][1]).replace("\n", "").isdigit()
    many = [np.repeat(board[:1], 200, axis=0) for board in data.train[:2]]
    inputs, labels = kind.augment(rng, *many)
    assert inputs.shape == labels.shape == (200, 900) and len(np.unique(inputs, axis=0)) == 200


# ---- voting ----


def vote(votes, data, row, number, answer, halt):
    """Add a prediction of `answer` as the number-th augmentation of a test row's task would show it."""
    identity = data.test.puzzle_ids[row]
    placed = data.place(data.test.take(np.array([row])), np.array([identity + number]))
    _, augmentation = parse_puzzle_name(data.names[identity + number])
    votes.add(data.names[identity + number], placed.inputs[0], frame(augmentation.apply(answer)), halt)


def test_votes_are_undone_counted_and_ranked():
    data, votes = ArcSet([], [TASK], 10), Votes()
    right, wrong, rare = TASK.test[0][1], grid("11"), grid("2")
    for number, (answer, halt) in enumerate([(wrong, 0.9), (right, 0.2), (rare, 0.9), (right, 0.6), (wrong, 0.1)]):
        vote(votes, data, 0, number, answer, halt)
    ranked = votes.ranked("abc", TASK.test[0][0])
    assert [candidate.count for candidate in ranked] == [2, 2, 1]
    assert np.array_equal(ranked[0].grid, wrong) and np.array_equal(ranked[1].grid, right)
    assert [round(candidate.halt, 3) for candidate in ranked] == [0.5, 0.4, 0.9]
    assert pass_at(votes, [TASK], (1, 2)) == {1: 0.0, 2: 1.0}
    vote(votes, data, 0, 7, right, 0.0)
    assert pass_at(votes, [TASK], (1, 2)) == {1: 1.0, 2: 1.0}
    attempts = submission(votes, [TASK])
    assert attempts == {"abc": [{"attempt_1": right.tolist(), "attempt_2": wrong.tolist()}]}
    for _ in range(9):  # an answer without cells is no attempt, so it takes no place either
        votes.add("abc", frame(TASK.test[0][0]), np.zeros(900, np.uint8), 0.5)
    assert submission(votes, [TASK]) == attempts
    assert pass_at(votes, [TASK], (1, 2)) == {1: 1.0, 2: 1.0}


def test_tasks_without_votes_or_outputs():
    votes = Votes()
    assert pass_at(votes, [TASK, DOTS], (1, 2)) == pass_at(votes, [DOTS], (1, 2)) == {1: 0.0, 2: 0.0}
    assert votes.ranked("abc", TASK.test[0][0]) == []
    assert submission(votes, [DOTS]) == {"dot": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}
    votes.add("abc", frame(TASK.test[0][0]), np.zeros(900, np.uint8), 0.5)  # a prediction without a grid
    assert votes.ranked("abc", TASK.test[0][0])[0].grid.shape == (0, 0)
    assert pass_at(votes, [TASK], (1,)) == {1: 0.0}
    assert submission(votes, [TASK]) == {"abc": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}


class Copier(TRMModel):
    """A model that answers with the board itself, and remembers the boards and the puzzle ids."""

    def __init__(self, **settings):
        sizes = {"max_seq_len": 900, "vocab_size": 12, "d_model": 4, "n_heads": 1, "d_ff": 4, "supervision_steps": 2}
        super().__init__(TRMConfig(**sizes, causal=False, halting=False, **settings))
        self.boards, self.ids = [], []

    def forward(self, inputs, *args, puzzle_ids=None, **kwargs):
        self.boards.append(inputs.numpy().astype(np.uint8))
        self.ids.append(puzzle_ids)
        logits = torch.nn.functional.one_hot(inputs, 12).float()
        return TRMOutput(None, None, None, logits[None], None, Carry(logits, logits, 1))


COPY = Task("copy", TASK.train, [(grid("678", "120"), grid("678", "120")), (grid("11"), grid("12"))])


def test_votes_without_puzzle_ids():
    """The answers of all augmentations agree once these are undone; one of the two pairs is a copy."""
    model = Copier()
    attempts, line = solve_tasks(model, [COPY, DOTS], [], Effort(votes=5, batch_size=4))
    pairs = [[[6, 7, 8], [1, 2, 0]], [[1, 1]]]
    assert attempts["copy"] == [{"attempt_1": each, "attempt_2": each} for each in pairs]
    assert attempts["dot"] == [{"attempt_1": [[0, 1]], "attempt_2": [[0, 1]]}]
    assert line.startswith("2 tasks of arc, up to 5 votes: pass@1 0.5000, pass@2 0.5000, pass@5 0.5000 on the 1 whose")
    assert "mean steps 2.00" in line
    boards = np.concatenate(model.boards[::2])
    assert len(boards) == 15 and len(np.unique(boards[:5], axis=0)) == 5
    assert np.array_equal(crop(boards[0]), COPY.test[0][0])


def test_votes_with_puzzle_ids(capsys):
    names = ArcSet([TASK], [COPY], 6, seed=0).names
    model = Copier(prefix_tokens=1, puzzle_ids=len(names))
    attempts, _ = solve_tasks(model, [DOTS, COPY], names, Effort(votes=4, seed=1))
    assert attempts["copy"][1] == {"attempt_1": [[1, 1]], "attempt_2": [[1, 1]]}
    assert "no puzzle id for 1 of 2 tasks (dot): they get id 0" in capsys.readouterr().err
    first = names.index("copy")
    assert model.ids[0].tolist() == [0] * 4 + list(range(first, first + 4)) * 2
    for puzzle_id, board in zip(model.ids[0].tolist()[4:8], model.boards[0][4:8]):
        _, augmentation = parse_puzzle_name(names[puzzle_id])
        assert np.array_equal(crop(board), augmentation.apply(COPY.test[0][0]))
    with pytest.raises(UserError, match="has a puzzle id for none of these tasks"):
        solve_tasks(model, [DOTS], names, Effort())
    with pytest.raises(UserError, match="has 15 puzzle ids, but its checkpoint names 0 in identifiers.json: copy"):
        solve_tasks(model, [DOTS], [], Effort())


def test_pass_is_a_mean_over_tasks_not_pairs():
    two = Task("two", TASK.train, [(grid("1"), grid("2")), (grid("3"), grid("4"))])
    votes = Votes()
    votes.add("two", frame(grid("1")), frame(grid("2")), 0.5)
    votes.add("abc", frame(TASK.test[0][0]), frame(TASK.test[0][1]), 0.5)
    assert pass_at(votes, [two, TASK], (1,)) == {1: 0.75}


# ---- real files ----


@needs_data
def test_the_real_tasks():
    training, evaluation = (
        read_tasks(DATA / f"arc-agi_{part}_challenges.json.gz") for part in ("training", "evaluation")
    )
    assert (len(training), len(evaluation)) == (400, 400)
    assert sum(len(task.test) for task in evaluation) == 419
    assert all(output is not None for task in training + evaluation for _, output in task.test)
    first = next(task for task in training if task.name == "007bbfb7")
    assert np.array_equal(first.test[0][0], grid("707", "707", "770"))
    assert first.test[0][1].shape == (9, 9) and first.test[0][1][0].tolist() == [7, 0, 7, 0, 0, 0, 7, 0, 7]
    data = ArcSet(training[:50], evaluation[:50], 100, seed=0)
    assert data.train.n_rows == sum(len(t.train) for t in training[:50] + evaluation[:50]) + sum(
        len(t.test) for t in training[:50]
    )
    rows, ids = data.every_puzzle(data.test)
    votes, placed = Votes(), data.place(data.test.take(rows), ids)
    for name, board, label in zip((data.names[i] for i in ids), placed.inputs, placed.labels):
        votes.add(name, board, label, 0.9)
    assert pass_at(votes, evaluation[:50], (1,)) == {1: 1.0}
    assert len(votes.ranked(evaluation[0].name, evaluation[0].test[0][0])) == 1


@needs_data
def test_the_real_test_pairs_that_are_images_of_training_pairs_are_named():
    evaluation = read_tasks(DATA / "arc-agi_evaluation_challenges.json.gz")
    data = ArcSet([], evaluation, 0)
    with pytest.raises(UserError, match="of 419 test grids are training grids under a symmetry of arc"):
        check_leak(Arc(), data.train, data.test)


def test_read_grid_makes_bytes():
    assert read_grid([[1, 2], [3, 9]], "x").dtype == np.uint8


def test_moving_keeps_the_grids_and_their_distance():
    """From any place to any place; input and output move together, and colours and symmetry stay."""
    rng = np.random.default_rng(0)
    grids = [(random_grid(rng, 4, 7), random_grid(rng, 9, 2)) for _ in range(40)]
    boards = [np.array([frame(pair[side], 3, 5) for pair in grids]) for side in (0, 1)]
    inputs, labels = Arc().move(np.random.default_rng(1), *boards)
    places = set()
    for (one, other), board, label in zip(grids, inputs, labels):
        at = np.argwhere(board.reshape(30, 30) >= 2).min(0).tolist()
        assert np.array_equal(frame(one, *at), board) and np.array_equal(frame(other, *at), label)
        places.add(tuple(at))
    rows, columns = zip(*places)
    assert len(places) > 30 and max(rows) <= 30 - 9 and max(columns) <= 30 - 7


def test_moving_without_a_target():
    board = frame(grid("12"), 4, 4)[None]
    inputs, labels = Arc().move(np.random.default_rng(0), board, np.zeros_like(board))
    assert (crop(arc.at_corner(inputs[0])) == grid("12")).all() and not labels.any()
