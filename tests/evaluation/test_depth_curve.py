"""Tests of the depth curve: same tokens for every exit rule, its cheapest points, its picture."""

import pytest
from test_scoring import TEXTS, V
from texts import BYTE

from src.errors import UserError
from src.evaluation.depth_curve import CurvePoint, cheapest_points, depth_curve, draw_depth_curve, full_point
from src.evaluation.scoring import score_corpus


def test_curve_has_every_rule_on_the_same_tokens(tiny):
    model = tiny(vocab_size=V, n_layers=1, latent_steps=1, supervision_steps=3)
    points = depth_curve(model, BYTE, iter(TEXTS), max_recursion_depth=4, act_thresholds=[0, 0.6], kl_thresholds=[0])
    assert [(p.exit, p.setting) for p in points] == [
        *(("fixed", step) for step in (1, 2, 3, 4)),
        *(("halt", 0), ("halt", 0.6), ("kl", 0)),
    ]
    full, unit = full_point(points, 3), model.config.visits_per_step
    assert full.bits_per_byte == pytest.approx(score_corpus(model, BYTE, TEXTS).figures.bits_per_byte, rel=1e-6)
    assert [p.visits for p in points[:4]] == [unit, 2 * unit, 3 * unit, 4 * unit]
    assert [p.saved for p in points[:4]] == pytest.approx([2 / 3, 1 / 3, 0, -1 / 3])
    assert points[4].bits_per_byte == pytest.approx(points[0].bits_per_byte, rel=1e-6)  # all halt after one step
    assert points[6].bits_per_byte == pytest.approx(points[3].bits_per_byte, rel=1e-6)  # no token stops early
    assert unit < points[5].visits < 4 * unit


def test_curve_of_other_families(tiny):
    loop = depth_curve(tiny(vocab_size=V, recursion="loop", deep_steps=2), BYTE, TEXTS[1:3], max_tokens=5)
    assert [(p.exit, p.setting, p.visits, p.saved) for p in loop] == [("fixed", 1, 1, 0.5), ("fixed", 2, 2, 0)]
    with pytest.raises(UserError, match="there is no depth curve"):
        depth_curve(tiny(vocab_size=V, recursion="none"), BYTE, TEXTS)


def point(exit, setting, visits, bits):
    return CurvePoint(exit, setting, visits / 3, visits, 1 - visits / 12, bits, bits)


POINTS = [
    *(point("fixed", 2, 6, 2.1), point("fixed", 3, 9, 2.03), point("fixed", 4, 12, 2.0)),
    *(point("halt", 0.5, 7, 2.019), point("halt", 0.4, 6, 2.03), point("halt", 0.9, 9, 2.001)),
    point("kl", 1.0, 8, 2.5),
]


def test_cheapest_within_one_percent():
    best = cheapest_points(POINTS, 4)
    assert {name: p.setting for name, p in best.items()} == {"fixed": 4, "halt": 0.5}  # kl has none
    assert cheapest_points(POINTS, 4, within=0.06)["fixed"].setting == 2


def test_picture(tmp_path):
    path = draw_depth_curve(POINTS, 4, str(tmp_path / "curve.png"), "a model", "a remark")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
