"""Tasks whose difficulty is a number of sequential steps, while length and alphabet stay the same.

A model trained on few steps and tested on many shows whether it has learned the step or only short cases. Every family
of tasks has `generate`, which draws instances of chosen difficulties, and `verify`, which checks answers by the rules
of the task, without looking at the targets.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from src.errors import UserError
from src.losses import IGNORE


class Instances(NamedTuple):
    """N instances of a task, one per row."""

    inputs: Int64[np.ndarray, "n l"]  # tokens
    targets: Int64[np.ndarray, "n l"]  # the answer at each token; IGNORE where there is none
    difficulty: Int64[np.ndarray, "n"]  # sequential steps


class Family:
    """A kind of task. Subclasses set the attributes and define `generate` and `verify`.

    generate(n, low, high, rng) draws n instances, each with a difficulty drawn uniformly from low..high. Raises
    UserError if the range is not within 1..hardest."""

    name: str
    vocab_size: int
    length: int  # tokens of one instance
    hardest: int  # the greatest difficulty
    causal: bool  # whether no answer depends on a later token

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        raise NotImplementedError

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Returns for each token whether its answer is right. True where the task has no answer."""
        raise NotImplementedError

    def draw_difficulty(self, n: int, low: int, high: int, rng: np.random.Generator) -> Int64[np.ndarray, "n"]:
        """Draws n difficulties. Raises UserError for a range that the family does not have."""
        if not 1 <= low <= high <= self.hardest:
            raise UserError(f"{self.name} of difficulty {low} to {high}: choose from 1 to {self.hardest}")
        return rng.integers(low, high + 1, n)


def draw_runs(columns: int, longest: int, rng: np.random.Generator) -> Bool[np.ndarray, "c"]:
    """Draws which columns belong to a run: one run of `longest`, and runs of any shorter or equal length around it.

    No run starts at the first column, so each follows a column outside of all runs."""
    is_in_run = np.zeros(columns, dtype=bool)
    start = rng.integers(1, columns - longest + 1)
    is_in_run[start : start + longest] = True
    for left, end in ((1, start - 1), (start + longest + 1, columns)):
        while left < end:
            run = min(rng.integers(0, longest + 1), end - left)
            is_in_run[left : left + run] = True
            left += run + 1
    return is_in_run


class Carries(Family):
    """Addition of two long numbers: the answer of each column is its digit after the carry from the columns before.

    A token is the sum of the two digits of a column, 0 to 18. Columns come least significant first. A BOS stands before
    them, which shows the first column that no carry comes in. A column with the sum 9 passes the carry on. Any other
    sum decides it: 10 or more carries, 8 or less does not. The difficulty is the length of the longest run of nines,
    because the columns in a run can be answered only after the column before the run. That column carries in half of
    the instances."""

    name = "carries"
    vocab_size = 20
    bos = 19
    causal = True

    def __init__(self, columns: int = 32):
        if columns < 2:
            raise UserError(f"carries with {columns} columns: set it to 2 or more")
        self.columns, self.length, self.hardest = columns, columns + 1, columns - 1

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        difficulty = self.draw_difficulty(n, low, high, rng)
        sums = self._others(rng.integers(0, 18, (n, self.columns)))
        for row, longest in zip(sums, difficulty.tolist()):
            row[draw_runs(self.columns, longest, rng)] = 9
        inputs = np.concatenate((np.full((n, 1), self.bos), sums), axis=1)
        return Instances(inputs, self._answers(inputs), difficulty)

    @staticmethod
    def _others(numbers):
        """Maps 0..17 to the sums other than 9, half of which carry."""
        return numbers + (numbers >= 9)

    def _answers(self, inputs):
        targets = np.full_like(inputs, IGNORE)
        carry = np.zeros(len(inputs), dtype=np.int64)
        for column in range(1, self.length):
            total = inputs[:, column] + carry
            targets[:, column], carry = total % 10, total // 10
        return targets

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Checks each digit against the sum of the numbers up to its column, in Python's exact integers."""
        is_right = np.ones(answers.shape, dtype=bool)
        for row, (sums, digits) in enumerate(zip(inputs.tolist(), answers.tolist())):
            number, place = 0, 1
            for column in range(1, self.length):
                number += sums[column] * place
                is_right[row, column] = digits[column] == number // place % 10
                place *= 10
        return is_right


class Words(Family):
    """Words of permutations of three objects: the answer of a column is the product of its word up to this column.

    A column has one of the 6 permutations, and either begins a word or continues the word before it: a token is the
    number of the permutation, plus 6 if it begins a word. Products do not commute. BOS comes first, and the first
    column begins a word. The difficulty is the number of products in the longest word: columns that continue it."""

    name = "words"
    vocab_size = 13
    bos = 12
    causal = True
    permutations = tuple(itertools.permutations(range(3)))

    def __init__(self, columns: int = 32):
        if columns < 2:
            raise UserError(f"words with {columns} columns: set it to 2 or more")
        self.columns, self.length, self.hardest = columns, columns + 1, columns - 1
        number = {permutation: i for i, permutation in enumerate(self.permutations)}
        # products[a, b]: first a, then b
        self.products = np.array(
            [[number[tuple(b[i] for i in a)] for b in self.permutations] for a in self.permutations]
        )

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        difficulty = self.draw_difficulty(n, low, high, rng)
        begins = np.stack([~draw_runs(self.columns, longest, rng) for longest in difficulty.tolist()])
        elements = rng.integers(0, 6, (n, self.columns))
        inputs = np.concatenate((np.full((n, 1), self.bos), elements + 6 * begins), axis=1)
        targets = np.full_like(inputs, IGNORE)
        product = elements[:, 0]
        for column in range(self.columns):
            product = np.where(begins[:, column], elements[:, column], self.products[product, elements[:, column]])
            targets[:, column + 1] = product
        return Instances(inputs, targets, difficulty)

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Moves three objects by the permutations of each word, one after the other."""
        is_right = np.ones(answers.shape, dtype=bool)
        for row, (tokens, given) in enumerate(zip(inputs.tolist(), answers.tolist())):
            places = None
            for column in range(1, self.length):
                begins, element = divmod(tokens[column], 6)
                if begins:
                    places = [0, 1, 2]  # of the three objects
                places = [self.permutations[element][place] for place in places]
                is_right[row, column] = given[column] in range(6) and [*self.permutations[given[column]]] == places
        return is_right


class Regions(Family):
    """Cells that can be reached on a grid: the answer of an open cell is whether a path leads there from the start.

    The grid has walls, open cells and one start, and is read row by row, with one wall behind each row, so that
    neighbours in the reading order are neighbours on the grid. Each cell is a wall with the same probability, whatever
    the difficulty is: the steps to the farthest cell that can be reached. Regions that do not contain the start may be
    of any size. Walls have no answer."""

    name = "regions"
    vocab_size = 3
    causal = False
    wall, open, start = range(3)
    open_share = 0.55

    def __init__(self, size: int = 8):
        if not 4 <= size <= 64:
            raise UserError(f"regions of size {size}: choose from 4 to 64")
        self.size, self.length = size, size * (size + 1)
        self.hardest = 2 * size + size // 2  # beyond that, random grids with such a path are too rare

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        difficulty = self.draw_difficulty(n, low, high, rng)
        cells, reached = np.zeros((2, n, self.size, self.size), dtype=np.int64)
        missing = np.ones(n, dtype=bool)
        while missing.any():
            more, is_reached, steps = self._draw(4 * n + 256, rng)
            for wanted in np.unique(difficulty[missing]):
                rows, found = np.flatnonzero(missing & (difficulty == wanted)), np.flatnonzero(steps == wanted)
                rows, found = rows[: len(found)], found[: len(rows)]
                cells[rows], reached[rows], missing[rows] = more[found], is_reached[found], False
        targets = np.where(cells == self.wall, IGNORE, reached)
        return Instances(self._read(cells, self.wall), self._read(targets, IGNORE), difficulty)

    def _read(self, grids, behind):
        """Grids -> rows of tokens, with `behind` after each row of a grid."""
        return np.pad(grids, ((0, 0), (0, 0), (0, 1)), constant_values=behind).reshape(len(grids), self.length)

    def _draw(self, n: int, rng):
        """Draws n grids.  Returns cells, whether each is reached (n, size, size), and steps to the farthest (n,)."""
        is_open = rng.random((n, self.size, self.size)) < self.open_share
        cells = np.where(is_open, self.open, self.wall)
        flat = cells.reshape(n, -1)
        flat[np.arange(n), np.where(flat == self.open, rng.random(flat.shape), 0).argmax(1)] = self.start
        reached, steps = cells == self.start, np.zeros(n, dtype=np.int64)
        while True:
            around = np.pad(reached, ((0, 0), (1, 1), (1, 1)))
            beside = around[:, 2:, 1:-1] | around[:, :-2, 1:-1] | around[:, 1:-1, 2:] | around[:, 1:-1, :-2]
            grown = reached | beside & (cells != self.wall)
            grows = (grown != reached).any((1, 2))
            if not grows.any():
                return cells, reached, steps
            reached, steps = grown, steps + grows

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Walks from the start of each grid, cell by cell."""
        is_right = np.ones(answers.shape, dtype=bool)
        width = self.size + 1
        for row, (tokens, given) in enumerate(zip(inputs.tolist(), answers.tolist())):
            seen, ahead = set(), [tokens.index(self.start)]
            while ahead:
                cell = ahead.pop()
                if 0 <= cell < self.length and tokens[cell] != self.wall and cell not in seen:
                    seen.add(cell)
                    ahead += [cell - width, cell - 1, cell + 1, cell + width]
            for cell, token in enumerate(tokens):
                is_right[row, cell] = token == self.wall or given[cell] == (cell in seen)
        return is_right


class Chains(Family):
    """Pointers to follow to their root: the answer of a node is the colour of the root that it leads to.

    The token of a root is its colour. That of any other node is the distance to its parent, 1 to `reach` positions
    back, plus the number of colours - 1. A node is a root with probability `root_share`, or if its parent would be
    outside of the row or already `difficulty` steps from its root. The difficulty is the most steps from a node to its
    root. One path of this length is drawn first, with distances that are made shorter where the row is too short."""

    name = "chains"
    causal = True
    colours, reach, root_share = 4, 8, 0.2

    def __init__(self, nodes: int = 32):
        if nodes < 4:
            raise UserError(f"chains with {nodes} nodes: set it to 4 or more")
        self.nodes, self.length, self.vocab_size = nodes, nodes, self.colours + self.reach
        self.hardest = nodes // 2  # on longer paths, most parents would be the next node

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        difficulty = self.draw_difficulty(n, low, high, rng)
        distances = rng.integers(1, self.reach + 1, (n, self.nodes))
        distances[rng.random((n, self.nodes)) < self.root_share] = 0
        colours = rng.integers(0, self.colours, (n, self.nodes))
        inputs, targets = np.zeros((2, n, self.nodes), dtype=np.int64)
        for row, (height, back) in enumerate(zip(difficulty.tolist(), distances)):
            on_path = self._draw_path(height, back, rng)
            steps = [0] * self.nodes
            for node, distance in enumerate(back.tolist()):
                is_root = distance == 0 or distance > node
                if is_root or steps[node - distance] == height and not on_path[node]:
                    inputs[row, node] = targets[row, node] = colours[row, node]
                else:
                    inputs[row, node] = self.colours + distance - 1
                    targets[row, node], steps[node] = targets[row, node - distance], steps[node - distance] + 1
        return Instances(inputs, targets, difficulty)

    def _draw_path(self, height: int, back, rng) -> Bool[np.ndarray, "k"]:
        """Writes the distances of a root and of `height` nodes above it into `back`.  Returns which nodes these are."""
        distances = rng.integers(1, self.reach + 1, height)
        while distances.sum() >= self.nodes:
            distances[rng.choice(np.flatnonzero(distances > 1))] -= 1
        root = rng.integers(0, self.nodes - distances.sum())
        path = root + np.concatenate(([0], distances.cumsum()))
        back[path] = np.concatenate(([0], distances))
        on_path = np.zeros(self.nodes, dtype=bool)
        on_path[path] = True
        return on_path

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Follows each node to its root."""
        is_right = np.zeros(answers.shape, dtype=bool)
        for row, tokens in enumerate(inputs.tolist()):
            for node in range(self.nodes):
                root = node
                while tokens[root] >= self.colours:
                    root -= tokens[root] - self.colours + 1
                is_right[row, node] = answers[row, node] == tokens[root]
        return is_right
