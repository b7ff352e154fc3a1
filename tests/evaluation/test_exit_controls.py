"""Tests of the controls of exit rules: oracle, calibrated exits, exits by chance."""

import math

import pytest
import torch

from src.evaluation.exit_controls import (
    StoppingRule,
    calibrated_depths,
    exit_features,
    loss_at,
    oracle_depths,
    random_loss,
)

LOSSES = torch.tensor([[2.0, 1.0, 3.0], [1.0, 1.5, 3.0], [0.8, 0.2, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("price, depths", [(0.0, [3, 3, 1]), (0.3, [2, 3, 1]), (0.5, [2, 1, 1]), (2.0, [1, 1, 1])])
def test_oracle_weighs_loss_against_steps(price, depths):
    assert oracle_depths(LOSSES, price).tolist() == depths


def test_loss_of_chosen_depths_and_of_chance():
    depths = torch.tensor([2, 3, 1])
    assert loss_at(LOSSES, depths).tolist() == [1.0, 0.2, 3.0]
    assert random_loss(LOSSES, depths) == pytest.approx((6 + 5.5 + 4) / 9)  # each step for a third of the tokens
    assert random_loss(LOSSES, torch.tensor([1, 1, 1])) == pytest.approx(2.0)


def test_features():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]]])
    first = exit_features(logits[..., :2], None, torch.tensor([[0.5, -1.0]]))
    assert first.shape == (5, 1, 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = [[math.log(2), entropy], [-math.log(2), math.log(0.75)], [0.0, math.log(3)], [0.0, 0.0], [0.5, -1.0]]
    assert torch.allclose(first[:, 0], torch.tensor(expected))
    later = exit_features(logits[:, 1:, :2], logits[:, :1, :2], None)
    assert later.shape == (4, 1, 1)
    assert later[3].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))  # KL from the uniform one


def synthetic(n, seed):
    """Returns losses and features of tokens of which one half gains from step 2, which a feature tells at step 1."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(n, generator=generator) < 0.5
    losses = 1 + 0.1 * torch.randn(3, n, generator=generator)
    losses[1:] -= 0.5 * gains
    features = torch.randn(2, 3, n, generator=generator)
    features[1] += 8 * gains
    return losses, features, gains


def test_a_rule_stops_tokens_that_gain_nothing():
    losses, features, _ = synthetic(4000, 0)
    rule = StoppingRule(losses, features, price=0.1)
    _, features, gains = synthetic(1000, 1)
    expected = torch.where(gains, 2, 1)  # nobody gains from step 3
    assert (rule.depths(features) == expected).float().mean() > 0.94
    assert rule.depths(features[:, :, :0]).tolist() == []


def test_prices_decide():
    losses, features, _ = synthetic(2000, 2)
    assert set(StoppingRule(losses, features, price=1.0).depths(features).tolist()) == {1}
    assert StoppingRule(losses, features, price=-1.0).depths(features).tolist() == [3] * 2000


def test_a_useless_step_is_passed_for_a_useful_one():
    """Step 2 gains nothing, but step 3 gains more than two steps cost: the rule must look ahead."""
    losses, features, gains = synthetic(2000, 3)
    losses[1] += 0.5 * gains
    depths = StoppingRule(losses, features, price=0.1).depths(features)
    assert (depths[gains] == 3).float().mean() > 0.97 and (depths[~gains] == 1).float().mean() > 0.97


def test_no_part_gets_the_rule_that_was_fitted_on_it():
    losses, features, _ = synthetic(2000, 4)
    part = torch.arange(2000) % 4 < 2
    depths = calibrated_depths(losses, features, part, 0.1)
    fitted = StoppingRule(losses[:, part], features[..., part], 0.1)
    assert torch.equal(depths[~part], fitted.depths(features[..., ~part]))
    other = losses.clone()
    other[:, part] += 5 * torch.rand(3, int(part.sum()), generator=torch.Generator().manual_seed(0))
    changed = calibrated_depths(other, features, part, 0.1)
    assert torch.equal(changed[part], depths[part]) and not torch.equal(changed[~part], depths[~part])
