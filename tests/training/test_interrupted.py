"""Signals to train_trm_lm.py: the run ends with a complete checkpoint, whatever it is doing."""

import os
import signal
import time

import pytest
from scripts import SMALL, start

from src.checkpoint import load_model, load_state

pytest_plugins = "scripts"  # the fixtures home and data


def until(condition, child, seconds=240):
    """Wait until the condition holds or the child has ended."""
    end = time.monotonic() + seconds
    while not condition() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


MOMENTS = {
    "a checkpoint a step": (["--save_every", 1, "--eval_every", 1000], lambda f: (f / "last").exists()),
    "an evaluation a step": (["--save_every", 7, "--eval_every", 1], lambda f: lines_of(f) > 6),
    "workers": (["--num_workers", 1, "--save_every", 3, "--log_every", 1], lambda f: lines_of(f) > 20),
}


class TestInterrupted:
    @pytest.mark.parametrize(
        ("moment", "number"),
        [
            ("a checkpoint a step", signal.SIGINT),
            pytest.param("a checkpoint a step", signal.SIGTERM, marks=pytest.mark.slow),
            pytest.param("an evaluation a step", signal.SIGINT, marks=pytest.mark.slow),
            ("an evaluation a step", signal.SIGTERM),
            pytest.param("workers", signal.SIGINT, marks=pytest.mark.slow),
            pytest.param("workers", signal.SIGTERM, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_ends_with_a_checkpoint(self, data, tmp_path, moment, number):
        """The signal goes to the whole process group, as with Ctrl-C in a terminal."""
        more, ready = MOMENTS[moment]
        words = ["train_trm_lm.py", *SMALL, *data, "--save_dir", tmp_path / "run", "--max_steps", 10**6, *more]
        child = start(*words, start_new_session=True)
        until(lambda: ready(tmp_path / "run"), child)
        os.killpg(child.pid, number)
        try:
            out, err = child.communicate(timeout=120)
        finally:
            child.kill()
        assert child.returncode == 0 and out == "" and "Traceback" not in err, err[-2000:]
        told = next(line for line in err.replace("\r", "\n").splitlines() if line.startswith("stopped by"))
        step = load_state(tmp_path / "run" / "last")["step"]
        assert f"stopped by {signal.Signals(number).name} after step {step}" in told
        load_model(tmp_path / "run" / "last")

    @pytest.mark.slow
    @pytest.mark.parametrize("wait", [0.5, 2.0, 3.5, 5.0])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_at_any_moment(self, data, tmp_path, wait, number):
        """This includes imports and data preparation: afterwards there is no checkpoint, or a complete one."""
        words = ["train_trm_lm.py", *SMALL, *data, "--save_dir", tmp_path / "run", "--max_steps", 10**6]
        child = start(*words, "--save_every", 1, "--keep_checkpoints", 1)
        time.sleep(wait)
        child.send_signal(number)
        try:
            child.communicate(timeout=120)
        finally:
            child.kill()
        if (tmp_path / "run" / "last").is_symlink():
            load_model(tmp_path / "run" / "last")
            load_state(tmp_path / "run" / "last")
