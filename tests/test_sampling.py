"""Tests of the choice of the next token and of `generate`."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from src.model_config import ExitRule
from src.sampling import choose_token, filter_logits, generate, generate_ids

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log()[None]


def prompt(rows=3, length=5, seed=5):
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def sample(model, ids, number=12, **options):
    return torch.stack(list(generate(model, ids, number, **options)), dim=1)


def chi_square(counts, expected):
    """Sum of (observed - expected)^2 / expected over the tokens that can come."""
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(expected) if p > 0)


def tempered(temperature):
    weights = [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, expected",
    [
        (1.0, None, None, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (0.5, None, None, tempered(0.5)),
        (2.0, None, None, tempered(2.0)),
        (1.0, 2, None, [4 / 7, 3 / 7, 0, 0, 0]),
        (1.0, 99, None, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (1.0, None, 0.6, [4 / 7, 3 / 7, 0, 0, 0]),  # the first set whose mass reaches 0.6
        (1.0, None, 0.71, [4 / 8.5, 3 / 8.5, 1.5 / 8.5, 0, 0]),
        (1.0, None, 1.0, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (1.0, 3, 0.8, [4 / 7, 3 / 7, 0, 0, 0]),  # top_p of what top_k left: 0.4 + 0.3 of 0.85 is over 0.8
    ],
)
def test_frequencies_follow_the_distribution(temperature, top_k, top_p, expected):
    kept = filter_logits(LOGITS, temperature, top_k, top_p).softmax(-1)[0].tolist()
    assert kept == pytest.approx(expected, abs=1e-6)
    generators = [torch.Generator().manual_seed(seed) for seed in range(40)]
    draws = [choose_token(LOGITS.expand(40, 5), temperature, top_k, top_p, generators) for _ in range(100)]
    counts = Counter(torch.cat(draws).tolist())
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0)
    assert chi_square(counts, expected) < 20  # 4 degrees of freedom: 1 in 2,000 by chance, and the seeds are fixed


def test_greedy_three_ways():
    logits = torch.randn(8, 50)
    generators = [torch.Generator().manual_seed(row) for row in range(8)]
    best = logits.argmax(-1)
    for rule in ((0.0, None, None), (1.0, 1, None), (1.0, None, 1e-9), (1e-6, None, None)):
        assert torch.equal(choose_token(logits, *rule, generators), best), rule


def test_top_k_keeps_k_of_equal_logits():
    assert int(filter_logits(torch.zeros(1, 9), 1.0, 3, None).isfinite().sum()) == 3
    assert int(filter_logits(torch.zeros(1, 9), 1.0, None, 0.3).isfinite().sum()) == 3


def test_the_smallest_temperature_is_greedy():
    """Dividing by it must not overflow to infinity minus infinity."""
    logits = torch.tensor([[3.0, 9.0, -4.0]])
    assert choose_token(logits, 1e-40, None, None, [torch.Generator().manual_seed(0)]).item() == 1


def test_greedy_options_agree_in_generate(tiny):
    model, ids = tiny(), prompt()
    greedy = sample(model, ids, temperature=0)
    assert torch.equal(greedy, sample(model, ids, top_k=1, seed=3))
    assert torch.equal(greedy, sample(model, ids, top_p=1e-6, seed=3))
    assert torch.equal(greedy, model.generate(ids, 12, temperature=0)[:, 5:])


def test_seeds(tiny):
    model, ids = tiny(), prompt()
    first = sample(model, ids, seed=7)
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, sample(model, ids, seed=7))
    assert torch.equal(first, sample(model, ids, seed=7, use_cache=False))
    assert not torch.equal(first, sample(model, ids, seed=8))
    assert not torch.equal(sample(model, ids), sample(model, ids))  # no seed: a new one each time
    before = torch.get_rng_state()
    sample(model, ids)
    assert torch.equal(before, torch.get_rng_state())  # training's random numbers are left alone


def test_a_row_does_not_depend_on_the_rows_beside_it(tiny):
    model, ids = tiny(), prompt(rows=4)
    together = sample(model, ids, 20, seed=7)
    other = torch.cat((ids[:2], prompt(rows=2, seed=99)))
    assert torch.equal(together[:2], sample(model, other, 20, seed=7)[:2])
    assert torch.equal(together[:1], sample(model, ids[:1], 20, seed=7))


def test_rows_of_one_prompt_differ(tiny):
    rows = sample(tiny(), prompt(rows=1).expand(6, -1), seed=0)
    assert len({tuple(row) for row in rows.tolist()}) == 6


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [None, 2])
def test_rows_are_filled_after_eos(tiny, pad, use_cache):
    model, ids = tiny(pad_token_id=pad), prompt()
    free = sample(model, ids, 10, temperature=0)
    eos = int(free[0, 3])  # row 0 meets it in step 3 at the latest; the others run as without it until they do
    rows = sample(model, ids, 10, temperature=0, eos_id=eos, use_cache=use_cache)
    ends = []
    for row in range(3):
        hits = (free[row] == eos).nonzero().flatten().tolist()
        ends.append(hits[0] + 1 if hits else 10)
        kept = min(ends[-1], rows.shape[1])
        assert rows[row, :kept].tolist() == free[row, :kept].tolist()
        assert set(rows[row, kept:].tolist()) <= {eos if pad is None else pad}
    assert ends[0] <= 4 and rows.shape[1] == max(ends)  # it ends when every row has ended
    whole = model.generate(ids, 10, temperature=0, eos_id=eos)
    assert whole.shape == (3, 15)
    assert torch.equal(whole[:, :5], ids) and torch.equal(whole[:, 5 : 5 + rows.shape[1]], rows)
    assert set(whole[:, 5 + rows.shape[1] :].flatten().tolist()) <= {eos if pad is None else pad}


def test_the_depths_of_rows_that_have_ended_are_0(tiny):
    model, ids, depths = tiny(pad_token_id=2), prompt(), []
    eos = int(sample(model, ids, 10, temperature=0)[0, 3])
    rule = ExitRule("kl", 3, kl_threshold=0.0)  # a step never changes anything by less
    rows = sample(model, ids, 10, temperature=0, eos_id=eos, exit=rule, depths=depths)
    seen = torch.stack(depths, dim=1)
    is_after = (rows == eos).cumsum(1) - (rows == eos).int() > 0
    assert bool(is_after.any()) and torch.equal(seen == 0, is_after) and set(seen.unique().tolist()) == {0, 3}


def test_zero_new_tokens_and_a_prompt_of_one_token(tiny):
    model, ids = tiny(), prompt(length=1)
    assert torch.equal(model.generate(ids, 0), ids)
    assert model.generate(ids, 1, seed=0).shape == (3, 2)


def test_tokens_come_one_at_a_time_and_the_mode_is_restored(tiny):
    model = tiny(dropout=0.5).train()
    stream = generate(model, prompt(), 9, temperature=0)
    first = next(stream)
    assert first.shape == (3,) and first.dtype == torch.long and not first.requires_grad
    stream.close()
    assert model.training
    assert torch.equal(first, next(generate(model.eval(), prompt(), 9, temperature=0)))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt"),
        ({"prompt_ids": torch.zeros(1, 17, dtype=torch.long)}, "17 tokens"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "left"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "attention_mask"),
    ],
)
def test_refusals_name_what_is_wrong(tiny, options, word):
    arguments = {"prompt_ids": torch.zeros(1, 3, dtype=torch.long), "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=word):
        list(generate(tiny(), **arguments))


@pytest.mark.parametrize("use_cache", [True, False])
def test_any_mask_but_0_is_a_real_token(tiny, use_cache):
    """In training, numbers are documents; new tokens belong to that of the prompt, with and without a cache."""
    model, ids = tiny(), torch.tensor([[0, 3, 4, 5, 6], [7, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 2, 2, 2, 2], [1, 1, 1, 1, 1]])
    options = {"temperature": 0, "use_cache": use_cache}
    expected = generate_ids(model, ids, 6, attention_mask=(mask > 0).long(), **options)
    assert torch.equal(generate_ids(model, ids, 6, attention_mask=mask, **options), expected)


def test_a_model_that_looks_ahead_does_not_generate(tiny):
    with pytest.raises(ValueError, match="causal"):
        next(generate(tiny(causal=False), prompt(), 1))


class Counting:
    """A stand-in for a model that always says token + 1, so that the plumbing is checked without a network."""

    config = SimpleNamespace(max_seq_len=8, pad_token_id=None, causal=True)
    training = False

    def __call__(self, ids, attention_mask=None, cache=None):
        return SimpleNamespace(logits=torch.nn.functional.one_hot((ids + 1) % 50, 50).float())

    def train(self, mode=True):
        return self

    eval = train


def test_counting_past_the_context():
    stream = generate(Counting(), torch.tensor([[1], [30]]), 20, temperature=0, use_cache=False)
    assert torch.stack(list(stream), dim=1).tolist() == [[*range(2, 22)], [*range(31, 50), 0]]


def test_no_end_at_all(tiny):
    model, ids = tiny(), torch.tensor([[3, 4]])
    assert torch.equal(
        model.generate(ids, 4, temperature=0, eos_id=[]), model.generate(ids, 4, temperature=0, eos_id=None)
    )
