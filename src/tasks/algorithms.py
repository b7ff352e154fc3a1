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

    def verify(
        self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]
    ) -> Bool[np.ndarray, "n l"]:
        """Returns for each token whether its answer is right. True where the task has no answer."""
        raise NotImplementedError

    def draw_difficulty(self, n: int, low: int, high: int, rng: np.random.Generator) -> Int64[np.ndarray, "n"]:
        """Draws n difficulties. Raises UserError for a range that the family does not have."""
        if not 1 <= low <= high <= self.hardest:
            raise UserError(f"{self.name} of difficulty {low} to {high}: choose from 1 to {self.hardest}")
        return rng.integers(low, high + 1, n)


class Carries(Family):
    """Addition of two long numbers: the answer of each column is its digit after the carry from the columns before.

    A token is the sum of the two digits of a column, 0 to 18, and columns come least significant first, behind a BOS
    (which lets the first column see that there is none before it). A sum of 9 passes the carry on, and every other sum
    decides it: 10 or more carries, 8 or less does not. The difficulty is the longest run of nines, because the columns
    in a run can be answered only after the column before the run. That column carries in half of the instances."""

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
        for row, longest in zip(sums, difficulty):
            row[self._nines(longest, rng)] = 9
        inputs = np.concatenate((np.full((n, 1), self.bos), sums), axis=1)
        return Instances(inputs, self._answers(inputs), difficulty)

    @staticmethod
    def _others(numbers):
        """0..17 -> the sums other than 9: half of them carry."""
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

    def verify(
        self, inputs: Int64[np.ndarray, "n l"], answers: Int64[np.ndarray, "n l"]
    ) -> Bool[np.ndarray, "n l"]:
        """Checks each digit against the sum of the numbers up to its column, in Python's exact integers."""
        is_right = np.ones(answers.shape, dtype=bool)
        for row, (sums, digits) in enumerate(zip(inputs.tolist(), answers.tolist())):
            number, place = 0, 1
            for column in range(1, self.length):
                number += sums[column] * place
                is_right[row, column] = digits[column] == number // place % 10
                place *= 10
        return is_right
