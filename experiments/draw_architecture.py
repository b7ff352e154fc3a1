"""Draw the architecture: the path of one token's state through the model, and the settings of each family.

    python experiments/draw_architecture.py                       # writes docs/architecture.png
    python experiments/draw_architecture.py --output model.svg

The drawing is fixed: it reads no model and no settings.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import parse_flags, run  # noqa: E402
from src.training.curves import BLUE, GREEN, GREY, INK, save_picture  # noqa: E402

ORANGE = "#c4621d"
CENTER = {"ha": "center"}
WIDTH, HEIGHT = 12.0, 5.6  # inches; also the units of all coordinates below


@dataclass
class DrawConfig:
    """Where to write the picture.

    Args:
        output: picture file to write (.png, .svg or .pdf)
    """

    output: str = str(Path(__file__).resolve().parent.parent / "docs" / "architecture.png")


class Canvas:
    """A figure whose coordinates are inches, with methods for the three shapes of the drawing: box, text, arrow."""

    def __init__(self):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, HEIGHT))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def box(self, x, y, width, height, text="", color=INK, fill="white", size=10, **style):
        """Draw a rounded box with centred text; (x, y) is its lower left corner."""
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={min(0.12, height / 4)}"
        patch = FancyBboxPatch((x, y), width, height, boxstyle=shape, ec=color, fc=fill, lw=1.3, **style)
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, text, color, size, **CENTER)

    def text(self, x, y, text, color=INK, size=10, **style):
        self.axes.text(x, y, text, color=color, fontsize=size, **{"va": "center", "linespacing": 1.4} | style)

    def arrow(self, start, end, color=INK, bend=0.0, **style):
        """Draw an arrow; `bend` curves it to one side."""
        props = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0}
        self.axes.annotate("", end, start, arrowprops=props | {"shrinkB": 0} | style)


def draw() -> Canvas:
    canvas = Canvas()
    draw_way_in(canvas)
    draw_recursion(canvas)
    draw_way_out(canvas)
    draw_network(canvas)
    draw_families(canvas)
    return canvas


def draw_way_in(canvas):
    canvas.text(0.25, 5.25, "One forward pass", size=13, fontweight="bold")
    canvas.box(0.25, 3.55, 1.15, 0.55, "token ids")
    canvas.arrow((1.4, 3.825), (1.62, 3.825))
    canvas.box(1.62, 3.4, 1.2, 0.85, "embedding\n+ prelude blocks", size=9)
    canvas.arrow((2.82, 3.825), (3.32, 3.825))
    canvas.text(3.07, 4.0, "x", BLUE, 12, **CENTER, fontweight="bold")


def draw_recursion(canvas):
    canvas.box(3.32, 2.5, 4.15, 2.45, "", ORANGE, "#fdf3ec")
    canvas.text(5.4, 4.77, "× supervision_steps (a loss after each, then the state is detached)", ORANGE, 8, **CENTER)
    canvas.box(3.5, 2.64, 3.79, 1.95, "", GREEN, "#eef7f2")
    canvas.text(5.4, 4.42, "× deep_steps (the last ones carry gradient)", GREEN, 8, **CENTER)
    canvas.box(3.75, 3.2, 1.5, 0.62, "z = net(x, y, z)", BLUE)
    canvas.box(5.75, 3.2, 1.3, 0.62, "y = net(y, z)", BLUE)
    canvas.arrow((4.95, 3.82), (4.05, 3.82), BLUE, bend=0.9)
    canvas.text(5.05, 4.1, "× latent_steps", BLUE, 8)
    canvas.arrow((5.25, 3.51), (5.75, 3.51))
    canvas.arrow((6.4, 3.2), (4.5, 3.2), GREEN, bend=-0.25)
    canvas.text(5.45, 2.77, "the same weights at every visit", GREY, 8, **CENTER)


def draw_way_out(canvas):
    canvas.arrow((7.47, 3.825), (7.97, 3.825))
    canvas.text(7.72, 4.0, "y", BLUE, 12, **CENTER, fontweight="bold")
    canvas.box(7.97, 3.4, 1.25, 0.85, "coda blocks\n+ head", size=9)
    canvas.arrow((9.22, 3.825), (9.5, 3.825))
    canvas.text(9.56, 3.825, "logits of the\nnext token", size=9)
    canvas.arrow((7.72, 3.75), (7.97, 2.92), bend=0.2)
    canvas.box(7.97, 2.65, 1.25, 0.5, "halting head", size=9)
    canvas.arrow((9.22, 2.9), (9.5, 2.9))
    canvas.text(9.56, 2.9, "is the answer right?", size=9)


def draw_network(canvas):
    canvas.text(0.25, 2.05, "net", size=13, fontweight="bold")
    canvas.text(0.85, 2.04, "one small network, a few blocks", GREY, 9)
    parts = ("inject\nx, y, z", "attention", "add,\nRMSNorm", "SwiGLU", "add,\nRMSNorm", "gate\n(optional)")
    x = 0.25
    for i, part in enumerate(parts):
        width = 0.78
        inside = 0 < i < len(parts) - 1
        canvas.box(x, 1.0, width, 0.62, part, BLUE if inside else INK, "#eef4f9" if inside else "white", 7.5)
        if i < len(parts) - 1:
            canvas.arrow((x + width, 1.31), (x + width + 0.16, 1.31))
        x += width + 0.16
    canvas.axes.plot((1.2, 1.2, 4.78, 4.78), (0.9, 0.78, 0.78, 0.9), color=BLUE, lw=1)
    canvas.text(2.99, 0.58, "× n_layers (norm post, the default)", BLUE, 8, **CENTER)


def draw_families(canvas):
    canvas.text(6.4, 2.05, "--recursion", size=11, fontweight="bold", family="monospace")
    canvas.text(7.75, 2.04, "picks the family; everything else stays", GREY, 9)
    rows = (
        ("none", "y = net(x)", "plain transformer; --norm pre: Llama"),
        ("loop", "y = net(x, y), × deep_steps", "looped (universal) transformer"),
        ("trm", "z and y, all three loops", "Tiny Recursive Model, arXiv:2510.04871"),
    )
    for i, (value, runs, name) in enumerate(rows):
        y = 1.56 - 0.42 * i
        canvas.text(6.4, y, value, BLUE, 10, family="monospace", fontweight="bold")
        canvas.text(7.05, y, runs, size=9)
        canvas.text(9.05, y, name, GREY, 9)


def main(argv=None):
    (config,) = parse_flags(__doc__, DrawConfig, argv=argv)
    print(save_picture(draw().figure, config.output), file=sys.stderr)


if __name__ == "__main__":
    run(main)
