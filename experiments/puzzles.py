"""Compare the recursive model with its controls on a puzzle: same puzzles, same minutes, same number of threads.

    python experiments/puzzles.py --recipe configs/sudoku6.yaml --minutes 9 --jobs 2
    python experiments/puzzles.py --recipe configs/sudoku4.yaml --minutes 2 --seeds 0 1 2 --output runs/arms4
    python experiments/puzzles.py --recipe configs/sudoku9.yaml --minutes 5 --device cuda --arms trm plain-params

The recipe is a config of train_puzzles.py for a model of recursion trm. The models that are compared are called arms.
Each arm is the recipe with another recursion, or another number of layers or steps; all other settings are equal. A
visit is one pass through the layers of the recipe.

    trm           the recipe
    trm-1         the recipe, trained and tested with a single supervision step
    loop          a looped transformer with as many visits as `loop_steps` supervision steps of the recipe have
    plain-params  a plain transformer with as many parameters as the recipe: the same layers, each applied once
    plain-flops   a plain transformer whose update takes as many FLOPs as an update of the recipe: it has the layers of
                  the recipe once for each visit of one supervision step
    plain-deep    a plain transformer whose answer takes as many FLOPs as an answer of the recipe: it has the layers of
                  the recipe once for each visit of all supervision steps

First, a learning rate is chosen for each arm in a sweep: one run of `sweep_minutes` for each value in `lrs`. The sweep
has puzzles and a split of its own, by `sweep_data_seed`. The value with the highest exact accuracy is then used for
every seed.

The runs are subprocesses of train_puzzles.py, `jobs` at a time. Writes one JSON line per run to runs.jsonl in `output`,
and prints a table with the exact accuracy on all held-out puzzles of every seed. Started again with the same `output`,
it does only the runs that are missing.
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments.records import keep, records_of  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.model_config import TRMConfig  # noqa: E402
from src.tasks.puzzle_config import read_settings  # noqa: E402
from src.training.curves import scan_metrics  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("trm", "trm-1", "loop", "plain-params", "plain-flops", "plain-deep")


@dataclass
class ArmsConfig:
    """What to run.

    Args:
        recipe: config file of train_puzzles.py, of recursion trm
        arms: models to train
        seeds: seeds of weights and of the order of puzzles; each seed is one run of every arm
        minutes: training time of a run, compilation included
        lrs: learning rates among which the sweep chooses; with a single value, there is no sweep
        sweep_minutes: training time of a run of the sweep
        sweep_data_seed: seed of the puzzles and the split of the sweep
        loop_steps: the arm `loop` has as many visits as this number of supervision steps of the recipe
        jobs: number of runs that run at the same time
        threads: number of CPU threads of each run
        device: device of the runs: cpu, cuda or mps
        output: folder for the runs and runs.jsonl
        overrides: further settings of every run, as --name=value
    """

    recipe: str = "configs/sudoku6.yaml"
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    minutes: float = 9.0
    lrs: list[float] = field(default_factory=lambda: [0.004, 0.008, 0.016])
    sweep_minutes: float = 2.0
    sweep_data_seed: int = 100
    loop_steps: int = 4
    jobs: int = 1
    threads: int = 1
    device: str = "cpu"
    output: str = "runs/puzzle_arms"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"arms has {unknown}: choose from {', '.join(ARMS)}")
        if not self.seeds or not self.lrs:
            raise ValueError("seeds or lrs is empty: give at least one of each")
        for name in ("loop_steps", "jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        for name in ("minutes", "sweep_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: set it above 0")


class Job(NamedTuple):
    """One run to do."""

    arm: str
    lr: float
    seed: int
    is_sweep: bool


def arm_flags(arm: str, model: TRMConfig, loop_steps: int) -> dict:
    """Returns {setting: value}, which turns the recipe into an arm. model: the settings of the recipe's model."""
    layers, visits = model.n_layers, model.visits_per_step
    return {
        "trm": {},
        "trm-1": {"supervision_steps": 1},
        "loop": {"recursion": "loop", "deep_steps": loop_steps * visits},
        "plain-params": {"recursion": "none"},
        "plain-flops": {"recursion": "none", "n_layers": layers * visits},
        "plain-deep": {"recursion": "none", "n_layers": layers * visits * model.supervision_steps},
    }[arm]


def train(config: ArmsConfig, model: TRMConfig, job: Job) -> dict:
    """Do one run, and return its record.  Raises UserError with the run's last message if it fails."""
    kind = "sweep" if job.is_sweep else "run"
    folder = Path(config.output) / f"{kind}_{job.arm}_lr{job.lr:g}_seed{job.seed}"
    flags = arm_flags(job.arm, model, config.loop_steps) | {
        **{"save_dir": folder, "seed": job.seed, "lr": job.lr, "device": config.device},
        "max_minutes": config.sweep_minutes if job.is_sweep else config.minutes,
        "max_steps": 10**7,
    }
    if job.is_sweep:
        flags["data_seed"] = config.sweep_data_seed
    words = [f"--{name}={value}" for name, value in flags.items()] + config.overrides
    command = [sys.executable, ROOT / "train_puzzles.py", "--config", config.recipe, *words]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the run in {folder} failed: {done.stderr.strip().splitlines()[-1]}")
    return record_of(folder, job)


def record_of(folder: Path, job: Job) -> dict:
    """Returns the result of a finished run, {arm, changes, seed, exact, by_step, ...}, from its metrics.jsonl."""
    figures = {}
    for record, _ in scan_metrics(folder):
        figures |= record
    prefix = "final_valid" if "final_valid_exact_accuracy" in figures else "valid"
    by_step = {name: figures[name] for name in figures if name.startswith(f"{prefix}_exact_step_")}
    return {
        **{"arm": job.arm, "changes": {"lr": job.lr}, "seed": job.seed, "is_sweep": job.is_sweep},
        "exact": figures[f"{prefix}_exact_accuracy"],
        "cells": figures[f"{prefix}_cell_accuracy"],
        "by_step": list(by_step.values()),
        "updates": figures["step"],
        "seconds": figures["elapsed_s"],
    }


def do_all(config: ArmsConfig, model: TRMConfig, jobs: list[Job]) -> list[dict]:
    """Returns the records of runs. Runs that runs.jsonl does not have yet are done first, `jobs` at a time."""
    output = Path(config.output) / "runs.jsonl"
    try:
        known = {_job_of(record): record for record in (records_of(output) if output.exists() else [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} is not a file of runs of this script ({error}): choose another output") from None
    with ThreadPoolExecutor(config.jobs) as pool:
        missing = [job for job in jobs if job not in known]
        for done in as_completed([pool.submit(train, config, model, job) for job in missing]):
            record = done.result()
            keep(output, record)
            known[_job_of(record)] = record
            kind = "sweep" if record["is_sweep"] else f"seed {record['seed']}"
            line = f"{record['arm']}, {kind}, lr {record['changes']['lr']:g}: exact {record['exact']:.4f}"
            print(f"{line}, {record['updates']:,} updates in {record['seconds']:.0f} s", file=sys.stderr)
    return [known[job] for job in jobs]


def _job_of(record: dict) -> Job:
    return Job(record["arm"], record["changes"]["lr"], record["seed"], record["is_sweep"])


def best_rates(config: ArmsConfig, model: TRMConfig) -> dict[str, float]:
    """Returns {arm: the learning rate with the highest exact accuracy in the sweep}."""
    if len(config.lrs) == 1:
        return dict.fromkeys(config.arms, config.lrs[0])
    jobs = [Job(arm, lr, 0, True) for arm in config.arms for lr in config.lrs]
    records, key = do_all(config, model, jobs), itemgetter("exact", "cells")
    best = {arm: max((r for r in records if r["arm"] == arm), key=key) for arm in config.arms}
    return {arm: record["changes"]["lr"] for arm, record in best.items()}


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
    (config,) = parse_flags(__doc__, ArmsConfig, argv=argv)
    model = read_settings(["--config", config.recipe]).model
    if model.recursion != "trm":
        raise UserError(f"{config.recipe} is a recipe of recursion {model.recursion}: choose one of trm")
    rates = best_rates(config, model)
    jobs = [Job(arm, rates[arm], seed, False) for seed in config.seeds for arm in config.arms]
    print(table(do_all(config, model, jobs)))


if __name__ == "__main__":
    run(main)
