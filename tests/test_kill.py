"""SIGKILL at random moments: resumed each time, a run ends with the weights of the unbroken one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import TINY, assert_same_checkpoints

from src.curves import read_metrics

pytest_plugins = "training"  # the fixture corpus
PATHS = {"tokenized": {}, "streaming": {"streaming": True, "shuffle_buffer": 20}}


def kill_again_and_again(tmp_path, corpus, kills, longest, **changes):
    """The unbroken run's folder, the broken one's, and how many kills came while a checkpoint was written."""
    settings = {**TINY, **corpus, "dropout": 0.2, "num_workers": 2, "save_every": 10, "eval_every": 50, **changes}
    found = []
    for name, number in (("straight", 0), ("broken", kills)):
        settings["save_dir"] = str(tmp_path / name)
        spec = tmp_path / f"{name}.json"
        spec.write_text(json.dumps({"settings": settings, "kills": number, "longest": longest, "seed": 7}))
        command = [sys.executable, str(Path(__file__).parent / "kill_runs.py"), str(spec)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:] + (tmp_path / f"{name}.log").read_text()[-2000:]
        found.append(json.loads(done.stdout))
    return tmp_path / "straight", tmp_path / "broken", found[1]["torn"]


def assert_same_runs(straight, broken, steps):
    assert_same_checkpoints(straight / "last", broken / "last")
    logs = [[(r["step"], r["loss"]) for r in read_metrics(folder) if "loss" in r] for folder in (straight, broken)]
    assert logs[0] == logs[1] and [step for step, _ in logs[1]] == list(range(1, steps + 1))
    drawn = [[r["step"] for r in read_metrics(folder) if "valid_loss" in r] for folder in (straight, broken)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("path", PATHS)
def test_killed_three_times(tmp_path, corpus, path):
    straight, broken, _ = kill_again_and_again(tmp_path, corpus, 3, 0.3, max_steps=150, **PATHS[path])
    assert_same_runs(straight, broken, 150)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_killed_25_times(tmp_path, corpus, path):
    """A run of at least 30 s (at 100 steps a second, far fewer here); some kills tear a checkpoint that is written."""
    settings = {"max_steps": 3000, "save_every": 3, "keep_checkpoints": 3, **PATHS[path]}
    straight, broken, torn = kill_again_and_again(tmp_path, corpus, 25, 1.0, **settings)
    assert_same_runs(straight, broken, 3000)
    assert torn > 0
