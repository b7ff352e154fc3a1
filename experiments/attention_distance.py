"""Where each head of a language model looks: its mean attention weight by distance, in every layer of every visit.

    python experiments/attention_distance.py runs/plain runs/trm --paths data/en_wiki/validation_0.jsonl.gz
    python experiments/attention_distance.py runs/plain --paths stdlib-valid --output runs/attention.png

Each model reads windows from the starts of documents. For every head, the weight that a token gives to itself and to
each token before it is averaged over the second half of the windows. A head that gives every distance the same weight
(1 / number of tokens) cannot see the order of the tokens. Prints one line per model and layer: for each head the weight
of the token before, and for each model how long the mean of its embeddings is, in their standard deviations. `output`
is a picture: one row per model, one panel per layer, one line per head.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import before_torch, check_png, check_writable, parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402

SHOWN = 16  # distances in the picture


@dataclass
class DistanceConfig:
    """What to look at.

    Args:
        checkpoints: run or checkpoint folders; the flag name may be left out
        paths: text to read: files, globs, folders, or words such as stdlib-valid
        text_field: name of the JSON field or parquet column that holds the text
        window: tokens of a window; default: the smallest context of the models, but at most 256
        windows: number of windows, one per document
        names: names of the models, in the order of `checkpoints`; default: the names of their folders
        output: picture (.png) to draw; without it, only the table is printed
    """

    checkpoints: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=lambda: ["stdlib-valid"])
    text_field: str = "text"
    window: int | None = None
    windows: int = 32
    names: list[str] = field(default_factory=list)
    output: str | None = None

    def __post_init__(self):
        if not self.checkpoints:
            raise ValueError("checkpoints is empty: give one or more run folders")
        if self.names and len(self.names) != len(self.checkpoints):
            raise ValueError(
                f"there are {len(self.names)} names for {len(self.checkpoints)} checkpoints: name each one"
            )
        if self.windows < 1 or self.window is not None and self.window < 2 * SHOWN:
            raise ValueError(f"windows or window is too small: set them to at least 1 and {2 * SHOWN}")
        check_png("output", self.output)


@before_torch
def parse_args(argv=None) -> DistanceConfig:
    (config,) = parse_flags(__doc__, DistanceConfig, argv=argv, positional="checkpoints")
    if config.output is not None:
        check_writable(config.output)
    return config


import torch  # noqa: E402

from src import layers  # noqa: E402
from src.checkpoint import load_model  # noqa: E402
from src.data.corpus import read_pieces  # noqa: E402
from src.training.curves import add_title, save_picture, style_axes  # noqa: E402


def read_windows(tokenizer, config, length: int) -> torch.Tensor:
    """Returns the first `length` tokens of the first documents that are long enough: ids (windows, length).

    Raises UserError if no document is."""
    rows, is_start = [], True
    for piece, is_last in read_pieces(config.paths, config.text_field):
        if is_start and len(ids := tokenizer.encode(piece)[:length]) == length:
            rows.append(ids)
        is_start = is_last
        if len(rows) == config.windows:
            break
    if not rows:
        raise UserError(f"no document has {length} tokens: give longer ones, or a smaller --window")
    return torch.tensor(rows)


@torch.no_grad()
def weights_by_distance(model, ids) -> torch.Tensor:
    """Returns the mean attention weight (layers in the order in which they run, H, SHOWN), over distances from 0.

    ids: (B, T). Only queries of the second half of the rows count, so that all distances exist."""
    means = []

    def recorded(q, k, v, mask, is_causal, p):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3) * q.shape[-1] ** -0.5
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else mask
        weights = (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)
        start = ids.shape[1] // 2
        diagonals = [weights.diagonal(-distance, 2, 3)[..., start - distance :] for distance in range(SHOWN)]
        means.append(torch.stack([diagonal.mean(dim=(0, 2)) for diagonal in diagonals], dim=1))
        return layers_attention(q, k, v, mask, is_causal, p)

    layers_attention = layers.attention
    with patch.object(layers, "attention", recorded):
        model(ids)
    return torch.stack(means)


def layer_names(c) -> list[str]:
    """Returns a name for each layer of a TRMConfig, in the order in which they run."""
    visits = 1 if c.recursion == "none" else c.visits_per_step * c.train_steps
    names = [f"prelude {i + 1}" for i in range(c.prelude_layers)]
    for visit in range(visits):
        names += [("" if visits == 1 else f"visit {visit + 1}, ") + f"layer {i + 1}" for i in range(c.n_layers)]
    return names + [f"coda {i + 1}" for i in range(c.coda_layers)]


def length_of_mean(embeddings: torch.Tensor) -> float:
    """Returns the length of the mean of embeddings (V, D), in units of their standard deviation from it."""
    mean = embeddings.mean(dim=0)
    return ((mean.square().mean() / (embeddings - mean).square().mean()).sqrt()).item()


def uniform(tokens: int) -> float:
    """Returns the mean weight of a token for a head that gives all tokens the same, in windows of `tokens`."""
    seen = range(tokens // 2 + 1, tokens + 1)
    return sum(1 / count for count in seen) / len(seen)


def draw(figures: list[tuple[str, list[str], torch.Tensor]], tokens: int, path: str):
    """Draws (name, names of layers, weights) for each model, one row each.  tokens: length of the windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(names) for _, names, _ in figures)
    figure = Figure(figsize=(max(6, 2.1 * columns), 1.1 + 1.9 * len(figures)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(figures), columns, sharex=True, sharey=True, squeeze=False)
    for row, (name, names, weights) in zip(grid, figures):
        for axes, layer, heads in zip(row, names, weights):
            style_axes(axes, layer)
            axes.axhline(uniform(tokens), color="#999999", linewidth=0.8, linestyle=":")
            axes.plot(heads.T, linewidth=1.4)
        for axes in row[len(names) :]:
            axes.set_visible(False)
        row[0].set_ylabel(fill(name, 22), fontsize=9, color="#555555")
    for axes in grid[-1]:
        axes.set_xlabel("tokens back", fontsize=9, color="#555555")
    add_title(figure, "Mean attention weight by distance", "a line per head; dotted: the same for every token")
    return save_picture(figure, Path(path))


def main(argv=None):
    config = parse_args(argv)
    loaded = [load_model(folder) for folder in config.checkpoints]
    for folder, lm in zip(config.checkpoints, loaded):
        if lm.model.config.mixer == "mlp" or not lm.model.config.causal:
            raise UserError(f"{folder} has no causal attention: give language models")
    context = min(lm.model.config.max_seq_len for lm in loaded)
    length = config.window or min(256, context)
    if not 2 * SHOWN <= length <= context:
        raise UserError(f"the models read {context} tokens at most: windows need {2 * SHOWN} to {context} tokens")
    figures = []
    for name, lm in zip(config.names or [Path(folder).name for folder in config.checkpoints], loaded):
        weights = weights_by_distance(lm.model, read_windows(lm.tokenizer, config, length))
        figures.append((name, layer_names(lm.model.config), weights))
        mean = length_of_mean(lm.model.embed.weight)
        print(f"{name}: the mean of the embeddings is {mean:.2f} standard deviations long")
        for layer, heads in zip(figures[-1][1], weights[:, :, 1].tolist()):
            print(f"  {layer:20} weight of the token before, per head: {' '.join(f'{w:.3f}' for w in heads)}")
    print(f"the same weight for every token would be {uniform(length):.3f}")
    if config.output:
        print(f"drawn: {draw(figures, length, config.output)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
