"""The recipe that train_trm_lm.py uses without --config, and defaults that depend on other settings."""

import re

import pytest

import train_trm_lm
from src.errors import UserError
from src.model import TRMConfig
from src.runtime import Choice
from src.training import parallel
from src.training.train_config import RuntimeConfig, TrainConfig


def train(*words):
    return train_trm_lm.parse_args(list(words)).train


def test_without_a_file_the_settings_are_those_of_the_default_recipe(capsys):
    assert train_trm_lm.parse_args([]) == train_trm_lm.parse_args(["--config", str(train_trm_lm.RECIPE)])
    assert (train().optimizer, train().lr) == ("muoneq", 0.012)
    with pytest.raises(SystemExit):
        train_trm_lm.parse_args(["--help"])
    assert re.search(r"default:\s+muoneq\)", capsys.readouterr().out)


def test_the_usual_learning_rate_is_that_of_the_optimizer():
    rates = {name: train("--optimizer", name).lr for name in ("adamw", "muon", "muoneq")}
    assert rates == {"adamw": 0.001, "muon": 0.012, "muoneq": 0.012}
    assert train("--optimizer", "adamw", "--lr", "0.2").lr == 0.2


def test_a_file_or_a_checkpoint_replaces_the_recipe(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("seed: 3\n")
    own = train("--config", str(file))
    assert (own.seed, own.optimizer, own.recursion_from) == (3, "adamw", 0)
    tuned = train("--init_from", str(train_trm_lm.RECIPE.parent.parent / "checkpoints" / "python"))
    assert (tuned.optimizer, tuned.recursion_from) == ("adamw", 0)  # a trained model need not begin plain


def test_help_shows_the_settings_of_the_checkpoint_to_start_from(capsys):
    with pytest.raises(SystemExit):
        train("--init_from", str(train_trm_lm.RECIPE.parent.parent / "checkpoints" / "python"), "-h")
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r" --recursion \{none,loop,trm\} .*?default: loop\) --", shown)


def test_no_checkpoint_to_start_from_is_the_recipe():
    assert train("--init_from", "null").optimizer == "muoneq"
    with pytest.raises(UserError, match="init_from is empty: give it a value, or leave it out"):
        train("--init_from", "")


@pytest.fixture
def said(tmp_path, capsys):
    """said(*words): what a tiny run with these flags prints on stderr."""

    def of(*more):
        (tmp_path / "a.txt").write_text("a text of some words\n" * 200)
        words = f"--train_paths {tmp_path}/a.txt --save_dir {tmp_path}/run --tokenizer byte --d_model 16 --n_heads 2"
        words += " --max_seq_len 16 --batch_size 2 --sample_tokens 0 --compile false --device cpu"
        assert train_trm_lm.main([*words.split(), *more]) == 0
        return capsys.readouterr().err

    return of


def test_a_run_that_ends_before_its_recursion_says_so(said):
    assert "the full recursion has not begun: it begins after 60% of the run" in said("--max_steps", "1")


def test_a_plain_run_has_no_recursion_to_wait_for(said):
    assert "recursion" not in said("--max_steps", "3", "--recursion", "none")


def test_sharding_names_the_optimizer_that_can_and_it_gets_its_own_rate():
    with pytest.raises(UserError, match="choose adamw"):
        train("--shard")
    assert train("--shard", "--optimizer", "adamw").lr == 0.001


@pytest.mark.parametrize(("wanted", "optimizer"), [("auto", "muoneq"), ("auto", "muon"), ("fp16", "muoneq")])
def test_a_gpu_without_bf16_trains_muon_in_fp32(monkeypatch, wanted, optimizer):
    """The usual optimizer has no loss scaling for fp16, which `auto` would choose; fp16 on request is refused."""
    monkeypatch.setattr(parallel, "choose_precision", lambda *_: Choice("fp16", "no bf16 hardware"))
    start = (TrainConfig(optimizer=optimizer), RuntimeConfig(device="cpu", precision=wanted), TRMConfig())
    if wanted == "fp16":
        with pytest.raises(UserError, match="muoneq has no loss scaling for fp16: choose --precision fp32, or adamw"):
            parallel.start_accelerator(*start)
    else:
        precision = parallel.start_accelerator(*start)[1]
        assert precision == ("fp32", f"optimizer {optimizer} has no loss scaling for fp16")
