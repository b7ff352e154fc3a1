"""Tests of what the model guarantees: causality, equality with its slow twin and with Llama, padding; its settings."""

import copy
import math

import pytest
import torch
from conftest import AXES, TINY, TRAINING_AXES, TRAINING_SINGLES, batch, build, mixtures, name, pairwise, singles
from reference import IGNORE, Twin, llama_with_weights_of, supervision_weights

from src.model import TRMConfig, TRMModel

SHAPE_CASES = pairwise(AXES) + [{"recursion": "loop", "injection": "none"}]
TWIN_CASES = (
    pairwise(AXES | TRAINING_AXES)
    + TRAINING_SINGLES
    + [{"recursion": "loop", "injection": "none", "gate": gate} for gate in (False, True)]
    + [{"recursion": "loop", "grad_deep_steps": 1, "deep_steps": 3}]
    + [
        {"recursion": family, "causal": False, "act_target": t}
        for family in ("trm", "loop")
        for t in ("correct", "stable")
    ]
    + [{"recursion": "trm", "causal": False, "mixer": "mlp", "max_seq_len": 6, "norm": norm} for norm in AXES["norm"]]
    + [
        {"recursion": family, "causal": False, "prefix_tokens": 2, **more}
        for family in ("trm", "loop", "none")
        for more in ({}, {"puzzle_ids": 3}, {"puzzle_ids": 3, "puzzle_dim": 24, "positions": "learned"})
    ]
    + [{"recursion": "trm", "causal": False, "mixer": "mlp", "max_seq_len": 6, "prefix_tokens": 1, "norm_gain": False}]
    + [{"recursion": "loop", "halting": True, **more} for more in ({}, {"act_target": "stable"}, {"coda_layers": 1})]
    + [{"recursion": "loop", "halting": True, "supervision_weights": "linear", "act_target": "stable"}]
    + [{"recursion": "loop", "halting": True, "causal": False, "prefix_tokens": 1, "supervision_weights": "equal"}]
    + [{"recursion": "trm", "halting": False}]
    + [
        {"recursion": "loop", "deep_steps": 3, "supervision_weights": weights, **more}
        for weights in ("equal", "linear", "0,0.5,1")
        for more in ({"injection": "concat", "gate": True}, {"grad_deep_steps": 2, "coda_layers": 1})
    ]
)


# --- the slow twin ------------------------------------------------------------------------------------------------


def make_twin(model, dtype=None):
    """The twin and its own leaf copies of the weights (tied names share one leaf)."""
    leaves = {}
    for key, tensor in model.state_dict().items():
        leaf = tensor.detach().clone().to(dtype or tensor.dtype)
        leaves[key] = leaf.requires_grad_(key not in ("y_init", "z_init"))
    return Twin(model.config.to_dict(), leaves), leaves


def some_right_targets(model, ids, targets):
    """Every second target becomes what the model answers, so that the halting target is not always 'no'."""
    with torch.no_grad():
        answers = model(ids).logits.argmax(-1)
    even = (torch.arange(ids.shape[1]) % 2 == 0) & (targets != IGNORE)
    return torch.where(even, answers, targets)


def errors(model, dtype=None):
    """Relative error of loss, logits and every gradient: norm of the difference over norm of the twin's value.

    A gradient that cancels to nearly nothing has no relative precision, so the norm of a gradient counts at least as
    a hundredth of the norm of all gradients together."""
    ids, targets = batch()
    targets = some_right_targets(model, ids, targets)
    twin, leaves = make_twin(model, dtype)
    puzzles = torch.arange(len(ids)) + 1 if model.config.puzzle_ids else None
    slow = twin.forward(ids.tolist(), targets.tolist(), puzzles=puzzles if puzzles is None else puzzles.tolist())
    slow["loss"].backward()
    fast = model(ids, targets, return_steps=True, puzzle_ids=puzzles)
    model.zero_grad()
    fast.loss.backward()
    pairs = {
        key: (getattr(fast, field), slow[key])
        for key, field in (("loss", "loss"), ("ce", "ce_loss"), ("act", "act_loss"))
    }
    pairs["logits"] = fast.logits, torch.stack(slow["logits"])
    if fast.halt_logits is not None:
        pairs["halt"] = fast.halt_logits, torch.stack(slow["halt"]).reshape(fast.halt_logits.shape)
    floor = 0.01 * sum(leaf.grad.double().norm() ** 2 for leaf in leaves.values() if leaf.grad is not None) ** 0.5
    found = {key: relative(a, b) for key, (a, b) in pairs.items()}
    for key, parameter in model.named_parameters():
        expected = leaves[key].grad
        if parameter.grad is None or expected is None:
            present = parameter.grad if expected is None else expected
            assert present is None or not present.any(), f"{key}: one side has a gradient, the other has none"
        else:
            found[key] = relative(parameter.grad, expected, floor)
    return found


def relative(a, b, floor=1e-12):
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=floor))


@pytest.mark.parametrize("settings", TWIN_CASES, ids=name)
def test_slow_twin_float64(settings):
    found = errors(build(dtype=torch.float64, **settings))
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("settings", TWIN_CASES[::3], ids=name)
def test_slow_twin_float32(settings):
    """Against the float64 twin of the same fp32 weights: the norm of the error over the norm of the true value.

    A gradient is a sum of terms that partly cancel, so a few have more rounding than the outputs have."""
    found = errors(build(**settings), dtype=torch.float64)
    outputs = {"loss", "ce", "act", "logits", "halt"}
    assert all(error < (1e-5 if key in outputs else 1e-4) for key, error in found.items()), found


def test_the_twin_notices_a_swapped_term():
    """Negative control: with key and value rows of the fused weight swapped the twin must disagree."""
    model = build(dtype=torch.float64)
    ids, _ = batch()
    twin, leaves = make_twin(model)
    qkv = leaves["net.blocks.0.attn.qkv.weight"]
    leaves["net.blocks.0.attn.qkv.weight"] = qkv[torch.tensor([*range(16), *range(32, 48), *range(16, 32)])]
    assert relative(model(ids).logits, twin.forward(ids.tolist())["logits"][-1]) > 1e-3


@pytest.mark.parametrize("weights", ["equal", "linear", "last", "0.3,1.0", "0,1"])
@pytest.mark.parametrize("act_target", ["correct", "stable"])
def test_training_by_single_steps_equals_all_steps(weights, act_target):
    model = build(
        dtype=torch.float64, supervision_steps=3, supervision_weights=weights, act_target=act_target, coda_layers=1
    )
    ids, targets = batch()
    targets = some_right_targets(model, ids, targets)
    whole = model(ids, targets)
    whole.loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    shares, carry, losses = supervision_weights(weights, 3), None, []
    for share in shares:
        out = model(ids, targets, supervision_steps=1, carry=carry)
        carry, part = out.carry, share / sum(shares) * out.loss
        part.backward()
        losses.append(out.loss.item())
    assert carry.steps == 3
    mean = sum(share * loss for share, loss in zip(shares, losses)) / sum(shares)
    assert mean == pytest.approx(whole.loss.item(), rel=1e-12)
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[key]) < 1e-12, key
    rest = model(ids, targets, supervision_steps=2, carry=model(ids, supervision_steps=1).carry)
    mean = sum(share * loss for share, loss in zip(shares[1:], losses[1:])) / sum(shares[1:])
    assert rest.loss.item() == pytest.approx(mean, rel=1e-12)


# --- causality ----------------------------------------------------------------------------------------------------


def changes_before(model, run=None, length=9, mask=None, start=0):
    """Positions before a changed token whose logits differ in any bit (list of (changed, position))."""
    run = model if run is None else run
    ids, _ = batch(length=length)
    found = []
    with torch.no_grad():
        before = run(ids, attention_mask=mask, return_steps=True)
        for j in range(start, length):
            other = ids.clone()
            other[:, j] = (other[:, j] + 7) % TINY["vocab_size"]
            after = run(other, attention_mask=mask, return_steps=True)
            same = (before.logits[..., :j, :] == after.logits[..., :j, :]).all(-1).flatten(0, -2).all(0)
            found += [(j, t) for t in range(j) if not same[t]]
            if before.halt_logits is not None and model.config.causal:
                assert torch.equal(before.halt_logits[..., :j], after.halt_logits[..., :j])
            assert not torch.equal(before.logits[..., j, :], after.logits[..., j, :])  # the token itself is seen
    return found


@pytest.mark.parametrize("settings", SHAPE_CASES, ids=name)
def test_causal_bit_for_bit(settings):
    assert changes_before(build(**settings)) == []


@pytest.mark.parametrize("recursion", ["trm", "loop", "none"])
def test_causality_check_sees_a_model_that_looks_ahead(recursion):
    assert changes_before(build(recursion=recursion, causal=False)) != []


MASKS = {
    "left padding": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "documents": [[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2, 2, 2]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_causal_with_masks(mask, positions):
    model = build(positions=positions, n_kv_heads=2, prelude_layers=1, coda_layers=1)
    assert changes_before(model, mask=torch.tensor(mask)) == []


@pytest.mark.parametrize("length", [33, 130])
def test_causal_bit_for_bit_at_lengths_of_several_attention_blocks(length):
    model = build(max_seq_len=256)
    assert changes_before(model, length=length, start=length - 12) == []


@pytest.mark.slow
def test_causal_bit_for_bit_compiled(unchecked):
    model = build(n_layers=1, latent_steps=1)
    compiled = torch.compile(model)
    assert changes_before(model, run=compiled) == []
    ids, _ = batch(length=9)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


# --- the plain family is Llama ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tied, kv_heads, theta", [(False, 4, 10000.0), (True, 4, 10000.0), (False, 2, 500000.0), (True, 1, 50.0)]
)
def test_plain_family_is_llama(tied, kv_heads, theta):
    model = build(recursion="none", norm="pre", tie_embeddings=tied, n_kv_heads=kv_heads, rope_theta=theta)
    llama = llama_with_weights_of(model)
    ids, _ = batch(length=16)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # Llama is told the positions; ours counts real tokens
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = llama(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask == 1], theirs[mask == 1], atol=1e-4, rtol=1e-4
    )


def train_a_little(**settings):
    torch.manual_seed(11)
    model = TRMModel(TRMConfig(**{**TINY, **settings}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        ids, targets = batch(seed=step)
        optimizer.zero_grad()
        model(ids, targets).loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("recursion", ["trm", "loop", "none"])
def test_same_seed_same_weights(recursion):
    first, second = (train_a_little(recursion=recursion, dropout=0.1) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    without = train_a_little(recursion=recursion)  # dropout really acts
    assert not all(torch.equal(first[key], without[key]) for key in first)


# --- padding and documents ----------------------------------------------------------------------------------------


# The first two are also run with older CPU kernels, in test_kernels.py.
ALONE_CASES = [
    {"recursion": "trm"},
    {"recursion": "trm", "injection": "concat"},
    {"causal": False},
    {"positions": "learned", "causal": False},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", SHAPE_CASES + ALONE_CASES, ids=name)
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_padded_batch(settings, side):
    ids, _ = batch(rows=3, length=10)
    lengths = [4, 10, 7]
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, slice(10 - n, 10) if side == "left" else slice(0, n)] = 1
    # In float64 both are equal up to rounding. These large random weights magnify rounding, and batches of two shapes
    # round differently: without vector instructions fp32 logits are up to 5e-5 off those of float64, with them 1.4e-5.
    fp32_tolerance = 1e-4 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 2e-5
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, fp32_tolerance)):
        model = build(dtype=dtype, **settings)
        together = model(ids, attention_mask=mask, return_steps=True).logits
        for row in range(3):
            alone = model(ids[row : row + 1, mask[row] == 1], return_steps=True).logits[:, 0]
            close = tolerance * max(1, alone.abs().max().item())
            torch.testing.assert_close(together[:, row, mask[row] == 1], alone, atol=close, rtol=0)


@pytest.mark.parametrize("recursion", ["trm", "loop", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_of_padding_is_never_nan(recursion, causal):
    model = build(recursion=recursion, causal=causal, prelude_layers=1, coda_layers=1).train()
    ids, targets = batch()
    mask = torch.ones_like(ids)
    mask[0], targets[0] = 0, IGNORE
    out = model(ids, targets, attention_mask=mask)
    out.loss.backward()
    assert out.loss.isfinite() and out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    alone = model(ids[1:], targets[1:])
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)


def test_no_target_at_all_is_a_loss_of_zero():
    model = build().train()
    ids, targets = batch()
    out = model(ids, torch.full_like(targets, IGNORE))
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize("recursion", ["trm", "loop", "none"])
def test_packed_documents_do_not_see_each_other(recursion, positions):
    """Documents joined in one row, told apart by the mask's numbers, against each document alone."""
    model = build(recursion=recursion, positions=positions, prelude_layers=1, n_kv_heads=2)
    ids, _ = batch(length=12)
    mask = torch.tensor([[1] * 4 + [2] * 5 + [3] * 3, [0] * 2 + [4] * 6 + [2] * 4])
    packed = model(ids, attention_mask=mask).logits
    for row in range(2):
        for document in mask[row].unique().tolist():
            here = mask[row] == document
            if document:
                alone = model(ids[row : row + 1, here]).logits[0]
                torch.testing.assert_close(packed[row, here], alone, atol=1e-5, rtol=1e-5)


def test_a_copy_runs_its_own_weights():
    """EMA and evaluation copies are deep copies: they must not call back into the original."""
    model = build()
    ids, _ = batch()
    twin = copy.deepcopy(model)
    before = twin(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids).logits, before)


def test_skipped_visits_keep_the_state_of_single_tokens(tiny):
    """visit_dropout acts in training only, and never at the first visit."""
    model, ids = tiny(recursion="loop", deep_steps=2, visit_dropout=0.5), batch()[0]
    with torch.no_grad():
        once, twice = model(ids, return_steps=True).logits
        skipping = model.train()(ids, return_steps=True).logits
        assert torch.equal(skipping[0], once)
        skipped = (skipping[1] == once).all(-1)
        assert skipped.any() and torch.equal(skipping[1][~skipped], twice[~skipped]) and not skipped.all()
        model.config.visit_dropout = 0.999999
        assert torch.equal(model(ids).logits, once)


def test_noise_at_the_start_acts_in_training_only(tiny):
    model, ids = tiny(recursion="loop", start_noise=2.0), batch()[0]
    x = model.embed(ids)
    assert not model.initial_state(x).y.any()
    noise = model.train().initial_state(x.expand(100, -1, -1, -1).flatten(0, 1)).y
    assert noise.std().item() == pytest.approx(2.0, rel=0.05) and abs(noise.mean().item()) < 0.1
    bare = tiny(recursion="loop", injection="none", start_noise=2.0).train()
    assert torch.equal(bare.initial_state(x).y, x)


def test_a_window_bounds_how_far_a_visit_sees(tiny):
    """With a window of 3, each of 2 visits of 1 block reaches 2 tokens further."""
    model = tiny(recursion="loop", n_layers=1, deep_steps=2, attention_window=3)
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 2] = 20
    with torch.no_grad():
        differs = (model(ids, return_steps=True).logits != model(changed, return_steps=True).logits).any(-1)[:, 0]
    assert [row.nonzero().flatten().tolist() for row in differs] == [[2, 3, 4], [2, 3, 4, 5, 6]]


# --- settings, shapes, precision ----------------------------------------------------------------------------------

REFUSED = [({key: 0}, key) for key in (
    "vocab_size d_model n_heads n_kv_heads n_layers d_ff max_seq_len latent_steps deep_steps supervision_steps "
    "grad_deep_steps act_threshold norm_eps rope_theta rope_scaling"
).split()]  # fmt: skip
REFUSED += [({key: -1}, key) for key in "prelude_layers coda_layers act_weight dropout rope_scaling vocab_size".split()]
CHOICES = "mixer positions norm recursion injection act_target".split()
REFUSED += [({key: "none of them"}, key) for key in CHOICES]
WEIGHTS = ("", "rising", "-1,1", "1,0", "1,,2", "nan", "1e308,1e308")
REFUSED += [({"supervision_weights": weights}, "supervision_weights") for weights in WEIGHTS]
REFUSED += [
    ({key: math.nan}, key) for key in "act_weight act_threshold norm_eps rope_theta rope_scaling dropout".split()
]
REFUSED += [
    ({"n_heads": 3}, "n_heads"),
    ({"n_kv_heads": 3}, "n_kv_heads"),
    ({"d_model": 12}, "head size 3 is odd"),
    ({"dropout": 1.0}, "dropout"),
    ({"visit_dropout": 1.0}, "visit_dropout"),
    ({"attention_window": 0}, "attention_window"),
    ({"start_noise": -1}, "start_noise"),
    ({"act_threshold": 1.5}, "act_threshold"),
    ({"mixer": "mlp"}, "causal"),
    ({"injection": "none"}, "injection"),
    ({"grad_deep_steps": 3}, "grad_deep_steps"),
    ({"recursion": "loop", "injection": "none", "grad_deep_steps": 1}, "grad_deep_steps"),
    ({"pad_token_id": 23}, "pad_token_id"),
    ({"rope_theta": 1.0, "rope_scaling": 2.0, "rope_trained_len": 64}, "rope_theta"),
]


@pytest.mark.parametrize("change, word", REFUSED, ids=str)
def test_impossible_settings_are_refused_by_name(unchecked, change, word):
    with pytest.raises(ValueError, match=word) as refusal:
        TRMConfig(**{**TINY, **change})
    assert "\n" not in str(refusal.value)


def test_fields_that_a_family_does_not_use_are_ignored():
    TRMConfig(**TINY, recursion="none", injection="none", deep_steps=2, grad_deep_steps=5)
    TRMConfig(**{**TINY, "d_model": 12}, positions="learned")  # an odd head size matters to rope alone


def test_defaults_that_depend_on_other_fields():
    assert TRMConfig().grad_deep_steps == 1
    assert TRMConfig(recursion="loop", deep_steps=5).grad_deep_steps == 5
    assert TRMConfig(full_bptt=True, deep_steps=3).grad_deep_steps == 3
    assert TRMConfig(n_heads=8).n_kv_heads == 8
    assert [TRMConfig(d_model=d).d_ff for d in (24, 128, 256, 384)] == [64, 384, 704, 1024]
    config = TRMConfig(**TINY, n_kv_heads=2, deep_steps=3, recursion="loop")
    assert TRMConfig(**config.to_dict()) == config
    with pytest.raises(ValueError, match="vocab_size"):
        TRMModel(TRMConfig())


@pytest.mark.parametrize("recursion, steps", [("trm", 3), ("loop", 2), ("none", 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_shapes(recursion, steps, causal):
    model = build(recursion=recursion, supervision_steps=3, causal=causal, coda_layers=1)
    ids, targets = batch(rows=2, length=6)
    last, every = model(ids), model(ids, return_steps=True)
    assert last.loss is None and last.ce_loss is None and last.act_loss is None
    assert last.logits.shape == (2, 6, 23) and every.logits.shape == (steps, 2, 6, 23)
    assert torch.equal(every.logits[-1], last.logits)
    halting = () if recursion != "trm" else (2, 6) if causal else (2,)
    assert (last.halt_logits is None) == (recursion != "trm")
    assert recursion != "trm" or (last.halt_logits.shape, every.halt_logits.shape) == (halting, (steps, *halting))
    assert last.carry.steps == (3 if recursion == "trm" else 1) and last.carry.y.shape == (2, 6, 16)
    early = model(ids, supervision_steps=1)  # of the loop that is all its visits
    assert torch.equal(early.logits, every.logits[0 if recursion == "trm" else -1]) and early.carry.steps == 1
    out = model(ids, targets)
    assert out.loss.item() == pytest.approx((out.ce_loss + model.config.act_weight * out.act_loss).item())
    assert torch.equal(out.logits, last.logits)


@pytest.mark.parametrize("number", [0, -1])
def test_no_supervision_step_at_all_is_refused(number):
    with pytest.raises(ValueError, match="supervision_steps"):
        build()(batch()[0], supervision_steps=number)


@pytest.mark.parametrize("settings", mixtures(AXES, 9, seed=4) + singles({"injection": ("sum", "concat")}), ids=name)
@pytest.mark.parametrize("gate", [True, False])
def test_bfloat16_autocast(settings, gate):
    """Training and evaluation in mixed precision run, and stay near fp32: bf16 keeps 8 bits."""
    model = build(**settings | {"gate": gate, "qk_norm": True})
    ids, targets = batch()
    exact = model(ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, targets)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
