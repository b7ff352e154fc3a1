"""Draws a trace of a board: a panel per step, or an animation.

Cells of a Sudoku are digits on a blue that grows with the probability of the digit. Cells of a maze and of ARC are
squares whose colour grows from grey to that of the token. All lengths are in inches.
"""

import io
from functools import cache
from math import ceil
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.tasks.arc import COLOUR
from src.tasks.board_trace import BoardTrace, verdict_of
from src.tasks.mazes import FLOOR, GOAL, PATH, START, WALL, Maze
from src.tasks.sudoku import Sudoku
from src.tasks.sudoku_solver import BOXES
from src.training.curves import AMBER, BLUE, GREEN, GREY, INK, ORANGE, PINK

WIDEST, NARROWEST, MARGIN, GAP = 12.4, 7.2, 0.3, 0.38  # of a picture, around it, between panels
HEAD, NAME, STRIP, PAD = 0.76, 0.28, 0.42, 0.12  # title and legend; above and below a board; between rows of panels
SIDE = {4: 0.42, 6: 0.36, 9: 0.29}  # of a cell of a Sudoku
LARGEST_BOARD, LARGEST_CELL = 2.64, 0.29  # of the others
SURE, CLUE, UNSURE, TRACK = "#8fc7ea", "#e4e4e4", "#d9d9d9", "#e9e9e9"
MAZE = {WALL: "#3b3f46", FLOOR: "#fbfaf6", START: GREEN, GOAL: PINK, PATH: BLUE}
# the ten colours of ARC's own pages
ARC = "#000000 #0074d9 #ff4136 #2ecc40 #ffdc00 #aaaaaa #f012be #ff851b #7fdbff #870c25".split()
FRAME_S, LAST_FRAME_S = 0.8, 3.0  # of an animation
MOST_FRAMES = 100


class Layout(NamedTuple):
    cell: float
    columns: int  # panels side by side
    width: float
    height: float
    left: float
    head: float
    board: tuple[float, float]  # width, height


def draw_trace(trace: BoardTrace, path):
    """Draws a picture of the steps, or, if the path ends in .gif, an animation.

    Raises UserError if the file cannot be written."""
    is_gif = str(path).lower().endswith(".gif")
    content = _animation(trace) if is_gif else _picture(trace, str(path).rpartition(".")[2].lower())
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}; choose another file") from None


def _picture(trace, suffix) -> bytes:
    figure, buffer = draw_steps(trace, trace.shown()), io.BytesIO()
    figure.savefig(buffer, format=suffix, facecolor="white")
    return buffer.getvalue()


def _animation(trace) -> bytes:
    from PIL import Image

    n = len(trace.steps)
    numbers = np.unique(np.linspace(0, n - 1, min(n, MOST_FRAMES)).round().astype(int)).tolist()
    frames = []
    for number in numbers:
        figure = draw_steps(trace, [number], is_frame=True)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    # one palette for all frames, so that colours do not flicker
    some = [frames[i] for i in sorted({0, 1 % len(frames), len(frames) // 2, len(frames) - 1})]
    sheet = Image.fromarray(np.concatenate([np.asarray(frame) for frame in some]))
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [1000 * FRAME_S] * (len(frames) - 1) + [1000 * LAST_FRAME_S]
    buffer = io.BytesIO()
    options = {"append_images": frames[1:], "loop": 0, "optimize": False}
    frames[0].save(buffer, "GIF", save_all=True, duration=[round(ms) for ms in times], **options)
    return buffer.getvalue()


def draw_steps(trace: BoardTrace, numbers: list[int], is_frame: bool = False):
    """Draws the steps with these numbers (from 0) side by side. Returns the Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = _layout(trace.kind, len(numbers), is_frame)
    figure = Figure(figsize=(layout.width, layout.height), dpi=110 if is_frame else 160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    board_width, board_height = layout.board
    for i, number in enumerate(numbers):
        row, column = divmod(i, layout.columns)
        x = layout.left + column * (board_width + GAP)
        y = layout.head + row * (NAME + board_height + STRIP + PAD) + NAME
        _draw_panel(axes, trace, number, (x, y), layout)
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="auto")
    _draw_head(figure, trace, layout, len(numbers))
    return figure


def _layout(kind, n, is_frame):
    cell = (
        SIDE[kind.size] if isinstance(kind, Sudoku) else min(LARGEST_CELL, LARGEST_BOARD / max(kind.height, kind.width))
    )
    cell *= 1.5 if is_frame else 1
    width, height = cell * kind.width, cell * kind.height
    most = max(1, int((WIDEST - 2 * MARGIN + GAP) / (width + GAP)))
    rows = ceil(n / most)
    columns = ceil(n / rows)
    inner = columns * (width + GAP) - GAP
    total = max(inner + 2 * MARGIN, 4.6 if is_frame else NARROWEST)
    head = HEAD + 0.19 * (ceil((7 if isinstance(kind, Maze) else 5) / _legend_columns(total)) - 1)
    tall = head + rows * (NAME + height + STRIP + PAD)
    return Layout(cell, columns, total, tall, (total - inner) / 2, head, (width, height))


def _legend_columns(width):
    return max(2, min(7, int((width - 2 * MARGIN) / 1.25)))


# ---- panels ---------------------------------------------------------------------------------------------------------


def _draw_panel(axes, trace, number, corner, layout):
    (x, y), (width, height) = corner, layout.board
    step = trace.steps[number]
    colours = _colours(trace, number).reshape(trace.kind.height, trace.kind.width, 3)
    axes.imshow(colours, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto")
    _draw_lines(axes, trace.kind, corner, layout)
    if isinstance(trace.kind, Sudoku):
        _draw_digits(axes, trace, number, corner, layout)
    else:
        _draw_letters(axes, trace, corner, layout)
    _draw_marks(axes, trace, step, corner, layout)
    axes.text(x, y - 0.09, f"step {step['step']}", fontsize=9.5, color=INK, fontweight="bold", va="baseline")
    verdict = verdict_of(step)
    colour = {True: GREEN, False: ORANGE, None: GREY}[step["right"]]
    axes.text(x + width, y - 0.09, verdict, fontsize=9, color=colour, ha="right", va="baseline")
    if step["halt"] is not None:
        _draw_halt(axes, step["halt"], x, y + height, width)


def _draw_halt(axes, halt, x, bottom, width):
    from matplotlib.patches import Rectangle

    top = bottom + 0.1
    axes.add_patch(Rectangle((x, top), width, 0.06, facecolor=TRACK, edgecolor="none"))
    axes.add_patch(Rectangle((x, top), width * halt, 0.06, facecolor=INK, edgecolor="none"))
    axes.text(x, top + 0.21, f"halting {halt:.2f}", fontsize=8, color=GREY, va="baseline")


def _colours(trace, number):
    """Returns the colours of the cells, (L, 3)."""
    kind, tokens = trace.kind, trace.answers[number]
    p = np.array(trace.steps[number]["probability"])
    chance = 1 / (kind.vocab_size - 1)
    t = np.clip((p - chance) / (1 - chance), 0, 1)[:, None]
    if isinstance(kind, Sudoku):
        colours = (1 - t) * _rgb("#ffffff") + t * _rgb(SURE)
        colours[trace.is_clue] = _rgb(CLUE)
        return colours
    palette = MAZE if isinstance(kind, Maze) else dict(enumerate(ARC, start=COLOUR))
    own = np.array([_rgb(palette.get(token, "#ffffff")) for token in range(kind.vocab_size)])
    return (1 - t) * _rgb(UNSURE) + t * own[tokens]


def _rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _draw_lines(axes, kind, corner, layout):
    from matplotlib.collections import LineCollection

    (x, y), (width, height) = corner, layout.board
    rows, columns = BOXES[kind.size] if isinstance(kind, Sudoku) else (kind.height, kind.width)
    thin, thick = [], []
    for i in range(kind.width + 1):
        line = [(x + i * layout.cell, y), (x + i * layout.cell, y + height)]
        (thick if i % columns == 0 else thin).append(line)
    for i in range(kind.height + 1):
        line = [(x, y + i * layout.cell), (x + width, y + i * layout.cell)]
        (thick if i % rows == 0 else thin).append(line)
    is_sudoku = isinstance(kind, Sudoku)
    fine = {"colors": "#b5b5b5" if is_sudoku else "#ffffff", "linewidths": 0.6 if is_sudoku else 3.5 * layout.cell}
    axes.add_collection(LineCollection(thin, zorder=2, **fine))
    axes.add_collection(LineCollection(thick, colors=INK, linewidths=1.5, zorder=4, capstyle="projecting"))


def _centre(cell, trace, corner, layout):
    row, column = divmod(cell, trace.kind.width)
    return corner[0] + (column + 0.5) * layout.cell, corner[1] + (row + 0.5) * layout.cell


def _draw_digits(axes, trace, number, corner, layout):
    """Draws the digits as shapes, which is several times as fast as text objects."""
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import Affine2D

    clues, wrong = trace.is_clue, set(trace.steps[number]["wrong"] or ())
    size, paths, colours = 0.56 * layout.cell, [], []
    for cell, token in enumerate(trace.answers[number]):
        glyph = _glyph(trace.kind.symbols[token], bool(clues[cell]) or cell in wrong)
        x, y = _centre(cell, trace, corner, layout)
        paths.append(glyph.transformed(Affine2D().scale(size, -size).translate(x, y)))
        colours.append(ORANGE if cell in wrong else INK if clues[cell] else "#0b4f7d")
    axes.add_collection(PathCollection(paths, facecolors=colours, edgecolors="none", zorder=5))


@cache
def _glyph(symbol, is_bold):
    """Returns the outline of a symbol at font size 1. (0, 0) is the middle of its width and of a digit's height."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    font = FontProperties(family="DejaVu Sans", weight="bold" if is_bold else "normal")
    path, digit = (TextPath((0, 0), text, size=1, prop=font) for text in (symbol, "0"))
    middle = sum(path.get_extents().intervalx) / 2, sum(digit.get_extents().intervaly) / 2
    return path.transformed(Affine2D().translate(-middle[0], -middle[1]))


def _draw_letters(axes, trace, corner, layout):
    """Names the start and the goal of a maze, in the cells of the question."""
    if isinstance(trace.kind, Maze) and layout.cell > 0.12:
        style = {"fontsize": 0.55 * 72 * layout.cell, "fontweight": "bold", "color": "white", "zorder": 5}
        for token in (START, GOAL):
            for cell in np.flatnonzero(trace.inputs == token).tolist():
                x, y = _centre(cell, trace, corner, layout)
                axes.text(x, y, trace.kind.symbols[token], ha="center", va="center_baseline", **style)


def _draw_marks(axes, trace, step, corner, layout):
    """A triangle in a corner of the cells that changed, and a frame around those that are wrong."""
    from matplotlib.collections import PolyCollection

    side = layout.cell
    centres = {cell: _centre(cell, trace, corner, layout) for cell in {*step["changed"], *(step["wrong"] or ())}}
    ends = [(x + side / 2, y - side / 2) for x, y in (centres[cell] for cell in step["changed"])]
    reach = (0.36 if isinstance(trace.kind, Sudoku) else 0.55) * side
    shapes = [[(x, y), (x - reach, y), (x, y + reach)] for x, y in ends]
    axes.add_collection(PolyCollection(shapes, facecolors=AMBER, edgecolors="none", zorder=7))
    inset, width = 0.5 * side - 0.008 - 0.05 * side, 5.2 * side
    boxes = [
        [(x - inset, y - inset), (x + inset, y - inset), (x + inset, y + inset), (x - inset, y + inset)]
        for x, y in (centres[cell] for cell in step["wrong"] or ())
    ]
    axes.add_collection(PolyCollection(boxes, facecolors="none", edgecolors=ORANGE, linewidths=width, zorder=6))


# ---- head -----------------------------------------------------------------------------------------------------------


def _draw_head(figure, trace, layout, n):
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left = MARGIN / layout.width
    y, below = (1 - inches / layout.height for inches in (0.3, 0.46))
    figure.text(
        left, y, f"{trace.kind.name}: {trace.summary()}", fontsize=12, color=INK, fontweight="bold", va="center"
    )
    if 1 < n < len(trace.steps):
        remark = f"{n} of {len(trace.steps)} steps"
        figure.text(1 - left, y, remark, ha="right", va="center", fontsize=9, color=GREY)

    def shade(t, base, colour):
        return Patch(facecolor=(1 - t) * _rgb(base) + t * _rgb(colour), edgecolor="#b5b5b5", linewidth=0.5)

    is_sudoku, is_maze = isinstance(trace.kind, Sudoku), isinstance(trace.kind, Maze)
    base, sure = ("#ffffff", SURE) if is_sudoku else (UNSURE, BLUE if is_maze else ARC[1])
    triangle = Line2D([], [], marker=[(0, 0), (1, 0), (1, -1)], linestyle="", markersize=8.5, color=AMBER)
    keys = {
        "clue": is_sudoku and Patch(facecolor=CLUE, edgecolor="#b5b5b5", linewidth=0.5),
        "start": is_maze and Patch(color=GREEN),
        "goal": is_maze and Patch(color=PINK),
        "path": is_maze and Patch(color=BLUE),
        "unsure to sure": tuple(shade(t, base, sure) for t in (0.1, 0.55, 1)),
        "changed": triangle,
        "wrong": trace.labels.any() and Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.5),
        "halting probability": trace.steps[0]["halt"] is not None and Line2D([], [], color=INK, linewidth=4),
    }
    keys = {text: handle for text, handle in keys.items() if handle}
    place = {"loc": "upper left", "bbox_to_anchor": (left, below), "borderaxespad": 0, "borderpad": 0, "frameon": False}
    sizes = {"handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.6, "fontsize": 8.5, "labelcolor": GREY}
    handles = {"handler_map": {tuple: HandlerTuple(None, pad=0)}, "ncols": _legend_columns(layout.width)}
    figure.legend(list(keys.values()), list(keys), **place, **sizes, **handles)
