"""Tests of the losses against explicit sums; a model learns with them, and its halting head then says stop."""

import math

import pytest
import torch
from conftest import TINY

from src.losses import (
    IGNORE,
    bits_per_byte,
    cross_entropy,
    halting_loss,
    mean_over_targets,
    stablemax_cross_entropy,
)
from src.model import TRMModel
from src.model_config import TRMConfig, loss_weights, step_weights


def by_token(logits, targets, transform):
    """Mean of -log(f(x_target) / sum f(x)) over the positions that have a target, in Python floats."""
    terms = []
    for scores, target in zip(logits.reshape(-1, logits.shape[-1]).tolist(), targets.flatten().tolist()):
        if target != IGNORE:
            mass = [transform(v) for v in scores]
            terms.append(-math.log(mass[target] / sum(mass)))
    return sum(terms) / max(len(terms), 1)


def stablemax(v):
    return v + 1 if v >= 0 else 1 / (1 - v)


def stablemax_loss(logits, targets):
    return mean_over_targets(stablemax_cross_entropy(logits, targets), targets != IGNORE, "token")


LOSSES = pytest.mark.parametrize("loss, transform", [(cross_entropy, math.exp), (stablemax_loss, stablemax)])


@LOSSES
def test_mean_over_target_tokens(loss, transform):
    logits, targets = torch.randn(2, 5, 7) * 3, torch.randint(0, 7, (2, 5))
    targets[0, :3] = IGNORE
    assert loss(logits, targets).item() == pytest.approx(by_token(logits, targets, transform), rel=1e-5)
    flat = loss(logits.reshape(10, 7), targets.reshape(10))
    assert flat.item() == pytest.approx(loss(logits, targets).item(), rel=1e-6)


@LOSSES
def test_no_target_is_zero_with_zero_gradient(loss, transform):
    logits = torch.randn(2, 3, 7, requires_grad=True)
    value = loss(logits, torch.full((2, 3), IGNORE))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@LOSSES
def test_ignored_positions_get_no_gradient(loss, transform):
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss(logits, torch.tensor([[1, IGNORE, 2, IGNORE]])).backward()
    assert logits.grad[0, [0, 2]].abs().sum() > 0 and not logits.grad[0, [1, 3]].any()


@LOSSES
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_huge_logits_stay_finite(loss, transform, size):
    logits = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    value = loss(logits, torch.tensor([2]))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_stablemax_gradient():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True) * 4
    assert torch.autograd.gradcheck(lambda v: stablemax_cross_entropy(v, torch.tensor([0, 5, IGNORE])), logits)


def test_mean_of_rows():
    """A row counts as much as any other, however many targets it has; a row without any does not count."""
    losses, valid = torch.tensor([[1.0, 3.0], [5.0, 0.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    assert mean_over_targets(losses, valid, "row").item() == (2 + 5) / 2
    assert mean_over_targets(losses, valid, "token").item() == (1 + 3 + 5) / 3
    assert mean_over_targets(losses[2:], valid[2:], "row").item() == 0


def test_half_precision_logits_are_summed_in_float32():
    logits, targets = torch.randn(64, 500), torch.randint(0, 500, (64,))
    half = cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(cross_entropy(logits.bfloat16().float(), targets).item(), rel=1e-6)


def test_halting_loss():
    logits = torch.tensor([[2.0, -1.0, 0.3], [50.0, -80.0, 1.0]])
    right = torch.tensor([[True, True, False], [False, False, True]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    p = [1 / (1 + math.exp(-v)) for v in (2.0, -1.0, 0.3)]
    expected = (-math.log(p[0]) - math.log(p[1]) - math.log(1 - p[2]) + 50.0 + 0.0) / 5
    assert halting_loss(logits, right, valid).item() == pytest.approx(expected, rel=1e-6)
    assert halting_loss(logits, right, torch.zeros_like(valid)).item() == 0


def test_loss_weights_of_a_model():
    loop = {"recursion": "loop", "deep_steps": 3}
    assert loss_weights(TRMConfig(), 2) == [1, 1] and loss_weights(TRMConfig(**loop), 3) == [0, 0, 1]
    assert loss_weights(TRMConfig(**loop, supervision_weights="linear"), 3) == [1, 2, 3]
    # a visit without gradient has no loss; of two supervision steps each has its own
    assert loss_weights(TRMConfig(**loop, supervision_weights="equal", grad_deep_steps=2), 6) == [0, 1, 1, 0, 1, 1]
    assert loss_weights(TRMConfig(supervision_weights="0,1", supervision_steps=1), 1) == [1]


def test_step_weights():
    assert step_weights("equal", 3) == [1, 1, 1]
    assert step_weights("linear", 3) == [1, 2, 3]
    assert step_weights("last", 3) == [0, 0, 1] and step_weights("last", 1) == [1]
    assert step_weights("0.3,1.0", 4) == [0.3, 1, 1, 1]  # the last number is repeated
    assert step_weights("0.3,0.5,1.0", 2) == [0.3, 0.5]
    with pytest.raises(ValueError):
        step_weights("rising", 2)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)  # uniform bytes
    assert bits_per_byte(math.log(2), 4.0) == pytest.approx(0.25)  # one bit for a token of four bytes


def memorise(norm, noise=0, steps=140):
    """Train on 20 sequences of 12 tokens; the last `noise` targets of each are drawn anew every time.
    Returns the model, ids, targets."""
    torch.manual_seed(0)
    sizes = {"d_model": 96, "d_ff": 192, "n_layers": 1, "latent_steps": 1}
    model = TRMModel(TRMConfig(**TINY | sizes, norm=norm))
    sequences = torch.randint(0, TINY["vocab_size"], (20, 13))
    sequences[:, 0] = torch.arange(20)  # the first token tells the sequences apart
    ids, targets = sequences[:, :-1], sequences[:, 1:].clone()
    assert not (torch.sigmoid(model(ids).halt_logits) > 0.5).any()  # halting starts at no
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        targets[:, 12 - noise :] = torch.randint(0, TINY["vocab_size"], (20, noise))
        optimizer.zero_grad()
        model(ids, targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), ids, targets


@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_twenty_sequences_are_memorised_and_the_halting_head_fires(unchecked, norm):
    model, ids, targets = memorise(norm)
    out = model(ids, targets)
    assert out.ce_loss < 0.05 and out.loss < 0.05
    halts = torch.sigmoid(out.halt_logits) > model.config.act_threshold
    assert halts.float().mean() > 0.95


def test_halting_tells_known_from_unknowable(unchecked):
    model, ids, targets = memorise("pre", noise=4)
    targets[:, 8:] = IGNORE
    out = model(ids, targets)
    assert out.ce_loss < 0.2
    probability = torch.sigmoid(out.halt_logits)
    assert probability[:, :8].mean() > 0.9
    assert probability[:, 8:].mean() < 0.2
