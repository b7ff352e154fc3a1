"""train_puzzles.py as a user runs it: settings, a run, and one line with exit code 2 for every mistake."""

import json

import pytest
from scripts import run_script

import train_puzzles
from src.errors import UserError

SMALL = "--d_model 16 --n_heads 2 --n_layers 1 --latent_steps 1 --deep_steps 1 --supervision_steps 2 --batch_size 8"
SMALL += " --max_steps 4 --n_puzzles 60 --symmetries relabel --compile false --precision fp32 --device cpu"
SMALL = SMALL.split()


def test_a_run_and_its_end(tmp_path, capsys):
    train_puzzles.main([*SMALL, "--save_dir", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert "sudoku4: trm" in err and "done: step 4, exact 0." in err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "puzzle: sudoku4" in config and "sample_prompt" not in config and "max_seq_len" not in config
    assert json.loads((tmp_path / "run" / "last" / "puzzle.json").read_text())["kind"] == "sudoku4"
    train_puzzles.main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume"])
    assert "after step 4" in capsys.readouterr().err


def test_as_a_script(tmp_path):
    code, out, err = run_script("train_puzzles.py", *SMALL, "--save_dir", tmp_path / "run")
    assert (code, out) == (0, "") and "done: step 4" in err
    code, _, err = run_script("generate.py", tmp_path / "run")
    assert code == 2 and len(err.splitlines()) == 1 and "is a puzzle model" in err


def test_help_lists_its_own_flags_only(capsys):
    with pytest.raises(SystemExit):
        train_puzzles.parse_args(["--help"])
    out = capsys.readouterr().out
    assert "--explore" in out and "--sample_prompt" not in out and "--vocab_size" not in out
    for flag in ("--train_paths", "--token_loss", "--save_dir", "--device"):
        assert flag in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--puzzle", "chess"], "puzzle kind 'chess' is not known"),
        (["--train_paths", "missing.csv"], "missing.csv"),
        (["--low", "2"], "clues 2 to 8 do not fit"),
        (["--explore", "2"], "explore is 2.0: set it from 0 to 1"),
        (["--batch_size", "9", "--grad_accum", "2"], "batch_size 9 does not divide"),
        (["--recursion", "none", "--eval_steps", "4"], "eval_steps is for recursion trm"),
        (["--vocab_size", "9"], "there is no setting --vocab_size"),
        (["--causal", "true"], "there is no setting --causal"),
        (["--resume"], "holds no run"),
        (["--init_from", "nowhere"], "no checkpoint folder at nowhere"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train_puzzles.main([*SMALL, *words])
    assert not list(tmp_path.rglob("*.yaml"))
