"""Adaptive depth: the rules by which each token chooses how many recursion steps it takes at inference.

A recursion step is a supervision step of the trm family and a visit of the loop; a plain transformer has one. After
each step every token decides from its own state alone whether it stops. A token that has stopped keeps its answer; at
later steps the other tokens attend to the keys and values of its last step, phase by phase (`KVCache`). So the depth of
a token depends neither on the rows beside it nor on whether the text came at once or token by token.

`TRMModel.forward` runs the recursion under a rule; this file only decides.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from src.losses import kl_divergence
from src.model_config import ExitRule

KL_THRESHOLD = 0.01  # nats


def stops(
    rule: ExitRule, config, halt_logits: Tensor | None, logits: Tensor | None, before: Tensor | None
) -> Bool[Tensor, "b t"]:
    """Which tokens stop after a recursion step, each by its own state.

    halt: by halt_logits (B, T) of the step; kl: by the logits (B, T, V) of the step and of the one `before`, which is
    None at the first step, where no token stops."""
    if rule.exit == "halt":
        return halt_logits.sigmoid() > (config.act_threshold if rule.act_threshold is None else rule.act_threshold)
    if before is None:
        return torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return kl_divergence(logits, before) < (KL_THRESHOLD if rule.kl_threshold is None else rule.kl_threshold)


class Leaving:
    """Which tokens of a batch have left the recursion, and how many steps each has taken."""

    def __init__(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None):
        self.stopped: Bool[Tensor, "b t"] | None = None  # None until a token stops: then nothing has to be selected
        self.steps = torch.zeros_like(input_ids)
        # padding leaves after the first step, so that the others never wait for it
        self.padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0

    def keep(self, old: Tensor | None, new: Tensor | None) -> Tensor | None:
        """`new` (B, T, D), except that tokens which have stopped keep `old`."""
        return new if self.stopped is None or new is None else torch.where(self.stopped[..., None], old, new)

    def count(self):
        """Those that have not stopped take one more step."""
        self.steps += 1 if self.stopped is None else ~self.stopped

    def stop(self, stops: Bool[Tensor, "b t"]) -> bool:
        """Stop these tokens, too; returns whether none is left."""
        stops = self.padding | stops
        stops = stops if self.stopped is None else self.stopped | stops
        if bool(stops.all()):
            return True
        if bool(stops.any()):
            self.stopped = stops
        return False


def max_depth(config, rule: ExitRule | None = None) -> int:
    """Recursion steps of a TRMConfig's model at most: the rule's bound, else as many as it is trained with."""
    return config.recursion_steps if rule is None or rule.max_recursion_depth is None else rule.max_recursion_depth


def visits_per_recursion_step(config) -> int:
    """Applications of the network in one recursion step."""
    return config.visits_per_step if config.recursion == "trm" else 1
