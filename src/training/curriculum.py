"""Curriculum: a run in stages, each with its own sequence length, batch size, recursion depth and width.

    curriculum:
      stages:
        - {epochs: 0.5, seq_len: 64, batch_size: 64, latent_steps: 1}
        - {steps: 2000, seq_len: 256, batch_size: 32, latent_steps: 2, dim: 384}

The stage of a step depends only on the step. A change of depth only sets numbers in the model's config. A change of
width builds a wider model that computes the same function (function-preserving expansion, arXiv:2308.06103, extended
here to post and sandwich norms, recursive states, injections and gates). When the width grows from D to D' channels,
the first D channels of every stream keep their values and the new channels are 0:

- Weights that write to a new channel are 0, and so are those that read the output of a new head or hidden unit.
- Weights that read a new channel keep their random initial values. If they were 0 as well, the new weights would get no
  gradient and would never train.
- RMSNorm now takes its mean over D' channels, so gains are multiplied by sqrt(D/D') and eps by D/D'.
- With qk_norm, the norms of queries and keys use the same eps. Their weights are multiplied by sqrt(D/D'), which the
  norm divides out again.

`place` copies an old tensor to its position in a new one; weights, optimizer state and averaged weights all use it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.errors import UserError
from src.layers import injection_of
from src.metrics import flops_per_token
from src.model import TRMConfig, TRMModel
from src.optim import EMA
from src.training.depths import at_depth, check_depths, depths_of, drawn_depths, draws_supervision
from src.training.train_config import CurriculumStage, TrainConfig

DEPTH = ("latent_steps", "deep_steps", "supervision_steps")
INJECTED = {"inject_z": 3, "inject_y": 2}  # number of streams that each injection reads


@dataclass(frozen=True)
class Stage:
    """One stage with all its values filled in."""

    index: int
    start: int  # its first step
    steps: int
    seq_len: int  # tokens
    batch_size: int  # windows
    lr_factor: float
    model: TRMConfig

    def __str__(self):
        c = self.model
        visits = f"{c.visits_per_step * c.train_steps} visits"
        return (
            f"stage {self.index + 1}: steps {self.start} to {self.start + self.steps}, batches of {self.batch_size} x "
            f"{self.seq_len} tokens, {visits}, d_model {c.d_model}"
        )


class CurriculumScheduler:
    """Maps each step of a run to its stage.

    model: the config at the start of the run; each stage changes the config of the one before. windows(seq_len): the
    number of training windows of that length, which converts epochs to steps. Without stages the run is one stage of
    max_steps. Raises UserError for a stage that does not fit its model or data.
    """

    def __init__(
        self,
        stages: list[CurriculumStage],
        model: TRMConfig,
        batch_size: int,
        max_steps: int,
        windows: Callable[[int], int],
    ):
        now = Stage(-1, 0, 0, model.max_seq_len, batch_size, 1.0, model)
        has_default = replace(model, grad_deep_steps=None) == model  # then grad_deep_steps follows each new deep_steps
        self.stages: list[Stage] = []
        for stage in stages or [CurriculumStage(steps=max_steps)]:
            try:
                now = _next_stage(now, stage, windows, has_default)
            except ValueError as error:
                raise UserError(f"curriculum.stages[{now.index + 1}]: {error}") from None
            self.stages.append(now)
        self.total_steps = now.start + now.steps

    def check(self, config: TrainConfig, world: int):
        """Raises UserError if a stage cannot run in `world` processes, or not at every depth that may be drawn.

        Its batch must divide evenly into the parts of all processes. Its width can grow in a single process only."""
        if world > 1 and len({(stage.model.d_model, stage.model.d_ff) for stage in self.stages}) > 1:
            raise UserError("a stage's dim can grow in a single process only: leave out dim, or start one process")
        for stage in self.stages:
            try:
                check_depths(config, stage.model)
            except UserError as error:
                where = f"curriculum.stages[{stage.index}]: " if len(self.stages) > 1 else ""
                raise UserError(f"{where}{error}") from None
            if stage.batch_size % (config.grad_accum * world):
                parts = f"grad_accum {config.grad_accum} x {world} processes"
                raise UserError(f"batch_size {stage.batch_size} does not divide into {parts}: make it a multiple")
        model = self.stages[0].model
        is_single = all(len(drawn_depths(stage.model)) == 1 for stage in self.stages)
        if config.sample_depth and model.recursion != "none" and is_single:
            name = "supervision_steps" if draws_supervision(model) else "deep_steps"
            raise UserError(f"sample_depth has nothing to draw from: set {name} to 2 or more, or leave it out")

    def at(self, step: int) -> Stage:
        """Returns the stage of this step (from 0); after the end of the run, the last stage."""
        return self.stages[bisect_right(self.starts, step) - 1]

    @property
    def starts(self) -> list[int]:
        """Returns the first step of each stage."""
        return [stage.start for stage in self.stages]

    def tokens(self, step: int) -> int:
        """Returns the number of tokens in all batches before this step."""
        return sum(
            s.batch_size * s.seq_len * (min(step, s.start + s.steps) - s.start) for s in self.stages if step > s.start
        )

    def flops(self, one_at_a_time: bool = False) -> float:
        """Returns the estimated FLOPs of the whole run, at the full depth of each stage.

        one_at_a_time: a step of training is one supervision step, and not all of them."""
        costs = ((s.model.train_steps if one_at_a_time else 1, flops_per_token(s.model).train, s) for s in self.stages)
        return sum(s.steps * s.batch_size * s.seq_len * flops / parts for parts, flops, s in costs)

    def work_left(self, config: TrainConfig, step: int, one_at_a_time: bool = False) -> float:
        """Returns the training FLOPs after the first `step` steps (1 or more), divided by those of these steps.

        Steps before recursion_from cost less. one_at_a_time: as in `flops`."""

        def cost(stage, depths):
            models = [at_depth(stage.model, *depth) for depth in depths]
            flops = [flops_per_token(model).train / (model.train_steps if one_at_a_time else 1) for model in models]
            return stage.batch_size * stage.seq_len * sum(flops) / len(flops)

        def work(steps):
            begins, found = config.recursion_from * self.total_steps, 0.0
            for stage in self.stages:
                done = min(max(steps - stage.start, 0), stage.steps)
                early = min(max(begins - stage.start, 0), done)
                parts = (early, [(1, 1)]), (done - early, depths_of(config, stage.model))
                found += sum(n * cost(stage, depths) for n, depths in parts if n)
            return found

        return work(self.total_steps) / work(step) - 1

    def state_dict(self) -> dict:
        return {"starts": self.starts}

    def load_state_dict(self, state: dict):
        """Check that the stages start at the same steps as in the saved run. Raises UserError if they do not.

        There is nothing to load, because the stages follow from the settings."""
        if state["starts"] != self.starts:
            starts = f"the curriculum's stages started at steps {state['starts']}, but now at {self.starts}"
            raise UserError(f"{starts}: resume with the same stages and training text")


def _next_stage(before: Stage, change: CurriculumStage, windows, has_default: bool) -> Stage:
    """Returns the stage after `before`.  Raises ValueError for changes that are impossible."""
    model = before.model
    dim = change.dim or model.d_model
    if (dim, change.d_ff or model.d_ff) != (model.d_model, model.d_ff):
        model = grown_config(model, dim, change.d_ff)
    unused = DEPTH if model.recursion == "none" else ("latent_steps", "supervision_steps") * (model.recursion == "loop")
    if wrong := [name for name in unused if getattr(change, name)]:
        raise ValueError(f"recursion {model.recursion} has no {wrong[0]}: leave it out")
    depth = {name: getattr(change, name) or getattr(model, name) for name in DEPTH}
    model = replace(model, **depth, grad_deep_steps=None if has_default else model.grad_deep_steps)
    seq_len, batch_size = change.seq_len or before.seq_len, change.batch_size or before.batch_size
    if seq_len > model.max_seq_len:
        raise ValueError(f"seq_len {seq_len} is over max_seq_len {model.max_seq_len}: lower it, or raise max_seq_len")
    if seq_len < model.max_seq_len and model.mixer == "mlp":
        raise ValueError(f"seq_len {seq_len} differs from max_seq_len, but mixer mlp has a fixed length: leave it out")
    steps = change.steps or max(1, round(change.epochs * windows(seq_len) / batch_size))
    start, lr_factor = before.start + before.steps, change.lr_factor or before.lr_factor
    return Stage(before.index + 1, start, steps, seq_len, batch_size, lr_factor, model)


def set_depth(model: TRMModel, config: TRMConfig):
    """Change the recursion depth of a model in place to that of another config; weights and compiled parts stay valid.

    The recursion is a Python loop outside the compiled blocks, and it reads `model.config` at each forward call."""
    model.config = replace(model.config, **{name: getattr(config, name) for name in (*DEPTH, "grad_deep_steps")})


def grown_config(config: TRMConfig, dim: int, d_ff: int | None = None) -> TRMConfig:
    """Returns the config of this model at width `dim`.

    The wider model has more heads. They have the same size, and the same number of query heads share a key/value head.
    By default, d_ff grows in proportion, rounded up to a multiple of 64. Raises ValueError for an impossible width."""
    if dim < config.d_model:
        raise ValueError(f"dim {dim} is less than the current width {config.d_model}: a width can only grow")
    if not config.norm_gain:
        raise ValueError("without norm_gain, a wider model cannot give the same output: set norm_gain to true")
    if config.prefix_tokens > 1:
        raise ValueError("with several prefix_tokens, a wider model cannot give the same output: use one")
    if config.mixer == "mlp" and config.norm == "post":
        raise ValueError("with mixer mlp and norm post, a wider model cannot give the same output: choose norm pre")
    size, group = config.head_dim, config.n_heads // config.n_kv_heads
    if dim % (size * group):
        unit = f"{size * group}, which is {group} query heads (per key/value head) of {size} channels"
        raise ValueError(f"dim {dim} is not a multiple of {unit}: choose a multiple")
    d_ff = -(-config.d_ff * dim // (64 * config.d_model)) * 64 if d_ff is None else d_ff
    if d_ff < config.d_ff:
        raise ValueError(f"d_ff {d_ff} is less than the current width {config.d_ff}: a width can only grow")
    heads, eps = dim // size, config.norm_eps * config.d_model / dim
    return replace(config, d_model=dim, n_heads=heads, n_kv_heads=heads // group, d_ff=d_ff, norm_eps=eps)


@torch.no_grad()
def grow_width(model: TRMModel, dim: int, d_ff: int | None = None, seed: int = 0) -> TRMModel:
    """Returns a wider model with the same output, on the same device.

    Its new random weights depend only on the seed. Compile the new model again if the old one was compiled. Raises
    ValueError like `grown_config`."""
    old = model.config
    with torch.random.fork_rng(devices=[]):  # leaves the run's random state untouched
        torch.default_generator.manual_seed(seed)
        grown = TRMModel(grown_config(old, dim, d_ff))
    grown.to(model.embed.weight).train(model.training)
    before = model.state_dict()
    for name, weight in (*grown.named_parameters(), *grown.named_buffers()):
        kind = _kind(name)
        if kind in ("embed", "pos_embed", "y_init", "z_init", "out", "down"):
            weight.zero_()  # these write to new channels, or read new heads and hidden units
        elif kind in INJECTED:
            weight[old.d_model :] = 0
        place(name, before[name], weight, old, grown.config)
    return grown


def grow_run(model: TRMModel, wide: TRMConfig, optimizers: list, ema: EMA | None, make: Callable, seed: int) -> tuple:
    """Returns (the model at the width of `wide`, state dicts for its optimizers). The averaged weights grow in place.

    optimizers: those of the run, as accelerate wraps them. make(model) -> new optimizers for a model."""
    new = grow_width(model, wide.d_model, wide.d_ff, seed).to(model.embed.weight.device)
    bare = [optimizer.optimizer for optimizer in optimizers]
    states = [optimizer.state_dict() for optimizer in grow_optimizers(model, new, bare, make)]
    if ema is not None:
        ema.average = grow_average(ema.average, model, new)
    return new, states


def grow_optimizers(
    old: TRMModel, new: TRMModel, optimizers: list[Optimizer], make: Callable[[TRMModel], list[Optimizer]]
) -> list[Optimizer]:
    """Returns the optimizers make(new) of the wider model, with the old optimizers' state; new entries start at 0."""
    names, params = {p: name for name, p in old.named_parameters()}, dict(new.named_parameters())
    grown = make(new)
    for before, after in zip(optimizers, grown, strict=True):
        for p, state in before.state.items():
            name, wider = names[p], params[names[p]]
            after.state[wider] = {
                key: _grown_state(name, key, value, wider, old.config, new.config) for key, value in state.items()
            }
    return grown


def _grown_state(name, key, value, wider, old, new):
    if not isinstance(value, Tensor) or not value.dim():  # the step counter
        return deepcopy(value)
    target = value.new_zeros(wider.shape)
    # a weight that was multiplied by s has 1/s of its gradient, and 1/s^2 of its squared gradient
    place(name, value, target, old, new, power=-2 if key == "exp_avg_sq" else -1)
    return target


def grow_average(average: dict[str, Tensor], old: TRMModel, new: TRMModel) -> dict[str, Tensor]:
    """Returns the old model's averaged weights in the new model's shapes; new entries are the new weights."""
    wide = new.state_dict()
    grown = {name: wide[name].clone() for name in average}
    for name, tensor in average.items():
        place(name, tensor, grown[name], old.config, new.config)
    return grown


@torch.no_grad()
def place(name: str, tensor: Tensor, target: Tensor, old: TRMConfig, new: TRMConfig, power: int = 1):
    """Copy `tensor`, which belongs to the old model's weight `name`, into `target`, which has the new model's shape.

    A fused weight has several parts, such as queries, keys and values. Each old part is copied to the start of its new
    part, multiplied by factor ** power. The factor is the one that keeps the output of the model the same. power is 1
    for weights, -1 for gradients, and -2 for squared gradients."""
    axis, sizes = _parts(name, old, tensor)
    _, new_sizes = _parts(name, new, target)
    shrink, kind = math.sqrt(old.d_model / new.d_model), _kind(name)
    factors = [1.0] * len(sizes)
    if kind.endswith("norm") and kind not in ("q_norm", "k_norm"):
        factors = [shrink]
    elif kind == "qkv" and old.qk_norm:
        factors = [shrink, shrink, 1.0]
    for part, space, factor in zip(tensor.split(sizes, axis), target.split(new_sizes, axis), factors, strict=True):
        space[tuple(map(slice, part.shape))] = part * factor**power  # the first rows and columns of the new part


def _parts(name, c, tensor):
    """Returns (axis, sizes along it) of the parts that are fused into one weight; most weights have a single part."""
    head, stream = c.head_dim, c.d_model
    hidden = c.mixer_ff if ".attn.mlp." in name else c.d_ff
    fused = {
        "qkv": (0, [c.n_heads * head, c.n_kv_heads * head, c.n_kv_heads * head]),
        "gate_up": (0, [hidden, hidden]),
        "gate": (1, [stream] * 2),
    }
    fused |= {kind: (1, injection_of(c).parts(streams, stream)) for kind, streams in INJECTED.items()}
    axis, sizes = fused.get(_kind(name), (0, None))
    return (axis, sizes) if sizes and axis < tensor.dim() else (0, [len(tensor)])


def _kind(name: str) -> str:
    """Returns qkv for net.blocks.0.attn.qkv.weight, and so on; inject_z or inject_y for a weight of an injection."""
    injected = [part for part in name.split(".") if part in INJECTED]
    return injected[0] if injected else name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
