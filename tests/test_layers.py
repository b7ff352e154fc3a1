"""Tests of the layers, each against its equation in plain numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.attention import attention
from src.layers import Attention, Context, MLPMixer1D, RMSNorm, SwiGLU, apply_rotary_emb, rotary_table
from src.model import TRMConfig

NOTHING = Context(rotary=None, mask=None, is_causal=False, cache=None)


def test_rms_norm():
    norm, x = RMSNorm(6, 1e-5), torch.randn(3, 4, 6) * 7
    nn.init.uniform_(norm.weight)
    for row, out in zip(x.reshape(-1, 6).tolist(), norm(x).reshape(-1, 6).tolist()):
        rms = math.sqrt(sum(v * v for v in row) / 6 + 1e-5)
        assert out == pytest.approx([v / rms * w for v, w in zip(row, norm.weight.tolist())], rel=1e-5)
    assert torch.equal(norm(torch.zeros(2, 6)), torch.zeros(2, 6))


def test_rms_norm_uses_its_eps():
    tiny = torch.full((1, 4), 1e-3)
    assert RMSNorm(4, 1.0)(tiny)[0, 0].item() == pytest.approx(1e-3, rel=1e-4)
    assert RMSNorm(4, 1e-12)(tiny)[0, 0].item() == pytest.approx(1.0, rel=1e-4)


def test_swiglu():
    layer, x = SwiGLU(4, 3), torch.randn(2, 4)
    gate_up, down = layer.gate_up.weight.tolist(), layer.down.weight.tolist()
    for row, out in zip(x.tolist(), layer(x).tolist()):
        hidden = [sum(w * v for w, v in zip(weights, row)) for weights in gate_up]
        inner = [hidden[i] / (1 + math.exp(-hidden[i])) * hidden[3 + i] for i in range(3)]  # gate rows first
        assert out == pytest.approx([sum(w * v for w, v in zip(weights, inner)) for weights in down], abs=1e-5)


@pytest.mark.parametrize("scaling", [None, 4.0])
@pytest.mark.parametrize("theta", [10000.0, 17.0])
def test_rotary_turns_channel_pairs(theta, scaling):
    """Channels i and i + E/2 are one complex number, turned by position * theta^(-2i/E)."""
    positions, x = torch.tensor([[0, 1, 5, 1000]]), torch.randn(1, 2, 4, 8, dtype=torch.float64)
    out = apply_rotary_emb(x, *rotary_table(positions, 8, theta, scaling, torch.float64))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    for t, position in enumerate(positions[0].tolist()):
        for i in range(4):
            angle = position / (scaling or 1) * theta ** (-i / 4)
            turned = pairs[0, :, t, i] * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(out[0, :, t, i], turned.real)
            torch.testing.assert_close(out[0, :, t, i + 4], turned.imag)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def score(i, j):
        turn = [rotary_table(torch.tensor([[p]]), 8, 10000.0, None, torch.float64) for p in (i, j)]
        return (apply_rotary_emb(q, *turn[0]) * apply_rotary_emb(k, *turn[1])).sum().item()

    assert score(3, 1) == pytest.approx(score(103, 101), rel=1e-9)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-3)


def test_rotary_table_of_a_half_precision_model_is_exact():
    """bfloat16 holds 8 bits, so 4001 and 4000 would be one position."""
    cos, _ = rotary_table(torch.tensor([[4000, 4001]]), 8, 10000.0, None, torch.bfloat16)
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(4000), abs=1e-3)
    assert cos[0, 0, 1, 0].item() == pytest.approx(math.cos(4001), abs=1e-3)
    x = torch.randn(1, 1, 2, 8).bfloat16()
    assert apply_rotary_emb(x, *rotary_table(torch.tensor([[0, 1]]), 8, 1e4, None, x.dtype)).dtype == torch.bfloat16


def attention_of(d_model, n_heads, n_kv_heads, **options):
    return Attention(TRMConfig(d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, **options))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_repeated_heads(kv_heads):
    """Grouped attention equals attention with each key/value head written out for all query heads of its group."""
    grouped, full = attention_of(16, 4, kv_heads), attention_of(16, 4, 4)
    q, k, v = grouped.qkv.weight.split([16, 4 * kv_heads, 4 * kv_heads])
    repeated = [w.view(kv_heads, 4, 16).repeat_interleave(4 // kv_heads, dim=0).reshape(16, 16) for w in (k, v)]
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([q, *repeated]))
        full.out.weight.copy_(grouped.out.weight)
    x = torch.randn(2, 5, 16)
    for is_causal in (True, False):
        ctx = NOTHING._replace(is_causal=is_causal)
        torch.testing.assert_close(grouped(x, ctx, 0), full(x, ctx, 0))


def test_attention_of_equal_keys_is_the_mean_of_the_values():
    layer = attention_of(8, 2, 2)
    with torch.no_grad():
        layer.qkv.weight[8:16] = 0  # all keys are zero: every visible position has the same weight
        layer.qkv.weight[16:].copy_(torch.eye(8))
        layer.out.weight.copy_(torch.eye(8))
    x = torch.randn(1, 4, 8)
    expected = torch.stack([x[0, : t + 1].mean(0) for t in range(4)])
    torch.testing.assert_close(layer(x, NOTHING._replace(is_causal=True), 0)[0], expected)
    mask = torch.tensor([[[[1, 0, 0, 1]] * 4]]).bool()
    torch.testing.assert_close(layer(x, NOTHING._replace(mask=mask), 0)[0, 2], (x[0, 0] + x[0, 3]) / 2)


def test_attention_dropout_acts_in_training_only():
    layer, x = attention_of(8, 2, 2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x, NOTHING, 0), layer(x, NOTHING, 0))
    layer.eval()
    assert torch.equal(layer(x, NOTHING, 0), layer(x, NOTHING, 0))


def test_mixer_mixes_the_sequence_channel_by_channel():
    mixer, x = MLPMixer1D(5, 7), torch.randn(2, 5, 3)
    out = mixer(x, NOTHING, 0)
    for channel in range(3):
        torch.testing.assert_close(out[:, :, channel], mixer.mlp(x[:, :, channel]))


def gradients(q, k, v, weights, dtype, attend):
    """Output and gradients of sum(weights * attention), computed in dtype, as float64."""
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    out.backward(weights.to(dtype))
    return [t.double() for t in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length, size", [(2, 4), (9, 3), (33, 16), (200, 32)])
def test_bfloat16_backward_is_as_near_the_truth_as_torchs(kv_heads, length, size):
    """Written-out causal attention in float64 is the truth; large scores, so that few keys carry all the weight."""
    q, k, v, weights = (torch.randn(2, heads, length, size).bfloat16() for heads in (4, kv_heads, kv_heads, 4))
    q = 3 * q

    def slow(q, k, v):
        k, v = (t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
        future = torch.ones(length, length).triu(1).bool()
        return (q @ k.mT / math.sqrt(size)).masked_fill(future, -math.inf).softmax(-1) @ v

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(q, k, v):
        return attention(q, k, v, None, True, 0.0)

    truth = gradients(q, k, v, weights, torch.float64, slow)
    exact = gradients(q, k, v, weights, torch.float32, ours)
    half, reference = (gradients(q, k, v, weights, torch.bfloat16, f) for f in (ours, torchs))
    for true, a, b, c in zip(truth, exact, half, reference):
        assert (a - true).norm() < 1e-5 * true.norm()
        assert (b - true).norm() < 5e-2 * true.norm()  # bf16 keeps 8 bits, and a row of two tokens cancels
        assert (b - true).norm() < 1.5 * (c - true).norm() + 1e-3 * true.norm()


def test_bfloat16_attention_of_scores_that_overflow_exp():
    """A hidden future score far above the visible ones must not leak as infinity times zero."""
    q = torch.full((1, 1, 3, 8), 30.0).bfloat16().requires_grad_()
    k = torch.tensor([-30.0, 1.0, 30.0])[None, None, :, None].expand(1, 1, 3, 8).bfloat16().requires_grad_()
    v = torch.randn(1, 1, 3, 8).bfloat16().requires_grad_()
    attention(q, k, v, None, True, 0.0).sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_a_mask_that_mixer_mlp_cannot_follow_is_refused(tiny):
    model = tiny(mixer="mlp", causal=False, positions="none")
    ids = torch.zeros(2, model.config.max_seq_len, dtype=torch.long)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="mixer mlp mixes all positions"):
        model(ids, attention_mask=torch.ones_like(ids).tril())
