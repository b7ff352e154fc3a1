"""Train a loop on few sequential steps and run it on many: exact answers, and how deep each token goes, by difficulty.

    python experiments/depth.py                   # carries, three seeds, about 5 minutes on two cores (make depth)
    python experiments/depth.py --seeds 0 1 2 3 4 --max_steps 600
    python experiments/depth.py --visit_dropout 0 --start_noise 0 --output runs/without_noise

The task is addition (`Carries` in src/tasks/algorithms.py): 32 columns, one answer per column, and a run of nines that
a carry has to pass. Training sees runs of at most `trained`. A loop with one block and a halting head is trained at a
number of visits that is drawn for every batch, and is tested with up to `max_visits`. Beside it, two plain transformers
get the same number of training FLOPs: `plain_1` has as many parameters (one layer, more steps), and `plain_deep` has
about the FLOPs of the loop in every step (as many layers as the loop has visits on average). Both see all earlier
columns.

Three settings make the loop's halting head work beyond the trained depth. With `attention_window` 2, a visit moves a
carry by one column, so columns that wait for a carry are common in training. `start_noise` and `visit_dropout` start
training from random states and let tokens skip visits at random. A column must then be able to wait for longer than
the runs are long, and must drop a wrong guess when its carry arrives.

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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments.records import keep  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.losses import IGNORE  # noqa: E402
from src.metrics import flops_per_token, format_params  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.model_config import ExitRule  # noqa: E402
from src.optim import learning_rate_factor, make_optimizers  # noqa: E402
from src.tasks.algorithms import Carries  # noqa: E402
from src.training.curves import (  # noqa: E402
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SKY,
    add_title,
    label_ends,
    new_figure,
    save_picture,
    style_axes,
)

TEST_SEED = 10**6  # far from the seeds of training
MODELS = ("loop", "plain_1", "plain_deep")
KL_THRESHOLDS = (1e-3, 1e-4)


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
        start_noise: as in TRMConfig, for the loop
        act_weight: weight of the halting loss
        act_threshold: halting probability above which a token stops
        patience: as in ExitRule, for halt and kl
        max_visits: most visits at test time
        processes: seeds and models that are trained at the same time, one thread each
        quick: tiny sizes, to test the script
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output: str = "runs/depth"
    max_steps: int = 500
    batch_size: int = 64
    lr: float = 4e-3
    d_model: int = 48
    columns: int = 32
    trained: int = 4
    tested: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28])
    test_rows: int = 100
    least_visits: int = 1
    most_visits: int = 8
    tail: float = 0.0
    attention_window: int = 2
    visit_dropout: float = 0.5
    start_noise: float = 1.0
    act_weight: float = 0.3
    act_threshold: float = 0.95
    patience: int = 2
    max_visits: int = 40
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
        hardest = Carries(self.columns).hardest
        for difficulty in (self.trained, *self.tested):
            if not 1 <= difficulty <= hardest:
                raise ValueError(f"a run of {difficulty} in {self.columns} columns: choose from 1 to {hardest}")
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
            start_noise=settings.start_noise,
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


def test(settings: DepthConfig, model: TRMModel) -> list[dict]:
    """Tests a model at each difficulty and, for the loop, on all of them together (difficulty `mixed`)."""
    task, rng = Carries(settings.columns), np.random.default_rng(TEST_SEED)
    records, runs = [], []
    for difficulty in settings.tested:
        batch = task.generate(settings.test_rows, difficulty, difficulty, rng)
        ids, record = torch.from_numpy(batch.inputs), {"difficulty": difficulty}
        if model.config.recursion == "none":
            with torch.no_grad():
                answers = model(ids).logits.argmax(-1).numpy()
            records.append(record | {"exact": exact(right_answers(answers, batch.targets))})
            continue
        runs.append(Run.of(settings, model, ids, batch.targets))
        records.append(record | runs[-1].figures())
    return records + [{"difficulty": "mixed"} | Run.join(runs).figures() for _ in runs[:1]]


def right_answers(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether each answer is right; true for tokens without one."""
    return (answers == targets) | (targets == IGNORE)


def exact(is_right: np.ndarray) -> float:
    """Share of rows (N, L) with every answer right."""
    return float(is_right.all(-1).mean())


class Run(NamedTuple):
    """What the loop did with N rows."""

    has_answer: np.ndarray  # (N, L)
    is_right: np.ndarray  # (visits, N, L): after each visit, if all tokens run on
    adaptive: dict[str, tuple[np.ndarray, np.ndarray]]  # {rule: (whether answers are right, depths of tokens)}, (N, L)

    @classmethod
    def of(cls, settings: DepthConfig, model: TRMModel, ids: torch.Tensor, targets: np.ndarray) -> "Run":
        """Runs the model without and with each exit rule."""
        most, patience = settings.max_visits, settings.patience
        rules = {"halt": ExitRule("halt", most, act_threshold=settings.act_threshold, patience=patience)}
        for threshold in KL_THRESHOLDS:
            rules[f"kl {threshold:g}"] = ExitRule("kl", most, kl_threshold=threshold, patience=patience)
        adaptive = {}
        with torch.no_grad():
            every = model(ids, exit=ExitRule(max_recursion_depth=most), return_steps=True)
            for name, rule in rules.items():
                out = model(ids, exit=rule)
                adaptive[name] = right_answers(out.logits.argmax(-1).numpy(), targets), out.carry.steps.numpy()
        return cls(targets != IGNORE, right_answers(every.logits.argmax(-1).numpy(), targets), adaptive)

    @classmethod
    def join(cls, runs: list["Run"]) -> "Run":
        """The rows of several runs together."""
        adaptive = {
            name: tuple(np.concatenate([run.adaptive[name][i] for run in runs]) for i in (0, 1))
            for name in runs[0].adaptive
        }
        is_right = np.concatenate([run.is_right for run in runs], axis=1)
        return cls(np.concatenate([run.has_answer for run in runs]), is_right, adaptive)

    def figures(self) -> dict:
        """Exact rows after each visit (all tokens run on), and exact rows and mean visits per answer of each rule."""
        most, answers = len(self.is_right), self.has_answer
        by_visit = [exact(right) for right in self.is_right]
        rules = {"full": {"exact": by_visit[-1], "visits": float(most)}}
        for name, (right, depths) in self.adaptive.items():
            rules[name] = {"exact": exact(right), "visits": float(depths[answers].mean())}
        fixed = min(most, int(np.ceil(rules["halt"]["visits"])))
        rules["fixed"] = {"exact": by_visit[fixed - 1], "visits": float(fixed)}
        shuffled = self.adaptive["halt"][1].copy()
        shuffled[answers] = np.random.default_rng(TEST_SEED).permutation(shuffled[answers])
        # number of last visits in which the answer stays right, counted backwards from the end
        stays_right = np.cumprod(self.is_right[::-1], axis=0).sum(0)
        for name, depths in (("random", shuffled), ("oracle", np.clip(most - stays_right + 1, 1, most))):
            right = np.take_along_axis(self.is_right, depths[None] - 1, axis=0)[0]
            rules[name] = {"exact": exact(right), "visits": float(depths[answers].mean())}
        enough = next(visit for visit, share in enumerate(by_visit, start=1) if share >= 0.99 * by_visit[-1])
        return {"exact": by_visit[-1], "by_visit": by_visit, "enough_visits": enough, "rules": rules}


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


def kept(records: Iterable[dict], settings: DepthConfig) -> Iterator[dict]:
    """Passes records on, and appends each to runs.jsonl as soon as it is there."""
    for record in records:
        keep(Path(settings.output) / "runs.jsonl", record | {"settings": asdict(settings)})
        print(f"{record['model']}, seed {record['seed']}: {record['train_s']:.0f} s of training", file=sys.stderr)
        yield record


def run_jobs(settings: DepthConfig) -> list[dict]:
    """Runs every model with every seed.  Returns their records in the order of MODELS, then seeds."""
    jobs = [(settings, name, seed) for name in ("loop", "plain_deep", "plain_1") for seed in settings.seeds]
    if settings.processes == 1:
        records = list(kept(map(job, jobs), settings))
    else:
        with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
            records = list(kept(pool.imap_unordered(job, jobs), settings))  # the longest jobs come first
    return sorted(records, key=lambda r: (MODELS.index(r["model"]), r["seed"]))


# ---- report ---------------------------------------------------------------------------------------------------------


def print_exact(records: list[dict], tested: list[int]):
    """Prints exact rows by difficulty, one line per model and seed."""
    print("exact rows by longest run of nines; for the loop after all its visits (s: seconds of training and test)")
    print(
        f"{'model':<11}{'seed':>5}{'params':>9}{'layers':>7}{'steps':>7}{'s':>5}" + "".join(f"{d:>7}" for d in tested)
    )
    for r in records:
        head = f"{r['model']:<11}{r['seed']:>5}{r['parameters']:>9,}{r['layers']:>7}{r['steps']:>7}"
        head += f"{r['train_s'] + r['test_s']:>5.0f}"
        print(head + "".join(f"{t['exact']:>7.3f}" for t in r["tests"] if t["difficulty"] != "mixed"))


def print_rules(loops: list[dict]):
    """Prints each rule's exact rows (mean of the seeds, then the worst seed) and mean visits per answer."""
    print("\nthe loop: exact rows (worst seed) and mean visits per answer under each exit rule")
    names = list(loops[0]["tests"][0]["rules"])
    print(f"{'run':>5}{'99 % at':>9}" + "".join(f"{name:>20}" for name in names))
    for tests in zip(*(r["tests"] for r in loops)):
        cells = []
        for name in names:
            values = [t["rules"][name]["exact"] for t in tests]
            visits = statistics.fmean(t["rules"][name]["visits"] for t in tests)
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f}) {visits:4.1f}")
        enough = max(t["enough_visits"] for t in tests)
        print(f"{tests[0]['difficulty']:>5}{enough:>9}" + "".join(f"{cell:>20}" for cell in cells))


def draw(settings: DepthConfig, records: list[dict], path: Path) -> Path:
    """Draws exact rows by difficulty and visits with the mean depth of the halting head, and beside it all models."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    loops = [r for r in records if r["model"] == "loop"]
    tested, most = np.array(sorted(settings.tested)), settings.max_visits
    by_visit = np.mean([[t["by_visit"] for t in in_order(r)] for r in loops], axis=0)  # (difficulties, visits)
    middles = (tested[1:] + tested[:-1]) / 2
    edges = np.concatenate(([tested[0] - 0.5], middles, [tested[-1] + 0.5 * max(1, tested[-1] - middles[-1])]))
    figure, grid = new_figure(4.4)
    heat, lines = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    style_axes(heat, "exact answers of the loop")
    heat.grid(False)
    colours = LinearSegmentedColormap.from_list("exact", ("#ffffff", "#d3e6f2", SKY, BLUE))
    mesh = heat.pcolormesh(np.arange(0.5, most + 1), edges, by_visit, cmap=colours, vmin=0, vmax=1, rasterized=True)
    trained = Rectangle(
        (0.5, edges[0]), settings.most_visits, settings.trained + 0.5 - edges[0], fill=False, ec=INK, lw=1.4, zorder=4
    )
    heat.add_patch(trained)
    beside = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold"}
    heat.annotate("trained", (settings.most_visits + 0.5, edges[0]), (5, 4), color="white", **beside)
    visits = np.mean([[t["rules"]["halt"]["visits"] for t in in_order(r)] for r in loops], axis=0)
    heat.plot(visits, tested, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5, zorder=5)
    halo = [withStroke(linewidth=3, foreground="white", alpha=0.7)]
    text = "mean visits with\nthe halting head"
    heat.annotate(text, (visits[-1], tested[-1]), (8, -4), color=ORANGE, va="top", path_effects=halo, **beside)
    heat.set(xlim=(0.5, most + 0.5), ylim=(edges[0], edges[-1]))
    bar = figure.colorbar(mesh, ax=heat, location="bottom", aspect=40, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors="#555555", length=0)
    label(heat, "visits", "longest run of nines (sequential steps)")
    draw_models(settings, records, lines)
    title = f"Trained on runs of up to {settings.trained}, tested up to {tested[-1]}"
    add_title(figure, title, f"mean of {len(loops)} seed{'s' * (len(loops) > 1)}")
    return save_picture(figure, path)


def draw_models(settings: DepthConfig, records: list[dict], axes):
    """Draws exact rows against difficulty: a faint line per seed, a strong one for the mean of each model."""
    style_axes(axes, "exact answers by model")
    axes.axvspan(0.5, settings.trained + 0.5, color="#f0f0f0", zorder=0)
    axes.annotate("trained", (settings.trained + 0.5, 0), (4, 3), textcoords="offset points", fontsize=9)
    ends = []
    for model, color in zip(MODELS, (BLUE, GREEN, ORANGE)):
        seeds = [r for r in records if r["model"] == model]
        curves = np.array([[(t["difficulty"], t["exact"]) for t in in_order(r)] for r in seeds])
        for curve in curves:
            axes.plot(*curve.T, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*curves.mean(0).T, color=color, linewidth=1.8)
        layers, parameters = seeds[0]["layers"], format_params(seeds[0]["parameters"])
        name = "loop" if model == "loop" else f"plain, {layers} layer{'s' * (layers > 1)}"
        ends.append((curves[:, -1, 1].mean(), f"{name}\n{parameters}", color))
    axes.set(xlim=(0.5, max(settings.tested)), ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    label_ends(axes, ends, lines=2)
    label(axes, "longest run of nines (sequential steps)", "")


def in_order(record: dict) -> list[dict]:
    """The tests of a record by difficulty, without the mixed one."""
    return sorted((t for t in record["tests"] if t["difficulty"] != "mixed"), key=lambda t: t["difficulty"])


def label(axes, x: str, y: str):
    axes.set_xlabel(x, fontsize=9, color="#555555")
    axes.set_ylabel(y, fontsize=9, color="#555555")


def main(argv=None) -> int:
    (settings,) = parse_flags(__doc__, DepthConfig, argv=argv)
    folder, start = Path(settings.output), time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; name a folder") from None
    records = run_jobs(settings)
    loops = [r for r in records if r["model"] == "loop"]
    print_exact(records, settings.tested)
    print_rules(loops)
    picture = draw(settings, records, folder / "heat_map.png")
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{picture}, {minutes:.1f} minutes")
    print(json.dumps({"experiment": "depth", "minutes": minutes, "settings": asdict(settings), "runs": records}))
    return 0


if __name__ == "__main__":
    run(main)
