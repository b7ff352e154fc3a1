"""Shared by puzzles.py, maths.py and ladder.py: runs of several models, which are called arms, each with every seed.

runs.jsonl in the output folder has one line per run, so that a comparison that is started again does only the runs that
are missing. ladder.py has arms of its own; those of puzzles.py and maths.py are described here.

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

A sweep chooses a learning rate for each arm; its runs are shorter and are never reported.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from experiments.records import keep, records_of
from src.errors import UserError
from src.files.folders import replace_file
from src.files.text import read_object
from src.metrics import flops_per_token
from src.model_config import TRMConfig
from src.training.curves import scan_metrics
from src.training.run_folder import CONTINUE

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("trm", "trm-1", "loop", "plain-params", "plain-flops", "plain-deep")


@dataclass
class RunsConfig:
    """Settings of every comparison.

    Args:
        seeds: seeds of weights and of the order of the data; each seed is one run of every arm
        jobs: number of runs that run at the same time
        threads: number of CPU threads of each run
        device: device of the runs: cpu, cuda or mps
        output: folder for the runs and runs.jsonl
        overrides: further settings of every run, as name=value, such as `--overrides d_model=128 batch_size=16`
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    jobs: int = 1
    threads: int = 1
    device: str = "cpu"
    output: str = "runs/arms"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one")
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        self.overrides = [f"--{setting.removeprefix('--')}" for setting in self.overrides]
        if wrong := [setting for setting in self.overrides if "=" not in setting]:
            raise ValueError(f"overrides has {wrong[0].removeprefix('--')}: write it as name=value")


@dataclass
class ArmsConfig(RunsConfig):
    """What to run.

    Args:
        recipe: config file of the training script, of recursion trm
        arms: models to train
        minutes: training time of a run, compilation included
        equal_flops: in place of equal minutes, give every arm the FLOPs of this many training steps of the arm trm; a
            run of the sweep gets the share of them that sweep_minutes is of minutes
        lrs: learning rates among which the sweep chooses; with a single value, there is no sweep
        sweep_minutes: training time of a run of the sweep
        loop_steps: the arm `loop` has as many visits as this number of supervision steps of the recipe
    """

    recipe: str = ""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    minutes: float = 9.0
    equal_flops: int | None = None
    lrs: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    sweep_minutes: float = 2.0
    loop_steps: int = 4

    def __post_init__(self):
        super().__post_init__()
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"arms has {unknown}: choose from {', '.join(ARMS)}")
        if not self.lrs:
            raise ValueError("lrs is empty: give at least one")
        for name in ("loop_steps", "equal_flops"):
            if (getattr(self, name) or 0) < 1 and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        for name in ("minutes", "sweep_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: set it above 0")


class Job(NamedTuple):
    """One run to do.  changes: settings of this run in addition to those of its arm, as ((name, value), ...)."""

    arm: str
    changes: tuple
    seed: int
    is_sweep: bool

    def facts(self) -> dict:
        """Returns what names the run in its record; `job_of` is the inverse."""
        return {"arm": self.arm, "changes": dict(self.changes), "seed": self.seed, "is_sweep": self.is_sweep}

    def folder(self, output) -> Path:
        kind = "sweep" if self.is_sweep else "run"
        return Path(output) / f"{kind}_{self.arm}_{spelled(dict(self.changes)).replace(' ', '_')}_seed{self.seed}"


def spelled(changes: dict) -> str:
    """Returns settings in a short form, such as `lr0.001 normpre`."""
    return " ".join(f"{name}{value:g}" if type(value) is float else f"{name}{value}" for name, value in changes.items())


def job_of(record: dict) -> Job:
    return Job(record["arm"], tuple(record["changes"].items()), record["seed"], record["is_sweep"])


def arm_flags(arm: str, model: TRMConfig, loop_steps: int, steps_per_update: int = 1) -> dict:
    """Returns {setting: value}, which turns the recipe into an arm.

    model: the settings of the recipe's model. steps_per_update: its supervision steps in one update of the weights."""
    layers, visits = model.n_layers, model.visits_per_step
    if arm == "plain-flops":
        return {"recursion": "none", "n_layers": layers_of_equal_flops(model, steps_per_update)}
    return {
        "trm": {},
        "trm-1": {"supervision_steps": 1},
        "loop": {"recursion": "loop", "deep_steps": loop_steps * visits, "grad_deep_steps": loop_steps * visits},
        "plain-params": {"recursion": "none"},
        "plain-deep": {"recursion": "none", "n_layers": layers * visits * model.supervision_steps},
    }[arm]


def changed(model: TRMConfig, flags: dict) -> TRMConfig:
    """Returns the settings of an arm's model. What follows from other settings is derived again.

    A vocabulary that is not known yet counts as one token: the head is the same in every arm."""
    names = {f.name for f in dataclasses.fields(TRMConfig)}
    derived = dict.fromkeys(("halting", "grad_deep_steps", "embed_scale", "embed_mean")) if "recursion" in flags else {}
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
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = f"ended by signal {-done.returncode}" if done.returncode < 0 else said[-1].removeprefix("error: ")
        raise UserError(f"{name} failed: {why} (its flags: {' '.join(map(str, words))})")
    if CONTINUE in done.stderr:  # by a signal to this process alone: it saved its state, but is not done
        raise UserError(f"{name} was stopped: start again, and it continues (its flags: {' '.join(map(str, words))})")


def length(config: ArmsConfig, job: Job, step_flops: float, recipe_step_flops: float) -> dict:
    """Returns the settings that end a run: after its minutes, or after the steps of equal FLOPs.

    step_flops: FLOPs of a training step of the arm per token; recipe_step_flops: the same of the recipe."""
    if config.equal_flops is None:
        return {"max_steps": 10**7, "max_minutes": config.sweep_minutes if job.is_sweep else config.minutes}
    share = config.sweep_minutes / config.minutes if job.is_sweep else 1
    steps = max(1, round(share * config.equal_flops * recipe_step_flops / step_flops))
    return {"max_steps": steps, "max_minutes": None}


def train(script: str, config: RunsConfig, job: Job, flags: dict, base: list[str]) -> Path:
    """Does one run of a training script with the settings `flags`, and returns its folder.

    base: flags of the recipe. The overrides come next, so that they do not change what makes an arm. A run that was
    interrupted is continued."""
    folder = job.folder(config.output)
    flags = {"save_dir": folder, "seed": job.seed, "device": config.device} | flags | dict(job.changes)
    if (folder / "config.yaml").exists():
        flags["resume"] = True
    run_script(script, [*base, *config.overrides, *flag_words(flags)], config.threads)
    return folder


def flag_words(flags: dict) -> list[str]:
    """Returns settings as words of a command line."""
    words = []
    for name, value in flags.items():
        is_word = isinstance(value, bool) or value is None  # true, false, null
        values = value if isinstance(value, list) else [json.dumps(value) if is_word else value]
        words += [f"--{name}={values[0]}", *map(str, values[1:])]
    return words


def record_of(folder: Path, job: Job) -> tuple[dict, dict]:
    """Returns what every record of a finished run has, and the last value of each figure in its metrics.jsonl."""
    figures = {}
    for record, _ in scan_metrics(folder):
        figures |= record
    return job.facts() | {"updates": figures["step"], "seconds": figures["elapsed_s"]}, figures


def do_all(
    config: RunsConfig, jobs: list[Job], do: Callable[[Job], dict], figure: str = "exact", tidy=lambda job: None
) -> list[dict]:
    """Returns the records of runs. Runs that runs.jsonl does not have yet are done first, `jobs` at a time.

    do: does one run, and returns its record {arm, changes, seed, is_sweep, updates, seconds, ...}. figure: the field of
    a record that is printed when a run is done. tidy: called with each job whose record has been written."""
    known = known_runs(config.output)
    missing = list(dict.fromkeys(job for job in jobs if job not in known))

    def store(record):
        keep(Path(config.output) / "runs.jsonl", record)
        known[job_of(record)] = record
        kind = "sweep" if record["is_sweep"] else f"seed {record['seed']}"
        line = f"{record['arm']}, {kind}, {spelled(record['changes'])}: {figure} {record[figure]:.4f}"
        print(f"{line}, {record['updates']:,} steps in {record['seconds']:.0f} s", file=sys.stderr)
        tidy(job_of(record))

    stops = threading.Event()  # after an error, runs that have not begun are not started

    def attempt(job):
        try:
            return None if stops.is_set() else do(job)
        except BaseException:
            stops.set()
            raise

    pool = ThreadPoolExecutor(config.jobs)
    futures = {pool.submit(attempt, job): job for job in missing}
    try:
        for done in as_completed(futures):
            if done.result() is not None:
                store(done.result())
    except UserError:  # of one run: those that run beside it are completed and kept
        pool.shutdown()
        for done, job in futures.items():
            if job not in known and done.exception() is None and done.result() is not None:
                store(done.result())
        raise
    finally:
        stops.set()
        pool.shutdown()
    return [known[job] for job in jobs]


def known_runs(output) -> dict[Job, dict]:
    """Returns the records of the runs that are done.  Raises UserError if runs.jsonl is a file of something else."""
    path = Path(output) / "runs.jsonl"
    try:
        return {job_of(record): record for record in (records_of(path) if path.exists() else [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of runs of this script ({error}): choose another output") from None


def write_data(output, files: dict[str, str], what: str) -> None:
    """Writes the data of a comparison, {file name: text}. Raises UserError if its runs so far had other data.

    what: a word for the data, for that message."""
    folder = Path(output)
    for name, text in files.items():
        path = folder / name
        if (folder / "runs.jsonl").exists() and (not path.exists() or path.read_text(encoding="utf-8") != text):
            raise UserError(f"the runs in {folder} had other {what}: choose another output")
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)


def keep_settings(output, settings: dict) -> None:
    """Writes the settings that all runs have in common. Raises UserError if the runs in the folder had others.

    Those that differ from run to run (the folder, the data, the seed) are left out."""
    path = Path(output) / "recipe.json"
    own = ("save_dir", "train_paths", "valid_paths", "seed")
    now = json.loads(json.dumps({name: value for name, value in settings.items() if name not in own}))
    has_runs = any(any(path.parent.glob(kind)) for kind in ("runs.jsonl", "run_*", "sweep_*"))
    before = read_object(path) if has_runs and path.exists() else {}
    for key in now:
        if before.get(key, now[key]) != now[key]:
            raise UserError(f"the runs in {path.parent} had {key} {before[key]}, not {now[key]}: choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(now, indent=1) + "\n")


def best_rates(config: ArmsConfig, do: Callable[[Job], dict], second: str) -> dict[str, float]:
    """Returns {arm: the learning rate with the highest exact accuracy in the sweep}.

    second: the field of a record that decides between equal accuracies; higher is better."""
    if len(config.lrs) == 1:
        return dict.fromkeys(config.arms, config.lrs[0])
    jobs = [Job(arm, (("lr", lr),), 0, True) for arm in config.arms for lr in config.lrs]
    records, key = do_all(config, jobs, do), itemgetter("exact", second)
    best = {arm: max((r for r in records if r["arm"] == arm), key=key) for arm in config.arms}
    return {arm: record["changes"]["lr"] for arm, record in best.items()}


def compare(config: ArmsConfig, recipe: dict, do: Callable[[Job], dict], second: str) -> list[dict]:
    """Returns the records of all arms and seeds, each arm with its learning rate from the sweep.

    recipe: all settings of the recipe, with the overrides. Raises UserError if the runs so far had other settings."""
    budget = ["minutes", "equal_flops", "sweep_minutes", "loop_steps"]
    budget += ["threads", "device"] if config.equal_flops is None else []  # they decide what a run does in its minutes
    keep_settings(config.output, recipe | {name: getattr(config, name) for name in budget})
    rates = best_rates(config, do, second)
    jobs = [Job(arm, (("lr", rates[arm]),), seed, False) for seed in config.seeds for arm in config.arms]
    return do_all(config, jobs, do)
