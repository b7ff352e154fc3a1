"""Compare the recursive model with its controls on a puzzle: same puzzles, same minutes (or FLOPs), same threads.

    python experiments/puzzles.py --recipe configs/sudoku6.yaml --minutes 9 --jobs 2
    python experiments/puzzles.py --recipe configs/sudoku4.yaml --minutes 2 --seeds 0 1 2 --output runs/arms4
    python experiments/puzzles.py --recipe configs/sudoku4.yaml --equal_flops 2500 --output runs/arms4_flops
    python experiments/puzzles.py --recipe configs/sudoku9.yaml --minutes 5 --device cuda --output runs/arms9

The recipe is a config of train_puzzles.py for a model of recursion trm. experiments/arms.py describes the models that
are compared, which are called arms: trm, trm-1, loop, plain-params, plain-flops and plain-deep.

First, a learning rate is chosen for each arm in a sweep: one run of `sweep_minutes` for each value in `lrs`. The sweep
has puzzles and a split of its own, by `sweep_data_seed`. The value with the highest exact accuracy is then used for
every seed.

The runs are subprocesses of train_puzzles.py, `jobs` at a time. Writes one JSON line per run to runs.jsonl in `output`,
and prints a table with the exact accuracy on all held-out puzzles of every seed. Started again with the same `output`,
it does only the runs that are missing; other settings need another `output`.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments import arms  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model_config import TRMConfig, model_settings  # noqa: E402
from src.tasks.puzzle_config import PuzzleSettings, read_settings  # noqa: E402
from src.tasks.puzzle_folder import kind_named  # noqa: E402


@dataclass
class PuzzleArmsConfig(arms.ArmsConfig):
    """What to run.

    Args:
        sweep_data_seed: seed of the puzzles and the split of the sweep
    """

    recipe: str = "configs/sudoku6.yaml"
    lrs: list[float] = field(default_factory=lambda: [0.004, 0.008, 0.016])
    output: str = "runs/puzzle_arms"
    sweep_data_seed: int = 100


def recipe_of(config: PuzzleArmsConfig) -> PuzzleSettings:
    """Returns the settings of the recipe, with the overrides."""
    settings = read_settings(["--config", config.recipe, *config.overrides])
    if settings.model.recursion != "trm":
        raise UserError(f"{config.recipe} is a recipe of recursion {settings.model.recursion}: choose one of trm")
    return settings


def model_of(settings: PuzzleSettings) -> TRMConfig:
    """Returns the settings of the recipe's model, for the cells and symbols of its puzzle."""
    kind = kind_named(settings.puzzle.puzzle)
    return TRMConfig(**model_settings(settings.model) | {"max_seq_len": kind.cells, "vocab_size": kind.vocab_size})


def train(config: PuzzleArmsConfig, model: TRMConfig, job: arms.Job) -> dict:
    """Does one run, and returns its record."""
    flags = arms.arm_flags(job.arm, model, config.loop_steps)
    flags |= arms.length(config, job, update_flops(arms.changed(model, flags)), update_flops(model))
    flags["eval_every"] = 10**7  # one, at the end: they take time of the run, and more of it with more steps
    if job.is_sweep:
        flags["data_seed"] = config.sweep_data_seed
    return record_of(arms.train("train_puzzles.py", config, job, flags, ["--config", config.recipe]), job)


def update_flops(model: TRMConfig) -> float:
    """FLOPs of an update, per cell: an update trains one supervision step."""
    return flops_per_token(model).train / model.train_steps


def record_of(folder: Path, job: arms.Job) -> dict:
    """Returns the result of a finished run, {arm, changes, seed, exact, by_step, ...}, from its metrics.jsonl."""
    record, figures = arms.record_of(folder, job)
    prefix = "final_valid" if "final_valid_exact_accuracy" in figures else "valid"
    by_step = {name: figures[name] for name in figures if name.startswith(f"{prefix}_exact_step_")}
    return record | {
        "exact": figures[f"{prefix}_exact_accuracy"],
        "cells": figures[f"{prefix}_cell_accuracy"],
        "by_step": list(by_step.values()),
    }


def table(records: list[dict]) -> str:
    """Returns a Markdown table: exact accuracy of each arm after the first and the last step, and of every seed."""
    lines = ["| arm | lr | updates | exact after step 1 | exact | every seed |", "|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(record["arm"] for record in records):
        runs = sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"])
        exact = [r["exact"] for r in runs]
        spread = f" ± {statistics.stdev(exact):.3f}" if len(exact) > 1 else ""
        first = statistics.mean(r["by_step"][0] for r in runs)
        updates = statistics.mean(r["updates"] for r in runs)
        seeds = ", ".join(f"{value:.3f}" for value in exact)
        mean = f"{statistics.mean(exact):.3f}{spread}"
        lines.append(f"| {arm} | {runs[0]['changes']['lr']:g} | {updates:,.0f} | {first:.3f} | {mean} | {seeds} |")
    return "\n".join(lines)


def main(argv=None):
    (config,) = parse_flags(__doc__, PuzzleArmsConfig, argv=argv)
    recipe = recipe_of(config)
    model, settings = model_of(recipe), recipe.flat() | {"sweep_data_seed": config.sweep_data_seed}
    print(table(arms.compare(config, settings, lambda job: train(config, model, job), "cells")))


if __name__ == "__main__":
    run(main)
