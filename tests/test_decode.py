"""Tests that `decode_one_token` computes the same as the ordinary blocks."""

import weakref

import pytest
import torch
from test_cache import CASES, LEFT_PADDED, chunked, name, prompt

from src import decode, layers
from src.cache import cache_slots
from src.checkpoint import own_state
from src.decode import store_for_decoding


def by_tokens(model, ids, mask, plain):
    """Logits of ids (B, T), fed to a cache one token a time after the first four."""
    with torch.set_grad_enabled(plain):
        cache = model.new_cache(len(ids))
        parts = [model(ids[:, :4], attention_mask=None if mask is None else mask[:, :4], cache=cache).logits]
        for t in range(4, ids.shape[1]):
            column = None if mask is None else mask[:, t : t + 1]
            parts.append(model(ids[:, t : t + 1], attention_mask=column, cache=cache).logits)
    return torch.cat(parts, dim=1).detach()


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_is_the_plain_form(tiny, case, mask, monkeypatch):
    model, ids = tiny(**case).double(), prompt()
    for block in (*model.prelude, *model.net.blocks, *model.coda):
        for norm in (block.attn_norm, block.mlp_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # a gain of 1 would hide a forgotten one
    slots, decode_block = [], decode.decode_block
    monkeypatch.setattr(decode, "decode_block", lambda *args: slots.append(args[-1]) or decode_block(*args))
    quick = by_tokens(model, ids, mask, False)
    assert slots == list(range(cache_slots(model.config))) * 6  # each block of each visit, for each single token
    plain = by_tokens(model, ids, mask, True)
    assert len(slots) == 6 * cache_slots(model.config)
    torch.testing.assert_close(quick, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_bf16_is_the_plain_form_up_to_rounding(tiny, case):
    model, ids = tiny(**case).bfloat16(), prompt()
    quick, plain = (by_tokens(model, ids, LEFT_PADDED, form).float() for form in (False, True))
    error = (quick - plain)[LEFT_PADDED.bool()].norm() / plain[LEFT_PADDED.bool()].norm()
    assert error < 0.05  # 8 bits a number, rounded at each of up to 18 visits


@pytest.mark.parametrize("tied", [False, True])
def test_stored_for_decoding_the_model_is_the_same(tiny, tied):
    model, ids = tiny(recursion="trm", injection="concat", tie_embeddings=tied), prompt()
    before, logits = {n: t.clone() for n, t in model.state_dict().items()}, model(ids).logits
    assert store_for_decoding(model) is model
    block = model.net.blocks[0]
    assert block.attn.qkv.weight.stride() == (1, before["net.blocks.0.attn.qkv.weight"].shape[0])
    assert block.mlp.down.weight.is_contiguous()  # it narrows
    assert model.head.weight.is_contiguous() == tied and model.embed.weight.is_contiguous()
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=0)
    saved = own_state(model)
    assert all(torch.equal(t, before[n]) for n, t in saved.items())


def test_only_fp32_is_stored_otherwise(tiny):
    model = store_for_decoding(tiny(recursion="loop").bfloat16())
    assert all(p.is_contiguous() for p in model.parameters())


def test_what_was_looked_up_goes_with_its_cache(tiny):
    model, ids, logits = tiny(recursion="loop"), prompt()[:, :1], []
    for _ in range(2):
        cache = model.new_cache(3)
        with torch.no_grad():
            logits.append(model(ids, cache=cache).logits)
            torch.testing.assert_close(logits[-1], model(ids).logits, atol=1e-5, rtol=0)
        assert set(model.net.blocks) == set(cache.decoding.blocks)
        held, cache = weakref.ref(cache), None
        assert held() is None
        model.net.blocks[0].mlp.down.weight.data = torch.zeros_like(model.net.blocks[0].mlp.down.weight)
    assert (logits[1] - logits[0]).norm() > 0.01 * logits[0].norm()


@torch.no_grad()
def test_rotary_positions_are_made_once_a_text(tiny, monkeypatch):
    model, asked, rotary_table = tiny(), [], layers.rotary_table
    monkeypatch.setattr(layers, "rotary_table", lambda p, *rope: asked.append(p.tolist()) or rotary_table(p, *rope))
    by_tokens(model, prompt(), LEFT_PADDED, False)
    assert asked == [(LEFT_PADDED[:, :4].cumsum(1) - 1).clamp(min=0).tolist(), [list(range(16))]]


@torch.no_grad()
def test_in_training_the_plain_form_runs(tiny):
    """With its dropout, and with its rotary positions."""
    model, ids = tiny(dropout=0.5).train(), prompt()
    cache = model.new_cache(3)
    model(ids[:, :4], cache=cache)
    first = model(ids[:, 4:5], cache=cache).logits
    cache.length -= 1
    assert not torch.equal(model(ids[:, 4:5], cache=cache).logits, first) and cache.decoding is None
    model = tiny().train()
    torch.testing.assert_close(chunked(model, ids, [4] + [1] * 6), model(ids).logits, atol=1e-5, rtol=0)
