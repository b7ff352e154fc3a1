"""Train a loop on few sequential steps and run it on many: exact answers, and how deep each token goes, by difficulty.

    python experiments/depth.py                   # carries, three seeds, about 5 minutes on two cores (make depth)
    python experiments/depth.py --family all      # all families (make depth FAMILY=all)
    python experiments/depth.py --family words --seeds 0 1 2 3 4 --max_steps 600 --output runs/depth_600
    python experiments/depth.py --visit_dropout 0 --start_noise 0 --output runs/without_noise
    python experiments/depth.py --sweep 1e-3 2e-3 4e-3 8e-3 --seeds 100   # learning rates of all models

The families are in src/tasks/algorithms.py. Their difficulty is a number of sequential steps:
    carries   sums of 32 columns; the longest run of nines that a carry passes
    words     products of permutations along 32 columns; the longest word
    regions   8 x 8 grids with walls; the steps from the start to the farthest cell that can be reached
    chains    32 nodes that point to earlier ones; the most steps from a node to its root
Training sees instances of at most `trained` steps. A loop with one block is trained at a number of visits that is drawn
for every batch, and is tested with up to `max_visits`. Beside it, two plain transformers get the same number of
training FLOPs: `plain_1` has as many parameters (one layer, more steps), and `plain_deep` has about the FLOPs of the
loop in every step (as many layers as the loop has visits on average). Both see all tokens that the task lets a model
see. RECIPES has the settings of each family; a flag replaces that setting in every family of the run.

Three settings make the loop work beyond the trained depth. With `attention_window`, a visit moves what a token knows
only to its neighbours, so tokens that wait are common in training. `start_noise` and `visit_dropout` start training
from random states and let tokens skip visits at random. A token must then be able to wait for longer than it had to in
training, and must drop a wrong guess when the answer arrives.

Exit rules, compared at each difficulty (mean visits are over all answers of a row):
    full      every token runs max_visits
    halt      a token stops when the trained head is confident `patience` visits in a row
    kl        a token stops when a visit changes its distribution little, `patience` visits in a row
    fixed     every token runs the smallest whole number of visits that is not below the mean of `main_rule`
    random    token depths of `main_rule`, shuffled among all tokens of the same test
    oracle    every token reads its answer at the first visit from which on it stays right; not a rule, but a bound
For fixed, random and oracle, all tokens run on, and the answer of a token is read at its depth. In regions, where all
tokens see each other, rows stop instead of tokens, and there is no halting head.

All settings were chosen on test rows that are not reported: those of the loops with seed 0, the learning rates of the
plain models with seed 100. --sweep repeats the second choice: it trains with each rate, and tests on those other rows.

The last line of the output is JSON. Writes depth.png and runs.jsonl (one line per seed and model) to `output`.
"""

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments.depth_picture import draw  # noqa: E402
from experiments.depth_rules import Run, exact, right_answers  # noqa: E402
from experiments.records import given, keep, overrides, records_of  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError, few  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.model_config import DEEPEST  # noqa: E402
from src.optim import learning_rate_factor, make_optimizers  # noqa: E402
from src.tasks.algorithms import Carries, Chains, Family, Regions, Words  # noqa: E402

TEST_SEED, SWEEP_SEED = 2 * 10**6, 10**6  # of test rows; far from the seeds of training
MODELS = ("loop", "plain_1", "plain_deep")
FAMILIES = {family.name: family for family in (Carries, Words, Regions, Chains)}


@dataclass
class DepthConfig:
    """What to run.

    Args:
        family: carries, words, regions, chains, several of them, or all
        models: loop, plain_1, plain_deep, or some of them
        seeds: seeds of weights, instances and visits; each seed is one run of every model
        sweep: learning rates: trains the models with each of them, tests on other rows, and draws nothing
        draw: train nothing: tables and picture of the runs in runs.jsonl; of runs of the same kind, the last counts
        output: folder for depth.png and runs.jsonl
        processes: seeds and models that are trained at the same time, one thread each
        quick: tiny sizes, to test the script
    """

    family: list[str] = field(default_factory=lambda: ["carries"])
    models: list[str] = field(default_factory=lambda: list(MODELS))
    seeds: list[int] = field(default_factory=lambda: [3, 4, 5])
    sweep: list[float] = field(default_factory=list)
    draw: bool = False
    output: str = "runs/depth"
    processes: int = 2
    quick: bool = False

    def __post_init__(self):
        self.family = list(FAMILIES) if "all" in self.family else self.family
        for name, chosen, known in (("family", self.family, FAMILIES), ("models", self.models, MODELS)):
            unknown = [value for value in chosen if value not in known]
            if unknown or not chosen:
                raise ValueError(f"{name} is {' '.join(unknown) or 'empty'}: choose from {', '.join(known)}")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}: set it to 1 or more")
        if not self.seeds:
            raise ValueError("seeds needs at least one number")
        self.seeds = self.seeds[:1] if self.quick else self.seeds


@dataclass
class Recipe:
    """How the models of a family are trained and tested. RECIPES has the defaults of each family.

    Args:
        max_steps: optimizer steps of the loop
        batch_size: instances per step
        lr: peak learning rate of Muon and AdamW, for the loop
        lr_plain_1: the same for plain_1
        lr_plain_deep: the same for plain_deep
        d_model: width of all models
        size: columns, nodes, or rows and columns of a grid
        trained: most sequential steps in training
        tested: sequential steps of the test, each with test_rows instances
        test_rows: instances per number of sequential steps
        least_visits: fewest visits of a training batch
        most_visits: most visits of a training batch, except for the tail
        tail: probability that a batch has most_visits + 1 to 2 x most_visits instead
        positions: as in TRMConfig, for all models
        rope_theta: as in TRMConfig, for all models
        attention_window: as in TRMConfig, for the loop; 0 = no limit
        visit_dropout: as in TRMConfig, for the loop
        start_noise: as in TRMConfig, for the loop
        act_weight: weight of the halting loss
        act_threshold: halting probability above which a token stops
        patience: as in ExitRule, for halt and kl
        max_visits: most visits at test time
        main_rule: the rule that is drawn, and whose mean visits fixed and random get: halt, kl 0.001 or kl 0.0001
    """

    max_steps: int = 500
    batch_size: int = 64
    lr: float = 4e-3
    lr_plain_1: float = 4e-3
    lr_plain_deep: float = 4e-3
    d_model: int = 48
    size: int = 32
    trained: int = 4
    tested: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28])
    test_rows: int = 100
    least_visits: int = 1
    most_visits: int = 8
    tail: float = 0.0
    positions: str = "rope"
    rope_theta: float = 1e4
    attention_window: int = 2
    visit_dropout: float = 0.5
    start_noise: float = 1.0
    act_weight: float = 0.3
    act_threshold: float = 0.95
    patience: int = 2
    max_visits: int = 40
    main_rule: Literal["halt", "kl 0.001", "kl 0.0001"] = "halt"

    def check(self, family: str) -> "Recipe":
        """Returns the recipe.  Raises UserError if the family cannot be trained or tested in this way."""
        for name in ("max_steps", "batch_size", "trained", "test_rows", "least_visits", "max_visits"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        rates = {name: getattr(self, name) for name in ("lr", "lr_plain_1", "lr_plain_deep")}
        for name, rate in rates.items():
            if not 0 < rate < math.inf:
                raise UserError(f"{name} is {rate}: set it above 0")
        if not (self.max_visits <= DEEPEST and 1 <= self.patience <= DEEPEST):
            raise UserError(f"max_visits is {self.max_visits}, patience {self.patience}: set both from 1 to {DEEPEST}")
        if self.most_visits < self.least_visits:
            raise UserError(f"most_visits is {self.most_visits}: set it to least_visits {self.least_visits} or more")
        if not self.tested:
            raise UserError("tested needs at least one number")
        hardest = FAMILIES[family](self.size).hardest
        for difficulty in (self.trained, *self.tested):
            if not 1 <= difficulty <= hardest:
                raise UserError(f"{family} of size {self.size} with {difficulty} steps: choose from 1 to {hardest}")
        if self.main_rule == "halt" and not FAMILIES[family].causal:
            raise UserError(f"main_rule is halt, but {family} has no halting head: choose kl 0.001 or kl 0.0001")
        if not 0 <= self.tail <= 1:
            raise UserError(f"tail is {self.tail}: set it from 0 to 1")
        return self


RECIPES = {
    "carries": Recipe(lr_plain_deep=8e-3),
    "words": Recipe(tail=0.25, lr_plain_1=8e-3, lr_plain_deep=8e-3),
    "regions": Recipe(
        size=8,
        max_steps=600,
        lr_plain_1=8e-3,
        lr_plain_deep=8e-3,
        batch_size=32,
        tested=[1, 2, 3, 4, 6, 8, 10, 12, 14, 16],
        least_visits=4,
        visit_dropout=0.0,
        attention_window=10,  # cells above and below are 9 tokens away
        rope_theta=100.0,
        max_visits=48,
        main_rule="kl 0.0001",  # the only kind, as tokens are not stopped one by one
    ),
    "chains": Recipe(
        max_steps=400,
        lr_plain_1=8e-3,
        lr_plain_deep=8e-3,
        tested=[1, 2, 3, 4, 6, 8, 10, 12, 14, 16],
        least_visits=4,
        visit_dropout=0.0,
        attention_window=9,  # parents are at most 8 tokens away
        rope_theta=100.0,
        main_rule="kl 0.0001",
    ),
}
# with --quick; the rest is as in the recipe
QUICK = dict(max_steps=2, batch_size=4, d_model=16, test_rows=3, max_visits=6, size=8, trained=2, most_visits=3)
QUICK |= {"tested": [1, 2, 4], "least_visits": 1}


class Job(NamedTuple):
    """One model with one seed, to be trained and tested."""

    family: str
    recipe: Recipe
    model: str  # one of MODELS
    seed: int
    lr: float
    test_seed: int

    @property
    def task(self) -> Family:
        return FAMILIES[self.family](self.recipe.size)


# ---- training -------------------------------------------------------------------------------------------------------


def model_config(family: str, recipe: Recipe, model: str) -> TRMConfig:
    """The settings of one of MODELS. deep_steps of the loop is the largest number of visits of a usual batch."""
    task = FAMILIES[family](recipe.size)
    shared = {"vocab_size": task.vocab_size, "max_seq_len": task.length, "d_model": recipe.d_model, "n_heads": 4}
    shared |= {"norm": "pre", "qk_norm": True, "causal": task.causal}
    shared |= {"positions": recipe.positions, "rope_theta": recipe.rope_theta, "embed_mean": 0.0}
    if model == "loop":
        return TRMConfig(
            **shared,
            recursion="loop",
            n_layers=1,
            deep_steps=recipe.most_visits,
            halting=task.causal,
            act_weight=recipe.act_weight,
            act_threshold=recipe.act_threshold,
            attention_window=recipe.attention_window or None,
            visit_dropout=recipe.visit_dropout,
            start_noise=recipe.start_noise,
        )
    layers = 1 if model == "plain_1" else max(1, round(statistics.fmean(all_visits(recipe))))
    return TRMConfig(**shared, recursion="none", n_layers=layers)


def all_visits(recipe: Recipe) -> range:
    """The numbers of visits of usual batches."""
    return range(recipe.least_visits, recipe.most_visits + 1)


def training_flops(config: TRMConfig, visits: int | None = None) -> int:
    """FLOPs per token of one training step; for the loop with a number of visits."""
    at = config if visits is None else replace(config, deep_steps=visits, grad_deep_steps=visits)
    return flops_per_token(at).train


def steps_of(family: str, recipe: Recipe, model: str) -> int:
    """Steps of a model: all models get the training FLOPs of the loop."""
    if model == "loop":
        return recipe.max_steps
    loop, most = model_config(family, recipe, "loop"), recipe.most_visits
    usual = statistics.fmean(training_flops(loop, visits) for visits in all_visits(recipe))
    late = statistics.fmean(training_flops(loop, visits) for visits in range(most + 1, 2 * most + 1))
    mean = (1 - recipe.tail) * usual + recipe.tail * late
    return max(1, round(recipe.max_steps * mean / training_flops(model_config(family, recipe, model))))


def draw_visits(recipe: Recipe, rng: np.random.Generator) -> int:
    """The number of visits of one training batch."""
    if rng.random() < recipe.tail:
        return int(rng.integers(recipe.most_visits + 1, 2 * recipe.most_visits + 1))
    return int(rng.integers(recipe.least_visits, recipe.most_visits + 1))


def train(job: Job) -> TRMModel:
    """Trains one of MODELS on instances of few steps."""
    torch.manual_seed(job.seed)
    recipe, rng, config = job.recipe, np.random.default_rng(job.seed), model_config(job.family, job.recipe, job.model)
    model, steps, task = TRMModel(config), steps_of(job.family, recipe, job.model), job.task
    optimizers = make_optimizers(model, "muon", job.lr, 0.1, (0.9, 0.95))
    for step in range(steps):
        factor = learning_rate_factor("cosine", step, 20, step / steps, 0.05)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        if job.model == "loop":
            visits = draw_visits(recipe, rng)
            model.config = replace(config, deep_steps=visits, grad_deep_steps=visits)
        batch = task.generate(recipe.batch_size, 1, recipe.trained, rng)
        loss = model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    model.config = config
    return model.eval()


# ---- test -----------------------------------------------------------------------------------------------------------


def test(job: Job, model: TRMModel) -> list[dict]:
    """Tests a model at each difficulty and, for the loop, on all of them together (difficulty `mixed`)."""
    recipe, task, rng = job.recipe, job.task, np.random.default_rng(job.test_seed)
    records, runs = [], []
    for difficulty in recipe.tested:
        batch = task.generate(recipe.test_rows, difficulty, difficulty, rng)
        ids, record = torch.from_numpy(batch.inputs), {"difficulty": difficulty}
        if model.config.recursion == "none":
            with torch.no_grad():
                answers = model(ids).logits.argmax(-1).numpy()
            records.append(record | {"exact": exact(right_answers(answers, batch.targets))})
            continue
        runs.append(Run.of(model, ids, batch.targets, recipe.max_visits, recipe.patience))
        records.append(record | runs[-1].figures(recipe.main_rule))
    return records + [{"difficulty": "mixed"} | Run.join(runs).figures(recipe.main_rule) for _ in runs[:1]]


def do(job: Job) -> dict:
    """Trains and tests one model with one seed, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = train(job)
    trained = time.perf_counter()
    tests = test(job, model)
    return {
        "family": job.family,
        "model": job.model,
        "seed": job.seed,
        "lr": job.lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.n_layers,
        "steps": steps_of(job.family, job.recipe, job.model),
        "train_s": trained - start,
        "test_s": time.perf_counter() - trained,
        "recipe": asdict(job.recipe),
        "tests": tests,
    }


def kept(records: Iterable[dict], settings: DepthConfig) -> Iterator[dict]:
    """Passes records on, and appends each to runs.jsonl as soon as it is there."""
    for record in records:
        keep(Path(settings.output) / "runs.jsonl", record | {"settings": asdict(settings)})
        name = f"{record['family']}: {record['model']}, seed {record['seed']}, lr {record['lr']:g}"
        print(f"{name}: {record['train_s']:.0f} s of training", file=sys.stderr)
        yield record


def all_jobs(settings: DepthConfig, changes: dict) -> list[Job]:
    """Every model with every seed of each family, and in a sweep with every learning rate."""
    jobs = []
    for family in settings.family:
        recipe = replace(RECIPES[family], **(QUICK if settings.quick else {}) | changes).check(family)
        rates = {"loop": recipe.lr, "plain_1": recipe.lr_plain_1, "plain_deep": recipe.lr_plain_deep}
        try:
            for model in settings.models:
                model_config(family, recipe, model)
        except ValueError as error:
            raise UserError(f"{family}: {error}") from None
        test_seed = SWEEP_SEED if settings.sweep else TEST_SEED
        for model in settings.models:
            for lr in settings.sweep or [rates[model]]:
                jobs += [Job(family, recipe, model, seed, lr, test_seed) for seed in settings.seeds]
    return jobs


def run_jobs(settings: DepthConfig, jobs: list[Job]) -> list[dict]:
    """Runs all jobs.  Returns their records in the order of families, MODELS, rates and seeds."""
    if settings.processes == 1:
        records = list(kept(map(do, jobs), settings))
    else:
        with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
            records = list(kept(pool.imap_unordered(do, jobs), settings))
    return in_order(records)


def in_order(records: list[dict]) -> list[dict]:
    """Sorts records by family, model, learning rate and seed."""
    order = {"family": list(FAMILIES), "model": MODELS}
    return sorted(records, key=lambda r: (*(names.index(r[k]) for k, names in order.items()), r["lr"], r["seed"]))


def read_runs(settings: DepthConfig) -> list[dict]:
    """Returns the chosen families, models and seeds in runs.jsonl.

    Raises UserError if a family has no loop there, or runs with different recipes."""
    path, last = Path(settings.output) / "runs.jsonl", {}
    try:
        for record in records_of(path):
            key = record["family"], record["model"], record["seed"]
            is_chosen = key[0] in settings.family and key[1] in settings.models and key[2] in settings.seeds
            if is_chosen and not record["settings"]["sweep"]:
                last[key] = record | {"recipe": dict(record["recipe"]), "lr": float(record["lr"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output {path}: these are no runs of depth.py ({error}): run without --draw first") from None
    for family in settings.family:
        if not any(key[:2] == (family, "loop") for key in last):
            raise UserError(f"--output {path}: there is no loop of {family} with these seeds: run without --draw first")
        if changed := _differences([record for key, record in last.items() if key[0] == family]):
            raise UserError(
                f"--output {path}: the runs of {family} differ in {few(changed)}: choose --models and --seeds with "
                "the same settings, or run them again"
            )
    return in_order(list(last.values()))


def _differences(records: list[dict]) -> list[str]:
    """Returns the settings in which the runs of one family differ. Each model may have its own learning rate."""
    found = set()
    for name in set().union(*(record["recipe"] for record in records)):
        if not name.startswith("lr") and len({str(record["recipe"].get(name)) for record in records}) > 1:
            found.add(name)
    for model in MODELS:
        if len({record["lr"] for record in records if record["model"] == model}) > 1:
            found.add(f"the learning rate of {model}")
    return sorted(found)


# ---- report ---------------------------------------------------------------------------------------------------------


def print_exact(records: list[dict]):
    """Prints exact rows by difficulty, one line per model, learning rate and seed of a family."""
    tested = records[0]["recipe"]["tested"]
    print(f"\n{records[0]['family']}: exact rows by sequential steps; for the loop after all its visits")
    print("(mean: over all difficulties, s: seconds of training and test)")
    names = f"{'params':>9}{'layers':>7}{'lr':>8}{'steps':>7}{'s':>5}"
    print(f"{'model':<11}{'seed':>5}{names}" + "".join(f"{d:>7}" for d in tested) + f"{'mean':>7}")
    for r in records:
        head = f"{r['model']:<11}{r['seed']:>5}{r['parameters']:>9,}{r['layers']:>7}{r['lr']:>8g}{r['steps']:>7}"
        head += f"{r['train_s'] + r['test_s']:>5.0f}"
        shares = [t["exact"] for t in r["tests"] if t["difficulty"] != "mixed"]
        print(head + "".join(f"{share:>7.3f}" for share in (*shares, statistics.fmean(shares))))


def print_rules(loops: list[dict]):
    """Prints each rule's exact rows (mean of the seeds, then the worst seed) and mean visits per answer."""
    print("the loop: exact rows (worst seed) and mean visits per answer under each exit rule")
    names = list(loops[0]["tests"][0]["rules"])
    print(f"{'steps':>5}{'99 % at':>9}" + "".join(f"{name:>20}" for name in names))
    for tests in zip(*(r["tests"] for r in loops)):
        cells = []
        for name in names:
            values = [t["rules"][name]["exact"] for t in tests]
            visits = statistics.fmean(t["rules"][name]["visits"] for t in tests)
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f}) {visits:4.1f}")
        enough = max(t["enough_visits"] for t in tests)
        print(f"{tests[0]['difficulty']:>5}{enough:>9}" + "".join(f"{cell:>20}" for cell in cells))


def main(argv=None) -> int:
    changes = overrides("Settings that replace those of the recipes in every family.", fields(Recipe), Recipe)
    settings, flags = parse_flags(__doc__, DepthConfig, changes, argv=argv)
    jobs = all_jobs(settings, given(flags))
    folder, start = Path(settings.output), time.perf_counter()
    try:
        if not settings.draw:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; name a folder") from None
    records = read_runs(settings) if settings.draw else run_jobs(settings, jobs)
    families = [[r for r in records if r["family"] == family] for family in FAMILIES if family in settings.family]
    for of_family in families:
        print_exact(of_family)
        loops = [r for r in of_family if r["model"] == "loop"]
        if loops and not settings.sweep:
            print_rules(loops)
    if "loop" in settings.models and not settings.sweep:
        print(f"\n{draw(families, folder / 'depth.png')}")
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes")
    print(json.dumps({"experiment": "depth", "minutes": minutes, "settings": asdict(settings), "runs": records}))
    return 0


if __name__ == "__main__":
    run(main)
