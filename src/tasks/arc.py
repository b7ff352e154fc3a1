"""ARC-AGI 1 and 2: tasks in JSON files become boards, and augmentations, each with a puzzle id, that can be undone.

A grid of up to 30 x 30 colours is a board of 900 tokens: 0 is padding, 1 (EOS) marks its lower and its right border,
2..11 are colours 0..9. A grid with these borders is called framed. An augmentation is one of eight symmetries and a
permutation of colours 1..9. Each (task, augmentation) is a puzzle with an id of its own. Names and numbers are those of
the authors' code for arXiv:2510.04871.
Voting over augmentations is in arc_votes.py.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from src.errors import UserError
from src.files.text import parse_json, read_lines
from src.tasks.puzzles import DIHEDRAL, Grids, PuzzleKind, dihedral

SIDE = 30
PAD, EOS, COLOUR = 0, 1, 2  # tokens; COLOUR is colour 0
N_COLOURS = 10
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)  # symmetry INVERSE[i] of puzzles.DIHEDRAL undoes symmetry i
SEPARATOR = "|||"
NO_ID = "<blank>"  # name of puzzle id 0
TASKS = "test_puzzles.json"  # in a folder of .npy arrays: the tasks of its test
TRIES = 5  # augmentations are drawn at most so many times the wanted number, because some come twice
_TRANSPOSES, _FLIPS_ROWS, _FLIPS_COLUMNS = np.array(DIHEDRAL, dtype=bool).T


# ---- tasks ----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Pairs of input and output, which are 2-D arrays of colours 0..9.

    The output of a test pair is None if it is not known."""

    name: str
    train: list[tuple[np.ndarray, np.ndarray]]
    test: list[tuple[np.ndarray, np.ndarray | None]]


def read_tasks(path, solutions=None) -> list[Task]:
    """Reads tasks from a challenges file, a file with one task, or a folder of such files (.json or .json.gz).

    From a folder of .npy arrays, reads the tasks of its test. solutions: file with the outputs of test pairs; by
    default, a file beside `path` that has "solutions" in its name in place of "challenges", if there is one. Raises
    UserError, which names the file and the task, for files of another form."""
    path = Path(path)
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.json.gz")])
        files = [path / TASKS] if path / TASKS in files else [file for file in files if not _is_solutions(file)]
        if not files:
            raise UserError(f"{path} holds no .json file: give a folder with one file per task, or a challenges file")
        return [task for file in files for task in read_tasks(file)]
    content = _read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is no ARC file: its JSON must be an object of tasks, each with train and test")
    if isinstance(content.get("train"), list):
        content = {path.name.removesuffix(".gz").removesuffix(".json"): content}
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    if solutions is None and beside != path and beside.exists():
        solutions = beside
    answers = {} if solutions is None else _read_json(solutions)
    if not isinstance(answers, dict):
        raise UserError(f"{solutions} is no ARC solutions file: its JSON must be an object of lists of grids")
    return [_read_task(name, task, answers.get(name), f"{path}, task {name}") for name, task in content.items()]


def different(tasks: list[Task]) -> list[Task]:
    """Returns the tasks. Raises UserError if two of them have the same name."""
    names = Counter(task.name for task in tasks)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise UserError(f"task {twice} is given twice: leave out one of the files that have it")
    return tasks


def _is_solutions(path):
    return "solutions" in path.name and path.with_name(path.name.replace("solutions", "challenges")).exists()


def _read_json(path):
    lines = [line for _, line in read_lines(path)]
    if None in lines:
        raise UserError(f"{path} has a line that is too long: this is no ARC file")
    return parse_json("".join(lines), path)


def _read_task(name, task, answers, where):
    if not isinstance(task, dict) or not all(
        isinstance(task.get(part), list) and task[part] for part in ("train", "test")
    ):
        raise UserError(f"{where}: it must be an object with the lists train and test, neither of them empty")
    if answers is not None and (not isinstance(answers, list) or len(answers) != len(task["test"])):
        raise UserError(f"{where}: its solutions are no list of {len(task['test'])} grids, one per test pair")
    pairs = {"train": [], "test": []}
    for part in pairs:
        for number, pair in enumerate(task[part]):
            place = f"{where}: {part} pair {number + 1}"
            if not isinstance(pair, dict) or "input" not in pair or (part == "train" and "output" not in pair):
                raise UserError(f"{place} must be an object with input and output")
            output = answers[number] if part == "test" and answers else pair.get("output")
            output = None if output is None and part == "test" else read_grid(output, f"{place}, output")
            pairs[part].append((read_grid(pair["input"], f"{place}, input"), output))
    return Task(name, **pairs)


def read_grid(rows, where: str) -> UInt8[np.ndarray, "h w"]:
    """Returns a grid that is given as a list of rows.

    Raises UserError, which names `where`, unless it is 1 to 30 rows of 1 to 30 colours 0..9."""
    is_list = isinstance(rows, list) and 1 <= len(rows) <= SIDE and all(isinstance(row, list) for row in rows)
    if not is_list or len({len(row) for row in rows}) != 1 or not 1 <= len(rows[0]) <= SIDE:
        raise UserError(f"{where} is no grid: give 1 to {SIDE} rows of one length, 1 to {SIDE}")
    if not all(type(colour) is int and 0 <= colour < N_COLOURS for row in rows for colour in row):
        raise UserError(f"{where} holds something other than colours 0 to 9: correct it")
    return np.array(rows, np.uint8)


# ---- frames ---------------------------------------------------------------------------------------------------------


def frame(grid: UInt8[np.ndarray, "h w"], row: int = 0, column: int = 0) -> UInt8[np.ndarray, "l"]:
    """Returns the 900 tokens of a framed grid, whose upper left cell is at (row, column)."""
    tokens = np.zeros((SIDE + 1, SIDE + 1), np.uint8)  # one row and column more, for borders that are not on the board
    bottom, right = row + grid.shape[0], column + grid.shape[1]
    tokens[row:bottom, column:right] = grid + COLOUR
    tokens[bottom, column:right] = EOS
    tokens[row:bottom, right] = EOS
    return tokens[:SIDE, :SIDE].ravel()


def crop(tokens: UInt8[np.ndarray, "l"]) -> UInt8[np.ndarray, "h w"]:
    """Returns the largest rectangle of colours that starts at the upper left cell. It may be empty.

    If the board holds a framed grid there, this is the grid. Of two equally large rectangles, the one with fewer rows
    is returned."""
    board = tokens.reshape(SIDE, SIDE)
    is_colour = (board >= COLOUR) & (board < COLOUR + N_COLOURS)
    widths = np.minimum.accumulate(np.minimum.accumulate(is_colour, axis=1).sum(1))
    height = int((widths * np.arange(1, SIDE + 1)).argmax()) + 1
    grid = board[:height, : widths[height - 1]] - np.uint8(COLOUR)
    return grid if grid.size else grid[:0, :0]


def at_corner(tokens: UInt8[np.ndarray, "l"]) -> UInt8[np.ndarray, "l"]:
    """Moves a framed grid, which may be anywhere on the board, to the upper left.

    A board without colours stays as it is."""
    board = tokens.reshape(SIDE, SIDE)
    is_colour = board >= COLOUR
    row, column = is_colour.any(1).argmax(), is_colour.any(0).argmax()
    return np.pad(board[row:, column:], ((0, row), (0, column))).ravel()


class Arc(PuzzleKind):
    """ARC grids. The rule of a task is not known, so `verify` only checks that an answer is one framed grid."""

    has_rules = False
    has_symmetries = False  # a symmetry of a task has a puzzle id of its own, which a model must have learned
    one_orbit_per_group = False

    def __init__(self):
        super().__init__("arc", SIDE, SIDE, "?|0123456789")

    def verify(self, board: UInt8[np.ndarray, "l"], answer: UInt8[np.ndarray, "l"]) -> str | None:
        grid = crop(answer)
        is_framed = grid.size and (frame(grid) == answer).all()
        return None if is_framed else "it is not one grid at the upper left with borders below and to its right"

    def augment(self, rng: np.random.Generator, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]):
        """Draws a random symmetry, colours and place for each row, whose grids are at the upper left before.

        For rows with puzzle ids, use `move`."""
        n = len(inputs)
        return place(inputs, labels, rng.integers(len(DIHEDRAL), size=n), _shuffled_colours(rng, n), rng)

    def move(self, rng: np.random.Generator, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]):
        """Moves each pair to a random place, wherever it was. The authors' code moves it once, when it writes them."""
        inputs, labels = (np.array([at_corner(board) for board in boards]) for boards in (inputs, labels))
        colours = np.tile(np.arange(N_COLOURS, dtype=np.uint8), (len(inputs), 1))
        return place(inputs, labels, np.zeros(len(inputs), np.int64), colours, rng)

    def orbits(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns the least image of each pair of input and output; colours 1..9 are numbered in order of occurrence.

        In ARC-AGI-1 itself, 9 of the 419 test pairs of the evaluation set are images of training pairs, 7 of them of
        pairs of their own task."""
        pairs = ((crop(at_corner(board)), crop(at_corner(label))) for board, label in zip(inputs, labels))
        return [
            min(_pattern([dihedral(grid, number) for grid in pair])[0] for number in range(len(DIHEDRAL)))
            for pair in pairs
        ]

    def to_text(self, board: UInt8[np.ndarray, "l"], line_breaks: bool = True) -> str:
        """Returns the grid, which may be anywhere on the board, as one line of digits per row.

        A board without a grid is returned as a whole."""
        grid = crop(at_corner(board))
        if not grid.size:
            return super().to_text(board, line_breaks)
        return ("\n" if line_breaks else "").join("".join(map(str, row)) for row in grid)

    def from_text(self, text: str) -> UInt8[np.ndarray, "l"]:
        """Returns the tokens of a grid given as lines of digits.

        Raises UserError unless it is 1..30 lines of 1..30 digits."""
        lines = ("".join(line.split()) for line in text.splitlines() if line.strip())  # also with spaces between digits
        rows = [[int(digit) if digit in "0123456789" else -1 for digit in line] for line in lines]
        return frame(read_grid(rows, "this board"))


# ---- augmentations --------------------------------------------------------------------------------------------------


class Augmentation(NamedTuple):
    """Replaces each colour c by colours[c], and then applies the symmetry puzzles.DIHEDRAL[transform]."""

    transform: int
    colours: tuple[int, ...]  # colours[0] is 0

    def apply(self, grid: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:  # a quarter turn exchanges h and w
        return dihedral(np.array(self.colours, np.uint8)[grid], self.transform)

    def undo(self, grid: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
        return np.argsort(self.colours).astype(np.uint8)[dihedral(grid, INVERSE[self.transform])]


IDENTITY = Augmentation(0, tuple(range(N_COLOURS)))


def puzzle_name(task: str, augmentation: Augmentation) -> str:
    """Returns the name of the puzzle (task, augmentation), such as 007bbfb7|||t3|||0276489315.

    Without augmentation, it is the name of the task."""
    if augmentation == IDENTITY:
        return task
    return SEPARATOR.join([task, f"t{augmentation.transform}", "".join(map(str, augmentation.colours))])


def parse_puzzle_name(name: str) -> tuple[str, Augmentation]:
    """Returns (task, augmentation) of a puzzle's name. Raises UserError for a text of another form."""
    if SEPARATOR not in name:
        return name, IDENTITY
    task, transform, colours = name.rsplit(SEPARATOR, 2) if name.count(SEPARATOR) >= 2 else (name, "", "")
    if transform not in {f"t{number}" for number in range(len(DIHEDRAL))} or sorted(colours) != list("0123456789"):
        raise UserError(
            f"puzzle name {name!r} is not of the form task{SEPARATOR}t0..t7{SEPARATOR}ten digits: correct it"
        )
    return task, Augmentation(int(transform[1:]), tuple(map(int, colours)))


def draw_augmentations(task: Task, n: int, rng: np.random.Generator) -> list[Augmentation]:
    """Draws up to n augmentations that turn a task into n different tasks, none of them equal to the task itself.

    There are fewer if the task is so symmetric, or has so few colours, that TRIES * n draws do not give n."""
    grids = [grid for pair in (*task.train, *task.test) for grid in pair if grid is not None]
    patterns = [_pattern([dihedral(grid, number) for grid in grids]) for number in range(len(DIHEDRAL))]
    seen, found = {(patterns[0][0], bytes(patterns[0][1]))}, []
    for _ in range(TRIES):
        transforms = rng.integers(len(DIHEDRAL), size=n)
        for number, colours in zip(transforms.tolist(), _shuffled_colours(rng, n)):
            pattern, order = patterns[number]
            image = (pattern, colours[order].tobytes())
            if image not in seen and len(found) < n:
                seen.add(image)
                found.append(Augmentation(number, tuple(colours.tolist())))
        if len(found) == n:
            break
    return found


def _pattern(grids):
    """Returns (pattern, order) of grids.

    pattern is the grids as bytes, with colours 1..9 numbered in order of occurrence. order has the colours in that
    order. Two images of grids are equal if and only if they have equal patterns and equal orders."""
    cells = np.concatenate([grid.ravel() for grid in grids])
    colours, first = np.unique(cells[cells > 0], return_index=True)
    order = colours[first.argsort()]
    names = np.zeros(N_COLOURS, np.uint8)
    names[order] = np.arange(1, len(order) + 1)
    return bytes(side for grid in grids for side in grid.shape) + names[cells].tobytes(), order


def _shuffled_colours(rng, n):
    """Returns (n, 10) random permutations of colours in which colour 0 stays."""
    colours = np.zeros((n, N_COLOURS), np.uint8)
    colours[:, 1:] = rng.random((n, N_COLOURS - 1)).argsort(1) + 1
    return colours


def place(
    inputs: UInt8[np.ndarray, "n l"],
    labels: UInt8[np.ndarray, "n l"],
    transforms: Int64[np.ndarray, "n"],
    colours: UInt8[np.ndarray, "n 10"],
    rng: np.random.Generator | None = None,
) -> tuple[UInt8[np.ndarray, "n l"], UInt8[np.ndarray, "n l"]]:
    """Returns (inputs, labels) with an augmentation for each row.

    The framed grids must be at the upper left. They stay there; with rng, they move to a random place, the same for
    input and label. A label without a target stays without one."""
    sizes = [np.where(_TRANSPOSES[transforms][:, None], size[:, ::-1], size) for size in map(_sizes, (inputs, labels))]
    room = SIDE - np.maximum(*sizes)
    offsets = np.zeros_like(room) if rng is None else rng.integers(room + 1)
    tables = np.concatenate([np.tile([PAD, EOS], (len(inputs), 1)), colours + COLOUR], axis=1).astype(np.uint8)
    return tuple(_place(*each, transforms, tables, offsets) for each in zip((inputs, labels), sizes))


def _sizes(boards):
    """Returns the (N, 2) heights and widths of grids at the upper left."""
    boards = boards.reshape(-1, SIDE, SIDE) >= COLOUR
    return np.stack([np.minimum.accumulate(line, axis=1).sum(1) for line in (boards[:, :, 0], boards[:, 0])], axis=1)


def _place(boards, sizes, transforms, tables, offsets):
    cells = np.arange(SIDE, dtype=np.int16)
    height, width = sizes.T.astype(np.int16)[:, :, None]
    first_rows, first_columns = offsets.T.astype(np.int16)[:, :, None]
    rows, columns = cells - first_rows, cells - first_columns  # (N, 30), counted from the corner of the grid
    is_row, is_column = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    is_below, is_right = rows == height, columns == width
    rows = np.where(_FLIPS_ROWS[transforms][:, None], height - 1 - rows, rows)
    columns = np.where(_FLIPS_COLUMNS[transforms][:, None], width - 1 - columns, columns)
    row_step, column_step = np.where(_TRANSPOSES[transforms], [[1], [SIDE]], [[SIDE], [1]]).astype(np.int16)[:, :, None]
    source = (rows * row_step)[:, :, None] + (columns * column_step)[:, None]
    is_inside = is_row[:, :, None] & is_column[:, None]
    tokens = np.take_along_axis(boards, np.where(is_inside, source, 0).reshape(len(boards), -1).astype(np.int64), 1)
    tokens = np.take_along_axis(tables, tokens.astype(np.int64), 1).reshape(source.shape)
    is_border = (is_below[:, :, None] & is_column[:, None]) | (is_row[:, :, None] & is_right[:, None])
    return np.where(is_inside, tokens, np.where(is_border, EOS, PAD)).astype(np.uint8).reshape(len(boards), -1)


class ArcSet:
    """The grids of tasks without augmentation, and a puzzle id for every task and each of its augmentations.

    `train` has the training pairs of all tasks, and the test pairs of `train_tasks` whose output is known. `test` has
    the test pairs of `test_tasks`; a pair whose output is not known has a label without targets. `groups` holds the
    number of each row's task. `names[id]` is the name of an id. The ids of task t are range(first_ids[t], first_ids[t +
    1]), and the first of them is the task without augmentation."""

    def __init__(
        self, train_tasks: Iterable[Task], test_tasks: Iterable[Task], n_augmentations: int = 1000, seed: int = 0
    ):
        train_tasks, test_tasks = list(train_tasks), list(test_tasks)
        tasks = different(train_tasks + test_tasks)
        self.names, self.first_ids, augmentations = [NO_ID], [1], [IDENTITY]
        for number, task in enumerate(tasks):
            drawn = [IDENTITY, *draw_augmentations(task, n_augmentations, np.random.default_rng((seed, number)))]
            augmentations += drawn
            self.names += [puzzle_name(task.name, each) for each in drawn]
            self.first_ids.append(len(self.names))
        self.first_ids = np.array(self.first_ids, np.int64)
        self.transforms = np.array([each.transform for each in augmentations])
        self.colours = np.array([each.colours for each in augmentations], np.uint8)
        known = [[pair for pair in task.test if pair[1] is not None] for task in train_tasks] + [[]] * len(test_tasks)
        self.train = self._grids([task.train + more for task, more in zip(tasks, known)])
        self.test = self._grids([[]] * len(train_tasks) + [task.test for task in test_tasks])

    def _grids(self, pairs_of_tasks):
        pairs = [(task, *pair) for task, pairs in enumerate(pairs_of_tasks) for pair in pairs]
        no_targets = np.zeros(SIDE * SIDE, np.uint8)
        groups = np.array([task for task, *_ in pairs], np.int32)
        inputs = [frame(grid) for _, grid, _ in pairs]
        labels = [no_targets if grid is None else frame(grid) for *_, grid in pairs]
        inputs, labels = (np.array(boards, np.uint8).reshape(-1, SIDE * SIDE) for boards in (inputs, labels))
        return Grids(inputs, labels, self.first_ids[groups].astype(np.int32), groups, {})

    def place(self, grids: Grids, ids: np.ndarray) -> Grids:
        """Returns rows of `train` or `test` with the augmentations that belong to `ids`, one id per row."""
        inputs, labels = place(grids.inputs, grids.labels, self.transforms[ids], self.colours[ids])
        return grids._replace(inputs=inputs, labels=labels, puzzle_ids=np.asarray(ids, np.int32))

    def every_puzzle(self, grids: Grids) -> tuple[np.ndarray, np.ndarray]:
        """Returns (rows, ids) in the order of ids: each row of `train` or `test`, once with each id of its task."""
        first_rows = np.searchsorted(grids.groups, np.arange(len(self.first_ids)))
        rows, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for task, (first, end) in enumerate(zip(self.first_ids, self.first_ids[1:])):
            n_rows = first_rows[task + 1] - first_rows[task]
            rows.append(np.tile(np.arange(first_rows[task], first_rows[task + 1]), end - first))
            ids.append(np.repeat(np.arange(first, end), n_rows))
        return np.concatenate(rows), np.concatenate(ids)
