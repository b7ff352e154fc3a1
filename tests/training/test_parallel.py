"""Two CPU processes (gloo): the same losses as one, sharded or not; who writes; moved checkpoints; a lost process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import TINY, TINY_PUZZLES, during, puzzle_settings, read_metrics, trainer_of

from src.tasks.puzzle_trainer import create_puzzle_trainer

pytest_plugins = "trainers"  # the fixtures make and corpus
PUZZLES = {**TINY_PUZZLES, "max_steps": 1, "optimizer": "adamw", "explore": 0.0}
STEPS = {"lr": 3e-3, "warmup_steps": 5, "eval_every": 25}


def launch(spec, runs, timeout=180):
    """Execute runs in two processes; returns the finished launcher."""
    Path(spec).write_text(json.dumps(runs))
    script = str(Path(__file__).parent / "parallel_runs.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        str(spec),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder) if "loss" in r}


@pytest.fixture(scope="module")
def two(tmp_path_factory, corpus):
    """(folder of the two-process runs, the findings of each rank, the finished launcher)."""
    folder = tmp_path_factory.mktemp("two")

    def run(name, stop=None, **changes):
        values = {**TINY, **corpus, **STEPS, "max_steps": 10, "save_dir": str(folder / name), **changes}
        return {"settings": values} | ({"stop": stop} if stop else {})

    for name in ("one_to_ddp", "one_to_fsdp"):
        one = trainer_of(run(name)["settings"])
        during(one, 5, lambda: signal.raise_signal(signal.SIGINT))
        one.train()
    trm = {"tie_embeddings": True, "supervision_steps": 2, "grad_accum": 2, "max_steps": 50}
    stop = {"rank": 1, "step": 7, "signal": "SIGTERM"}
    runs = [
        *(run("ddp", **trm), run("fsdp", shard=True, **trm)),
        run("paper", optimizer_step="supervision", act_target="stable"),
        *(run("ddp_to_one", stop), run("fsdp_to_one", stop, shard=True)),
        *(run("one_to_ddp", resume=True), run("one_to_fsdp", resume=True, shard=True)),
        {"settings": {**PUZZLES, "save_dir": str(folder / "puzzles")}},
    ]
    done = launch(folder / "runs.json", runs)
    assert done.returncode == 0, done.stderr[-9000:]
    found = [json.loads((folder / f"runs.json.{rank}").read_text()) for rank in (0, 1)]
    return folder, [dict(zip([Path(r["settings"]["save_dir"]).name for r in runs], f)) for f in found], done


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_curve_of_two_is_that_of_one(two, make, name):
    one = make("one", **STEPS, max_steps=50, tie_embeddings=True, supervision_steps=2)
    figures = one.train()
    folder = two[0] / name
    ours, theirs = losses(one.folder), losses(folder)
    assert list(theirs) == list(range(1, 51))
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-4
    for file in ("model.safetensors", "ema.safetensors"):
        a, b = load_file(one.folder / "last" / file), load_file(folder / "last" / file)
        assert a.keys() == b.keys()
        assert max((a[n] - b[n]).abs().max() for n in a) < 1e-4
    last = [r for r in read_metrics(folder) if "valid_loss" in r][-1]
    assert last["valid_loss"] == pytest.approx(figures["valid_loss"], abs=1e-4)


def test_shards_are_shards(two):
    """Each process holds half of every parameter.  (On CPUs, accelerate's own FSDP plugin copies instead.)"""
    for found in two[1]:
        ddp, fsdp = found["ddp"], found["fsdp"]
        assert fsdp["sharded"] and not ddp["sharded"] and ddp["held"] == ddp["whole"] == fsdp["whole"]
        assert 0.45 * fsdp["whole"] < fsdp["held"] < 0.6 * fsdp["whole"]


def test_one_update_per_supervision_step_with_a_head_that_waits(two, make):
    one = make("one", **STEPS, max_steps=10, optimizer_step="supervision", act_target="stable")
    one.train()
    ours, theirs = losses(one.folder), losses(two[0] / "paper")
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-4


def test_puzzles_in_two_processes(two, tmp_path):
    """Two processes of four rows give the first update of one process of eight rows."""
    one = create_puzzle_trainer(puzzle_settings({**PUZZLES, "save_dir": str(tmp_path / "one")}))
    one.train()
    runs = [read_metrics(folder) for folder in (two[0] / "puzzles", one.folder)]
    for name in ("loss", "grad_norm"):
        assert runs[0][0][name] == pytest.approx(runs[1][0][name], rel=1e-4)
    judged = [[record["valid_loss"] for record in records if "valid_loss" in record] for records in runs]
    assert judged[0] == pytest.approx(judged[1], rel=1e-2) and judged[0]


def test_only_one_process_writes(two):
    folder, _, done = two
    assert len(list((folder / "ddp").glob("events.out.tfevents*"))) == 1
    assert (folder / "ddp" / "samples.txt").read_text().count("=== step") == 2
    assert done.stderr.count("resumed") == 2 and done.stdout == ""


@pytest.mark.parametrize("name", ["ddp_to_one", "fsdp_to_one", "one_to_ddp", "one_to_fsdp"])
def test_checkpoints_move_between_one_and_two(two, make, name):
    """A signal to one of two processes stops both; one process resumes their run, and two resume that of one."""
    folder, found, _ = two
    assert [f[name]["step"] for f in found] == ([7, 7] if name.endswith("one") else [10, 10])
    assert [f[name]["figures"] for f in found] == [not name.endswith("one")] * 2  # none of a run that was stopped
    straight = make("straight", **STEPS, max_steps=10)
    straight.train()
    if name.endswith("one"):
        copy = straight.folder.parent / "moved"
        shutil.copytree(folder / name, copy, symlinks=True)
        one = make("moved", **STEPS, max_steps=10, resume=True)
        one.train()
        folder, name = copy.parent, copy.name
    ours, theirs = losses(straight.folder), losses(folder / name)
    assert list(theirs) == list(range(1, 11))
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-4
    a, b = (load_file(f / "last" / "model.safetensors") for f in (straight.folder, folder / name))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-4


def test_a_killed_process_ends_the_run_with_a_sentence(corpus, tmp_path):
    spec = {
        "settings": {**TINY, **corpus, **STEPS, "max_steps": 500, "save_every": 5, "save_dir": str(tmp_path / "run")}
    }
    started = time.monotonic()
    done = launch(tmp_path / "runs.json", [{**spec, "stop": {"rank": 1, "step": 12, "signal": "SIGKILL"}}])
    assert done.returncode != 0 and time.monotonic() - started < 100
    assert "error: after step 12 another process of this run was lost" in done.stderr
    assert (tmp_path / "run" / "last").resolve().name == "step_00000010"
    assert torch.load(tmp_path / "run" / "last" / "state" / "training.pt", weights_only=True)["step"] == 10
