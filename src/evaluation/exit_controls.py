"""Controls for exit rules: what a choice of each token's depth can gain at best, and what it gains by chance.

All of them are computed from one pass in which every token runs every recursion step. A token that stops early changes
what later tokens attend to; the controls leave this out, while the rules `halt` and `kl` include it.

    oracle      knows the loss of each token after every step, and takes the step with the least loss + price * steps
    calibrated  a rule fitted on other text, which decides from what the model shows after a step: `StoppingRule`
    random      stops as many tokens after each step as a rule does, but chooses them by chance: `random_loss`
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from src.losses import kl_divergence

RIDGE = 1e-3  # of the regressions, per token


def exit_features(
    logits: Float[Tensor, "b t v"], before: Float[Tensor, "b t v"] | None, halt_logits: Float[Tensor, "b t"] | None
) -> Float[Tensor, "f b t"]:
    """Returns what a calibrated rule knows of each token after a recursion step.

    These are the entropy, the largest log-probability, its lead over the second, the KL divergence from the step
    before (0 after the first), and the halting logit if there is one.

    Args:
        before: the logits of the recursion step before; None after the first step
    """
    logp = logits.float().log_softmax(-1)
    first, second = logp.topk(2, dim=-1).values.unbind(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    change = torch.zeros_like(entropy) if before is None else kl_divergence(logits, before).float()
    seen = [entropy, first, first - second, change]
    return torch.stack(seen if halt_logits is None else [*seen, halt_logits.float()])


def oracle_depths(losses: Float[Tensor, "s n"], price: float) -> Int[Tensor, "n"]:
    """Returns for each token the depth (1 to S) with the least loss + price * depth, in nats."""
    steps = torch.arange(len(losses), dtype=losses.dtype)
    return (losses + price * steps[:, None]).argmin(0) + 1


class StoppingRule:
    """Decides after each recursion step whether a token goes on: regression for optimal stopping.

    The last step ends every token. For each earlier step, from the last to the first, a ridge regression predicts from
    the features how much more stopping here would cost than going on: the loss now, minus the price of the further
    steps and the loss that the rules of these steps end with. A token stops where this is not above 0. The method is
    that of Longstaff and Schwartz for options (Review of Financial Studies 14, 2001).

    Args:
        losses: (S, N), nats after each step, of the text on which the rule is fitted
        features: (F, S, N), of `exit_features`
        price: of a recursion step, nats
    """

    def __init__(self, losses: Float[Tensor, "s n"], features: Float[Tensor, "f s n"], price: float):
        self.steps = []  # (mean, scale, weights) of each step but the last
        ahead = losses[-1].double()
        for loss, x in reversed(list(zip(losses[:-1].double(), features.unbind(1)))):
            mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-6)
            terms = _terms(x, mean, scale)
            penalty = RIDGE * terms.shape[1] * torch.eye(len(terms), dtype=terms.dtype)
            gain = loss - price - ahead
            weights = torch.linalg.solve(terms @ terms.T + penalty, terms @ gain)
            ahead = torch.where(weights @ terms > 0, ahead + price, loss)
            self.steps.insert(0, (mean, scale, weights))

    def depths(self, features: Float[Tensor, "f s n"]) -> Int[Tensor, "n"]:
        """Returns the depth (1 to S) of each token."""
        rules = zip(features.unbind(1), self.steps)
        goes_on = [weights @ _terms(x, mean, scale) > 0 for x, (mean, scale, weights) in rules]
        return torch.stack([torch.ones_like(goes_on[0]), *goes_on]).long().cumprod(0).sum(0)


def _terms(x, mean, scale):
    """Returns the terms of a regression, in float64: a constant, the features, and all products of two features."""
    x = ((x - mean) / scale).double()
    i, j = torch.triu_indices(len(x), len(x))
    return torch.cat((torch.ones_like(x[:1]), x, x[i] * x[j]))


def calibrated_depths(
    losses: Float[Tensor, "s n"], features: Float[Tensor, "f s n"], part: Bool[Tensor, "n"], price: float
) -> Int[Tensor, "n"]:
    """Returns the depth that a calibrated rule chooses for each token.

    The tokens of each of the two parts get the rule that is fitted on the other part."""
    depths = torch.empty(part.shape, dtype=torch.long)
    for own in (part, ~part):
        if own.any():
            depths[own] = StoppingRule(losses[:, ~own], features[..., ~own], price).depths(features[..., own])
    return depths


def loss_at(losses: Float[Tensor, "s n"], depths: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Returns the loss of each token after its own number of steps (1 to S)."""
    return losses.gather(0, depths[None] - 1)[0]


def random_loss(losses: Float[Tensor, "s n"], depths: Int[Tensor, "n"]) -> float:
    """Returns the expected mean loss if the same depths went to tokens that are chosen by chance."""
    share = torch.bincount(depths - 1, minlength=len(losses)).double() / len(depths)
    return (share * losses.double().mean(1)).sum().item()
