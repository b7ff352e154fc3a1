"""Curves of puzzle_curve.py as JSON files, as Markdown tables, and as a picture: of one model, or of several seeds.

write_curve(curve, "curve.json"), draw(curve, "curve.png"), print(report([curve]))
curves = [read_curve(path) for path in paths]
draw(merged(curves), "curves.png"), print(report(curves))
"""

import json

import numpy as np

from src.config import write_text
from src.errors import UserError
from src.files.text import read_object
from src.tasks.puzzle_curve import Bin, Curve, Point
from src.tasks.puzzle_eval import shown_steps
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
    label_ends,
    new_figure,
    save_picture,
    style_axes,
)

RULES = {  # name in the picture, colour
    "fixed": ("fixed steps", ORANGE),
    "halt": ("halting head", BLUE),
    "random": ("random, same mean", GREY),
    "oracle": ("oracle", GREEN),
    "starts": ("noisy starts", PINK),
    "starts+halt": ("noisy starts, halting", SKY),
    "votes": ("votes", AMBER),
    "votes+halt": ("votes, halting", INK),
}


def write_curve(curve: Curve, path):
    """Writes a curve as JSON."""
    facts = curve._asdict() | {"points": [], "bins": [each._asdict() for each in curve.bins]}
    text = json.dumps(facts | {"points": [list(point) for point in curve.points]}, indent=1)
    write_text(path, text + "\n")


def read_curve(path) -> Curve:
    """Reads a curve. Raises UserError if the file is not one."""
    facts = read_object(path)
    try:
        points, bins = [Point(*point) for point in facts["points"]], [Bin(**each) for each in facts["bins"]]
        curve = Curve(**facts | {"points": points, "bins": bins})
        _ = curve.full  # every table needs it
    except (KeyError, TypeError, StopIteration):
        raise UserError(f"{path} is no curve that solve_puzzles.py --curve wrote: give such a .json file") from None
    return curve


def merged(curves: list[Curve]) -> Curve:
    """Returns the means over several models, of the points and bins that all of them have."""
    points = _means([{point[:2]: point for point in curve.points} for curve in curves], "steps", "exact")
    bins = _means([{each.name: each for each in curve.bins} for curve in curves], *Bin._fields[1:])
    return curves[0]._replace(points=points, bins=bins)


def _means(tables, *names):
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    return [
        tables[0][key]._replace(**{name: float(np.mean([getattr(t[key], name) for t in tables])) for name in names})
        for key in shared
    ]


def cheapest(points: list[Point], rule: str, exact: float) -> Point | None:
    """The point of a rule with the fewest mean steps among those at least as accurate, or None."""
    good = [point for point in points if point.rule == rule and point.exact >= exact]
    return min(good, key=lambda point: point.steps, default=None)


def report(curves: list[Curve]) -> str:
    """The curves of one or several models as Markdown, with means and every model.

    Tables of the exact accuracy of each rule and of the bins; between them, the steps that each rule needs for the
    accuracy of all steps."""
    mean, is_one = merged(curves), len(curves) == 1
    trained = mean.trained
    shown = {*shown_steps(sum(point.rule == "fixed" for point in mean.points), most=0), trained}
    lines = [f"exact accuracy after all {trained} steps: {mean.full.exact:.4f}", ""]
    head = ["rule", "setting", "mean steps", "exact", "steps saved"] + ([] if is_one else ["every model"])
    lines += [_row(*head), "|---" * len(head) + "|"]
    for point in mean.points:
        if point.rule != "fixed" or point.setting in shown:
            cells = [
                point.rule,
                f"{point.setting:g}",
                f"{point.steps:.2f}",
                f"{point.exact:.4f}",
                _saved(point, trained),
            ]
            each = [next(p.exact for p in curve.points if p[:2] == point[:2]) for curve in curves]
            lines.append(_row(*cells, *([] if is_one else [", ".join(f"{exact:.4f}" for exact in each)])))
    lines += ["", *(_needs(curves, rule) for rule in RULES if any(point.rule == rule for point in mean.points))]
    if mean.bins:
        halt = f"halt {mean.threshold:g}"
        head = ("boards", "of them", f"{trained} steps", halt, "its steps", "fixed, equal mean", "oracle steps")
        lines += ["", _row(*head), "|---" * len(head) + "|"]
        forms = ("{:,.0f}", "{:.4f}", "{:.4f}", "{:.2f}", "{:.4f}", "{:.2f}")
        for name, *figures in mean.bins:
            lines.append(_row(name.replace("_", " "), *(form.format(each) for form, each in zip(forms, figures))))
    return "\n".join(lines)


def _row(*cells):
    return "| " + " | ".join(cells) + " |"


def _saved(point, trained):
    return f"{1 - point.steps / trained:.0%}" if point.steps <= trained else ""


def _needs(curves, rule):
    """A line: the steps that a rule needs for the accuracy of all steps, in each model."""
    texts = []
    for curve in curves:
        exact = curve.full.exact
        point = cheapest(curve.points, rule, exact)
        if point is None:
            texts.append(f"no setting reaches {exact:.4f}")
        else:
            saved = _saved(point, curve.trained)
            text = f"{point.steps:.2f} steps for {point.exact:.4f}" + f", {saved} saved" * bool(saved)
            texts.append(f"{text} ({point.setting:g})")
    return f"{RULES[rule][0]}: {'; '.join(texts)}"


def draw(curve: Curve, path, title: str = "", remark: str = ""):
    """Draws exact accuracy over mean steps as a PNG, one curve per rule; the trained number of steps is marked."""
    figure, grid = new_figure(5.2)
    axes = figure.add_subplot(grid[:, :])
    style_axes(axes, "boards solved")
    axes.set_xlabel("mean supervision steps per board", fontsize=9, color="#555555")
    axes.set_xscale("log", base=2)
    labels = []
    for rule, (name, color) in RULES.items():
        line = sorted((point.steps, point.exact) for point in curve.points if point.rule == rule)
        if line:
            axes.plot(*zip(*line), "o-", color=color, markersize=4, linewidth=1.6)
            labels.append((line[-1][1], name, color))
    full = curve.full
    axes.plot(full.steps, full.exact, "s", color=INK, markersize=6, zorder=5)
    place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
    axes.annotate(f"{curve.trained} steps, as trained", (full.steps, full.exact), **place)
    axes.xaxis.set_major_formatter("{x:g}")
    label_ends(axes, labels)
    add_title(figure, title, remark)
    return save_picture(figure, path)
