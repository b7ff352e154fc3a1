"""Shared by all tests: checks the type annotations of `src` at run time, and builds tiny models with random weights."""

import itertools
import os
import random
import sys
from pathlib import Path

# Before torch, and whatever the user has set: for tiny tensors, threads cost more time than they save. Some tests fork,
# and a forked child hangs if GNU OpenMP has started several threads.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import annotations  # noqa: E402

annotations.install()  # before anything of src is imported

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from src.model import TRMConfig, TRMModel  # noqa: E402

pytest.register_assert_rewrite("scripts", "trainers")  # fixtures that several files share


def kernels() -> str:
    """Returns which CPU kernels torch uses in this process, and whether oneDNN has kernels for bf16."""
    has_onednn = torch.backends.mkldnn.is_available()
    bf16 = "with" if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()}, {bf16} bf16 in oneDNN"


def pytest_terminal_summary(terminalreporter):
    """Print which kernels the tests ran with (see tests/test_kernels.py), and whether a test worker died."""
    reports = [r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport)]
    lower = dict.fromkeys(value for report in reports for key, value in report.user_properties if key == "kernels")
    others = f"; in processes of their own: {', '.join(lower)}" if lower else ""
    terminalreporter.write_line(f"kernels: {kernels()}{others}")
    if any(report.when == "???" for report in reports):  # pytest-xdist marks a dead worker in this way
        terminalreporter.write_line("a test worker died: tests that had not begun were not run")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(1234)


@pytest.fixture
def unchecked():
    """Annotations are not checked inside this test: torch.compile cannot trace the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TINY = {"vocab_size": 23, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24, "max_seq_len": 16}


def build(seed=0, dtype=torch.float32, **settings):
    """Returns a tiny TRMModel in eval mode.

    All weights are random, also those that start as 0 or 1 (norms, halting head). A term that is left out of an
    equation, or is in the wrong place, then changes the output."""
    torch.manual_seed(seed)
    model = TRMModel(TRMConfig(**{**TINY, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        if model.puzzle_embed is not None:
            model.puzzle_embed.weight.normal_()
        for name, parameter in model.named_parameters():
            if name.endswith("head_gate.weight"):
                parameter.normal_(std=model.config.d_model**-0.5)
        if model.config.halting:
            model.q_head.weight.normal_(std=0.5)
            model.q_head.bias.fill_(0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny():
    """`build`, as a fixture."""
    return build


# Options of the model with their values. Tests run each value in every family and with each value of other options.
AXES = {
    "norm": ("post", "pre", "sandwich"),
    "injection": ("sum", "concat"),
    "gate": (False, True),
    "prelude_layers": (0, 1),
    "coda_layers": (0, 1),
    "n_kv_heads": (4, 2, 1),
    "positions": ("rope", "learned", "none"),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "attention_gate": (False, True),
    "norm_gain": (True, False),
    "attention_window": (None, 3),
}
TRAINING_AXES = {
    "full_bptt": (False, True),
    "supervision_weights": ("equal", "linear", "last", "0.3,1.0"),
    "act_target": ("correct", "stable"),
    "act_weight": (0.5, 1.0),
    "grad_deep_steps": (None, 2),
    "latent_steps": (1, 2),
    "deep_steps": (2, 3),
    "supervision_steps": (2, 3),
    "rope_theta": (10000.0, 50.0),
    "rope_scaling": (None, 2.5),
    "loss_mean": ("token", "row"),
    "token_loss": ("softmax", "stablemax"),
    "weight_init": ("normal", "truncated"),
}
TRAINING_SINGLES = [{"recursion": "trm", key: value} for key in TRAINING_AXES for value in TRAINING_AXES[key][1:]]

FAMILIES = ("trm", "loop", "none")


def pairwise(axes):
    """Returns settings in which every value occurs in every family, and together with every value of other options.

    The families with the first value of every option come first. The others are drawn one after the other: of many
    random settings, the one that has the most pairs of values that are still missing."""
    rng, axes = random.Random(0), {"recursion": FAMILIES} | axes
    items = [[(key, value) for value in values] for key, values in axes.items()]
    missing = {pair: None for a, b in itertools.combinations(items, 2) for pair in itertools.product(a, b)}  # in order

    def draw():
        return dict(rng.choice(values) for values in items) | dict(next(iter(missing)))

    def added(settings):
        return [pair for pair in itertools.combinations(settings.items(), 2) if pair in missing]

    chosen = [{"recursion": family} | {key: axes[key][0] for key in list(axes)[1:]} for family in FAMILIES]
    covered = {pair for settings in chosen for pair in added(settings)}
    while missing := {pair: None for pair in missing if pair not in covered}:
        chosen.append(max((draw() for _ in range(50)), key=lambda settings: len(added(settings))))
        covered = set(added(chosen[-1]))
    return chosen


def mixtures(axes, number, seed):
    """Returns `number` settings: families take turns, and the value of every other option is drawn at random."""
    rng = random.Random(seed)
    families = itertools.cycle(("trm", "loop", "trm", "none"))
    return [{"recursion": next(families)} | {key: rng.choice(axes[key]) for key in axes} for _ in range(number)]


def singles(axes):
    """Returns, for each family, the defaults and every setting in which one option has another than its first value."""
    changes = [{}] + [{key: value} for key in axes for value in axes[key][1:]]
    return [{"recursion": family} | change for family in FAMILIES for change in changes]


def name(settings):
    return "-".join(str(value) if key == "recursion" else f"{key}={value}" for key, value in settings.items())


def batch(rows=2, length=6, seed=3):
    """Returns random ids and targets; two of the targets are missing (-100)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY["vocab_size"], (rows, length), generator=generator)
    targets = torch.randint(0, TINY["vocab_size"], (rows, length), generator=generator)
    targets[0, 1] = targets[-1, -1] = -100
    return ids, targets
