"""What a run needs to go on exactly where a checkpoint was written: collected from a Trainer, and given back to it."""

import time
from pathlib import Path

from src import checkpoint
from src.training import parallel

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
