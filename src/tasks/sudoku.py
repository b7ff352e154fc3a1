"""Sudoku of 4 x 4, 6 x 6 and 9 x 9: rules, symmetries, canonical forms, and a generator with measured difficulty.

Files in .csv form are read by `puzzles.read_csv`; solving is in sudoku_solver.py.
"""

import math
from functools import cache
from itertools import permutations, product

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from src.errors import UserError
from src.tasks import sudoku_solver as solver
from src.tasks.puzzles import GIVEN_UP, Grids, PuzzleKind, Symmetries, make_grids
from src.tasks.sudoku_solver import BLANK, BOXES

FEWEST_CLUES = {4: 4, 6: 8, 9: 17}  # size -> the fewest clues with which a puzzle can have one solution
DIFFICULTIES = ("any", "singles", "guess")
BATCH = 10_000  # boards that are generated, or verified, at once
EFFORT = 100_000  # boards that the search for one solution may try, about a second; the hardest puzzles need some 1,000
MOST_BATCHES = 30  # the generator gives up after so many batches in a row without a good puzzle
INVARIANT_CHUNK = 2_000  # boards whose invariants are computed at once
ORBIT_CHUNK = 500  # solutions whose symmetries are compared at once, to limit memory


class Sudoku(PuzzleKind):
    """Sudoku of one of the sizes in BOXES. In texts, a blank is `.`, `0` or `_`.

    A band is a row of boxes, and a stack is a column of boxes. symmetries: "relabel" is only the renaming of digits.
    "all" adds the exchange of bands, of stacks, of rows inside a band and of columns inside a stack, and the
    transposition of the board if its boxes are square. Augmentation and orbits use the same symmetries. So if a split
    is by orbit, no augmentation of a training grid is a test grid."""

    def __init__(self, size: int = 9, symmetries: str = "all"):
        if size not in BOXES:
            raise UserError(f"sudoku size is {size}: set it to one of {', '.join(map(str, BOXES))}")
        if symmetries not in ("all", "relabel"):
            raise UserError(f"symmetries is {symmetries!r}: set it to all or relabel")
        digits = "".join(str(digit + 1) for digit in range(size))
        super().__init__(f"sudoku{size}", size, size, f"?.{digits}", {"0": ".", "_": "."})
        self.size, self.symmetries = size, symmetries

    def clean(self, text: str) -> str:
        return "".join(text.split())

    # ---- rules ----

    def are_right(self, inputs: UInt8[np.ndarray, "n l"], answers: UInt8[np.ndarray, "n l"]) -> Bool[np.ndarray, "n"]:
        units, _, full = solver.layout(self.size)
        is_right = ((inputs == answers) | (inputs == BLANK)).all(1)
        bit_of = np.zeros(256, np.uint16)
        bit_of[2 : self.vocab_size] = 1 << np.arange(self.size)
        for start in range(0, len(answers), BATCH):
            bits = bit_of[answers[start : start + BATCH]]
            is_right[start : start + BATCH] &= (np.bitwise_or.reduce(bits[:, units], axis=2) == full).all(1)
        return is_right

    def verify(self, board: UInt8[np.ndarray, "l"], answer: UInt8[np.ndarray, "l"]) -> str | None:
        if problem := self._conflict(answer):
            return problem
        if len(changed := np.flatnonzero((board != answer) & (board != BLANK))):
            digit, clue = (self.symbols[tokens[changed[0]]] for tokens in (answer, board))
            return f"{self._place(changed[0])} is {digit}, but its clue is {clue}"
        blank = np.flatnonzero((answer <= BLANK) | (answer >= self.vocab_size))
        return f"{self._place(blank[0])} is blank" if len(blank) else None

    def question_problem(self, board: UInt8[np.ndarray, "l"]) -> str | None:
        if problem := self._conflict(board):
            return problem
        count = int(self.solve(board[None])[1][0])
        return {0: "it has no solution", 1: None, GIVEN_UP: None}.get(count, "it has several solutions")

    def solve(self, inputs: UInt8[np.ndarray, "n l"]) -> tuple[UInt8[np.ndarray, "n l"], Int64[np.ndarray, "n"]]:
        found = solver.search(self.size, solver.candidates(self.size, inputs), 2, EFFORT)
        answers = np.zeros_like(inputs)
        answers[found.owners] = found.boards
        counts = np.minimum(np.bincount(found.owners, minlength=len(inputs)), 2)
        counts[found.given_up] = GIVEN_UP
        return answers, counts

    def _conflict(self, board):
        """Returns which digit a row, column or box of a board has twice, as a phrase, or None."""
        for number, unit in enumerate(solver.layout(self.size).units):
            digits, counts = np.unique(board[unit][board[unit] > BLANK], return_counts=True)
            if (counts > 1).any():
                name = ("row", "column", "box")[number // self.size]
                return f"{name} {number % self.size + 1} has {self.symbols[digits[counts.argmax()]]} twice"
        return None

    def _place(self, cell):
        return f"row {cell // self.size + 1}, column {cell % self.size + 1}"

    def difficulty(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> dict[str, np.ndarray]:
        """Returns clues, rounds and guess, as `sudoku_solver.rate` measures them."""
        return solver.rate(self.size, inputs)

    # ---- symmetries ----

    def draw_symmetries(self, rng: np.random.Generator, n: int) -> Symmetries:
        size = self.size
        tokens = np.concatenate([np.tile([0, BLANK], (n, 1)), _shuffles(rng, n, size) + 2], axis=1).astype(np.uint8)
        cells = np.broadcast_to(np.arange(size * size), (n, size * size))
        if self.symmetries == "all":
            box_rows, box_columns = BOXES[size]
            rows, columns = _line_order(rng, n, size, box_rows), _line_order(rng, n, size, box_columns)
            cells = rows[:, :, None] * size + columns[:, None, :]
            if box_rows == box_columns:
                is_transposed = rng.random(n) < 0.5
                cells[is_transposed] = cells[is_transposed].transpose(0, 2, 1)
            cells = cells.reshape(n, -1)
        return Symmetries(cells, tokens)

    def orbits(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns the canonical form of each solution: the lexicographically least board in its orbit.

        Digits count from 0 in it. The clues of a question do not matter. Keys are equal if and only if a symmetry turns
        one solution into the other. Raises UserError if a board of `labels` is not a solution."""
        answers, index = np.unique(labels, axis=0, return_inverse=True)
        is_solution = self.are_right(np.full_like(answers, BLANK), answers)
        if not is_solution.all():
            row = np.flatnonzero(~is_solution[index.ravel()])[0]
            raise UserError(f"row {row} (from 0) is no {self.name} solution, so it has no orbit: remove it")
        grids = answers.reshape(-1, self.size, self.size) - 2
        if self.symmetries == "relabel":
            keys = [grid.tobytes() for grid in _relabelled(grids, grids[:, 0])]
        else:
            chunks = (grids[start : start + ORBIT_CHUNK] for start in range(0, len(grids), ORBIT_CHUNK))
            keys = [key for chunk in chunks for key in _canonical(self.size, chunk)]
        return [keys[i] for i in index.ravel()]

    def invariants(self, inputs: UInt8[np.ndarray, "n l"], labels: UInt8[np.ndarray, "n l"]) -> list[bytes]:
        """Returns the cycle types of the permutations that turn a row of the solution into another, and of columns.

        Much faster than `orbits`. Relabelling conjugates a permutation, so its cycle type stays."""
        if self.symmetries == "relabel":
            return super().invariants(inputs, labels)
        found = []
        for start in range(0, len(labels), INVARIANT_CHUNK):
            grids = labels[start : start + INVARIANT_CHUNK].reshape(-1, self.size, self.size) - 2
            turned = grids.swapaxes(1, 2)
            sides = (_cycle_types(each, lines) for each, lines in zip((grids, turned), BOXES[self.size]))
            found += [b"".join(sorted(map(bytes, pair))) for pair in zip(*sides)]
        return found


def _cycle_types(grids, per_band):
    """Returns (N, pairs): a number for the cycle type of each pair of rows, sorted; pairs within a band come first."""
    n, size = grids.shape[:2]
    first, second = np.triu_indices(size, 1)
    step = np.zeros((n, len(first), size), np.uint8)  # digit of the first row -> digit of the second row
    np.put_along_axis(step, grids[:, first].astype(np.int64), grids[:, second], 2)
    digits, power, types = np.arange(size), step, np.zeros((n, len(first)), np.int64)
    for _ in range(size):
        types = types * (size + 1) + (power == digits).sum(2)  # fixed points of all powers decide the cycle type
        power = np.take_along_axis(step, power.astype(np.int64), 2)
    is_within = first // per_band == second // per_band
    return np.concatenate([np.sort(types[:, is_within]), np.sort(types[:, ~is_within])], 1)


def _shuffles(rng, n, length):
    """Returns (n, length) random permutations."""
    return rng.random((n, length)).argsort(1)


def _line_order(rng, n, size, per_band):
    """Returns (n, size) random orders of rows, or of columns, in which the lines of a band stay together."""
    bands = _shuffles(rng, n, size // per_band)
    inner = _shuffles(rng, n * (size // per_band), per_band).reshape(n, -1, per_band)
    return (bands[:, :, None] * per_band + inner).reshape(n, size)


# ---- canonical forms ------------------------------------------------------------------------------------------------
#
# The canonical form of a solution is the least of all boards that symmetries make of it, compared row by row.
#
# 1. Any row can become the first row, and renaming the digits makes it 0, 1, 2, ..., which is the least possible row.
# 2. A row of the same band becomes the second row. It follows from a permutation s: in column j it has the digit that
#    the first row has in column s[j]. To reorder the columns by p changes s to p^-1 s p, and with it the second row.
#    The table of `_second_rows` has, for each s, the least second row and all orders p that lead to it.
# 3. Only few choices of (two rows, p) give the least second row. For each of them, the other rows are sorted. The least
#    of the boards that result is the canonical form.


@cache
def _column_orders(size: int) -> np.ndarray:
    """Returns (P, size): all orders of columns that keep stacks together. P is 8, 72 or 1296."""
    width = BOXES[size][1]
    inner = list(permutations(range(width)))
    stacks = permutations(range(size // width))
    return np.array(
        [
            [s * width + i for s, order in zip(outer, orders) for i in order]
            for outer in stacks
            for orders in product(inner, repeat=size // width)
        ]
    )


@cache
def _row_pairs(size: int) -> np.ndarray:
    """Returns (R, 2): all ordered pairs of rows in one band."""
    height = BOXES[size][0]
    return np.array([(a, b) for a, b in permutations(range(size), 2) if a // height == b // height])


def _relabelled(grids, first_rows):
    """Returns grids (N, n, n) with their digits renamed, so that first_rows (N, n) become 0, 1, 2, ..."""
    names = first_rows.argsort(1).astype(np.uint8)
    return np.take_along_axis(names, grids.reshape(len(grids), -1).astype(np.int64), 1).reshape(grids.shape)


def _canonical(size, grids):
    """Returns the canonical forms of N solutions with digits from 0, as bytes. The comment above explains the steps."""
    height, width = BOXES[size]
    pairs, (codes, best, starts, orders) = _row_pairs(size), _second_rows(size)
    views = (grids, grids.transpose(0, 2, 1))[: 1 + (height == width)]
    grids = np.stack(views, axis=1)  # (N, T, n, n)
    first, second = (grids[:, :, pairs[:, i]].reshape(-1, size) for i in (0, 1))  # (N * T * R, n)
    shifts = np.take_along_axis(first.argsort(1), second.astype(np.int64), 1)
    entries = np.searchsorted(codes, shifts @ _powers(size)).reshape(len(grids), -1)  # (N, T * R)
    owner, pair = np.nonzero(best[entries] == best[entries].min(1, keepdims=True))
    chosen = entries[owner, pair]
    repeats = starts[chosen + 1] - starts[chosen]
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    order = orders[np.repeat(starts[chosen], repeats) + within]
    owner, pair = np.repeat(owner, repeats), np.repeat(pair, repeats)
    boards = np.take_along_axis(grids[owner, pair // len(pairs)], order[:, None], 2)
    boards = _relabelled(boards, boards[np.arange(len(boards)), pairs[pair % len(pairs), 0]])
    column = boards[:, :, 0].astype(np.int64)  # its digits differ, so they give the order of rows and bands
    bands = column.reshape(len(boards), -1, height).min(2)
    rows = (np.repeat(bands, height, axis=1) * size + column).argsort(1)
    boards = np.take_along_axis(boards, rows[:, :, None], 1)
    least = [b"\xff"] * len(grids)
    for number, board in zip(owner, boards):
        least[number] = min(least[number], board.tobytes())
    return least


def _powers(size):
    """Returns weights (size,). The product of a row of digits with them is a number, in the same order as the rows."""
    return size ** np.arange(size - 1, -1, -1)


@cache
def _second_rows(size: int) -> tuple[np.ndarray, ...]:
    """Returns (codes, best, starts, orders), the table of second rows.

    codes[i] is the i-th permutation s as a number, in ascending order. best[i] is the least number of p^-1 s p over all
    orders p, and orders[starts[i] : starts[i + 1]] are the orders p that reach it."""
    width, powers, columns = BOXES[size][1], _powers(size), _column_orders(size)
    shifts = np.array(list(permutations(range(size))))
    # a digit occurs once in a box, so s[j] is in another stack than j
    shifts = shifts[(shifts // width != np.arange(size) // width).all(1)]
    ranks, best, hits = columns.argsort(1), [], []
    for start in range(0, len(shifts), ORBIT_CHUNK):
        images = shifts[start : start + ORBIT_CHUNK][:, columns]  # (D, P, n): s p
        codes = ranks[np.arange(len(columns))[:, None], images] @ powers
        best.append(codes.min(1))
        hits.append(codes == best[-1][:, None])
    hits = np.concatenate(hits)
    starts = np.concatenate([[0], hits.sum(1).cumsum()])
    return shifts @ powers, np.concatenate(best), starts, columns[np.nonzero(hits)[1]]


# ---- generator ------------------------------------------------------------------------------------------------------


def generate(size: int, n: int, clues: tuple[int, int], seed: int, difficulty: str = "any") -> Grids:
    """Returns n puzzles with one solution, whose number of clues is in the range `clues`, both ends included.

    difficulty: "singles" are puzzles that naked and hidden singles solve, "guess" are all others, "any" are both. To
    make a puzzle, clues are removed from a random solution in random order, as long as there is still one solution (and
    singles still solve it, if asked for). Equal arguments give equal puzzles. Raises UserError if the range is
    impossible, or if no such puzzle is found."""
    kind = Sudoku(size)
    low, high = clues
    if difficulty not in DIFFICULTIES:
        raise UserError(f"difficulty is {difficulty!r}: set it to one of {', '.join(DIFFICULTIES)}")
    if n < 1:
        raise UserError(f"the number of puzzles is {n}: set it to 1 or more")
    if not FEWEST_CLUES[size] <= low <= high <= size * size:
        bounds = f"from {FEWEST_CLUES[size]}, the fewest with one solution, to {size * size}"
        raise UserError(
            f"clues {low} to {high} do not fit a sudoku of size {size}: set both {bounds}, the lower one first"
        )
    rng, parts, found, tried, without = np.random.default_rng((seed, size)), [], 0, 0, 0
    while found < n:
        # as many as are needed if the share of good puzzles stays as it was so far
        batch = math.ceil((n - found) / max(0.01, found / tried if tried else 1))
        solutions = random_solutions(size, min(BATCH, batch), rng)
        boards = _take_clues(size, solutions, rng, low, high, difficulty == "singles")
        ratings = solver.rate(size, boards)
        is_good = ratings["clues"] <= high
        if difficulty == "guess":
            is_good &= ratings["guess"]
        parts.append(make_grids(boards, solutions, ratings).take(is_good))
        found, tried = found + is_good.sum(), tried + len(boards)
        without = 0 if is_good.any() else without + 1
        if without == MOST_BATCHES:
            result = f"{tried} tries gave {found} of {n} {kind.name} puzzles of difficulty {difficulty}"
            raise UserError(f"{result} with {low} to {high} clues: allow more clues, or fewer puzzles")
    ratings = {name: np.concatenate([part.difficulty[name] for part in parts])[:n] for name in parts[0].difficulty}
    inputs, labels = (np.concatenate([part[i] for part in parts])[:n] for i in (0, 1))
    return make_grids(inputs, labels, ratings)


def random_solutions(size: int, n: int, rng: np.random.Generator) -> UInt8[np.ndarray, "n c"]:
    """Returns n filled boards. Of size 4, all 288 are equally likely; larger ones are not drawn uniformly."""
    empty = np.full((1, size * size), BLANK, np.uint8)
    if size == 4:
        return solver.all_solutions(4, empty[0])[rng.integers(288, size=n)]
    full = solver.candidates(size, empty)
    masks, done = np.repeat(full, n, axis=1), []
    while masks.shape[1]:
        result = solver.propagate(size, masks)
        done.append(solver.boards_of(result.masks[:, result.is_solved]))
        # a board that has no solution starts again from an empty one
        masks = np.where(result.is_wrong, full, result.masks)[:, ~result.is_solved]
        counts = solver.COUNT[masks]
        cell = np.where(counts > 1, counts + rng.random(counts.shape), 99).argmin(0)
        here = (cell, np.arange(masks.shape[1]))
        choice = (rng.random(masks.shape[1]) * counts[here]).astype(np.int64)
        masks[here] = np.uint16(1) << solver.NTH[masks[here], choice].astype(np.uint16)
    return rng.permutation(np.concatenate(done))  # the search finishes easy boards first, so they are mixed


def _take_clues(size, solutions, rng, low, high, singles):
    """Returns boards made from solutions by removing clues.

    For each board, a goal from low to high is drawn. Removing stops when this many clues are left, or when no further
    clue can be removed."""
    boards, n = solutions.copy(), len(solutions)
    order, goals = _shuffles(rng, n, size * size), rng.integers(low, high + 1, n)
    for step in range(size * size):
        rows = np.flatnonzero((boards > BLANK).sum(1) > goals)
        if not len(rows):
            break
        here = (np.arange(len(rows)), order[rows, step])
        trial = boards[rows]
        trial[here] = BLANK
        masks = solver.candidates(size, trial)
        if singles:
            stays = solver.propagate(size, masks).is_solved
        else:  # the solution stays the only one if no solution has another digit in this cell
            masks[here[::-1]] ^= np.uint16(1) << (solutions[rows][here] - 2).astype(np.uint16)
            stays = np.ones(len(rows), bool)
            stays[solver.search(size, masks, 1).owners] = False
        boards[rows[stays]] = trial[stays]
    return boards
