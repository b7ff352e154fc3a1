"""Tests of exit rules against a reference that runs token by token, with and without cache, alone and in a batch."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TokenTwin
from test_cache import configurations, padded_prompts

from src.exits import ExitRule, max_depth, visits_per_recursion_step
from src.losses import kl_divergence
from src.sampling import generate

CASES = [
    {"recursion": "loop", "deep_steps": 4, "n_kv_heads": 1},
    {"recursion": "loop", "deep_steps": 3, "injection": "none", "positions": "none"},
    {"recursion": "loop", "deep_steps": 3, "injection": "concat", "gate": True, "coda_layers": 2},
    {"recursion": "loop", "deep_steps": 4, "halting": True, "attention_window": 3},
    {"recursion": "trm", "supervision_steps": 4},
    {"recursion": "trm", "supervision_steps": 3, "n_kv_heads": 2, "prelude_layers": 2, "coda_layers": 1, "norm": "pre"},
    {"recursion": "trm", "supervision_steps": 3, "injection": "concat", "gate": True, "positions": "learned"},
    {"recursion": "trm", "supervision_steps": 3, "norm": "sandwich", "qk_norm": True, "tie_embeddings": True},
    {"recursion": "loop", "deep_steps": 3, "attention_gate": True, "n_kv_heads": 2},
]
LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 9 + [1]])
M = TINY["max_seq_len"]


def name(case):
    return "-".join(str(value) if key == "recursion" else f"{key}={value}" for key, value in case.items())


def prompt(rows=3, length=10, seed=5):
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def between(values):
    """A number in the widest gap among the middle half: no value is so near that rounding would move it across."""
    middle = values.flatten().sort().values[values.numel() // 4 : -(values.numel() // 4)]
    widest = middle.diff().argmax()
    return ((middle[widest] + middle[widest + 1]) / 2).item()


def rules(model, ids, depth=None):
    """A rule of each kind under which some tokens leave early."""
    steps = model(ids, exit=ExitRule(max_recursion_depth=depth), return_steps=True)
    change = kl_divergence(steps.logits[1:], steps.logits[:-1])
    found = [ExitRule("kl", depth, kl_threshold=between(change))]
    if steps.halt_logits is not None:
        found.append(ExitRule("halt", depth, act_threshold=between(steps.halt_logits.sigmoid())))
    return found + [replace(rule, patience=2) for rule in found]


def leaves(rule):
    """The rule as the twin asks it: once after each step of a token."""
    says_stop, in_a_row = says(rule), 0

    def is_over(logits, halt, before):
        nonlocal in_a_row
        before_this = 0 if before is None else in_a_row
        in_a_row = before_this + 1 if says_stop(logits, halt, before) else 0
        return in_a_row >= rule.patience

    return is_over


def says(rule):
    """The rule without patience."""
    if rule.exit == "halt":
        return lambda logits, halt, before: 1 / (1 + torch.exp(-halt)) > rule.act_threshold

    def changes_little(logits, halt, before):
        if before is None:
            return False
        p, q = torch.softmax(logits, -1), torch.softmax(before, -1)
        return float((p * (p / q).log()).sum()) < rule.kl_threshold

    return changes_little


@pytest.mark.parametrize("beyond", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_token_by_token_twin(tiny, case, beyond):
    """Also with more steps than the model is trained with."""
    model, ids = tiny(**case, dtype=torch.float64), prompt(rows=2, length=5)
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    depth, seen = max_depth(model.config) + beyond, set()
    for rule in rules(model, ids, depth):
        output = model(ids, exit=rule)
        for row in range(len(ids)):
            twin = TokenTwin(model.config.to_dict(), weights)
            logits, depths = twin.think(ids[row].tolist(), depth, leaves(rule))
            assert output.carry.steps[row].tolist() == depths
            torch.testing.assert_close(output.logits[row], logits, atol=1e-9, rtol=0)
            seen |= set(depths)
    assert len(seen) > 1 and max(seen) <= depth  # the rules do let some leave early, and not all at once


@pytest.mark.parametrize("case", [*CASES, {"recursion": "none", "coda_layers": 1}], ids=name)
@torch.no_grad()
def test_the_trained_depth_is_the_plain_forward_pass(tiny, case):
    model, ids = tiny(**case), prompt()
    plain, ruled = model(ids), model(ids, exit=ExitRule())
    assert torch.equal(plain.logits, ruled.logits)
    assert ruled.carry.steps.eq(max_depth(model.config)).all()
    steps = model(ids, exit=ExitRule(), return_steps=True)
    assert len(steps.logits) == max_depth(model.config) and torch.equal(steps.logits[-1], plain.logits)
    if model.config.recursion == "trm":
        assert torch.equal(ruled.halt_logits, plain.halt_logits)
        assert torch.equal(steps.logits, model(ids, return_steps=True).logits)
        shallow = model(ids, exit=ExitRule(max_recursion_depth=2)).logits
        assert torch.equal(shallow, model(ids, supervision_steps=2).logits)


@pytest.mark.parametrize("case", CASES, ids=name)
@torch.no_grad()
def test_steps_repeat_the_last_of_a_stopped_token(tiny, case):
    model, ids = tiny(**case), prompt()
    for rule in rules(model, ids):
        output, steps = model(ids, exit=rule), model(ids, exit=rule, return_steps=True)
        assert len(steps.logits) == output.carry.steps.max()
        last = (output.carry.steps - 1)[None, :, :, None].expand(-1, -1, -1, TINY["vocab_size"])
        assert torch.equal(steps.logits.gather(0, last)[0], steps.logits[-1])
        torch.testing.assert_close(steps.logits[-1], output.logits)


@pytest.mark.parametrize("sizes", [[1] * 10, [4, 3, 1, 2]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
@torch.no_grad()
def test_chunks_with_left_padding(tiny, case, sizes):
    """In float64, where no token is so near the threshold that another order of summation moves it."""
    model, ids, real = tiny(**case, dtype=torch.float64), prompt(), LEFT_PADDED == 1
    for rule in rules(model, ids):
        whole = model(ids, attention_mask=LEFT_PADDED, exit=rule)
        cache, logits, depths = model.new_cache(3, depth=max_depth(model.config, rule)), [], []
        for part in torch.arange(10).split(sizes):
            output = model(ids[:, part], attention_mask=LEFT_PADDED[:, part], cache=cache, exit=rule)
            logits.append(output.logits)
            depths.append(output.carry.steps)
        assert torch.equal(torch.cat(depths, 1)[real], whole.carry.steps[real])
        torch.testing.assert_close(torch.cat(logits, 1)[real], whole.logits[real], atol=1e-9, rtol=0)
        for row in range(3):
            alone = model(ids[row : row + 1, real[row]], exit=rule)
            assert torch.equal(alone.carry.steps[0], whole.carry.steps[row, real[row]])
            torch.testing.assert_close(alone.logits[0], whole.logits[row, real[row]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", CASES[2:5], ids=name)
def test_text_with_and_without_cache_across_the_context(unchecked, tiny, case):
    model, ids, number = tiny(**case, dtype=torch.float64), prompt(), M - 2  # all rows but the shortest are cut
    for rule in rules(model, ids):
        options = {"seed": 1, "exit": rule, "attention_mask": LEFT_PADDED}
        cached, uncached = [], []
        text = torch.stack(list(generate(model, ids, number, thoughts=cached, **options)))
        again = torch.stack(list(generate(model, ids, number, thoughts=uncached, use_cache=False, **options)))
        assert torch.equal(text, again) and torch.equal(text, torch.stack([thought.token for thought in cached]))
        for a, b in zip(cached, uncached, strict=True):
            assert torch.equal(a.depth, b.depth)
            assert len(a.logits) == a.depth.max()
            torch.testing.assert_close(a.logits, b.logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=name)
@torch.no_grad()
def test_the_past_does_not_see_the_future(tiny, case):
    """Causal under every rule: later tokens change nothing, bit for bit."""
    model, ids = tiny(**case), prompt()
    for rule in rules(model, ids):
        base = model(ids, exit=rule)
        for j in (1, 6, 9):
            changed = ids.clone()
            changed[:, j] = (changed[:, j] + 1) % TINY["vocab_size"]
            other = model(changed, exit=rule)
            assert torch.equal(base.logits[:, :j], other.logits[:, :j])
            assert torch.equal(base.carry.steps[:, :j], other.carry.steps[:, :j])


@torch.no_grad()
def test_one_row_that_stops_is_not_visited_again(tiny):
    """Decoding a row by itself, an early exit saves the visits: that is what it is for."""
    model, ids = tiny(supervision_steps=4, prelude_layers=1, coda_layers=1), prompt(rows=1)
    written = []
    for threshold in (0.0, 1.0):  # leave after the first step; never
        rule = ExitRule("halt", act_threshold=threshold)
        cache = model.new_cache(1, depth=4)
        model(ids, cache=cache, exit=rule)
        update, slots = cache.update, []
        cache.update = lambda slot, k, v: slots.append(slot) or update(slot, k, v)  # noqa: B023
        output = model(ids[:, :1], cache=cache, exit=rule)
        assert output.carry.steps.item() == (1 if threshold == 0 else 4)
        assert cache.length == 11
        written.append(len(slots))
    per_step = visits_per_recursion_step(model.config) * model.config.n_layers
    assert written == [1 + per_step + 1, 1 + 4 * per_step + 4]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_model_prompt_padding_and_rule(tiny, data):
    """Cached is uncached, a row alone is the row in its batch, prefill is token by token."""
    draw = data.draw
    case = draw(configurations(["trm", "loop"])) | {
        **{key: draw(st.integers(0, 2)) for key in ("prelude_layers", "coda_layers")},
        **{key: draw(st.integers(1, 3)) for key in ("deep_steps", "latent_steps", "supervision_steps")},
    }
    model = tiny(**case, dtype=torch.float64)
    exit = draw(st.sampled_from(["fixed", "kl"] + ["halt"] * (case["recursion"] == "trm")))
    depth = draw(st.none() | st.integers(1, 4))
    threshold = draw(st.floats(0.05, 0.95))
    thresholds = {"halt": {"act_threshold": threshold}, "kl": {"kl_threshold": threshold}}
    rule = ExitRule(exit, depth, **thresholds.get(exit, {}))
    ids, mask = draw(padded_prompts(8))
    width = ids.shape[1]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, exit=rule)
        cache = model.new_cache(len(ids), depth=max_depth(model.config, rule))
        singles = [
            model(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1], cache=cache, exit=rule) for t in range(width)
        ]
    for row, length in enumerate(mask.sum(1).tolist()):
        with torch.no_grad():
            alone = model(ids[row : row + 1, width - length :], exit=rule)
        for other in (alone.logits[0], torch.stack([s.logits[row, 0] for s in singles[width - length :]])):
            torch.testing.assert_close(other, whole.logits[row, width - length :], atol=1e-9, rtol=0)
        steps = whole.carry.steps[row, width - length :]
        assert torch.equal(alone.carry.steps[0], steps)
        assert [s.carry.steps[row, 0].item() for s in singles[width - length :]] == steps.tolist()
    options = {"temperature": 0, "exit": rule, "attention_mask": mask}
    a, b = (list(generate(model, ids, 5, use_cache=use, **options)) for use in (True, False))
    assert torch.equal(torch.stack(a), torch.stack(b))


@pytest.mark.parametrize(
    ("case", "rule", "words"),
    [
        ({"recursion": "none"}, {"exit": "kl"}, "single visit"),
        ({"recursion": "none"}, {"max_recursion_depth": 2}, "single visit"),
        ({"recursion": "loop"}, {"exit": "halt"}, "no halting head"),
        ({"causal": False}, {"exit": "halt"}, "choose exit fixed"),
        ({}, {"max_recursion_depth": 0}, "max_recursion_depth is 0"),
        ({}, {"act_threshold": 1.5}, "act_threshold is 1.5"),
        ({}, {"kl_threshold": -0.1}, "kl_threshold is -0.1"),
        ({}, {"exit": "kl", "patience": 0}, "patience is 0"),
        ({}, {"patience": 2}, "patience is for"),
        ({}, {"kl_threshold": float("nan")}, "kl_threshold is nan"),
    ],
)
def test_impossible_rules(tiny, case, rule, words):
    with pytest.raises(ValueError, match=words):
        tiny(**case)(prompt(), exit=ExitRule(**rule))


def test_a_rule_has_no_targets(tiny):
    with pytest.raises(ValueError, match="takes no targets"):
        tiny()(prompt(), target_ids=prompt(), exit=ExitRule())


def test_puzzle_ids_reach_the_prefix_under_a_rule(tiny):
    model = tiny(causal=False, prefix_tokens=2, puzzle_ids=3)
    ids, puzzles = torch.arange(12).view(2, 6), torch.tensor([1, 2])
    plain = model(ids, puzzle_ids=puzzles)
    ruled = model(ids, puzzle_ids=puzzles, exit=ExitRule())
    assert torch.equal(ruled.logits, plain.logits) and not torch.equal(ruled.logits, model(ids, exit=ExitRule()).logits)
