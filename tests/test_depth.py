"""experiments/depth.py at tiny sizes: it runs, draws and sweeps; its exit rules and FLOPs by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import depth, depth_rules  # noqa: E402
from src.config import run  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.losses import IGNORE  # noqa: E402


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_depth(tmp_path, capsys):
    assert (
        depth.main(["--quick", "--family", *depth.FAMILIES, "--processes", "1", "--output", str(tmp_path / "out")]) == 0
    )
    facts = last_json(capsys)
    runs = {(r["family"], r["model"]): r for r in facts["runs"]}
    assert list(runs) == [(family, model) for family in depth.FAMILIES for model in depth.MODELS]
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 3 * len(depth.FAMILIES)
    assert (tmp_path / "out" / "depth.png").read_bytes().startswith(b"\x89PNG")
    for family in depth.FAMILIES:
        loop, plain, deep = (runs[family, model] for model in depth.MODELS)
        assert abs(loop["parameters"] - plain["parameters"]) <= 17 < deep["parameters"] - plain["parameters"]  # q_head
        assert [test["difficulty"] for test in loop["tests"]] == [1, 2, 4, "mixed"]
        for test in loop["tests"]:
            rules, first = test["rules"], loop["recipe"]["main_rule"]
            assert len(test["by_visit"]) == 6 and rules["full"] == {"exact": test["exact"], "visits": 6.0}
            assert 0 <= rules["fixed"]["visits"] - rules[first]["visits"] < 1
            if family != "regions":  # rows of regions have different numbers of answers
                assert rules["random"]["visits"] == pytest.approx(rules[first]["visits"])
            assert rules["oracle"]["exact"] >= test["exact"]


def test_depth_draws_earlier_runs_and_sweeps(tmp_path, capsys):
    flags = ["--quick", "--family", "words", "--processes", "1", "--output", str(tmp_path)]
    assert depth.main([*flags, "--models", "loop", "--seeds", "7"]) == 0
    first = last_json(capsys)["runs"]
    assert depth.main([*flags, "--models", "loop", "plain_1", "--seeds", "7", "--sweep", "1e-3", "2e-3"]) == 0
    assert [(r["model"], r["lr"]) for r in last_json(capsys)["runs"]] == [
        ("loop", 1e-3),
        ("loop", 2e-3),
        ("plain_1", 1e-3),
        ("plain_1", 2e-3),
    ]
    (tmp_path / "depth.png").unlink()
    assert depth.main([*flags, "--seeds", "7", "--draw"]) == 0
    again = last_json(capsys)["runs"]
    assert [r["tests"] for r in again] == [r["tests"] for r in first] and (tmp_path / "depth.png").exists()
    with pytest.raises(UserError, match="no loop of carries"):
        depth.main(["--family", "carries", "--draw", "--output", str(tmp_path)])


def test_only_runs_with_the_same_recipe_are_drawn_together(tmp_path):
    config = depth.DepthConfig(family=["words"], seeds=[7, 8], output=str(tmp_path))

    def drawn(*changes):
        """The rates of runs that differ in these fields from the first one."""
        run = {"family": "words", "model": "loop", "seed": 7, "lr": 1e-3, "settings": {"sweep": []}}
        run |= {"recipe": {"tail": 0.25, "lr_plain_1": 8e-3}}
        lines = [json.dumps(run | change) for change in ({}, *changes)]
        (tmp_path / "runs.jsonl").write_text("\n".join(lines))
        return [record["lr"] for record in depth.read_runs(config)]

    plain = {"model": "plain_1", "lr": 5e-3, "recipe": {"tail": 0.25, "lr_plain_1": 5e-3}}
    assert drawn({"seed": 8}, plain) == [1e-3, 1e-3, 5e-3], "each model may have its own rate"
    with pytest.raises(UserError, match="the runs of words differ in tail: choose"):
        drawn(plain | {"recipe": {"tail": 0.5, "lr_plain_1": 5e-3}})
    with pytest.raises(UserError, match="the runs of words differ in the learning rate of loop: choose"):
        drawn({"seed": 8, "lr": 2e-3})
    assert drawn({"lr": 2e-3}) == [2e-3], "of runs with the same seed, the last counts"


def test_plain_models_get_the_flops_of_the_loop():
    recipe = depth.Recipe(tail=0.2)
    spent = {}
    for name in depth.MODELS:
        config = depth.model_config("carries", recipe, name)
        if name == "loop":
            rng = np.random.default_rng(0)
            visits = [depth.draw_visits(recipe, rng) for _ in range(4000)]
            assert set(visits) == set(range(1, 17)) and 0.17 < np.mean(np.array(visits) > 8) < 0.23
            per_step = np.mean([depth.training_flops(config, number) for number in visits])
        else:
            per_step = depth.training_flops(config)
        spent[name] = depth.steps_of("carries", recipe, name) * per_step
    assert all(flops == pytest.approx(spent["loop"], rel=0.03) for flops in spent.values())


def test_rules_read_answers_at_the_depths_they_name():
    """Two rows of two answers; the last answer of each is right from visit 3 and from visit 2 on, with a lapse."""
    has_answer = np.array([[False, True, True]] * 2)
    is_right = np.ones((4, 2, 3), dtype=bool)
    is_right[:2, 0, 2] = is_right[0, 1, 2] = False
    is_right[0, 0, 1], is_right[1, 0, 1] = True, False  # right, wrong, then right to the end
    halt = np.ones((2, 3), dtype=bool), np.array([[1, 3, 3], [1, 1, 2]])
    figures = depth_rules.Run(has_answer, is_right, {"halt": halt}).figures("halt")
    assert figures["by_visit"] == [0, 0.5, 1, 1] and figures["enough_visits"] == 3
    rules = figures["rules"]
    assert rules["oracle"] == {"exact": 1.0, "visits": (3 + 3 + 1 + 2) / 4}
    assert rules["halt"] == {"exact": 1.0, "visits": 2.25} and rules["fixed"] == {"exact": 1.0, "visits": 3.0}
    joined = depth_rules.Run.join([depth_rules.Run(has_answer, is_right, {"halt": halt})] * 3).figures("halt")
    assert joined["by_visit"] == figures["by_visit"] and joined["rules"]["halt"] == rules["halt"]


def test_rows_stop_when_no_token_changes():
    """Two rows of two tokens over four visits: the first settles at visit 2, the other one changes until visit 3."""
    answers = torch.tensor([[[0, 1], [0, 0]], [[1, 1], [0, 1]], [[1, 1], [1, 1]], [[1, 1], [1, 1]]])
    logits = 5.0 * torch.nn.functional.one_hot(answers, 2)
    targets = np.array([[1, 1], [1, IGNORE]])
    right, depths = depth_rules.stop_rows(logits, targets, patience=1)["kl 0.001"]
    assert depths.tolist() == [[3, 3], [4, 4]] and right.all()
    impatient = depth_rules.stop_rows(torch.cat((logits[:1], logits)), targets, patience=1)["kl 0.001"]
    assert impatient[1].tolist() == [[2, 2]] * 2 and impatient[0].tolist() == [[False, True], [False, True]]
    patient = depth_rules.stop_rows(logits, targets, patience=2)["kl 0.001"]
    assert patient[1].tolist() == [[4, 4]] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--d_model", "50"], "carries: d_model 50"),
        (["--patience", "0"], "max_visits is 40, patience 0: set both from 1 to 1000"),
        (["--max_visits", "2000"], "max_visits is 2000"),
        (["--lr", "-1"], "lr is -1.0: set it above 0"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_training(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        run(lambda: depth.main(["--family", "carries", "--output", str(tmp_path), *words]))
    assert caught.value.code == 2 and said in capsys.readouterr().err
