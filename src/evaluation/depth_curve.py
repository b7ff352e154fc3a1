"""Bits per byte against depth: scores every exit rule at several thresholds, and draws the result."""

from collections.abc import Iterable
from typing import NamedTuple

from tqdm import tqdm

from src.errors import UserError
from src.evaluation.scoring import Size, corpus_windows, score_windows
from src.exits import ExitRule, max_depth, visits_per_recursion_step
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

ACT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KL_THRESHOLDS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
NAMES = {"fixed": "fixed depth", "halt": "halting head", "kl": "KL between steps"}
COLORS = {"fixed": ORANGE, "halt": BLUE, "kl": GREEN}


class CurvePoint(NamedTuple):
    """One setting of an exit rule, with its cost (depth, visits) and its quality (loss, bits per byte)."""

    exit: str
    setting: float  # recursion steps, act_threshold or kl_threshold
    depth: float  # mean recursion steps per token
    visits: float  # mean applications of the network per token
    saved: float  # share of visits saved compared with the trained depth
    loss: float  # nats per token
    bits_per_byte: float


def depth_curve(
    model,
    tokenizer,
    documents: Iterable[str | tuple[str, bool]],
    max_recursion_depth: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    act_thresholds: Iterable[float] = ACT_THRESHOLDS,
    kl_thresholds: Iterable[float] = KL_THRESHOLDS,
    max_docs: int | None = None,
    max_tokens: int | None = None,
    bar: tqdm | None = None,
) -> list[CurvePoint]:
    """Returns the points of every exit rule that the model supports, all scored on the same windows of text.

    One pass scores all fixed depths, up to max_recursion_depth or the trained depth, whichever is deeper. Each
    threshold needs a pass of its own, so the windows are kept in memory."""
    config, size = model.config, Size()
    if config.recursion == "none":
        raise UserError("recursion none visits the network once, so there is no depth curve: use a recursive model")
    deepest = max(max_depth(config), max_recursion_depth or 0)
    if deepest == 1:
        raise UserError("a depth curve needs more than one recursion step: add --max_recursion_depth 4")
    samples = list(corpus_windows(config, tokenizer, documents, size, stride, max_docs, max_tokens))
    if size.lost:
        raise UserError("the tokenizer loses part of the text, so there are no bits per byte: use other text")
    rules = [ExitRule("halt", deepest, act_threshold=a) for a in act_thresholds if config.halting]
    # kl compares two steps, so no token stops before step 2: with 2 steps in all, there is nothing to stop
    rules += [ExitRule("kl", deepest, kl_threshold=k) for k in kl_thresholds if deepest > 2]
    if bar is not None:
        bar.reset(size.tokens * (1 + len(rules)))
    fixed = score_windows(model, samples, size, batch_size, ExitRule("fixed", deepest), True, bar)
    points = [_point(config, "fixed", step, step, figures) for step, figures in enumerate(fixed.steps, 1)]
    for rule in rules:
        setting = rule.act_threshold if rule.exit == "halt" else rule.kl_threshold
        score = score_windows(model, samples, size, batch_size, rule, False, bar)
        points.append(_point(config, rule.exit, setting, score.depth, score.figures))
    return points


def _point(config, exit, setting, depth, figures) -> CurvePoint:
    visits = visits_per_recursion_step(config) * depth
    saved = 1 - depth / max_depth(config)
    return CurvePoint(exit, setting, depth, visits, saved, figures.loss, figures.bits_per_byte)


def cheapest_points(points: list[CurvePoint], trained_depth: int, within: float = 0.01) -> dict[str, CurvePoint]:
    """Returns {exit rule: its cheapest point (fewest visits) that is nearly as good as the trained depth}.

    Nearly as good means at most (1 + within) x the bits per byte at the trained depth. A rule without such a point is
    left out."""
    limit = (1 + within) * full_point(points, trained_depth).bits_per_byte
    cheapest = {}
    for name in NAMES:
        good = [p for p in points if p.exit == name and p.bits_per_byte <= limit]
        if good:
            cheapest[name] = min(good, key=lambda p: p.visits)
    return cheapest


def full_point(points: list[CurvePoint], trained_depth: int) -> CurvePoint:
    """Returns the point of the depth that the model was trained with."""
    return next(point for point in points if (point.exit, point.setting) == ("fixed", trained_depth))


def draw_depth_curve(points: list[CurvePoint], trained_depth: int, path: str, title: str = "", remark: str = ""):
    """Draws bits per byte over mean visits per token as a PNG: one curve per exit rule, its cheapest point circled.

    Points with far more bits per byte than the trained depth may lie above the frame."""
    figure, grid = new_figure(5.2)
    axes = figure.add_subplot(grid[:, :])
    full = full_point(points, trained_depth)
    style_axes(axes, "bits per byte")
    axes.set_xlabel("mean visits of the network per token", fontsize=9, color="#555555")
    axes.axhspan(full.bits_per_byte, 1.01 * full.bits_per_byte, color=GREY, alpha=0.15, linewidth=0)
    best, labels = cheapest_points(points, trained_depth), []
    for name, color in COLORS.items():
        curve = sorted((p.visits, p.bits_per_byte) for p in points if p.exit == name)
        if curve:
            axes.plot(*zip(*curve), "o-", color=color, markersize=4, linewidth=1.6)
            labels.append((curve[-1][1], f"{NAMES[name]}\n({_saving(best.get(name))})", color))
        if name in best:
            spot = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.4}
            axes.plot(best[name].visits, best[name].bits_per_byte, "o", **spot, zorder=4)
    _set_curve_limits(axes, points, full)
    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": COLORS["fixed"]}
    for p in points:
        if p.exit == "fixed" and p.bits_per_byte < axes.get_ylim()[1]:
            label = f"{p.setting:g} (trained)" if p is full else f"{p.setting:g}"
            axes.annotate(label, (p.visits, p.bits_per_byte), **place)
    axes.plot(full.visits, full.bits_per_byte, "s", color=INK, markersize=6, zorder=5)
    inside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "color": GREY}
    axes.text(0.01, 1.005 * full.bits_per_byte, "at most 1 % over the trained depth", **inside)
    label_ends(axes, labels, lines=2)
    add_title(figure, title, remark)
    return save_picture(figure, path)


def _saving(point) -> str:
    if point is None:
        return "none within 1 %"
    return f"{abs(point.saved):.0%} {'fewer' if point.saved >= 0 else 'more'} visits at {point.setting:g}"


def _set_curve_limits(axes, points, full):
    bits = [point.bits_per_byte for point in points]
    low, high = min(bits), max(1.01 * full.bits_per_byte, min(max(bits), 1.2 * full.bits_per_byte))
    margin = 0.08 * (high - low)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(0, 1.03 * max(point.visits for point in points))
    axes.set_ylim(low - margin, high + margin)
