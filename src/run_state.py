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
    with torch.device("meta"):
        model = TRMModel(checkpoint.load_config(folder))
    for name in ("model.safetensors", *["ema.safetensors"] * bool(config.ema_decay)):
        checkpoint.load_weights(model, checkpoint.read_weights(folder / name), folder / name)
    optimizers = make_optimizers(model, config.optimizer, config.lr, config.weight_decay, (0.9, config.beta2))
    window = {"losses": torch.zeros(3), "steps": int, "good": int, "visits": int, "seconds": float}
    like = {name: int for name in ("step", "skipped", "ema_updates")} | {"elapsed": float, "window": window}
    like |= {"curriculum": {"starts": [int]}, "best": float, "scaler": None, "loaders": [{"samples": int}]}
    check_like(folder, state, like | {"optimizers": [{"state": {}}]}, infinite=("best",))
    saved = state["optimizers"]
    is_whole = len(saved) == len(optimizers) and state["loaders"] and isinstance(state["scaler"], dict | None)
    is_whole = is_whole and all(each["state"] for each in saved if state["step"] > state["skipped"])
    need(folder, is_whole, "a part is missing")
    for optimizer, each in zip(optimizers, saved):
        check_like(folder, each["state"], moments_like(folder, optimizer, each["state"]))
    check_like(folder, state["scaler"] or {}, dict.fromkeys(state["scaler"] or {}, float))
    for position in state["loaders"]:
        streams = {"reads": {}, "epoch": int, "loader": {}}
        check_like(folder, position, streams if "reads" in position else {"epoch_samples": int})
        need(folder, position.get("epoch_samples", 1) > 0, "an epoch is empty")
        for reader in _readers(position.get("loader")):
            place = {"start": [int], "block": int, "given": int}
            check_like(folder, reader, {"drawn": int, "windows": [place]})
            need(folder, all(len(window["start"]) == 4 for window in reader["windows"]), "a place in a stream")
    need(folder, folder.name == f"step_{state['step']:08d}", f"it is of step {state['step']}")


def moments_like(folder, optimizer, saved: dict) -> dict:
    """What an optimizer keeps of the parameters that `saved` has entries of, for `check_like`."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    need(folder, saved.keys() <= parameters.keys(), "an optimizer has entries of other parameters")
    if isinstance(optimizer, torch.optim.Muon):
        return {number: {"momentum_buffer": parameters[number]} for number in saved}
    return {n: {"step": torch.zeros(()), "exp_avg": parameters[n], "exp_avg_sq": parameters[n]} for n in saved}


def need(folder: Path, holds, wrong: str):
    """UserError, which names the state of a checkpoint folder and what is wrong with it, unless it holds."""
    if not holds:
        raise UserError(f"{folder / 'state' / 'training.pt'} is broken: {wrong}")


def check_like(folder: Path, saved, like, name="it", infinite=()):
    """UserError unless a nest of tensors, numbers and containers is like another.

    A tensor stands for finite ones of its shape and dtype; int and float for numbers from 0 on, without an end where
    `infinite` has their name; a list for a list of what it holds; a dict for one that has its keys; None for anything.
    """
    last, inner = str(name).rpartition(".")[2], []
    if isinstance(like, torch.Tensor):
        fits = isinstance(saved, torch.Tensor) and (saved.shape, saved.dtype) == (like.shape, like.dtype)
        fits = fits and (saved.layout, saved.device.type) == (torch.strided, "cpu")
        fits = fits and saved.untyped_storage().nbytes() >= saved.numel() * saved.element_size()  # none is repeated
        fits = fits and saved.isfinite().all() and (last not in ("step", "exp_avg_sq") or saved.min() >= 0)
    elif isinstance(like, type):
        fits = type(saved) in (int, like) and saved >= 0 and (saved < 2**62 or last in infinite)
    elif isinstance(like, list):
        fits = isinstance(saved, list)
        inner = [(name, each, like[0]) for each in saved] if fits else []
    else:
        fits = like is None or isinstance(saved, dict) and saved.keys() >= like.keys()
        inner = [(f"{name}.{key}", saved[key], like[key]) for key in like or ()] if fits else []
    need(folder, fits, f"{name.removeprefix('it.')} is not what this run needs")
    for part, each, wanted in inner:
        check_like(folder, each, wanted, part, infinite)


def _readers(state):
    """The states of a stream's readers, wherever torchdata keeps them."""
    if isinstance(state, dict) and "drawn" in state:
        yield state
    for inner in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from _readers(inner)


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
