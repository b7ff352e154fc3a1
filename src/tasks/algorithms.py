"""Tasks whose difficulty is a number of sequential steps, while length and alphabet stay the same.

A model trained on few steps and tested on many shows whether it has learned the step or only short cases. Every family
of tasks has `generate`, which draws instances of chosen difficulties, and `verify`, which checks answers by the rules
of the task, without looking at the targets.
"""

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
            row[self._nines(longest, rng)] = 9
        inputs = np.concatenate((np.full((n, 1), self.bos), sums), axis=1)
        return Instances(inputs, self._answers(inputs), difficulty)

    @staticmethod
    def _others(numbers):
        """Maps 0..17 to the sums other than 9, half of which carry."""
        return numbers + (numbers >= 9)

    def _nines(self, longest: int, rng) -> Bool[np.ndarray, "c"]:
        """Draws the columns with a nine: one run of `longest`, and runs of any shorter or equal length around it.

        Every run follows a column that decides its carry, so no run starts at the first column."""
        is_nine = np.zeros(self.columns, dtype=bool)
        start = rng.integers(1, self.columns - longest + 1)
        is_nine[start : start + longest] = True
        for left, end in ((1, start - 1), (start + longest + 1, self.columns)):
            while left < end:
                run = min(rng.integers(0, longest + 1), end - left)
                is_nine[left : left + run] = True
                left += run + 1
        return is_nine

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


class Chains(Family):
    """Edges to follow to their root: the answer of an edge is the root that its child leads to.

    A token is a pair (child, parent) of nodes, child x nodes + parent, and every node is the child of one edge. A root
    is its own parent. Edges come in random order, but parents before their children, so that a causal model can answer.
    The difficulty is the largest number of steps from a node to its root. Other nodes are at random places, with at
    most as many steps to their root."""

    name = "chains"
    causal = True

    def __init__(self, nodes: int = 16, roots: int = 2):
        if not 1 <= roots < nodes:
            raise UserError(f"chains with {nodes} nodes and {roots} roots: choose fewer roots, at least 1")
        self.nodes, self.roots, self.length = nodes, roots, nodes
        self.vocab_size, self.hardest = nodes * nodes, nodes - roots

    def generate(self, n: int, low: int, high: int, rng: np.random.Generator) -> Instances:
        difficulty = self.draw_difficulty(n, low, high, rng)
        inputs, targets = np.zeros((2, n, self.nodes), dtype=np.int64)
        for row, height in enumerate(difficulty.tolist()):
            parents, roots = self._forest(height, rng)
            names = rng.permutation(self.nodes)
            order = self._parents_first(parents, rng)
            inputs[row] = names[order] * self.nodes + names[parents[order]]
            targets[row] = names[roots[order]]
        return Instances(inputs, targets, difficulty)

    def _forest(self, height: int, rng) -> tuple[Int64[np.ndarray, "k"], Int64[np.ndarray, "k"]]:
        """Draws the parent and the root of every node: one path of `height` steps, the rest at random below that."""
        parents, roots = np.arange(self.nodes), np.arange(self.nodes)
        steps = np.zeros(self.nodes, dtype=np.int64)
        for node in range(self.roots, self.nodes):
            on_path = node < self.roots + height
            if on_path:
                parent = 0 if node == self.roots else node - 1
            else:
                parent = rng.choice(np.flatnonzero(steps[:node] < height))
            parents[node], roots[node], steps[node] = parent, roots[parent], steps[parent] + 1
        return parents, roots

    def _parents_first(self, parents, rng) -> Int64[np.ndarray, "k"]:
        """A random order of the nodes in which each comes after its parent."""
        ranks = rng.random(self.nodes)
        for node, parent in enumerate(parents):  # a parent has a lower number than its children
            if parent != node:
                ranks[node] = rng.uniform(ranks[parent], 1)
        return np.argsort(ranks)

    def verify(self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]) -> Bool[np.ndarray, "n l"]:
        """Follows each edge to its root."""
        is_right = np.zeros(answers.shape, dtype=bool)
        for row, edges in enumerate(inputs.tolist()):
            parent = dict(divmod(edge, self.nodes) for edge in edges)
            for column, edge in enumerate(edges):
                node = edge // self.nodes
                while parent[node] != node:
                    node = parent[node]
                is_right[row, column] = answers[row, column] == node
        return is_right
