"""SIGKILL at random moments: after resumes, a run ends with the same weights as an uninterrupted run, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import TINY, assert_same_checkpoints, read_metrics

pytest_plugins = "trainers"  # the fixture corpus
PATHS = {"tokenized": {}, "streaming": {"streaming": True, "shuffle_buffer": 20}}


def kill_again_and_again(tmp_path, corpus, kills, longest, draws, paths, **changes):
    """Run in tmp_path/straight-PATH and, with kills, broken-PATH.  Returns {path: kills during a checkpoint write}."""
    settings = {**TINY, **corpus, "dropout": 0.2, "num_workers": 2, "save_every": 10, "eval_every": 50, **changes}
    specs = [
        {
            **{"settings": {**settings, **PATHS[path], "save_dir": str(tmp_path / f"{name}-{path}")}, "kills": n},
            **{"longest": longest, "draws": draws},
        }
        for path in paths
        for name, n in (("straight", 0), ("broken", kills))
    ]
    spec = tmp_path / "runs.json"
    spec.write_text(json.dumps(specs))
    command = [sys.executable, str(Path(__file__).parent / "kill_runs.py"), str(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    logs = "".join(log.read_text()[-1000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    return dict(zip(paths, json.loads(done.stdout)[1::2]))


def assert_same_runs(tmp_path, path, steps):
    straight, broken = (tmp_path / f"{name}-{path}" for name in ("straight", "broken"))
    assert_same_checkpoints(straight / "last", broken / "last")
    logs = [[(r["step"], r["loss"]) for r in read_metrics(folder) if "loss" in r] for folder in (straight, broken)]
    assert logs[0] == logs[1] and [step for step, _ in logs[1]] == list(range(1, steps + 1))
    judged = [[r["step"] for r in read_metrics(folder) if "valid_loss" in r] for folder in (straight, broken)]
    samples = [folder.joinpath("samples.txt").read_text() for folder in (straight, broken)]
    assert judged[0] == judged[1] and samples[0] == samples[1]


@pytest.mark.parametrize("path", ["tokenized", pytest.param("streaming", marks=pytest.mark.slow)])
def test_killed_twice(tmp_path, corpus, path):
    small = {"latent_steps": 1, "deep_steps": 1, "max_steps": 80, "eval_every": 40}
    kill_again_and_again(tmp_path, corpus, 2, 0.08, False, [path], **small)
    assert_same_runs(tmp_path, path, 80)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_killed_25_times(tmp_path, corpus, path):
    """The run is long enough (30 s or more) that some kills interrupt the writing of a checkpoint."""
    settings = {"max_steps": 3000, "save_every": 3, "keep_checkpoints": 3}
    torn = kill_again_and_again(tmp_path, corpus, 25, 1.0, True, [path], **settings)
    assert_same_runs(tmp_path, path, 3000)
    assert torn[path] > 0
