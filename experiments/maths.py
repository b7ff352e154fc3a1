"""Compare the recursive model with its controls on records: same data, same minutes (or FLOPs), same number of threads.

    python experiments/maths.py --digits 10 --minutes 30 --jobs 2
    python experiments/maths.py --digits 10 --order reversed --minutes 30 --output runs/maths_reversed
    python experiments/maths.py --recipe configs/gsm8k.yaml --train_paths train.jsonl --test_paths test.jsonl

The recipe is a config of train_trm_lm.py with `records: true`, for a model of recursion trm. experiments/arms.py
describes the models that are compared, which are called arms: trm, trm-1, loop, plain-params, plain-flops, plain-deep.

Without train_paths the task is addition. The longer addend has 1 to `digits` digits, each number of digits equally
often; the shorter one has 1 to as many. Zeros on the left fill each number to `digits` + `beyond` digits (the sum has
one more), so that digits of equal value are always equally far apart. No test question is among the training questions,
also not with its addends swapped. The test `beyond` has numbers with more digits than any in training.
`eval_lm.py --difficulty_field carries` reports by the longest carry instead of by digits.

A part of the training records is held back. First, a learning rate is chosen for each arm in a sweep: one run of
`sweep_minutes` for each value in `lrs`. The value with the highest exact match on the held-back records is then used
for every seed. Test records play no part in the choice. Each run answers with its best checkpoint: the one with the
lowest loss on held-back records. A run with more steps has more evaluations to choose from.

The runs are subprocesses of train_trm_lm.py and eval_lm.py, `jobs` at a time. Writes the data and one JSON line per run
to `output`, and prints Markdown tables of exact match: of every seed, by difficulty, and by recursion step up to twice
the trained depth. Started again with the same `output`, it does only the runs that are missing.
"""

import json
import random
import statistics
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments import arms  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.data.records import Record, read_records  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.files.text import read_object  # noqa: E402
from src.metrics import flops_per_token, format_params  # noqa: E402
from src.training.train_config import Settings, read_settings  # noqa: E402

HELD_BACK = 500  # training records that the sweep and the validation during a run use, at most a tenth


@dataclass
class MathsConfig(arms.ArmsConfig):
    """What to run.

    Args:
        digits: most digits of an addend in training
        beyond: the test `beyond` has numbers with up to this many digits more
        order: order of the digits: normal, answer (that of the sum is reversed) or reversed (all numbers are)
        n_train: number of training additions
        n_test: number of test additions, and of those beyond
        train_paths: records to train on in place of additions
        test_paths: records of the same difficulty to test on; needs train_paths
        beyond_paths: harder records to test on; needs train_paths
        data_only: write the records to `output` and stop
    """

    recipe: str = "configs/addition.yaml"
    arms: list[str] = field(default_factory=lambda: ["trm", "trm-1", "loop", "plain-params", "plain-flops"])
    minutes: float = 30.0
    sweep_minutes: float = 3.0
    output: str = "runs/maths_arms"
    digits: int = 10
    beyond: int = 2
    order: Literal["normal", "answer", "reversed"] = "normal"
    n_train: int = 400_000
    n_test: int = 1000
    train_paths: list[str] = field(default_factory=list)
    test_paths: list[str] = field(default_factory=list)
    beyond_paths: list[str] = field(default_factory=list)
    data_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("digits", "n_train", "n_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.beyond < 0:
            raise ValueError(f"beyond is {self.beyond}: set it to 0 or more")
        if bool(self.train_paths) != bool(self.test_paths) or (self.beyond_paths and not self.train_paths):
            raise ValueError("records need train_paths and test_paths: give both, or leave out all paths")


# ---- data -----------------------------------------------------------------------------------------------------------


def addition(a: int, b: int, width: int, order: str) -> dict:
    """Returns a + b as a record, with zeros that fill the addends to `width` digits.

    Its difficulty is the number of digits of the longer addend; `carries` is another measure, for eval_lm.py."""
    question, answer = [f"{n:0{width}d}" for n in (a, b)], f"{a + b:0{width + 1}d}"
    if order == "reversed":
        question = [number[::-1] for number in question]
    if order != "normal":
        answer = answer[::-1]
    longest = {"difficulty": len(str(max(a, b))), "carries": longest_carry(a, b)}
    return {"question": "+".join(question), "answer": answer} | longest


def longest_carry(a: int, b: int) -> int:
    """Returns the most columns in a row that one carry passes through: 1 for 15 + 15, 3 for 445 + 555, 0 for 1 + 1."""
    longest = columns = 0
    while a or b:
        total = a % 10 + b % 10
        columns = 1 if total > 9 else columns + 1 if total == 9 and columns else 0
        longest = max(longest, columns)
        a, b = a // 10, b // 10
    return longest


def additions(n: int, low: int, high: int, width: int, order: str, seed: int, tests: bool) -> Iterator[dict]:
    """Yields n different additions: of the tenth of all additions that is kept for tests, or of the other nine tenths.

    a + b and b + a are the same addition, so that only one of them is used, and in one of the two parts only.
    The longer addend has `low` to `high` digits, uniformly; the shorter one has 1 to as many, and either may come
    first. Stops earlier if there are hardly any more."""
    rng, seen, misses = random.Random(seed), set(), 0
    while len(seen) < n and misses < 1000:
        longer = rng.randint(low, high)
        pair = [_number(rng, longer), _number(rng, rng.randint(1, longer))]
        rng.shuffle(pair)
        misses += 1
        key = tuple(sorted(pair))
        if key not in seen and (zlib.crc32(repr(key).encode()) % 10 == 0) == tests:
            seen.add(key)
            misses = 0
            yield addition(*pair, width, order)


def _number(rng, digits):
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


class Data(NamedTuple):
    """Files of records."""

    train: Path
    valid: Path
    test: Path
    beyond: Path | None


def prepare(config: MathsConfig) -> Data:
    """Writes the records to files in the output folder. Raises UserError if it has runs on other records."""
    train, test, beyond = _given(config) if config.train_paths else _drawn(config)
    n_valid = max(1, min(HELD_BACK, len(train) // 10))
    parts = {"train": train[n_valid:], "valid": train[:n_valid], "test": test, "beyond": beyond}
    if empty := [name for name, records in parts.items() if not records and name != "beyond"]:
        raise UserError(f"there are no records for {empty[0]}: give more records, or raise digits or n_train")
    texts = {
        f"{name}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        for name, records in parts.items()
        if records
    }
    arms.write_data(config.output, texts, "records")
    return Data(*(Path(config.output) / f"{name}.jsonl" if parts[name] else None for name in Data._fields))


def _drawn(config) -> tuple[list[dict], ...]:
    width = config.digits + config.beyond
    form = {"width": width, "order": config.order}
    train = additions(config.n_train, 1, config.digits, **form, seed=0, tests=False)
    test = additions(config.n_test, 1, config.digits, **form, seed=1, tests=True)
    beyond = additions(config.n_test, config.digits + 1, width, **form, seed=2, tests=True) if config.beyond else []
    return list(train), list(test), list(beyond)


def _given(config) -> tuple[list[dict], ...]:
    test = _as_objects(read_records(config.test_paths))
    beyond = _as_objects(read_records(config.beyond_paths)) if config.beyond_paths else []
    known = {record["question"] for record in test + beyond}
    train = _as_objects(read_records(config.train_paths))
    kept = [record for record in train if record["question"] not in known]
    if len(kept) < len(train):
        print(f"{len(train) - len(kept):,} training records left out: their questions are tested", file=sys.stderr)
    random.Random(0).shuffle(kept)
    return kept, test, beyond


def _as_objects(records: Iterator[Record]) -> list[dict]:
    difficulty = ("difficulty",)
    return [
        {"question": r.question, "answer": r.answer} | {name: r.extra[name] for name in difficulty if name in r.extra}
        for r in records
    ]


# ---- runs -----------------------------------------------------------------------------------------------------------


def recipe_of(config: MathsConfig, data: Data) -> Settings:
    """Returns the settings of the recipe, with the overrides and a vocabulary size."""
    settings = read_settings(["--config", config.recipe, f"--train_paths={data.train}", *config.overrides])
    model = settings.model
    if model.recursion != "trm" or not settings.data.records:
        raise UserError(f"{config.recipe} is no recipe for this: choose one with recursion trm and records true")
    return settings._replace(model=replace(model, vocab_size=model.vocab_size or 259))  # the tokenizer `byte`


def run_job(config: MathsConfig, settings: Settings, data: Data, job: arms.Job) -> dict:
    """Does one run, and returns its record."""
    recipe = settings.model
    per_update = 1 if settings.train.optimizer_step == "supervision" else recipe.supervision_steps
    flags = arms.arm_flags(job.arm, recipe, config.loop_steps, per_update)
    model = arms.changed(recipe, flags)
    flops = flops_per_token(model).train
    flags |= arms.length(config, job, flops, flops_per_token(recipe).train)
    paths = {"train_paths": data.train, "valid_paths": data.valid}
    folder = arms.train("train_trm_lm.py", config, job, flags | paths, ["--config", config.recipe])
    trained = model.recursion_steps
    record, figures = arms.record_of(folder, job)
    record |= {
        "flops_per_token": flops,
        "likelihood": -figures.get("final_valid_loss", figures["valid_loss"]),
        "trained_steps": trained,
    }
    if job.is_sweep:
        return record | _answers(config, folder, data.valid, trained, trained)
    deepest = 1 if model.recursion == "none" else 2 * trained
    record |= _answers(config, folder, data.test, trained, deepest)
    if data.beyond is not None:
        record["beyond"] = _answers(config, folder, data.beyond, trained, deepest)
    return record


def _answers(config, folder: Path, records: Path, trained: int, deepest: int) -> dict:
    """Returns exact match {exact, by_step, by_difficulty} of a run on records; `exact` is that of the trained depth."""
    found = folder / f"{records.stem}.json"
    words = [folder, "--exact_match", "--paths", records, "--json", found, "--device", config.device]
    depth = [] if deepest == 1 else ["--max_recursion_depth", deepest]
    arms.run_script("eval_lm.py", [*words, *depth], config.threads)
    figures = read_object(found)
    levels = figures["by_difficulty"].items()
    return {
        "exact": figures["exact"][trained - 1],
        "by_step": figures["exact"],
        "by_difficulty": {level: values["exact"][trained - 1] for level, values in levels},
        "parameters": figures["parameters"],
    }


# ---- tables ---------------------------------------------------------------------------------------------------------


def _mean(runs, *path):
    values = []
    for value in runs:
        for name in path:
            value = value[name]
        values.append(value)
    return statistics.mean(values)


def tables(records: list[dict]) -> str:
    """Returns Markdown tables: every seed, by difficulty, and by recursion step."""
    groups = {arm: [r for r in records if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in records)}
    parts = [_seeds(groups), _levels(groups), *(_depths(arm, runs) for arm, runs in groups.items())]
    return "\n\n".join(part for part in parts if part)


def _seeds(groups) -> str:
    names = "arm, parameters, MFLOP/token, lr, training steps, exact, beyond, every seed".split(", ")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for arm, runs in groups.items():
        runs = sorted(runs, key=lambda r: r["seed"])
        exact = [r["exact"] for r in runs]
        spread = f" ± {statistics.stdev(exact):.3f}" if len(exact) > 1 else ""
        beyond = f"{_mean(runs, 'beyond', 'exact'):.3f}" if "beyond" in runs[0] else "-"
        cost = f"{format_params(runs[0]['parameters'])} | {runs[0]['flops_per_token'] / 1e6:.2f}"
        effort = f"{runs[0]['changes']['lr']:g} | {_mean(runs, 'updates'):,.0f}"
        seeds = ", ".join(f"{value:.3f}" for value in exact)
        lines.append(f"| {arm} | {cost} | {effort} | {statistics.mean(exact):.3f}{spread} | {beyond} | {seeds} |")
    return "\n".join(lines)


def _levels(groups) -> str:
    first = next(iter(groups.values()))[0]
    tests = [("exact", ())] + ([("beyond", ("beyond",))] if "beyond" in first else [])
    columns = [
        (f"beyond: {level}" if path else level, (*path, "by_difficulty", level))
        for _, path in tests
        for level in (first["beyond"] if path else first)["by_difficulty"]
    ]
    lines = ["| difficulty | " + " | ".join(level for level, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for arm, runs in groups.items():
        lines.append(f"| {arm} | " + " | ".join(f"{_mean(runs, *path):.3f}" for _, path in columns) + " |")
    return "\n".join(lines)


def _depths(arm: str, runs) -> str:
    if len(runs[0]["by_step"]) == 1:
        return ""
    steps = range(len(runs[0]["by_step"]))
    tests = [("exact", ())] + ([("beyond", ("beyond",))] if "beyond" in runs[0] else [])
    lines = [f"| {arm}, step | " + " | ".join(str(step + 1) for step in steps) + " |", "|---|" + "---|" * len(steps)]
    for name, path in tests:
        lines.append(f"| {name} | " + " | ".join(f"{_mean(runs, *path, 'by_step', step):.3f}" for step in steps) + " |")
    return "\n".join(lines)


def main(argv=None):
    (config,) = parse_flags(__doc__, MathsConfig, argv=argv)
    data = prepare(config)
    if config.data_only:
        return
    settings = recipe_of(config, data)
    records = arms.compare(config, settings.flat(), lambda job: run_job(config, settings, data, job), "likelihood")
    print(tables(records))


if __name__ == "__main__":
    run(main)
