"""Memory of a training step: it grows neither with supervision_steps nor with deep_steps.

Measured in two ways: exact count of the bytes kept for the backward pass (in this process), and peak RSS (each in a
fresh process).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, build
from torch.autograd.graph import saved_tensors_hooks

from src.model_config import loss_weights

ROOT = Path(__file__).resolve().parent.parent


class SavedBytes:
    """Counts the peak bytes that autograd saves for the backward pass: each storage once, weights excluded."""

    def __init__(self, model):
        self.users = {tensor.untyped_storage().data_ptr(): 1 for tensor in model.state_dict().values()}
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)


class _Held:
    def __init__(self, owner, tensor):
        self.owner, self.tensor = owner, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        owner.users[self.key] = owner.users.get(self.key, 0) + 1
        owner.now += self.size * (owner.users[self.key] == 1)
        owner.peak = max(owner.peak, owner.now)

    def __del__(self):
        self.owner.users[self.key] -= 1
        self.owner.now -= self.size * (self.owner.users[self.key] == 0)


def batch(rows=4, length=16):
    return torch.randint(0, TINY["vocab_size"], (2, rows, length)).unbind()


def step_by_step(model, ids, targets):
    """Runs one training step like the trainer: backward after each supervision step, then the next from its state."""
    weights = loss_weights(model.config, model.config.train_steps)
    carry = None
    for weight in weights:
        out = model(ids, targets, supervision_steps=1, carry=carry)
        carry = out.carry
        (weight / sum(weights) * out.loss).backward()


def all_at_once(model, ids, targets):
    model(ids, targets).loss.backward()


def saved_bytes(step=step_by_step, **settings):
    model = build(**settings).train()
    ids, targets = batch()
    with SavedBytes(model) as saved:
        step(model, ids, targets)
    assert saved.peak > 0
    return saved.peak


@pytest.mark.parametrize("act_target", ["correct", "stable"])
@pytest.mark.parametrize("gate", [False, True])
def test_saved_bytes_are_flat_in_supervision_steps(act_target, gate):
    two, eight = (saved_bytes(supervision_steps=s, act_target=act_target, gate=gate) for s in (2, 8))
    assert eight == two


@pytest.mark.parametrize(
    "settings", [{}, {"injection": "concat"}, {"recursion": "loop", "grad_deep_steps": 1}], ids=str
)
def test_saved_bytes_are_flat_in_deep_steps(settings):
    two, six = (saved_bytes(deep_steps=t, **settings) for t in (2, 6))
    assert six <= two * 1.01


def test_saved_bytes_grow_where_the_contract_lets_them():
    """Negative control: the count grows with full_bptt, all steps in one call, and more gradient or latent steps."""
    base = saved_bytes(supervision_steps=2)
    assert saved_bytes(all_at_once, supervision_steps=8) > 3 * saved_bytes(all_at_once, supervision_steps=2)
    assert saved_bytes(all_at_once, supervision_steps=2) > 1.5 * base
    deep = [saved_bytes(all_at_once, full_bptt=True, deep_steps=t) for t in (2, 6)]
    assert deep[1] > 2.5 * deep[0]
    assert saved_bytes(deep_steps=6, grad_deep_steps=3) > 2 * saved_bytes(deep_steps=6)
    assert saved_bytes(latent_steps=6) > 2 * saved_bytes(latent_steps=2)


def test_gradient_checkpointing_saves_bytes_and_changes_no_gradient():
    settings = {"full_bptt": True, "prelude_layers": 1, "dropout": 0.2, "injection": "concat", "gate": True}
    ids, targets = batch()
    gradients, peaks = [], []
    for is_on in (False, True):
        model = build(gradient_checkpointing=is_on, **settings).train()
        torch.manual_seed(5)  # dropout must be replayed in the recomputation
        with SavedBytes(model) as saved:
            model(ids, targets).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        peaks.append(saved.peak)
    assert peaks[1] < 0.4 * peaks[0]
    for key, expected in gradients[0].items():
        assert torch.equal(gradients[1][key], expected), key


def test_inference_keeps_nothing_for_backward():
    model, (ids, targets) = build(), batch()
    with torch.no_grad(), SavedBytes(model) as saved:
        out = model(ids, targets)
    assert saved.peak == 0 and not out.loss.requires_grad


CHILD = """
import json, sys
import torch
from src.model import TRMConfig, TRMModel
from src.runtime import peak_rss_bytes

settings, at_once = json.loads(sys.argv[1]), sys.argv[2] == "at_once"
torch.set_num_threads(1)
torch.manual_seed(0)
model = TRMModel(TRMConfig(vocab_size=64, d_model=64, n_heads=2, n_layers=2, max_seq_len=128, **settings))
ids, targets = torch.randint(0, 64, (2, 40, 128)).unbind()

def step(rows, times=1):
    carry = None
    for _ in range(1 if at_once else model.config.train_steps):
        out = model(ids[:rows], targets[:rows], supervision_steps=None if at_once else 1, carry=carry)
        carry = out.carry
        out.loss.backward()

step(1)  # libraries, gradients and thread pools are in the baseline
before = peak_rss_bytes()
step(40)
print(json.dumps({"MiB": (peak_rss_bytes() - before) / 2**20}))
"""


def peak_mib(at_once=False, **settings):
    """Returns the growth of peak RSS in MiB during one eager training step in a fresh process."""
    command = [sys.executable, "-c", CHILD, json.dumps(settings), "at_once" if at_once else "by_step"]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # frees tensors to the system: no fragmentation
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["MiB"]


@pytest.mark.slow
def test_peak_rss_is_flat_within_a_tenth():
    base = peak_mib(supervision_steps=2, deep_steps=2)
    assert base > 100  # large enough to be activations, not noise
    assert peak_mib(supervision_steps=6, deep_steps=2) < 1.1 * base
    assert peak_mib(supervision_steps=2, deep_steps=6) < 1.1 * base
    assert peak_mib(at_once=True, supervision_steps=2, deep_steps=2, full_bptt=True) > 2.5 * base  # negative control
