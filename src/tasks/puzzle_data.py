"""Training data of puzzles: settings, the training and test boards, and the order in which they are drawn.

    kind, train, valid, names = load_puzzles(config)       from files, a folder of .npy arrays, or a generator
    draws = PuzzleDraws(kind, train, seed, augment=True)   an endless sequence of puzzles
    inputs, labels, puzzle_ids = draws.take(numbers)       some of these puzzles

Puzzle number k and its augmentation depend only on (seed, k), so a run can resume at any number.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from src.data.tokenizer_json import NAMES_FILE, PUZZLE_FILE
from src.errors import UserError
from src.files.text import read_object
from src.tasks import mazes, sudoku
from src.tasks.arc import Arc
from src.tasks.puzzle_folder import kind_named, read_folder, read_names, write_names
from src.tasks.puzzles import Grids, PuzzleKind, check_leak, find_leaks, read_csv, split_by_orbit

CHUNK = 100_000  # rows that are read at once
BLOCK = 256  # puzzles that are augmented together; another number gives other augmentations, as another seed does
CLUES = {4: (4, 8), 6: (8, 20), 9: (24, 36)}  # size of a Sudoku -> default range of clues
BINS = 4  # a difficulty with more than MOST_VALUES values is reported in this many ranges
MOST_VALUES = 8


@dataclass
class PuzzleConfig:
    """The puzzles to learn.

    Args:
        puzzle: kind of the puzzles: sudoku4, sudoku6, sudoku9, arc, or a maze such as maze30x30
        train_paths: training puzzles: .csv or .csv.gz files with the columns question and answer, or one folder of
            .npy arrays in the form of the TRM authors (of arc, only this); by default, puzzles are generated
        valid_paths: test puzzles, given like train_paths; by default, valid_share of the training puzzles; a folder of
            .npy arrays brings its own
        valid_share: share of the puzzles that is held out for evaluation; it is chosen so that no symmetry turns a
            test puzzle into a training puzzle
        n_puzzles: number of puzzles to generate, or to take from the start of the files (of a folder: groups, which are
            a puzzle and its augmentations); 0 = all of the files, or 20,000 generated ones
        low: fewest clues of a generated Sudoku, or fewest steps of the path in a generated maze; the default depends on
            the size
        high: most clues of a generated Sudoku, or most steps of the path in a generated maze; the default depends on
            the size
        difficulty: which Sudokus to generate: singles = those that naked and hidden singles solve, guess = those that
            need more, any = both
        symmetries: symmetries of Sudokus, for augmentation and for the split: all, or relabel = only the renaming of
            digits
        augment: draw each training puzzle under a random symmetry; grids of ARC with puzzle identifiers are moved to a
            random place instead
        puzzle_lr: peak learning rate of the embeddings of puzzle identifiers, which are trained by sign-SGD; by
            default, lr
        puzzle_weight_decay: weight decay of these embeddings; by default, weight_decay
        data_seed: seed of the generator and of the split; `seed` only affects the training
        explore: probability that a training puzzle must take a random number of supervision steps, from 2 to
            supervision_steps, before it may halt
        eval_steps: supervision steps in evaluations; by default, those of the model
    """

    puzzle: str = "sudoku4"
    train_paths: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    valid_share: float = 0.15
    n_puzzles: int = 0
    low: int | None = None
    high: int | None = None
    difficulty: Literal["any", "singles", "guess"] = "any"
    symmetries: Literal["all", "relabel"] = "all"
    augment: bool = True
    puzzle_lr: float | None = None
    puzzle_weight_decay: float | None = None
    data_seed: int = 0
    explore: float = 0.1
    eval_steps: int | None = None

    def __post_init__(self):
        kind_named(self.puzzle)
        if not 0 < self.valid_share < 1:
            raise ValueError(f"valid_share is {self.valid_share}: set it between 0 and 1")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore is {self.explore}: set it from 0 to 1")
        if self.puzzle_lr is not None and not 0 < self.puzzle_lr < 1e3:
            raise ValueError(f"puzzle_lr is {self.puzzle_lr}: set it above 0, or leave it out")
        if self.puzzle_weight_decay is not None and not 0 <= self.puzzle_weight_decay < 1e3:
            raise ValueError(f"puzzle_weight_decay is {self.puzzle_weight_decay}: set it to 0 or more, or leave it out")
        for name in ("n_puzzles", "data_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 0 or more")
        for name in ("low", "high", "eval_steps"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= 10_000:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more, up to 10,000")
        if self.train_paths and (self.low or self.high):
            raise ValueError("low and high are for generated puzzles: leave them out, or leave out train_paths")
        if self.train_paths and self.difficulty != "any":
            raise ValueError("difficulty is for generated puzzles: leave it out, or leave out train_paths")
        if self.valid_paths and not self.train_paths:
            raise ValueError("valid_paths without train_paths: give both, or neither to generate puzzles")


def puzzles_of(settings: dict) -> PuzzleConfig:
    """Returns the settings of the puzzles among those of a run's config.yaml."""
    names = {field.name for field in fields(PuzzleConfig)}
    return PuzzleConfig(**{name: settings[name] for name in names & settings.keys()})


class HeldOut:
    """The puzzles that evaluations solve.  `len()` is their number."""

    def __init__(self, grids: Grids):
        self.grids = grids

    def __len__(self):
        return self.grids.n_rows

    def __str__(self):
        return f"{self.grids.n_rows:,} puzzles"


class PuzzleData(NamedTuple):
    kind: PuzzleKind
    train: Grids
    valid: Grids
    names: list[str]  # names[i] is the name of puzzle id i


# ---- loading --------------------------------------------------------------------------------------------------------


def load_puzzles(config: PuzzleConfig) -> PuzzleData:
    """Returns the puzzles of a run.

    Raises UserError if a file cannot be used, or if a test puzzle is in the orbit of a training puzzle."""
    kind, names = _with_symmetries(kind_named(config.puzzle), config.symmetries), ["<blank>"]
    folders = [path for path in config.train_paths if Path(path).is_dir()]
    if folders:
        if len(config.train_paths) > 1 or config.valid_paths:
            raise UserError(f"--train_paths {folders[0]}: a folder of arrays is used alone; give no other path")
        folder = read_folder(folders[0])
        kind, names = _with_symmetries(folder.kind, config.symmetries), folder.names
        train, valid = folder.train, folder.test
        if config.n_puzzles:  # whole groups, because a puzzle may have several rows
            train = train.take(np.isin(train.groups, np.unique(train.groups)[: config.n_puzzles]))
    elif config.train_paths and isinstance(kind, Arc):
        advice = "give one folder of arrays, as write_arc_folder of src/tasks/puzzle_folder.py makes it"
        raise UserError(f"--train_paths {config.train_paths[0]}: puzzle arc is not read from files: {advice}")
    elif config.train_paths:
        train = _first(join([read_csv(kind, path) for path in config.train_paths]), config.n_puzzles)
        if config.valid_paths:
            valid = join([read_csv(kind, path) for path in config.valid_paths])
        else:
            train, valid = split_by_orbit(kind, train, config.valid_share, config.data_seed)
    else:
        train, valid = split_by_orbit(kind, generate(kind, config), config.valid_share, config.data_seed)
    if folders or config.valid_paths:  # puzzles that were split by orbit cannot leak
        if kind.has_rules:
            check_leak(kind, train, valid)
        else:
            valid = _without_leaks(kind, train, valid)
    if not valid.difficulty:
        valid = valid._replace(difficulty=kind.difficulty(valid.inputs, valid.labels))
    return PuzzleData(kind, train, valid, names)


def _without_leaks(kind, train, valid):
    """Test grids without the tasks (groups) of which a grid is a training grid under a symmetry; ARC itself has some.

    Raises UserError if none are left."""
    leaks = find_leaks(kind, train, valid)
    if not leaks:
        return valid
    is_good = ~np.isin(valid.groups, valid.groups[list(leaks)])
    if not is_good.any():
        check_leak(kind, train, valid)
    n_groups = len(np.unique(valid.groups[~is_good]))
    print(
        f"{len(leaks)} test grids are training grids under a symmetry of {kind.name}: evaluations leave out the "
        f"{n_groups} tasks that have them",
        file=sys.stderr,
    )
    return valid.take(is_good)


def _with_symmetries(kind, symmetries):
    if isinstance(kind, sudoku.Sudoku):
        return sudoku.Sudoku(kind.size, symmetries)
    return kind


def generate(kind: PuzzleKind, config: PuzzleConfig) -> Grids:
    """Returns generated puzzles, as a config without paths asks for. Raises UserError if the kind has no generator."""
    n = config.n_puzzles or 20_000
    if isinstance(kind, sudoku.Sudoku):
        low, high = (
            given or default for given, default in zip((config.low, config.high), CLUES[kind.size], strict=True)
        )
        return sudoku.generate(kind.size, n, (low, high), config.data_seed, config.difficulty)
    if isinstance(kind, mazes.Maze):
        high = config.high or kind.cells // 4
        return mazes.generate(kind.height, kind.width, n, (config.low or 1, high), config.data_seed)
    raise UserError(f"{kind.name} puzzles cannot be generated: give --train_paths")


def _first(grids, n):
    return grids.take(slice(n)) if n else grids


def join(parts: list[Grids]) -> Grids:
    """Returns the puzzles of several files; each row is a group of its own.

    A measure of difficulty is kept only if all files have it."""
    inputs, labels, ids = (np.concatenate([part[i] for part in parts]) for i in range(3))
    shared = set.intersection(*(set(part.difficulty) for part in parts))
    difficulty = {name: np.concatenate([part.difficulty[name] for part in parts]) for name in sorted(shared)}
    return Grids(inputs, labels, ids, np.arange(len(inputs), dtype=np.int32), difficulty)


def fingerprint(data: PuzzleData) -> dict:
    """Returns {part: digest of its boards}, by which a resumed run sees whether the puzzles are still the same."""
    return {"train": digest_of(data.train), "valid": digest_of(data.valid)}


def digest_of(grids: Grids) -> str:
    """Returns a digest (hex) of boards, their answers, ids and groups, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for array in grids[:4]:
        for start in range(0, len(array), CHUNK):  # a mapped file is never in memory as a whole
            digest.update(np.ascontiguousarray(array[start : start + CHUNK]))
    return digest.hexdigest()


# ---- what a checkpoint says about its puzzle ------------------------------------------------------------------------


class PuzzleForm:
    """The kind of puzzle of a model, which a checkpoint keeps in puzzle.json. It takes the place of a tokenizer.

    names[i] is the name of puzzle id i. They are kept in identifiers.json, unless there is only id 0."""

    pad_id = 0

    def __init__(self, kind: PuzzleKind, names: list[str] | None = None):
        self.kind, self.vocab_size, self.names = kind, kind.vocab_size, names or []

    def save(self, folder):
        kind = self.kind
        facts = {"kind": kind.name, "height": kind.height, "width": kind.width, "symbols": kind.symbols}
        if isinstance(kind, sudoku.Sudoku):
            facts["symmetries"] = kind.symmetries
        (Path(folder) / PUZZLE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        if len(self.names) > 1:
            write_names(folder, self.names)


def read_form(folder) -> PuzzleForm:
    """Reads the kind of puzzle of a checkpoint.

    Raises UserError if the checkpoint is not a puzzle model, or if the file is broken."""
    path = Path(folder) / PUZZLE_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no puzzle model (no {PUZZLE_FILE}): train one with train_puzzles.py")
    facts = read_object(path)
    kind = _with_symmetries(kind_named(str(facts.get("kind"))), facts.get("symmetries", "all"))
    if facts.get("symbols") != kind.symbols:
        raise UserError(f"{path}: symbols are {facts.get('symbols')!r}, not {kind.symbols!r}: copy the folder again")
    return PuzzleForm(kind, read_names(folder) if (Path(folder) / NAMES_FILE).is_file() else None)


# ---- order of training ----------------------------------------------------------------------------------------------


class PuzzleDraws:
    """An endless sequence of training puzzles, by number.

    An epoch takes one random row of each group, in random order. If puzzles have several rows, as the pairs of an ARC
    task, it takes one random puzzle of each group, and all its rows in turn. Rows are augmented in blocks of BLOCK,
    which is much faster than one by one. Rows with a puzzle id are only moved, because each augmentation has an id of
    its own."""

    pads = False  # boards of one run have equal size

    def __init__(self, kind: PuzzleKind, grids: Grids, seed: int, augment: bool):
        self.kind, self.grids, self.seed, self.augment = kind, grids, seed, augment
        self._order = np.lexsort((grids.puzzle_ids, grids.groups))
        groups, ids = grids.groups[self._order], grids.puzzle_ids[self._order]
        _, self._first, self._counts = np.unique(groups, return_index=True, return_counts=True)
        self._has_ids = bool(len(ids)) and int(ids.max()) > 0
        starts_group = np.diff(groups, prepend=-1) != 0
        starts_puzzle = starts_group | (np.diff(ids, prepend=-1) != 0) | (ids == 0)
        self._rows = np.flatnonzero(starts_puzzle)  # first row of each puzzle, in self._order
        self._sizes = np.diff(self._rows, append=len(groups))
        self._puzzles = np.flatnonzero(starts_group[self._rows])  # first puzzle of each group
        self._n_puzzles = np.diff(self._puzzles, append=len(self._rows))
        # an epoch always has the same length: a group has as many rows as its largest puzzle
        self._slots = np.maximum.reduceat(self._sizes, self._puzzles)
        self._block, self._boards = None, None
        self._epoch, self._drawn = None, None

    @property
    def n_groups(self) -> int:
        return len(self._first)

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch."""
        return int(self._slots.sum())

    def take(self, numbers: Int64[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (inputs (n, L), labels (n, L), puzzle ids (n,)) of the puzzles with these ascending numbers."""
        blocks, parts = numbers // BLOCK, []
        for block in np.unique(blocks).tolist():
            if block != self._block:
                self._block, self._boards = block, self._draw(block)
            here = numbers[blocks == block] - block * BLOCK
            parts.append([array[here] for array in self._boards])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _draw(self, block):
        rng = np.random.default_rng((self.seed, block))
        drawn = np.array([self._of_epoch(number) for number in range(block * BLOCK, (block + 1) * BLOCK)])
        if self.epoch_size == self.n_groups:  # one row per puzzle: a group was drawn
            rows = self._order[self._first[drawn] + (rng.random(BLOCK) * self._counts[drawn]).astype(np.int64)]
        else:
            rows = self._order[drawn]
        inputs, labels = self.grids.inputs[rows], self.grids.labels[rows]
        if self.augment:
            change = self.kind.move if self._has_ids else self.kind.augment
            inputs, labels = change(rng, inputs, labels)
        return inputs, labels, self.grids.puzzle_ids[rows]

    def _of_epoch(self, number):
        """The group (or, if puzzles have several rows, the row) with this number."""
        epoch, position = divmod(number, self.epoch_size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._epoch, self._drawn = epoch, rng.permutation(self.n_groups)
            if self.epoch_size > self.n_groups:
                self._drawn = self._rows_of_puzzles(rng, self._drawn)
        return self._drawn[position]

    def _rows_of_puzzles(self, rng, groups):
        """All rows of one random puzzle of each of these groups."""
        puzzles = self._puzzles[groups] + (rng.random(len(groups)) * self._n_puzzles[groups]).astype(np.int64)
        slots = self._slots[groups]
        puzzles, within = np.repeat(puzzles, slots), np.arange(slots.sum()) - np.repeat(slots.cumsum() - slots, slots)
        return self._rows[puzzles] + within % self._sizes[puzzles]


# ---- difficulty -----------------------------------------------------------------------------------------------------


def difficulty_bins(difficulty: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divides puzzles into bins by each measure of difficulty: {name of the bin: (N,) bool, whether a row is in it}.

    A measure with up to MOST_VALUES values has one bin per value, such as clues_7. Other measures have up to BINS bins
    of about equal size, such as rating_from_2.5."""
    bins = {}
    for name, values in difficulty.items():
        values = values.astype(np.float64)
        found = np.unique(values[~np.isnan(values)])
        if len(found) <= MOST_VALUES:
            bins |= {f"{name}_{value:g}": values == value for value in found}
            continue
        edges = np.unique(np.nanquantile(values, np.arange(BINS) / BINS, method="lower"))
        for low, high in zip(edges, [*edges[1:], np.inf], strict=True):
            bins[f"{name}_from_{low:g}"] = (values >= low) & (values < high)
    return bins
