"""What a run needs to go on exactly where a checkpoint was written: collected from a Trainer, checked whole, and given
back to it."""

import time
from pathlib import Path

import torch

from src import checkpoint, parallel
from src.errors import UserError
from src.model import TRMModel
from src.optim import make_optimizers

COUNTERS = ("step", "elapsed", "best", "skipped")


def collect(trainer) -> tuple[dict, dict | None, dict]:
    """(weights, averaged weights or None, state) as whole tensors, numbers and containers; all processes take part."""
    trainer.elapsed = time.monotonic() - trainer.started
    weights = parallel.gathered(checkpoint.own_state(trainer.raw))
    average = weights | parallel.gathered(trainer.ema.average) if trainer.ema is not None else None
    scaler = trainer.accelerator.scaler
    state = {name: getattr(trainer, name) for name in COUNTERS} | {
        "curriculum": trainer.curriculum.state_dict(),
        "optimizers": parallel.gathered([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "ema_updates": trainer.ema.updates if trainer.ema is not None else 0,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "loaders": trainer.agreement.gather(trainer.loader.state_dict()),  # by rank
        "window": trainer.window.state_dict(trainer.accelerator) | {"seconds": trainer.clock.seconds()},
    }
    return weights, average, state


def check(config, folder: Path, state: dict):
    """UserError unless a checkpoint folder and its state are all that a run of these settings (a TrainConfig) needs.

    What restore gives to the optimizers is used without a look at shapes: fused kernels then write out of bounds."""
    need = Needs(folder / "state" / "training.pt")
    need(isinstance(state, dict), "it is no state of a run")
    for name in (*COUNTERS, "ema_updates"):
        need.number(state, name, int if name in ("step", "skipped", "ema_updates") else float)
    need(folder.name == f"step_{state['step']:08d}", f"it is of step {state['step']}")
    with torch.device("meta"):
        model = TRMModel(checkpoint.load_config(folder))
    for name in ("model.safetensors", *["ema.safetensors"] * bool(config.ema_decay)):
        checkpoint.load_weights(model, checkpoint.read_weights(folder / name), folder / name)
    optimizers = make_optimizers(model, config.optimizer, config.lr, config.weight_decay, (0.9, config.beta2))
    saved = state.get("optimizers")
    need(isinstance(saved, list) and len(saved) == len(optimizers), "it lacks the state of an optimizer")
    for optimizer, each in zip(optimizers, saved):
        check_optimizer(need, optimizer, each, state["step"] > state["skipped"])
    starts = state.get("curriculum", {}).get("starts") if isinstance(state.get("curriculum"), dict) else None
    need(isinstance(starts, list) and all(type(start) is int for start in starts), "it lacks the curriculum's stages")
    scaler = state.get("scaler", 0)
    need(scaler is None or isinstance(scaler, dict), "it lacks the loss scaler")
    for name in scaler or {}:
        need.number(scaler, name)
    need(isinstance(state.get("loaders"), list) and state["loaders"], "it lacks the position in the text")
    for position in state["loaders"]:
        need.position(position)
    window = state.get("window")
    need(isinstance(window, dict), "it lacks the window of the log")
    for name in ("steps", "good", "visits", "seconds"):
        need.number(window, name, float if name == "seconds" else int)
    need.tensor(window.get("losses"), torch.zeros(3), "the window's losses")


MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def check_optimizer(need, optimizer, saved, has_trained: bool):
    """UserError unless `saved` is a state of whole tensors for the parameters of this optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    need(isinstance(saved, dict) and isinstance(saved.get("state"), dict), "an optimizer's state is missing")
    need(saved["state"] or not has_trained, "an optimizer's state is empty")
    kind = next(kind for kind in MOMENTS if kind in type(optimizer).__name__)
    for number, entries in saved["state"].items():
        need(type(number) is int and 0 <= number < len(parameters), f"the optimizer has no parameter {number!r}")
        need(isinstance(entries, dict) and entries.keys() == MOMENTS[kind], f"{kind}'s state of parameter {number}")
        for name, value in entries.items():
            like = torch.zeros(()) if name == "step" else parameters[number]
            need.tensor(value, like, f"{kind}'s {name} of parameter {number}")
            need(name not in ("step", "exp_avg_sq") or value.min() >= 0, f"{kind}'s {name} of parameter {number}")


class Needs:
    """need(condition, what is wrong): UserError, which names the file, where the condition does not hold."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, holds, wrong: str):
        if not holds:
            raise UserError(f"{self.path} is broken: {wrong}")

    def number(self, state: dict, name, kind=float):
        """A number of 0 or more that is no NaN; infinity is the best loss so far of a run that was never judged."""
        value = state.get(name) if isinstance(state, dict) else None
        kinds = (int,) if kind is int else (int, float)
        self(type(value) in kinds and value >= 0 and (value < 2**62 or name == "best"), f"{name} is {value!r:.50}")

    def tensor(self, value, like: torch.Tensor, name: str):
        """A tensor of finite numbers of the shape and dtype of another."""
        is_like = isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
        is_whole = is_like and value.layout == torch.strided and value.device.type == "cpu"
        is_whole = is_whole and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        self(is_whole and bool(value.isfinite().all()), f"{name} is no finite tensor of shape {list(like.shape)}")

    def position(self, state):
        """Where a loader is in its text: see `src.loader`, and for streams `src.stream`."""
        self.number(state, "samples", int)
        if "reads" not in state:
            self.number(state, "epoch_samples", int)
            self(state["epoch_samples"] > 0, "epoch_samples is 0")
            return
        self.number(state, "epoch", int)
        self(
            isinstance(state["reads"], dict) and isinstance(state.get("loader"), dict), "the stream's state is missing"
        )
        self.stream(state["loader"])

    def stream(self, state):
        """The places of a stream's readers, wherever torchdata keeps them."""
        for inner in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
            self.stream(inner)
        if isinstance(state, dict) and "drawn" in state:
            self.number(state, "drawn", int)
            windows = state.get("windows")
            self(isinstance(windows, list), "the stream's windows are missing")
            for window in windows:
                self.number(window, "block", int)
                self.number(window, "given", int)
                start = window.get("start")
                self(isinstance(start, list) and len(start) == 4, "the stream's place is missing")
                for i in range(4):
                    self.number(dict(enumerate(start)), i, int)


def restore(trainer, folder: Path, state: dict):
    """Give a new Trainer, whose model has the checkpoint's config, the weights and state of a checkpoint folder."""
    for name in COUNTERS:
        setattr(trainer, name, state[name])
    trainer.curriculum.load_state_dict(state["curriculum"])
    weights = folder / "model.safetensors"
    checkpoint.load_weights(trainer.raw, checkpoint.read_weights(weights), weights)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        parallel.load_optimizer(optimizer, saved["state"])
    if trainer.ema is not None:
        average = checkpoint.read_weights(folder / "ema.safetensors")
        for name, tensor in trainer.ema.average.items():
            tensor.copy_(parallel.placed_like(average[name], tensor))
        trainer.ema.updates = state["ema_updates"]
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.enter_stage()  # now, as a model that grows at this step is still the smaller one in the checkpoint
    trainer.loader.load_state_dict(state["loaders"][min(trainer.rank, len(state["loaders"]) - 1)])
    trainer.window.load_state_dict(state["window"], trainer.is_main)
    trainer.clock.start(trainer.step - state["window"]["steps"], state["window"]["seconds"])
