"""The tables and the picture of experiments/ladder.py."""

import math
import statistics
from itertools import cycle
from pathlib import Path

import numpy as np

from experiments.arms import spelled
from src.errors import UserError
from src.metrics import format_params
from src.training.curves import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    add_title,
    draw_judged,
    label_ends,
    save_picture,
    style_axes,
)

COLORS = {"plain": INK, "plain-deep": GREY, "loop": SKY, "loop-ends": BLUE, "gated": GREEN, "two-stream": AMBER}
COLORS |= {"trm": ORANGE, "late": PINK}
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # t distribution, 1 to 10 degrees
Z_975 = 1.959964


def t_quantile(freedom: int) -> float:
    """Returns the 97.5 % quantile of the t distribution: from a table, and for over 10 degrees from the expansion
    around the normal distribution (Abramowitz and Stegun, 26.7.5), which is exact to 0.0002 there."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z, n = Z_975, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def paired(values: dict[int, float], control: dict[int, float]) -> tuple[float, float] | None:
    """Returns (mean, half the width of its 95 % confidence interval) of the differences between two rungs.

    values, control: {seed: figure}. Seeds that only one of them has are left out. Returns None if none is left; the
    half width is infinite for a single seed."""
    differences = [values[seed] - control[seed] for seed in values if seed in control]
    if not differences:
        return None
    n = len(differences)
    half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(differences), half


def report(tables: dict[str, dict[str, list[dict]]], control: list[str]) -> str:
    """Returns a Markdown table for each of `tables`, {title: {rung: records}}.  control: as in LadderConfig.

    Raises UserError if the records were scored on different texts."""
    records = [r for groups in tables.values() for runs in groups.values() for r in runs]
    sizes = {(r["averaged"]["bytes"], r["averaged"]["chars"]) for r in records}
    if len(sizes) > 1:
        raise UserError(f"the runs were scored on texts of different sizes, {sorted(sizes)}: choose another output")
    ((n_bytes, chars),) = sizes
    parts = [f"validation text: {n_bytes:,} bytes, {chars:,} characters; figures in nats per character"]
    for title, groups in tables.items():
        parts.append(f"{title}:\n\n{table(groups, control_of(title, groups, control))}")
    return "\n\n".join(parts)


def control_of(title: str, groups: dict, given: list[str]) -> str:
    """Returns the rung from which the differences of a table are taken."""
    if given and (named := given[0 if "tokens" in title else -1]) in groups:
        return named
    wanted = "plain" if "tokens" in title else "plain-deep"
    return wanted if wanted in groups else next(iter(groups))


def figure_of(record: dict) -> dict:
    """Returns the scores that count: those of the best evaluation if the run has one, else of the averaged weights."""
    return record.get("best") or record["averaged"]


def by_seed(runs: list[dict]) -> dict[int, float]:
    return {r["seed"]: figure_of(r)["nats_per_char"] for r in runs}


def table(groups: dict[str, list[dict]], control: str) -> str:
    """Returns a Markdown table with a row per rung."""
    is_best = "best" in next(iter(groups.values()))[0]
    name = "best evaluation" if is_best else "averaged"
    heads = f"rung, parameters, tokens, training FLOPs, last weights, {name}, bits/byte, every seed ({name})".split(
        ", "
    )
    heads += [f"difference from {control}", "settings"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for rung, runs in groups.items():
        seeds = by_seed(runs)
        cells = [rung, format_params(runs[0]["parameters"]), *(_range(runs, key) for key in ("tokens", "flops"))]
        cells += [_spread([r["last"]["nats_per_char"] for r in runs]), _spread(list(seeds.values()))]
        cells.append(f"{statistics.mean(figure_of(r)['bits_per_byte'] for r in runs):.4f}")
        cells.append(", ".join(f"{value:.4f}" for value in seeds.values()))
        cells.append("" if rung == control else difference(seeds, by_seed(groups.get(control, []))))
        cells.append(spelled({key: value for key, value in runs[0]["changes"].items() if key != "max_steps"}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(runs, key) -> str:
    low, high = (format_params(end(r[key] for r in runs)) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def difference(values: dict[int, float], control: dict[int, float]) -> str:
    """Returns the paired difference as text, bold if its interval does not include 0."""
    found = paired(values, control)
    if found is None:
        return "-"
    mean, half = found
    if half == math.inf:
        return f"{mean:+.4f} (one seed)"
    text = f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"
    return f"**{text}**" if abs(mean) > half else text


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(tables: dict[str, dict[str, list[dict]]], path: Path) -> Path:
    """Draws loss against training FLOPs.

    With best evaluations, each rung has the curve of its evaluations on the slice, as the mean over the seeds.
    Otherwise it has a point per table, and a line between the two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    axes = figure.add_subplot()
    groups = {}
    for table in tables.values():
        for rung, runs in table.items():
            groups.setdefault(rung, []).append(runs)
    records = [r for parts in groups.values() for runs in parts for r in runs]
    is_best = "curve" in records[0]
    style_axes(axes, "held-out slice, bits per byte" if is_best else "validation text, nats per character")
    others = cycle((AMBER, SKY, PINK, GREEN, BLUE, ORANGE))
    colors = {rung: COLORS.get(rung) or next(others) for rung in groups}
    draw_rungs = _draw_curves if is_best else _draw_points
    ends = draw_rungs(axes, groups, colors)
    axes.set_xlabel("training FLOPs", fontsize=9, color="#555555")
    label_ends(axes, ends)
    seeds = len({r["seed"] for r in records})
    how = "" if is_best else "; bars: lowest to highest; equal FLOPs side by side"
    remark = f"mean of {seeds} seeds{how}" if seeds > 1 else ""
    add_title(figure, "Loss against training FLOPs", remark)
    return save_picture(figure, path)


def _scale(axes, values):
    """Sets a logarithmic x axis with round numbers, also for values in a range that is less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(0.85 * min(values), 1.15 * max(values))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_params(x)))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_points(axes, groups, colors) -> list[tuple]:
    ends, flops = [], []
    for i, (rung, parts) in enumerate(groups.items()):
        points = []
        beside = 1.012 ** (i - len(groups) / 2)  # so that bars at the same place do not cover each other
        for runs in parts:
            losses = list(by_seed(runs).values())
            points.append((beside * statistics.mean(r["flops"] for r in runs), statistics.mean(losses)))
            axes.plot([points[-1][0]] * 2, (min(losses), max(losses)), color=colors[rung], linewidth=4, alpha=0.3)
        points.sort()
        axes.plot(*np.array(points).T, color=colors[rung], linewidth=1.4, marker="o", markersize=5, zorder=3)
        ends.append((points[-1][1], f"{rung} {points[-1][1]:.3f}", colors[rung]))
        flops += [x for x, _ in points]
    _scale(axes, flops)
    return ends


def _draw_curves(axes, groups, colors) -> list[tuple]:
    """Draws the mean curve of the longest runs of each rung, over the seeds that were reported with that length."""
    ends, top, last = [], [], []
    for rung, ((*runs,),) in groups.items():
        steps = max(r["changes"]["max_steps"] for r in runs)
        curves = [r["curve"] for r in runs if r["changes"]["max_steps"] == steps]
        mean = np.mean(curves, axis=0)
        best = draw_judged(axes, mean, colors[rung])
        ends.append((mean[-1, 1], f"{rung}, best {best[1]:.3f}", colors[rung]))
        top.append(mean[len(mean) // 4 :, 1].max())
        last.append(mean[:, 1].min())
    axes.xaxis.set_major_formatter(lambda x, _: format_params(x))
    margin = 0.06 * (max(top) - min(last)) or 0.1
    axes.set_ylim(min(last) - margin, max(top) + margin)
    return ends
