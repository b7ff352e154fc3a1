"""Dropout on the CPU: the probabilities, the gradient, and the same masks with and without compilation."""

import pytest
import torch
import torch.nn.functional as F

from src.attention import attention
from src.dropout import Dropout, random_words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_elements_are_0_with_probability_p_and_have_mean_1(p):
    torch.manual_seed(0)
    factors = Dropout(p)(torch.ones(1000, 203))
    kept = factors[factors != 0]
    error = (p * (1 - p) / factors.numel()) ** 0.5
    assert (factors == 0).float().mean() == pytest.approx(p, abs=4 * error + 1e-5)
    assert kept.unique().numel() == 1 and kept[0] == pytest.approx(1 / (1 - p), rel=1e-3)
    places = factors.view(-1, 4)  # the four parts of a random number are alike
    assert torch.allclose((places == 0).float().mean(0), torch.tensor(p), atol=8 * error)
    assert (factors[0] != factors[1]).any()


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_extreme_probabilities_stay_inside_0_and_1(p):
    y = Dropout(p)(torch.ones(64))
    assert y.isfinite().all() and (y == 0).any() == (p > 0.5)


@pytest.mark.parametrize("size", [(), (0,), (1,), (3, 5), (4,)])
def test_random_words_of_any_size(size):
    words = random_words(torch.ones(size))
    assert words.shape == size and words.dtype == torch.int16


def test_dropout_is_off_in_evaluation_and_without_probability():
    x = torch.randn(8, 8)
    assert Dropout(0.5).eval()(x) is x and torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_dropout_has_the_same_masks_and_two_calls_have_their_own(backend):
    first, second = Dropout(0.3), Dropout(0.3)

    def both(x):
        return torch.stack((first(x), second(1 * x)))

    x = torch.ones(40, 30, requires_grad=True)
    found = []
    for function in (both, torch.compile(both, backend=backend)):
        torch.manual_seed(5)
        y = function(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        found.append((y, gradient))
    (eager, by_eager), (compiled, by_compiled) = found
    assert torch.equal(eager, compiled) and torch.equal(by_eager, by_compiled)
    assert torch.equal(by_eager, eager.sum(0)) and (eager[0] != eager[1]).any()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_with_dropout_is_that_of_its_equation(is_causal, masked, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 5, 8, dtype=torch.float64, requires_grad=True) for n in (4, kv_heads, kv_heads))
    mask = torch.rand(2, 1, 5, 5) < 0.7 if masked else None
    if masked:
        mask |= torch.eye(5, dtype=torch.bool)
        mask[0, 0, 4] = False  # a query that sees no key, as in padding
    torch.manual_seed(1)
    found = attention(q, k, v, mask, is_causal and not masked, 0.4)
    torch.manual_seed(1)
    factors = Dropout(0.4)(torch.ones(2, 4, 5, 5, dtype=torch.float64))
    seen = mask if masked else torch.ones(5, 5, dtype=torch.bool).tril() if is_causal else None
    wide = [t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v)]
    bias = 0 if seen is None else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    expected = (F.softmax(q @ wide[0].mT / 8**0.5 + bias, -1) * factors) @ wide[1]
    real = slice(None) if not masked else slice(1, None)  # rows without a padded query
    assert torch.allclose(found[real], expected[real], atol=1e-12) and found.isfinite().all()
    grads = [torch.autograd.grad(each[real].square().sum(), (q, k, v), retain_graph=True) for each in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*grads))


def test_attention_with_dropout_has_the_mean_of_attention_without():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    many = torch.stack([attention(q, k, v, None, True, 0.2) for _ in range(4000)])
    error = many.std(0) / 4000**0.5
    assert ((many.mean(0) - attention(q, k, v, None, True, 0.0)).abs() < 5 * error + 1e-6).all()
