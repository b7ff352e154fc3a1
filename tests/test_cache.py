"""Tests that decoding with the cache gives the same tokens and logits as decoding without it."""

import pytest
import torch
from conftest import AXES, TINY, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st

from src.cache import KVCache, cache_slots
from src.exits import ExitRule
from src.sampling import generate

CASES = [
    {"recursion": "none", "norm": "pre", "n_kv_heads": 2},
    {"recursion": "none", "prelude_layers": 1, "coda_layers": 1, "positions": "learned"},
    {"recursion": "loop", "deep_steps": 3, "n_kv_heads": 1},
    {"recursion": "loop", "injection": "none", "positions": "none"},
    {"recursion": "loop", "injection": "concat", "gate": True, "coda_layers": 2, "positions": "learned"},
    {"recursion": "trm"},
    {"recursion": "trm", "n_kv_heads": 2, "prelude_layers": 2, "coda_layers": 1, "norm": "sandwich", "qk_norm": True},
    {"recursion": "trm", "injection": "concat", "gate": True, "positions": "learned", "tie_embeddings": True},
    {"recursion": "trm", "positions": "none", "norm": "pre", "supervision_steps": 3, "rope_scaling": 2.0},
]
LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 9 + [1]])
M = TINY["max_seq_len"]


def name(case):
    return "-".join(f"{key}={value}" for key, value in case.items())


def prompt(rows=3, length=10, seed=5):
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def chunked(model, ids, sizes, mask=None, **options):
    """Logits of ids fed to a fresh cache in chunks of the given sizes, joined along T."""
    cache, parts = model.new_cache(len(ids), **options), []
    for part in torch.arange(ids.shape[1]).split(sizes):
        chunk_mask = None if mask is None else mask[:, part]
        parts.append(model(ids[:, part], attention_mask=chunk_mask, cache=cache).logits)
    assert cache.length == ids.shape[1]
    return torch.cat(parts, dim=1)


def greedy_by_hand(model, row, new_tokens):
    """Decoding without a cache, for one row: the whole text is encoded again for each token; a row that has grown past
    max_seq_len keeps its last max_seq_len // 2 tokens, at positions 0, 1, ..."""
    window, out = list(row), []
    for _ in range(new_tokens):
        if len(window) > model.config.max_seq_len:
            window = window[-(model.config.max_seq_len // 2) :]
        with torch.no_grad():
            out.append(int(model(torch.tensor([window])).logits[0, -1].argmax()))
        window.append(out[-1])
    return out


def decode(model, ids, number, **options):
    return torch.stack(list(generate(model, ids, number, temperature=0, **options)), dim=1)


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [4, 3, 1, 2], [6, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
@torch.no_grad()
def test_chunks_give_the_logits_of_the_whole(tiny, case, sizes):
    model, ids = tiny(**case), prompt()
    torch.testing.assert_close(chunked(model, ids, sizes), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [4, 3, 1, 2]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
@torch.no_grad()
def test_chunks_with_left_padding(tiny, case, sizes):
    model, ids, real = tiny(**case), prompt(), LEFT_PADDED == 1
    whole = model(ids, attention_mask=LEFT_PADDED).logits
    torch.testing.assert_close(chunked(model, ids, sizes, LEFT_PADDED)[real], whole[real], atol=1e-4, rtol=0)
    for row in range(3):
        alone = model(ids[row : row + 1, real[row]]).logits[0]
        torch.testing.assert_close(whole[row, real[row]], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@torch.no_grad()
def test_chunks_inside_documents(tiny, positions):
    """A chunk boundary inside a document, and tokens without a mask that continue the row's last document."""
    model, ids = tiny(positions=positions, n_kv_heads=2, coda_layers=1), prompt(rows=2)
    mask = torch.tensor([[1] * 3 + [2] * 7, [0] + [3] * 4 + [1] * 5])
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(chunked(model, ids, [2, 4, 4], mask)[mask > 0], whole[mask > 0], atol=1e-4, rtol=0)
    cache = model.new_cache(2)
    parts = [model(ids[:, :7], attention_mask=mask[:, :7], cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(7, 10)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask > 0], whole[mask > 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_greedy_with_and_without_cache_across_the_context(unchecked, tiny, case):
    """More than max_seq_len new tokens, so that every row is cut at least twice, at different moments."""
    # embeddings around one vector make a model with random weights repeat a token
    model, ids, number = tiny(**case, embed_mean=0.0), prompt(), M + 9
    cached = decode(model, ids, number, attention_mask=LEFT_PADDED)
    assert torch.equal(cached, decode(model, ids, number, attention_mask=LEFT_PADDED, use_cache=False))
    assert len(cached.unique()) > 2  # not one token for ever
    for row in range(3):
        tokens = ids[row, LEFT_PADDED[row] == 1]
        assert cached[row].tolist() == greedy_by_hand(model, tokens.tolist(), number)
        assert torch.equal(decode(model, tokens[None], number)[0], cached[row])


@pytest.mark.parametrize("case", pairwise(AXES), ids=name)
@torch.no_grad()
def test_every_option_decodes_as_without_a_cache(unchecked, tiny, case):
    """Pieces, then single tokens, which have code of their own (src/decode.py), of rows with padding."""
    model, ids, real = tiny(**case).eval(), prompt(), LEFT_PADDED == 1
    whole = model(ids, attention_mask=LEFT_PADDED).logits
    found = chunked(model, ids, [5, 1, 2, 1, 1], LEFT_PADDED)
    torch.testing.assert_close(found[real], whole[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_seq_len", [1, 2, 3])
def test_contexts_of_a_few_tokens(tiny, max_seq_len):
    """An odd or tiny max_seq_len keeps max_seq_len // 2 tokens, and never none."""
    try:
        model = tiny(max_seq_len=max_seq_len)
    except ValueError:
        assert max_seq_len < 2  # refusing a context without room for a token and its successor is fine
        return
    ids = prompt(rows=2, length=1)
    cached = decode(model, ids, 7)
    assert torch.equal(cached, decode(model, ids, 7, use_cache=False))
    if max_seq_len > 1:
        assert cached[1].tolist() == greedy_by_hand(model, ids[1].tolist(), 7)


def test_a_full_prompt_and_a_padded_prompt_wider_than_the_context(tiny):
    model = tiny()
    full = prompt(rows=2, length=M)
    assert decode(model, full, 5)[0].tolist() == greedy_by_hand(model, full[0].tolist(), 5)
    wide, mask = torch.nn.functional.pad(full, (6, 0)), torch.nn.functional.pad(torch.ones_like(full), (6, 0))
    for use_cache in (True, False):
        assert torch.equal(decode(model, wide, 5, attention_mask=mask, use_cache=use_cache), decode(model, full, 5))


@st.composite
def configurations(draw, families=("none", "loop", "trm")):
    """Settings of a tiny model that decodes, for its fixture `tiny`."""
    recursion = draw(st.sampled_from(families))
    return {
        "recursion": recursion,
        "norm": draw(st.sampled_from(["post", "pre", "sandwich"])),
        "injection": draw(st.sampled_from(AXES["injection"] + ("none",) * (recursion == "loop"))),
        "positions": draw(st.sampled_from(["rope", "learned", "none"])),
        "n_kv_heads": draw(st.sampled_from([1, 2, 4])),
        **{key: draw(st.integers(1, 2)) for key in ("n_layers", "deep_steps")},
        **{key: draw(st.integers(0, 1)) for key in ("prelude_layers", "coda_layers")},
        **{key: draw(st.booleans()) for key in ("gate", "qk_norm", "tie_embeddings")},
        "seed": draw(st.integers(0, 99)),
    }


@st.composite
def padded_prompts(draw, most):
    """ids (B, T) of up to 3 rows with 1 to `most` tokens each, and the mask (B, T) of their padding on the left."""
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return prompt(*mask.shape, seed=draw(st.integers(0, 99))), mask


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_cached_is_uncached_whatever_the_situation(tiny, data):
    model = tiny(**data.draw(configurations()), max_seq_len=data.draw(st.integers(4, 9)))
    ids, mask = data.draw(padded_prompts(model.config.max_seq_len))
    number, eos = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([None, 0, 1]))
    options = {"attention_mask": mask, "eos_id": eos}
    cached = decode(model, ids, number, **options)
    assert torch.equal(cached, decode(model, ids, number, use_cache=False, **options))
    if eos is None:
        for row, tokens, real in zip(cached, ids, mask.bool()):
            assert row.tolist() == greedy_by_hand(model, tokens[real].tolist(), number)


@pytest.mark.parametrize("coda_layers", [0, 1])
@torch.no_grad()
def test_every_step_is_read_out_with_a_cache(tiny, coda_layers):
    """return_steps: the coda has slots of its own for each supervision step."""
    model, ids = tiny(coda_layers=coda_layers, supervision_steps=3), prompt()
    cache = model.new_cache(3, read_steps=3)
    parts = [model(ids[:, part], cache=cache, return_steps=True).logits for part in torch.arange(10).split([5, 1, 4])]
    whole = model(ids, return_steps=True).logits
    assert whole.shape == (3, 3, 10, TINY["vocab_size"])
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_reading_every_step_then_only_the_last(tiny):
    """A prefill that read every step, then decoding that reads the last alone, share one cache."""
    model, ids = tiny(coda_layers=1, supervision_steps=2), prompt()
    cache = model.new_cache(3, read_steps=2)
    model(ids[:, :6], cache=cache, return_steps=True)
    later = model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 6:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("act_target", ["correct", "stable"])
@torch.no_grad()
def test_a_loss_beside_the_cache_leaves_it_exact(tiny, act_target):
    model, ids = tiny(coda_layers=1, supervision_steps=3, act_target=act_target), prompt()
    cache = model.new_cache(3, read_steps=3)
    first = model(ids[:, :6], ids[:, 1:7], cache=cache)
    assert first.loss.item() == pytest.approx(model(ids[:, :6], ids[:, 1:7]).loss.item(), abs=1e-5)
    later = model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 6:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("case", [{}, {"n_kv_heads": 2, "qk_norm": True}, {"injection": "concat"}], ids=str)
def test_bfloat16_autocast_with_a_cache(tiny, case, with_grad):
    """The cache holds fp32, the projections are bf16: prefill, a later chunk and single tokens agree with the whole."""
    model, ids = tiny(**case), prompt()
    with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids).logits.float()
        logits = chunked(model, ids, [4, 4, 1, 1]).float()
    assert (logits - whole).norm() < 0.05 * whole.norm()  # bf16 keeps 8 bits, and chunks may round otherwise


def test_slots_bytes_and_overflow(tiny):
    model = tiny(prelude_layers=1, coda_layers=1, latent_steps=2, deep_steps=3, supervision_steps=2, n_kv_heads=2)
    visits = (2 + 1) * 3 * 2
    assert cache_slots(model.config) == 1 + visits * 2 + 1
    assert cache_slots(model.config, read_steps=2) == 1 + visits * 2 + 2
    cache = model.new_cache(2, max_len=8)
    assert cache.max_len == 8 and cache.length == 0
    assert cache.nbytes == 2 * 4 * (1 + visits * 2 + 1) * 2 * 2 * 8 * 4  # k and v, fp32, slots, rows, K, columns, E
    model(prompt(2, 8), cache=cache)
    assert cache.length == 8
    with pytest.raises(ValueError, match="holds 8 columns"):
        model(prompt(2, 1), cache=cache)


def test_a_cache_needs_a_causal_attention_model(tiny):
    for wrong in ({"causal": False}, {"causal": False, "mixer": "mlp"}):
        with pytest.raises(ValueError, match="causal"):
            tiny(**wrong).new_cache(1)


@pytest.mark.parametrize("rule", [None, "fixed", "halt", "kl"])
@torch.no_grad()
def test_the_last_column_alone_is_read(tiny, rule):
    """The same logits as of a cache that reads all, of which the head computes no others, except for kl."""
    model, ids = tiny(coda_layers=1), prompt()
    options = (
        {}
        if rule is None
        else {
            "exit": {
                "fixed": ExitRule(),
                "halt": ExitRule("halt", act_threshold=0.6),
                "kl": ExitRule("kl", kl_threshold=0.3),
            }[rule]
        }
    )
    depth, columns = None if rule is None else 2, []
    model.head.register_forward_pre_hook(lambda head, inputs: columns.append(inputs[0].shape[1]))
    for steps in (False, True) if rule else (False,):
        whole, short = (model.new_cache(3, depth=depth, last_only=last_only) for last_only in (False, True))
        for part in (slice(0, 7), slice(7, 8), slice(8, 10)):
            wanted = model(ids[:, part], cache=whole, return_steps=steps, **options).logits
            columns.clear()
            found = model(ids[:, part], cache=short, return_steps=steps, **options).logits
            assert set(columns) == {ids[:, part].shape[1] if rule == "kl" else 1}
            torch.testing.assert_close(found, wanted[..., -1:, :], atol=1e-5, rtol=0)


def test_generation_reads_last_columns_and_takes_no_more_room_than_its_text(tiny):
    model, ids = tiny(), prompt()
    read, rooms, new_cache = [], [], model.new_cache
    model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].shape[1]))
    model.new_cache = lambda rows, room, **options: rooms.append(room) or new_cache(rows, room, **options)
    text = decode(model, ids, 4)
    assert rooms == [10 + 4] and read == [1] * 4
    decode(model, ids, 12)  # the first 7 fill the context, of which half is kept
    assert rooms[1:] == [M, M // 2 + 12 - 7]
    assert torch.equal(text, decode(model, ids, 4, use_cache=False))


class RecordingCache(KVCache):
    def update(self, slot, k, v):
        self.written = [*getattr(self, "written", []), slot]
        return super().update(slot, k, v)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_slot_is_written_once_per_call(tiny, case):
    """No two attention layers of one forward call share a slot, and none stays empty."""
    model = tiny(**case)
    cache = model.new_cache(3)
    cache.__class__ = RecordingCache
    model(prompt(), cache=cache)
    assert sorted(cache.written) == list(range(cache_slots(model.config)))


@pytest.mark.parametrize("case", CASES, ids=name)
@torch.inference_mode()
def test_rows_join_and_leave_a_cache(tiny, case):
    """Rows of other caches join, longer and shorter than those there; rows leave; padding is cut. Logits stay right."""
    model = tiny(**case)
    texts, lengths = prompt(5, 14), [3, 7, 2, 9, 5]
    cache = model.new_cache(4, 12)
    cache.be_empty()
    rows = []  # [number of the text, tokens in the cache]

    def join(number):
        other, n = model.new_cache(2, 10), lengths[number]
        mask = torch.tensor([[0] * (10 - n) + [1] * n, [1] * 10])
        ids = torch.stack((torch.cat((texts[number, : 10 - n] * 0, texts[number, :n])), texts[0, :10]))
        model(ids, attention_mask=mask, cache=other)
        cache.adopt(other, 0, n)
        rows.append([number, n])

    def leave(row):
        cache.drop(row)
        rows[row] = rows[-1]
        rows.pop()

    def step():
        logits = model(torch.stack([texts[number, n : n + 1] for number, n in rows]), cache=cache).logits[:, 0]
        for row, found in zip(rows, logits):
            row[1] += 1
            torch.testing.assert_close(found, model(texts[row[0]][None, : row[1]]).logits[0, -1], atol=1e-5, rtol=1e-4)

    join(0)
    step()
    join(1)
    join(2)
    step()
    leave(0)
    step()
    join(3)
    join(4)
    step()
    leave(rows.index([3, 10]))
    leave(rows.index([1, 10]))
    assert cache.length == 10
    cache.trim()
    assert cache.length == 6 and cache.starts == [1, 0]
    step()


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_padding_does_not_end_a_document(tiny, positions):
    """A new token without a mask belongs to the document before the padding."""
    model, ids = tiny(recursion="none", positions=positions), prompt(rows=2, length=6)
    masks = torch.tensor([[1, 1, 2, 2, 0, 2], [1, 1, 2, 2, 2, 2]])
    whole = model(ids, attention_mask=masks).logits[:, -1]
    cache = model.new_cache(2)
    model(ids[:, :5], attention_mask=masks[:, :5], cache=cache)
    torch.testing.assert_close(model(ids[:, 5:], cache=cache).logits[:, -1], whole, atol=1e-5, rtol=1e-5)


def test_a_carry_does_not_add_its_tokens_twice(tiny):
    model, ids = tiny(recursion="trm", supervision_steps=2), prompt(length=5)
    cache = model.new_cache(len(ids))
    carry = model(ids, supervision_steps=1, cache=cache).carry
    with pytest.raises(ValueError, match="tokens that this cache has already"):
        model(ids, supervision_steps=1, carry=carry, cache=cache)
