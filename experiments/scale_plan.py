"""Estimate what a large training run needs, without running it: memory per process, days, checkpoint sizes, text.

    python experiments/scale_plan.py --config configs/paper.yaml --vocab_size 32000 --devices 8
    python experiments/scale_plan.py --recursion none --norm pre --n_layers 24 --d_model 2048 --n_heads 32 \\
        --vocab_size 32000 --max_seq_len 2048 --batch_size 512 --grad_accum 4 --devices 64 --tokens 1e12
    python experiments/scale_plan.py --config configs/small.yaml --devices 2 --tokens 1e9 1e12     # two columns

It takes the flags of train_trm_lm.py, and those of "What is planned" below. Without --config, the model has the
defaults of the flags, and not those of configs/default.yaml. Prints tables, then one JSON line. GB are 10^9 bytes, GiB
are 1024^3 bytes. The figures come from these rules:

Parameters and FLOPs are counted as in src/metrics.py. Memory is counted for one of W processes. Weights, gradients
and AdamW's moments are in fp32. In bytes per parameter, they take:

    DDP     weights 4, gradients 4, buckets that exchange the gradients 4, AdamW's moments 8, averaged weights 4
    shard   the same divided by W, without buckets; in addition, the gathered weights 4 and their gradients 4, because
            one gathering of the weights serves a whole forward and backward pass. While a checkpoint is written, every
            process also holds all of this in whole, except for the gradients

Activations are simulated: the forward and backward pass of one accumulation part runs on fake tensors, which have
shapes but no data, and the bytes of all live tensors are added up at each operation. This is eager mode; a compiled
step needs less.

Days are the training FLOPs divided by devices x peak x utilisation. The FLOPs include attention. Gradient
checkpointing adds a third to them, which is an upper bound. Days leave out the time for exchange, evaluation,
checkpoints and waiting for text. A utilisation measured on one machine is only a guess for another. Gradients are
exchanged by ring all-reduce: each process sends 8 (W - 1) / W bytes per parameter and update. With sharding, it sends
4 (W - 1) / W bytes per parameter for each gathering and for each update. The optimizer is AdamW; Muon needs less
memory.
"""

import json
import math
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from src.config import parse_flags, run  # noqa: E402
from src.data.token_store import ON_THE_SPOT_VOCAB  # noqa: E402
from src.errors import UserError
from src.metrics import count_parameters, format_params  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.runtime import GIB, autocast  # noqa: E402
from src.training.depths import mean_flops  # noqa: E402
from src.training.train_config import Settings  # noqa: E402

CPU = torch.device("cpu")


@dataclass
class ScalePlan:
    """What is planned.

    Args:
        tokens: number of training tokens, such as 1e9; several numbers give several columns
        devices: number of GPUs, with one process each
        peak_tflops: peak TFLOP/s of a device; 312 is dense bf16 on an A100, by NVIDIA's data sheet
        utilisation: fraction of the peak that training reaches; 0.29 to 0.39 was measured on a CPU, see docs/RESULTS.md
        link_gb_per_s: GB/s that a process can send to others; 25 is one 200 Gbit/s network card per process
        disk_gb_per_s: GB/s at which process 0 writes a checkpoint
        bytes_per_token: mean UTF-8 bytes of text per token
        shard_gb: GB of text in one training file
        reader_mb_per_s: MB of text that one loading process reads and tokenizes per second; 2.5 was measured on one
            core (78 batches of 32 x 256 tokens, docs/RESULTS.md)
    """

    tokens: list[float] = field(default_factory=lambda: [1e9, 1e12])
    devices: int = 8
    peak_tflops: float = 312.0
    utilisation: float = 0.3
    link_gb_per_s: float = 25.0
    disk_gb_per_s: float = 1.0
    bytes_per_token: float = 4.0
    shard_gb: float = 1.0
    reader_mb_per_s: float = 2.5

    def __post_init__(self):
        for name, value in vars(self).items():
            numbers = value if isinstance(value, list) else [value]
            if not (numbers and all(0 < number < math.inf for number in numbers)):
                raise ValueError(f"{name} is {value}: set it above 0")


def parse_args(argv=None) -> tuple[ScalePlan, Settings]:
    """Returns the plan's own settings and those of the training run.

    If no vocabulary size is given, the one of a tokenizer that is trained on the spot is assumed."""
    plan, *parts = parse_flags(__doc__, ScalePlan, *Settings.__annotations__.values(), argv=argv)
    settings = Settings(*parts)
    if settings.model.vocab_size is None:
        print(f"vocab_size is not given: assuming {ON_THE_SPOT_VOCAB:,} tokens", file=sys.stderr)
        settings = settings._replace(model=replace(settings.model, vocab_size=ON_THE_SPOT_VOCAB))
    parts = settings.train.grad_accum * plan.devices
    if settings.train.batch_size % parts:
        raise UserError(
            f"batch_size {settings.train.batch_size} does not divide into grad_accum {settings.train.grad_accum} x "
            f"{plan.devices} devices: make it a multiple of {parts}"
        )
    return plan, settings


class PeakBytes(TorchDispatchMode):
    """Within this context, `now` and `peak` are the current and largest number of bytes in live tensor storages.

    A storage counts once an operation has read or returned it, or once it was passed to `add`. The size of a resized
    storage is updated when an operation next uses it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}  # id of a storage: (weak reference, bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(*tree_leaves((args, kwargs, out)))
        self.peak = max(self.peak, self.now)
        return out

    def add(self, *tensors):
        for tensor in tensors:
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                ref, before = self.alive.get(key) or (weakref.ref(storage, lambda _, key=key: self._gone(key)), 0)
                self.alive[key] = ref, size
                self.now += size - before

    def _gone(self, key):
        self.now -= self.alive.pop(key)[1]


def activation_bytes(config: TRMConfig, rows: int, precision: str = "bf16") -> int:
    """Returns the peak bytes of activations in a forward and backward pass over rows x max_seq_len tokens.

    Supervision steps run one after the other, as in training, or all at once with full_bptt. The gradients exist from
    the start, as they do in training with several backward passes per update. With a single backward pass, training
    creates them while activations are freed, and may need less than this."""
    with torch.device("meta"):
        model = TRMModel(config)
    at_once = config.full_bptt or config.train_steps == 1
    # MOST_SCORES 0 selects the attention kernel that never stores T x T scores, as on a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), patch("src.attention.MOST_SCORES", 0), PeakBytes() as memory:
        model.to_empty(device=CPU)
        ids, carry = torch.zeros(rows, config.max_seq_len, dtype=torch.int64), None
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        beside = memory.now
        for _ in range(1 if at_once else config.train_steps):
            with autocast(CPU, precision):
                out = model(ids, ids, supervision_steps=None if at_once else 1, carry=carry)
            out.loss.backward()
            carry = out.carry
            del out
        return memory.peak - beside


def plan_memory(parameters: int, settings: Settings, world: int) -> dict:
    """Returns {"DDP": {what: bytes}, "shard": {what: bytes}}, the memory of one process."""
    train, model = settings.train, settings.model
    rows = train.batch_size // train.grad_accum // world
    precision = "bf16" if settings.runtime.precision == "auto" else settings.runtime.precision
    activations = activation_bytes(model, rows, precision)
    if model.recursion == "trm":  # y and z of the other accumulation parts wait for the next supervision step
        activations += (train.grad_accum - 1) * 2 * rows * model.max_seq_len * model.d_model * 4
    average = 4 if train.ema_decay else 0

    def column(held, whole, buckets):
        """Returns {what: bytes} of one column.

        Weights, gradients and the optimizer's states are split into `held` parts. `whole` and `buckets` are the bytes
        per parameter of gathered weights and of exchange buckets."""
        sizes = {
            "weights": 4 / held,
            "whole weights": whole,
            "gradients": 4 + whole / held,
            "exchange": buckets,
            "moments": 8 / held,
            "average": average / held,
        }
        sizes = {name: size * parameters for name, size in sizes.items()} | {"activations": activations}
        kept = (12 + average) * parameters
        return sizes | {"training": sum(sizes.values()), "checkpoint": kept / held + (kept if whole else 0)}

    return {"DDP": column(1, 0, 4 if world > 1 else 0)} | ({"shard": column(world, 4, 0)} if world > 1 else {})


def plan_speed(plan: ScalePlan, settings: Settings, parameters: int, flops: float) -> dict:
    """Returns the speed of a run: seconds per optimizer step, tokens per second, checkpoints, loading processes."""
    train, model, world = settings.train, settings.model, plan.devices
    tokens = train.batch_size * model.max_seq_len
    products = tokens * flops / (world * plan.peak_tflops * 1e12 * plan.utilisation)
    at_once = model.full_bptt or model.train_steps == 1
    passes = 1 if at_once else model.train_steps
    updates = passes if train.optimizer_step == "supervision" else 1
    # one pass around the ring: each process sends 4 (W - 1) / W bytes per parameter
    ring = 4 * parameters * (world - 1) / world / (plan.link_gb_per_s * 1e9)
    checkpoint = (12 + 4 * bool(train.ema_decay)) * parameters
    seconds = checkpoint / (plan.disk_gb_per_s * 1e9)
    readers = math.ceil(tokens / products * plan.bytes_per_token / (plan.reader_mb_per_s * 1e6))
    return {
        "step_tokens": tokens,
        "products_s": products,
        "exchange_s": {"DDP": 2 * updates * ring, "shard": (passes * train.grad_accum + updates) * ring},
        "tokens_per_s": tokens / products,
        "checkpoint_bytes": checkpoint,
        "checkpoint_s": seconds,
        "save_every_1_percent": math.ceil(100 * seconds / products),
        "run_folder_bytes": (train.keep_checkpoints + 2) * checkpoint,  # plus the best one and the one being written
        "readers": readers,
        "readers_per_process": math.ceil(readers / world),
    }


def plan_run(plan: ScalePlan, settings: Settings, speed: dict, flops: float, tokens: float) -> dict:
    """Returns what a run over `tokens` training tokens needs: steps, days, text, disk space."""
    text = tokens * plan.bytes_per_token
    return {
        "tokens": tokens,
        "steps": math.ceil(tokens / speed["step_tokens"]),
        "train_flops": tokens * flops,
        "days": tokens / speed["tokens_per_s"] / 86400,
        "text_bytes": text,
        "shards": math.ceil(text / (plan.shard_gb * 1e9)),
        "token_store_bytes": tokens * (2 if settings.model.vocab_size <= 1 << 16 else 4),
        "tokenize_cpu_hours": text / (plan.reader_mb_per_s * 1e6) / 3600,
    }


def make_plan(plan: ScalePlan, settings: Settings) -> dict:
    """Returns all figures, in bytes, seconds and FLOPs; its keys are those of the JSON line."""
    with torch.device("meta"):
        parameters = count_parameters(TRMModel(settings.model))["total"]
    flops = mean_flops(settings.train, settings.model)
    hardware_flops = flops * (4 / 3 if settings.model.gradient_checkpointing else 1)
    speed = plan_speed(plan, settings, parameters, hardware_flops)
    return {
        "model": settings.model.to_dict(),
        "plan": vars(plan),
        "parameters": parameters,
        "train_flops_per_token": flops,
        "memory": plan_memory(parameters, settings, plan.devices),
        "speed": speed,
        "runs": [plan_run(plan, settings, speed, hardware_flops, tokens) for tokens in plan.tokens],
    }


def show(plan: ScalePlan, settings: Settings, facts: dict) -> None:
    """Print the figures as tables."""
    model, train, speed, memory = settings.model, settings.train, facts["speed"], facts["memory"]
    rows = train.batch_size // train.grad_accum // plan.devices
    print(
        f"{model.recursion}, {format_params(facts['parameters'])} parameters, "
        f"{format_params(facts['train_flops_per_token'])} training FLOPs per token; {plan.devices} devices, each with "
        f"{train.grad_accum} x {rows} windows of {model.max_seq_len} tokens per step"
    )
    names = {"weights": "weights, fp32", "exchange": "exchange buckets", "moments": "AdamW's moments"}
    names |= {"training": "sum while training", "checkpoint": "sum while a checkpoint is written"}
    lines = [
        [names.get(what, what), *(f"{column[what] / GIB:,.2f}" for column in memory.values())] for what in memory["DDP"]
    ]
    table(["memory per process, GiB", *memory], lines)
    exchange = " or ".join(f"{speed['exchange_s'][kind]:.3g} ({kind})" for kind in memory)
    table(
        ["per step", f"{speed['step_tokens']:,} tokens"],
        [
            ["matrix products, s", f"{speed['products_s']:.3g}"],
            ["exchange when not overlapped, s", exchange],
            ["tokens/s", f"{speed['tokens_per_s']:,.0f}"],
            ["loading processes needed", f"{speed['readers']:,} ({speed['readers_per_process']:,} per device)"],
            ["checkpoint, GB", f"{speed['checkpoint_bytes'] / 1e9:,.2f} ({speed['checkpoint_s']:.3g} s)"],
            ["save_every for 1 % of the time", f"{speed['save_every_1_percent']:,}"],
            ["run folder, GB", f"{speed['run_folder_bytes'] / 1e9:,.1f}"],
        ],
    )
    figures = {
        "optimizer steps": lambda r: f"{r['steps']:,}",
        "training FLOPs": lambda r: f"{r['train_flops']:.2e}",
        "time": lambda r: clock(r["days"]),
        "text, GB": lambda r: f"{r['text_bytes'] / 1e9:,.0f}",
        f"files of {plan.shard_gb:g} GB": lambda r: f"{r['shards']:,}",
        "tokens on disk, if tokenized once, GB": lambda r: f"{r['token_store_bytes'] / 1e9:,.0f}",
        "CPU hours to tokenize": lambda r: f"{r['tokenize_cpu_hours']:,.3g}",
    }
    table(
        ["run", *(f"{format_params(r['tokens'])} tokens" for r in facts["runs"])],
        [[name, *map(figure, facts["runs"])] for name, figure in figures.items()],
    )


def clock(days: float) -> str:
    """Format a duration in the largest unit that gives 1 or more: 14.1 days, 8.2 hours, 12 minutes."""
    units = (("days", days), ("hours", 24 * days), ("minutes", 1440 * days))
    unit, number = next((u for u in units if u[1] >= 1), units[-1])
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print an empty line and a table: the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    print()
    for first, *rest in (header, *rows):
        print("  ".join((first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:])))))


def main(argv=None) -> None:
    plan, settings = parse_args(argv)
    facts = make_plan(plan, settings)
    show(plan, settings, facts)
    print(json.dumps({"experiment": "scale_plan"} | facts))


if __name__ == "__main__":
    run(main)
