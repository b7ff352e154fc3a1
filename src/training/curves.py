"""Reads metrics.jsonl and draws learning curves: that of one run, and building blocks for pictures of several runs."""

import io
import sys
from array import array
from pathlib import Path

import numpy as np

from src.errors import UserError
from src.files.folders import replacing_file
from src.files.plain_yaml import read_yaml
from src.files.text import parse_json
from src.metrics import format_params

METRICS_FILE = "metrics.jsonl"
EXACT = ("exact_accuracy", "valid_exact_accuracy", "valid_exact_step_1")  # figures of a run on puzzles


def scan_metrics(folder: str | Path):
    """Yield (record, byte offset of its end) for each line of folder/metrics.jsonl.

    Skips a last line that was cut off when the process was killed. Any other line that is not a record is reported once
    on stderr and skipped, because a broken log should not stop a run. Raises UserError if the file cannot be read."""
    path, end = Path(folder) / METRICS_FILE, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                record, end = _record(line), end + len(line)
                if record is not None:
                    yield record, end
                elif (path, number) not in _REPORTED:
                    _REPORTED.add((path, number))
                    print(f"{path}, line {number} is not a record of a step: skipped", file=sys.stderr)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run folder that holds {METRICS_FILE}") from None


_REPORTED = set()  # (file, line number) of the bad lines reported so far


def _record(line: bytes) -> dict | None:
    """Returns the record in a line (a step, a time, and numbers or null), or None if the line is something else."""
    try:
        record = parse_json(line.decode("utf-8"), METRICS_FILE)
    except (UserError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
        return None
    figures = [value for name, value in record.items() if name != "time" and value is not None]
    is_whole = all(type(value) in (int, float) and abs(value) < 1e300 for value in figures)  # false for NaN
    return record if is_whole else None


def read_series(folder: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Returns {name: (N, 2) array of steps and values}, ordered by step.

    If a step was logged twice, its last line counts. A value of null is left out. Needs 16 bytes of memory per
    value."""
    columns = {name: array("d") for name in names}
    for record, _ in scan_metrics(folder):
        for name in names:
            if record.get(name) is not None:
                columns[name].extend((record["step"], record[name]))
    return {name: _once(np.array(column).reshape(-1, 2)) for name, column in columns.items()}


def _once(points):
    """Keep the last of the (N, 2) points of each step."""
    _, last = np.unique(points[::-1, 0], return_index=True)
    return points[::-1][last]


def read_settings(folder: str | Path) -> dict:
    """Returns {name: value} of the settings in a run's config.yaml, or {} if there is no such file.

    A setting in a section is named `section.name`."""
    path = Path(folder) / "config.yaml"
    return dict(_flat(read_yaml(path))) if path.exists() else {}


def _flat(settings, start=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield start + name, value


# ---- building blocks of a picture -----------------------------------------------------------------------------------

# the palette of Okabe and Ito, which colour-blind readers can tell apart too
BLUE, ORANGE, GREEN, PINK, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, FAINT = "#333333", "#777777", "#dddddd"
DETAIL = 1000  # points drawn of a noisy curve; more are not visible, and a long run has a million


def new_figure(height: float):
    """Returns (Figure, grid of 2 x 2 cells).  Does not use pyplot, whose global state is unsafe during training."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a $ in a label or file name does not start a formula
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, wspace=0.03)
    return figure, figure.add_gridspec(2, 2, height_ratios=(3, 1))


def add_title(figure, title: str, remark: str = ""):
    """Add a title on the left, in a font size that leaves room for the remark on the right."""
    size = min(12, 12 * 60 / max(1, len(title)))
    figure.suptitle(title or " ", x=0.012, ha="left", fontsize=size, fontweight="bold", color=INK)
    figure.text(0.99, 0.985, remark, ha="right", va="top", fontsize=9, color=GREY)


def save_picture(figure, path: str | Path) -> Path:
    """Write a PNG atomically, so that the file always holds either the old picture or the new one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    try:
        with replacing_file(path) as new:
            new.write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}; make room, or name another file") from None
    return Path(path)


def style_axes(axes, name: str):
    """Set the title, colours, grid and tick format of one plot."""
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(labelsize=9, colors="#555555", length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    axes.locator_params(axis="y", nbins=7)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")


def thin(points: np.ndarray, limit: int = DETAIL) -> np.ndarray:
    """Reduce (N, 2) points to at most `limit` by averaging neighbours."""
    if len(points) <= limit:
        return points
    starts = np.linspace(0, len(points), limit, endpoint=False).astype(int)
    return np.add.reduceat(points, starts) / np.diff(starts, append=len(points))[:, None]


def smooth(points: np.ndarray) -> np.ndarray:
    """Smooth (N, 2) points by a centred moving average: a Hann window over 1/12 of the run, cut off at the ends."""
    if not len(points):
        return points
    window = np.hanning(2 + (max(1, len(points) // 12) | 1))[1:-1]
    weights = np.convolve(np.ones(len(points)), window, "same")
    return np.column_stack((points[:, 0], np.convolve(points[:, 1], window, "same") / weights))


def draw_noisy(axes, points: np.ndarray, color: str, faint: float = 0.22) -> np.ndarray:
    """Draw a curve twice, raw (faint) and smoothed.  Returns the smoothed points."""
    points = thin(points)
    smoothed = smooth(points)
    axes.plot(*points.T, color=color, alpha=faint, linewidth=0.8)
    axes.plot(*smoothed.T, color=color, linewidth=1.8, solid_capstyle="round")
    return smoothed


def draw_judged(axes, points: np.ndarray, color: str) -> np.ndarray:
    """Draw a curve of evaluations, with a ring around its lowest point.  Returns that point."""
    best = points[points[:, 1].argmin()]
    dots = {"marker": "o", "markersize": 3.5} if len(points) <= 50 else {}
    axes.plot(*points.T, color=color, linewidth=1.4, zorder=3, **dots)
    axes.plot(*best, "o", markersize=8, markerfacecolor="none", markeredgecolor=color, zorder=4)
    return best


def set_limits(axes, curves: list[np.ndarray], start: float = 0.03):
    """Set axis limits that show the curves after their steep start.

    start: this fraction of each run, at its beginning, may lie above the frame."""
    curves = [curve for curve in curves if len(curve)]
    last = max(curve[-1, 0] for curve in curves)
    late = np.concatenate([curve[curve[:, 0] >= start * curve[-1, 0], 1] for curve in curves])
    low, high = late.min(), late.max()
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_xlim(0, 1.02 * last or 1)
    axes.set_ylim(low - 2 * margin, high + margin)


def label_ends(axes, labels: list[tuple], lines: int = 1):
    """Write labels, each (height, text, colour), to the right of the curves' ends, moved apart if they would overlap.

    lines: number of lines in each text."""
    low, high = axes.get_ylim()
    gap, labels = 0.065 * lines * (high - low), sorted(labels)
    heights = np.clip([height for height, _, _ in labels], low, high)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # move them back down if they rose above the top
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else high)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    for height, (_, text, color) in zip(heights, labels):
        axes.annotate(text, (1, height), color=color, fontsize=9, annotation_clip=False, **place)


# ---- learning curve -------------------------------------------------------------------------------------------------


def plot_learning_curve(folder: str | Path, title: str = "") -> Path | None:
    """Draw folder/learning_curve.png from folder/metrics.jsonl; returns its path, or None if nothing is logged yet.

    The picture has four plots over optimizer steps: the loss in nats per token, bits per byte (in runs on puzzles:
    exact accuracy), the learning rate, and the gradient norm. The training loss is the cross-entropy without the
    halting loss, drawn raw and smoothed. A step that a resumed run logged again counts once."""
    names = "ce_loss loss valid_loss bits_per_byte valid_bits_per_byte lr grad_norm tokens elapsed_s".split()
    series = read_series(folder, *names, *EXACT)
    train_loss = series["ce_loss"] if len(series["ce_loss"]) else series["loss"]
    if not len(train_loss) and not len(series["valid_loss"]):
        return None
    figure, grid = new_figure(5.6)
    loss, bits = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _draw_losses(loss, "loss, nats per token", train_loss, series["valid_loss"])
    if len(series[EXACT[1]]):
        _draw_exact(bits, *(series[name] for name in EXACT))
    else:
        _draw_losses(bits, "bits per byte", series["bits_per_byte"], series["valid_bits_per_byte"])
    rate, norm = figure.add_subplot(grid[1, 0], sharex=loss), figure.add_subplot(grid[1, 1], sharex=bits)
    draw_small(rate, "learning rate", [(series["lr"], GREEN)])
    draw_small(norm, "gradient norm", [(series["grad_norm"], GREEN)], noisy=True)
    add_title(figure, title, _effort(series))
    return save_picture(figure, Path(folder) / "learning_curve.png")


def _effort(series) -> str:
    """Returns the steps, tokens and time of the run so far, such as "2,000 steps,  1.54M tokens,  6.1 min"."""
    parts = [f"{max(points[-1, 0] for points in series.values() if len(points)):,.0f} steps"]
    if len(series["tokens"]):
        parts.append(f"{format_params(series['tokens'][-1, 1])} tokens")
    if len(series["elapsed_s"]):
        minutes = series["elapsed_s"][-1, 1] / 60
        parts.append(f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h")
    return ",  ".join(parts)


def _draw_losses(axes, name, train, valid):
    style_axes(axes, name)
    axes.tick_params(labelbottom=False)
    labels, curves = [], []
    if len(train):
        curves.append(draw_noisy(axes, train, BLUE))
        end = curves[-1][-1, 1]
        labels.append((end, f"train {end:.3f}", BLUE))
    if len(valid):
        best, end = draw_judged(axes, valid, ORANGE)[1], valid[-1, 1]
        curves.append(valid)
        remark = "the best" if best == end else f"best {best:.3f}"
        labels.append((end, f"valid {end:.3f}\n({remark})", ORANGE))
    if not labels:
        axes.text(0.5, 0.5, "not logged yet", transform=axes.transAxes, ha="center", color="#999999", fontsize=9)
        return
    set_limits(axes, curves)
    label_ends(axes, labels, lines=2)


def _draw_exact(axes, train, valid, first):
    """Draw exact accuracy, the share of puzzles whose cells are all right, as three curves.

    train: of the training puzzles that ended since the line before. valid: of the held-out puzzles, after the last
    supervision step. first: of the held-out puzzles, after the first supervision step."""
    style_axes(axes, "exact accuracy")
    axes.tick_params(labelbottom=False)
    labels = []
    for points, name, color in ((train, "train", BLUE), (valid, "held out", ORANGE), (first, "after step 1", GREEN)):
        if len(points):
            axes.plot(*thin(points).T, color=color, linewidth=1.4)
            labels.append((points[-1, 1], f"{name} {points[-1, 1]:.3f}", color))
    axes.set_ylim(-0.02, 1.04)
    label_ends(axes, labels)


def draw_small(axes, name: str, curves: list[tuple], noisy: bool = False, xlabel: str = "optimizer step"):
    """Draw a small plot of several curves, each (points, colour), with a y axis that starts at zero.

    Noisy curves often start far above their other values. That start may lie above the frame."""
    style_axes(axes, name)
    axes.locator_params(axis="y", nbins=3)
    axes.set_xlabel(xlabel, fontsize=9, color="#555555")
    lines = []
    for points, color in curves:
        if len(points):
            lines.append((draw_noisy(axes, points, color) if noisy else thin(points), color))
            if not noisy:
                axes.plot(*lines[-1][0].T, color=color, linewidth=1.6)
    if lines:
        top = max(line[len(line) // 20 :, 1].max() for line, _ in lines) * (1.4 if noisy else 1.1) or 1.0
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        ends = [(line[-1, 1], color) for line, color in lines]
        label_ends(axes, [(end, f"{end:,.0f}" if end >= 100 else f"{end:.2g}", color) for end, color in ends], lines=3)
