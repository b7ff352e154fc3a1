"""Scripts on a system that makes trouble: stderr cannot be written, or a file name is too long."""

import os
import subprocess
import sys

import pytest
from scripts import ROOT

CODE = """if True:
    import pathlib, sys
    from src.config import run
    def main():
        for i in range(2000):
            print("a line of messages", i, file=sys.stderr)
        pathlib.Path(sys.argv[1]).write_text("done")
    run(main)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_messages_to_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "end"], cwd=ROOT, stderr=full)
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "done"


def test_messages_that_nobody_reads_any_more(tmp_path):
    """As with `train_trm_lm.py 2>&1 | head`, or after the terminal was closed."""
    child = subprocess.Popen([sys.executable, "-c", CODE, tmp_path / "end"], cwd=ROOT, stderr=subprocess.PIPE)
    child.stderr.close()
    assert child.wait(timeout=60) == 0 and (tmp_path / "end").read_text() == "done"


def test_a_name_that_is_too_long():
    words = [sys.executable, "train_trm_lm.py", "--device", "cpu", "--save_dir", "a" * 300]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("choose a shorter name\n") and "Traceback" not in done.stderr
