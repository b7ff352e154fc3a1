"""Exit rules: when a token stops recursing at inference.

A recursion step is a supervision step of the trm family or a visit of the loop; a plain transformer has one. After each
step, the rule decides for each token, from the outputs of that token alone, whether it stops. A stopped token keeps its
answer. Tokens that continue attend to the keys and values of the stopped token's last step; `KVCache` copies them to
later steps. So the depth of a token does not depend on other rows, nor on whether the text is processed at once or
token by token.

This file has the decision and the count of steps. `TRMModel._forward_under_rule` runs the recursion.
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
    """Decides which tokens stop after a recursion step.

    `halt` compares halt_logits (B, T) with a threshold. `kl` compares the logits (B, T, V) of this step with those of
    the step `before`; at the first step, `before` is None and no token stops."""
    if rule.exit == "halt":
        return halt_logits.sigmoid() > (config.act_threshold if rule.act_threshold is None else rule.act_threshold)
    if before is None:
        return torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return kl_divergence(logits, before) < (KL_THRESHOLD if rule.kl_threshold is None else rule.kl_threshold)


class Leaving:
    """Keeps track of which tokens of a batch have stopped, and how many recursion steps each has run."""

    def __init__(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None, patience: int = 1):
        self.stopped: Bool[Tensor, "b t"] | None = None  # None until a token stops
        self.steps = torch.zeros_like(input_ids)
        self.patience = patience
        self.in_a_row = torch.zeros_like(input_ids)  # for how many steps in a row the rule has held, for each token
        # padding stops after the first step, so that it does not prolong the recursion
        self.padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0

    def keep(self, old: Tensor | None, new: Tensor | None) -> Tensor | None:
        """Returns `old` (B, T, D) for tokens that have stopped, and `new` for the others."""
        return new if self.stopped is None or new is None else torch.where(self.stopped[..., None], old, new)

    def count(self):
        """Adds one step to every token that has not stopped."""
        self.steps += 1 if self.stopped is None else ~self.stopped

    def stop(self, stops: Bool[Tensor, "b t"]) -> bool:
        """Stops each token for which the rule has held for `patience` steps in a row.

        stops: the tokens for which the rule holds after this step. Returns True if all tokens have stopped."""
        self.in_a_row = torch.where(stops, self.in_a_row + 1, 0)
        stops = self.padding | (self.in_a_row >= self.patience)
        stops = stops if self.stopped is None else self.stopped | stops
        if bool(stops.all()):
            return True
        if bool(stops.any()):
            self.stopped = stops
        return False


def max_depth(config, rule: ExitRule | None = None) -> int:
    """Returns the most recursion steps that a token may run: the limit of the rule, or as many as in training."""
    return config.recursion_steps if rule is None or rule.max_recursion_depth is None else rule.max_recursion_depth


def visits_per_recursion_step(config) -> int:
    """Returns how many times the network is applied in one recursion step."""
    return config.visits_per_step if config.recursion == "trm" else 1
