"""Failures in a long run: the last complete checkpoint is kept, and a one-line message gives the cause."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainers import TINY, during, read_metrics, same

from src.checkpoint import load_model, load_state, own_state, read_weights
from src.errors import UserError
from src.training import run_folder

pytest_plugins = "trainers"  # the fixtures make and corpus
ROOT = Path(__file__).resolve().parent.parent


def poison(trainer, steps):
    """Make the loss of some steps NaN, as a broken number in a batch would."""
    loss = trainer.raw.token_loss

    def poisoned(logits, targets):
        value, is_right = loss(logits, targets)
        return value * (float("nan") if trainer.step in steps else 1.0), is_right

    trainer.raw.token_loss = poisoned


class TestNotFinite:
    def test_the_step_is_skipped_and_counted(self, make, capsys):
        trainer = make(dropout=0.1)
        poison(trainer, {3})
        before = []
        during(trainer, 3, lambda: before.append({n: t.clone() for n, t in own_state(trainer.raw).items()}))
        during(trainer, 4, lambda: before.append({n: t.clone() for n, t in own_state(trainer.raw).items()}))
        trainer.train()
        assert same(before[0], before[1])
        assert trainer.step == 8 and trainer.skipped == 1
        assert all(t.isfinite().all() for t in read_weights(trainer.folder / "last" / "ema.safetensors").values())
        assert [r["skipped"] for r in read_metrics(trainer.folder) if "skipped" in r] == [0, 0, 0, 1, 1, 1, 1, 1]
        assert [r["step"] for r in read_metrics(trainer.folder) if r.get("loss", 1) is None] == [4]  # logged as null
        assert "step 4: the gradient is not finite, skipped (1 so far)" in capsys.readouterr().err

    def test_many_in_a_row_end_the_run(self, make):
        trainer = make(save_every=2, max_skipped=3)
        poison(trainer, {2, 4, 5, 6})
        with pytest.raises(UserError, match="step 7: .* 3 times in a row.*step_00000006; try a smaller --lr"):
            trainer.train()
        assert load_state(trainer.folder / "last")["skipped"] == 3
        assert all(t.isfinite().all() for t in load_model(trainer.folder / "last")[0].parameters())

    def test_many_in_a_row_end_a_resumed_run_too(self, make):
        settings = {"save_every": 1, "max_skipped": 3}
        trainer = make(**settings)
        poison(trainer, {2, 3, 4})
        during(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer.train()
        assert load_state(trainer.folder / "last")["skipped_in_a_row"] == 2
        again = make(**settings, resume=True)
        poison(again, {2, 3, 4})
        with pytest.raises(UserError, match="step 5: .* 3 times in a row"):
            again.train()

    def test_all_updates_of_one_step_count_once(self, make):
        trainer = make(optimizer_step="supervision", supervision_steps=4, max_skipped=2, max_steps=4)
        poison(trainer, {1})
        trainer.train()
        assert trainer.step == 4 and trainer.skipped == 4


class TestDiverged:
    def test_weights_that_are_not_finite_are_not_saved(self, make):
        """The gradient of the last step was finite, but the updated weights are not."""
        trainer = make(save_every=4)
        during(trainer, 8, lambda: next(trainer.raw.parameters()).data.fill_(float("nan")))
        with pytest.raises(UserError, match="step 8: weights are not finite.*step_00000004; try a smaller --lr"):
            trainer.train()
        assert load_state(trainer.folder / "last")["step"] == 4


class TestTwoAtOnce:
    def test_two_that_begin_in_one_folder(self, make, tmp_path):
        """The second run is refused and changes nothing, while the first is running and after it has ended."""
        first = run_folder.start(tmp_path / "run", {"seed": 1})
        hold = "import pathlib, sys; from src.training.run_folder import start\n"
        hold += "start(pathlib.Path(sys.argv[1]), {'seed': 2})"
        words = [sys.executable, "-c", hold, tmp_path / "run"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f"in use by another run (process {os.getpid()})" in done.stderr
        first.release()
        with pytest.raises(UserError, match="holds a run"):
            run_folder.start(tmp_path / "run", {"seed": 2})
        assert run_folder.settings_of(tmp_path / "run") == {"seed": 1}

    def test_a_lock_that_cannot_be_written(self, tmp_path):
        (tmp_path / ".lock").mkdir()
        with pytest.raises(UserError, match="by its .lock: Is a directory"):
            run_folder.RunLock(tmp_path)

    def test_another_process_is_refused(self, make, tmp_path):
        make().train()
        hold = "import sys, pathlib; from src.training.run_folder import RunLock\n"
        hold += "lock = RunLock(pathlib.Path(sys.argv[1]));"
        hold += "print('held', flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run"], cwd=ROOT, **pipes) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=rf"run is in use by another run \(process {other.pid}\)"):
                make(resume=True)
            other.kill()
        assert make(resume=True).step == 8  # the lock of a dead process is free


class TestDisk:
    def test_full(self, make, corpus, tmp_path):
        """A limit on file sizes acts like a full disk: exit code 2, and the previous checkpoint is intact."""
        trainer = make(save_every=4)
        during(trainer, 4, lambda: signal.raise_signal(signal.SIGINT))
        trainer.train()
        folder = tmp_path / "run"
        size = (folder / "last" / "model.safetensors").stat().st_size
        words = ["train_trm_lm.py", "--config", str(folder / "config.yaml"), "--resume"]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
        )
        assert done.returncode == 2, done.stderr
        assert "error: cannot write the checkpoint" in done.stderr and "Traceback" not in done.stderr
        assert (folder / "last").resolve().name == "step_00000004"
        assert make(resume=True, save_every=4).step == 4

    def test_run_folder_vanished(self, make, tmp_path):
        trainer = make(save_every=4, eval_every=100)
        during(trainer, 3, lambda: shutil.rmtree(tmp_path / "run"))
        with pytest.raises(UserError, match="run vanished during the run"):
            trainer.train()

    def test_a_shard_vanished(self, make, tmp_path):
        shard = tmp_path / "shard.jsonl"
        shard.write_text('{"text": "some words to learn from"}\n' * 50)
        trainer = make(streaming=True, train_paths=[str(shard)], save_every=2, shuffle_buffer=4, max_steps=100)
        during(trainer, 5, shard.unlink)
        with pytest.raises(UserError, match="shard.jsonl cannot be read .*restore it"):
            trainer.train()
        assert trainer.step >= 5 and load_state(trainer.folder / "last")["step"] >= 4


class TestSignals:
    def test_ctrl_c_twice_ends_at_once(self, make):
        trainer, before = make(save_every=3), signal.getsignal(signal.SIGINT)

        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        during(trainer, 5, twice)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert load_state(trainer.folder / "last")["step"] == 3
        assert signal.getsignal(signal.SIGINT) is before

    def test_sigterm_to_the_whole_group_with_workers(self, corpus, tmp_path):
        """A batch system sends SIGTERM to all processes; loading processes must live until the last checkpoint."""
        values = {**TINY, **corpus, "max_steps": 100000, "num_workers": 2, "save_dir": str(tmp_path / "run")}
        words = [w for n, v in values.items() for w in (f"--{n}", *(v if isinstance(v, list) else [str(v)]))]
        command = [sys.executable, "train_trm_lm.py", *words]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert child.poll() is None, child.stderr.read()
        os.killpg(child.pid, signal.SIGTERM)
        err = child.communicate(timeout=60)[1]
        assert child.returncode == 0 and "stopped by SIGTERM" in err and "Traceback" not in err
        assert load_state(tmp_path / "run" / "last")["step"] > 5


def test_states_hold_plain_data_only(make):
    """Resuming never unpickles code: with weights_only, torch raises for anything but plain data."""
    trainer = make(num_workers=1)
    trainer.train()
    state = torch.load(trainer.folder / "last" / "state" / "training.pt", weights_only=True)
    assert state["loaders"] == [{"samples": 64, "epoch_samples": len(trainer.train_set)}]
