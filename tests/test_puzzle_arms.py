"""experiments/puzzles.py: the arms of the comparison, its table, and a whole comparison of tiny runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import arms, puzzles  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig  # noqa: E402

SIZE = {"vocab_size": 6, "max_seq_len": 16, "causal": False, "halting": False}
RECIPE = SIZE | {"n_layers": 2, "latent_steps": 2, "deep_steps": 1, "supervision_steps": 4, "d_model": 16, "n_heads": 2}


def config_of(arm):
    return TRMConfig(**RECIPE | arms.arm_flags(arm, TRMConfig(**RECIPE), 2))


def test_plain_arms_have_the_parameters_or_the_flops_of_the_recipe():
    trm, one = config_of("trm"), config_of("trm-1")
    assert one.supervision_steps == 1 and one.n_layers == trm.n_layers
    assert config_of("plain-params").n_layers == trm.n_layers and config_of("plain-params").recursion == "none"
    update, answer = config_of("plain-flops"), config_of("plain-deep")
    assert (update.n_layers, answer.n_layers, config_of("loop").deep_steps) == (6, 24, 6)
    assert flops_per_token(one).train == flops_per_token(update).train
    assert flops_per_token(trm).decode == flops_per_token(answer).decode


def test_equal_flops_give_each_arm_its_number_of_updates():
    config = puzzles.PuzzleArmsConfig(recipe="configs/sudoku4.yaml", equal_flops=2500, minutes=4, sweep_minutes=1)
    model = puzzles.model_of(puzzles.recipe_of(config))
    assert (model.max_seq_len, model.vocab_size, model.supervision_steps) == (16, 6, 8)

    def updates(arm, is_sweep=False):
        changed = arms.changed(model, arms.arm_flags(arm, model, config.loop_steps))
        job = arms.Job(arm, (("lr", 0.004),), 0, is_sweep)
        return arms.length(config, job, puzzles.update_flops(changed), puzzles.update_flops(model))["max_steps"]

    # an update of trm has two visits, that of the loop eight, that of plain-deep the layers of sixteen
    assert updates("trm") == updates("trm-1") == 2500 and updates("trm", is_sweep=True) == 625
    assert updates("plain-flops") == pytest.approx(2500, rel=0.01)
    assert updates("plain-params") == pytest.approx(5000, rel=0.02)
    assert updates("loop") == pytest.approx(625, rel=0.02) and updates("plain-deep") == pytest.approx(312, rel=0.02)


def test_the_table_has_every_seed():
    record = {"arm": "trm", "changes": {"lr": 0.004}, "cells": 1.0, "updates": 100, "seconds": 9.0, "is_sweep": False}
    records = [record | {"seed": seed, "exact": 0.5 + 0.1 * seed, "by_step": [0.25, 0.5]} for seed in (1, 0)]
    assert puzzles.table(records).splitlines()[2] == "| trm | 0.004 | 100 | 0.250 | 0.550 ± 0.071 | 0.500, 0.600 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "llama"], "choose from trm"),
        (["--jobs", "0"], "jobs is 0"),
        (["--minutes", "0"], "minutes is 0"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        puzzles.main([*words, "--output", str(tmp_path)])


def test_other_settings_need_another_folder(tmp_path):
    config = arms.ArmsConfig(output=str(tmp_path / "out"), arms=["trm"], lrs=[0.1], seeds=[0], minutes=1.0)
    done = []

    def do(job):
        done.append(job)
        return job.facts() | {"exact": 0.5, "updates": 1, "seconds": 1.0}

    arms.compare(config, {"d_model": 16, "seed": 0}, do, "exact")
    arms.compare(replace(config, seeds=[0, 1]), {"d_model": 16, "seed": 1}, do, "exact")
    assert [job.seed for job in done] == [0, 1]
    with pytest.raises(UserError, match="had d_model 16, not 32: choose another output"):
        arms.compare(config, {"d_model": 32}, do, "exact")
    with pytest.raises(UserError, match="had equal_flops None, not 9: choose another output"):
        arms.compare(replace(config, equal_flops=9), {"d_model": 16}, do, "exact")


@pytest.mark.slow
def test_a_comparison_continues_where_it_stopped(tmp_path, capsys):
    small = "d_model=16 n_heads=2 n_puzzles=60 batch_size=8 compile=false eval_every=100000".split()
    words = ["--recipe", "configs/sudoku4.yaml", "--minutes", "0.05", "--lrs", "0.004", "--arms", "trm", "plain-params"]
    words += ["--output", str(tmp_path), "--overrides", *small]
    puzzles.main([*words, "--seeds", "0"])
    puzzles.main([*words, "--seeds", "0", "1"])
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["arm"], r["seed"]) for r in records[:2]] == [("trm", 0), ("plain-params", 0)] and len(records) == 4
    assert len(records[0]["by_step"]) == 8 and len(records[1]["by_step"]) == 1
    assert "| plain-params | 0.004 |" in capsys.readouterr().out
