"""When a board stops: rules compared on answers that are known."""

import numpy as np
import pytest

from src.tasks.puzzle_curve import cheapest, curve, draw, oracle_stops, report, stops_of

#                     board: 0      1      2      3
IS_EXACT = np.array(
    [[True, False, False, False], [True, True, False, False], [True, False, False, False], [True, True, True, False]]
)
HALTS = np.array([[0.9, 0.2, 0.1, 0.0], [0.9, 0.6, 0.3, 0.1], [0.9, 0.4, 0.2, 0.6], [0.9, 0.9, 0.4, 0.2]])


def test_a_board_stops_at_the_first_step_over_the_threshold():
    assert stops_of(HALTS, 0.5).tolist() == [0, 1, 3, 2]
    assert stops_of(HALTS, 0.9).tolist() == [3, 3, 3, 3], "the threshold itself is not over it"


def test_the_oracle_stops_when_a_board_stays_right():
    assert oracle_stops(IS_EXACT).tolist() == [0, 3, 3, 0]
    assert oracle_stops(np.ones((3, 1), bool)).tolist() == [0]


def test_every_rule_has_its_steps_and_its_accuracy():
    points = curve(IS_EXACT, HALTS)
    fixed = [(p.setting, p.steps, p.exact) for p in points if p.rule == "fixed"]
    assert fixed == [(1, 1, 0.25), (2, 2, 0.5), (3, 3, 0.25), (4, 4, 0.75)]
    halt = next(p for p in points if (p.rule, p.setting) == ("halt", 0.5))
    assert (halt.steps, halt.exact) == (2.5, 0.75)  # board 1 stops while it is right, board 3 is wrong anyway
    oracle = next(p for p in points if p.rule == "oracle")
    assert (oracle.steps, oracle.exact) == (2.5, 0.75)
    assert {p.rule for p in curve(IS_EXACT, None)} == {"fixed", "oracle"}


def test_random_has_the_mean_of_halt_and_not_its_knowledge():
    rng = np.random.default_rng(0)
    need = rng.integers(0, 8, 500)  # a board is right from this step on, and the head knows it
    is_exact = np.arange(8)[:, None] >= need
    points = curve(is_exact, np.where(is_exact, 0.9, 0.1))
    halt, random = (next(p for p in points if (p.rule, p.setting) == (rule, 0.5)) for rule in ("halt", "random"))
    assert halt.exact == 1 and halt.steps == random.steps == pytest.approx(need.mean() + 1)
    assert random.exact == pytest.approx((need[:, None] <= need).mean(), abs=0.03)
    assert cheapest(points, "halt", 1.0).steps < cheapest(points, "fixed", 1.0).steps == 8
    assert cheapest(points, "random", 1.0) is None or cheapest(points, "random", 1.0).steps == 8


def test_the_report_and_the_picture(tmp_path):
    points = curve(IS_EXACT, HALTS)
    text = report(points, 4)
    assert "exact accuracy after all 4 steps: 0.7500" in text
    assert "halting head: 2.50 steps for 0.7500, 38% saved (0.3)" in text
    assert "| fixed | 4 | 4.00 | 0.7500 | 0% |" in text
    assert draw(points, 4, tmp_path / "curve.png", "title", "remark").stat().st_size > 10_000
