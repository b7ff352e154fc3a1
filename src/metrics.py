"""Counts (parameters, depth, FLOPs, cache bytes), the run's log (metrics.jsonl, TensorBoard) and its learning curve."""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

from torch import nn

from src.cache import cache_slots
from src.config import UserError
from src.model import TRMConfig


def count_parameters(model: nn.Module) -> dict:
    """total, trainable, embedding, recursive_core and per_module {name: n}; a tied parameter is counted once.

    embedding: the tables of nn.Embedding (a tied one is the head as well). recursive_core: the parameters of model.net
    where it is visited more than once, else 0. per_module: the children, a tied one with the first that has it."""
    parameters = list(model.parameters())  # each once
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    config, net, seen, per_module = getattr(model, "config", None), getattr(model, "net", None), set(), {}
    for name, child in model.named_children():
        new = {id(p): p.numel() for p in child.parameters() if id(p) not in seen}
        seen |= new.keys()
        per_module[name] = sum(new.values())
    is_recursive = net is not None and config is not None and config.visits_per_step * config.train_steps > 1
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "embedding": sum(tables.values()),
        "recursive_core": sum(p.numel() for p in net.parameters()) if is_recursive else 0,
        "per_module": per_module,
    }


def format_params(n) -> str:
    """Three significant digits: 999, 12.3K, 1.23M, 4.56B."""
    for divisor, suffix in ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        value = n / divisor
        if abs(value) < 999.5 or suffix == "T":
            break
    if not suffix:
        return f"{value:.0f}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{suffix}"


def describe_model(model: nn.Module) -> str:
    """`trm, 1.64M parameters`."""
    return f"{model.config.recursion}, {format_params(sum(p.numel() for p in model.parameters()))} parameters"


class Depth(NamedTuple):
    """Blocks that a token passes: read out after one supervision step, and after all of them."""

    per_step: int
    total: int


def effective_depth(config: TRMConfig) -> Depth:
    """prelude + visits * n_layers + coda."""
    ends, step = config.prelude_layers + config.coda_layers, config.visits_per_step * config.n_layers
    return Depth(ends + step, ends + step * config.train_steps)


class Flops(NamedTuple):
    """FLOPs per token (one multiply-add is 2), the attention's T x T products apart from the weights'."""

    train_matmul: int
    train_attention: int
    decode_matmul: int
    decode_attention: int

    @property
    def train(self) -> int:
        return self.train_matmul + self.train_attention

    @property
    def decode(self) -> int:
        return self.decode_matmul + self.decode_attention


def flops_per_token(config: TRMConfig, context: int | None = None) -> Flops:
    """FLOPs per token of training and of decoding at `context` tokens (default max_seq_len).

    Weights: 2 per multiply-add forward, 4 more backward where gradient flows, so 6 x parameters visited with gradient
    + 2 x those visited without (trm: all but the last grad_deep_steps; act_target stable: its second read-out).
    Attention: scores and values are 4*T*D forward per token and layer visit and 8*T*D backward, the whole T x T square
    although half of it is masked, as in PaLM (arXiv:2204.02311, appendix B); kept apart, so that either sum can be had.
    Included: injection, gate, coda, head and halting head once per supervision step, the prelude once per supervision
    step too (training recomputes x; full_bptt does not). Not included: embedding look-up, norms, softmax, optimizer,
    gradient checkpointing's recomputation. Steps count in full, whatever supervision_weights says.
    Decoding: forward for one new token with a cache of `context` tokens: every visit, the coda and head once. For a
    model that is not causal it is the forward pass over `context` tokens, per token."""
    context = context or config.max_seq_len
    steps, D = config.train_steps, config.d_model
    block, attention = _block_macs(config, context)
    prelude, coda = config.prelude_layers, config.coda_layers
    readout = coda * block + D * config.vocab_size
    halt = (D if config.causal else D / context) if config.recursion == "trm" else 0
    cycles = 1 if config.recursion == "none" else config.deep_steps
    grad_cycles = cycles if config.recursion == "none" else config.grad_deep_steps
    layers_per_cycle = config.visits_per_step // cycles * config.n_layers
    cycle = layers_per_cycle * block + _cycle_extras(config)
    entries = 1 if config.full_bptt else steps
    second_looks = steps - 1 if config.recursion == "trm" and config.act_target == "stable" else 0
    with_grad = entries * prelude * block + steps * (grad_cycles * cycle + readout + halt)
    without = steps * (cycles - grad_cycles) * cycle + second_looks * (readout + halt)
    layers_with = entries * prelude + steps * (grad_cycles * layers_per_cycle + coda)
    layers_without = steps * (cycles - grad_cycles) * layers_per_cycle + second_looks * coda
    layers = prelude + steps * cycles * layers_per_cycle + coda
    return Flops(
        train_matmul=round(6 * with_grad + 2 * without),
        train_attention=(6 * layers_with + 2 * layers_without) * attention,
        decode_matmul=round(2 * (prelude * block + steps * cycles * cycle + readout + halt)),
        decode_attention=2 * layers * attention,
    )


def _block_macs(c: TRMConfig, context: int) -> tuple[int, int]:
    """Multiply-adds per token of one TinyBlock: through its weights, and of its scores and values."""
    swiglu = 3 * c.d_model * c.d_ff
    if c.mixer == "mlp":  # 3 * L * d_ff for each of the D channels of a row, shared by its L tokens
        return 2 * swiglu, 0
    qkv = c.d_model * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    return qkv + c.d_model**2 + swiglu, 2 * context * c.d_model


def _cycle_extras(c: TRMConfig) -> int:
    """Multiply-adds per token of one deep step beside its blocks: injection and gate of its visits."""
    if c.recursion == "none":
        return 0
    latent = c.latent_steps if c.recursion == "trm" else 0
    inputs = 3 * latent + 2 if c.injection == "concat" else 0
    return c.d_model**2 * (inputs + 2 * (latent + 1) * c.gate)


def cache_bytes_per_token(config: TRMConfig, dtype_bytes: int) -> int:
    """Bytes of the key/value cache per token of context: 2 * slots * K * E * bytes; 0 for a model that has no cache."""
    if not config.causal or config.mixer != "attention":
        return 0
    return 2 * cache_slots(config) * config.n_kv_heads * config.head_dim * dtype_bytes


METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of folder/metrics.jsonl; a last line cut short by a crash is dropped, any other broken one refused."""
    path, records = Path(folder) / METRICS_FILE, []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run folder that holds {METRICS_FILE}") from None
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: broken JSON; mend or delete that line") from None
    return records


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename into place, so that a reader or a crash meets the old file or the new one, whole."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


class RunLog:
    """metrics.jsonl and TensorBoard events in a run folder; for the main process alone.

    An existing metrics.jsonl is continued: resume_step=n first drops what was logged after step n, so that a resumed
    run has each step once. Values are numbers (or 0-dim tensors); one that is not finite is written as null."""

    def __init__(self, folder: str | Path, tensorboard: bool = True, resume_step: int | None = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            kept = [r for r in read_metrics(folder) if resume_step is None or r["step"] <= resume_step]
            write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, **values) -> None:
        """Append one line {"step", "time" (seconds since 1970), **values} and flush it."""
        values = {name: _number(value) for name, value in values.items() if value is not None}
        record = {"step": int(step), "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{'valid' if name.startswith('valid') else 'train'}/{name}", value, int(step))

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def _number(value):
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (int, float)) else float(value)


# ---- learning curve -------------------------------------------------------------------------------------------------

TRAIN, VALID, SIDE = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito: told apart by colour-blind readers too
INK, FAINT = "#333333", "#dddddd"


def plot_learning_curve(folder: str | Path, title: str = "") -> Path | None:
    """Draw folder/learning_curve.png from folder/metrics.jsonl; returns its path, None where nothing is logged yet.

    Losses (nats per token; training: cross-entropy without the halting loss, raw and smoothed), bits per byte, learning
    rate and gradient norm over optimizer steps. No pyplot, so that it may be drawn in the middle of training."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    train_loss = _series(records, "ce_loss") or _series(records, "loss")
    if not train_loss and not _series(records, "valid_loss"):
        return None
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, wspace=0.03)
    loss, bits = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _draw_losses(loss, "loss, nats per token", train_loss, _series(records, "valid_loss"))
    _draw_losses(bits, "bits per byte", _series(records, "bits_per_byte"), _series(records, "valid_bits_per_byte"))
    rate, norm = figure.add_subplot(grid[1, 0], sharex=loss), figure.add_subplot(grid[1, 1], sharex=bits)
    _draw_small(rate, "learning rate", _series(records, "lr"), smooth=False)
    _draw_small(norm, "gradient norm", _series(records, "grad_norm"), smooth=True)
    if title:
        size = min(12, 12 * 60 / len(title))  # leaves room for the run's length at the right
        figure.suptitle(title, x=0.012, ha="left", fontsize=size, fontweight="bold", color=INK)
    figure.text(0.99, 0.985, _effort(records), ha="right", va="top", fontsize=9, color="#666666")
    buffer, path = io.BytesIO(), Path(folder) / "learning_curve.png"
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path


def _series(records, name) -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in records if r.get(name) is not None]


def _effort(records) -> str:
    """What the run took so far, such as: 2,000 steps, 1.54M tokens, 6.1 min."""
    last = {name: value for record in records for name, value in record.items() if value is not None}
    parts = [f"{last['step']:,} steps"]
    if "tokens" in last:
        parts.append(f"{format_params(last['tokens'])} tokens")
    if "elapsed_s" in last:
        minutes = last["elapsed_s"] / 60
        parts.append(f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h")
    return ",  ".join(parts)


def _smooth(values) -> list[float]:
    """Centred moving average (a Hann window over 1/12 of the run, cut at the ends)."""
    import numpy as np

    if not len(values):
        return []
    window = np.hanning(2 + (max(1, len(values) // 12) | 1))[1:-1]
    return list(np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same"))


def _style(axes, name):
    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(labelsize=9, colors="#555555", length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    axes.locator_params(axis="y", nbins=7)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _draw_losses(axes, name, train, valid):
    _style(axes, name)
    axes.tick_params(labelbottom=False)
    labels = []  # (height, text, colour)
    if train:
        steps, values = zip(*train)
        smoothed = _smooth(values)
        axes.plot(steps, values, color=TRAIN, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smoothed, color=TRAIN, linewidth=1.8, solid_capstyle="round")
        labels.append((smoothed[-1], f"train {smoothed[-1]:.3f}", TRAIN))
    if valid:
        steps, values = zip(*valid)
        best = min(range(len(values)), key=values.__getitem__)
        dots = {"marker": "o", "markersize": 3.5} if len(values) <= 50 else {}
        axes.plot(steps, values, color=VALID, linewidth=1.4, zorder=3, **dots)
        axes.plot(steps[best], values[best], "o", markersize=8, markerfacecolor="none", markeredgecolor=VALID, zorder=4)
        remark = "the best" if values[best] == values[-1] else f"best {values[best]:.3f}"
        labels.append((values[-1], f"valid {values[-1]:.3f}\n({remark})", VALID))
    if not labels:
        axes.text(0.5, 0.5, "not logged yet", transform=axes.transAxes, ha="center", color="#999999", fontsize=9)
        return
    _limit(axes, train, valid)
    _label_ends(axes, labels)


def _limit(axes, train, valid):
    """Heights that show the run after its steep start: what the first 3 % of the steps lost may lie above the frame."""
    points = _smoothed(train) + valid
    last = max(step for step, _ in points)
    late = [value for step, value in points if step >= 0.03 * last]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_xlim(0, 1.02 * max(last, 1))
    axes.set_ylim(low - 2 * margin, high + margin)


def _smoothed(points) -> list[tuple[int, float]]:
    return list(zip([step for step, _ in points], _smooth([value for _, value in points])))


def _label_ends(axes, labels):
    """Text to the right of each curve's end, moved apart where two would touch."""
    low, high = axes.get_ylim()
    gap, labels = 0.13 * (high - low), sorted(labels)
    heights = [min(max(height, low), high) for height, _, _ in labels]
    if len(heights) == 2 and heights[1] - heights[0] < gap:
        middle = max(sum(heights) / 2, low + gap / 2)
        heights = [middle - gap / 2, middle + gap / 2]
    for height, (_, text, color) in zip(heights, labels):
        _label(axes, height, text, color)


def _label(axes, height, text, color):
    place = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, height), color=color, fontsize=9, annotation_clip=False, **place)


def _draw_small(axes, name, points, smooth):
    _style(axes, name)
    axes.locator_params(axis="y", nbins=3)
    axes.set_xlabel("optimizer step", fontsize=9, color="#555555")
    if not points:
        return
    steps, values = zip(*points)
    line = _smooth(values) if smooth else values
    if smooth:
        axes.plot(steps, values, color=SIDE, linewidth=0.8, alpha=0.25)
    axes.plot(steps, line, color=SIDE, linewidth=1.6)
    settled = line[len(line) // 20 :]  # the first gradients are far larger than all others
    top = max(settled) * (1.4 if smooth else 1.1) or 1.0
    axes.set_ylim(0, top)
    _label(axes, min(line[-1], top), f"{line[-1]:.2g}", SIDE)
