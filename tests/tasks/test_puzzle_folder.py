"""Folders of .npy arrays in the authors' form: round trips, memory mapping, and a message for each kind of damage."""

import json
import pickle

import numpy as np
import pytest

from src.errors import UserError
from src.tasks import puzzle_folder
from src.tasks.arc import ArcSet, Task, crop, parse_puzzle_name, read_tasks
from src.tasks.mazes import Maze
from src.tasks.mazes import generate as generate_mazes
from src.tasks.puzzle_folder import kind_named, kind_of_size, read_folder, write_arc_folder, write_folder
from src.tasks.sudoku import Sudoku, generate


@pytest.fixture
def folder(tmp_path):
    """Sudoku of size 4: 6 puzzles with one augmentation each to train, 5 puzzles to test."""
    kind, grids = Sudoku(4), generate(4, 11, (6, 9), seed=0)
    train = grids.take(np.repeat(np.arange(6), 2))
    moved = kind.augment(np.random.default_rng(0), train.inputs[1::2], train.labels[1::2])
    train.inputs[1::2], train.labels[1::2] = moved
    write_folder(tmp_path / "data", kind, train, grids.take(np.arange(6, 11)))
    return tmp_path / "data"


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4]))


def change(folder, name, function):
    """Replace an array of the training split by a function of it."""
    path = folder / "train" / f"all__{name}.npy"
    array = function(np.load(path))
    path.unlink()
    np.save(path, array)


def change_facts(folder, split="train", **facts):
    path = folder / split / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_files_are_those_of_the_authors(folder):
    """Written out: each of 6 groups has a puzzle and one augmentation, each puzzle one row."""
    train = {path.stem: np.load(path) for path in (folder / "train").glob("*.npy")}
    assert train["all__puzzle_indices"].tolist() == list(range(13)) and train["all__puzzle_indices"].dtype == np.int32
    assert train["all__group_indices"].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert train["all__puzzle_identifiers"].tolist() == [0] * 12
    assert train["all__inputs"].shape == (12, 16) and train["all__labels"].dtype == np.uint8
    assert json.loads((folder / "identifiers.json").read_text()) == ["<blank>"]
    facts = json.loads((folder / "train" / "dataset.json").read_text())
    assert facts == {
        "seq_len": 16,
        "vocab_size": 6,
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "num_puzzle_identifiers": 1,
        "total_groups": 6,
        "total_puzzles": 12,
        "mean_puzzle_examples": 1.0,
        "sets": ["all"],
        "kind": "sudoku4",
    }


def test_a_folder_is_read_as_it_was_written(folder, tmp_path):
    data = read_folder(folder)
    assert data.kind.name == "sudoku4" and data.names == ["<blank>"]
    assert data.train.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and data.test.groups.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert isinstance(data.train.inputs, np.memmap) and isinstance(data.test.labels, np.memmap)
    write_folder(tmp_path / "again", data.kind, data.train, data.test, data.names)
    again = read_folder(tmp_path / "again")
    assert same(again.train, data.train) and same(again.test, data.test)
    write_folder(folder, data.kind, data.train, data.test)  # over the mapped files themselves
    assert same(read_folder(folder).train, again.train)


def test_mazes_and_arc_are_read_as_they_were_written(tmp_path):
    grids = generate_mazes(4, 7, 9, (2, 9), seed=0)
    write_folder(tmp_path / "maze", Maze(4, 7), grids.take(np.arange(5)), grids.take(np.arange(5, 9)))
    data = read_folder(tmp_path / "maze")
    assert data.kind.name == "maze4x7" and np.array_equal(data.train.inputs, grids.inputs[:5])

    def pair(*rows):
        return tuple(np.array(row, np.uint8) for row in rows)

    tasks = [
        Task("a", [pair([[1, 2]], [[2], [1]]), pair([[3, 4]], [[4], [3]])], [pair([[5, 6]], [[6], [5]])]),
        Task("b", [pair([[1]], [[2]])], [pair([[7]], [[8]]), pair([[8]], [[9]])]),
    ]
    arc = ArcSet([], tasks, 4, seed=0)
    train, test = (
        arc.place(grids.take(rows), ids) for grids in (arc.train, arc.test) for rows, ids in [arc.every_puzzle(grids)]
    )
    write_folder(tmp_path / "arc", kind_named("arc"), train, test, arc.names)
    data = read_folder(tmp_path / "arc")
    assert data.kind.name == "arc" and data.names == arc.names
    assert same(data.train, train) and same(data.test, test)
    first_rows = np.load(tmp_path / "arc" / "train" / "all__puzzle_indices.npy")
    assert first_rows.tolist() == [0, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15]
    assert np.load(tmp_path / "arc" / "test" / "all__group_indices.npy").tolist() == [0, 5, 10]


def test_rows_are_sorted_by_group(tmp_path, folder):
    data = read_folder(folder)
    order = np.random.default_rng(0).permutation(12)
    write_folder(tmp_path / "again", data.kind, data.train.take(order), data.test)
    again = read_folder(tmp_path / "again").train
    assert again.groups.tolist() == data.train.groups.tolist()
    for group in range(6):
        assert {row.tobytes() for row in again.inputs[again.groups == group]} == {
            row.tobytes() for row in data.train.inputs[data.train.groups == group]
        }


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_arrays_of_larger_integers_become_bytes(folder, monkeypatch, dtype):
    """The authors' own Sudoku arrays are int64 where they were augmented."""
    before = read_folder(folder).train
    change(folder, "inputs", lambda array: array.astype(dtype))
    change(folder, "labels", lambda array: array.astype(dtype))
    monkeypatch.setattr(puzzle_folder, "CHUNK", 5)
    after = read_folder(folder).train
    assert same(before, after) and after.inputs.dtype == np.uint8 and not isinstance(after.inputs, np.memmap)


def test_a_folder_without_our_kind_is_recognised_by_its_shape(folder, tmp_path):
    for split in ("train", "test"):
        change_facts(folder, split, kind=None)
    assert read_folder(folder).kind.name == "sudoku4"
    grids = generate_mazes(5, 5, 4, (2, 9), seed=0)
    write_folder(tmp_path / "maze", Maze(5), grids, grids)
    for split in ("train", "test"):
        change_facts(tmp_path / "maze", split, kind=None)
    assert read_folder(tmp_path / "maze").kind.name == "maze5x5"


def test_wrong_answers_are_named_and_left_out(folder, capsys):
    change(folder, "labels", lambda labels: np.concatenate([labels[:3], labels[4:5], labels[4:]]))
    grids = read_folder(folder).train
    assert grids.n_rows == 11 and grids.groups.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{folder / 'train'}: skipped row 3, wrong answer: ") and len(lines) == 2
    assert lines[1] == f"{folder / 'train'}: 1 of 12 puzzles skipped"
    assert read_folder(folder, verify=False).train.n_rows == 12
    change(folder, "labels", lambda labels: labels * 0 + 2)
    with pytest.raises(UserError, match="holds no sudoku4 puzzle with a right answer"):
        read_folder(folder)


@pytest.mark.parametrize("file", ["identifiers.json", "train/dataset.json", "test/dataset.json"])
@pytest.mark.parametrize(
    "content, message", [(None, "no such file"), ("{", "broken JSON"), ("3", "not a JSON object|is no list")]
)
def test_missing_and_broken_json(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert file in str(error.value)


ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_and_broken_arrays(folder, name):
    path = folder / "test" / f"all__{name}.npy"
    data = path.read_bytes()
    for content in (
        data[:-3],
        data[:50],
        b"",
        b"text",
        pickle.dumps([1]),
        data.replace(b"'descr'", b"'descs'", 1),
        data.replace(b"}", b" "),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an array of integers") as error:
            read_folder(folder)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_folder(folder)


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_another_form(folder, name):
    for function in (lambda array: array.astype(np.float32), lambda array: array[None], lambda array: array > 0):
        path = folder / "train" / f"all__{name}.npy"
        before = path.read_bytes()
        change(folder, name, function)
        with pytest.raises(UserError, match="axes of (integers|float32|bool)"):
            read_folder(folder)
        path.write_bytes(before)
    np.save(path, np.array([{}, []], dtype=object))
    with pytest.raises(UserError, match="cannot be read as an array of integers"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name, function, message",
    [
        ("labels", lambda a: np.where(a == 3, 6, a), r"row \d+, cell \d+ is 6 .*a token from 0 to 5, .*vocab_size"),
        ("inputs", lambda a: np.where(a == 3, -1, a.astype(np.int64)), r"is -1 .*must be a token from 0 to 5"),
        ("inputs", lambda a: np.where(a == 3, 2**40, a.astype(np.int64)), f"is {2**40} "),
        ("labels", lambda a: a[:-1], r"all__labels.npy has the shape \(11, 16\), not \(12, 16\)"),
        ("inputs", lambda a: a[:, :-1], r"all__inputs.npy has the shape \(12, 15\), not \(12, 16\)"),
        ("puzzle_indices", lambda a: a[:-1], "puzzle_indices.npy does not ascend from 0 to 12, the number of rows"),
        ("puzzle_indices", lambda a: a[1:], "puzzle_indices.npy does not ascend from 0 to 12"),
        ("puzzle_indices", lambda a: a[::-1], "puzzle_indices.npy does not ascend from 0 to 12"),
        ("puzzle_indices", lambda a: np.sort(np.append(a, 4)), "puzzle_indices.npy does not ascend from 0 to 12"),
        ("puzzle_indices", lambda a: np.delete(a, 3), "has 12 puzzles, but puzzle_indices 11"),
        ("group_indices", lambda a: a + 1, "group_indices.npy does not ascend from 0 to 12, the number of puzzles"),
        ("group_indices", lambda a: a[:1], "group_indices.npy does not ascend from 0 to 12"),
        ("puzzle_identifiers", lambda a: a + 1, "holds ids from 1 to 1, not from 0 to 0, because num_puzzle_id"),
        ("puzzle_identifiers", lambda a: a - 1, "holds ids from -1 to -1"),
        ("puzzle_identifiers", lambda a: a[:-1], "has 11 puzzles, but puzzle_indices 12"),
    ],
)
def test_arrays_that_do_not_fit(folder, name, function, message):
    change(folder, name, function)
    with pytest.raises(UserError, match=message) as error:
        read_folder(folder)
    assert str(folder / "train" / f"all__{name}.npy") in str(error.value) or name == "puzzle_indices"


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"seq_len": 0}, "seq_len is 0: it must be a number from 1"),
        ({"vocab_size": "6"}, "vocab_size is '6'"),
        ({"vocab_size": 300}, "vocab_size is 300: at most 256"),
        ({"num_puzzle_identifiers": 2}, "has 2 puzzle ids, but identifiers.json 1 names"),
        ({"ignore_label_id": None}, "ignore_label_id is None: only 0 can be read"),
        ({"sets": ["all", "more"]}, "only one set"),
        ({"sets": ["../all"]}, "only one set"),
        ({"sets": "all"}, "only one set"),
        ({"kind": "chess"}, "puzzle kind 'chess' is not known: use sudoku4, sudoku6, sudoku9, arc, or a maze"),
        ({"kind": "sudoku6"}, "no kind of puzzle has 16 cells and 6 tokens"),
        ({"kind": None, "seq_len": 17}, "no kind of puzzle has 17 cells and 6 tokens"),
        ({"kind": "maze4x4"}, "train and test are puzzles of different kinds"),
    ],
)
def test_facts_that_cannot_be(folder, facts, message):
    change_facts(folder, **facts)
    with pytest.raises(UserError, match=message):
        read_folder(folder)


def test_what_cannot_be_written(folder, tmp_path):
    data = read_folder(folder)
    with pytest.raises(UserError, match="there is no test puzzle to write"):
        write_folder(tmp_path / "x", data.kind, data.train, data.test.take(np.zeros(5, bool)))
    named = data.train._replace(puzzle_ids=np.full(12, 3, np.int32))
    with pytest.raises(UserError, match="puzzle id 3 of train has no name: 1 names are given"):
        write_folder(tmp_path / "x", data.kind, named, data.test)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "file", data.kind, data.train, data.test)
    with pytest.raises(UserError, match="is no folder"):
        read_folder(tmp_path / "file")
    (folder / "train" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="notes.md is not part of a puzzle folder and would be lost"):
        write_folder(folder, data.kind, data.train, data.test)
    assert (folder / "train" / "notes.md").read_text() == "mine"


def test_kinds_have_names():
    for name in ("sudoku4", "sudoku6", "sudoku9", "arc", "maze30x30", "maze4x9"):
        assert kind_named(name).name == name
    for name in ("sudoku", "sudoku5", "maze", "maze3", "maze1x9", "arc2", ""):
        with pytest.raises(UserError):
            kind_named(name)


def test_arc_tasks_with_all_their_augmentations(tmp_path):
    """Each id of a task has all its pairs; undoing the augmentation of an id gives the pairs back."""
    rng = np.random.default_rng(0)

    def pairs(n):
        return [{"input": rng.integers(10, size=(3, 2)).tolist(), "output": [[1, 2]]} for _ in range(n)]

    content = {"a": {"train": pairs(3), "test": pairs(1)}, "b": {"train": pairs(2), "test": pairs(2)}}
    del content["b"]["test"][1]["output"]
    for name in content:
        (tmp_path / f"{name}.json").write_text(json.dumps({name: content[name]}))
    data = write_arc_folder(tmp_path / "npy", [tmp_path / "a.json"], [tmp_path / "b.json"], n_augmentations=7, seed=1)
    folder = read_folder(tmp_path / "npy")
    assert folder.kind.name == "arc" and folder.names == data.names and len(folder.names) == 1 + 8 + 8
    assert (folder.train.n_rows, folder.test.n_rows) == (8 * 4 + 8 * 2, 8 * 2)
    for split, parts in ((folder.train, {"a": ("train", "test"), "b": ("train",)}), (folder.test, {"b": ("test",)})):
        assert np.bincount(split.puzzle_ids, minlength=17).tolist() == [0] + [
            sum(len(content[task][part]) for part in parts.get(task, ())) for task in "aaaaaaaabbbbbbbb"
        ]
        for row in range(split.n_rows):
            task, augmentation = parse_puzzle_name(folder.names[split.puzzle_ids[row]])
            found = augmentation.undo(crop(split.inputs[row])).tolist()
            (own,) = [p for part in parts[task] for p in content[task][part] if p["input"] == found]
            if "output" in own:
                assert augmentation.undo(crop(split.labels[row])).tolist() == own["output"]
            else:
                assert not split.labels[row].any()
    assert json.loads((tmp_path / "npy" / "test_puzzles.json").read_text()) == {"b": content["b"]}
    (task,) = read_tasks(tmp_path / "npy" / "test_puzzles.json")
    assert task.name == "b" and task.test[1][1] is None


def test_kinds_by_their_size():
    sizes = [(16, 6), (36, 8), (81, 11), (900, 12), (900, 6), (81, 6), (81, 12), (30, 6), (10**9, 6)]
    kinds = [kind_of_size(*size) for size in sizes]
    assert [kind and kind.name for kind in kinds] == [
        *("sudoku4", "sudoku6", "sudoku9", "arc", "maze30x30", "maze9x9", None, None, None)
    ]
