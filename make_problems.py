"""Make problems for training and tests: questions with answers, as .parquet or .jsonl.

    python make_problems.py addition --size 100000 --max_digits 10 --output runs/addition.parquet
    python make_problems.py addition --size 1000 --exclude runs/addition.parquet --output runs/test.parquet
    python make_problems.py addition --reversed_digits true --output runs/reversed.jsonl     # 95 + 64 gives 951
    python make_problems.py parity --min_digits 1 --max_digits 20 --output runs/parity.jsonl
    python make_problems.py mini_sudoku --size 10000 --terse true --output runs/mini_sudoku.parquet
    python make_problems.py chain_sum --set min_terms=3 max_terms=8 --output runs/chain_sum.parquet
    python make_problems.py --list true                                                      # the names of all tasks

This project has addition, copy, parity and reverse. The others are tasks of reasoning-gym, an optional library. A
record has the fields question, answer, metadata (JSON text) and difficulty (a whole number or null). All questions of a
file are distinct, and a + b counts as b + a. To make a test set, use --exclude with the training set: another seed
alone does not prevent common questions.
"""

import json
import os
import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from src.config import check_distinct, check_writable, parse_flags, run
from src.data.corpus import find_files
from src.data.records import RECORD_SUFFIXES, read_records
from src.errors import UserError
from src.files.folders import replacing_file
from src.tasks.problems import (
    MOST_DIGITS,
    OWN,
    Distinct,
    all_tasks,
    check_task,
    count_distinct,
    gym_problems,
    key_of,
    own_problems,
    parse_options,
)

EXTRA_TRIES = 4  # items of reasoning-gym that are made for each one wanted, before giving up on duplicates


@dataclass
class ProblemsConfig:
    """What to make.

    Args:
        task: name of the task; the flag name may be left out
        output: file to write, .parquet or .jsonl
        size: number of problems
        seed: seed of the generator; item i of a reasoning-gym task is made with seed + i
        exclude: files with records whose questions are left out, such as the training set when making a test set
        min_digits: fewest digits of a number in addition; fewest bits or letters in parity, copy and reverse; default 1
        max_digits: most digits, bits or letters; every length is drawn equally often; default 10
        reversed_digits: in addition, write the sum with its least significant digit first
        terse: for mini_sudoku, maze, chain_sum and spell_backward: the question without instructions
        set: options of a reasoning-gym task, each as name=value
        overwrite: replace the output if it exists
        list: print the names of all tasks, and make nothing
    """

    task: str | None = None
    output: str | None = None
    size: int = 10_000
    seed: int = 0
    exclude: list[str] = field(default_factory=list)
    min_digits: int | None = None
    max_digits: int | None = None
    reversed_digits: bool = False
    terse: bool = False
    set: list[str] = field(default_factory=list)
    overwrite: bool = False
    list: bool = False

    def __post_init__(self):
        if self.list:
            return
        if not self.task:
            raise ValueError("no task given: name one, such as addition (--list true prints all)")
        if not 1 <= self.size <= 10**8 or not 0 <= self.seed < 2**62:
            raise ValueError(f"size is {self.size}, seed is {self.seed}: set size from 1 to 100 million, seed from 0")
        if self.task not in OWN and (self.min_digits, self.max_digits) != (None, None):
            raise ValueError(f"min_digits and max_digits are for {', '.join(OWN)}: {self.task} has options, see set")
        self.min_digits = 1 if self.min_digits is None else self.min_digits
        self.max_digits = 10 if self.max_digits is None else self.max_digits
        if not 1 <= self.min_digits <= self.max_digits <= MOST_DIGITS:
            raise ValueError(
                f"min_digits is {self.min_digits}, max_digits is {self.max_digits}: set 1 <= min_digits <= "
                f"max_digits <= {MOST_DIGITS}"
            )
        if self.reversed_digits and self.task != "addition":
            raise ValueError("reversed_digits is for addition: leave it out")
        if self.task in OWN and (self.set or self.terse):
            raise ValueError(f"set and terse are for tasks of reasoning-gym: leave them out for {self.task}")
        if not (self.output or "").endswith((".parquet", ".jsonl")):
            raise ValueError(f"output is {self.output or 'not given'}: choose a file that ends in .parquet or .jsonl")


def parse_args(argv=None) -> ProblemsConfig:
    return parse_flags(__doc__, ProblemsConfig, argv=argv, positional="task")[0]


def make(config: ProblemsConfig):
    """Returns (problems, the Distinct that selected them).  Raises UserError if there are fewer than wanted."""
    name, size, low, high = config.task, config.size, config.min_digits, config.max_digits
    if name in OWN and (most := count_distinct(name, low, high)) < size:
        raise UserError(
            f"{name} of length {low} to {high} has only {most:,} problems: lower --size, or raise --max_digits"
        )
    excluded = [key_of(record.question) for record in read_records(config.exclude)] if config.exclude else ()
    if name in OWN:
        problems, widen = own_problems(name, size, low, high, config.seed, config.reversed_digits), "--max_digits"
    else:
        tries = EXTRA_TRIES * size + 1000
        problems = gym_problems(name, tries, config.seed, parse_options(config.set), config.terse)
        widen = "the range of its options with --set"
    selection = Distinct(excluded)
    found = list(tqdm(selection.take(problems, size), total=size, desc=name, unit=" problems", disable=None))
    if len(found) < size:
        raise UserError(
            f"{name}: only {len(found):,} distinct problems among {selection.drawn:,} drawn ({selection.left_out:,} "
            f"were in --exclude): lower --size, or widen {widen}"
        )
    return found, selection


def write(problems, path):
    """Write the records. After a crash, there is no half-written file."""
    rows = [
        problem._asdict() | {"metadata": json.dumps(problem.metadata, ensure_ascii=False, default=str)}
        for problem in problems
    ]
    try:
        with replacing_file(path) as new:
            if path.endswith(".parquet"):
                import pyarrow as pa
                import pyarrow.parquet as pq

                kinds = dict.fromkeys(("question", "answer", "metadata"), pa.string()) | {"difficulty": pa.int64()}
                pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds.items())), new)
            else:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                new.write_text("".join(lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def main(argv=None):
    config = parse_args(argv)
    if config.list:
        print("\n".join(all_tasks()))
        return
    check_task(config.task)
    if config.exclude:
        check_distinct([config.output], find_files(config.exclude, RECORD_SUFFIXES))
    if os.path.lexists(config.output) and not config.overwrite:
        raise UserError(f"{config.output} exists: choose another --output, or add --overwrite true")
    os.makedirs(os.path.dirname(config.output) or ".", exist_ok=True)
    check_writable(config.output)
    problems, selection = make(config)
    write(problems, config.output)
    after = "" if config.task in OWN else f"; the next unused --seed is {config.seed + selection.drawn}"
    print(
        f"{config.output}: {len(problems):,} problems; removed: {selection.repeated:,} duplicates, "
        f"{selection.left_out:,} in --exclude{after}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(main)
