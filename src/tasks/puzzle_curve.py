"""Exact accuracy against the mean number of supervision steps: when to stop, compared over stopping rules.

All rules are compared on the same answers: those of N boards after each of S steps, which `solve_puzzles.py --curve`
collects.

    fixed    every board stops after the same number of steps
    halt     a board stops after the first step whose halting probability is over a threshold
    random   the numbers of steps of `halt`, shuffled among the boards: the same mean, without the head's knowledge
    oracle   a board stops after the first step from which on it stays right; a board that never gets right stops
             after its first step. No rule: a bound, which needs the solution
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from src.errors import UserError
from src.tasks.puzzle_eval import Solved, shown_steps
from src.training.curves import (
    BLUE,
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

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
RULES = {"fixed": "fixed steps", "halt": "halting head", "random": "random, same mean", "oracle": "oracle"}
COLORS = {"fixed": ORANGE, "halt": BLUE, "random": GREY, "oracle": GREEN}
SHUFFLES = 20  # of random, averaged


class Point(NamedTuple):
    """One setting of a rule: its cost and its accuracy."""

    rule: str
    setting: float  # steps (of oracle: the most), or threshold
    steps: float  # mean supervision steps per board
    exact: float  # fraction of the boards whose answer is right


def stops_of(halts: Float[np.ndarray, "s n"], threshold: float) -> Int[np.ndarray, "n"]:
    """The step (from 0) at which each board stops: the first one over the threshold, or else the last."""
    over = halts > threshold
    return np.where(over.any(0), over.argmax(0), len(halts) - 1)


def oracle_stops(is_exact: Bool[np.ndarray, "s n"]) -> Int[np.ndarray, "n"]:
    """The first step (from 0) from which on each board is right; 0 if it is wrong after the last step."""
    tail = np.cumprod(is_exact[::-1], axis=0).sum(0)  # right steps at the end
    return np.where(tail > 0, len(is_exact) - tail, 0)


def curve_of(parts: list[Solved]) -> list[Point]:
    """The points of boards that were solved part by part, all with a fixed number of steps.

    Boards whose answer is not known are left out. Raises UserError if no answer is known."""
    is_exact = np.concatenate([part.answers.is_exact for part in parts], 1)
    known = ~np.isnan(is_exact[-1])
    if not known.any():
        raise UserError("--curve needs boards whose answer is known: give a file with answers")
    halting = None
    if parts[0].halting is not None:
        halting = np.concatenate([part.halting for part in parts], 1)[:, known]
    return curve(is_exact[:, known] == 1, halting)


def curve(is_exact: Bool[np.ndarray, "s n"], halts: Float[np.ndarray, "s n"] | None, seed: int = 0) -> list[Point]:
    """The points of every rule, from answers that are right or not and their halting probabilities."""
    n_steps, n = is_exact.shape
    points = [Point("fixed", step, step, is_exact[step - 1].mean()) for step in range(1, n_steps + 1)]
    if halts is not None:
        rng = np.random.default_rng(seed)
        for threshold in THRESHOLDS:
            stops = stops_of(halts, threshold)
            mean = float(stops.mean() + 1)
            points.append(Point("halt", threshold, mean, _exact_at(is_exact, stops)))
            shuffled = [_exact_at(is_exact, rng.permutation(stops)) for _ in range(SHUFFLES)]
            points.append(Point("random", threshold, mean, float(np.mean(shuffled))))
    stops = oracle_stops(is_exact)
    points.append(Point("oracle", n_steps, float(stops.mean() + 1), _exact_at(is_exact, stops)))
    return [Point(rule, float(setting), float(steps), float(exact)) for rule, setting, steps, exact in points]


def _exact_at(is_exact, stops) -> float:
    return float(is_exact[stops, np.arange(len(stops))].mean())


def cheapest(points: list[Point], rule: str, exact: float) -> Point | None:
    """The point of a rule with the fewest mean steps among those at least as accurate, or None."""
    good = [point for point in points if point.rule == rule and point.exact >= exact]
    return min(good, key=lambda point: point.steps, default=None)


def full_point(points: list[Point], trained: int) -> Point:
    """The point of the number of steps that the model was trained with."""
    return next(point for point in points if (point.rule, point.setting) == ("fixed", trained))


def report(points: list[Point], trained: int) -> str:
    """The curve as Markdown: the exact accuracy of each rule, and the steps that it needs for that of all steps."""
    full = full_point(points, trained)
    shown = {*shown_steps(sum(point.rule == "fixed" for point in points), most=0), trained}
    lines = [f"exact accuracy after all {trained} steps: {full.exact:.4f}", ""]
    lines += ["| rule | setting | mean steps | exact | steps saved |", "|---|---|---|---|---|"]
    for point in points:
        if point.rule != "fixed" or point.setting in shown:
            saved = 1 - point.steps / trained
            lines.append(f"| {point.rule} | {point.setting:g} | {point.steps:.2f} | {point.exact:.4f} | {saved:.0%} |")
    lines.append("")
    for rule, name in RULES.items():
        point = cheapest(points, rule, full.exact)
        if point is None:
            lines.append(f"{name}: no setting reaches {full.exact:.4f}")
        else:
            saved = 1 - point.steps / trained
            lines.append(
                f"{name}: {point.steps:.2f} steps for {point.exact:.4f}, {saved:.0%} saved ({point.setting:g})"
            )
    return "\n".join(lines)


def draw(points: list[Point], trained: int, path, title: str = "", remark: str = ""):
    """Draws exact accuracy over mean steps as a PNG, one curve per rule; the trained number of steps is marked."""
    figure, grid = new_figure(5.2)
    axes = figure.add_subplot(grid[:, :])
    style_axes(axes, "boards solved")
    axes.set_xlabel("mean supervision steps per board", fontsize=9, color="#555555")
    axes.set_xscale("log", base=2)
    labels = []
    for rule, color in COLORS.items():
        line = sorted((point.steps, point.exact) for point in points if point.rule == rule)
        if line:
            axes.plot(*zip(*line), "o-", color=color, markersize=4, linewidth=1.6)
            labels.append((line[-1][1], RULES[rule], color))
    full = full_point(points, trained)
    axes.plot(full.steps, full.exact, "s", color=INK, markersize=6, zorder=5)
    place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
    axes.annotate(f"{trained} steps, as trained", (full.steps, full.exact), **place)
    axes.xaxis.set_major_formatter("{x:g}")
    label_ends(axes, labels)
    add_title(figure, title, remark)
    return save_picture(figure, path)
