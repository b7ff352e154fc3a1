"""Train a loop on few sequential steps and run it on many: exact answers, and how deep each token goes, by difficulty.

    python experiments/depth.py                   # carries, three seeds, about 5 minutes on two cores (make depth)
    python experiments/depth.py --seeds 0 1 2 3 4 --max_steps 600
    python experiments/depth.py --visit_dropout 0 --output runs/depth_without_noise

The task is addition (`Carries` in src/tasks/algorithms.py): 32 columns, one answer per column, and a run of nines that a
carry has to pass. Training sees runs of at most `trained`. A loop with one block and a halting head is trained at a
number of visits that is drawn for every batch, and is tested with up to `max_visits`. Beside it, two plain transformers
get the same number of training FLOPs: `plain_1` has as many parameters (one layer, more steps), and `plain_deep` has
the FLOPs of the loop in every step (as many layers as the loop has visits on average). They see all earlier columns.

Two settings make the loop's halting head work beyond the trained depth. With `attention_window` 2, a visit moves a carry
by one column, so that training contains columns that wait. With `visit_dropout`, tokens skip visits at random, so that
columns wait for longer than the runs in training are, and waiting stays a state that the head recognises.

Exit rules, compared at each difficulty (mean visits are over all answers of a row):
    full      every token runs max_visits
    halt      a token stops when the trained head is confident `patience` visits in a row
    kl        a token stops when a visit changes its distribution little, `patience` visits in a row
    fixed     every token runs the smallest whole number of visits that is not below the mean of `halt`
    random    token depths of `halt`, shuffled among all tokens of the same test
    oracle    every token reads its answer at the first visit from which on it stays right; not a rule, but a bound
For fixed, random and oracle, all tokens run on, and the answer of a token is read at its depth.

The last line of the output is JSON. Writes heat_map.png and runs.jsonl (one line per seed and model) to `output`.
"""

import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.losses import IGNORE  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.model_config import ExitRule  # noqa: E402
from src.optim import learning_rate_factor, make_optimizers  # noqa: E402
from src.tasks.algorithms import Carries  # noqa: E402
from src.training.curves import INK, new_figure, save_picture  # noqa: E402

TEST_SEED = 10**6  # far from the seeds of training
MODELS = ("loop", "plain_1", "plain_deep")
KL_THRESHOLDS = (1e-2, 1e-3, 1e-4)


@dataclass
class DepthConfig:
    """What to run.

    Args:
        seeds: seeds of weights, instances and visits; each seed is one run of every model
        output: folder for heat_map.png and runs.jsonl
        max_steps: optimizer steps of the loop
        batch_size: instances per step
        lr: peak learning rate of Muon and AdamW
        d_model: width of all models
        columns: columns of an addition
        trained: longest run of nines in training
        tested: run lengths of the test, each with test_rows instances
        test_rows: instances per run length
        least_visits: fewest visits of a training batch
        most_visits: most visits of a training batch, except for the tail
        tail: probability that a batch has most_visits + 1 to 2 x most_visits instead
        attention_window: as in TRMConfig, for the loop; 0 = no limit
        visit_dropout: as in TRMConfig, for the loop
        act_weight: weight of the halting loss
        act_threshold: halting probability above which a token stops
        patience: as in ExitRule, for halt and kl
        max_visits: most visits at test time
        processes: seeds and models that are trained at the same time, one thread each
        quick: tiny sizes, to test the script
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output: str = "runs/depth"
    max_steps: int = 300
    batch_size: int = 128
    lr: float = 4e-3
    d_model: int = 48
    columns: int = 32
    trained: int = 4
    tested: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28])
    test_rows: int = 200
    least_visits: int = 1
    most_visits: int = 8
    tail: float = 0.0
    attention_window: int = 2
    visit_dropout: float = 0.5
    act_weight: float = 0.3
    act_threshold: float = 0.95
    patience: int = 2
    max_visits: int = 48
    processes: int = 2
    quick: bool = False

    def __post_init__(self):
        if self.quick:
            self.max_steps, self.batch_size, self.d_model, self.test_rows, self.max_visits = 2, 4, 16, 3, 6
            self.seeds, self.columns, self.trained, self.tested, self.most_visits = self.seeds[:1], 8, 2, [1, 2, 4], 3
        for name in ("max_steps", "batch_size", "trained", "test_rows", "least_visits", "max_visits", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.most_visits < self.least_visits:
            raise ValueError(f"most_visits is {self.most_visits}: set it to least_visits {self.least_visits} or more")
        if not self.seeds or not self.tested:
            raise ValueError("seeds and tested need at least one number each")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail is {self.tail}: set it from 0 to 1")


# ---- training -------------------------------------------------------------------------------------------------------


def model_config(settings: DepthConfig, model: str) -> TRMConfig:
    """The settings of one of MODELS. deep_steps of the loop is the largest number of visits of a usual batch."""
    task = Carries(settings.columns)
    shared = {"vocab_size": task.vocab_size, "max_seq_len": task.length, "d_model": settings.d_model, "n_heads": 4}
    shared |= {"norm": "pre", "qk_norm": True}
    if model == "loop":
        return TRMConfig(
            **shared,
            recursion="loop",
            n_layers=1,
            deep_steps=settings.most_visits,
            halting=True,
            act_weight=settings.act_weight,
            act_threshold=settings.act_threshold,
            attention_window=settings.attention_window or None,
            visit_dropout=settings.visit_dropout,
        )
    layers = 1 if model == "plain_1" else max(1, round(statistics.fmean(all_visits(settings))))
    return TRMConfig(**shared, recursion="none", n_layers=layers)


def all_visits(settings: DepthConfig) -> range:
    """The numbers of visits of usual batches."""
    return range(settings.least_visits, settings.most_visits + 1)


def training_flops(config: TRMConfig, visits: int | None = None) -> int:
    """FLOPs per token of one training step; for the loop with a number of visits."""
    at = config if visits is None else replace(config, deep_steps=visits, grad_deep_steps=visits)
    return flops_per_token(at).train


def steps_of(settings: DepthConfig, model: str) -> int:
    """Steps of a model: all models get the training FLOPs of the loop."""
    if model == "loop":
        return settings.max_steps
    loop = model_config(settings, "loop")
    most = settings.most_visits
    usual = statistics.fmean(training_flops(loop, visits) for visits in all_visits(settings))
    late = statistics.fmean(training_flops(loop, visits) for visits in range(most + 1, 2 * most + 1))
    mean = (1 - settings.tail) * usual + settings.tail * late
    return max(1, round(settings.max_steps * mean / training_flops(model_config(settings, model))))


def draw_visits(settings: DepthConfig, rng: np.random.Generator) -> int:
    """The number of visits of one training batch."""
    if rng.random() < settings.tail:
        return int(rng.integers(settings.most_visits + 1, 2 * settings.most_visits + 1))
    return int(rng.integers(settings.least_visits, settings.most_visits + 1))


def train(settings: DepthConfig, name: str, seed: int) -> TRMModel:
    """Trains one of MODELS on short runs of nines."""
    torch.manual_seed(seed)
    rng, task, config = np.random.default_rng(seed), Carries(settings.columns), model_config(settings, name)
    model, steps = TRMModel(config), steps_of(settings, name)
    optimizers = make_optimizers(model, "muon", settings.lr, 0.1, (0.9, 0.95))
    for step in range(steps):
        factor = learning_rate_factor("cosine", step, 20, step / steps, 0.05)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        if name == "loop":
            visits = draw_visits(settings, rng)
            model.config = replace(config, deep_steps=visits, grad_deep_steps=visits)
        batch = task.generate(settings.batch_size, 1, settings.trained, rng)
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


def exact(is_right: np.ndarray) -> np.ndarray:
    """Share of rows with every answer right.  (..., N, L) -> (...)."""
    return is_right.all(-1).mean(-1)


def test(settings: DepthConfig, model: TRMModel) -> list[dict]:
    """Tests a model at each difficulty.  Returns one record per difficulty."""
    task, rng = Carries(settings.columns), np.random.default_rng(TEST_SEED)
    records = []
    for difficulty in settings.tested:
        batch = task.generate(settings.test_rows, difficulty, difficulty, rng)
        ids, targets = torch.from_numpy(batch.inputs), batch.targets
        has_answer = targets != IGNORE
        record = {"difficulty": difficulty}
        if model.config.recursion == "none":
            with torch.no_grad():
                answers = model(ids).logits.argmax(-1).numpy()
            records.append(record | {"exact": float(exact((answers == targets) | ~has_answer))})
            continue
        with torch.no_grad():
            every = model(ids, exit=ExitRule(max_recursion_depth=settings.max_visits), return_steps=True)
        is_right = (every.logits.argmax(-1).numpy() == targets) | ~has_answer  # (visits, N, L)
        record |= {"by_visit": exact(is_right).tolist(), "exact": float(exact(is_right[-1]))}
        records.append(record | {"rules": compare_rules(settings, model, ids, targets, is_right)})
    return records


def compare_rules(settings: DepthConfig, model, ids, targets, is_right) -> dict[str, dict]:
    """Returns {rule: {exact, visits}}: exact rows and mean visits per answer.

    is_right (visits, N, L): whether each answer is right after each visit if all tokens run on."""
    has_answer, most = targets != IGNORE, len(is_right)

    def follow(rule: ExitRule):
        with torch.no_grad():
            out = model(ids, exit=rule)
        right = (out.logits.argmax(-1).numpy() == targets) | ~has_answer
        depths = out.carry.steps.numpy()
        return {"exact": float(exact(right)), "visits": float(depths[has_answer].mean())}, depths

    def read_at(depths):
        right = np.take_along_axis(is_right, depths[None] - 1, axis=0)[0]
        return {"exact": float(exact(right)), "visits": float(depths[has_answer].mean())}

    halt = ExitRule("halt", most, act_threshold=settings.act_threshold, patience=settings.patience)
    found, depths = follow(halt)
    fixed = int(np.ceil(found["visits"]))
    shuffled = depths.copy()
    shuffled[has_answer] = np.random.default_rng(TEST_SEED).permutation(depths[has_answer])
    # the number of visits at the end from which on the answer is right, counted from the last visit backwards
    right_at_end = np.cumprod(is_right[::-1], axis=0).sum(0)
    oracle = np.clip(most - right_at_end + 1, 1, most)
    rules = {"full": {"exact": float(exact(is_right[-1])), "visits": float(most)}, "halt": found}
    for threshold in KL_THRESHOLDS:
        rules[f"kl {threshold:g}"] = follow(ExitRule("kl", most, kl_threshold=threshold, patience=settings.patience))[0]
    rules["fixed"] = {"exact": float(exact(is_right[fixed - 1])), "visits": float(fixed)}
    return rules | {"random": read_at(shuffled), "oracle": read_at(oracle)}


def job(given) -> dict:
    """Trains and tests one model with one seed, in a process of its own."""
    settings, name, seed = given
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = train(settings, name, seed)
    trained = time.perf_counter()
    tests = test(settings, model)
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.n_layers,
        "steps": steps_of(settings, name),
        "train_s": trained - start,
        "test_s": time.perf_counter() - trained,
        "tests": tests,
    }


def run_jobs(settings: DepthConfig) -> list[dict]:
    """Runs every model with every seed.  Returns their records in the order of MODELS, then seeds."""
    jobs = [(settings, name, seed) for name in ("loop", "plain_deep", "plain_1") for seed in settings.seeds]
    if settings.processes == 1:
        records = [job(given) for given in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
            records = pool.map(job, jobs, chunksize=1)  # the longest jobs come first
    return sorted(records, key=lambda r: (MODELS.index(r["model"]), r["seed"]))


# ---- report ---------------------------------------------------------------------------------------------------------


def print_exact(records: list[dict], tested: list[int]):
    """Prints exact rows by difficulty, one line per model and seed."""
    print("exact rows by the longest run of nines; the loop after all its visits")
    print(f"{'model':<12}{'seed':>5}{'params':>9}{'steps':>7}{'s':>6}" + "".join(f"{d:>7}" for d in tested))
    for r in records:
        seconds = r["train_s"] + r["test_s"]
        head = f"{r['model']:<12}{r['seed']:>5}{r['parameters']:>9,}{r['steps']:>7}{seconds:>6.0f}"
        print(head + "".join(f"{t['exact']:>7.3f}" for t in r["tests"]))


def print_rules(loops: list[dict], tested: list[int]):
    """Prints each rule's exact rows and mean visits: the mean over seeds, and the lowest exact value of any seed."""
    print("\nexit rules of the loop: exact rows, mean of the seeds (lowest seed), and mean visits per answer")
    names = list(loops[0]["tests"][0]["rules"])
    print(f"{'run':>4}" + "".join(f"{name:>22}" for name in names))
    for i, difficulty in enumerate(tested):
        cells = []
        for name in names:
            seeds = [r["tests"][i]["rules"][name] for r in loops]
            values = [s["exact"] for s in seeds]
            visits = statistics.fmean(s["visits"] for s in seeds)
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f}) {visits:5.1f}")
        print(f"{difficulty:>4}" + "".join(f"{cell:>22}" for cell in cells))


def draw(settings: DepthConfig, loops: list[dict], plain: dict[str, list[dict]], path: Path) -> Path:
    """Draws exact rows by difficulty and visits, with the mean depth of the halting head, and the plain models."""
    figure, _ = new_figure(5.4)
    figure.clear()
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.55, 1)})
    return save_picture(figure, path)
