"""Make a small copy of a run's best checkpoint, with only its averaged weights in fp16, config.json and the tokenizer.

    python experiments/release.py runs/python checkpoints/python
    python experiments/release.py runs/wiki checkpoints/wiki --valid_paths wiki/validation_0.jsonl.gz
    python experiments/release.py runs/sudoku9 checkpoints/sudoku

Writes the second folder as a checkpoint, and prints the size of each file. Then it compares the losses of both
checkpoints on the first validation batches. If they differ by more than 0.001 nats per token, the exit code is 1. Of a
puzzle model, it compares the share of the run's held-out puzzles that are solved. This may differ by 0.005, because
many steps in sequence make rounding grow.

If the model was trained on installed packages, LICENCES.md lists them with their present licences. It also says how
many of the files that the run has read have changed since, or are no longer counted.
"""

import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.checkpoint import CLASSIFIER_FILE, load_model, load_network, resolve, save_checkpoint  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.data.corpus import find_files, fingerprint_files, is_word, package_roots  # noqa: E402
from src.data.licences import LICENCES, packages_of_files  # noqa: E402
from src.data.tokenizer_json import PUZZLE_FILE  # noqa: E402
from src.dataset import DataConfig, create_dataloader, prepare_data  # noqa: E402
from src.errors import UserError, few  # noqa: E402
from src.evaluation.evaluation import evaluate  # noqa: E402
from src.files.plain_yaml import read_yaml  # noqa: E402
from src.files.text import read_object  # noqa: E402
from src.tasks.puzzle_data import load_puzzles, puzzles_of, read_form  # noqa: E402
from src.tasks.puzzle_eval import answer  # noqa: E402
from src.training.run_folder import CORPUS  # noqa: E402

LARGEST_CHANGE = 0.001  # nats per token
LARGEST_CHANGE_SOLVED = 0.005  # share of the puzzles
PUZZLES = 2000  # held-out puzzles that are compared


@dataclass
class ReleaseConfig:
    """What to release.

    Args:
        folders: the run (or checkpoint) folder to read and the folder to write; the flag name may be left out
        valid_paths: text to compare the losses on; if not given, the standard library's validation files
        batches: number of batches to compare the losses on
        batch_size: windows per batch
    """

    folders: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    batches: int = 4
    batch_size: int = 8

    def __post_init__(self):
        if len(self.folders) != 2:
            raise ValueError("give two folders: the run to read, and the checkpoint to write")


def parse_args(argv=None) -> ReleaseConfig:
    return parse_flags(__doc__, ReleaseConfig, argv=argv, positional="folders")[0]


def release(run_folder, output) -> Path:
    """Write the best checkpoint of a run to `output`, with the averaged weights in fp16.

    Returns the checkpoint folder that was read. Raises UserError if `output` holds other files."""
    source, output = resolve(run_folder), Path(output)
    if output.exists() and any(output.iterdir()) and not _is_checkpoint(output):
        raise UserError(f"{output} has files but no checkpoint of this project: choose another folder")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the checkpoint itself: choose another folder")
    if (source / CLASSIFIER_FILE).exists():
        raise UserError(f"{source} is a classifier, whose layer would be lost: use convert.py --to hub")
    is_puzzle = (source / PUZZLE_FILE).is_file()
    # with the averaged weights, if the run has them
    model, tokenizer = (load_network(source), read_form(source)) if is_puzzle else load_model(source)
    info = json.loads((source / "config.json").read_text(encoding="utf-8")).get("info")
    save_checkpoint(output, model.half(), tokenizer, info=info)
    return source


def _is_checkpoint(folder) -> bool:
    path = folder / "config.json"
    return path.is_file() and "model" in read_object(path) and not (folder / "onnx.json").exists()


def licences(settings: dict, corpus: dict) -> str | None:
    """Returns the text of LICENCES.md for a run that read installed packages, else None.

    settings, corpus: the run's config.yaml and corpus.json. Raises UserError if a package is no longer installed."""
    paths, held_out = settings.get("train_paths") or [], settings.get("valid_paths") or []
    if not (words := [path for path in paths if is_word(path)]):
        return None
    owners = packages_of_files(package_roots())
    files = find_files(words, (".py",), lambda: find_files(held_out))
    packages = {owners[path] for path in map(os.path.realpath, files) if path in owners}
    if not packages:
        return None
    rows = "".join(f"| {each.name} {each.version} | {each.licence} |\n" for each in sorted(packages))
    if "stdlib" in words:
        rows = f"| the standard library of Python {platform.python_version()} | PSF-2.0 |\n{rows}"
    text = f"This model was trained on the sources of these packages:\n\n| package | licence |\n|---|---|\n{rows}"
    read = {tuple(file) for part, found in corpus.items() if part.startswith("train") for file in found}
    if missing := read - set(fingerprint_files(files)):
        names = few(sorted({name for name, _, _ in missing}))
        text += f"\n{len(missing):,} files of the run have changed since, or are no longer counted: {names}.\n"
    return text


def losses(folders, args: ReleaseConfig) -> list[float]:
    """Returns the loss of each checkpoint in nats per token, on the same first validation batches."""
    found = []
    paths = find_files(args.valid_paths) if args.valid_paths else []  # a word would stand for other training files
    for folder in folders:
        model, tokenizer = load_model(folder)
        data = DataConfig(train_paths=paths, valid_paths=paths, tokenizer=str(folder))
        _, _, valid_set = prepare_data(data, None, model.config.max_seq_len)
        batches = create_dataloader(valid_set, args.batch_size, shuffle=False, pad_id=tokenizer.pad_id)
        figures = evaluate(model, batches, valid_set.bytes_per_token, limit=args.batches)
        found.append(figures["valid_loss"])
    return found


def check_puzzles(run_folder: str, settings: dict):
    """Raises UserError for a puzzle model without a config.yaml of its run, which says on which puzzles to test it."""
    source = resolve(run_folder)
    if (source / PUZZLE_FILE).is_file() and settings.get("puzzle") != read_form(source).kind.name:
        raise UserError(f"{run_folder} is not in the folder of its run, whose config.yaml says which puzzles it solves")


def shares_solved(folders, settings: dict) -> list[float]:
    """Returns the share of the held-out puzzles that each checkpoint solves.  settings: those of the run."""
    valid = load_puzzles(puzzles_of(settings)).valid
    rows, found = np.arange(min(PUZZLES, valid.n_rows)), []
    for folder in folders:
        answers = answer(load_network(folder), valid, rows, None, "fp32", 256)
        found.append(float(answers.is_exact[-1].mean()))
    return found


def main(argv=None) -> int:
    args = parse_args(argv)
    output = Path(args.folders[1])
    run_folder = resolve(args.folders[0]).parent
    settings = read_yaml(run_folder / "config.yaml") if (run_folder / "config.yaml").exists() else {}
    corpus = read_object(run_folder / CORPUS) if (run_folder / CORPUS).exists() else {}
    check_puzzles(args.folders[0], settings)  # first, because these two may fail
    text = licences(settings, corpus)
    source = release(args.folders[0], output)
    (output / LICENCES).unlink(missing_ok=True)
    if text is not None:
        (output / LICENCES).write_text(text, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    for name, size in sizes.items():
        print(f"{name:20}{size:>12,} bytes")
    print(f"{'total':20}{sum(sizes.values()):>12,} bytes")
    is_puzzle = (output / PUZZLE_FILE).is_file()
    if is_puzzle:
        before, after = shares_solved((source, output), settings)
    else:
        before, after = losses((source, output), args)
    most = LARGEST_CHANGE_SOLVED if is_puzzle else LARGEST_CHANGE
    is_equal = math.isclose(before, after, rel_tol=0, abs_tol=most)
    figure = "share of held-out puzzles solved" if is_puzzle else "validation loss"
    print(f"{figure} {before:.5f} before, {after:.5f} in fp16: {'equal enough' if is_equal else 'CHANGED'}")
    return 0 if is_equal else 1


if __name__ == "__main__":
    run(main)
