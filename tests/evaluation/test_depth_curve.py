"""Tests of the depth curve: same tokens for every exit rule, its cheapest points, its picture."""

import math
import random

import pytest
import torch
from test_scoring import TEXTS, V
from texts import BYTE

from src.errors import UserError
from src.evaluation.depth_curve import CurvePoint, _Curve, cheapest_points, depth_curve, draw_depth_curve, full_point
from src.evaluation.scoring import score_corpus
from src.model import TRMConfig


def test_curve_has_every_rule_on_the_same_tokens(tiny):
    model = tiny(vocab_size=V, n_layers=1, latent_steps=1, supervision_steps=3)
    rules = {"act_thresholds": [0, 0.6], "kl_thresholds": [0], "prices": [0.0, 9.0]}
    points = depth_curve(model, BYTE, iter(TEXTS), max_recursion_depth=4, **rules)
    assert [(p.exit, p.setting) for p in points] == [
        *(("fixed", step) for step in (1, 2, 3, 4)),
        *(("halt", 0), ("halt", 0.6), ("kl", 0), ("oracle", 0.0), ("oracle", 9.0)),  # too few tokens to calibrate
    ]
    full, unit = full_point(points, 3), model.config.visits_per_step
    assert full.bits_per_byte == pytest.approx(score_corpus(model, BYTE, TEXTS).figures.bits_per_byte, rel=1e-6)
    assert [p.visits for p in points[:4]] == [unit, 2 * unit, 3 * unit, 4 * unit]
    assert points[4].bits_per_byte == pytest.approx(points[0].bits_per_byte, rel=1e-6)  # all halt after one step
    assert points[6].bits_per_byte == pytest.approx(points[3].bits_per_byte, rel=1e-6)  # no token stops early
    assert unit < points[5].visits < 4 * unit
    assert points[7].bits_per_byte < min(p.bits_per_byte for p in points[:4])  # each token takes its best step
    assert points[8].bits_per_byte == pytest.approx(points[0].bits_per_byte, rel=1e-6)  # a step costs too much
    assert [p.random for p in points[:4]] == pytest.approx([p.bits_per_byte for p in points[:4]])  # no choice is made


def test_cost_counts_every_answer_that_a_rule_looks_at(tiny):
    model = tiny(vocab_size=V, n_layers=1, latent_steps=1, supervision_steps=3, coda_layers=1)
    rules = {"act_thresholds": [1.0], "kl_thresholds": [0], "prices": [0.0]}
    points = depth_curve(model, BYTE, TEXTS, **rules)
    one, two, three, halt, kl, oracle = points
    head, step = 2 * model.config.d_model * V, two.flops - one.flops
    coda = halt.flops - three.flops - 2 * 2 * model.config.d_model  # with two more products of the halting head
    assert three.flops - two.flops == step and three.saved == 0 and one.saved == pytest.approx(2 * step / three.flops)
    assert (halt.depth, kl.depth) == (3, 3) and coda > 0
    assert kl.flops - halt.flops == pytest.approx(2 * head)  # three heads in place of one
    assert oracle.flops == pytest.approx(one.flops + (oracle.depth - 1) * step)
    assert kl.gain == pytest.approx(min(p.bits_per_byte for p in points[:3]) - kl.bits_per_byte, abs=1e-6)
    assert oracle.gain > 0 and one.gain == 0 and one.gain_error == 0


def test_a_mixture_of_fixed_depths_is_what_a_rule_must_beat():
    config = TRMConfig(vocab_size=V, d_model=16, n_heads=4, n_layers=1, recursion="loop", deep_steps=3)
    losses = torch.tensor([[4.0, 4.0, 4.0, 4.0], [5.0, 5.0, 5.0, 5.0], [0.0, 2.0, 0.0, 2.0]], dtype=torch.float64)
    curve = _Curve(config, losses, torch.tensor([0, 0, 1, 1]), bytes_per_token=1 / math.log(2))  # bits are nats
    even = curve.at("oracle", 0.0, torch.tensor([1, 3, 1, 3]))
    assert even.depth == 2 and even.bits_per_byte == pytest.approx(3)
    assert even.random == pytest.approx(2.5)  # half of the tokens after step 1, half after step 3
    assert even.gain == pytest.approx(-0.5)  # against that mixture; a depth of 2 for all is worse
    # gains of the tokens: (4 + 0) / 2 - 4, (4 + 2) / 2 - 2, and again: -2, 1, so both windows have -1
    assert even.gain_error == 0
    late = curve.at("oracle", 0.0, torch.tensor([3, 3, 3, 1]))
    assert late.bits_per_byte == pytest.approx(1.5) and late.random == pytest.approx(0.25 * 4 + 0.75 * 1)
    assert late.gain == pytest.approx(1.75 - 1.5)


def test_calibrated_exits_come_with_enough_text(tiny):
    model = tiny(vocab_size=V, recursion="loop", deep_steps=3, max_seq_len=64)
    text = "".join(random.Random(0).choices("abc \n", k=1100))
    points = depth_curve(model, BYTE, [text], kl_thresholds=[], prices=[0.0, 9.0])
    found = {(p.exit, p.setting): p for p in points}
    assert found["calibrated", 9.0].depth == found["oracle", 9.0].depth == 1
    assert 1 <= found["calibrated", 0.0].depth <= 3
    assert found["oracle", 0.0].bits_per_byte <= found["calibrated", 0.0].bits_per_byte


def test_calibrated_exits_need_text_in_both_halves(tiny):
    """A rule that is fitted on one token would choose depths at random for a thousand others."""
    model = tiny(vocab_size=V, recursion="loop", deep_steps=3, max_seq_len=1400)
    text = "".join(random.Random(0).choices("abc \n", k=1300))
    points = depth_curve(model, BYTE, [text, "a"], kl_thresholds=[], prices=[0.0])
    assert [p.exit for p in points] == ["fixed"] * 3 + ["oracle"]


def test_curve_of_other_families(tiny):
    loop = depth_curve(tiny(vocab_size=V, recursion="loop", deep_steps=2), BYTE, TEXTS[1:3], max_tokens=5)
    assert [(p.exit, p.setting, p.visits) for p in loop if p.exit == "fixed"] == [("fixed", 1, 1), ("fixed", 2, 2)]
    with pytest.raises(UserError, match="there is no depth curve"):
        depth_curve(tiny(vocab_size=V, recursion="none"), BYTE, TEXTS)


def point(exit, setting, visits, bits):
    return CurvePoint(exit, setting, visits / 3, visits, 1e6 * visits, 1 - visits / 12, bits, bits, bits, 0.0, 0.0)


POINTS = [
    *(point("fixed", 2, 6, 2.1), point("fixed", 3, 9, 2.03), point("fixed", 4, 12, 2.0)),
    *(point("halt", 0.5, 7, 2.019), point("halt", 0.4, 6, 2.03), point("halt", 0.9, 9, 2.001)),
    *(point("kl", 1.0, 8, 2.5), point("calibrated", 0.01, 9, 2.02), point("oracle", 0.01, 5, 1.9)),
]


def test_cheapest_within_one_percent():
    best = cheapest_points(POINTS, 4)
    assert {name: p.setting for name, p in best.items()} == {"fixed": 4, "halt": 0.5, "calibrated": 0.01}  # kl has none
    assert cheapest_points(POINTS, 4, within=0.06)["fixed"].setting == 2


def test_picture(tmp_path):
    path = draw_depth_curve(POINTS, 4, str(tmp_path / "curve.png"), "a model", "a remark")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
