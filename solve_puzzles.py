"""Solve puzzles with a model that train_puzzles.py trained: Sudoku, mazes, ARC.

    python solve_puzzles.py runs/sudoku4 --board 3....2....4..1..                 # `.` or 0 is a blank
    python solve_puzzles.py runs/sudoku4 --board - < boards.txt                   # one per line
    python solve_puzzles.py runs/sudoku4 --board 3....2....4..1.. --trace         # the board after each step
    python solve_puzzles.py runs/sudoku4 --board 3....2....4..1.. --trace runs/board.png   # the same as a picture
    python solve_puzzles.py runs/sudoku4 --generate 1000 --low 4 --high 6         # how many of 1,000 new ones it solves
    python solve_puzzles.py runs/sudoku4 --held_out true                          # how many of those its run held out
    python solve_puzzles.py runs/sudoku --paths test.csv.gz --output runs/solutions.csv --exit halt
    python solve_puzzles.py runs/sudoku --paths test.csv.gz --steps 64            # more steps than in training
    python solve_puzzles.py runs/sudoku --paths test.csv.gz --starts 8            # the best of eight noisy starts
    python solve_puzzles.py runs/sudoku --paths test.csv.gz --votes 8             # a vote over eight symmetric boards
    python solve_puzzles.py runs/sudoku --paths test.csv.gz --curve runs/curve.png   # accuracy by steps
    python solve_puzzles.py runs/sudoku --held_out --curve runs/curve.png --copies 2 4 8   # also by starts and votes
    python solve_puzzles.py runs/arc --paths challenges.json --votes 100 --submission runs/submission.json

stdout gets the solutions, one per line; a terminal gets a single board as a grid. With --output, they go to a .csv
file instead. Messages go to stderr: for up to 20 boards, whether each answer is right by the rules, its supervision
steps and its seconds; for several boards, also tables of exact accuracy by step and by difficulty. If a puzzle in a
file is no board or has no solution, it is named and skipped.

With --votes or --submission, all pairs of an ARC task are solved together. Each vote is the answer to one augmentation
of the task. The two most frequent answers to each test pair go to the submission file, or without it to stdout. stderr
gets pass@1 and pass@2: the share of test pairs, as a mean over tasks, that are right with one answer and with two.
"""

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from src.config import before_torch, check_distinct, check_png, check_writable, parse_flags, run, write_text
from src.errors import UserError

__all__ = ["main", "parse_args"]

NAMED = 20  # up to this many boards, each gets a line of its own on stderr


@dataclass
class SolveConfig:
    """What to solve, and how much computation each board gets.

    Args:
        checkpoint: checkpoint folder of a puzzle model, or run folder (its best checkpoint is used); the flag name may
            be left out
        board: one or more boards as text, row by row; - reads them from stdin, one per line, or on several lines each
            with a blank line between them. A maze has # for walls, spaces for the floor, S and G
        paths: .csv or .csv.gz files with the columns question and, if it is known, answer; folders of .npy arrays in
            the form of the TRM authors' code (their test part is solved); for ARC also .json files: challenges, with
            the solutions beside them if they are known, single tasks, or folders of either
        generate: number of puzzles to generate. With another data_seed than that of the training, most are new. Small
            boards repeat, however: there are only 288 grids of 4 x 4
        held_out: solve the boards that the training run held out for its evaluations; the checkpoint must be in the
            folder of its run
        low: fewest clues of a generated Sudoku, or steps of a generated maze's path; default depends on the size
        high: most clues of a generated Sudoku, or steps of a generated maze's path; default depends on the size
        difficulty: generated Sudokus: solvable by naked and hidden singles (singles), not so (guess), or both (any)
        data_seed: seed of the generator; training uses 0 by default
        limit: solve the first boards only, this many; 0 = all of them
        exit: fixed = every board takes all supervision steps; halt = a board stops when the halting head says that its
            answer is right, which saves the rest of its computation
        halt_threshold: the halting head calls an answer right if its probability exceeds this
        steps: most supervision steps; default as many as in training; it may be more
        starts: solve each board this many times, first from the model's own first state (y, z), then from states with
            noise added, and take the answer with the highest halting logit; needs a halting head
        start_noise: standard deviation of that noise, per element of y and z, whose own elements are about 1 in size;
            on 4 x 4 Sudoku, 0.1 and 0.2 helped most, and 0.5 and more did harm
        votes: solve each board under this many different symmetries of its kind (one is the board as it is), undo them,
            and take the most frequent answer; of equally frequent ones, that with the highest mean halting probability.
            For ARC tasks: the augmentations that the model has puzzle ids for, or random ones if it has no ids; a task
            that has fewer gets those
        seed: seed of the noise and of the symmetries
        batch_size: boards that are solved at once; each start and each vote counts as a board
        output: .csv file for the solutions, with the columns question, answer, right, steps and halting
        submission: .json file for two attempts at each test pair of ARC tasks, in the form that ARC-AGI asks for
        trace: show the first board after each supervision step. Without a value, or with -, it is printed on stderr;
            with a file name (.png, .gif, .pdf, .svg) it is drawn, with its data in a .json beside it; .json alone
            writes the data only
        curve: picture (.png) of exact accuracy against mean supervision steps, for fixed numbers of steps, for the
            halting head at many thresholds, and for two references; its figures are printed on stderr, and written to a
            .json file beside it. A table by difficulty compares the main rules at halt_threshold
        copies: adds to the curve what this many noisy starts, and votes, make of the same boards; each copy of a board
            counts with all its steps. Several numbers may be given, such as 2 4 8
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of the matrix products
    """

    checkpoint: str = "checkpoints/sudoku"
    board: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    generate: int = 0
    held_out: bool = False
    low: int | None = None
    high: int | None = None
    difficulty: Literal["any", "singles", "guess"] = "any"
    data_seed: int = 1
    limit: int = 0
    exit: Literal["fixed", "halt"] = "fixed"
    halt_threshold: float = 0.5
    steps: int | None = None
    starts: int = 1
    start_noise: float = 0.1
    votes: int = 1
    seed: int = 0
    batch_size: int = 256
    output: str | None = None
    submission: str | None = None
    trace: bool | str = False
    curve: str | None = None
    copies: list[int] = field(default_factory=list)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self):
        if (len(self.board) > 0) + (len(self.paths) > 0) + (self.generate != 0) + self.held_out != 1:
            raise ValueError("give boards to solve by one of --board, --paths, --generate and --held_out")
        bounds = {"generate": (0, 10**7), "limit": (0, 2**62), "starts": (1, 10_000), "votes": (1, 10_000)}
        bounds |= {"batch_size": (1, 2**20), "seed": (0, 2**62), "start_noise": (0, 1e6), "halt_threshold": (0, 1)}
        bounds |= {"steps": (1, 100_000)} if self.steps is not None else {}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: set it from {low:,} to {high:,}")
        if not self.generate and (self.low or self.high or self.difficulty != "any"):
            raise ValueError("low, high and difficulty are for --generate: leave them out")
        check_png("curve", self.curve)
        if self.curve is not None and self.exit != "fixed":
            raise ValueError("curve compares the stopping rules itself: leave out exit")
        if self.curve is not None and self.starts * self.votes > 1:
            raise ValueError("curve is of single copies: leave out starts and votes; copies adds several copies to it")
        if self.copies and (self.curve is None or min(self.copies) < 2):
            raise ValueError("copies is for --curve, and each number must be 2 or more")


@before_torch
def parse_args(argv=None) -> SolveConfig:
    return parse_flags(__doc__, SolveConfig, argv=argv, positional="checkpoint")[0]


from src.checkpoint import load_network, resolve
from src.model import TRMModel
from src.runtime import choose_device, choose_precision
from src.tasks.arc import Arc, different, read_tasks
from src.tasks.arc_votes import solve_tasks
from src.tasks.board_picture import draw_trace
from src.tasks.board_trace import BoardTrace, check_trace_path, print_trace, write_trace
from src.tasks.curve_report import draw, report, write_curve
from src.tasks.puzzle_curve import curve_of, points_of_copies
from src.tasks.puzzle_data import PuzzleForm, read_form
from src.tasks.puzzle_eval import solve
from src.tasks.puzzle_input import (
    check_ids,
    generated_boards,
    held_out_boards,
    read_boards,
    split_boards,
    typed_boards,
)
from src.tasks.puzzle_report import Writer, describe, summary
from src.tasks.puzzle_solve import Effort
from src.tasks.puzzles import Grids, PuzzleKind


def load(config: SolveConfig):
    """Returns (model, what the checkpoint says about its puzzles, precision). Raises UserError if it has no puzzles."""
    if not Path(config.checkpoint).exists():
        advice = "train one with train_puzzles.py (`make puzzles` writes runs/sudoku4), and give its folder"
        if len(config.checkpoint) >= 16 and "/" not in config.checkpoint:
            advice += f"; or did you mean --board {config.checkpoint}?"
        raise UserError(f"no checkpoint folder at {config.checkpoint}: {advice}")
    folder, device = resolve(config.checkpoint), choose_device(config.device)
    form = read_form(folder)
    return load_network(folder, device), form, choose_precision(config.precision, device).value


def boards_of(config: SolveConfig, kind: PuzzleKind) -> Grids:
    """Returns the boards to solve."""
    if config.board:
        texts = config.board
        if texts == ["-"]:
            if sys.stdin.isatty():
                print("boards, one per line (end with Ctrl-D):", file=sys.stderr)
            if isinstance(sys.stdin, io.TextIOWrapper):  # invalid UTF-8 is then a wrong symbol of a board
                sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            texts = split_boards(kind, sys.stdin.read())
        grids = typed_boards(kind, texts)
    elif config.paths:
        grids = read_boards(kind, config.paths)
    elif config.held_out:
        grids = held_out_boards(config.checkpoint)
    else:
        names = ("low", "high", "difficulty", "data_seed")
        grids = generated_boards(kind, config.generate, **{name: getattr(config, name) for name in names})
    return grids.take(slice(config.limit)) if config.limit else grids


def main(argv=None):
    config = parse_args(argv)
    traces = trace_files(config.trace)
    curves = [config.curve, str(Path(config.curve).with_suffix(".json"))] if config.curve else []
    outputs = [config.output, config.submission, *curves]
    read = [file for path in config.paths for file in (Path(path).iterdir() if Path(path).is_dir() else [path])]
    check_distinct([*outputs, *traces], read)
    for path in filter(None, outputs):
        check_writable(path)
    if traces:
        check_trace_path(config.trace)
    model, form, precision = load(config)
    kind = form.kind
    names = ("steps", "halt_threshold", "votes", "starts", "start_noise", "seed", "batch_size")
    effort = Effort(**{name: getattr(config, name) for name in names}, halts=config.exit == "halt", precision=precision)
    if config.submission is not None or (isinstance(kind, Arc) and config.paths and config.votes > 1):
        solve_arc(config, model, form, effort)
        return
    effort.check(model, kind)
    grids = boards_of(config, kind)
    check_ids(model.config, kind, grids)
    trained = model.config.recursion_steps
    if config.curve is not None and trained == 1:
        raise UserError("the model has a single step, so there is no curve: leave out --curve")
    if config.curve is not None and config.steps is not None and config.steps < trained:
        raise UserError(f"--curve starts from the {trained} steps of training: set --steps to {trained} or more")
    trace = BoardTrace(kind, grids.inputs[0], grids.labels[0]) if config.trace else None
    parts = []
    with Writer(config.output, kind, grids) as writer:
        for part in solve(model, kind, grids, effort, trace and trace.add):
            writer.write(part)
            if grids.n_rows <= NAMED:
                print("\n".join(describe(kind, grids, part)), file=sys.stderr)
            parts.append(part)
    if grids.n_rows > 1:
        print("\n".join(summary(kind, grids, parts)), file=sys.stderr)
    show(trace, config.trace)
    if config.curve is not None:
        curve = curve_of(config.checkpoint, kind, grids, parts, trained, effort.halt_threshold)
        curve.points.extend(points_of_copies(model, kind, grids, effort, config.copies))
        print(report([curve]), file=sys.stderr)
        write_curve(curve, Path(config.curve).with_suffix(".json"))
        draw(curve, config.curve, f"{kind.name}: {grids.n_rows:,} boards, {config.checkpoint}")


def solve_arc(config: SolveConfig, model: TRMModel, form: PuzzleForm, effort: Effort):
    """Solve ARC tasks by votes, and write the submission."""
    if not isinstance(form.kind, Arc) or not config.paths:
        raise UserError("--submission is for a model of ARC and tasks in --paths: leave it out")
    if config.output or config.curve or config.trace:
        raise UserError("votes on ARC tasks only write a submission: leave out output, curve and trace")
    effort._replace(votes=1).check(model, form.kind)
    tasks = different([task for path in config.paths for task in read_tasks(path)])
    attempts, line = solve_tasks(model, tasks[: config.limit or None], form.names, effort)
    print(line, file=sys.stderr)
    if config.submission is None:
        print(json.dumps(attempts))
    else:
        write_text(config.submission, json.dumps(attempts) + "\n")


def trace_files(where: bool | str) -> list[Path]:
    """Returns the files that --trace writes: its data, and a picture of it unless only data are wanted."""
    if isinstance(where, bool) or where == "-":
        return []
    data = Path(where).with_suffix(".json")
    return [Path(where)] if Path(where).suffix.lower() == ".json" else [data, Path(where)]


def show(trace: BoardTrace | None, where: bool | str):
    """Print a trace on stderr, or write it to files."""
    files = trace_files(where)
    if files:
        write_trace(trace, files[0])
        for picture in files[1:]:
            draw_trace(trace, picture)
        print(f"trace: {' and '.join(map(str, reversed(files)))}", file=sys.stderr)
    elif trace is not None:
        print_trace(trace, sys.stderr)


if __name__ == "__main__":
    run(main)
