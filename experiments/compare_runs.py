"""Draw the learning curves of several runs in one picture, and print a table of their results.

    python experiments/compare_runs.py runs/trm runs/llama
    python experiments/compare_runs.py runs/* --x tokens --output runs/all.png
    python experiments/compare_runs.py runs/trm runs/llama --x elapsed      # against training time

The picture `output` shows bits per byte in training and validation, the learning rate, and the speed. A run is labelled
by its folder name and the settings in which the runs differ. The table on stdout has each run's best validation bits
per byte and its step, the steps and tokens done, and the median tokens per second.
"""

import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError
from src.metrics import format_params  # noqa: E402
from src.training.curves import (  # noqa: E402
    AMBER,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    add_title,
    draw_judged,
    draw_noisy,
    draw_small,
    label_ends,
    new_figure,
    read_series,
    read_settings,
    save_picture,
    set_limits,
    style_axes,
)

COLORS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, INK)
X = {"step": ("step", 1, "optimizer step"), "tokens": ("tokens", 1, "training tokens")}
X["elapsed"] = ("elapsed_s", 1 / 60, "minutes")
NO_TRAIT = ("save_dir", "resume", "cache_dir", "monitoring.")  # settings that do not influence the result
LABEL_WIDTH = 150  # characters per line of the legend
NAMES = {"lr": "learning rate", "tokens_per_s": "tokens per second"}
SERIES = ("bits_per_byte", "valid_bits_per_byte", "lr", "tokens", "tokens_per_s", "elapsed_s")


@dataclass
class CompareConfig:
    """What to compare.

    Args:
        runs: run folders to compare; the flag name may be left out
        output: picture file to write
        x: quantity on the x axis: optimizer steps, training tokens, or elapsed minutes
    """

    runs: list[str] = field(default_factory=list)
    output: str = "runs.png"
    x: Literal["step", "tokens", "elapsed"] = "step"

    def __post_init__(self):
        if not 1 <= len(self.runs) <= len(COLORS):
            raise ValueError(f"{len(self.runs)} runs: give 1 to {len(COLORS)} run folders")


class Run(NamedTuple):
    """A run: the name of its folder, its settings, and its logged series (each (N, 2): steps and values)."""

    name: str
    settings: dict
    series: dict


def parse_args(argv=None) -> CompareConfig:
    return parse_flags(__doc__, CompareConfig, argv=argv, positional="runs")[0]


def load_run(folder: str) -> Run:
    series = read_series(folder, *SERIES)
    if not len(series["bits_per_byte"]) and not len(series["valid_bits_per_byte"]):
        raise UserError(f"{folder} has logged no bits per byte yet: leave it out")
    return Run(Path(folder).resolve().name, read_settings(folder), series)


def labels(runs: list[Run]) -> list[str]:
    """Returns a label per run: its name and the settings in which the runs differ, as in
    `llama: recursion none, n_layers 6`."""
    names = dict.fromkeys(name for r in runs for name in r.settings if not name.startswith(NO_TRAIT))
    differ = [name for name in names if any(r.settings.get(name) != runs[0].settings.get(name) for r in runs)]
    traits = [", ".join(f"{name} {r.settings[name]}" for name in differ if name in r.settings) for r in runs]
    return [f"{r.name}: {trait}" if trait else r.name for r, trait in zip(runs, traits)]


def along(run: Run, x: str) -> dict:
    """Returns the run's series with steps converted to the unit of the x axis: tokens or minutes."""
    name, unit, _ = X[x]
    if x == "step":
        return run.series
    scale = run.series[name]
    if not len(scale):
        raise UserError(f"{run.name} has logged no {name}: choose another --x")
    steps, values = scale.T
    return {
        key: np.column_stack((np.interp(points[:, 0], steps, unit * values), points[:, 1]))
        for key, points in run.series.items()
    }


def draw(runs: list[Run], x: str, output: str) -> Path:
    """Draw the picture: bits per byte in training and validation on the same scale, learning rate, speed, legend."""
    texts = [textwrap.fill(label, LABEL_WIDTH, subsequent_indent="    ") for label in labels(runs)]
    figure, grid = new_figure(5.8 + 0.17 * "\n".join(texts).count("\n") + 0.17)
    train = figure.add_subplot(grid[0, 0])
    valid, rate = figure.add_subplot(grid[0, 1], sharex=train, sharey=train), figure.add_subplot(grid[1, 0])
    speed = figure.add_subplot(grid[1, 1], sharex=rate)
    series = [along(r, x) for r in runs]
    _draw_bits(train, valid, series)
    for axes, name, noisy in ((rate, "lr", False), (speed, "tokens_per_s", True)):
        curves = [(points[name], color) for points, color in zip(series, COLORS)]
        draw_small(axes, NAMES[name], curves, noisy, xlabel=X[x][2])
    rate.set_xlim(train.get_xlim())
    for axes in (train, valid, rate, speed) if x == "tokens" else ():
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles = [Line2D([], [], color=color, linewidth=2, label=text) for text, color in zip(texts, COLORS)]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8, labelcolor=INK)
    add_title(figure, ", ".join(r.name for r in runs))
    return save_picture(figure, output)


def _draw_bits(train, valid, series):
    """Draw the upper panels.  Training curves are labelled with their last value, validation curves with their best."""
    style_axes(train, "training, bits per byte")
    style_axes(valid, "validation, bits per byte (the best ringed)")
    curves, ends, bests = [], [], []
    for points, color in zip(series, COLORS):
        if len(points["bits_per_byte"]):
            curves.append(draw_noisy(train, points["bits_per_byte"], color, faint=0.12))
            ends.append((curves[-1][-1, 1], f"{curves[-1][-1, 1]:.3f}", color))
        if len(points["valid_bits_per_byte"]):
            curves.append(points["valid_bits_per_byte"])
            bests.append((curves[-1][-1, 1], f"best {draw_judged(valid, curves[-1], color)[1]:.3f}", color))
    set_limits(train, curves, start=0.15)  # the steep start is cut off, because runs differ at the end
    for axes, texts in ((train, ends), (valid, bests)):
        axes.tick_params(labelbottom=False)
        label_ends(axes, texts)


def print_table(runs: list[Run]) -> None:
    """Print a row per run; `-` stands for a value that was not logged."""
    width = max(3, *(len(r.name) for r in runs))
    print(f"{'run':{width}}  best valid bits/byte  at step    steps   tokens  tokens/s")
    for name, _, series in runs:
        valid, speed, tokens = series["valid_bits_per_byte"], series["tokens_per_s"], series["tokens"]
        best = valid[valid[:, 1].argmin()] if len(valid) else None
        steps = max(points[-1, 0] for points in series.values() if len(points))
        print(
            f"{name:{width}}  {f'{best[1]:.4f}' if len(valid) else '-':>20}  "
            f"{f'{best[0]:,.0f}' if len(valid) else '-':>7}  {steps:7,.0f}  "
            f"{format_params(tokens[-1, 1]) if len(tokens) else '-':>7}  "
            f"{f'{np.median(speed[:, 1]):,.0f}' if len(speed) else '-':>8}"
        )


def main(argv=None) -> None:
    config = parse_args(argv)
    runs = [load_run(folder) for folder in config.runs]
    print_table(runs)
    print(f"drawn: {draw(runs, config.x, config.output)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
