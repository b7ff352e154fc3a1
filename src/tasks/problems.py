"""Problems as text: parity, copy, reverse and addition, and the tasks of the reasoning-gym library.

A problem is a question with one answer. Problems are distinct: a question counts as known if `key_of` returns the same
key, so 3 + 4 and 4 + 3 are the same problem. The scorers of reasoning-gym are never called, because those of several
tasks run the answer, a model's text, as code.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from src.data.corpus import content_hash
from src.errors import UserError

OWN = ("addition", "copy", "parity", "reverse")
MOST_DIGITS = 1000
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
_SUM = re.compile(r"(\d+) \+ (\d+)\Z")
MOST_FAILURES = 20  # items that reasoning-gym fails to make before the first success
_FRUITLESS = 100_000  # draws in a row without a new problem, after which a generator has found them all
# metadata of reasoning-gym: what a task's difficulty is
_DIFFICULTY = {
    "mini_sudoku": "num_empty",
    "maze": "shortest_path_length",
    "chain_sum": "num_terms",
    "spell_backward": "word_len",
}


class Problem(NamedTuple):
    """One problem; difficulty is None if the task has no number for it."""

    question: str
    answer: str
    metadata: dict
    difficulty: int | None


def key_of(question: str) -> int:
    """Returns a 64-bit key. The two orders of a sum of two numbers have the same key, and so has the same question with
    other white space around it, which files of records do not keep."""
    terms = _SUM.match(question := question.strip())
    return content_hash(" + ".join(sorted(terms.groups())).encode() if terms else question.encode())


# ---- own tasks ------------------------------------------------------------------------------------------------------


def draw(name: str, n: int, low: int, high: int, rng, reversed_digits: bool = False) -> list[Problem]:
    """Draws n problems of an own task; every length from low to high is equally likely.

    The length is the number of digits of an operand, of bits, or of letters. In additions, both lengths are drawn
    separately, and the difficulty is the longer one. With reversed_digits, a sum starts with its least significant
    digit, so that no digit of it depends on a later one."""
    if name == "addition":
        pairs = zip(_numbers(n, low, high, rng), _numbers(n, low, high, rng))
        return [_addition(a, b, reversed_digits) for a, b in pairs]
    lengths = rng.integers(low, high + 1, n).tolist()
    symbols = rng.choice(np.frombuffer(b"01", dtype=np.uint8) if name == "parity" else LETTERS, (n, high))
    words = [row[:length].tobytes().decode() for row, length in zip(symbols, lengths)]
    answer = {"parity": lambda word: str(word.count("1") % 2), "copy": str, "reverse": lambda word: word[::-1]}[name]
    return [Problem(f"{name} {word}", answer(word), {"task": name}, len(word)) for word in words]


def _numbers(n, low, high, rng):
    """Draws n numbers as text. Only the one-digit number 0 begins with 0."""
    lengths = rng.integers(low, high + 1, n)
    digits = rng.integers(0, 10, (n, high), dtype=np.uint8)
    digits[:, 0] = np.where(lengths > 1, rng.integers(1, 10, n), digits[:, 0])
    digits += ord("0")
    return [row[:length].tobytes().decode() for row, length in zip(digits, lengths.tolist())]


def _addition(a, b, reversed_digits):
    total = str(int(a) + int(b))
    metadata = {"task": "addition", "digits": [len(a), len(b)], "reversed_digits": reversed_digits}
    return Problem(f"{a} + {b}", total[::-1] if reversed_digits else total, metadata, max(len(a), len(b)))


def count_distinct(name: str, low: int, high: int) -> int:
    """Returns how many distinct problems an own task has."""
    if name == "addition":
        numbers = 10**high - (10 ** (low - 1) if low > 1 else 0)
        return numbers * (numbers + 1) // 2
    base = 2 if name == "parity" else len(LETTERS)
    return sum(base**length for length in range(low, high + 1))


def own_problems(name, size, low, high, seed, reversed_digits=False) -> Iterator[Problem]:
    """Yields problems of an own task without end, in a fixed order for a seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield from draw(name, min(max(size, 100), 10_000), low, high, rng, reversed_digits)


# ---- reasoning-gym --------------------------------------------------------------------------------------------------


def check_task(name: str):
    """Raises UserError if there is no such task, or if it needs a library that is not installed."""
    if name in OWN:
        return
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            f"{name} is no task of this project ({', '.join(OWN)}), and reasoning-gym is not installed: "
            "run pip install reasoning-gym==0.1.25"
        ) from None
    if name not in DATASETS:
        close = difflib.get_close_matches(name, [*OWN, *DATASETS], 3, 0.4)
        raise UserError(f"there is no task {name}: " + (f"did you mean {', '.join(close)}?" if close else "see --list"))


def all_tasks() -> list[str]:
    """Returns the names of all tasks; those of reasoning-gym only if it is installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return [*OWN]
    return sorted({*OWN, *DATASETS})


def gym_problems(name, tries, seed, options, is_terse=False) -> Iterator[Problem]:
    """Yields the items of a reasoning-gym task: item i is made with the seed `seed + i`. None if there is no such item.

    options: {name: value} of the task's settings. Raises UserError if the task refuses one."""
    from reasoning_gym.factory import DATASETS, create_dataset

    names = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        if option not in names:
            raise UserError(f"--set {option}: {name} has no such option; it has {', '.join(names) or 'none'}")
    if is_terse and name not in _DIFFICULTY:
        raise UserError(f"--terse: {name} has no short form; the tasks with one are {', '.join(_DIFFICULTY)}")
    try:
        items = create_dataset(name, seed=seed, size=tries, **options)
    except (AssertionError, ValueError, TypeError) as error:
        given = " ".join(f"{option}={value}" for option, value in options.items())
        raise UserError(f"{name} refuses {given or 'its default options'}: {error}; correct --set") from None
    unanswered = answered = 0
    for item in _made(name, items, tries):
        if item is None or not isinstance(item["answer"], (str, int, float)):  # a few problems have several answers
            unanswered += item is not None
            if unanswered >= MOST_FAILURES and not answered:
                raise UserError(f"{name}: its problems have several answers, and none is given: choose another task")
            yield None
        else:
            answered += 1
            question = _terse(name, item["metadata"]) if is_terse else item["question"]
            yield Problem(
                question, str(item["answer"]), item["metadata"], item["metadata"].get(_DIFFICULTY.get(name, ""))
            )


def _made(name, items, tries):
    """Yields the items of reasoning-gym. Some generators give up on some seeds: then it yields None.

    Raises UserError if it can make none of the first MOST_FAILURES."""
    failures = made = 0
    for number in range(tries):
        try:
            item = items[number]
        except Exception as error:  # whatever a generator of the library raises
            failures += 1
            if failures == 1:
                print(f"{name}: item {number} cannot be made ({error}), skipped; so are others", file=sys.stderr)
            if failures >= MOST_FAILURES and not made:
                raise UserError(
                    f"{name}: reasoning-gym makes none of {failures} items ({error}): change --set"
                ) from None
            yield None
        else:
            made += 1
            yield item


def _terse(name, metadata):
    """Returns the question of a task without instructions, from the metadata of an item."""
    if name == "mini_sudoku":
        return "\n".join(" ".join(str(digit) if digit else "_" for digit in row) for row in metadata["puzzle"])
    if name == "maze":  # every item draws its own characters; the short form has those of solve_puzzles.py
        symbols = {metadata["wall"]: "#", metadata["path"]: " ", metadata["start"]: "S", metadata["goal"]: "G"}
        return "\n".join("".join(symbols[cell] for cell in row) for row in metadata["grid"])
    return metadata["expression"] if name == "chain_sum" else metadata["word"]


def parse_options(words) -> dict:
    """Returns {name: value} of words such as min_terms=3. A value is JSON, or else text."""
    options = {}
    for word in words:
        name, is_assigned, value = word.partition("=")
        if not (name and is_assigned):
            raise UserError(f"--set {word}: write it as name=value, such as min_terms=3")
        if name in ("seed", "size"):
            raise UserError(f"--set {name}: this is a flag of its own, --{name}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = {"True": True, "False": False}.get(value, value)
    return options


# ---- selection ------------------------------------------------------------------------------------------------------

_END = object()


class Distinct:
    """Takes problems that are new, and counts the others: repeated ones, and those in the set `excluded` of keys.

    `drawn` counts all of them, and the Nones in place of problems that could not be made."""

    def __init__(self, excluded=()):
        self.excluded, self.seen = set(excluded), set()
        self.drawn = self.repeated = self.left_out = 0

    def take(self, problems, size: int) -> Iterator[Problem]:
        """Yields up to `size` new problems; fewer if there are no more, or if no new ones are found any more."""
        fruitless = 0
        while len(self.seen) < size and fruitless < _FRUITLESS:
            problem = next(problems, _END)
            if problem is _END:
                return
            self.drawn += 1
            fruitless += 1
            if problem is None:
                continue
            key = key_of(problem.question)
            if key in self.excluded:
                self.left_out += 1
            elif key in self.seen:
                self.repeated += 1
            else:
                fruitless = 0
                self.seen.add(key)
                yield problem
