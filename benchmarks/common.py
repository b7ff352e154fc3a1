"""What the benchmarks share: the repository root on sys.path, clocks, a table for people, JSON for programs."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python benchmarks/bench_x.py` finds src and tests; import this module before them

from src.runtime import describe, synchronize  # noqa: E402

CPU = torch.device("cpu")


def seconds(job, device=CPU) -> float:
    """Wall time of one call of job(), s."""
    synchronize(device)
    start = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(jobs: dict, repeats: int, device=CPU) -> dict[str, list[float]]:
    """{name: [s, ...]} of `repeats` rounds, each of which runs every job once: what slows the machine for a while
    slows all jobs alike, so that their ratios hold. Run each job once before, where its first call is slower."""
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, device))
    return times


median = statistics.median


def machine(device=CPU) -> dict:
    """What was measured on: device (with threads), torch."""
    return {"device": describe(device), "torch": torch.__version__}


def print_table(header: list[str], rows: list[list]) -> None:
    """Columns as wide as needed; numbers with three digits or more, right-aligned."""
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
    """The last line of a benchmark's output."""
    print(json.dumps({"benchmark": name} | _rounded(facts)))


def _rounded(value):
    """Five significant digits are more than a clock can tell."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
