"""The state that an exact resume needs: `collect` reads it from a Trainer, `restore` puts it back."""

import math
import time
from pathlib import Path

from src import checkpoint
from src.errors import UserError
from src.training import depths, parallel, run_folder

COUNTERS = "step elapsed best best_loss eval_due recursion_begun skipped skipped_in_a_row skipped_at".split()
# of a state that was written before these were saved
EARLIER = {"best_loss": -math.inf, "eval_due": False, "recursion_begun": False, "skipped_in_a_row": 0, "skipped_at": -1}


def collect(trainer, is_best: bool) -> tuple[dict, dict | None, dict]:
    """Returns (weights, averaged weights or None, state) as whole tensors, numbers and containers.

    All processes must call this, because it gathers sharded tensors and the position of each process in the data."""
    trainer.elapsed = time.monotonic() - trainer.started
    weights = parallel.gathered(checkpoint.own_state(trainer.raw))
    average = weights | parallel.gathered(trainer.ema.average) if trainer.ema is not None else None
    scaler = trainer.accelerator.scaler
    state = {name: getattr(trainer, name) for name in COUNTERS} | {
        "is_best": is_best,  # at this step
        "eval_batches": trainer.config.eval_batches,
        "curriculum": trainer.curriculum.state_dict(),
        "optimizers": parallel.gathered([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "ema_updates": trainer.ema.updates if trainer.ema is not None else 0,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "loaders": trainer.agreement.gather(trainer.loader.state_dict()),  # by rank
        "window": trainer.window.state_dict(trainer.accelerator) | {"seconds": trainer.clock.seconds()},
    }
    return weights, average, state


def info_of(trainer) -> dict:
    """Returns the facts that a checkpoint's config.json gets beside the model's config."""
    least = depths.least_depth(trainer.config, trainer.raw.config, trainer.recursion_begun)
    best = trainer.best if math.isfinite(trainer.best) else None
    return {"step": trainer.step, trainer.best_name: best, "least_depth": least}


def begin_recursion(trainer):
    """Note that the full recursion begins with this step.

    With recursion_from, the best checkpoint is chosen anew: an earlier one has a smaller depth, and whoever opens the
    run would get a model without the recursion."""
    trainer.recursion_begun = True
    if depths.puts_off(trainer.config, trainer.raw.config):
        trainer.best = trainer.best_loss = math.inf
        if trainer.is_main:
            run_folder.forget_best(trainer.folder)
        trainer.say(f"step {trainer.step}: the full recursion begins; the best checkpoint is chosen anew")


def restore(trainer, folder: Path, state: dict):
    """Load a checkpoint's weights and state into a new Trainer, whose model must have the checkpoint's config.

    If state["eval_batches"] is another number, or None because the data has changed, evaluations so far do not compare
    with those to come, and the best checkpoint is chosen anew."""
    for name in COUNTERS:
        setattr(trainer, name, (EARLIER | state)[name])
    is_same = state.get("eval_batches", trainer.config.eval_batches) == trainer.config.eval_batches
    if not is_same and math.isfinite(trainer.best):
        trainer.best = trainer.best_loss = math.inf
        trainer.say("evaluations are of other data than before: the best checkpoint is chosen anew")
    trainer.curriculum.load_state_dict(state["curriculum"])
    weights = folder / "model.safetensors"
    checkpoint.load_weights(trainer.raw, checkpoint.read_weights(weights), weights)
    if len(state["optimizers"]) != len(trainer.optimizers):
        raise UserError(f"{folder} is of a version with other optimizers: start from its weights with --init_from")
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        parallel.load_optimizer(optimizer, saved["state"])
    if trainer.ema is not None:
        average = checkpoint.read_weights(folder / "ema.safetensors")
        for name, tensor in trainer.ema.average.items():
            tensor.copy_(parallel.placed_like(average[name], tensor))
        trainer.ema.updates = state["ema_updates"]
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    # the stage that has ended here, if an evaluation is still due in it; after the weights, because if a wider stage
    # starts at this step, the checkpoint still holds the narrower model
    trainer.enter_stage(trainer.step - bool(trainer.eval_due))
    # with more processes than before, the extra ones take the last saved position
    trainer.loader.load_state_dict(state["loaders"][min(trainer.rank, len(state["loaders"]) - 1)])
    trainer.window.load_state_dict(state["window"], trainer.is_main)
    trainer.clock.start(trainer.step - state["window"]["steps"], state["window"]["seconds"])
