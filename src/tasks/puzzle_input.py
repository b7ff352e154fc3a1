"""The boards that solve_puzzles.py is asked to solve: typed, from files, generated, or held out by a run."""

import re
import sys
from pathlib import Path

import numpy as np

from src.checkpoint import resolve
from src.errors import UserError
from src.tasks.arc import Arc, frame, read_tasks
from src.tasks.puzzle_data import PuzzleConfig, fingerprint, generate, join, load_puzzles, puzzles_of
from src.tasks.puzzle_folder import read_folder
from src.tasks.puzzles import GIVEN_UP, Grids, PuzzleKind, make_grids, read_csv
from src.training.run_folder import corpus_changes, settings_of


def typed_boards(kind: PuzzleKind, texts: list[str]) -> Grids:
    """Returns boards given as texts. The label is the right answer, or zeros if there are several, if the search for
    them was given up, or if the kind has no known rules.

    Prints a line on stderr for a question without a label. Raises UserError if a text is no board, or if a question has
    no answer."""
    inputs = np.array([_typed(kind, text, _name(number, texts)) for number, text in enumerate(texts)], np.uint8)
    if not kind.has_rules:
        return make_grids(inputs, np.zeros_like(inputs))
    labels, counts = kind.solve(inputs)
    for number in np.flatnonzero(counts != 1):
        name = _name(number, texts)
        if not counts[number]:
            raise UserError(f"{name}cannot be solved: {kind.question_problem(inputs[number])}; correct the board")
        if counts[number] == GIVEN_UP:
            print(f"{name}is too hard for the exact solver: it may have no solution", file=sys.stderr)
        else:
            print(f"{name}has several solutions: any of them counts as right", file=sys.stderr)
    difficulty = kind.difficulty(inputs, labels)
    labels[counts != 1] = 0
    return make_grids(inputs, labels, difficulty)


def _name(number, texts):
    return f"board {number + 1} " if len(texts) > 1 else "the board "


def _typed(kind, text, name):
    try:
        return kind.from_text(text)
    except UserError as error:
        raise UserError(f"{name.strip()}: {error}") from None


def split_boards(kind: PuzzleKind, text: str) -> list[str]:
    """Returns the boards in a text: one per line, or each on several lines, with a blank line between boards.

    Lines that separate the boxes of a Sudoku are ignored. Raises UserError if there is no board."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not {"|", " "} & set(kind.symbols):
        text = re.sub(r"^[-+ ]{3,}\n|\|", "", text, flags=re.M)
    boards = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        lines = [line for line in block.split("\n") if line]
        is_one = not kind.has_rules or all(len(kind.clean(line)) <= kind.width for line in lines)
        boards += ["\n".join(lines)] if lines and is_one else lines
    if not boards:
        raise UserError("--board - found no board on stdin: write one per line")
    return boards


def read_boards(kind: PuzzleKind, paths: list[str]) -> Grids:
    """Returns the boards of files: .csv and .csv.gz, folders of .npy arrays (their test part), and, for ARC, .json.

    A bad puzzle is named on stderr and skipped. Raises UserError if a path cannot be read, or if a folder has puzzles
    of another kind."""
    parts = []
    for path in paths:
        if Path(path).is_dir() and (Path(path) / "identifiers.json").exists():
            folder = read_folder(path)
            if folder.kind.name != kind.name:
                raise UserError(f"{path} has {folder.kind.name} puzzles, the model solves {kind.name}: give others")
            parts.append(folder.test._replace(difficulty=kind.difficulty(folder.test.inputs, folder.test.labels)))
        elif isinstance(kind, Arc):
            parts.append(_test_pairs(path))
        elif Path(path).is_dir():
            raise UserError(f"{path} is a folder without identifiers.json: give .csv files, or a folder of .npy arrays")
        else:
            parts.append(read_csv(kind, path, needs_answers=False))
    return join(parts) if len(parts) > 1 else parts[0]


def _test_pairs(path) -> Grids:
    """Returns the test pairs of the ARC tasks in a .json file or in a folder. Labels are 0 if no output is known."""
    pairs = [pair for task in read_tasks(path) for pair in task.test]
    inputs = np.array([frame(grid) for grid, _ in pairs])
    return make_grids(inputs, np.array([np.zeros_like(inputs[0]) if out is None else frame(out) for _, out in pairs]))


def generated_boards(kind: PuzzleKind, n: int, **options) -> Grids:
    """Returns n generated boards. options: low, high, difficulty and data_seed, as in PuzzleConfig."""
    try:
        return generate(kind, PuzzleConfig(puzzle=kind.name, n_puzzles=n, **options))
    except ValueError as error:
        raise UserError(str(error)) from None


def held_out_boards(checkpoint: str) -> Grids:
    """Returns the boards that the run of a checkpoint held out.

    Raises UserError if the checkpoint is not in the folder of its run, or if the puzzles of the run have changed."""
    run = resolve(checkpoint).parent
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--held_out: {checkpoint} is not in the folder of its run (no {run}/config.yaml): use --generate"
        )
    data = load_puzzles(puzzles_of(settings_of(run)))
    if changes := corpus_changes(run, fingerprint(data)):
        raise UserError(f"--held_out: the puzzles of {run} are no longer the same ({'; '.join(changes)}): restore them")
    return data.valid


def check_ids(config, kind: PuzzleKind, grids: Grids):
    """Raises UserError if a model with this TRMConfig has no embedding for a puzzle id of these boards."""
    highest = int(grids.puzzle_ids.max(initial=0))
    if config.puzzle_ids and highest >= config.puzzle_ids:
        ids = f"the boards have puzzle ids up to {highest}, the model knows {config.puzzle_ids}"
        raise UserError(f"{ids}: give the folder that it was trained on")
    if config.puzzle_ids and isinstance(kind, Arc) and not highest:
        raise UserError(
            "this model knows an ARC task by its puzzle id, and single boards have none: solve tasks with --votes, or "
            "give the folder of .npy arrays that it was trained on"
        )
