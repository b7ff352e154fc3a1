"""How deep the model is at each step of a run: see sample_depth, least_depth and recursion_from in TrainConfig."""

import random
from collections import Counter
from dataclasses import replace

from src.errors import UserError
from src.metrics import flops_per_token
from src.model import TRMConfig
from src.model_config import loss_weights
from src.runtime import mix_seed
from src.training.train_config import TrainConfig


def depth_so_far(config: TrainConfig, whole: TRMConfig, begun: bool) -> TRMConfig:
    """Returns the model's config at the largest depth of training: see recursion_from in TrainConfig.

    begun: whether the full recursion has begun."""
    return at_depth(whole, 1, 1) if config.recursion_from and not begun else whole


def depth_of_step(config: TrainConfig, whole: TRMConfig, step: int, begun: bool) -> TRMConfig:
    """Returns the model's config at the depth of this step: see sample_depth and recursion_from in TrainConfig."""
    if not config.sample_depth or config.recursion_from and not begun:
        return depth_so_far(config, whole, begun)
    # a generator, because the lowest bits of mix_seed repeat after a few steps
    rng = random.Random(mix_seed(config.seed, step, 1))
    depths = drawn_depths(whole, config.least_depth)
    return at_depth(whole, *depths[rng.randrange(len(depths))])


def draws_supervision(model: TRMConfig) -> bool:
    """Whether sample_depth draws the supervision steps, because all of them are in one graph."""
    return model.recursion == "trm" and model.full_bptt


def drawn_depths(whole: TRMConfig, least: int = 1) -> list[tuple[int, int]]:
    """Returns the pairs of deep_steps and supervision_steps among which sample_depth draws."""
    deep, supervision = whole.deep_steps, whole.supervision_steps
    if whole.recursion == "none":
        return [(deep, supervision)]  # it has no depth
    if draws_supervision(whole):
        return [(deep, steps) for steps in range(least, supervision + 1)]
    return [(steps, supervision) for steps in range(least, deep + 1)]


def puts_off(config: TrainConfig, whole: TRMConfig) -> bool:
    """Returns whether recursion_from makes the model shallower at first."""
    return whole.recursion != "none" and depth_so_far(config, whole, False) != whole


def depths_of(config: TrainConfig, whole: TRMConfig) -> list[tuple[int, int]]:
    """Returns the pairs of deep_steps and supervision_steps of the steps after recursion_from."""
    if config.sample_depth:
        return drawn_depths(whole, config.least_depth)
    return [(whole.deep_steps, whole.supervision_steps)]


def least_depth(config: TrainConfig, whole: TRMConfig, begun: bool) -> int:
    """Returns the first recursion step after which training has a loss, at the depths of `depth_of_step`."""
    if whole.recursion == "none" or config.recursion_from and not begun:
        return 1
    models = [at_depth(whole, *depth) for depth in depths_of(config, whole)]
    weights = [loss_weights(model, model.recursion_steps) for model in models]
    return 1 + min(next(step for step, weight in enumerate(each) if weight > 0) for each in weights)


def check_depths(config: TrainConfig, whole: TRMConfig):
    """Raises UserError if a step of the run may have a depth that does not go with the model's other settings."""
    drawn = drawn_depths(whole, config.least_depth) if config.sample_depth else []
    if config.sample_depth and not drawn:
        most = drawn_depths(whole)
        raise UserError(f"least_depth is {config.least_depth}: set it to {len(most)} or less, the most steps here")
    depths = [(1, 1)] * bool(config.recursion_from) + drawn
    try:
        for depth in depths:
            at_depth(whole, *depth)
    except ValueError as error:
        raise UserError(f"sample_depth and recursion_from train at smaller depths too: {error}") from None


def mean_flops(config: TrainConfig, whole: TRMConfig, share: float = 1.0) -> float:
    """Returns the training FLOPs per token, as the mean over a run whose depth may depend on the step.

    share: the part of the run to look at, from its start. Raises UserError for depths that the model cannot have."""
    check_depths(config, whole)
    steps, depths = 1000, Counter()
    for step in range(steps):
        now = depth_of_step(config, whole, step, share * step / steps >= config.recursion_from)
        depths[now.deep_steps, now.supervision_steps] += 1
    return sum(n * flops_per_token(at_depth(whole, *depth)).train for depth, n in depths.items()) / steps


def at_depth(whole: TRMConfig, deep: int, supervision: int) -> TRMConfig:
    """Returns a config with fewer steps.  Raises ValueError if the supervision_weights that remain are all 0."""
    cut = min(whole.grad_deep_steps, deep)
    return replace(whole, deep_steps=deep, supervision_steps=supervision, grad_deep_steps=cut)
