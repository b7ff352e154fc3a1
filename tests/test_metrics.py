"""Tests of metrics.py against torch's own counters."""

import pytest
import torch
from conftest import AXES, TINY, TRAINING_AXES, TRAINING_SINGLES, name, pairwise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.metrics import cache_bytes_per_token, count_parameters, effective_depth, flops_per_token, format_params
from src.model import TRMConfig, TRMModel
from src.model_config import loss_weights

FAMILIES = {
    "none": {"recursion": "none", "n_layers": 3, "norm": "pre"},
    "none_ends": {"recursion": "none", "prelude_layers": 1, "coda_layers": 2},
    "loop": {"recursion": "loop", "deep_steps": 3},
    "loop_plain": {"recursion": "loop", "injection": "none", "n_kv_heads": 2},
    "trm": {},
    "trm_all": {"prelude_layers": 1, "coda_layers": 1, "injection": "concat", "gate": True, "n_kv_heads": 1},
    "trm_tied": {"tie_embeddings": True, "positions": "learned"},
}
# Every model option that is compared with the reference implementation, so that new options are covered too.
CASES = [
    *pairwise(AXES | TRAINING_AXES),
    *TRAINING_SINGLES,
    {"recursion": "none", "n_layers": 3, "norm": "pre"},
    {"recursion": "loop", "deep_steps": 3, "grad_deep_steps": 1, "gate": True},
    {"recursion": "loop", "deep_steps": 3, "grad_deep_steps": 2, "supervision_weights": "equal", "coda_layers": 1},
    {"recursion": "loop", "deep_steps": 3, "supervision_weights": "0,0.5,1"},
    {"recursion": "loop", "deep_steps": 2, "supervision_weights": "1,0,1", "coda_layers": 1},
    {"recursion": "loop", "injection": "none"},
    {"recursion": "trm", "deep_steps": 3, "supervision_steps": 3, "grad_deep_steps": 2},
    {"recursion": "trm", "full_bptt": True, "prelude_layers": 1},
    {"recursion": "trm", "full_bptt": True, "supervision_steps": 3, "supervision_weights": "0,0.5,1", "coda_layers": 1},
    {"recursion": "trm", "full_bptt": True, "supervision_weights": "last"},
    {"recursion": "trm", "full_bptt": True, "supervision_steps": 2, "supervision_weights": "1,0,1"},
    {"recursion": "trm", "causal": False},
    {"recursion": "trm", "causal": False, "mixer": "mlp", "positions": "none"},
    {"recursion": "trm", "causal": False, "mixer": "mlp", "mixer_ff": 40, "prefix_tokens": 2, "puzzle_ids": 3},
    {"recursion": "trm", "causal": False, "prefix_tokens": 4, "injection": "concat", "gate": True, "coda_layers": 1},
    {"recursion": "loop", "halting": True, "supervision_weights": "linear"},
]
CASES = [case | {"act_target": "correct"} for case in CASES]  # stable has its own test below


def model_of(settings):
    return TRMModel(TRMConfig(**{**TINY, **settings}))


def batch_of(config, batch=2):
    ids = torch.randint(config.vocab_size, (batch, config.max_seq_len))
    return ids, ids.roll(-1, dims=1)


def counted(work, tokens):
    """Returns FLOPs per token as torch counts them: (products with weights, attention)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in by_op.items() if "bmm" in op)
    return (sum(by_op.values()) - attention) / tokens, attention / tokens


@pytest.mark.parametrize("settings", CASES, ids=name)
def test_decode_flops_are_those_of_a_forward_pass(settings):
    model = model_of(settings).eval()
    ids, _ = batch_of(model.config)
    with torch.no_grad():
        matmul, attention = counted(lambda: model(ids), ids.numel())
    flops = flops_per_token(model.config)
    if model.config.mixer == "mlp":  # its batched products over the sequence use weights
        matmul, attention = matmul + attention, 0
    assert flops.decode_matmul == pytest.approx(matmul, abs=1)  # abs: the halting head's share is not an integer
    assert flops.decode_attention == attention
    assert flops.decode == flops.decode_matmul + flops.decode_attention


@pytest.mark.parametrize("settings", CASES, ids=name)
def test_train_flops_are_those_of_forward_and_backward(settings):
    model = model_of(settings)
    ids, targets = batch_of(model.config)

    def train():
        if model.config.full_bptt:
            model(ids, targets).loss.backward()
            return
        carry, steps = None, model.config.train_steps
        weights = loss_weights(model.config, steps) if model.config.recursion == "trm" else [1.0] * steps
        for weight in weights:  # as in Trainer.supervise
            with torch.set_grad_enabled(weight > 0):
                out = model(ids, targets, supervision_steps=1, carry=carry)
            if weight > 0:
                out.loss.backward()
            carry = out.carry

    matmul, attention = counted(train, ids.numel())
    flops = flops_per_token(model.config)
    if model.config.mixer == "mlp":
        matmul, attention = matmul + attention, 0
    assert flops.train_matmul == pytest.approx(matmul, abs=3 * model.config.train_steps)
    assert flops.train_attention == attention
    assert flops.train == flops.train_matmul + flops.train_attention


def test_stable_halting_counts_its_second_read_out():
    config = {"vocab_size": 23, "d_model": 16, "d_ff": 24, "max_seq_len": 16, "coda_layers": 1}
    stable, correct = TRMConfig(act_target="stable", **config), TRMConfig(**config)
    block = 16 * 48 + 16 * 16 + 3 * 16 * 24
    more = flops_per_token(stable).train_matmul - flops_per_token(correct).train_matmul
    assert more == 2 * (block + 16 * 23 + 16)  # one more read-out without gradient, at the second of two steps


def test_flops_by_hand():
    """6 x matmul parameters for the plain transformer; 6 x one cycle + 2 x the other, twice, for TRM (2, 2, 2)."""
    plain = TRMConfig(vocab_size=65, d_model=384, n_heads=6, n_layers=6, d_ff=1024, recursion="none")
    block = 4 * 384**2 + 3 * 384 * 1024
    assert flops_per_token(plain).train_matmul == 6 * (6 * block + 65 * 384)
    assert flops_per_token(plain).train_attention == 12 * 256 * 384 * 6
    assert flops_per_token(plain, context=512).train_attention == 2 * 12 * 256 * 384 * 6
    trm = TRMConfig(vocab_size=65, d_model=384, n_heads=6, n_layers=2, d_ff=1024)
    assert flops_per_token(trm).train_matmul == 2 * (6 * (6 * block + 65 * 384 + 384) + 2 * 6 * block)
    assert flops_per_token(trm).decode_matmul == 2 * (2 * 6 * 2 * block + 65 * 384 + 384)


def test_count_parameters():
    n = count_parameters(model_of(FAMILIES["trm"]))
    block = 4 * 16**2 + 3 * 16 * 24 + 2 * 16
    assert n["per_module"] == {
        "embed": 23 * 16, "prelude": 0, "net": 2 * block, "coda": 0, "head": 23 * 16, "q_head": 17,
    }  # fmt: skip
    assert n["total"] == n["trainable"] == 2 * 23 * 16 + 2 * block + 17
    assert n["embedding"] == 23 * 16 and n["recursive_core"] == 2 * block


def test_count_parameters_counts_tied_ones_once_and_frozen_ones_not_as_trainable():
    model = model_of(FAMILIES["trm_tied"])
    model.pos_embed.weight.requires_grad_(False)
    n = count_parameters(model)
    assert n["per_module"]["embed"] == 23 * 16 and n["per_module"]["head"] == 0
    assert n["embedding"] == 23 * 16 + 16 * 16
    assert n["total"] - n["trainable"] == 16 * 16
    assert n["total"] == sum(n["per_module"].values()) == sum(p.numel() for p in model.parameters())


def test_a_network_visited_once_is_no_recursive_core():
    assert count_parameters(model_of(FAMILIES["none"]))["recursive_core"] == 0
    assert count_parameters(model_of(FAMILIES["loop"]))["recursive_core"] > 0


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (12345, "12.3K"),
        (999_499, "999K"),
        (999_500, "1.00M"),
        (1_234_567, "1.23M"),
        (9_999_000, "10.0M"),
        (99_990_000, "100M"),
        (4_560_000_000, "4.56B"),
        (1.5e12, "1.50T"),
    ],
)
def test_format_params(n, text):
    assert format_params(n) == text


def test_effective_depth():
    config = TRMConfig(n_layers=2, latent_steps=3, deep_steps=2, supervision_steps=4, prelude_layers=1, coda_layers=2)
    assert effective_depth(config) == (1 + 2 * 4 * 2 + 2, 1 + 4 * 2 * 4 * 2 + 2)
    assert effective_depth(TRMConfig(recursion="none", n_layers=6)) == (6, 6)
    assert effective_depth(TRMConfig(recursion="loop", n_layers=2, deep_steps=3)) == (6, 6)


@pytest.mark.parametrize("family", ["none_ends", "loop_plain", "trm_all"])
def test_cache_bytes_are_those_of_the_cache(family):
    model = model_of(FAMILIES[family]).to(torch.bfloat16)
    cache = model.new_cache(batch=3, max_len=16)
    held = sum(t.numel() * t.element_size() for t in vars(cache).values() if torch.is_tensor(t) and t.dim() > 3)
    assert held == 3 * 16 * cache_bytes_per_token(model.config, 2)
    steps = model.config.recursion_steps
    cache = model.new_cache(batch=3, max_len=16, depth=steps)  # the answer of every step is read
    held = sum(t.numel() * t.element_size() for t in vars(cache).values() if torch.is_tensor(t) and t.dim() > 3)
    assert held == 3 * 16 * cache_bytes_per_token(model.config, 2, steps)


def test_a_model_that_cannot_decode_has_no_cache():
    assert cache_bytes_per_token(TRMConfig(causal=False), 4) == 0
