"""Tiny training runs for tests: the fixture `make`, and comparisons of the files that runs write."""

import dataclasses
import json

import pytest
import torch

from src.checkpoint import load_state
from src.model import TRMConfig, TRMModel
from src.tasks.puzzle_config import PuzzleSettings
from src.training.create import create_trainer
from src.training.curves import scan_metrics
from src.training.train_config import Settings

TINY = {
    **{"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "max_seq_len": 16, "tokenizer": "byte"},
    **{"batch_size": 8, "max_steps": 8, "warmup_steps": 2, "lr": 3e-3, "eval_batches": 0, "log_every": 1},
    **{"sample_tokens": 0, "compile": False, "device": "cpu", "precision": "fp32"},
}

TINY_PUZZLES = {
    **{"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "latent_steps": 1, "deep_steps": 1},
    **{"supervision_steps": 3, "batch_size": 8, "max_steps": 12, "warmup_steps": 2, "eval_batches": 2, "log_every": 1},
    **{"eval_every": 6, "save_every": 4, "compile": False, "device": "cpu", "precision": "fp32"},
    **{"n_puzzles": 120, "symmetries": "relabel", "explore": 0.5},
}


def trainer_of(values):
    """A Trainer with the settings {name: value}; all others have their defaults."""
    return create_trainer(_settings(Settings, values))


def run_settings(values) -> Settings:
    """The settings {name: value} of a tiny run; others are those of TINY, or have their defaults."""
    return _settings(Settings, {**TINY, **values})


def puzzle_model(kind, seed=0, **changes) -> TRMModel:
    """A model of random weights whose answers and halting logits differ from board to board and from step to step."""
    torch.manual_seed(seed)
    settings = {"d_model": 16, "n_heads": 2, "n_layers": 1, "latent_steps": 1, "deep_steps": 1, "supervision_steps": 5}
    settings |= {"max_seq_len": kind.cells, "vocab_size": kind.vocab_size, "pad_token_id": 0}
    model = TRMModel(TRMConfig(**(settings | {"causal": False, "positions": "learned"} | changes)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
        if model.q_head is not None:  # whose weights start at 0
            model.q_head.weight.normal_(std=0.5)
            model.q_head.bias.zero_()
    return model.eval()


def puzzle_settings(values) -> PuzzleSettings:
    """The settings {name: value} of a run on puzzles; all others have their defaults."""
    return _settings(PuzzleSettings, values)


def _settings(kind, values):
    classes = kind.__annotations__.values()
    names = [{f.name for f in dataclasses.fields(c) if f.init} for c in classes]
    assert values.keys() <= set().union(*names), "no such settings"
    return kind(*(cls(**{name: values[name] for name in own & values.keys()}) for cls, own in zip(classes, names)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Settings for a small corpus of short documents, with a token cache that all tests share."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, numbers in (("train", range(120)), ("valid", range(120, 150))):
        lines = (json.dumps({"text": f"def f{n}(x):\n    return x{' + x' * (n % 7)}\n"}) + "\n" for n in numbers)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    paths = {f"{name}_paths": [str(folder / f"{name}.jsonl")] for name in ("train", "valid")}
    return {**paths, "cache_dir": str(folder / "cache")}


@pytest.fixture
def make(corpus, tmp_path, monkeypatch):
    """make(name, **settings): a Trainer for a tiny run in the folder tmp_path/name.

    It draws a learning curve only with draws=True, because drawing takes longer than a tiny run."""

    def make(name="run", draws=False, **changes):
        if not draws:
            monkeypatch.setattr("src.training.monitor.plot_learning_curve", lambda *args: None)
        return trainer_of({**TINY, **corpus, "save_dir": str(tmp_path / name), **changes})

    return make


def read_metrics(folder):
    """All records in folder/metrics.jsonl, as a list."""
    return [record for record, _ in scan_metrics(folder)]


def during(trainer, step, action):
    """Call `action` at the end of the given training step."""
    train_step = trainer.train_step

    def with_action(batch):
        train_step(batch)
        if trainer.step == step:
            action()

    trainer.train_step = with_action


def same(a, b):
    """Whether two nests of tensors, numbers and containers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_checkpoints(a, b):
    """Assert that two checkpoints are equal: weights, averaged weights and all state, except for times."""
    for name in ("model.safetensors", "ema.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = load_state(a), load_state(b)
    for state in states:
        state.pop("elapsed")
        state["window"].pop("seconds")
    assert same(*states)
