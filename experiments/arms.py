"""Shared by puzzles.py and maths.py: a comparison of a recursive model with its controls, which are called arms.

A recipe is a config of a training script, for a model of recursion trm. Each arm is the recipe with another recursion,
or another number of layers or steps; all other settings are equal. A visit is one pass through the layers of the
recipe.

    trm           the recipe
    trm-1         the recipe, trained and tested with a single supervision step
    loop          a looped transformer with as many visits as `loop_steps` supervision steps of the recipe have
    plain-params  a plain transformer with as many parameters as the recipe: the same layers, each applied once
    plain-flops   a plain transformer whose update takes as many FLOPs as an update of the recipe, visits without
                  gradient included, as nearly as a whole number of layers allows
    plain-deep    a plain transformer whose answer takes as many FLOPs as an answer of the recipe: it has the layers of
                  the recipe once for each visit of all supervision steps

A sweep chooses a learning rate for each arm; its runs are shorter and are never reported. runs.jsonl in the output
folder has one line per run, so that a comparison that is started again does only the runs that are missing.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from experiments.records import keep, records_of
from src.errors import UserError
from src.metrics import flops_per_token
from src.model_config import TRMConfig
from src.training.curves import scan_metrics

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("trm", "trm-1", "loop", "plain-params", "plain-flops", "plain-deep")


@dataclass
class ArmsConfig:
    """What to run.

    Args:
        recipe: config file of the training script, of recursion trm
        arms: models to train
        seeds: seeds of weights and of the order of the data; each seed is one run of every arm
        minutes: training time of a run, compilation included
        equal_flops: in place of equal minutes, give every arm the FLOPs of this many training steps of the arm trm; a
            run of the sweep gets the share of them that sweep_minutes is of minutes
        lrs: learning rates among which the sweep chooses; with a single value, there is no sweep
        sweep_minutes: training time of a run of the sweep
        loop_steps: the arm `loop` has as many visits as this number of supervision steps of the recipe
        jobs: number of runs that run at the same time
        threads: number of CPU threads of each run
        device: device of the runs: cpu, cuda or mps
        output: folder for the runs and runs.jsonl
        overrides: further settings of every run, as --name=value
    """

    recipe: str = ""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    minutes: float = 9.0
    equal_flops: int | None = None
    lrs: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    sweep_minutes: float = 2.0
    loop_steps: int = 4
    jobs: int = 1
    threads: int = 1
    device: str = "cpu"
    output: str = "runs/arms"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"arms has {unknown}: choose from {', '.join(ARMS)}")
        if not self.seeds or not self.lrs:
            raise ValueError("seeds or lrs is empty: give at least one of each")
        for name in ("loop_steps", "jobs", "threads", "equal_flops"):
            if (getattr(self, name) or 0) < 1 and getattr(self, name) is not None:
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

    def folder(self, output) -> Path:
        kind = "sweep" if self.is_sweep else "run"
        return Path(output) / f"{kind}_{self.arm}_lr{self.lr:g}_seed{self.seed}"


def job_of(record: dict) -> Job:
    return Job(record["arm"], record["changes"]["lr"], record["seed"], record["is_sweep"])


def arm_flags(arm: str, model: TRMConfig, loop_steps: int, steps_per_update: int = 1) -> dict:
    """Returns {setting: value}, which turns the recipe into an arm.

    model: the settings of the recipe's model. steps_per_update: its supervision steps in one update of the weights."""
    layers, visits = model.n_layers, model.visits_per_step
    if arm == "plain-flops":
        return {"recursion": "none", "n_layers": layers_of_equal_flops(model, steps_per_update)}
    return {
        "trm": {},
        "trm-1": {"supervision_steps": 1},
        "loop": {"recursion": "loop", "deep_steps": loop_steps * visits},
        "plain-params": {"recursion": "none"},
        "plain-deep": {"recursion": "none", "n_layers": layers * visits * model.supervision_steps},
    }[arm]


def changed(model: TRMConfig, flags: dict) -> TRMConfig:
    """Returns the settings of an arm's model. What follows from other settings is derived again.

    A vocabulary that is not known yet counts as one token: the head is the same in every arm."""
    names = {f.name for f in dataclasses.fields(TRMConfig)}
    derived = dict.fromkeys(("halting", "grad_deep_steps", "embed_scale")) if "recursion" in flags else {}
    values = {name: getattr(model, name) for name in names} | {"vocab_size": model.vocab_size or 1}
    return TRMConfig(**values | derived | {name: value for name, value in flags.items() if name in names})


def layers_of_equal_flops(model: TRMConfig, steps_per_update: int) -> int:
    """Returns the number of layers of the plain transformer whose update costs most nearly what the recipe's costs."""
    wanted = flops_per_token(changed(model, {"supervision_steps": 1})).train * steps_per_update
    costs = [
        flops_per_token(changed(model, {"recursion": "none", "n_layers": layers})).train
        for layers in range(1, 1 + steps_per_update * model.visits_per_step * model.n_layers)
    ]
    return 1 + min(range(len(costs)), key=lambda i: abs(costs[i] - wanted))


def run_script(name: str, words: list, threads: int) -> None:
    """Runs a script of this project in a process of its own.  Raises UserError with its last message if it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / name, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{name} {' '.join(map(str, words))} failed: {done.stderr.strip().splitlines()[-1]}")


def length(config: ArmsConfig, job: Job, step_flops: float, recipe_step_flops: float) -> dict:
    """Returns the settings that end a run: after its minutes, or after the steps of equal FLOPs.

    step_flops: FLOPs of a training step of the arm per token; recipe_step_flops: the same of the recipe."""
    if config.equal_flops is None:
        return {"max_steps": 10**7, "max_minutes": config.sweep_minutes if job.is_sweep else config.minutes}
    share = config.sweep_minutes / config.minutes if job.is_sweep else 1
    return {"max_steps": max(1, round(share * config.equal_flops * recipe_step_flops / step_flops))}


def train(script: str, config: ArmsConfig, job: Job, flags: dict) -> Path:
    """Does one run of a training script with the settings `flags`, and returns its folder."""
    folder = job.folder(config.output)
    flags = {"save_dir": folder, "seed": job.seed, "lr": job.lr, "device": config.device} | flags
    words = [f"--{name}={value}" for name, value in flags.items()]
    run_script(script, ["--config", config.recipe, *words, *config.overrides], config.threads)
    return folder


def record_of(folder: Path, job: Job) -> tuple[dict, dict]:
    """Returns what every record of a finished run has, and the last value of each figure in its metrics.jsonl."""
    figures = {}
    for record, _ in scan_metrics(folder):
        figures |= record
    record = {"arm": job.arm, "changes": {"lr": job.lr}, "seed": job.seed, "is_sweep": job.is_sweep}
    return record | {"updates": figures["step"], "seconds": figures["elapsed_s"]}, figures


def do_all(config: ArmsConfig, jobs: list[Job], do: Callable[[Job], dict]) -> list[dict]:
    """Returns the records of runs. Runs that runs.jsonl does not have yet are done first, `jobs` at a time.

    do: does one run, and returns its record {arm, changes, seed, is_sweep, exact, updates, seconds, ...}."""
    output = Path(config.output) / "runs.jsonl"
    try:
        known = {job_of(record): record for record in (records_of(output) if output.exists() else [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} is not a file of runs of this script ({error}): choose another output") from None
    with ThreadPoolExecutor(config.jobs) as pool:
        missing = [job for job in jobs if job not in known]
        for done in as_completed([pool.submit(do, job) for job in missing]):
            record = done.result()
            keep(output, record)
            known[job_of(record)] = record
            kind = "sweep" if record["is_sweep"] else f"seed {record['seed']}"
            line = f"{record['arm']}, {kind}, lr {record['changes']['lr']:g}: exact {record['exact']:.4f}"
            print(f"{line}, {record['updates']:,} steps in {record['seconds']:.0f} s", file=sys.stderr)
    return [known[job] for job in jobs]


def best_rates(config: ArmsConfig, do: Callable[[Job], dict], second: str) -> dict[str, float]:
    """Returns {arm: the learning rate with the highest exact accuracy in the sweep}.

    second: the field of a record that decides between equal accuracies; higher is better."""
    if len(config.lrs) == 1:
        return dict.fromkeys(config.arms, config.lrs[0])
    jobs = [Job(arm, lr, 0, True) for arm in config.arms for lr in config.lrs]
    records, key = do_all(config, jobs, do), itemgetter("exact", second)
    best = {arm: max((r for r in records if r["arm"] == arm), key=key) for arm in config.arms}
    return {arm: record["changes"]["lr"] for arm, record in best.items()}


def compare(config: ArmsConfig, do: Callable[[Job], dict], second: str) -> list[dict]:
    """Returns the records of all arms and seeds, each arm with its learning rate from the sweep."""
    rates = best_rates(config, do, second)
    return do_all(config, [Job(arm, rates[arm], seed, False) for seed in config.seeds for arm in config.arms], do)
