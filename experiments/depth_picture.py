"""The picture of experiments/depth.py: exact rows by difficulty and visits, and beside it all models, per family."""

from pathlib import Path

import numpy as np

from src.metrics import format_params
from src.training.curves import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SKY,
    add_title,
    label_ends,
    save_picture,
    style_axes,
)

STEPS = {
    "carries": "longest run of nines",
    "words": "products in the longest word",
    "regions": "steps to the farthest cell",
    "chains": "steps to the farthest root",
}


def draw(families: list[list[dict]], path: Path) -> Path:
    """Draws two plots for each family.  families: the records of experiments/depth.py, one list each.

    One family has them side by side. Several families have a column each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(families)
    figure = Figure(figsize=(9, 4.4) if count == 1 else (4.3 * count, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, wspace=0.03)
    grid = figure.add_gridspec(1, 2) if count == 1 else figure.add_gridspec(2, count)
    places = [grid[0], grid[1]] if count == 1 else list(grid)
    heats = []
    for column, records in enumerate(families):
        heats.append(figure.add_subplot(places[column]))
        mesh = draw_heat(records, heats[-1])
        draw_models(records, figure.add_subplot(places[count + column]))
    bar = figure.colorbar(mesh, ax=heats, location="bottom", aspect=40, shrink=1 / count, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors="#555555", length=0)
    seeds = len({record["seed"] for record in families[0]})
    trained = " or ".join(map(str, sorted({record["recipe"]["trained"] for records in families for record in records})))
    title = f"Trained on up to {trained} sequential steps, tested on more"
    add_title(figure, title, f"exact answers, mean of {seeds} seed{'s' * (seeds > 1)}")
    return save_picture(figure, path)


def draw_heat(records: list[dict], heat):
    """Draws exact rows by difficulty and visits, and the mean visits under the exit rule.  Returns the mesh."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    recipe, family = records[0]["recipe"], records[0]["family"]
    loops = [r for r in records if r["model"] == "loop"]
    tested, most = np.array(sorted(recipe["tested"])), recipe["max_visits"]
    by_visit = np.mean([[t["by_visit"] for t in in_order(r)] for r in loops], axis=0)  # (difficulties, visits)
    middles = (tested[1:] + tested[:-1]) / 2
    edges = np.concatenate(([tested[0] - 0.5], middles, [tested[-1] + 0.5 * max(1, tested[-1] - middles[-1])]))
    style_axes(heat, f"{family}: the loop by visits")
    heat.grid(False)
    heat.yaxis.get_major_locator().set_params(integer=True)
    colours = LinearSegmentedColormap.from_list("exact", ("#ffffff", "#d3e6f2", SKY, BLUE))
    mesh = heat.pcolormesh(np.arange(0.5, most + 1), edges, by_visit, cmap=colours, vmin=0, vmax=1, rasterized=True)
    width, height = recipe["most_visits"] * (2 if recipe["tail"] else 1), recipe["trained"] + 0.5 - edges[0]
    heat.add_patch(Rectangle((0.5, edges[0]), width, height, fill=False, ec=INK, lw=1.4, zorder=4))
    beside = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold"}
    heat.annotate("trained", (width + 0.5, edges[0]), (5, 4), color="white", **beside)
    rule = recipe["main_rule"]
    visits = np.mean([[t["rules"][rule]["visits"] for t in in_order(r)] for r in loops], axis=0)
    heat.plot(visits, tested, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5, zorder=5)
    halo = [withStroke(linewidth=3, foreground="white", alpha=0.7)]
    text = "mean visits with\nthe halting head" if rule == "halt" else "mean visits with\nthe KL rule"
    heat.annotate(text, (visits[-1], tested[-1]), (8, -4), color=ORANGE, va="top", path_effects=halo, **beside)
    heat.set(xlim=(0.5, most + 0.5), ylim=(edges[0], edges[-1]))
    label(heat, "visits", STEPS[family])
    return mesh


def draw_models(records: list[dict], axes):
    """Draws exact rows against difficulty: a faint line per seed, a strong one for the mean of each model."""
    recipe = records[0]["recipe"]
    style_axes(axes, f"{records[0]['family']}: all models")
    axes.axvspan(0.5, recipe["trained"] + 0.5, color="#f0f0f0", zorder=0)
    axes.annotate("trained", (0.6, 0.04), rotation=90, fontsize=9)
    ends = []
    for model, color in (("loop", BLUE), ("plain_1", GREEN), ("plain_deep", ORANGE)):
        seeds = [r for r in records if r["model"] == model]
        if not seeds:
            continue
        curves = np.array([[(t["difficulty"], t["exact"]) for t in in_order(r)] for r in seeds])
        for curve in curves:
            axes.plot(*curve.T, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*curves.mean(0).T, color=color, linewidth=1.8)
        layers, parameters = seeds[0]["layers"], format_params(seeds[0]["parameters"])
        name = "loop" if model == "loop" else f"plain, {layers} layer{'s' * (layers > 1)}"
        ends.append((curves[:, -1, 1].mean(), f"{name}\n{parameters}", color))
    axes.set(xlim=(0.5, max(recipe["tested"])), ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    label_ends(axes, ends, lines=2)
    label(axes, STEPS[records[0]["family"]], "")


def in_order(record: dict) -> list[dict]:
    """The tests of a record by difficulty, without the mixed one."""
    return sorted((t for t in record["tests"] if t["difficulty"] != "mixed"), key=lambda t: t["difficulty"])


def label(axes, x: str, y: str):
    axes.set_xlabel(x, fontsize=9, color="#555555")
    axes.set_ylabel(y, fontsize=9, color="#555555")
