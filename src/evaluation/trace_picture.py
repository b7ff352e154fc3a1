"""Draws a trace as a picture: how the prediction of each token changes from one recursion step to the next."""

import re
import sys
from math import ceil
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.evaluation.trace import changes_of_mind, clip, is_single, likeliest, summary, text_width, visible
from src.training.curves import BLUE, GREEN, GREY, INK

MONO = "DejaVu Sans Mono"  # comes with matplotlib
DRAWN = 240  # most tokens in a picture; the JSON file has all of them
RANKS = 5  # candidates shown for a trace of single steps
ROW, COLUMN, BAR, LEFT, HEAD, NAME, STRIP = 0.23, 0.94, 0.76, 0.62, 0.68, 0.27, 0.36  # inches
# lighter tints of the colours in src/training/curves.py
WRITTEN, RIVALS, OTHERS = "#7fb8dc", ("#f2a875", "#f5d27a", "#e0b4cd"), ("#d4d4d4", "#e3e3e3")
GROUND, RIM = "#f5f5f5", "#bbbbbb"


class Fonts(NamedTuple):
    """Installed fonts that together cover a text, the monospaced one first; and the characters that none has."""

    names: list[str]
    missing: set[str]

    @property
    def style(self) -> dict:
        """The text style of a heading. Not bold with fallback fonts: matplotlib warns if one has no bold face."""
        return {"family": self.names, "fontweight": "normal" if len(self.names) > 1 else "bold"}

    def show(self, text: str, index: int | None = None) -> str:
        """Returns printable text: a character that no font has becomes <U+4EAC> or similar.

        index: the id of a token. If its text has several such characters, the whole text becomes #index."""
        text = visible(text)
        if index is not None and sum(c in self.missing for c in text) > 1:
            return f"#{index}"
        return "".join(f"<U+{ord(c):04X}>" if c in self.missing else c for c in text)


def choose_fonts(text: str) -> Fonts:
    """Chooses fonts that cover a text. Beyond the monospaced font it prefers Japanese fonts, then sans, then others."""
    from matplotlib import font_manager

    names, missing = [MONO], set(text) - _characters(font_manager.findfont(MONO))
    # the Last Resort font covers everything, but only with placeholder boxes
    fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
    for font in sorted(fonts, key=lambda f: (*(not re.search(name, f.name) for name in ("JP|Gothic", "Sans")), f.name)):
        if not missing:
            break
        if font.style == "normal" and (found := missing & _characters(font.fname)):
            names, missing = [*names, font.name], missing - found
    return Fonts(names, missing)


def _characters(file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    return set(map(chr, get_font(file).get_charmap()))


class Look(NamedTuple):
    """Layout values that all panels of a picture share."""

    single: bool  # tokens took one step each: rows are candidates, likeliest first
    rows: int
    row: float  # height in inches
    most: float  # entropy at the top of the entropy strip, in bits
    fonts: Fonts


def draw_trace(trace: list[dict], path, title: str = ""):
    """Draws tokens from left to right and their recursion steps from top to bottom. Returns the Figure.

    Each bar is the probability distribution after a step: the token written at its left in blue, then in orange the
    tokens that were the likeliest at some step, then others in grey. A label names the likeliest token at each step
    where it changes. If all tokens took a single step, there is a bar per candidate instead. Raises UserError if the
    file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, single = trace[:DRAWN], is_single(trace)
    rows = RANKS if single else max(token["depth"] for token in drawn)
    most = max(1.0, *(max(token["entropy"]) for token in drawn))
    look = Look(single, rows, min(ROW, 3.7 / rows), most, _fonts_for(drawn, title, single))
    per_panel = 10 if len(drawn) <= 40 else 20
    panels = [drawn[i : i + per_panel] for i in range(0, len(drawn), per_panel)]
    width, height = LEFT + COLUMN * max(10, min(per_panel, len(drawn))), NAME + look.row * rows + STRIP
    figure = Figure(figsize=(width, HEAD + height * len(panels)), dpi=150)
    FigureCanvasAgg(figure)
    for i, tokens in enumerate(panels):
        bottom = height * (len(panels) - 1 - i)
        axes = figure.add_axes((0, bottom / figure.get_figheight(), 1, height / figure.get_figheight()))
        axes.set(xlim=(0, width), ylim=(height - NAME, -NAME))  # in inches, steps downwards from 0
        axes.axis("off")
        _draw_panel(axes, tokens, look)
    _draw_head(figure, trace, title, look)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}; choose another file") from None
    return figure


def _fonts_for(trace, title, single):
    named = [c["text"] for token in trace for c in (token, *(label[-1] for label in _labels(token, single)))]
    fonts = choose_fonts("…" + "".join(map(visible, (title, *named))))
    if fonts.missing:
        some = " ".join(sorted(fonts.missing)[:8])
        hint = "they are drawn as code points and ids; to see them, install a font such as Noto Sans CJK"
        print(f"no installed font has {len(fonts.missing)} of the characters ({some}): {hint}", file=sys.stderr)
    return fonts


def _draw_panel(axes, tokens, look):
    """Draws a column of bars per token, with its name above and its entropy below. The axes are in inches."""
    from matplotlib.collections import LineCollection, PolyCollection

    label = {"color": GREY, "fontsize": 7.5, "ha": "right", "va": "center"}
    for s in range(0, look.rows, ceil(0.14 / look.row)):
        top = "likeliest" if look.single else "step 1"
        axes.text(LEFT - 0.1, (s + 0.4) * look.row, top if s == 0 else s + 1, **label)
    axes.text(LEFT - 0.1, look.row * look.rows + 0.14, "entropy", **label)
    bands, dots, halts, entropies = [], [], [], []
    for i, token in enumerate(tokens):
        x, end = LEFT + i * COLUMN, (token["depth"] - 0.1) * look.row
        bands += _ranked_bars(token, x, look.row) if look.single else _bands(token, x, look.row)
        dots += [(x + BAR + 0.06, (s + 0.4) * look.row, p) for s, p in enumerate(token["halt"]) if p is not None]
        halts += [[(x, end), (x + BAR, end)]] * token["halted"]
        entropies.append(_curve(token["entropy"], x, look.rows * look.row + 0.03, look.most))
        _draw_names(axes, token, x, look)
    shapes, colors = zip(*bands)
    axes.add_collection(PolyCollection(shapes, facecolors=colors, edgecolors="white", linewidths=0.5))
    floor = look.rows * look.row + 0.25
    under = [[(line[0][0], floor), *line, (line[-1][0], floor)] for line in entropies]
    axes.add_collection(PolyCollection(under, facecolors=GREEN, alpha=0.2))
    axes.add_collection(LineCollection(entropies, colors=GREEN, linewidths=1))
    axes.add_collection(LineCollection(halts, colors=INK, linewidths=1.8, label="halts"))
    if dots:
        x, y, p = zip(*dots)
        axes.scatter(x, y, s=16, facecolors=[(0.2, 0.2, 0.2, alpha) for alpha in p], edgecolors=RIM, linewidths=0.5)


def _ordered(token):
    """Returns (candidate, colour) from left to right: the token written, those that were the likeliest at some step,
    and up to four others."""
    leaders = [c["token"] for c in likeliest(token)]
    written = next(c for c in token["candidates"] if c["token"] == token["token"])
    others = [c for c in token["candidates"] if c is not written]
    rivals = sorted((c for c in others if c["token"] in leaders), key=lambda c: leaders.index(c["token"]))
    rest = [c for c in others if c["token"] not in leaders][:4]
    colors = [WRITTEN] + [RIVALS[min(i, 2)] for i in range(len(rivals))] + [OTHERS[i % 2] for i in range(len(rest))]
    return list(zip([written, *rivals, *rest], colors))


def _bands(token, x, row):
    """Yields (polygon, colour): the background, then each candidate's share as a band that changes between steps."""
    top = np.arange(token["depth"])[:, None] * row
    y = (top + [0, 0.8 * row]).ravel()
    yield [(x, 0), (x + BAR, 0), (x + BAR, y[-1]), (x, y[-1])], GROUND
    left = np.zeros(token["depth"])
    for candidate, color in _ordered(token):
        right = left + candidate["probability"]
        edges = [np.column_stack((x + BAR * edge.repeat(2), y)) for edge in (left, right)]
        yield np.concatenate((edges[0], edges[1][::-1])), color
        left = right


def _ranked_bars(token, x, row):
    """Yields (polygon, colour): a background and a bar for each of the likeliest candidates of the only step."""
    for k, candidate in enumerate(token["candidates"][:RANKS]):
        p, top, bottom = candidate["probability"][0], k * row, (k + 0.8) * row
        color = RIVALS[0] if p > token["probability"][0] else OTHERS[0]
        for right, tint in ((1, GROUND), (p, WRITTEN if candidate["token"] == token["token"] else color)):
            yield [(x, top), (x + BAR * right, top), (x + BAR * right, bottom), (x, bottom)], tint


def _curve(values, x, y, most):
    """Returns the points of the entropy curve over the steps, from left to right. One step gives a level line."""
    values = values * 2 if len(values) == 1 else values
    return [(x + BAR * s / (len(values) - 1), y + 0.22 * (1 - v / most)) for s, v in enumerate(values)]


def _draw_names(axes, token, x, look):
    """Labels one token: its text and final probability above the bars, and the likeliest candidates inside them."""
    style = {"family": look.fonts.names, "va": "center", "color": INK, "parse_math": False}
    name = clip(look.fonts.show(token["text"], token["token"]), 9)
    axes.text(x, -0.1, name, fontsize=8, **style | look.fonts.style)
    share = f"{100 * token['probability'][-1]:.0f}%"
    axes.text(x + BAR + 0.1, -0.1, share, fontsize=7, color=BLUE, ha="right", va="center")
    size = min(7.5, 50 * look.row)
    for s, start, candidate in _labels(token, look.single):
        text = clip(look.fonts.show(candidate["text"], candidate["token"]), 12)
        last = BAR - 0.62 * size / 72 * text_width(text)  # the furthest start at which the text still fits the bar
        at = x + 0.03 + max(0, min(BAR * start, last - 0.03))
        axes.text(at, (s + 0.41) * look.row, text, fontsize=size, **style)


def _labels(token, single):
    """Returns (row, left end of its share, candidate) for each candidate that gets a label."""
    if single:
        return [(k, 0, candidate) for k, candidate in enumerate(token["candidates"][:RANKS])]
    order, new = [candidate for candidate, _ in _ordered(token)], [True, *changes_of_mind(token)[1:]]
    leaders = [(s, leader) for s, leader in enumerate(likeliest(token)) if new[s]]
    return [(s, sum(c["probability"][s] for c in order[: order.index(leader)]), leader) for s, leader in leaders]


def _draw_head(figure, trace, title, look):
    """Draws the title, the summary and the legend in the top HEAD inches."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left, right = LEFT / figure.get_figwidth(), 1 - (COLUMN - BAR) / figure.get_figwidth()
    y, below = (1 - inches / figure.get_figheight() for inches in (0.2, 0.36))
    style = {"fontsize": 11, "color": INK, "parse_math": False, **look.fonts.style}
    end = clip(visible(title)[::-1], 44)[::-1]  # the end of a long prompt: the tokens continue it
    figure.text(left, y, look.fonts.show(end), va="center", **style)
    remark = summary(trace) + (f" (drawn: the first {DRAWN})" if len(trace) > DRAWN else "")
    figure.text(right, y, remark, ha="right", va="center", fontsize=8.5, color=GREY)
    dot = {"marker": "o", "linestyle": "", "markersize": 4, "markeredgecolor": RIM, "markeredgewidth": 0.5}
    dots = tuple(Line2D([], [], markerfacecolor=(0.2, 0.2, 0.2, p), **dot) for p in (0, 0.5, 1))
    keys = {
        "the token written, its probability at the end": Patch(color=WRITTEN),
        "another, likelier then": tuple(Patch(color=color) for color in RIVALS),
        "others": tuple(Patch(color=color) for color in OTHERS),
        "halting probability, 0 to 1": trace[0]["halt"][0] is not None and dots,
        "halted early": any(token["halted"] for token in trace) and Line2D([], [], color=INK, linewidth=1.8),
        f"entropy, 0 to {look.most:.1f} bits": Line2D([], [], color=GREEN, linewidth=1),
    }
    keys = {text: handle for text, handle in keys.items() if handle}
    place = {"loc": "upper left", "bbox_to_anchor": (left, below), "borderaxespad": 0, "borderpad": 0, "frameon": False}
    sizes = {"handlelength": 1.4, "handletextpad": 0.5, "columnspacing": 1.3, "fontsize": 8, "labelcolor": GREY}
    handles = {"handler_map": {tuple: HandlerTuple(None, pad=0.1)}, "ncols": len(keys)}
    figure.legend(list(keys.values()), list(keys), **place, **sizes, **handles)
