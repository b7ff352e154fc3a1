"""Training data of puzzles: settings, sources, splits, the order of draws, and difficulty bins."""

import json

import numpy as np
import pytest

from src.errors import UserError
from src.tasks.puzzle_data import (
    BLOCK,
    PuzzleConfig,
    PuzzleDraws,
    PuzzleForm,
    difficulty_bins,
    fingerprint,
    load_puzzles,
    read_form,
)
from src.tasks.puzzle_folder import write_arc_folder, write_folder
from src.tasks.puzzles import Grids, find_leaks, make_grids
from src.tasks.sudoku import Sudoku, generate


@pytest.fixture(scope="module")
def grids():
    return generate(4, 300, (5, 8), seed=1)


def write_csv(path, kind, grids):
    pairs = zip(grids.inputs, grids.labels)
    rows = [",".join(kind.to_text(board, False) for board in pair) for pair in pairs]
    path.write_text("\n".join(["question,answer", *rows]) + "\n")
    return str(path)


class TestSources:
    def test_generated_puzzles_are_split_by_orbit(self):
        data = load_puzzles(PuzzleConfig(n_puzzles=300, symmetries="relabel"))
        assert data.train.n_rows + data.valid.n_rows == 300 and 20 <= data.valid.n_rows <= 80
        assert not find_leaks(data.kind, data.train, data.valid) and data.kind.symmetries == "relabel"
        assert set(data.valid.difficulty) == {"clues", "rounds", "guess"}

    def test_data_seed_decides_and_shows_in_the_fingerprint(self):
        first, again, other = (
            fingerprint(load_puzzles(PuzzleConfig(n_puzzles=100, data_seed=seed))) for seed in (3, 3, 4)
        )
        assert first == again and first["train"] != other["train"]

    def test_files(self, grids, tmp_path):
        kind = Sudoku(4)
        path = write_csv(tmp_path / "a.csv", kind, grids)
        data = load_puzzles(PuzzleConfig(train_paths=[path], valid_share=0.4))
        assert data.train.n_rows + data.valid.n_rows == 300
        part = load_puzzles(PuzzleConfig(train_paths=[path, path], n_puzzles=450))
        assert part.train.n_rows + part.valid.n_rows == 450

    def test_arc_is_not_read_from_files(self, tmp_path):
        (tmp_path / "a.csv").write_text("question,answer\n123,321\n")
        with pytest.raises(UserError, match="a.csv: puzzle arc is not read from files: give one folder of arrays"):
            load_puzzles(PuzzleConfig(puzzle="arc", train_paths=[str(tmp_path / "a.csv")]))

    def test_test_files_that_leak_are_refused(self, grids, tmp_path):
        path = write_csv(tmp_path / "a.csv", Sudoku(4), grids)
        with pytest.raises(UserError, match="300 of 300 test grids are training grids"):
            load_puzzles(PuzzleConfig(train_paths=[path], valid_paths=[path]))

    def test_folder_of_arrays(self, grids, tmp_path):
        kind = Sudoku(4, "relabel")
        halves = load_puzzles(PuzzleConfig(n_puzzles=200, symmetries="relabel"))
        write_folder(tmp_path / "npy", kind, halves.train, halves.valid)
        config = PuzzleConfig(puzzle="arc", train_paths=[str(tmp_path / "npy")], symmetries="relabel")
        data = load_puzzles(config)
        assert data.kind.name == "sudoku4"  # the folder knows
        np.testing.assert_array_equal(data.valid.inputs, halves.valid.inputs)
        grouped = halves.train._replace(groups=np.arange(halves.train.n_rows, dtype=np.int32) // 2)
        write_folder(tmp_path / "pairs", kind, grouped, halves.valid)
        part = load_puzzles(PuzzleConfig(train_paths=[str(tmp_path / "pairs")], n_puzzles=3, symmetries="relabel"))
        np.testing.assert_array_equal(part.train.inputs, halves.train.inputs[:6])  # no group is cut
        with pytest.raises(UserError, match="is used alone"):
            load_puzzles(PuzzleConfig(train_paths=[str(tmp_path / "npy")] * 2))

    def test_mazes_are_generated_and_arc_is_not(self):
        data = load_puzzles(PuzzleConfig(puzzle="maze5x5", n_puzzles=20))
        assert data.train.n_rows + data.valid.n_rows == 20
        with pytest.raises(UserError, match="arc puzzles cannot be generated: give --train_paths"):
            load_puzzles(PuzzleConfig(puzzle="arc"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_share": 1.0}, "valid_share is 1.0"),
        ({"explore": 1.5}, "explore is 1.5"),
        ({"n_puzzles": -1}, "n_puzzles is -1"),
        ({"eval_steps": 0}, "eval_steps is 0"),
        ({"puzzle_lr": 0.0}, "puzzle_lr is 0.0"),
        ({"puzzle_weight_decay": -1.0}, "puzzle_weight_decay is -1.0"),
        ({"train_paths": ["a.csv"], "low": 5}, "low and high are for generated puzzles"),
        ({"train_paths": ["a.csv"], "difficulty": "guess"}, "difficulty is for generated puzzles: leave it out"),
        ({"valid_paths": ["a.csv"]}, "valid_paths without train_paths"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PuzzleConfig(**settings)


def test_unknown_kind():
    with pytest.raises(UserError, match="puzzle kind 'chess' is not known"):
        PuzzleConfig(puzzle="chess")


class TestDraws:
    def test_a_puzzle_depends_on_its_number_alone(self, grids):
        numbers = np.arange(3 * BLOCK)
        whole = PuzzleDraws(Sudoku(4), grids, 5, augment=True).take(numbers)
        draws = PuzzleDraws(Sudoku(4), grids, 5, augment=True)
        for part in (numbers[700:], numbers[:10], numbers[250:260], numbers[1::7]):
            for a, b in zip(draws.take(part), whole, strict=True):
                np.testing.assert_array_equal(a, b[part])
        other = PuzzleDraws(Sudoku(4), grids, 6, augment=True).take(numbers)
        assert (other[0] != whole[0]).any(1).mean() > 0.9

    def test_an_epoch_has_every_puzzle_once(self, grids):
        inputs, labels, _ = PuzzleDraws(Sudoku(4), grids, 0, augment=False).take(np.arange(600))
        for epoch in (slice(300), slice(300, 600)):
            pairs = np.concatenate([inputs[epoch], labels[epoch]], 1)
            expected = np.concatenate([grids.inputs, grids.labels], 1)
            assert sorted(map(bytes, pairs)) == sorted(map(bytes, expected))
        assert (inputs[:300] != inputs[300:]).any()

    def test_augmented_puzzles_are_right(self, grids):
        inputs, labels, _ = PuzzleDraws(Sudoku(4), grids, 0, augment=True).take(np.arange(300))
        assert Sudoku(4).are_right(inputs, labels).all()

    def test_a_group_counts_once_and_all_its_rows_are_drawn(self, grids):
        few = grids.take(slice(10))._replace(
            groups=np.array([0] * 7 + [1, 1, 2], np.int32), puzzle_ids=np.arange(10, dtype=np.int32)
        )
        draws = PuzzleDraws(Sudoku(4), few, 0, augment=False)
        ids = draws.take(np.arange(900))[2]
        assert draws.n_groups == 3 and set(ids) == set(range(10))
        assert (few.groups[ids].reshape(-1, 3).sum(1) == 3).all()  # each epoch of three has groups 0, 1 and 2


def test_form_of_a_checkpoint(tmp_path):
    PuzzleForm(Sudoku(6, "relabel")).save(tmp_path)
    form = read_form(tmp_path)
    assert (form.kind.name, form.kind.symmetries, form.vocab_size) == ("sudoku6", "relabel", 8)
    assert form.names == [] and not (tmp_path / "identifiers.json").exists()
    PuzzleForm(Sudoku(6), ["<blank>", "a"]).save(tmp_path)
    assert read_form(tmp_path).names == ["<blank>", "a"]
    (tmp_path / "puzzle.json").write_text('{"kind": "sudoku6", "symbols": "ab"}')
    with pytest.raises(UserError, match="symbols are 'ab'"):
        read_form(tmp_path)
    with pytest.raises(UserError, match="is no puzzle model"):
        read_form(tmp_path / "nothing")


def test_difficulty_bins():
    values = {"guess": np.array([0, 1, 1]), "rating": np.array([0.5, np.nan, 2])}
    bins = {name: rows.tolist() for name, rows in difficulty_bins(values).items()}
    assert bins == {
        "guess_0": [True, False, False],
        "guess_1": [False, True, True],
        "rating_0.5": [True, False, False],
        "rating_2": [False, False, True],
    }
    many = difficulty_bins({"clues": np.arange(100)})
    assert [(name, rows.sum()) for name, rows in many.items()] == [
        *(("clues_from_0", 24), ("clues_from_24", 25), ("clues_from_49", 25), ("clues_from_74", 26))
    ]


def test_rows_of_files_keep_what_all_files_have(grids, tmp_path):
    path = write_csv(tmp_path / "a.csv", Sudoku(4), grids)
    rated = tmp_path / "b.csv"
    kind, one = Sudoku(4), make_grids(grids.inputs[:1], grids.labels[:1])
    question, answer = kind.to_text(one.inputs[0], False), kind.to_text(one.labels[0], False)
    rated.write_text(f"question,answer,rating\n{question},{answer},3.5\n")
    data = load_puzzles(PuzzleConfig(train_paths=[path, str(rated)]))
    assert set(data.train.difficulty) == {"clues", "rounds", "guess"}


class TestDrawsOfPairs:
    """Two tasks: task 0 has the ids 1 and 2 with 3 pairs each, task 1 the ids 3, 4 and 5 with 2 pairs each."""

    @pytest.fixture
    def tasks(self):
        ids = np.array([1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5], np.int32)
        groups = np.array([0] * 6 + [1] * 6, np.int32)
        boards = np.arange(12, dtype=np.uint8)[:, None] * np.ones(4, np.uint8)
        order = np.array([7, 0, 3, 11, 5, 1, 9, 4, 10, 6, 2, 8])  # the rows of a puzzle need not stand together
        return Grids(boards, boards, ids, groups, {}).take(order)

    def test_an_epoch_has_all_pairs_of_one_augmentation_of_each_task(self, tasks):
        draws = PuzzleDraws(Still(), tasks, 0, augment=True)
        assert (draws.n_groups, draws.epoch_size) == (2, 5)
        rows, _, ids = draws.take(np.arange(5 * 200))
        seen = set()
        for epoch in range(200):
            part = slice(5 * epoch, 5 * epoch + 5)
            drawn = sorted(zip(ids[part].tolist(), rows[part, 0].tolist()))
            first, second = drawn[0][0], drawn[-1][0]
            assert drawn == [(first, 3 * first - 3 + i) for i in range(3)] + [
                (second, 2 * second + i) for i in range(2)
            ]
            seen.add((first, second))
        assert len(seen) == 6

    def test_a_pair_depends_on_its_number_alone(self, tasks):
        whole = PuzzleDraws(Still(), tasks, 5, augment=True).take(np.arange(700))
        for part in (np.arange(300, 700), np.arange(3, 9), np.arange(0, 700, 13)):
            again = PuzzleDraws(Still(), tasks, 5, augment=True).take(part)
            assert all(np.array_equal(a, b[part]) for a, b in zip(again, whole, strict=True))
        assert (PuzzleDraws(Still(), tasks, 6, augment=True).take(np.arange(700))[2] != whole[2]).any()

    def test_a_shorter_puzzle_of_a_group_repeats_its_rows(self, tasks):
        tasks = tasks.take(tasks.inputs[:, 0] != 2)  # id 1 keeps two of three pairs
        rows, _, ids = PuzzleDraws(Still(), tasks, 0, augment=False).take(np.arange(5 * 50))
        assert sorted(set(rows[ids == 1, 0].tolist())) == [0, 1]
        counts = np.bincount(rows[ids == 1, 0])
        assert counts[0] == 2 * counts[1]


class Still(Sudoku):
    """Its boards may be moved, but not augmented."""

    def __init__(self):
        super().__init__(4)

    def augment(self, rng, inputs, labels):
        raise AssertionError("a puzzle with an id must keep its colours and symmetry")


class TestArcFolders:
    """The training of task b has the test pair of task c under a symmetry and other colours."""

    @pytest.fixture
    def folder(self, tmp_path):
        def write(name, **tasks):
            def pairs(rows):
                return [{"input": i, "output": o} for i, o in rows]

            content = {task: {"train": pairs(rows[:-1]), "test": pairs(rows[-1:])} for task, rows in tasks.items()}
            (tmp_path / name).write_text(json.dumps(content))
            return tmp_path / name

        a = [([[1, 2]], [[2]]), ([[3, 1]], [[1]]), ([[4, 5]], [[5]])]
        b = [([[1, 2, 3], [0, 0, 4]], [[7]]), ([[1, 1, 1]], [[3, 4, 5]])]
        c = [([[6, 6], [0, 5]], [[1, 1]]), ([[9], [9], [9]], [[5], [4], [3]])]
        d = [([[6, 0], [0, 5]], [[1, 2]]), ([[1], [2], [2], [8]], [[4]])]
        train = write("train.json", a=a, b=[*b, ([[8, 8, 0]], [[8]])])
        return write_arc_folder, [tmp_path / "npy", [train], [write("test.json", c=c, d=d)]]

    def test_tasks_that_leak_are_left_out_of_evaluations(self, folder, capsys):
        write, arguments = folder
        write(*arguments, n_augmentations=4)
        data = load_puzzles(PuzzleConfig(puzzle="arc", train_paths=[str(arguments[0])]))
        assert {name.split("|||")[0] for name in (data.names[i] for i in data.valid.puzzle_ids)} == {"d"}
        assert "1 test grids are training grids under a symmetry of arc: evaluations leave out the 1 tasks" in (
            capsys.readouterr().err
        )
        assert data.valid.n_rows == 5 and data.train.n_rows == 5 * (3 + 3 + 1 + 1)

    def test_nothing_left(self, folder, tmp_path):
        write, (folder, train, test) = folder
        content = json.loads(test[0].read_text())
        test[0].write_text(json.dumps({"c": content["c"]}))
        write(folder, train, test, n_augmentations=2)
        with pytest.raises(UserError, match="test grids are training grids under a symmetry of arc"):
            load_puzzles(PuzzleConfig(puzzle="arc", train_paths=[str(folder)]))
