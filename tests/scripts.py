"""Helpers for tests that run scripts in their own process: starting one, small settings, a small corpus."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--config", str(ROOT / "configs" / "paper.yaml")]  # a TRM, and a tiny one
SMALL += "--d_model 16 --n_heads 2 --n_layers 1 --max_seq_len 32 --batch_size 4 --warmup_steps 2".split()
SMALL += "--tokenizer byte --precision fp32 --device cpu --sample_tokens 4 --eval_batches 2 --compile false".split()


def start(*words, **options):
    """Start a script in its own process.  It can be stopped with SIGINT even if the tests run in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # inherited by background jobs of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **(pipes | options))


def run_script(*words, stdin=None):
    """Run a script in its own process.  Returns (exit code, stdout, stderr)."""
    child = start(*words, stdin=subprocess.PIPE)
    out, err = child.communicate(stdin, timeout=300)
    return child.returncode, out, err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def data(home):
    """Flags for a small corpus and a cache folder."""
    for name, numbers in (("train", range(100)), ("valid", range(100, 130))):
        lines = (json.dumps({"text": f"def f{n}(x):\n    return x{' + x' * (n % 7)}\n"}) + "\n" for n in numbers)
        (home / f"{name}.jsonl").write_text("".join(lines))
    return [
        *("--train_paths", str(home / "train.jsonl"), "--valid_paths", str(home / "valid.jsonl")),
        *("--cache_dir", str(home / "cache")),
    ]
