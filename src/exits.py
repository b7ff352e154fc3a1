"""Adaptive depth: how many recursion steps each token takes at inference, and the forward pass that obeys.

A recursion step is a supervision step of the trm family and a visit of the loop; a plain transformer has one. After
each step every token decides for itself, from its own state alone, whether it stops. One that has stopped keeps its
answer, and at every later step it shows the others the keys and values of its last one, phase by phase (`KVCache`).
So a token's depth depends neither on the rows beside it nor on whether the text came at once or token by token.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from src.losses import kl_divergence
from src.model_config import ExitRule

KL_THRESHOLD = 0.01  # nats


def max_depth(config, rule: ExitRule | None = None) -> int:
    """Recursion steps of a TRMConfig's model at most: the rule's bound, else as many as it is trained with."""
    trained = {"none": 1, "loop": config.deep_steps, "trm": config.supervision_steps}[config.recursion]
    return trained if rule is None or rule.max_recursion_depth is None else rule.max_recursion_depth


def visits_per_recursion_step(config) -> int:
    """Applications of the network in one recursion step."""
    return config.visits_per_step if config.recursion == "trm" else 1


@torch.no_grad()
def recur(model, input_ids, attention_mask, cache, rule: ExitRule, return_steps: bool):
    """The recursion under a rule: logits, halting logits and carry, as TRMModel.forward gives them.

    carry.steps is Int (B, T), the recursion steps that each token took. Where tokens may leave and no cache is given,
    one is made for this call, as those that go on look at what the others showed last."""
    depth, adapts = max_depth(model.config, rule.check(model.config)), rule.exit != "fixed"
    decides_by_logits = rule.exit == "kl"
    if adapts and cache is None:
        cache = model.new_cache(*input_ids.shape, depth=depth)
    x, ctx = model._enter(input_ids, attention_mask, cache)
    carry, steps, stopped = model._initial_state(x), torch.zeros_like(input_ids), None
    padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
    h = logits = None
    read = []  # (logits, halting logits) of every step, for return_steps
    for s in range(depth):
        before, logits_before = carry, logits
        carry = model._inference_cycle(x, carry, ctx)
        carry = carry._replace(y=_kept(stopped, before.y, carry.y), z=_kept(stopped, before.z, carry.z))
        steps += 1 if stopped is None else ~stopped
        is_last = s == depth - 1
        if adapts or return_steps or is_last:
            h = _kept(stopped, h, model._before_head(carry.y, ctx, s))
        logits = None
        if decides_by_logits:
            logits = model.head(h)
        elif return_steps or is_last:
            logits = model.head(ctx.read(h))
        read += [(ctx.read(logits), model._halt(carry.y))] if return_steps else []
        if adapts and not is_last:
            leaves = padding | _leaves(model, rule, carry.y, logits, logits_before)
            stopped = leaves if stopped is None else stopped | leaves
            if bool(stopped.all()):
                cache.fill_from(s, input_ids.shape[1])
                break
            cache.stopped = stopped = stopped if bool(stopped.any()) else None
    if cache is not None:
        cache.advance(input_ids.shape[1])
    logits, halt = model.head(ctx.read(h)) if logits is None else ctx.read(logits), model._halt(carry.y)
    if return_steps:
        logits, halt = (None if part[0] is None else torch.stack(part) for part in zip(*read))
    return logits, halt, carry._replace(steps=steps)


def _kept(stopped, old, new):
    """`new` (B, T, D), but `old` where a token has stopped."""
    return new if stopped is None or new is None else torch.where(stopped[..., None], old, new)


def _leaves(model, rule, y, logits, logits_before) -> Bool[Tensor, "b t"]:
    """Which tokens stop after this step, each by its own state."""
    if rule.exit == "halt":
        threshold = model.config.act_threshold if rule.act_threshold is None else rule.act_threshold
        return model._halt(y).sigmoid() > threshold
    if logits_before is None:
        return torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
    return kl_divergence(logits, logits_before) < (KL_THRESHOLD if rule.kl_threshold is None else rule.kl_threshold)
