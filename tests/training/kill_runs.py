"""Runs that are killed repeatedly: python kill_runs.py SPEC.

SPEC is a JSON file with a list of runs, each {"settings": {...}, "kills": number of kills, "longest": most seconds
before a kill, "draws": whether the run draws its learning curve}.

Each run is a forked child, because a fork starts fast. It gets SIGKILL at random moments after its first checkpoint,
and the next child resumes it. Prints, for each run, how many kills came while it was writing a checkpoint."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# a run imports these late; importing them here saves that time in every forked child
import datasets  # noqa: F401
import tensorboard.backend.event_processing.event_file_loader
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch._dynamo  # noqa: F401
from trainers import trainer_of

from src.checkpoint import read_weights
from src.training import monitor
from src.training.run_folder import newest_whole


def start(settings, log):
    child = os.fork()
    if child == 0:
        os.dup2(log.fileno(), 2)
        try:
            trainer_of(settings).train()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def check_weights(folder, state):
    for name in ("model.safetensors", "ema.safetensors"):
        read_weights(folder / name)
    assert folder.name == f"step_{state['step']:08d}"


def killed(spec):
    """Execute one run with its kills; returns how many came while it was writing a checkpoint."""
    settings, rng, torn = spec["settings"], random.Random(7), 0
    folder = Path(settings["save_dir"])
    if not spec["draws"]:
        monitor.plot_learning_curve = lambda *args: None  # takes longer than a tiny run
    with open(folder.with_suffix(".log"), "w") as log:
        for kill in range(spec["kills"]):
            child = start(settings | {"resume": kill > 0}, log)
            lines = (folder / "metrics.jsonl").stat().st_size if kill else 0
            while not list(folder.glob("step_*")) or (folder / "metrics.jsonl").stat().st_size <= lines:
                time.sleep(0.01)  # until it has its first checkpoint and has logged a new line
                assert os.waitpid(child, os.WNOHANG)[0] == 0, "the run ended by itself"
            time.sleep(rng.uniform(0, spec["longest"]))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it had ended before"
            torn += bool(list(folder.glob(".step_*")))
            newest, state = newest_whole(folder)
            check_weights(newest, state)
            assert newest == max(folder.glob("step_*")), f"{newest} is not the newest"
        child = start(settings | {"resume": spec["kills"] > 0}, log)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the last part failed"
    return torn


if __name__ == "__main__":
    print(json.dumps([killed(spec) for spec in json.loads(Path(sys.argv[1]).read_text())]))
