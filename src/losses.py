"""Losses. All are means over target tokens, in nats. A target of -100 (IGNORE) is left out."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cross_entropy(logits: Float[Tensor, "*n v"], targets: Int[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Returns the mean negative log-likelihood per target token, in nats; 0 if there is no target."""
    loss = F.cross_entropy(_wide(logits).flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / (targets != IGNORE).sum().clamp(min=1)


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (mean cross-entropy, for each position whether the argmax is the target).

    Both are computed together, so that the compiler reads the logits once: with a large vocabulary, one pass over them
    takes as long as a visit."""
    with torch.no_grad():
        is_right = logits.argmax(-1) == targets
    return cross_entropy(logits, targets), is_right


def stablemax_cross_entropy(logits: Float[Tensor, "*n v"], targets: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-log p(target), where p = s(x) / sum(s(x)) and s(x) = x + 1 if x >= 0, else 1 / (1 - x).  arXiv:2501.04697.

    Returns nats, in float64 because p can be tiny; 0 at positions without a target."""
    x = logits.double()
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    picked = s.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (s.sum(-1).log() - picked.log()) * (targets != IGNORE)


def token_loss_of(config) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the function that TRMModel uses as its `token_loss`.

    It computes softmax or stablemax, averaged over all target tokens at once or over each row first."""
    if (config.token_loss, config.loss_mean) == ("softmax", "token"):
        return token_loss

    def loss(logits, targets):
        with torch.no_grad():
            is_right = logits.argmax(-1) == targets
        if config.token_loss == "stablemax":
            losses = stablemax_cross_entropy(logits, targets)
        else:
            losses = F.cross_entropy(_wide(logits).mT, targets, ignore_index=IGNORE, reduction="none")
        return mean_over_targets(losses, targets != IGNORE, config.loss_mean), is_right

    return loss


def mean_over_targets(losses: Float[Tensor, "*b t"], valid: Bool[Tensor, "*b t"], mean: str) -> Float[Tensor, ""]:
    """Returns the mean over all valid positions (mean `token`), or the mean over rows of each row's own mean (`row`).

    losses: 0 at positions that are not valid. A row without a valid position does not count. Without any, returns 0."""
    if mean == "token":
        return losses.sum() / valid.sum().clamp(min=1)
    per_row = losses.sum(-1) / valid.sum(-1).clamp(min=1)
    return per_row.sum() / valid.any(-1).sum().clamp(min=1)


def count_terms(targets: Int[Tensor, "b t"], mean: str) -> int:
    """Returns the number of terms that `mean_over_targets` averages: target tokens, or rows with a target."""
    valid = targets != IGNORE
    return (valid.any(-1) if mean == "row" else valid).sum().item()


def halting_loss(
    halt_logits: Float[Tensor, "*n"], should_halt: Bool[Tensor, "*n"], valid: Bool[Tensor, "b t"], mean: str = "token"
) -> Float[Tensor, ""]:
    """Returns the mean binary cross-entropy of the halting head, in nats, averaged as `mean_over_targets` averages.

    So the losses of the parts of a batch can be added like those of the tokens. halt_logits: (B, T) if each token
    halts, (B,) if each row halts as a whole. valid: whether a position has a target."""
    logits = _wide(halt_logits)
    loss = F.binary_cross_entropy_with_logits(logits, should_halt.to(logits.dtype), reduction="none")
    weights, of_row = valid.to(loss.dtype), valid.sum(-1)
    if loss.ndim == 1:
        weights = of_row if mean == "token" else of_row > 0
    elif mean == "row":
        weights = weights / of_row[:, None].clamp(min=1)
    return (loss * weights).sum() / weights.sum().clamp(min=1)


def kl_divergence(logits: Float[Tensor, "*n v"], before: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """Returns KL(softmax(logits) || softmax(before)) over the last dimension, in nats."""
    log_p, log_q = _wide(logits).log_softmax(-1), _wide(before).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Returns the cross-entropy in bits per UTF-8 byte, which compares models with different tokenizers.

    Returns NaN if bytes_per_token is NaN, because the tokenizer does not reproduce the text."""
    return nats_per_token / math.log(2) / bytes_per_token


def bits_text(bits: float) -> str:
    """Formats bits per byte as `, 1.2345 bits/byte`, to follow a loss per token.  Empty for NaN."""
    return "" if math.isnan(bits) else f", {bits:.4f} bits/byte"
