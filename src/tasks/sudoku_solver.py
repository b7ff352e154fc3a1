"""Sudoku solved by bit masks, thousands of boards at a time: singles, search, number of solutions, difficulty.

The candidates of a cell are the bits of a uint16: bit d stands for digit d + 1. Arrays of candidates are (cells, N),
with the boards last, because numpy is fastest along the last axis. Boards are tokens: 1 = blank, 2 = digit 1, etc.

A naked single is a cell with one candidate left. A hidden single is a digit with one possible cell left in a unit,
which is a row, column or box.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt16

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> rows and columns of a box
BLANK = 1  # token
CHUNK = 4096  # boards that the search works on at once; more would not fit the CPU's cache
NARROW = 256  # the same if only a few boards are to be solved: the first solution then comes sooner
_MASKS = np.arange(512, dtype=np.uint16)
_BITS = _MASKS[:, None] >> np.arange(9, dtype=np.uint16) & 1  # (512, 9)
COUNT = _BITS.sum(1).astype(np.uint8)  # number of bits of a mask
NTH = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.uint8)  # (512, 9): NTH[mask, i] is the i-th bit of a mask
_IS_SINGLE = COUNT == 1


class Layout(NamedTuple):
    """The units of a board: rows, columns and boxes."""

    units: Int64[np.ndarray, "u n"]  # cells of each of the 3 * size units
    units_of: Int64[np.ndarray, "c 3"]  # the row, the column and the box of each cell
    full: int  # mask of all digits


@cache
def layout(size: int) -> Layout:
    """Returns the layout of a board of one of the sizes in BOXES."""
    box_rows, box_columns = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    box = row // box_rows * (size // box_columns) + column // box_columns
    units_of = np.stack([row, size + column, 2 * size + box], axis=1)
    units = np.stack([np.flatnonzero((units_of == unit).any(1)) for unit in range(3 * size)])
    return Layout(units, units_of, 2**size - 1)


def candidates(size: int, boards: UInt8[np.ndarray, "n c"]) -> UInt16[np.ndarray, "c n"]:
    """Returns the masks of boards: a filled cell has one bit, a blank cell has all bits."""
    bits = np.array([layout(size).full] * 2 + [1 << digit for digit in range(size)], np.uint16)
    return bits[np.ascontiguousarray(boards.T)]


def boards_of(masks: UInt16[np.ndarray, "c n"]) -> UInt8[np.ndarray, "n c"]:
    """Returns the boards of masks. A cell with several candidates is blank."""
    return np.where(_IS_SINGLE[masks], NTH[masks, 0] + 2, BLANK).astype(np.uint8).T.copy()


class Propagated(NamedTuple):
    """Candidates after all naked and hidden singles are placed."""

    masks: UInt16[np.ndarray, "c n"]
    is_solved: Bool[np.ndarray, "n"]
    is_wrong: Bool[np.ndarray, "n"]  # the candidates contradict each other, so there is no solution
    rounds: Int64[np.ndarray, "n"]  # number of rounds that placed a digit; one round places all singles of a board


def propagate(size: int, masks: UInt16[np.ndarray, "c n"]) -> Propagated:
    """Place naked and hidden singles until no board changes."""
    masks, n = masks.copy(), masks.shape[1]
    is_solved, is_wrong, rounds = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, np.int64)
    active, current = np.arange(n), masks
    n_placed = _IS_SINGLE[masks].sum(0)
    while len(active):
        current, wrong = _one_round(size, current)
        before, n_placed = n_placed, _IS_SINGLE[current].sum(0)
        progress = (n_placed > before) & ~wrong
        rounds[active] += progress
        ended = ~progress  # a solved board takes one more round, which checks it
        masks[:, active[ended]] = current[:, ended]
        is_wrong[active] = wrong
        is_solved[active] = ended & ~wrong & (n_placed == size * size)
        active, current, n_placed = active[progress], current[:, progress], n_placed[progress]
    return Propagated(masks, is_solved, is_wrong, rounds)


def _one_round(size, masks):
    """Returns (masks, is_wrong) after one round.

    First, the digits of filled cells are removed from the other cells of their units. Then a digit with one possible
    cell in a unit is placed there."""
    units, units_of, full = layout(size)
    placed = np.where(_IS_SINGLE[masks], masks, 0).astype(np.uint16)
    used, twice = _once_and_twice(units, placed)
    is_wrong = twice.any(0)
    excluded = used[units_of[:, 0]] | used[units_of[:, 1]] | used[units_of[:, 2]]
    masks = np.where(placed, masks, masks & ~excluded)
    once, twice = _once_and_twice(units, masks)
    is_wrong |= (once != full).any(0)  # a digit has no cell left
    only = once & ~twice
    hidden = masks & (only[units_of[:, 0]] | only[units_of[:, 1]] | only[units_of[:, 2]])
    is_wrong |= (COUNT[hidden] > 1).any(0)  # two digits need the same cell
    masks = np.where(hidden, hidden, masks)
    return masks, is_wrong | (masks == 0).any(0)


def _once_and_twice(units, masks):
    """Returns the bits that occur at least once, and at least twice, in the cells of each unit: two (u, N) arrays."""
    once = masks[units[:, 0]]
    twice = np.zeros_like(once)
    for cell in range(1, units.shape[1]):
        bits = masks[units[:, cell]]
        twice |= once & bits
        once |= bits
    return once, twice


class Solutions(NamedTuple):
    """The result of a search: boards[i] solves board owners[i]. They are in no particular order."""

    owners: Int64[np.ndarray, "s"]
    boards: UInt8[np.ndarray, "s c"]
    given_up: Bool[np.ndarray, "n"]  # whether there may be more solutions, or any, because the search was too long


def search(size: int, masks: UInt16[np.ndarray, "c n"], most: int, effort: int | None = None) -> Solutions:
    """Returns at least `most` solutions of each board, or all that it has.

    The search is depth first. It keeps a stack of boards, and works on up to CHUNK boards at its top at once. A board
    is split into a guess and its opposite, and the guess is searched first. After `effort` such boards, the search for
    a board is given up: a few boards, mostly without a solution, would take minutes or hours."""
    owners, solutions = [np.zeros(0, np.int64)], [np.zeros((0, size * size), np.uint8)]
    found, tried = np.zeros(masks.shape[1], np.int64), np.zeros(masks.shape[1], np.int64)
    effort = np.iinfo(np.int64).max if effort is None else effort
    for start in range(0, masks.shape[1], CHUNK):
        rows = np.arange(start, min(start + CHUNK, masks.shape[1]))
        stack = [(rows, masks[:, rows])]
        while stack:
            rows, current = stack.pop()
            needed = (found[rows] < most) & (tried[rows] <= effort)
            np.add.at(tried, rows[needed], 1)
            rows, result = rows[needed], propagate(size, current[:, needed])
            solved, is_open = result.is_solved, ~result.is_solved & ~result.is_wrong
            owners.append(rows[solved])
            solutions.append(boards_of(result.masks[:, solved]))
            np.add.at(found, rows[solved], 1)
            if is_open.any():
                guess, other = _branch(result.masks[:, is_open])
                stack += [(rows[is_open], other), (rows[is_open], guess)]
                _merge(stack, max(NARROW, min(CHUNK, masks.shape[1])))
    return Solutions(np.concatenate(owners), np.concatenate(solutions), (tried > effort) & (found < most))


def _branch(masks):
    """Splits each board at the cell with the fewest candidates.

    Returns (guess, other): the boards with the lowest candidate there, and the boards with all others there."""
    counts = COUNT[masks]
    cell = np.where(counts > 1, counts, 10).argmin(0)
    here = (cell, np.arange(masks.shape[1]))
    guess, other = masks.copy(), masks.copy()
    lowest = np.uint16(1) << NTH[masks[here], 0].astype(np.uint16)
    guess[here] = lowest
    other[here] ^= lowest
    return guess, other


def _merge(stack, most):
    """Join the two topmost entries of a stack if they are small, because a call for few boards is hardly faster."""
    while len(stack) > 1 and len(stack[-1][0]) + len(stack[-2][0]) <= most:
        rows, masks = stack.pop()
        below, masks_below = stack.pop()
        stack.append((np.concatenate([below, rows]), np.concatenate([masks_below, masks], axis=1)))


def count_solutions(size: int, boards: UInt8[np.ndarray, "n c"], most: int = 2) -> Int64[np.ndarray, "n"]:
    """Returns the number of solutions of each board, at most `most`, at which counting stops."""
    owners = search(size, candidates(size, boards), most).owners
    return np.minimum(np.bincount(owners, minlength=len(boards)), most)


def solve(size: int, boards: UInt8[np.ndarray, "n c"]) -> UInt8[np.ndarray, "n c"]:
    """Returns a solution of each board, or a row of zeros if there is none."""
    found = search(size, candidates(size, boards), 1)
    solved = np.zeros_like(boards)
    solved[found.owners] = found.boards
    return solved


def all_solutions(size: int, board: UInt8[np.ndarray, "c"]) -> UInt8[np.ndarray, "s c"]:
    """Returns every solution of a board, in lexicographic order. An empty board of size 4 has 288."""
    solutions = search(size, candidates(size, board[None]), np.iinfo(np.int64).max).boards
    return solutions[np.lexsort(solutions.T[::-1])]


def rate(size: int, boards: UInt8[np.ndarray, "n c"]) -> dict[str, np.ndarray]:
    """Returns measures of difficulty.

    clues is the number of clues. rounds is the number of rounds of naked and hidden singles until the board is solved,
    or until there is no single left. guess is true if singles alone do not solve the board."""
    rounds, guess = [], []
    for start in range(0, len(boards), CHUNK):
        result = propagate(size, candidates(size, boards[start : start + CHUNK]))
        rounds.append(result.rounds)
        guess.append(~result.is_solved)
    clues = (boards > BLANK).sum(1)
    return {
        "clues": clues,
        "rounds": np.concatenate([clues[:0], *rounds]),
        "guess": np.concatenate([clues[:0] > 0, *guess]),
    }
