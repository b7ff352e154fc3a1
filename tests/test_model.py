"""Contracts 1, 2, 5, 6, 7 and 8 of the model: causality, slow twin, Llama parity, learning, determinism, padding."""

import copy
import itertools
import random

import pytest
import torch
from conftest import TINY, build
from reference import IGNORE, Twin, supervision_weights

from src.model import TRMConfig, TRMModel

# Each axis on its own, for every family, then seeded mixtures of all axes.
AXES = {
    "norm": ("post", "pre", "sandwich"),
    "injection": ("sum", "concat"),
    "gate": (False, True),
    "prelude_layers": (0, 1),
    "coda_layers": (0, 1),
    "n_kv_heads": (4, 2, 1),
    "positions": ("rope", "learned", "none"),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
}
TRAINING_AXES = {
    "full_bptt": (False, True),
    "supervision_weights": ("equal", "linear", "last", "0.3,1.0"),
    "act_target": ("correct", "stable"),
    "act_weight": (0.5, 1.0),
    "grad_deep_steps": (None, 2),
    "latent_steps": (1, 2),
    "deep_steps": (2, 3),
    "supervision_steps": (2, 3),
    "rope_theta": (10000.0, 50.0),
    "rope_scaling": (None, 2.5),
}
MIXES = 14


def mixtures(axes, number, seed):
    """`number` settings for each family in turn, every axis drawn anew."""
    rng = random.Random(seed)
    families = itertools.cycle(("trm", "loop", "trm", "none"))
    return [{"recursion": next(families)} | {key: rng.choice(axes[key]) for key in axes} for _ in range(number)]


def singles(axes):
    """One setting per family and per value of each axis that is not the first."""
    changes = [{}] + [{key: value} for key in axes for value in axes[key][1:]]
    return [{"recursion": family} | change for family in ("trm", "loop", "none") for change in changes]


SHAPE_CASES = singles(AXES) + [{"recursion": "loop", "injection": "none"}] + mixtures(AXES, MIXES, seed=1)
TWIN_CASES = (
    singles(AXES)
    + [{"recursion": "trm", key: value} for key in TRAINING_AXES for value in TRAINING_AXES[key][1:]]
    + [{"recursion": "loop", "injection": "none", "gate": gate} for gate in (False, True)]
    + [{"recursion": "loop", "grad_deep_steps": 1, "deep_steps": 3}]
    + [{"recursion": family, "causal": False, "act_target": t} for family in ("trm", "loop") for t in ("correct", "stable")]
    + [{"recursion": "trm", "causal": False, "mixer": "mlp", "max_seq_len": 6, "norm": norm} for norm in AXES["norm"]]
    + mixtures(AXES | TRAINING_AXES, 2 * MIXES, seed=2)
)


def name(settings):
    return "-".join(str(value) if key == "recursion" else f"{key}={value}" for key, value in settings.items())


def batch(rows=2, length=6, seed=3):
    """ids and targets, some without a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY["vocab_size"], (rows, length), generator=generator)
    targets = torch.randint(0, TINY["vocab_size"], (rows, length), generator=generator)
    targets[0, 1] = targets[-1, -1] = IGNORE
    return ids, targets


# --- contract 2: the slow twin ------------------------------------------------------------------------------------


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
    slow = twin.forward(ids.tolist(), targets.tolist())
    slow["loss"].backward()
    fast = model(ids, targets, return_steps=True)
    model.zero_grad()
    fast.loss.backward()
    pairs = {key: (getattr(fast, field), slow[key]) for key, field in (("loss", "loss"), ("ce", "ce_loss"), ("act", "act_loss"))}
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


@pytest.mark.parametrize("settings", TWIN_CASES[::5], ids=name)
def test_slow_twin_float32(settings):
    """Against the float64 twin of the same fp32 weights: the norm of the error over the norm of the true value."""
    found = errors(build(**settings), dtype=torch.float64)
    assert max(found.values()) < 1e-5, found


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
    model = build(dtype=torch.float64, supervision_steps=3, supervision_weights=weights, act_target=act_target, coda_layers=1)
    ids, targets = batch()
    targets = some_right_targets(model, ids, targets)
    whole = model(ids, targets)
    whole.loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    shares, carry, loss = supervision_weights(weights, 3), None, 0.0
    for share in shares:
        out = model(ids, targets, supervision_steps=1, carry=carry)
        carry, part = out.carry, share / sum(shares) * out.loss
        part.backward()
        loss += part.item()
    assert carry.steps == 3
    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    for key, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[key]) < 1e-12, key


# --- contract 1: causality ----------------------------------------------------------------------------------------


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


# --- contract 5: the plain family is Llama ------------------------------------------------------------------------


def llama_with_weights_of(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ours, theirs = model.state_dict(), {}
    theirs["model.embed_tokens.weight"], theirs["lm_head.weight"] = ours["embed.weight"], ours["head.weight"]
    theirs["model.norm.weight"] = ours["net.norm.weight"]
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attn.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
    for layer in range(c.n_layers):
        a, b = f"net.blocks.{layer}.", f"model.layers.{layer}."
        theirs |= {f"{b}{new}.weight": ours[f"{a}{old}.weight"] for old, new in names.items()}
        q, k, v = ours[a + "attn.qkv.weight"].split([c.head_dim * n for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        gate, up = ours[a + "mlp.gate_up.weight"].chunk(2)
        theirs |= {f"{b}self_attn.{part}_proj.weight": w for part, w in (("q", q), ("k", k), ("v", v))}
        theirs |= {f"{b}mlp.gate_proj.weight": gate, f"{b}mlp.up_proj.weight": up}
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(theirs)
    return llama


@pytest.mark.parametrize("tied, kv_heads, theta", [(False, 4, 10000.0), (True, 4, 10000.0), (False, 2, 500000.0), (True, 1, 50.0)])
def test_plain_family_is_llama(tied, kv_heads, theta):
    model = build(recursion="none", norm="pre", tie_embeddings=tied, n_kv_heads=kv_heads, rope_theta=theta)
    llama = llama_with_weights_of(model)
    ids, _ = batch(length=16)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # Llama is told the positions; ours counts real tokens
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = llama(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], theirs[mask == 1], atol=1e-4, rtol=1e-4)


# --- contracts 6 and 7: learning, determinism ---------------------------------------------------------------------


def memorise(norm, noise=0, steps=120):
    """Train on 20 sequences of 12 tokens; the last `noise` targets of each are drawn anew every time.
    Returns the model, ids, targets."""
    torch.manual_seed(0)
    model = TRMModel(TRMConfig(**{**TINY, "d_model": 48, "d_ff": 96, "latent_steps": 1, "norm": norm}))
    sequences = torch.randint(0, TINY["vocab_size"], (20, 13))
    sequences[:, 0] = torch.arange(20)  # the first token tells the sequences apart
    ids, targets = sequences[:, :-1], sequences[:, 1:].clone()
    assert not (torch.sigmoid(model(ids).halt_logits) > 0.5).any()  # halting starts at no
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / steps)
        targets[:, 12 - noise :] = torch.randint(0, TINY["vocab_size"], (20, noise))
        out = model(ids, targets)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), ids, targets


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_memorises_twenty_sequences_and_halts(norm):
    model, ids, targets = memorise(norm)
    out = model(ids, targets)
    assert out.ce_loss < 0.05 and out.loss < 0.05
    halts = torch.sigmoid(out.halt_logits) > model.config.act_threshold
    assert halts.float().mean() > 0.95


def test_halting_tells_known_from_unknowable():
    model, ids, targets = memorise("pre", noise=4)
    targets[:, 8:] = IGNORE
    out = model(ids, targets)
    assert out.ce_loss < 0.2
    probability = torch.sigmoid(out.halt_logits)
    assert probability[:, :8].mean() > 0.9
    assert probability[:, 8:].mean() < 0.2


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


# --- contract 8: padding and documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", SHAPE_CASES[::3] + [{"causal": False}, {"positions": "learned", "causal": False}], ids=name)
def test_a_row_alone_is_the_row_in_a_padded_batch(settings, side):
    model = build(**settings)
    ids, _ = batch(rows=3, length=10)
    lengths = [4, 10, 7]
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, slice(10 - n, 10) if side == "left" else slice(0, n)] = 1
    together = model(ids, attention_mask=mask, return_steps=True).logits
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row] == 1], return_steps=True).logits[:, 0]
        torch.testing.assert_close(together[:, row, mask[row] == 1], alone, atol=1e-5, rtol=1e-5)


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
