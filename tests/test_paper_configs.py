"""The recipes with the settings of the TRM paper: their values, and short runs at full form but tiny width."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import assert_same_checkpoints, during, read_metrics

import train_puzzles
from src.checkpoint import load_network, load_state
from src.metrics import count_parameters
from src.model import TRMModel
from src.tasks import mazes, sudoku
from src.tasks.arc import NO_ID, read_tasks
from src.tasks.arc_votes import Votes, pass_at, submission
from src.tasks.puzzle_config import model_config
from src.tasks.puzzle_folder import kind_named, read_folder, write_arc_folder, write_folder
from src.tasks.puzzle_trainer import create_puzzle_trainer
from src.tasks.puzzles import split_by_orbit

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = ("sudoku_extreme", "maze_hard", "arc")


def parsed(name, *words):
    return train_puzzles.parse_args(["--config", str(CONFIGS / f"{name}.yaml"), *words])


# ---- values ----


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_authors(name):
    """Facts of the authors' code, and of the commands in its README."""
    settings, is_arc, is_sudoku = parsed(name), name == "arc", name == "sudoku_extreme"
    train, puzzle, model = settings.train, settings.puzzle, settings.model
    kind = kind_named(puzzle.puzzle)
    config = model_config(model, kind.cells, kind.vocab_size)
    assert (config.d_model, config.n_heads, config.n_layers) == (512, 8, 2)
    assert (config.norm, config.norm_gain) == ("post", False)
    assert (config.deep_steps, config.latent_steps, config.supervision_steps) == (3, 6 if is_sudoku else 4, 16)
    assert (config.grad_deep_steps, config.n_kv_heads, config.injection) == (1, 8, "sum")
    assert (config.prefix_tokens, config.puzzle_dim, config.puzzle_ids) == (16, 512, 800_801 if is_arc else 1)
    assert config.d_ff == 1536 == -(-round(4 * 512 * 2 / 3) // 256) * 256
    if is_sudoku:
        assert (config.mixer, config.positions) == ("mlp", "none")
        assert config.mixer_ff == 512 == -(-round(4 * 97 * 2 / 3) // 256) * 256
    else:
        assert (config.mixer, config.positions, config.rope_theta) == ("attention", "rope", 10000.0)
    assert (config.token_loss, config.loss_mean, config.act_weight) == ("stablemax", "row", 0.5)
    assert (config.weight_init, config.embed_scale**2, config.norm_eps) == ("truncated", pytest.approx(512), 1e-5)
    assert (train.batch_size, train.optimizer, train.lr, train.beta2) == (768, "adamw", 1e-4, 0.95)
    assert (train.warmup_steps, train.schedule, train.grad_clip, train.ema_decay) == (2000, "constant", 0, 0.999)
    decay = 0.1 if is_arc else 1.0
    assert (train.weight_decay, puzzle.puzzle_weight_decay) == (decay, decay)
    assert (puzzle.puzzle_lr, puzzle.explore) == (1e-2 if is_arc else 1e-4, 0.1)
    per_epoch, epochs = (3081, 100_000) if is_arc else (1000, 50_000)
    assert train.max_steps == epochs * per_epoch // 768


def test_the_model_has_the_authors_size():
    """5.0 million weights with the mlp mixer, 6.8 million with attention; the paper says 5 M and 7 M."""
    sizes = {}
    for name in NAMES:
        settings = parsed(name)
        kind = kind_named(settings.puzzle.puzzle)
        with torch.device("meta"):
            model = TRMModel(model_config(settings.model, kind.cells, kind.vocab_size))
        counts = count_parameters(model)
        sizes[name] = counts["total"] - counts["per_module"]["puzzle_embed"]
    assert sizes == {"sudoku_extreme": 5_028_353, "maze_hard": 6_822_401, "arc": 6_828_545}


# ---- short runs ----

TINY = "--d_model 16 --n_heads 2 --d_ff 32 --batch_size 4 --compile false --precision fp32 --device cpu"
TINY += " --eval_batches 1 --log_every 1"


def write_sudoku(folder):
    """20 puzzles with three augmentations each to train, and some to test."""
    kind, grids = sudoku.Sudoku(9), sudoku.generate(9, 24, (30, 40), seed=0)
    train, test = split_by_orbit(kind, grids, 0.2, seed=0)
    train = train.take(np.repeat(np.arange(train.n_rows), 4))
    inputs, labels = kind.augment(np.random.default_rng(0), train.inputs, train.labels)
    write_folder(folder, kind, train._replace(inputs=inputs, labels=labels), test)


def write_maze(folder):
    kind = kind_named("maze30x30")
    write_folder(folder, kind, *split_by_orbit(kind, mazes.generate(30, 30, 12, (20, 225), 0), 0.25, 0))


def write_arc(folder):
    """Three tasks whose output is the upper row of the input; the last one is the test."""
    rng, beside = np.random.default_rng(0), folder.parent

    def pair(width):
        colours = rng.integers(1, 5, size=(3, width))
        return {"input": colours.tolist(), "output": colours[:1].tolist()}

    def task(width):
        return {"train": [pair(width) for _ in range(3)], "test": [pair(width)]}

    tasks = {name: task(width) for name, width in zip("abc", (2, 3, 4))}
    for part, names in (("train", "ab"), ("test", "c")):
        (beside / f"{part}.json").write_text(json.dumps({name: tasks[name] for name in names}))
    write_arc_folder(folder, [beside / "train.json"], [beside / "test.json"], n_augmentations=5)


WRITERS = {"sudoku_extreme": write_sudoku, "maze_hard": write_maze, "arc": write_arc}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function: start(name, run, steps, *words) -> trainer of a recipe at full form but tiny width."""
    monkeypatch.setattr("src.training.monitor.plot_learning_curve", lambda *args: None)

    def make(name, run, steps, *words):
        folder = tmp_path / "data"
        if not folder.exists():
            WRITERS[name](folder)
        own = ["--train_paths", str(folder), "--save_dir", str(tmp_path / run), "--max_steps", str(steps)]
        ids = ["--puzzle_ids", "19"] if name == "arc" else []
        own += ["--eval_every", str(max(1, steps // 2)), "--save_every", str(max(1, steps // 3))]
        return create_puzzle_trainer(parsed(name, *TINY.split(), *own, *ids, *words))

    return make


def run_and_resume(start, name, steps, *words):
    """A run without a break equals one that stops after a third and resumes; returns the folder of its checkpoint."""
    straight = start(name, "straight", steps, *words)
    straight.train()
    first = start(name, "broken", steps, *words)
    during(first, max(1, steps // 3), lambda: signal.raise_signal(signal.SIGTERM))
    first.train()
    second = start(name, "broken", steps, *words, "--resume")
    assert second.step == max(1, steps // 3)
    second.train()
    assert_same_checkpoints(straight.folder / "last", second.folder / "last")
    rates = [record["lr"] for record in read_metrics(second.folder) if "loss" in record]
    assert rates == pytest.approx([1e-4 * (step + 1) / 2000 for step in range(steps)])
    return second.folder / "last"


def vote(checkpoint, data):
    """Solves every augmentation of the test tasks of a folder; returns (votes, tasks)."""
    model, folder, votes = load_network(checkpoint), read_folder(data), Votes()
    tasks = read_tasks(data / "test_puzzles.json")
    inputs, ids = (torch.from_numpy(array.astype(np.int64)) for array in (folder.test.inputs, folder.test.puzzle_ids))
    with torch.no_grad():
        out = model(inputs, puzzle_ids=ids)
    answers, halts = out.logits.argmax(-1).numpy().astype(np.uint8), out.halt_logits.sigmoid()
    for row in range(folder.test.n_rows):
        name = folder.names[ids[row]]
        assert name != NO_ID
        votes.add(name, folder.test.inputs[row], answers[row], float(halts[row]))
    return votes, tasks


def check_votes(votes, tasks, n_augmentations):
    (task,) = tasks
    candidates = votes.ranked(task.name, task.test[0][0])
    assert sum(candidate.count for candidate in candidates) == 1 + n_augmentations
    assert 0 <= pass_at(votes, tasks, (1, 2))[2] <= 1
    attempts = submission(votes, tasks)
    assert set(attempts) == {"c"} and set(attempts["c"][0]) == {"attempt_1", "attempt_2"}


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_and_a_resume(start, tmp_path, name):
    words = ["--deep_steps", "2", "--latent_steps", "1", "--supervision_steps", "2"]
    folder = run_and_resume(start, name, 3, *words)
    state = load_state(folder)
    assert len(state["optimizers"]) == 2 and state["optimizers"][1]["state"] == {}
    table = load_network(folder, ema=False).puzzle_embed.weight
    largest = parsed(name).puzzle.puzzle_lr * (1 + 2 + 3) / 2000
    assert 0 < table.abs().max() <= largest * 1.0001
    read = (table != 0).any(1).nonzero().squeeze(1).tolist()
    if name != "arc":
        assert read == [0]
    else:
        assert read and 0 not in read
        check_votes(*vote(folder, tmp_path / "data"), n_augmentations=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_steps_and_a_resume(start, tmp_path, name):
    """All visits and steps of the recipe."""
    folder = run_and_resume(start, name, 100, "--batch_size", "2", "--n_heads", "1")
    model = load_network(folder)
    assert (model.config.deep_steps, model.config.supervision_steps) == (3, 16)
    records = [record for record in read_metrics(folder.parent) if "loss" in record]
    assert all(np.isfinite(record["loss"]) for record in records)
    if name == "arc":
        check_votes(*vote(folder, tmp_path / "data"), n_augmentations=5)
