"""The rungs of experiments/ladder.py: what makes each model, and its size."""

import json
import math

import torch

from experiments import arms
from src.metrics import count_parameters, flops_per_token
from src.model import TRMConfig, TRMModel

RUNGS = ("plain", "plain-deep", "plain-wide", "loop", "loop-ends", "gated", "two-stream", "trm", "late")
BIGGER = ("plain-deep", "plain-wide")  # they have more parameters than the others


def value_of(text: str):
    """Returns the value that a word stands for: true or false, a number, else the word itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def assigned(text: str) -> tuple[str, str]:
    name, is_assigned, values = text.partition("=")
    if not (name and is_assigned and values):
        raise ValueError(f"{text!r} is no setting: write it as name=value")
    return name, values


def split_rung(name: str) -> tuple[str, dict]:
    """Returns the rung and the other settings in a name such as `trm+optimizer=muon`."""
    rung, *others = name.split("+")
    if rung not in RUNGS:
        raise ValueError(f"there is no rung {rung}: choose from {', '.join(RUNGS)}")
    return rung, {key: value_of(value) for key, value in map(assigned, others)}


def parameters_of(model: TRMConfig) -> int:
    with torch.device("meta"):
        return count_parameters(TRMModel(model))["total"]


def rung_flags(rung: str, base: TRMConfig) -> dict:
    """Returns {setting: value}, which turns a model of recursion trm into a rung."""
    L, visits = base.n_layers, base.visits_per_step
    plain = {"recursion": "none", "halting": False}
    ends = {"prelude_layers": 1, "coda_layers": 1, "n_layers": max(1, L - 2)}
    passes = max(1, round((L * visits - 2) / ends["n_layers"]))
    loop = {"recursion": "loop", "halting": False}
    inner = loop | ends | {"deep_steps": passes, "grad_deep_steps": passes}
    flags = {
        "plain": plain,
        "plain-deep": plain | {"n_layers": L * visits},
        "plain-wide": plain,
        "loop": loop | {"injection": "none", "deep_steps": visits, "grad_deep_steps": visits},
        "loop-ends": inner | {"injection": "sum"},
        "gated": inner | {"injection": "sum", "gate": True},
        "two-stream": {"supervision_steps": 1, "grad_deep_steps": base.deep_steps},
        "trm": {},
        "late": inner | {"injection": "none", "recursion_from": 0.6667},
    }[rung]
    if rung in ("loop-ends", "gated", "late"):
        return flags | _size_of_equal_parameters(base, flags, parameters_of(arms.changed(base, plain)))
    if rung == "plain-wide":
        return flags | _width_of_equal_flops(base, flags, flops_per_token(arms.changed(base, _deep(base, plain))).train)
    return flags


def _deep(base, plain):
    return plain | {"n_layers": base.n_layers * base.visits_per_step}


def _size_of_equal_parameters(base: TRMConfig, flags: dict, wanted: int) -> dict:
    """Returns the d_model and d_ff with which a rung has `wanted` parameters.

    If it has more layers than the recipe, its width is smaller, by the root of their ratio. d_ff makes up the rest."""
    layers = flags["n_layers"] + flags["prelude_layers"] + flags["coda_layers"]
    unit = 2 * base.n_heads  # the size of a head must be even
    width = base.d_model
    if layers > base.n_layers:
        width = unit * max(1, round(width * math.sqrt(base.n_layers / layers) / unit))
    few, more = (parameters_of(arms.changed(base, flags | {"d_model": width, "d_ff": d_ff})) for d_ff in (8, 16))
    return {"d_model": width, "d_ff": 8 * max(1, 1 + round((wanted - few) / (more - few)))}


def _width_of_equal_flops(base: TRMConfig, flags: dict, wanted: float) -> dict:
    """Returns the sizes of a wider model, with more heads of the same size, whose tokens cost `wanted` FLOPs."""
    group = base.n_heads // base.n_kv_heads

    def wide(heads):
        width = heads * base.head_dim
        d_ff = 8 * round(base.d_ff * width / base.d_model / 8)
        return {"d_model": width, "n_heads": heads, "n_kv_heads": heads // group, "d_ff": d_ff}

    def cost(heads):
        return flops_per_token(arms.changed(base, flags | wide(heads))).train

    heads = base.n_heads
    while cost(heads + group) <= wanted:
        heads += group
    return wide(min(heads, heads + group, key=lambda n: abs(cost(n) - wanted)))
