"""Runs the fuzzer with a fixed seed and 200 inputs per loader. `make fuzz N=100000` runs more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
LOADERS = 20


def fuzz(*words):
    """Runs fuzz.py. Returns (lines of its output, the JSON in the last line, exit code)."""
    done = subprocess.run([sys.executable, FUZZ, *map(str, words)], capture_output=True, text=True, timeout=280)
    assert done.stdout.startswith("loader"), done.stderr
    lines = done.stdout.splitlines()
    return lines, json.loads(lines[-1]), done.returncode


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured by Linux's /proc")
def test_no_loader_ends_but_in_one_line(tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript", "gguf"):
        pytest.importorskip(package)
    lines, facts, code = fuzz(200 * LOADERS, "--workers", 1, "--output", tmp_path)
    assert facts["findings"] == 0 and code == 0, "\n".join(lines[1 + LOADERS : -1])
    assert len(facts["loaders"]) == LOADERS
    for row in facts["loaders"]:
        assert row["inputs"] == 200 and row["ok"] + row["refused"] == 200
        breaks = row["refused"] >= 30 or row["loader"] == "run state"  # a run falls back to an earlier checkpoint
        assert breaks and row["ok"] >= 5 and row["MB"] < 300, row  # mutations must break files, but not all of them


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured by Linux's /proc")
def test_a_finding_is_kept_and_loaded_again(tmp_path):
    """A careless loader must have findings of several kinds."""
    program = """
import sys, os, time
sys.argv[0] = sys.argv[1]; sys.path.insert(0, os.path.dirname(sys.argv[1]))
import fuzz
def use(path):
    text = open(path / "names.json", "rb").read()
    if len(text) % 3 == 0: os.kill(os.getpid(), 11)
    if len(text) % 3 == 1: list(range(20_000_000))
    import json; json.loads(text)["x"]
fuzz.LOADERS["label names"] = fuzz.LOADERS["label names"]._replace(use=use)
fuzz.warm = lambda *args: None
sys.exit(fuzz.main(sys.argv[2:]))
"""
    words = ["60", "--loaders", "label names", "--workers", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, str(FUZZ), *words], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1, done.stderr
    kinds = {json.loads(path.read_text())["kind"] for path in tmp_path.glob("*/finding.json")}
    assert {"crash", "exception"} <= kinds
    crash = next(p.parent for p in tmp_path.glob("*/finding.json") if json.loads(p.read_text())["kind"] == "crash")
    again = subprocess.run([sys.executable, str(FUZZ), "--replay", str(crash)], capture_output=True, text=True)
    assert '"kind": "crash"' in again.stdout
