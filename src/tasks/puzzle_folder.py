"""Folders of puzzles in the form of the authors' code for arXiv:2510.04871: .npy arrays, read memory-mapped.

    FOLDER/identifiers.json                       names of puzzle ids; the name of id 0 is <blank>
    FOLDER/{train,test}/dataset.json              lengths, vocabulary, counts
    FOLDER/{train,test}/all__inputs.npy           (N, L) tokens, 0 = padding
                        all__labels.npy           (N, L) tokens, 0 = not a target
                        all__puzzle_identifiers.npy   (P,) id of each puzzle
                        all__puzzle_indices.npy   (P + 1,) first row of each puzzle, and N
                        all__group_indices.npy    (G + 1,) first puzzle of each group, and P

A puzzle is a board, or all pairs of an ARC task under one augmentation; a group is a puzzle and its augmentations. A
folder of ARC tasks also has FOLDER/test_puzzles.json, the tasks of the test as they are, against which votes over the
augmentations are scored (src/tasks/arc_votes.py).

    write_arc_folder("data/arc1", ["arc-agi_training_challenges.json"], ["arc-agi_evaluation_challenges.json"])
"""

import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.tokenizer_json import NAMES_FILE
from src.errors import UserError
from src.files.folders import replacing
from src.files.text import check_is_file, read_json, read_object
from src.tasks.arc import NO_ID, TASKS, Arc, ArcSet, read_tasks
from src.tasks.mazes import Maze
from src.tasks.puzzles import REPORTED, Grids, PuzzleKind
from src.tasks.sudoku import Sudoku
from src.tasks.sudoku_solver import BOXES

SPLITS = ("train", "test")
OWN = {*SPLITS, NAMES_FILE, TASKS}  # what `write_folder` writes in a folder
FACTS = "dataset.json"
CHUNK = 100_000  # rows that are checked at once, so that a mapped file is never in memory as a whole
PLACED = 2_000  # ARC pairs that are augmented at once; each takes some 20 KB meanwhile
MOST_TOKENS = 256  # a token is one byte


class PuzzleFolder(NamedTuple):
    train: Grids
    test: Grids
    names: list[str]  # names[i] is the name of puzzle id i
    kind: PuzzleKind


class Family(NamedTuple):
    """Kinds of puzzles that differ only in their size."""

    make: Callable[..., PuzzleKind]  # makes a kind from the numbers in its name
    pattern: str  # regular expression of the names; its groups are the numbers
    square: str  # name of the kind whose board has `side` x `side` cells
    examples: str  # names, for messages


# every kind of puzzle that a flag or a folder can name
FAMILIES = (
    Family(Sudoku, f"sudoku({'|'.join(map(str, BOXES))})", "sudoku{side}", ", ".join(f"sudoku{n}" for n in BOXES)),
    Family(Arc, "arc", "arc", "arc"),
    Family(Maze, r"maze(\d{1,3})x(\d{1,3})", "maze{side}x{side}", "a maze such as maze30x30"),
)
KNOWN = ", ".join(family.examples for family in FAMILIES[:-1]) + f", or {FAMILIES[-1].examples}"


def kind_named(name: str) -> PuzzleKind:
    """Returns the kind of puzzle with this name.  Raises UserError if no family of FAMILIES has it."""
    for family in FAMILIES:
        if numbers := re.fullmatch(family.pattern, name):
            return family.make(*map(int, numbers.groups()))
    raise UserError(f"puzzle kind {name!r} is not known: use {KNOWN}")


def kind_of_size(cells: int, vocab_size: int) -> PuzzleKind | None:
    """Returns the kind with a square board of this many cells and with this vocabulary, or None if there is none."""
    side = max(2, math.isqrt(cells))  # 1 is too small for any kind
    names = [family.square.format(side=side) for family in FAMILIES]
    kinds = [kind_named(name) for name, family in zip(names, FAMILIES) if re.fullmatch(family.pattern, name)]
    return next((kind for kind in kinds if (kind.cells, kind.vocab_size) == (cells, vocab_size)), None)


def read_folder(folder, verify: bool = True) -> PuzzleFolder:
    """Reads the training and test puzzles of a folder.

    Arrays of bytes stay on disk, memory-mapped; arrays of larger integers are copied into bytes. With verify, boards
    whose answer breaks the rules are left out, and the first few are named on stderr. `difficulty` is empty, because
    folders do not store it. Raises UserError, which names the file, if a file is missing, is not an array of integers,
    does not fit the other files, or holds a value out of range."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one with train/, test/ and identifiers.json")
    names = read_names(folder)
    facts = {split: _read_facts(folder / split / FACTS, len(names)) for split in SPLITS}
    kind = _kind_of(facts["train"], folder / "train" / FACTS)
    if _kind_of(facts["test"], folder / "test" / FACTS).name != kind.name:
        raise UserError(f"{folder}: train and test are puzzles of different kinds: put them into folders of their own")
    grids = [_read_split(folder / split, facts[split]) for split in SPLITS]
    if verify and kind.has_rules:
        grids = [_without_wrong(kind, each, folder / split) for each, split in zip(grids, SPLITS)]
    return PuzzleFolder(*grids, names, kind)


def read_names(folder) -> list[str]:
    """Reads the names of puzzle ids from the identifiers.json of a folder."""
    path = Path(folder) / NAMES_FILE
    names = read_json(path)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no list of names, one per puzzle id: copy it again")
    return names


def write_names(folder, names: list[str]):
    (Path(folder) / NAMES_FILE).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def _read_facts(path, n_names):
    facts = read_object(path)
    for name in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        if type(facts.get(name)) is not int or facts[name] < 1:
            raise UserError(f"{path}: {name} is {facts.get(name)!r}: it must be a number from 1")
    for name in ("pad_id", "ignore_label_id", "blank_identifier_id"):
        if facts.get(name) != 0:
            raise UserError(f"{path}: {name} is {facts.get(name)!r}: only 0 can be read")
    if facts["vocab_size"] > MOST_TOKENS:
        raise UserError(f"{path}: vocab_size is {facts['vocab_size']}: at most {MOST_TOKENS} can be read")
    if facts["num_puzzle_identifiers"] > n_names:
        raise UserError(
            f"{path} has {facts['num_puzzle_identifiers']} puzzle ids, but identifiers.json {n_names} names"
        )
    sets = facts.get("sets")
    if not isinstance(sets, list) or len(sets) != 1 or not re.fullmatch(r"\w+", str(sets[0])):
        raise UserError(f"{path}: sets is {sets!r}: only one set, such as ['all'], can be read")
    return facts


def _kind_of(facts, path):
    """Returns the kind of puzzles in a folder: the one it names, else a square one with its cells and vocabulary.

    Only folders that `write_folder` made name their kind."""
    if isinstance(facts.get("kind"), str):
        kinds = [kind_named(facts["kind"])]
    else:
        kinds = [kind_of_size(facts["seq_len"], facts["vocab_size"])]
    for kind in kinds:
        if kind is not None and (kind.cells, kind.vocab_size) == (facts["seq_len"], facts["vocab_size"]):
            return kind
    size = f"{facts['seq_len']} cells and {facts['vocab_size']} tokens"
    raise UserError(f"{path}: no kind of puzzle has {size}: use {KNOWN}")


def _read_split(folder, facts):
    prefix = f"{facts['sets'][0]}__"
    paths = {name: folder / f"{prefix}{name}.npy" for name in ("inputs", "labels", "puzzle_identifiers")}
    indices = {name: folder / f"{prefix}{name}.npy" for name in ("puzzle_indices", "group_indices")}
    inputs, labels = (_open(paths[name], 2) for name in ("inputs", "labels"))
    for name, array in (("inputs", inputs), ("labels", labels)):
        if array.shape != (len(inputs), facts["seq_len"]):
            expected = f"({len(inputs)}, {facts['seq_len']}): rows of inputs, seq_len of dataset.json"
            raise UserError(f"{paths[name]} has the shape {array.shape}, not {expected}")
    inputs, labels = (
        _as_bytes(array, facts["vocab_size"], paths[name]) for name, array in (("inputs", inputs), ("labels", labels))
    )
    ids = np.array(_open(paths["puzzle_identifiers"], 1))
    first_rows = _read_indices(indices["puzzle_indices"], len(inputs), "rows of inputs")
    if len(ids) != len(first_rows) - 1:
        raise UserError(
            f"{paths['puzzle_identifiers']} has {len(ids)} puzzles, but puzzle_indices {len(first_rows) - 1}"
        )
    first_puzzles = _read_indices(indices["group_indices"], len(ids), "puzzles of puzzle_indices")
    if ids.min() < 0 or ids.max() >= facts["num_puzzle_identifiers"]:
        number = facts["num_puzzle_identifiers"]
        bounds = f"0 to {number - 1}, because num_puzzle_identifiers in dataset.json is {number}"
        raise UserError(f"{paths['puzzle_identifiers']} holds ids from {ids.min()} to {ids.max()}, not from {bounds}")
    groups = np.repeat(np.arange(len(first_puzzles) - 1, dtype=np.int32), np.diff(first_puzzles))
    n_rows = np.diff(first_rows)
    return Grids(inputs, labels, np.repeat(ids.astype(np.int32), n_rows), np.repeat(groups, n_rows), {})


def _open(path, n_axes):
    """Returns a memory-mapped array of integers. open_memmap never unpickles, so a file cannot run code."""
    check_is_file(path, path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python source, which can fail in many ways
        raise UserError(f"{path} cannot be read as an array of integers: {' '.join(str(error).split())}") from None
    if array.dtype.kind not in "iu" or array.ndim != n_axes:
        form = f"{array.ndim} axes of {array.dtype}"
        raise UserError(f"{path} has {form}: it must have {n_axes} axes of integers")
    return array


def _as_bytes(array, vocab_size, path):
    """Returns tokens as uint8 after a check of their range. An array of bytes is returned as it is, still mapped."""
    tokens = array if array.dtype == np.uint8 else np.empty(array.shape, np.uint8)
    for start in range(0, len(array), CHUNK):
        chunk = array[start : start + CHUNK]
        is_wrong = (chunk < 0) | (chunk >= vocab_size)
        if is_wrong.any():
            row, cell = np.argwhere(is_wrong)[0]
            value = f"row {start + row}, cell {cell} is {chunk[row, cell]} (both count from 0)"
            bound = f"a token from 0 to {vocab_size - 1}, because vocab_size in dataset.json is {vocab_size}"
            raise UserError(f"{path}: {value}; it must be {bound}")
        if tokens is not array:
            tokens[start : start + CHUNK] = chunk
    return tokens


def _read_indices(path, end, of_what):
    """Returns an array of indices, which must ascend from 0 to `end`."""
    indices = np.array(_open(path, 1))
    if len(indices) < 2 or indices[0] != 0 or indices[-1] != end or (indices[1:] <= indices[:-1]).any():
        raise UserError(f"{path} does not ascend from 0 to {end}, the number of {of_what}: copy it again")
    return indices.astype(np.int64)


def _without_wrong(kind, grids, folder):
    """Returns grids without the boards whose answer breaks the rules; the first few of these are named on stderr."""
    parts = [slice(start, start + CHUNK) for start in range(0, grids.n_rows, CHUNK)]
    is_right = np.concatenate([kind.are_right(grids.inputs[part], grids.labels[part]) for part in parts])
    wrong = np.flatnonzero(~is_right)
    for row in wrong[:REPORTED]:
        reason = kind.verify(grids.inputs[row], grids.labels[row])
        print(f"{folder}: skipped row {row}, wrong answer: {reason}", file=sys.stderr)
    if not len(wrong):
        return grids
    print(f"{folder}: {len(wrong)} of {grids.n_rows} puzzles skipped", file=sys.stderr)
    if len(wrong) == grids.n_rows:
        raise UserError(f"{folder} holds no {kind.name} puzzle with a right answer")
    return grids.take(is_right)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_folder(
    folder, kind: PuzzleKind, train: Grids, test: Grids, names: list[str] | None = None, tasks: dict | None = None
):
    """Write both splits in a form that the authors' code and `read_folder` can read. An old folder is replaced.

    names[i] is the name of puzzle id i; by default, there is only id 0. Rows are sorted by group and puzzle id. A row
    with puzzle id 0 becomes a puzzle of its own. Rows of a group that share another id become one puzzle, as in ARC.
    tasks: content of test_puzzles.json. Raises UserError if `folder` is a file, if a split is empty, or if an id has no
    name."""
    names = [NO_ID] if names is None else names
    for split, grids in zip(SPLITS, (train, test)):
        if not grids.n_rows:
            raise UserError(f"there is no {split} puzzle to write into {folder}: give one or more")
        if grids.puzzle_ids.max() >= len(names):
            raise UserError(f"puzzle id {grids.puzzle_ids.max()} of {split} has no name: {len(names)} names are given")
    for path in itertools.chain.from_iterable(Path(folder, split).glob("*") for split in SPLITS):
        if path.name != FACTS and path.suffix != ".npy":
            raise UserError(f"{path} is not part of a puzzle folder and would be lost: move it, or name another folder")
    with replacing(folder, OWN.__contains__) as new:
        for split, grids in zip(SPLITS, (train, test)):
            (new / split).mkdir()
            _write_split(new / split, kind, grids, len(names))
        write_names(new, names)
        if tasks is not None:
            (new / TASKS).write_text(json.dumps(tasks), encoding="utf-8")


def write_arc_folder(folder, train_paths, test_paths, n_augmentations: int = 1000, seed: int = 0) -> ArcSet:
    """Write ARC tasks with all their augmentations, each with a puzzle id of its own; returns the tasks and ids.

    Paths are those of `read_tasks`. Training has the training pairs of all tasks and the known test pairs of the
    training tasks. All grids are at the upper left; training moves them. Takes 1.8 KB of memory and of disk per pair
    and augmentation. Raises UserError as `read_tasks` and `write_folder` do."""
    train_tasks, test_tasks = (
        [task for path in paths for task in read_tasks(path)] for paths in (train_paths, test_paths)
    )
    data = ArcSet(train_tasks, test_tasks, n_augmentations, seed)
    tasks = {}
    for task in test_tasks:
        parts = {"train": task.train, "test": task.test}
        tasks[task.name] = {name: [_as_json(*pair) for pair in pairs] for name, pairs in parts.items()}
    write_folder(folder, Arc(), _augmented(data, data.train), _augmented(data, data.test), data.names, tasks)
    return data


def _as_json(grid, output):
    return {"input": grid.tolist()} | ({} if output is None else {"output": output.tolist()})


def _augmented(data, grids) -> Grids:
    """Each row of `grids` with each puzzle id of its task."""
    rows, ids = data.every_puzzle(grids)
    boards = [np.empty((len(rows), array.shape[1]), np.uint8) for array in grids[:2]]
    for start in range(0, len(rows), PLACED):
        part = slice(start, start + PLACED)
        placed = data.place(grids.take(rows[part]), ids[part])
        for board, new in zip(boards, placed[:2], strict=True):
            board[part] = new
    return Grids(*boards, ids.astype(np.int32), grids.groups[rows], {})


def _write_split(folder, kind, grids, n_names):
    order = np.lexsort((grids.puzzle_ids, grids.groups))
    if (order != np.arange(len(order))).any():  # arrays that are sorted already stay mapped
        grids = grids.take(order)
    new_group = np.diff(grids.groups, prepend=grids.groups[0] - 1) != 0
    new_puzzle = new_group | (np.diff(grids.puzzle_ids, prepend=-1) != 0) | (grids.puzzle_ids == 0)
    first_rows = np.append(np.flatnonzero(new_puzzle), grids.n_rows)
    first_puzzles = np.append(np.flatnonzero(new_group[new_puzzle]), len(first_rows) - 1)
    arrays = {"inputs": grids.inputs, "labels": grids.labels, "puzzle_identifiers": grids.puzzle_ids[new_puzzle]}
    arrays |= {"puzzle_indices": first_rows.astype(np.int32), "group_indices": first_puzzles.astype(np.int32)}
    for name, array in arrays.items():
        np.save(folder / f"all__{name}.npy", array, allow_pickle=False)
    facts = {"seq_len": kind.cells, "vocab_size": kind.vocab_size, "num_puzzle_identifiers": n_names}
    facts |= {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "sets": ["all"], "kind": kind.name}
    facts |= {"total_groups": len(first_puzzles) - 1, "total_puzzles": len(first_rows) - 1}
    facts |= {"mean_puzzle_examples": grids.n_rows / (len(first_rows) - 1)}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
