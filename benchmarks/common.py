"""Shared by the benchmarks: timing, tables, and the JSON line.  Importing it puts the repository root on sys.path."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python benchmarks/bench_x.py`; import this module before src and tests

from src.runtime import describe, synchronize  # noqa: E402

CPU = torch.device("cpu")


def seconds(job, device=CPU) -> float:
    """Returns the wall time of one call of job() in seconds."""
    synchronize(device)
    start = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(jobs: dict, repeats: int, device=CPU) -> dict[str, list[float]]:
    """Time jobs in alternating rounds.  Returns {name: [seconds, ...]}, one number per round.

    A round runs every job once. If the machine slows down for a while, it slows all jobs alike, and their ratios still
    hold. There is no warm-up: call each job once before, if its first call is slower."""
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, device))
    return times


median = statistics.median


def machine(device=CPU) -> dict:
    """Returns the device (with its number of threads) and the version of torch."""
    return {"device": describe(device), "torch": torch.__version__}


def print_table(header: list[str], rows: list[list]) -> None:
    """Print a table: the first column left-aligned, the others right-aligned, floats with three digits or more."""
    cells = [header] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        print("  ".join((first, *rest)))


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def print_json(name: str, facts: dict) -> None:
    """Print the figures as one JSON line, which is the last line of a benchmark's output."""
    print(json.dumps({"benchmark": name} | _rounded(facts)))


def _rounded(value):
    """Round all floats to five significant digits, which is more precise than the measurements."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
