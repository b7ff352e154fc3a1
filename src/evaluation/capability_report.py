"""The results of `capabilities.py` as a table and as a picture."""

import sys
from math import isnan

from src.evaluation.capabilities import Result
from src.training.curves import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    add_title,
    label_ends,
    new_figure,
    save_picture,
    style_axes,
)

# of the rows of each test
TITLES = {"valid": "valid Python", "lines": "next line", "brackets": "closing", "indent": "indentation"}
FORMATS = {"share": "{:.3f}", "bits/byte": "{:.3f}", "change": "{:+.1%}"}


def shown(value: float, unit: str) -> str:
    """Returns a figure as text. A share of under 0.001 is written in full: a chance level is rarely exactly 0."""
    if isnan(value):
        return "-"
    return f"{value:.2g}" if unit == "share" and 0 < value < 0.001 else FORMATS[unit].format(value)


def table(results: list[Result]) -> str:
    """Returns one line per result, with a header."""
    rows = [["test", "", "value", "95 % interval", "unit", "chance", "true text", "cases", "how chance is known"]]
    for r in results:
        low_high = "" if r.interval is None else " to ".join(FORMATS[r.unit].format(value) for value in r.interval)
        best = "" if r.best is None else shown(r.best, r.unit)
        figures = [shown(r.value, r.unit), low_high, r.unit, shown(r.chance, r.unit), best, str(r.cases)]
        rows.append([r.test, r.name, *figures, r.chance_from])
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = (0, 1, 4, 8)  # columns of text
    lines = (
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def draw_capabilities(results: list[Result], path: str, title: str = "", remark: str = ""):
    """Draws the results as a PNG: shares, bits per byte and retrieval on the left, copying and arithmetic on the right.

    Tests without a result have no plot. If there is none at all, no file is written, and stderr says so."""
    left = {"shares": [r for r in results if r.test in TITLES]}
    left["bits"] = [r for r in results if r.unit == "bits/byte" and not isnan(r.value)]
    left["retrieval"] = [r for r in results if r.test == "retrieval"]
    right = {name: [r for r in results if r.test == name] for name in ("copy", "arithmetic")}
    left, right = ({name: mine for name, mine in part.items() if mine} for part in (left, right))
    if not (left or right):
        print(f"{path} was not drawn: no result has a value", file=sys.stderr)
        return None
    rows = [len(mine) + len({r.test for r in mine}) + 2 for mine in left.values()]  # with headings and the axis
    figure, _ = new_figure(max(0.27 * sum(rows), 2.3 * len(right), 2) + 0.4)
    parts = [part for part in (left, right) if part]
    columns = figure.subfigures(1, len(parts), width_ratios=(5, 4)[: len(parts)], squeeze=False)[0]
    draw = {"shares": _draw_shares, "bits": _draw_bits, "retrieval": _draw_retrieval}
    draw |= {"copy": _draw_copying, "arithmetic": _draw_arithmetic}
    for column, part in zip(columns, parts):
        grid = column.add_gridspec(len(part), 1, height_ratios=rows if part is left else None)
        for row, (name, mine) in enumerate(part.items()):
            draw[name](column.add_subplot(grid[row, 0]), mine)
    add_title(figure, title, remark)
    return save_picture(figure, path)


def _draw_rows(axes, results, titles):
    """Draws one horizontal row for each result, with a heading above the rows of each test."""
    heights, labels, y = [], [], 0.0
    for number, r in enumerate(results):
        if number == 0 or results[number - 1].test != r.test:
            y -= 0.4 * (number > 0)
            if titles[r.test]:
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
                axes.text(-0.02, y, titles[r.test], fontsize=9, fontweight="bold", color=INK, **place)
                y -= 0.8
        heights.append(y)
        labels.append(r.name)
        axes.plot((0, 1), (y, y), transform=axes.get_yaxis_transform(), color=FAINT, linewidth=0.7, zorder=0)
        axes.plot(r.chance, y, "|", color=GREY, markersize=13, markeredgewidth=2)
        if r.best is not None:
            axes.plot(r.best, y, "D", color=GREEN, markersize=6, markerfacecolor="white", markeredgewidth=1.4)
        if r.interval is not None:
            axes.plot(r.interval, (y, y), color=BLUE, linewidth=5, alpha=0.25, solid_capstyle="butt", clip_on=False)
        axes.plot(r.value, y, "o", color=BLUE, markersize=6, zorder=3, clip_on=False)
        end = {"xy": (1, y), "xycoords": ("axes fraction", "data"), "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(shown(r.value, r.unit), **end, va="center", fontsize=9, color=BLUE, annotation_clip=False)
        y -= 0.8
    axes.set_yticks(heights, labels)
    axes.set_ylim(min(heights) - 0.6, 0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)


def _draw_shares(axes, results):
    style_axes(axes, "")
    _draw_rows(axes, results, TITLES)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks((0, 0.25, 0.5, 0.75, 1))
    axes.set_xlabel("share of the cases, or mean", fontsize=9, color="#555555")
    marks = [("o", BLUE, BLUE, "model, 95 % interval"), ("|", GREY, GREY, "chance")]
    if any(r.best is not None for r in results):
        marks.append(("D", GREEN, "white", "true text"))
    for marker, color, face, name in marks:
        size, width = (12, 2) if marker == "|" else (6, 1.4)
        style = {"markersize": size, "markeredgewidth": width, "markerfacecolor": face}
        axes.plot([], [], marker, color=color, label=name, **style)
    from matplotlib.transforms import blended_transform_factory

    place = {"loc": "lower left", "bbox_to_anchor": (0.02, 1.0), "ncols": 3, "borderpad": 0, "borderaxespad": 0.2}
    place["bbox_transform"] = blended_transform_factory(axes.figure.transSubfigure, axes.transAxes)
    axes.legend(frameon=False, fontsize=9, labelcolor="#555555", handletextpad=0.3, columnspacing=1.2, **place)


def _draw_bits(axes, results):
    style_axes(axes, "")
    _draw_rows(axes, results, {"bits": "bits per byte", "depth": "by recursion step"})
    axes.set_xlim(0, 1.08 * max(max(r.value, r.chance) for r in results))
    axes.set_xlabel("bits per byte; chance: single bytes", fontsize=9, color="#555555")


def _draw_retrieval(axes, results):
    style_axes(axes, "")
    _draw_rows(axes, results, {"retrieval": "retrieved code"})
    axes.axvline(0, color=GREY, linestyle=(0, (3, 3)), linewidth=1, zorder=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.set_xlabel("change of bits per byte; chance: random text", fontsize=9, color="#555555")


def _draw_copying(axes, results):
    style_axes(axes, "copying a name, by distance in tokens")
    labels = []
    for kind, name, color in (
        ("ranked", "ranked before\nanother name", BLUE),
        ("completed", "completed\nfrom its start", ORANGE),
    ):
        points = [(int(r.name.split()[0]), r) for r in results if r.name.endswith(kind)]
        if points:
            _draw_points(axes, points, color)
            labels.append((points[-1][1].value, name, color))
    distances = sorted({int(r.name.split()[0]) for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, map(str, distances))
    axes.minorticks_off()
    axes.axhline(0.5, color=GREY, linestyle=(0, (3, 3)), linewidth=1)
    axes.text(0.01, 0.48, "chance when ranked", **(_inside(axes) | {"ha": "left", "va": "top"}))
    label_ends(axes, labels, lines=3)


def _draw_arithmetic(axes, results):
    style_axes(axes, "addition, exactly right")
    points = [(int(r.name.split()[0]), r) for r in results]
    _draw_points(axes, points, BLUE)
    digits, chances = [digits for digits, _ in points], [r.chance for _, r in points]
    axes.plot(digits, chances, color=GREY, linestyle=(0, (3, 3)), linewidth=1)
    axes.set_xticks(digits, map(str, digits))
    axes.set_xlabel("digits of each number", fontsize=9, color="#555555")
    value = points[-1][1].value
    label_ends(axes, [(value, shown(value, "share"), BLUE)])
    axes.text(digits[0] + 0.1, chances[0], "chance", **(_inside(axes) | {"ha": "left", "transform": axes.transData}))


def _draw_points(axes, points, color):
    """Draws a curve of shares from 0 to 1, with their intervals."""
    x, results = zip(*points)
    low, high = zip(*(r.interval for r in results))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, [r.value for r in results], "o-", color=color, markersize=4.5, linewidth=1.6)
    axes.set_ylim(-0.04, 1.06)


def _inside(axes):
    place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    return place | {"fontsize": 8, "color": GREY}
