"""checkTorch.py and count_params.py: their output, and their errors for wrong flags."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkTorch
import count_params
from src.config import run
from src.errors import UserError
from src.metrics import flops_per_token
from src.model import TRMConfig, TRMModel
from src.runtime import Choice

ROOT = Path(__file__).resolve().parent.parent


def run_script(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_check_torch_prints_the_choices_and_every_product():
    done = run_script("checkTorch.py", "--device", "cpu", "--seconds", "0.2")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and "training would choose" in done.stdout
    rates = [line for line in done.stdout.splitlines() if "GFLOP/s" in line]
    assert [line.split()[0] for line in rates] == ["fp32", "bf16", "fp16"]
    assert all(line.endswith(": correct") for line in rates)


def test_check_torch_json(capsys):
    assert checkTorch.main(["--json", "--device", "cpu", "--seconds", "0.1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and facts["device"] == "cpu"
    assert facts["precision"] in ("bf16", "fp32") and isinstance(facts["compile"], bool)
    for result in facts["matmul"].values():
        assert result["correct"] and result["gflops"] > 0
    assert facts["matmul"]["fp32"]["relative_error"] < 1e-5 < facts["matmul"]["bf16"]["relative_error"]


@pytest.mark.parametrize(
    ("recipe", "vocabulary", "said"),
    [("addition", 259, "the tokenizer byte has 259"), ("code", 4096, ""), ("sudoku9", 11, "")],
)
def test_the_vocabulary_of_a_recipe(recipe, vocabulary, said, capsys):
    count_params.main(["--config", str(ROOT / "configs" / f"{recipe}.yaml"), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"]["vocab_size"] == vocabulary and said in captured.err


@pytest.mark.parametrize(("words", "vocabulary"), [([], 259), (["--fim_rate", "0.5"], 262)])
def test_the_vocabulary_is_that_of_the_tokenizer(words, vocabulary, capsys):
    """As in training, a tokenizer that exists comes before vocab_size, which the recipe gives for its own tokenizer."""
    recipe = str(ROOT / "configs" / "small.yaml")
    count_params.main(["--config", recipe, "--tokenizer", "byte", *words, "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"]["vocab_size"] == vocabulary
    assert f"vocab_size is {vocabulary}, that of the tokenizer" in captured.err


def test_the_flops_of_a_recipe_whose_depth_changes(capsys):
    """Plain for 60 % of the run, then 2, 3 or 4 visits: 0.6 + 0.4 x 3 = 1.8 visits, and not 4."""
    recipe = str(ROOT / "configs" / "python.yaml")
    count_params.main(["--config", recipe, "--json"])
    facts = json.loads(capsys.readouterr().out)
    config = TRMConfig(**facts["model"])
    plain, whole = (flops_per_token(replace(config, deep_steps=n, grad_deep_steps=n)).train for n in (1, 4))
    assert facts["train_flops_per_token"]["sum"] == whole
    assert facts["mean_train_flops_per_token"] == pytest.approx(plain + 0.8 * (whole - plain) / 3, rel=0.02)
    count_params.main(["--config", recipe])
    assert "  train, mean  " in capsys.readouterr().out
    count_params.main(["--config", str(ROOT / "configs" / "paper.yaml")])
    assert "  train, mean  " not in capsys.readouterr().out


def test_check_torch_sees_wrong_products(monkeypatch, capsys):
    monkeypatch.setitem(checkTorch.TOLERANCE, "fp32", 1e-12)  # stricter than any fp32 product
    monkeypatch.setattr(checkTorch, "choose_precision", lambda wanted, device: Choice("fp32", "test"))
    assert checkTorch.main(["--device", "cpu", "--seconds", "0.1"]) == 1
    out = capsys.readouterr()
    assert "WRONG" in out.out and "wrong products in fp32" in out.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkTorch.py", "--device", "tpu"], "--device tpu"),
        (["checkTorch.py", "--seconds", "0"], "--seconds 0"),
        (["checkTorch.py", "--precisoin", "fp32"], "precisoin"),
        (["count_params.py", "nowhere"], "nowhere"),
        (["count_params.py", "a", "b"], "one at a time"),
        (["count_params.py", "a", "--d_model", "64"], "leave out"),
        (["count_params.py", "--d_model", "10", "--n_heads", "3"], "d_model 10"),
        (["count_params.py", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, said, capsys):
    script = {"checkTorch.py": checkTorch, "count_params.py": count_params}[words[0]]
    with pytest.raises(SystemExit) as caught:
        run(lambda: script.main(words[1:]))
    out = capsys.readouterr()
    assert caught.value.code == 2 and out.out == ""
    assert said in out.err and out.err.startswith("error: ") and out.err.count("\n") == 1


@pytest.mark.parametrize("script", ["checkTorch.py", pytest.param("count_params.py", marks=pytest.mark.slow)])
def test_a_mistake_in_a_process_of_its_own(script):
    done = run_script(script, "--device_", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_cuda_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        checkTorch.main(["--device", "cuda"])


SMALL = ["--d_model", "16", "--n_heads", "2", "--d_ff", "24", "--max_seq_len", "8", "--vocab_size", "11"]
BLOCK = 4 * 16**2 + 3 * 16 * 24


def test_count_params_of_flags(capsys):
    count_params.main([*SMALL, "--json"])
    out = capsys.readouterr()
    facts = json.loads(out.out)
    total = 2 * 11 * 16 + 2 * (BLOCK + 2 * 16) + 17
    assert facts["parameters"]["total"] == total and facts["parameters"]["embedding"] == 11 * 16
    assert (facts["visits_per_step"], facts["visits_per_token"]) == (6, 12)
    assert (facts["effective_depth_per_step"], facts["effective_depth"]) == (12, 24)
    assert facts["train_flops_per_token"]["matmul"] == 2 * (6 * (6 * BLOCK + 11 * 16 + 16) + 2 * 6 * BLOCK)
    assert facts["train_flops_per_token"]["attention"] == 2 * (12 + 4) * 8 * 16 * 6
    assert facts["cache_bytes_per_token"] == {"fp32": 2 * 24 * 16 * 4, "bf16": 2 * 24 * 16 * 2}
    assert facts["cache_bytes_full_context"]["fp32"] == 8 * 2 * 24 * 16 * 4
    assert out.err == ""


def test_count_params_text_says_the_same(capsys):
    count_params.main(SMALL)
    text = capsys.readouterr().out
    total = 2 * 11 * 16 + 2 * (BLOCK + 2 * 16) + 17
    assert f"{total:,}  {count_params.format_params(total)}" in text
    assert "12 (2 supervision steps of 6)" in text and "24 blocks" in text


def test_count_params_says_which_vocabulary_it_assumes(capsys):
    count_params.main(["--json"])
    out = capsys.readouterr()
    assert json.loads(out.out)["model"]["vocab_size"] == 16000
    assert "16,000" in out.err


def test_count_params_of_a_checkpoint_reads_its_config_alone(tmp_path, capsys):
    config = TRMConfig(vocab_size=13, d_model=16, n_heads=2, recursion="loop", tie_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps({"model": config.to_dict(), "info": {}}))
    count_params.main([str(tmp_path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == config.to_dict()
    assert facts["parameters"] == count_params.count_parameters(TRMModel(config))


def test_count_params_of_a_training_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recursion: none\nd_model: 64\nvocab_size: 100\nbatch_size: 8\nlr: 0.01\ntrain_paths: [a.txt]\n")
    count_params.main(["--config", str(recipe), "--n_layers", "3", "--json"])
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["recursion"], model["d_model"], model["n_layers"], model["vocab_size"]) == ("none", 64, 3, 100)


def test_a_model_of_any_size_is_counted_without_its_weights(capsys):
    words = "--recursion none --n_layers 80 --d_model 8192 --n_heads 64 --n_kv_heads 8 --d_ff 28672 --norm pre".split()
    count_params.main([*words, "--vocab_size", "32000", "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 68_976_648_192  # Llama 2 70B
