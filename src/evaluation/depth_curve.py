"""Bits per byte against the cost of a token: fixed depths, every exit rule at several thresholds, and controls."""

import itertools
import math
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

import torch
from tqdm import tqdm

from src.errors import UserError
from src.evaluation.exit_controls import calibrated_depths, loss_at, oracle_depths, random_loss
from src.evaluation.scoring import Size, TokenScores, corpus_windows, score_samples
from src.exits import ExitRule, max_depth, visits_per_recursion_step
from src.losses import IGNORE, bits_per_byte
from src.metrics import decode_flops
from src.training.curves import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    add_title,
    label_ends,
    new_figure,
    save_picture,
    style_axes,
)

ACT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KL_THRESHOLDS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
PRICES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)  # of a recursion step, nats
FEWEST = 500  # tokens in each half of the text, for calibrated exits to be fitted to
NAMES = {
    "fixed": "fixed depth",
    "halt": "halting head",
    "kl": "KL between steps",
    "calibrated": "calibrated",
    "oracle": "oracle",
}
COLORS = {"fixed": ORANGE, "halt": BLUE, "kl": GREEN, "calibrated": PINK, "oracle": GREY}


class CurvePoint(NamedTuple):
    """One setting of an exit rule or a control, with its cost (depth, visits, FLOPs) and its quality."""

    exit: str
    setting: float  # recursion steps, act_threshold, kl_threshold, or the price of a step in nats
    depth: float  # mean recursion steps per token
    visits: float  # mean applications of the network per token
    flops: float  # of decoding a token, mean; a rule pays for the coda and the head of each answer that it looks at
    saved: float  # share of the FLOPs that is saved compared with the trained depth
    loss: float  # nats per token
    bits_per_byte: float
    random: float  # bits per byte if as many tokens, chosen by chance, stopped after each step
    gain: float  # bits per byte below the best mixture of fixed depths that costs no more
    gain_error: float  # standard error of `gain`; it takes windows as independent, also those of one document


def depth_curve(
    model,
    tokenizer,
    documents: Iterable[str | tuple[str, bool]],
    max_recursion_depth: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    act_thresholds: Iterable[float] = ACT_THRESHOLDS,
    kl_thresholds: Iterable[float] = KL_THRESHOLDS,
    prices: Iterable[float] = PRICES,
    max_docs: int | None = None,
    max_tokens: int | None = None,
    bar: tqdm | None = None,
) -> list[CurvePoint]:
    """Returns the points of fixed depths, of every exit rule that the model supports, and of the controls.

    All are scored on the same windows of text. One pass scores all fixed depths, up to max_recursion_depth or the
    trained depth, whichever is deeper. The controls (`exit_controls`) are computed from it, for each of `prices`. Each
    threshold needs a pass of its own, so the windows are kept in memory. Calibrated exits need 500 tokens in the even
    windows, and as many in the odd ones."""
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
    all_steps = _score(model, samples, batch_size, ExitRule("fixed", deepest), bar, every_step=True)
    window = torch.tensor([n for n, sample in enumerate(samples) for _ in range((sample.target_ids != IGNORE).sum())])
    losses = -all_steps.logprobs.double()
    curve = _Curve(config, losses, window, size.bytes / size.tokens)
    points = [curve.at("fixed", step, torch.full_like(window, step)) for step in range(1, deepest + 1)]
    for rule in rules:
        scores = _score(model, samples, batch_size, rule, bar)
        setting = rule.act_threshold if rule.exit == "halt" else rule.kl_threshold
        points.append(curve.at(rule.exit, setting, scores.depth, -scores.logprobs[0].double()))
    half = window % 2  # even or odd windows
    for price in prices if half.bincount(minlength=2).min() >= FEWEST else ():
        depths = calibrated_depths(losses, all_steps.features, half == 0, price)
        points.append(curve.at("calibrated", price, depths))
    return points + [curve.at("oracle", price, oracle_depths(losses, price)) for price in prices]


def _score(model, samples, batch_size, rule, bar, every_step=False) -> TokenScores:
    """Returns the scores of all targets, in the order of the samples."""
    rows = score_samples(model, samples, batch_size, rule, every_step, features=every_step, bar=bar)
    ordered = [scores for _, scores in sorted(rows, key=itemgetter(0))]
    return TokenScores(*(torch.cat(part, -1) for part in zip(*ordered)))


class _Curve:
    """Makes points.  losses: (S, N) of all tokens after every step. window: (N,), the number of each token's window."""

    def __init__(self, config, losses, window, bytes_per_token):
        self.config, self.losses, self.window, self.bytes_per_token = config, losses, window, bytes_per_token
        self.trained = decode_flops(config, max_depth(config))
        self.fixed = [decode_flops(config, step) for step in range(1, len(losses) + 1)]

    def at(self, exit, setting, depths, losses=None) -> CurvePoint:
        """Returns the point of a rule that chose these depths (N,).  losses: (N,), by default those of all_steps."""
        losses = loss_at(self.losses, depths) if losses is None else losses
        depth, loss = depths.double().mean().item(), losses.mean().item()
        looks = {"halt": (depth, 1), "kl": (depth, depth), "calibrated": (depth, depth)}.get(exit, (1, 1))
        flops = decode_flops(self.config, depth, *looks)
        gain = self._best_mixture(flops) - losses
        error = _error_of_mean(gain, self.window)
        nats = (loss, random_loss(self.losses, depths), gain.mean().item(), error)
        bits = [bits_per_byte(value, self.bytes_per_token) for value in nats]
        visits = visits_per_recursion_step(self.config) * depth
        return CurvePoint(exit, setting, depth, visits, flops, 1 - flops / self.trained, loss, *bits)

    def _best_mixture(self, flops):
        """Returns the losses (N,) of the best mixture of two fixed depths that costs at most `flops` per token."""
        means, best = self.losses.mean(1).tolist(), (math.inf, 0, 0, 0.0)
        for i, j in itertools.combinations_with_replacement(range(len(means)), 2):
            if self.fixed[i] <= flops or i == 0:
                room = (flops - self.fixed[i]) / (self.fixed[j] - self.fixed[i]) if j > i else 0.0
                share = min(1.0, max(0.0, room))
                best = min(best, ((1 - share) * means[i] + share * means[j], i, j, share))
        _, i, j, share = best
        return (1 - share) * self.losses[i] + share * self.losses[j]


def _error_of_mean(values, window) -> float:
    """Returns the standard error of the mean of `values`, whose tokens depend on each other within a window."""
    counts = torch.bincount(window).double()
    sums = torch.zeros_like(counts).index_add_(0, window, values - values.mean())
    n = len(counts)
    return (sums.square().sum() * n / (n - 1)).sqrt().item() / len(values) if n > 1 else math.nan


def cheapest_points(points: list[CurvePoint], trained_depth: int, within: float = 0.01) -> dict[str, CurvePoint]:
    """Returns {exit rule: its cheapest point (fewest FLOPs) that is nearly as good as the trained depth}.

    Nearly as good means at most (1 + within) x the bits per byte at the trained depth. A rule without such a point is
    left out, and so is the oracle, which no model can follow."""
    limit = (1 + within) * full_point(points, trained_depth).bits_per_byte
    cheapest = {}
    for name in NAMES:
        good = [p for p in points if p.exit == name and p.bits_per_byte <= limit]
        if good and name != "oracle":
            cheapest[name] = min(good, key=lambda p: p.flops)
    return cheapest


def full_point(points: list[CurvePoint], trained_depth: int) -> CurvePoint:
    """Returns the point of the depth that the model was trained with."""
    return next(point for point in points if (point.exit, point.setting) == ("fixed", trained_depth))


def draw_depth_curve(points: list[CurvePoint], trained_depth: int, path: str, title: str = "", remark: str = ""):
    """Draws bits per byte over the FLOPs of a token as a PNG: one curve per exit rule, its cheapest point circled.

    FLOPs are given as a share of those at the trained depth. Points with far more bits per byte than the trained depth
    may lie above the frame."""
    figure, grid = new_figure(5.2)
    axes = figure.add_subplot(grid[:, :])
    full = full_point(points, trained_depth)
    style_axes(axes, "bits per byte")
    axes.set_xlabel("FLOPs per token, coda and head included (1 = at the trained depth)", fontsize=9, color="#555555")
    axes.axhspan(full.bits_per_byte, 1.01 * full.bits_per_byte, color=GREY, alpha=0.15, linewidth=0)
    best, labels = cheapest_points(points, trained_depth), []
    for name, color in COLORS.items():
        curve = sorted((1 - p.saved, p.bits_per_byte) for p in points if p.exit == name)
        if curve:
            axes.plot(*zip(*curve), "o:" if name == "oracle" else "o-", color=color, markersize=4, linewidth=1.6)
            remark_of = "knows every loss" if name == "oracle" else _saving(best.get(name))
            labels.append((curve[-1][1], f"{NAMES[name]}\n({remark_of})", color))
        if name in best:
            spot = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.4}
            axes.plot(1 - best[name].saved, best[name].bits_per_byte, "o", **spot, zorder=4)
    _set_curve_limits(axes, points, full)
    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": COLORS["fixed"]}
    for p in points:
        if p.exit == "fixed" and p.bits_per_byte < axes.get_ylim()[1]:
            label = f"{p.setting:g} (trained)" if p is full else f"{p.setting:g}"
            axes.annotate(label, (1 - p.saved, p.bits_per_byte), **place)
    axes.plot(1, full.bits_per_byte, "s", color=INK, markersize=6, zorder=5)
    inside = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 8, "color": GREY}
    axes.text(0.99, 1.005 * full.bits_per_byte, "at most 1 % over the trained depth", **inside)
    label_ends(axes, labels, lines=2)
    add_title(figure, title, remark)
    return save_picture(figure, path)


def _saving(point) -> str:
    if point is None:
        return "none within 1 %"
    return f"{abs(point.saved):.0%} {'fewer' if point.saved >= 0 else 'more'} FLOPs at {point.setting:g}"


def _set_curve_limits(axes, points, full):
    bits = [point.bits_per_byte for point in points]
    low, high = min(bits), max(1.01 * full.bits_per_byte, min(max(bits), 1.2 * full.bits_per_byte))
    margin = 0.08 * (high - low)
    axes.set_xlim(0, 1.03 * max(1 - point.saved for point in points))
    axes.set_ylim(low - margin, high + margin)
