"""Estimate the hours and the memory of a training run on puzzles, without running it.

    python experiments/puzzle_hours.py --config configs/sudoku_extreme.yaml
    python experiments/puzzle_hours.py --config configs/maze_hard.yaml --devices 4
    python experiments/puzzle_hours.py --config configs/sudoku4.yaml --peak_tflops 0.1 --utilisation 0.3    # a CPU core

It takes the flags of train_puzzles.py, and those of "What is planned" below. Prints a table, then one JSON line. A step
of training is one supervision step of every row, so its FLOPs are those of `flops_per_token` in src/metrics.py, divided
by the supervision steps, times the cells of a batch. Hours are the FLOPs of all steps divided by devices x peak x
utilisation. They leave out evaluations, checkpoints, the exchange of gradients and the work that is no matrix product.

Memory is that of one device: weights, gradients, AdamW's moments (which the embeddings of puzzle identifiers do not
have) and averaged weights in fp32, the states y and z of its rows, and the activations of one part of its rows, counted
as in experiments/scale_plan.py.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments.scale_plan import activation_bytes, clock, table  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import count_parameters, flops_per_token, format_params  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.runtime import GIB  # noqa: E402
from src.tasks.puzzle_config import PuzzleSettings, model_config  # noqa: E402
from src.tasks.puzzle_folder import kind_named  # noqa: E402


@dataclass
class HoursPlan:
    """What is planned.

    Args:
        devices: number of GPUs, with one process each
        peak_tflops: peak TFLOP/s of a device; 989 is dense bf16 on an H100, by NVIDIA's data sheet
        utilisation: fraction of the peak that training reaches; an assumption, not measured here. The hours that the
            TRM authors state for Sudoku-Extreme (18 on an L40S), Maze-Hard (24 on four) and ARC (72 on four H100)
            are 9 to 16 % of the peak
    """

    devices: int = 1
    peak_tflops: float = 989.0
    utilisation: float = 0.15

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: set it above 0")


def parse_args(argv=None) -> tuple[HoursPlan, PuzzleSettings]:
    plan, *parts = parse_flags(__doc__, HoursPlan, *PuzzleSettings.__annotations__.values(), argv=argv)
    settings = PuzzleSettings(*parts)
    parts = settings.train.grad_accum * plan.devices
    if settings.train.batch_size % parts:
        size = f"batch_size {settings.train.batch_size} does not divide into grad_accum x devices = {parts} parts"
        raise UserError(f"{size}: make it a multiple")
    return plan, settings


def plan_time(plan: HoursPlan, settings: PuzzleSettings, config: TRMConfig) -> dict:
    """FLOPs of a step, and the time of a step and of the run."""
    train = settings.train
    flops = flops_per_token(config).train / config.train_steps * config.max_seq_len * train.batch_size
    seconds = flops / (plan.devices * plan.peak_tflops * 1e12 * plan.utilisation)
    hours = seconds * train.max_steps / 3600
    return {"step_flops": flops, "steps": train.max_steps, "step_s": seconds, "hours": hours}


def plan_memory(plan: HoursPlan, settings: PuzzleSettings, config: TRMConfig, sizes: dict) -> dict:
    """{what: bytes} of one device."""
    train, parameters = settings.train, sizes["parameters"]
    rows = train.batch_size // plan.devices
    precision = "bf16" if settings.runtime.precision == "auto" else settings.runtime.precision
    is_trm = config.recursion == "trm"
    memory = {
        "weights, gradients, average": (8 + 4 * bool(train.ema_decay)) * parameters,
        "AdamW's moments": 8 * (parameters - sizes["puzzle_embedding_parameters"]),
        "states y and z of the rows": 2 * 4 * rows * config.positions_per_row * config.d_model * is_trm,
        "activations": activation_bytes(config, rows // train.grad_accum, precision),
    }
    return memory | {"sum": sum(memory.values())}


def config_of(settings: PuzzleSettings) -> TRMConfig:
    """The settings of the model for the boards of these settings."""
    kind = kind_named(settings.puzzle.puzzle)
    return model_config(settings.model, kind.cells, kind.vocab_size)


def make_plan(plan: HoursPlan, settings: PuzzleSettings) -> dict:
    """All figures, in FLOPs, hours and bytes; its keys are those of the JSON line."""
    config = config_of(settings)
    with torch.device("meta"):
        model = TRMModel(config)
    sizes = {"parameters": count_parameters(model)["total"]}
    sizes["puzzle_embedding_parameters"] = model.puzzle_embed.weight.numel() if config.puzzle_ids else 0
    facts = {"puzzle": settings.puzzle.puzzle, "plan": vars(plan)} | sizes | plan_time(plan, settings, config)
    return facts | {"memory": plan_memory(plan, settings, config, sizes)}


def show(plan: HoursPlan, settings: PuzzleSettings, facts: dict):
    """Print the figures as tables."""
    sizes = f"{format_params(facts['parameters'])} parameters"
    if facts["puzzle_embedding_parameters"]:
        sizes += f", {format_params(facts['puzzle_embedding_parameters'])} of them embed puzzle identifiers"
    print(f"{facts['puzzle']}: {sizes}; {plan.devices} x {plan.peak_tflops:g} TFLOP/s at {plan.utilisation:.0%}")
    table(
        ["run", f"{facts['steps']:,} steps of {settings.train.batch_size:,} puzzles"],
        [
            ["FLOPs per step", f"{facts['step_flops']:.3g}"],
            ["seconds per step", f"{facts['step_s']:.3g}"],
            ["time", clock(facts["hours"] / 24)],
        ],
    )
    table(["memory per device", "GiB"], [[name, f"{size / GIB:,.2f}"] for name, size in facts["memory"].items()])


def main(argv=None) -> None:
    plan, settings = parse_args(argv)
    facts = make_plan(plan, settings)
    show(plan, settings, facts)
    print(json.dumps({"experiment": "puzzle_hours"} | facts))


if __name__ == "__main__":
    run(main)
