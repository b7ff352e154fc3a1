"""experiments/puzzle_hours.py: hours and memory against sums by hand."""

import json
from pathlib import Path

import pytest

from experiments.puzzle_hours import config_of, main, make_plan, parse_args, plan_time
from src.errors import UserError
from src.metrics import flops_per_token
from src.model import TRMConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--puzzle sudoku4 --d_model 16 --n_heads 2 --d_ff 32 --n_layers 1 --latent_steps 2 --deep_steps 3 "
SMALL += "--supervision_steps 5 --positions rope --prefix_tokens 2 --puzzle_ids 7 --batch_size 24 --max_steps 1000"


def test_figures_by_hand():
    """20 positions pass 9 visits, the last 3 with gradient, then the head on 16 cells."""
    words = f"{SMALL} --devices 3 --grad_accum 2 --peak_tflops 2 --utilisation 0.5 --precision fp32"
    facts = make_plan(*parse_args(words.split()))
    block, positions = 4 * 16 * 16 + 3 * 16 * 32, 16 + 2
    visits = positions * (block + 2 * positions * 16) * (6 * 3 + 2 * 6)  # forward 2 per product, backward 4
    flops = 24 * (visits + 6 * (16 * 16 * 6 + 16))
    assert facts["step_flops"] == pytest.approx(flops, rel=1e-6)
    assert facts["hours"] == pytest.approx(1000 * flops / (3 * 2e12 * 0.5) / 3600, rel=1e-6)
    parameters = block + 2 * 6 * 16 + 17 + 7 * 16
    assert (facts["parameters"], facts["puzzle_embedding_parameters"]) == (parameters, 7 * 16)
    memory = facts["memory"]
    assert memory["weights, gradients, average"] == 12 * parameters
    assert memory["AdamW's moments"] == 8 * (parameters - 7 * 16)
    assert memory["states y and z of the rows"] == 2 * 4 * 8 * positions * 16
    assert memory["sum"] == sum(size for name, size in memory.items() if name != "sum")
    whole = make_plan(*parse_args(words.replace("--grad_accum 2", "--grad_accum 1").split()))["memory"]
    assert whole["activations"] == pytest.approx(2 * memory["activations"], rel=0.1)


def test_a_step_is_one_supervision_step():
    config = TRMConfig(**{"vocab_size": 6, "max_seq_len": 16, "causal": False, "d_model": 64, "n_heads": 4})
    one, five = (flops_per_token(TRMConfig(**config.to_dict() | {"supervision_steps": n})).train / n for n in (1, 5))
    assert one == pytest.approx(five)
    facts = [make_plan(*parse_args([*SMALL.split(), "--supervision_steps", str(n)])) for n in (1, 9)]
    assert facts[0]["step_flops"] == pytest.approx(facts[1]["step_flops"], rel=1e-6)


def stated(name):
    """(words of the command, hours) in the header of a recipe."""
    header = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    (words,) = [line.split("puzzle_hours.py ")[1] for line in header if "puzzle_hours.py" in line]
    (hours,) = [float(line.split()[2]) for line in header if line.startswith("#   hours")]
    return [str(ROOT / word) if word.startswith("configs/") else word for word in words.split()], hours


@pytest.mark.parametrize("name", ["sudoku_extreme", "maze_hard", "arc"])
def test_recipes_state_the_hours_that_are_printed(name):
    words, hours = stated(name)
    plan, settings = parse_args(words)
    assert plan_time(plan, settings, config_of(settings))["hours"] == pytest.approx(hours, rel=0.02)


def test_tables_and_json(capsys):
    main(SMALL.split())
    out = capsys.readouterr().out.splitlines()
    facts = json.loads(out[-1])
    assert facts["experiment"] == "puzzle_hours" and facts["steps"] == 1000
    assert sum(line.startswith(("run", "memory per device")) for line in out) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gib"), [("sudoku_extreme", 44), ("maze_hard", 74), ("arc", 74)])
def test_recipes_fit_into_their_hardware(name, gib):
    assert make_plan(*parse_args(stated(name)[0]))["memory"]["sum"] < gib * 2**30


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--devices 7", "batch_size 24 does not divide into grad_accum x devices = 7 parts"),
        ("--utilisation 0", "utilisation is 0.0: set it above 0"),
        ("--puzzle chess", "puzzle kind 'chess' is not known"),
    ],
)
def test_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse_args([*SMALL.split(), *words.split()])
