"""benchmarks/bench_serve.py at tiny sizes: it runs, and its last line is JSON."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # as when it is run as a script

import bench_serve  # noqa: E402


@pytest.mark.slow  # it starts a server
def test_bench_serve(capsys):
    assert bench_serve.main("--quick --hold 4 --vanish 10 --peer transformers".split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["streams"] for row in found["rows"]] == ["1", "3", "3 traced"]
    assert all(row["same"] == row["of"] for row in found["rows"])
    assert found["hold"]["answers"] >= 4 and found["hold"]["lost"] == 0
    assert found["vanish"] == {"clients": 10, "running": 0, "waiting": 0}
    assert all(row["ratio"] > 0 for row in found["peer"])
