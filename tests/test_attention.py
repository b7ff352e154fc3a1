"""Tests of the custom backward pass of attention against torch's, and of the cases in which it is not used."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from src import attention as module
from src.attention import MOST_SCORES, attention

HEADS = [(4, 4), (4, 2), (4, 1)]


def inputs(T, heads=(4, 4), size=1.0, seed=0):
    """bf16 q (2, H, T, 32), k and v (2, K, T, 32), and the gradient of the output; `size` is that of the scores."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n, T, 32) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(s, generator=generator) for s in shapes)
    return tuple(t.bfloat16() for t in (q * size**0.5, k * size**0.5, v, grad))


def ours(q, k, v):
    return attention(q, k, v, None, True, 0.0)


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def run(f, q, k, v, grad, dtype):
    """Output and gradients of q, k, v, in fp32."""
    q, k, v = (t.detach().clone().to(dtype).requires_grad_() for t in (q, k, v))
    out = f(q, k, v)
    out.backward(grad.to(dtype))
    return [t.detach().float() for t in (out, q.grad, k.grad, v.grad)]


def is_ours(f, *args):
    out = f(*args)
    return "CausalCPU" in type(out.grad_fn).__name__


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("T", [7, 64, 256])
def test_gradients_are_as_good_as_torchs(T, heads, size):
    args = inputs(T, heads, size)
    assert is_ours(ours, *(t.requires_grad_() for t in args[:3]))
    args = tuple(t.detach() for t in args)
    exact = run(torchs, *args, torch.float32)
    mine, torch_bf16 = run(ours, *args, torch.bfloat16), run(torchs, *args, torch.bfloat16)
    for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v"), mine, torch_bf16, exact):
        error, usual = (((x - c).norm() / c.norm()).item() for x in (a, b))
        assert error <= 1.5 * usual + 1e-4, f"{name}: relative error {error:.4f}, torch's own bf16 {usual:.4f}"


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_one_token(heads):
    """With one key the softmax is 1: the output is v, and q and k get (nearly) nothing."""
    q, k, v, grad = inputs(1, heads)
    out, grad_q, grad_k, grad_v = run(ours, q, k, v, grad, torch.bfloat16)
    groups = heads[0] // heads[1]
    assert torch.equal(out, v.float().repeat_interleave(groups, 1))
    summed = grad.float().unflatten(1, (heads[1], groups)).sum(2)
    assert torch.allclose(grad_v, summed, rtol=0.02, atol=0.02)  # bf16 sums of a group
    assert max(grad_q.abs().max(), grad_k.abs().max()) < 0.02 * grad.abs().max()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_past_does_not_see_the_future(heads):
    q, k, v, grad = (t.requires_grad_() for t in inputs(64, heads))
    base = ours(q, k, v)
    for j in (1, 30, 63):
        others = [t.detach().clone() for t in (q, k, v)]
        for t in others:
            t[:, :, j:] = torch.randn_like(t[:, :, j:])
        assert torch.equal(ours(*(t.requires_grad_() for t in others))[:, :, :j], base[:, :, :j])
    out = ours(q, k, v)
    out[:, :, :20].float().sum().backward()  # no gradient flows to the future either
    assert not k.grad[:, :, 20:].any() and not v.grad[:, :, 20:].any() and not q.grad[:, :, 20:].any()
    assert k.grad[:, :, :20].any()


def test_same_output_with_and_without_gradient():
    q, k, v, _ = inputs(64, (4, 2))
    with torch.no_grad():
        plain = ours(q, k, v)
    trained = ours(q.requires_grad_(), k, v)
    assert (plain.float() - trained.detach().float()).abs().max() <= 2**-7  # a rounding of bf16 near 1


class TestStepsAside:
    """Where torch is not slow, or the fast pass would be wrong, torch's own runs."""

    def of(self, q, k=None, mask=None, is_causal=True, dropout=0.0):
        k = q if k is None else k
        return is_ours(attention, q, k, k, mask, is_causal, dropout)

    def test_runs_where_it_should(self):
        assert self.of(inputs(8)[0].requires_grad_())

    def test_other_cases(self):
        q = inputs(8)[0].requires_grad_()
        assert not self.of(q, mask=torch.ones(8, 8, dtype=torch.bool).tril(), is_causal=False)
        assert not self.of(q, is_causal=False)
        assert not self.of(q, dropout=0.1)
        assert not self.of(q.detach().float().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):  # a cache in fp32
            assert not self.of(q, k=inputs(8)[1].float())
        with torch.no_grad():
            assert attention(q, q, q, None, True, 0.0).grad_fn is None

    def test_more_scores_than_fit(self, monkeypatch):
        q = inputs(8)[0].requires_grad_()
        monkeypatch.setattr(module, "MOST_SCORES", 2 * 4 * 8 * 8)
        assert self.of(q)
        monkeypatch.setattr(module, "MOST_SCORES", 2 * 4 * 8 * 8 - 1)
        assert not self.of(q)
        assert MOST_SCORES * 4 <= 2**30  # bytes of one fp32 tensor of scores

    def test_keys_of_another_length(self):
        q, k = inputs(8)[0].requires_grad_(), inputs(5)[1]
        out = attention(q, k, k, None, True, 0.0)
        out.float().sum().backward()
        assert q.grad.shape == q.shape

    def test_mask_equals_causal(self):
        q, k, v, grad = inputs(16, (4, 2))
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            a = run(lambda *t: attention(*t, mask, False, 0.0), q, k, v, grad, dtype)
            b = run(ours, q, k, v, grad, dtype)
            assert all(torch.allclose(x, y, atol=tolerance * 4, rtol=tolerance) for x, y in zip(a, b))

    def test_no_second_derivative_rather_than_a_wrong_one(self):
        q = inputs(8)[0].requires_grad_()
        (grad,) = torch.autograd.grad(ours(q, q, q).float().pow(2).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.float().pow(2).sum(), q)


def test_heads_of_the_model_take_this_path(tiny):
    """A causal bf16 model in training uses it: else the tests above are of dead code."""
    seen = []
    real = module._CausalCPU.apply
    try:
        module._CausalCPU.apply = lambda *a: seen.append(a[0].shape) or real(*a)
        model = tiny(n_kv_heads=2).train()
        ids = torch.randint(0, 23, (2, 8))
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, ids).loss.backward()
    finally:
        del module._CausalCPU.apply
    assert seen and all(shape == (2, 4, 8, 4) for shape in seen)


def test_under_gradient_checkpointing():
    """Recomputation hands out what was saved for the backward pass once."""
    q, k, v, grad = inputs(16)
    args = [t.requires_grad_() for t in (q, k, v)]
    plain = torch.autograd.grad(ours(*args), args, grad)
    again = torch.autograd.grad(checkpoint(ours, *args, use_reentrant=False), args, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


# --- short rows without a causal mask, in bf16 ---


def full(q, k, v):
    return attention(q, k, v, None, False, 0.0)


def torchs_full(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("T", [2, 81, module.SHORT])
def test_short_rows_are_as_good_as_torchs(T, size):
    args = inputs(T, size=size)
    exact = run(torchs_full, *args, torch.float32)
    mine, torch_bf16 = run(full, *args, torch.bfloat16), run(torchs_full, *args, torch.bfloat16)
    for name, a, b, c in zip(("out", "grad_q", "grad_k", "grad_v"), mine, torch_bf16, exact):
        error, usual = (((x - c).norm() / c.norm()).item() for x in (a, b))
        assert error <= 1.5 * usual + 1e-4, f"{name}: relative error {error:.4f}, torch's own bf16 {usual:.4f}"


def test_only_short_rows_of_equal_heads_are_products(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_by_products", lambda q, k, v: calls.append(q.shape[2]) or torch.zeros_like(q))
    for T, heads in ((16, (4, 4)), (module.SHORT + 1, (4, 4)), (16, (4, 2)), (1, (4, 4))):
        full(*inputs(T, heads)[:3])
    q, k, v, _ = inputs(16)
    full(q.float(), k.float(), v.float())
    attention(q, k, v, torch.ones(16, 16, dtype=torch.bool), False, 0.0)
    attention(q, k, v, None, False, 0.1)
    assert calls == [16]
