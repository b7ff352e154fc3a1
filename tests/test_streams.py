"""Scripts on a system that makes trouble: stderr cannot be written, names are too long, or taken."""

import json
import os
import subprocess
import sys

import pytest
from scripts import ROOT

import make_problems
from src.config import check_distinct, check_writable, run, write_text
from src.errors import UserError

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


def test_a_file_to_write_is_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("mine")
    (tmp_path / "link").symlink_to("a")
    os.link("a", "hard")
    for outputs, inputs in (
        (["a"], ["./a"]),
        (["hard"], ["a"]),
        ([None, "link"], [None, "a"]),
        (["b", tmp_path / "b"], []),
    ):
        with pytest.raises(UserError, match=f"{outputs[-1]} is also read, or written by another flag"):
            check_distinct(outputs, inputs)
    check_distinct(["/dev/null", "/dev/null", "b", None], ["/dev/null", "a"])


def test_a_link_to_a_new_file_stays(tmp_path):
    (tmp_path / "link").symlink_to("new")
    check_writable(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path) == ["link"]


def test_what_is_not_utf8_is_written_as_an_escape(tmp_path, capfd):
    write_text(tmp_path / "a.jsonl", json.dumps({"path": "caf\udce9"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"path": "caf\udce9"}
    with pytest.raises(SystemExit) as caught:
        run(lambda: print("caf\udce9"))
    assert not caught.value.code and capfd.readouterr().out == "caf\\udce9\n"


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "f").write_text("mine")
    for path in (tmp_path / "f" / "x.jsonl", tmp_path / "f" / "sub" / "x.jsonl"):
        with pytest.raises(SystemExit) as caught:
            run(lambda path=path: make_problems.main(["addition", "--size", "2", "--output", str(path)]))
        err = capsys.readouterr().err
        assert caught.value.code == 2 and "a file or folder is in the way" in err and err.count("\n") == 1
