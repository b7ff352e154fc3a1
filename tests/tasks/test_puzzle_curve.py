"""When a board stops: rules compared on answers that are known, as points, tables and a picture."""

import numpy as np
import pytest

from src.errors import UserError
from src.tasks.curve_report import cheapest, draw, merged, read_curve, report, write_curve
from src.tasks.puzzle_curve import Curve, Point, bins_of, oracle_stops, points_of, stops_of

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
    points = points_of(IS_EXACT, HALTS)
    fixed = [(p.setting, p.steps, p.exact) for p in points if p.rule == "fixed"]
    assert fixed == [(1, 1, 0.25), (2, 2, 0.5), (3, 3, 0.25), (4, 4, 0.75)]
    halt = next(p for p in points if (p.rule, p.setting) == ("halt", 0.5))
    assert (halt.steps, halt.exact) == (2.5, 0.75)  # board 1 stops while it is right, board 3 is wrong anyway
    oracle = next(p for p in points if p.rule == "oracle")
    assert (oracle.steps, oracle.exact) == (2.5, 0.75)
    assert {p.rule for p in points_of(IS_EXACT, None)} == {"fixed", "oracle"}


def test_random_has_the_mean_of_halt_and_not_its_knowledge():
    rng = np.random.default_rng(0)
    need = rng.integers(0, 8, 500)  # a board is right from this step on, and the head knows it
    is_exact = np.arange(8)[:, None] >= need
    points = points_of(is_exact, np.where(is_exact, 0.9, 0.1))
    halt, random = (next(p for p in points if (p.rule, p.setting) == (rule, 0.5)) for rule in ("halt", "random"))
    assert halt.exact == 1 and halt.steps == random.steps == pytest.approx(need.mean() + 1)
    assert random.exact == pytest.approx((need[:, None] <= need).mean(), abs=0.03)
    assert cheapest(points, "halt", 1.0).steps < cheapest(points, "fixed", 1.0).steps == 8
    assert cheapest(points, "random", 1.0) is None or cheapest(points, "random", 1.0).steps == 8


def make_curve(shift=0.0):
    """A curve with one more rule; `shift` moves its accuracies."""
    points = [point._replace(exact=point.exact + shift) for point in points_of(IS_EXACT, HALTS)]
    bins = bins_of(IS_EXACT, HALTS, {"clues": np.array([4, 4, 5, 5])}, 4, 0.5)
    return Curve("runs/a", "sudoku4", 4, 4, 0.5, [*points, Point("starts+halt", 2.0, 7.5, 1.0 + shift)], bins)


def test_bins_have_the_main_rules():
    bins = bins_of(IS_EXACT, HALTS, {"clues": np.array([4, 4, 5, 5])}, 4, 0.5)
    assert bins[0] == ("all", 4, 0.75, 0.75, 2.5, 0.25, 2.5)  # fixed: 3 steps
    assert bins[1] == ("clues_4", 2, 1.0, 1.0, 1.5, 0.5, 2.5)
    assert bins[2] == ("clues_5", 2, 0.5, 0.5, 3.5, 0.0, 2.5)


def test_the_report_and_the_picture(tmp_path):
    curve = make_curve()
    text = report([curve])
    assert "exact accuracy after all 4 steps: 0.7500" in text
    assert "halting head: 2.50 steps for 0.7500, 38% saved (0.3)" in text
    assert "| fixed | 4 | 4.00 | 0.7500 | 0% |\n" in text
    assert "| starts+halt | 2 | 7.50 | 1.0000 |  |" in text
    assert "noisy starts, halting: 7.50 steps for 1.0000 (2)" in text
    assert "| clues 5 | 2 | 0.5000 | 0.5000 | 3.50 | 0.0000 | 2.50 |" in text
    assert draw(curve, tmp_path / "curve.png", "title", "remark").stat().st_size > 10_000


def test_curves_of_several_models_are_kept_and_merged(tmp_path):
    curves = [make_curve(), make_curve(0.125)]
    for number, curve in enumerate(curves):
        write_curve(curve, tmp_path / f"{number}.json")
    assert [read_curve(tmp_path / f"{number}.json") for number in range(2)] == curves
    both = merged(curves)
    assert both.full == ("fixed", 4, 4, 0.8125) and both.bins == curves[0].bins
    text = report(curves)
    assert "| fixed | 4 | 4.00 | 0.8125 | 0% | 0.7500, 0.8750 |" in text
    assert "oracle: 2.50 steps for 0.7500, 38% saved (4); 2.50 steps for 0.8750, 38% saved (4)" in text
    lacking = curves[1]._replace(points=curves[1].points[:-1])
    assert len(merged([curves[0], lacking]).points) == len(lacking.points)
    for text in ("[]", "{}", '{"points": [[1]], "bins": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json"):
            read_curve(tmp_path / "bad.json")
