"""Puzzles on a grid: boards as rows of tokens, what a kind of puzzle provides, files of boards, splits without leaks.

A board of L = height * width cells is one row of tokens, read line by line. Token 0 is padding in inputs and "not a
target" in labels. The token numbers are those of the authors' code for arXiv:2510.04871, so that data and weights can
be exchanged with it.

A symmetry turns a puzzle into another one that is solved in the same way: a maze can be mirrored, and the digits of a
Sudoku can be renamed. The orbit of a puzzle is the set of all puzzles that symmetries make of it. A split must not put
two puzzles of one orbit into different parts, because the test would then have training puzzles in another form.
"""

import csv
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from src.errors import UserError, few, one_line
from src.files.text import read_lines

QUESTION_NAMES = ("question", "puzzle", "quizzes", "input")
ANSWER_NAMES = ("answer", "solution", "solutions", "output")
RATING_NAMES = ("rating", "difficulty")
REPORTED = 3  # so many skipped puzzles of a file are named on stderr; the others are only counted
CHUNK = 10_000  # puzzles of a file that are parsed and verified at once
MOST_CHARS = 100_000  # longest line that is read; the csv module itself refuses fields of 131,072 characters
GIVEN_UP = -1  # number of answers to a question whose search was too long
UNKNOWN = 255  # token of a character that is not a symbol of the kind
# The eight symmetries of a square, numbered as in the authors' code. Each says whether to transpose the square, and
# then whether to reverse the order of its rows and of its columns. Numbers 1, 2, 3 are quarter turns to the left.
DIHEDRAL = ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1))


class Grids(NamedTuple):
    """N puzzles of one kind with their answers. `n_rows` is N; `len()` counts the fields of the tuple."""

    inputs: UInt8[np.ndarray, "n l"]  # tokens; 0 = padding
    labels: UInt8[np.ndarray, "n l"]  # tokens; 0 = not a target
    puzzle_ids: Int32[np.ndarray, "n"]  # row of the puzzle embedding; 0 = none
    groups: Int32[np.ndarray, "n"]  # rows of a group are one puzzle and its augmentations
    difficulty: dict[str, np.ndarray]  # name -> (N,) numbers

    @property
    def n_rows(self) -> int:
        return len(self.inputs)

    def take(self, rows) -> "Grids":
        """Returns the puzzles at these row numbers, or those for which a boolean array is true."""
        arrays = (array[rows] for array in self[:4])
        return Grids(*arrays, {name: values[rows] for name, values in self.difficulty.items()})


def make_grids(inputs, labels, difficulty: dict | None = None) -> Grids:
    """Returns Grids without puzzle ids, in which each row is a group of its own."""
    n = len(inputs)
    return Grids(inputs, labels, np.zeros(n, np.int32), np.arange(n, dtype=np.int32), difficulty or {})


def dihedral(grids: np.ndarray, number: int) -> np.ndarray:
    """Returns grids (..., H, W) under the symmetry DIHEDRAL[number], as a view."""
    is_transposed, flips_rows, flips_columns = DIHEDRAL[number]
    grids = grids.swapaxes(-1, -2) if is_transposed else grids
    return grids[..., :: -1 if flips_rows else 1, :: -1 if flips_columns else 1]


class Symmetries(NamedTuple):
    """N symmetries, one per board: a permutation of the cells, then one of the tokens."""

    cells: Int64[np.ndarray, "n l"]  # cell of the image -> cell of the board
    tokens: UInt8[np.ndarray, "n v"]  # token of the board -> token of the image

    def apply(self, boards: UInt8[np.ndarray, "n l"]) -> UInt8[np.ndarray, "n l"]:
        moved = np.take_along_axis(boards, self.cells, 1)
        return np.take_along_axis(self.tokens, moved.astype(np.int64), 1)

    def undo(self, images: UInt8[np.ndarray, "n l"]) -> UInt8[np.ndarray, "n l"]:
        """Returns the boards that `apply` turns into these images."""
        tokens = self.tokens.argsort(1).astype(np.uint8)
        return self.undo_cells(np.take_along_axis(tokens, images.astype(np.int64), 1))

    def undo_cells(self, values: np.ndarray) -> np.ndarray:
        """Returns values (N, L) of the images' cells, such as probabilities, in the order of the boards' cells."""
        return np.take_along_axis(values, self.cells.argsort(1), 1)


class PuzzleKind:
    """One kind of puzzle: its board, its rules and its symmetries.

    `symbols[token]` is the character of a token. `aliases` maps other characters that a text may have to symbols. A
    subclass defines `verify`, `solve`, `draw_symmetries` and `orbits`, and faster versions of the other methods where
    that is worth it."""

    has_rules = True  # False if `verify` cannot decide whether an answer is right
    has_symmetries = True  # False if a board alone does not show which symmetries keep its answer right
    one_orbit_per_group = True  # False if the rows of a group are different puzzles, such as the pairs of an ARC task

    def __init__(self, name: str, height: int, width: int, symbols: str, aliases: dict[str, str] | None = None):
        self.name, self.height, self.width, self.symbols = name, height, width, symbols
        self.aliases = aliases or {}
        self._token_of = np.full(256, UNKNOWN, np.uint8)
        for token, symbol in enumerate(symbols[1:], start=1):  # padding is never part of a text
            self._token_of[ord(symbol)] = token
        for other, symbol in self.aliases.items():
            self._token_of[ord(other)] = symbols.index(symbol)

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    # ---- rules ----

    def verify(self, board: UInt8[np.ndarray, "l"], answer: UInt8[np.ndarray, "l"]) -> str | None:
        """Returns what is wrong with an answer by the rules, as a short phrase, or None if it is right."""
        raise NotImplementedError

    def are_right(self, inputs: UInt8[np.ndarray, "n l"], answers: UInt8[np.ndarray, "n l"]) -> Bool[np.ndarray, "n"]:
        """Returns whether each answer is right by the rules: the same as `verify`, for many boards."""
        return np.array([self.verify(*pair) is None for pair in zip(inputs, answers)], dtype=bool)

    def question_problem(self, board: UInt8[np.ndarray, "l"]) -> str | None:
        """Returns what is wrong with a question, such as "it has several solutions", or None if nothing is."""
        return None

    def solve(self, inputs: UInt8[np.ndarray, "n l"]) -> tuple[UInt8[np.ndarray, "n l"], Int64[np.ndarray, "n"]]:
        """Returns (answers, counts): a right answer to each question, and 0, 1 or 2 for none, one or several of them.

        The count is GIVEN_UP if the search for answers was given up. The answer to a question without any is a row of
        zeros."""
        raise NotImplementedError

    def difficulty(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> dict[str, np.ndarray]:
        """Returns measures of difficulty, {name: (N,) numbers}."""
        return {}

    # ---- symmetries ----

    def draw_symmetries(self, rng: np.random.Generator, n: int) -> Symmetries:
        """Returns n random symmetries."""
        raise NotImplementedError

    def augment(self, rng: np.random.Generator, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]):
        """Returns (inputs, labels) of the same shape, in which each board is under a random symmetry of its own."""
        symmetries = self.draw_symmetries(rng, len(inputs))
        return symmetries.apply(inputs), symmetries.apply(labels)

    def move(self, rng: np.random.Generator, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]):
        """Returns (inputs, labels) under a random change after which their puzzle ids stay right; by default none."""
        return inputs, labels

    def orbits(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns a key for each board. Boards in the same orbit have equal keys."""
        raise NotImplementedError

    def invariants(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns a value for each board that is equal within an orbit, and faster to compute than `orbits`.

        Several orbits may have the same value. By default, all have."""
        return [b""] * len(inputs)

    # ---- text ----

    def to_text(self, board: UInt8[np.ndarray, "l"], line_breaks: bool = True) -> str:
        """Returns a board as characters; with line_breaks, there is a line break between its rows."""
        text = "".join(self.symbols[token] for token in board)
        step = self.width if line_breaks else len(text)
        return "\n".join(text[start : start + step] for start in range(0, len(text), step))

    def from_text(self, text: str) -> UInt8[np.ndarray, "l"]:
        """Returns the tokens of a board given as characters, with or without line breaks.

        Raises UserError for a wrong length or a wrong symbol."""
        cells = self.clean(text)
        tokens = self._tokens(cells)
        allowed = "".join([*self.symbols[1:], *self.aliases])
        if (tokens == UNKNOWN).any():
            wrong = int((tokens == UNKNOWN).argmax())
            raise UserError(f"cell {wrong + 1} is {cells[wrong]!r}: a {self.name} board is written with {allowed!r}")
        if len(cells) != self.cells:
            size = f"{self.cells} cells ({self.height} x {self.width})"
            raise UserError(f"a {self.name} board has {size}, this one has {len(cells)}: add or remove cells")
        return tokens

    def clean(self, text: str) -> str:
        """Returns a text without the characters that are not cells, such as line breaks."""
        return text.replace("\r", "").replace("\n", "")

    def parse(self, texts: Sequence[str]) -> tuple[UInt8[np.ndarray, "n l"], Bool[np.ndarray, "n"]]:
        """Returns (tokens, is_board) of many texts.

        If a text is no board, its tokens are 0; `from_text` says what is wrong with it."""
        texts = [self.clean(text) for text in texts]
        is_board = np.array([len(text) == self.cells for text in texts], dtype=bool)
        tokens = np.zeros((len(texts), self.cells), np.uint8)
        tokens[is_board] = self._tokens("".join(itertools.compress(texts, is_board))).reshape(-1, self.cells)
        is_board &= (tokens != UNKNOWN).all(1)
        tokens[~is_board] = 0
        return tokens, is_board

    def _tokens(self, text):
        return self._token_of[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]


# ---- splits ---------------------------------------------------------------------------------------------------------


def split_by_orbit(kind: PuzzleKind, grids: Grids, share: float, seed: int) -> tuple[Grids, Grids]:
    """Divides puzzles into (train, test), where test has about `share` of the rows.

    Rows of one orbit stay together, and so do rows of one group. Raises UserError if share is not between 0 and 1, or
    if nothing can be held out because all rows are connected in this way."""
    if not 0 < share < 1:
        raise UserError(f"share is {share}: set it between 0 and 1")
    numbers = {}
    keys = [numbers.setdefault(key, len(numbers)) for key in kind.orbits(grids.inputs, grids.labels)]
    groups = np.unique(grids.groups, return_inverse=True)[1]
    _, classes = np.unique(_joined(np.array(keys), groups), return_inverse=True)
    sizes = np.bincount(classes)
    if len(sizes) < 2:
        raise UserError(f"all {grids.n_rows} {kind.name} puzzles are one orbit: nothing can be held out, add others")
    goal, chosen, n_test = share * grids.n_rows, [], 0
    order = np.random.default_rng(seed).permutation(len(sizes))
    for number in order[:-1]:  # never the last one, so that some puzzles are left for training
        if abs(n_test + sizes[number] - goal) < abs(n_test - goal):
            chosen.append(number)
            n_test += sizes[number]
    is_test = np.isin(classes, chosen or [sizes.argmin()])
    return grids.take(~is_test), grids.take(is_test)


def _joined(*partitions):
    """Returns (N,) labels that join several partitions of N rows; each partition numbers the part of each row.

    Two rows get the same label if they are in the same part of some partition, or if a chain of such pairs connects
    them."""
    labels = np.arange(len(partitions[0]))
    while True:
        before = labels
        for numbers in partitions:
            lowest = np.full(numbers.max() + 1, len(numbers))
            np.minimum.at(lowest, numbers, labels)
            labels = lowest[numbers]
        if (labels == before).all():
            return labels


def find_leaks(kind: PuzzleKind, train: Grids, test: Grids) -> dict[int, int]:
    """Returns {test row: a training row in the same orbit} for the test grids that have one.

    If the rows of a training group are augmentations of one puzzle, only the first of them is compared, because all are
    in the same orbit. If a group has several pairs, only those of its lowest puzzle id are compared, in the test too,
    because the other ids are augmentations."""
    if kind.one_orbit_per_group:
        rows, asked = np.unique(train.groups, return_index=True)[1], np.arange(test.n_rows)
    else:
        rows, asked = _first_puzzles(train), _first_puzzles(test)
    # orbits of millions of boards would take hours, so only boards whose invariants meet are compared
    values = [kind.invariants(grids.inputs[some], grids.labels[some]) for grids, some in ((train, rows), (test, asked))]
    both = set(values[0]) & set(values[1])
    rows, asked = (some[[value in both for value in own]] for some, own in zip((rows, asked), values))
    if not both:
        return {}
    known = {}
    for row, key in zip(rows.tolist(), kind.orbits(train.inputs[rows], train.labels[rows])):
        known.setdefault(key, row)
    keys = kind.orbits(test.inputs[asked], test.labels[asked])
    return {row: known[key] for row, key in zip(asked.tolist(), keys) if key in known}


def _first_puzzles(grids):
    """Returns the rows of each group that have its lowest puzzle id."""
    lowest = np.full(grids.groups.max(initial=0) + 1, np.iinfo(np.int32).max)
    np.minimum.at(lowest, grids.groups, grids.puzzle_ids)
    return np.flatnonzero(grids.puzzle_ids == lowest[grids.groups])


def check_leak(kind: PuzzleKind, train: Grids, test: Grids):
    """Raises UserError if a test grid is in the orbit of a training grid; see `find_leaks`."""
    if leaks := find_leaks(kind, train, test):
        first = next(iter(leaks))
        counts = f"{len(leaks)} of {test.n_rows} test grids are training grids under a symmetry of {kind.name}"
        rows = f"test rows {few(map(str, leaks))}; row {first} is training row {leaks[first]}"
        raise UserError(f"{counts} ({rows}; rows count from 0): remove them, or split by orbit")


# ---- files ----------------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    line: int  # from 1
    question: str
    answer: str
    rating: float


def read_csv(kind: PuzzleKind, path, needs_answers: bool = True) -> Grids:
    """Returns the puzzles of a .csv or .csv.gz file. Its header must name a question and an answer column.

    `difficulty` has what the kind measures, and the file's rating if it has one. A puzzle is skipped if it is malformed
    or if its answer breaks the rules. The first few of these are named on stderr, and their number is printed. Without
    needs_answers, the answer column or single answers may be missing. If such a question has one right answer, that is
    its label. If it has several, its cells are no targets. If it has none, it is skipped. Raises UserError if the
    header lacks a column, if the file cannot be read to its end, or if no puzzle is left."""
    records, reasons, parts, total = iter(_records(path, needs_answers)), [], [], 0
    while chunk := list(itertools.islice(records, CHUNK)):
        total += len(chunk)
        inputs, labels, is_good = _read_chunk(kind, chunk, reasons, needs_answers)
        ratings = np.array([record.rating for record in chunk])[is_good]
        parts.append((inputs[is_good], labels[is_good], ratings))
    if not total:
        raise UserError(f"{path} holds no puzzle below its header: add lines")
    inputs, labels, ratings = map(np.concatenate, zip(*parts))
    if not len(inputs):
        raise UserError(f"none of the {total} puzzles of {path} is usable as {kind.name}; {reasons[0]}")
    for reason in reasons:
        print(f"{path}: skipped {reason}", file=sys.stderr)
    if reasons:
        print(f"{path}: {total - len(inputs)} of {total} puzzles skipped", file=sys.stderr)
    difficulty = kind.difficulty(inputs, labels)
    if not np.isnan(ratings).all():
        difficulty["rating"] = ratings
    return make_grids(inputs, labels, difficulty)


def _read_chunk(kind, chunk, reasons, needs_answers):
    """Returns (inputs, labels, is_good) of records. Adds reasons for bad ones to `reasons`, up to REPORTED."""
    inputs, has_question = kind.parse([record.question for record in chunk])
    labels, has_answer = kind.parse([record.answer for record in chunk])
    is_open = has_question & [not needs_answers and not record.answer.strip() for record in chunk]
    is_good = has_question & has_answer
    is_good[is_good] = kind.are_right(inputs[is_good], labels[is_good])
    if kind.has_rules and is_open.any():
        labels[is_open], counts = kind.solve(inputs[is_open])
        labels[np.flatnonzero(is_open)[counts != 1]] = 0
        is_good[is_open] = counts != 0
    else:
        is_good |= is_open
    for row in np.flatnonzero(~is_good)[: REPORTED - len(reasons)]:
        if not has_question[row]:
            reason = f"question: {_reason(kind, chunk[row].question)}"
        elif is_open[row]:
            reason = f"question: {kind.question_problem(inputs[row])}"
        elif not has_answer[row]:
            reason = f"answer: {_reason(kind, chunk[row].answer)}"
        else:
            reason = f"wrong answer: {kind.verify(inputs[row], labels[row])}"
        reasons.append(f"line {chunk[row].line}, {reason}")
    return inputs, labels, is_good


def _reason(kind, text):
    try:
        kind.from_text(text)
    except UserError as error:
        return one_line(error)
    raise AssertionError("from_text accepts what parse refuses")


def _records(path, needs_answers) -> Iterable[_Record]:
    """Yields the lines of a file below its header, except blank ones. A missing answer is an empty text."""
    lines = ("too long\n" if line is None else line for _, line in read_lines(path, MOST_CHARS))
    rows = csv.reader(lines, strict=True)  # else an open quote takes in the puzzles after it
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        question, answer, rating = (_column(header, names) for names in (QUESTION_NAMES, ANSWER_NAMES, RATING_NAMES))
        if question is None or (answer is None and needs_answers):
            names = "two columns: " * needs_answers + "/".join(QUESTION_NAMES)
            names += f" and {'/'.join(ANSWER_NAMES)}" if needs_answers else " for a column"
            raise UserError(one_line(f"{path}: the header {','.join(header)!r} must name {names}"))
        for row in rows:
            if row:
                row += [""] * (len(header) - len(row))
                number = math.nan if rating is None else _number(row[rating])
                yield _Record(rows.line_num, row[question], "" if answer is None else row[answer], number)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}: correct the line") from None


def _column(header, names):
    return next((header.index(name) for name in names if name in header), None)


def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan
