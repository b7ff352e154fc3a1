"""Tests on a GPU (CUDA or MPS): the same results as on the CPU.  Skipped on a machine without one."""

import copy
import os
import signal

import pytest
import torch
from conftest import batch, build
from trainers import TINY_PUZZLES, during, puzzle_settings, read_metrics

from src.exits import ExitRule
from src.optim import EMA, make_optimizers
from src.runtime import choose_device, choose_precision, compile_parts
from src.sampling import generate
from src.tasks.puzzle_trainer import create_puzzle_trainer

pytest_plugins = "trainers"  # the fixtures make and corpus
DEVICE = choose_device("auto")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="this machine has no GPU")

FAMILIES = [
    {"recursion": "trm"},
    {"recursion": "trm", "causal": False, "mixer": "mlp", "max_seq_len": 6, "norm_gain": False},
    {"recursion": "trm", "causal": False, "prefix_tokens": 2, "puzzle_ids": 3, "token_loss": "stablemax"},
    {"recursion": "loop", "halting": True, "injection": "concat", "gate": True, "positions": "learned"},
    {"recursion": "loop", "attention_window": 3},
    {"recursion": "none", "norm": "pre", "n_kv_heads": 2},
]


def name(settings):
    return "-".join(str(value) for value in settings.values())


def loss_and_gradients(model, ids, targets):
    out = model(ids, targets)
    out.loss.backward()
    return out, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", FAMILIES, ids=name)
def test_losses_logits_and_gradients_are_those_of_the_cpu(settings):
    model, (ids, targets) = build(**settings).train(), batch()
    other = copy.deepcopy(model).to(DEVICE)
    here, gradients = loss_and_gradients(model, ids, targets)
    there, others = loss_and_gradients(other, ids.to(DEVICE), targets.to(DEVICE))
    torch.testing.assert_close(there.logits.cpu(), here.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.loss.cpu(), here.loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key].cpu(), gradient, rtol=1e-2, atol=1e-4, msg=key)


@pytest.mark.parametrize("settings", [s for s in FAMILIES if s.get("causal", True)], ids=name)
def test_the_cache_and_the_cpu_give_the_same_text(settings):
    model, ids = build(**settings), batch()[0]
    expected = torch.stack(list(generate(model, ids, 8, temperature=0)), dim=1)
    model.to(DEVICE)
    for use_cache in (True, False):
        tokens = torch.stack(list(generate(model, ids.to(DEVICE), 8, temperature=0, use_cache=use_cache)), dim=1)
        assert tokens.tolist() == expected.tolist(), use_cache


def test_tokens_halt_after_as_many_steps_as_on_the_cpu():
    model, ids = build(recursion="trm", supervision_steps=4), batch()[0]
    rule = ExitRule("kl", kl_threshold=0.02)
    expected = model(ids, exit=rule).carry.steps
    assert model.to(DEVICE)(ids.to(DEVICE), exit=rule).carry.steps.tolist() == expected.tolist()
    assert len(expected.unique()) > 1, "all tokens halt together: the test shows nothing"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_and_averages_move_weights_as_on_the_cpu(optimizer):
    model, (ids, targets) = build().train(), batch()
    other = copy.deepcopy(model).to(DEVICE)
    averages = []
    for each in (model, other):
        optimizers, average = make_optimizers(each, optimizer, 1e-3, 0.1, (0.9, 0.95)), EMA(each, 0.9)
        device = each.embed.weight.device
        for _ in range(3):
            each(ids.to(device), targets.to(device)).loss.backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
            average.update(each)
        averages.append(average.average)
    before = build()
    for (key, a), b, start in zip(model.named_parameters(), other.parameters(), before.parameters(), strict=True):
        moved = (a - start).norm()
        assert (b.cpu() - a).norm() <= 0.05 * moved + 1e-6, key  # Muon multiplies in bf16 on a GPU
        assert (averages[1][key].cpu() - averages[0][key]).norm() <= 0.05 * moved + 1e-6, key


def test_compiled_training_gives_the_eager_loss(unchecked):
    model, (ids, targets) = build(norm_gain=False).train().to(DEVICE), batch()
    ids, targets = ids.to(DEVICE), targets.to(DEVICE)
    eager, gradients = loss_and_gradients(model, ids, targets)
    gradients = {key: gradient.clone() for key, gradient in gradients.items()}
    model.zero_grad()
    compile_parts(model)
    compiled, others = loss_and_gradients(model, ids, targets)
    torch.testing.assert_close(compiled.loss, eager.loss, rtol=1e-3, atol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=2e-2, atol=1e-3, msg=key)


def test_a_text_run_resumes_with_the_losses_of_an_uninterrupted_one(make):
    settings = {"device": "auto", "precision": "auto", "max_steps": 6, "eval_every": 6, "ema_decay": 0.9}
    make("whole", **settings).train()
    stopped = make("run", **settings)
    assert stopped.device.type == DEVICE.type and stopped.precision == choose_precision("auto", DEVICE).value
    during(stopped, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped.train()
    resumed = make("run", **settings, resume=True)
    assert resumed.step == 3
    resumed.train()
    whole, again = (read_metrics(resumed.folder.parent / run) for run in ("whole", "run"))
    expected, losses = ({r["step"]: r["loss"] for r in records if "loss" in r} for records in (whole, again))
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 6


def test_a_puzzle_run_trains_and_resumes(tmp_path):
    settings = {**TINY_PUZZLES, "device": "auto", "precision": "auto", "save_dir": str(tmp_path / "run")}
    stopped = create_puzzle_trainer(puzzle_settings(settings))
    assert stopped.device.type == DEVICE.type
    during(stopped, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped.train()
    resumed = create_puzzle_trainer(puzzle_settings({**settings, "resume": True}))
    assert resumed.step == 7 and resumed.loader.y.device.type == DEVICE.type
    assert torch.equal(resumed.loader.y, stopped.loader.y) and resumed.loader.drawn == stopped.loader.drawn
    figures = resumed.train()
    assert resumed.step == 12 and 0 < figures["valid_cell_accuracy"] <= 1
