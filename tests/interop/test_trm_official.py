"""Golden tensors of the authors' code: the same weights give the same logits, states, halting logits and loss."""

import json
from pathlib import Path

import pytest
import torch
from reference import Twin
from safetensors.torch import load_file

from src.errors import UserError
from src.interop.trm_official import is_official, read_official, strip_names, write_official
from src.model import TRMModel

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "trm_official"
NAMES = [f"{kind}_prefix{prefix}" for kind in ("att", "mlp") for prefix in (0, 16)]
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden tensors of the authors' code are not there")


def golden(name):
    """(their settings, their weights, {name of a golden tensor: tensor})."""
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {n.removeprefix("weights."): tensors.pop(n) for n in list(tensors) if n.startswith("weights.")}
    return settings, weights, tensors


def model_of(name, dtype=torch.float32):
    settings, weights, tensors = golden(name)
    config, ours = read_official(weights, name, settings)
    model = TRMModel(config)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not missing and not unexpected
    return model.to(dtype).eval(), tensors


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_two_supervision_steps(name):
    """In fp32; the mlp mixer amplifies rounding."""
    model, expected = model_of(name)
    labels = torch.where(expected["labels"] < 0, -100, expected["labels"])
    carry = None
    for step, tolerance in ((1, 1e-5 if name.startswith("att") else 1e-4), (2, 1e-3)):
        out = model(
            expected["inputs"], labels, supervision_steps=1, carry=carry, puzzle_ids=expected.get("puzzle_identifiers")
        )
        carry = out.carry
        found = {"logits": out.logits, "q_halt_logits": out.halt_logits, "z_H": carry.y, "z_L": carry.z}
        found["loss"] = out.loss
        for what, tensor in found.items():
            theirs = expected[f"step{step}.{what}"]
            assert tensor.shape == theirs.shape
            error = (tensor.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1)
            assert error < tolerance, (what, step, error.item())


@needs_golden
@pytest.mark.parametrize("name", ["att_prefix16", "mlp_prefix16"])
def test_the_slow_twin_agrees(name):
    """In float64, on rows cut to their first cells where the mixer allows it."""
    model, expected = model_of(name, torch.float64)
    cells = 81 if name.startswith("mlp") else 12
    ids, labels = expected["inputs"][:2, :cells], expected["labels"][:2, :cells]
    puzzles = expected["puzzle_identifiers"][:2]
    fast = model(ids, labels, supervision_steps=1, puzzle_ids=puzzles)
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        twin = Twin(model.config.to_dict(), weights)
        slow = twin.forward(ids.tolist(), labels.tolist(), steps=1, puzzles=puzzles.tolist())
    assert (fast.logits - slow["logits"][-1]).abs().max() < 1e-9
    assert abs(fast.loss.item() - slow["loss"].item()) < 1e-9


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_written_back_nothing_is_lost(name):
    settings, weights, _ = golden(name)
    config, ours = read_official(weights, name, settings)
    theirs, told = write_official(config, ours, name)
    again, back = read_official(theirs, name, told | {"seq_len": 81})
    assert again == config and all(torch.equal(back[key], ours[key]) for key in ours)
    own, written = strip_names(weights), strip_names(theirs)
    assert own.keys() == written.keys()
    for key in own.keys() - {"q_head.weight", "q_head.bias"}:
        assert torch.equal(own[key], written[key])


@needs_golden
def test_names_of_wrappers():
    settings, weights, _ = golden("att_prefix0")
    wrapped = {f"_orig_mod.model.{name}": tensor for name, tensor in weights.items()}
    assert is_official(wrapped) and not is_official({"tok_embeddings.weight": 0})
    config, ours = read_official(wrapped, "x", settings)
    assert config == read_official(weights, "x", settings)[0] and "net.blocks.1.attn.qkv.weight" in ours


@needs_golden
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s: w.update(other=torch.zeros(1)), "other is not a weight of TRM"),
        (lambda w, s: s.pop("num_heads"), "'num_heads' is missing"),
        (lambda w, s: w.pop("inner.embed_tokens.embedding_weight"), "'embed_tokens.embedding_weight' is missing"),
        (lambda w, s: s.update(num_heads=3), "d_model 64 does not divide into n_heads 3"),
        (lambda w, s: w.update({"inner.H_init": torch.full((64,), float("nan"))}), "NaN"),
    ],
    ids=["unknown weight", "no heads", "no embedding", "odd heads", "NaN"],
)
def test_refused(change, message):
    settings, weights, _ = golden("att_prefix0")
    change(weights, settings)
    with pytest.raises(UserError, match=message):
        read_official(weights, "theirs.pt", settings)


def test_models_that_their_code_cannot_hold(tiny):
    for settings, message in (({}, "causal model"), ({"causal": False}, "embed_scale"), ({"recursion": "loop"}, "trm")):
        model = tiny(**settings)
        with pytest.raises(UserError, match=message):
            write_official(model.config, model.state_dict(), "runs/x")
    model = tiny(causal=False, embed_scale=4.0)
    with pytest.raises(UserError, match="hidden width 24"):
        write_official(model.config, model.state_dict(), "runs/x")
    model = tiny(causal=False, embed_scale=4.0, d_ff=256)
    with pytest.raises(UserError, match="is not 1"):
        write_official(model.config, model.state_dict(), "runs/x")
