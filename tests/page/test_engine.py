"""The engine: a text is the same alone and among others, whatever joins and leaves; rows are freed.

Tests call `turn` themselves, so that nothing depends on time."""

import random
import time

import numpy as np
import pytest
import torch

from src.evaluation.scoring import score_continuations
from src.language_model import LanguageModel
from src.model_config import ExitRule
from src.page.batch import RunningBatch
from src.page.engine import Engine, Limits, Text
from src.page.errors import Busy
from src.page.writing import Token, Writer
from src.sampling import generate, row_generator
from src.tokenizer import ByteLevelTokenizer

TOKENIZER = ByteLevelTokenizer()
PROMPTS = ["a", "To be", "0123456789abc", "x" * 15]  # up to the context of 16 with BOS


def text_of(prompt, seed=0, most=12, choice=(1.0, None, None), rule=None, **options) -> Text:
    ids = prompt if isinstance(prompt, list) else TOKENIZER.encode(prompt, bos=True)
    stops, ends = options.pop("stops", ()), options.pop("ends", ())
    text = Text(list(ids), choice, writer=Writer(TOKENIZER, ids, stops, ends, most), **options)
    text.rule = rule or ExitRule()
    text.generator = row_generator(seed, 0)
    return text


class Driven:
    """An engine whose turns the test calls, and what it has posted."""

    def __init__(self, model, **limits):
        self.pieces = {}  # id of a text -> its pieces
        self.engine = Engine(model, TOKENIZER, Limits(**limits), self.post)

    def post(self, out):
        for text, piece in out:
            self.pieces.setdefault(id(text), []).append(piece)

    def until_over(self, texts):
        while not all(text.is_over for text in texts):
            self.engine.turn()
        self.engine.turn()  # drops what has ended
        assert self.engine.n_rows == 0 and not self.engine.batches

    def ids(self, text):
        return [token.id for piece in self.pieces[id(text)] for token in piece.tokens]

    def end(self, text):
        return self.pieces[id(text)][-1].reason


def alone(model, text, seed, most):
    """Returns the ids that `sampling.generate` writes for a text."""
    temperature, top_k, top_p = text.choice
    columns = generate(
        model,
        torch.tensor([text.ids[: len(text.writer.prompt_tokens)]]),
        most,
        temperature,
        top_k,
        top_p,
        seed=seed,
        exit=text.rule,
    )
    return [column.item() for column in columns]


CHOICES = [(0.0, None, None), (1.0, None, None), (0.7, 5, None), (1.3, None, 0.8)]
FAMILIES = [
    {"recursion": "trm", "deep_steps": 1, "n_layers": 1},
    {"recursion": "loop", "positions": "learned", "coda_layers": 1, "prelude_layers": 1, "halting": True},
    {"recursion": "none", "n_kv_heads": 2, "attention_window": 5},
]


@pytest.mark.parametrize("settings", FAMILIES, ids=["trm", "loop", "none"])
def test_a_text_is_the_same_alone_and_among_others(tiny, settings):
    """Texts join and leave at random moments; many outgrow the context of 16 tokens; prompts come in pieces of 5."""
    model, rng = tiny(vocab_size=TOKENIZER.vocab_size, **settings), random.Random(0)
    rules = [ExitRule()]
    if settings["recursion"] != "none":
        rules += [
            ExitRule(max_recursion_depth=3),
            ExitRule("halt", act_threshold=0.6),
            ExitRule("kl", 4, kl_threshold=0.05),
        ]
    driven, texts, expected = Driven(model, rows=5, prefill_tokens=5), [], []
    while len(texts) < 15 or not all(text.is_over for text in texts):
        if len(texts) < 15 and rng.random() < 0.5:
            seed, most = rng.randrange(100), rng.choice([1, 4, 20])
            text = text_of(rng.choice(PROMPTS), seed, most, rng.choice(CHOICES), rng.choice(rules))
            text.reads_steps = rng.random() < 0.3
            expected.append(alone(model, text, seed, most))
            texts.append(text)
            driven.engine.submit([text])
        driven.engine.turn()
    assert [driven.ids(text) for text in texts] == expected
    assert driven.engine.n_rows == 0


def test_the_figures_of_a_token_are_those_of_the_model(tiny):
    """Probability, likeliest tokens, steps and trace, in a batch with rows that stop at different depths."""
    model = tiny(vocab_size=TOKENIZER.vocab_size, recursion="trm", supervision_steps=3)
    rule = ExitRule("halt", act_threshold=0.75)
    texts = [text_of(p, 1, 5, rule=rule, logprobs=3, trace=2, wants_p=True, reads_steps=True) for p in PROMPTS[:2]]
    driven = Driven(model)
    driven.engine.submit(texts)
    driven.until_over(texts)
    depths = set()
    for text in texts:
        tokens = [token for piece in driven.pieces[id(text)] for token in piece.tokens]
        ids = text.ids[: -len(tokens)]
        for token in tokens:
            out = model(torch.tensor([ids]), exit=rule, return_steps=True)
            depth = int(out.carry.steps[0, -1])
            depths.add(depth)
            steps = out.logits[:depth, 0, -1].softmax(-1)
            assert token.steps == depth == len(token.trace)
            assert token.logprob == pytest.approx(steps[-1][token.id].log().item(), abs=1e-5)
            best = steps[-1].log().topk(3)
            assert [i for i, _ in token.top] == best.indices.tolist()
            np.testing.assert_allclose([p for _, p in token.top], best.values, atol=1e-5)
            for step, seen, halt in zip(steps, token.trace, out.halt_logits[:depth, 0, -1].sigmoid()):
                assert seen["halt"] == pytest.approx(halt.item(), abs=1e-5)
                assert seen["entropy"] == pytest.approx(-(step * step.log2()).sum().item(), abs=1e-4)
                assert [i for i, _, _ in seen["top"]] == step.topk(2).indices.tolist()
                assert seen["p"] == pytest.approx(step[token.id].item(), abs=1e-5)
            ids.append(token.id)
    assert len(depths) > 1


def test_a_trace_is_the_same_if_the_prompt_is_read_in_pieces(tiny):
    """The coda reads the answer of every step, so it needs the keys of every step of all pieces."""
    model = tiny(vocab_size=TOKENIZER.vocab_size, recursion="loop", deep_steps=3, coda_layers=1)
    traces = []
    for most in (256, 4):
        text, driven = (
            text_of(PROMPTS[0] * 5, most=2, trace=2, wants_p=True, reads_steps=True),
            Driven(model, prefill_tokens=most),
        )
        driven.engine.submit([text])
        driven.until_over([text])
        traces.append([token.trace for piece in driven.pieces[id(text)] for token in piece.tokens])
    for whole, pieces in zip(*traces, strict=True):
        for one, other in zip(whole, pieces, strict=True):
            assert one["p"] == pytest.approx(other["p"], abs=1e-5)
            assert [i for i, _, _ in one["top"]] == [i for i, _, _ in other["top"]]


def test_the_prompt_is_scored_as_eval_lm_scores_it(tiny):
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    texts = [text_of(p, most=most, scores_prompt=True, logprobs=0) for p in PROMPTS for most in (0, 1)]
    driven = Driven(model, prefill_tokens=6)
    driven.engine.submit(texts)
    driven.until_over(texts)
    for text, most in zip(texts, (0, 1) * len(PROMPTS), strict=True):
        ids = [token.id for token in text.writer.prompt_tokens]
        (figures,) = score_continuations(model, [(ids[:1], ids[1:])])
        first, *others = [token.logprob for token in text.writer.prompt_tokens]
        assert first is None and sum(others) == pytest.approx(figures.logprob, abs=1e-4)
        assert len(driven.ids(text)) == most


def test_a_cancelled_text_frees_its_row_before_the_next_token(tiny):
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    driven = Driven(model, rows=2, prefill_tokens=4)
    running, encoding, waiting, last = (text_of("ab", 3, 500), text_of("x" * 15), text_of("c"), text_of("d", most=2))
    driven.engine.submit([running])
    driven.engine.turn()
    driven.engine.submit([encoding, waiting, last])
    driven.engine.turn()
    engine = driven.engine
    assert engine.n_rows == 2 and engine.starts and list(engine.waiting) == [waiting, last]
    engine.cancel([waiting])
    assert list(engine.waiting) == [last]
    before = len(driven.ids(running))
    engine.cancel([running, encoding])
    engine.turn()
    assert len(driven.ids(running)) == before and id(encoding) not in driven.pieces
    driven.until_over([last])
    assert engine.counts["cancelled"] == 3
    assert id(waiting) not in driven.pieces and driven.ids(last) == alone(model, last, 0, 2)


def test_deep_texts_and_many_rules_stay_within_the_memory_of_the_cache(tiny):
    """limits.cache_rows is what the memory holds at the trained depth; other texts wait until there is room."""
    model = tiny(vocab_size=TOKENIZER.vocab_size, recursion="loop", deep_steps=2)
    row = model.new_cache(1, 16, depth=2).nbytes
    rules = [ExitRule("fixed", 8), *(ExitRule("kl", 4, kl_threshold=0.1 * n) for n in range(1, 5)), ExitRule()]
    driven, texts = (
        Driven(model, rows=20, queue=40, cache_rows=8),
        [text_of("ab", n, 6, rule=rules[n % 6]) for n in range(24)],
    )
    driven.engine.submit(texts)
    most = 0
    while not all(text.is_over for text in texts):
        driven.engine.turn()
        caches = (batch.cache for batch in driven.engine.batches.values() if batch.cache is not None)
        most = max(most, sum(cache.nbytes for cache in caches))
    assert 4 * row < most <= 8 * row
    for n in (0, 1, 23):
        assert driven.ids(texts[n]) == alone(model, texts[n], n, 6)


def test_a_long_prompt_does_not_stall_the_others(tiny):
    """Every running text gets a token in every turn while a prompt of 16 tokens is encoded 3 tokens at a time."""
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    driven, running, long = Driven(model, prefill_tokens=3), text_of("a", most=50), text_of("x" * 15)
    driven.engine.submit([running])
    driven.engine.turn()
    driven.engine.submit([long])
    made = []
    while not long.made:
        driven.engine.turn()
        made.append(len(driven.ids(running)))
    assert len(made) == 6 and [b - a for a, b in zip(made, made[1:])] == [1] * 5


def test_random_cancels_leave_nothing_behind(tiny):
    model, rng = tiny(vocab_size=TOKENIZER.vocab_size), random.Random(1)
    driven, live = Driven(model, rows=5, prefill_tokens=7), []
    for _ in range(40):
        if rng.random() < 0.7:
            live.append(text_of(rng.choice(PROMPTS), most=rng.randrange(1, 20)))
            driven.engine.submit([live[-1]])
        driven.engine.turn()
        if live and rng.random() < 0.5:
            driven.engine.cancel([live.pop(rng.randrange(len(live)))])
    driven.engine.cancel(live)
    driven.engine.turn()
    engine = driven.engine
    assert not (engine.waiting or engine.starts or engine.again) and engine.n_rows == 0
    assert all(not batch.rows and batch.cache is None for batch in engine.batches.values())


def test_a_full_queue_refuses_and_recovers(tiny):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size), rows=1, queue=2)
    texts = [text_of("a", most=2) for _ in range(3)]
    driven.engine.submit(texts)
    with pytest.raises(Busy):
        driven.engine.submit([text_of("b")])
    driven.until_over(texts)
    driven.engine.submit([text := text_of("b", most=1)])
    driven.until_over([text])
    assert 1 <= driven.engine.retry_after() <= 60


def test_time_ends_a_text_wherever_it_is(tiny):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size), rows=1, seconds=100.0)
    texts = [text_of("a", most=500), text_of("b")]
    driven.engine.submit(texts)
    driven.engine.turn()
    for text in texts:
        text.born -= 200
    driven.until_over(texts)
    assert [driven.end(text) for text in texts] == ["seconds", "seconds"]
    assert driven.ids(texts[0]) and not driven.ids(texts[1])


def test_a_failure_ends_only_the_texts_that_it_concerns(tiny, capsys, monkeypatch):
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    driven = Driven(model)
    bad, good = text_of("a", most=5, rule=ExitRule(max_recursion_depth=3)), text_of("b", most=5)
    forward = type(model).forward

    def failing(self, ids, *words, exit=None, **options):
        if exit.max_recursion_depth == 3 and ids.shape[1] == 1:
            raise RuntimeError("out of memory")
        return forward(self, ids, *words, exit=exit, **options)

    monkeypatch.setattr(type(model), "forward", failing)
    driven.engine.submit([bad, good])
    driven.until_over([bad, good])
    assert driven.pieces[id(bad)][-1].finish == "error" and "out of memory" in driven.end(bad)
    assert driven.end(good) == "max_tokens"
    assert driven.engine.counts["ended_error"] == driven.engine.counts["ended_max_tokens"] == 1  # labels of /metrics
    assert "RuntimeError" in capsys.readouterr().err


def test_a_text_that_cannot_join_ends_the_texts_of_its_batch(tiny, capsys, monkeypatch):
    """The cache may be half changed, so that the others would go on with wrong keys and values."""
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size))
    first, second, third = (text_of(name, most=5) for name in "abc")
    driven.engine.submit([first])
    driven.engine.turn()
    join, failures = RunningBatch.join, ["out of memory"]

    def failing(self, start, number):
        if failures:
            raise RuntimeError(failures.pop())
        join(self, start, number)

    monkeypatch.setattr(RunningBatch, "join", failing)
    driven.engine.submit([second, third])
    driven.until_over([first, second, third])
    assert driven.end(first) == driven.end(second) == "the model failed: out of memory"
    assert driven.end(third) == "max_tokens" and len(driven.ids(third)) == 5
    assert "RuntimeError" in capsys.readouterr().err


def test_an_engine_that_fails_without_stderr_ends_its_texts(tiny, monkeypatch):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size))

    def broken_pipe(*words, **options):
        raise BrokenPipeError

    monkeypatch.setattr(driven.engine, "turn", lambda: 1 / 0)
    monkeypatch.setattr("traceback.print_exc", broken_pipe)
    driven.engine.submit([text := text_of("a")])
    driven.engine.start()
    driven.engine.join(20)
    assert driven.end(text) == "the engine failed: division by zero" and not driven.engine.waiting
    with pytest.raises(Busy):
        driven.engine.submit([text_of("b")])


def test_a_text_that_ends_while_its_client_leaves_is_counted_once(tiny, monkeypatch):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size))
    text = text_of("a", most=1)
    take = type(text.writer).take

    def take_late(self, token):
        driven.engine.cancel([text])
        return take(self, token)

    monkeypatch.setattr(type(text.writer), "take", take_late)
    driven.engine.submit([text])
    driven.engine.turn()
    assert driven.engine.counts["cancelled"] == 1 and driven.engine.counts["ended_max_tokens"] == 0


def test_prompt_tokens_count_once(tiny):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size, max_seq_len=16))
    text = text_of("abcd", most=40)  # it outgrows the context several times
    prompt = len(text.ids)
    driven.engine.submit([text])
    driven.until_over([text])
    assert driven.engine.counts["prompt_tokens"] == prompt and text.made == 40


def test_nobody_waits_for_an_engine_that_failed(tiny, capsys, monkeypatch):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size))
    monkeypatch.setattr(driven.engine, "turn", lambda: 1 / 0)
    driven.engine.start()
    driven.engine.submit([text := text_of("a")])
    driven.engine.join(20)
    assert not driven.engine.is_alive and driven.end(text) == "the engine failed: division by zero"
    with pytest.raises(Busy):
        driven.engine.submit([text_of("b")])
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_thread_ends_texts_when_it_closes(tiny):
    driven = Driven(tiny(vocab_size=TOKENIZER.vocab_size))
    text = text_of("a", most=10**6)
    driven.engine.start()
    driven.engine.submit([text])
    while not driven.pieces:
        time.sleep(0.01)
    driven.engine.close(0.2)
    driven.engine.join(20)
    assert not driven.engine.is_alive and driven.end(text) == "shutdown" and driven.ids(text)
    with pytest.raises(Busy):
        driven.engine.submit([text_of("b")])


# ---- from tokens to text --------------------------------------------------------------------------------------------


def written(pieces):
    return "".join(piece.text for piece in pieces)


def spell(text, stops=(), ends=(), most=100, prompt="p"):
    """Returns (the pieces of a Writer that gets the bytes of a text one by one, the Writer)."""
    ids = TOKENIZER.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
    writer, pieces = Writer(TOKENIZER, ids, stops, ends, most), []
    for index in text if isinstance(text, list) else text.encode():
        pieces.append(writer.take(Token(index)))
        if pieces[-1].finish:
            break
    return pieces, writer


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    pieces, _ = spell("ab--c---d", stops=("---", "zz"))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "--c", "", "", ""]
    assert pieces[-1].finish == "stop" and pieces[-1].reason == "---"
    assert "".join(token.text for piece in pieces for token in piece.tokens) == "ab--c"


def test_the_first_stop_string_wins_and_the_text_ends_before_it():
    pieces, _ = spell("one two", stops=("two", " t"))
    assert written(pieces) == "one" and pieces[-1].reason == " t"
    pieces, _ = spell("aab", stops=("ab",))
    assert written(pieces) == "a"
    pieces, _ = spell("ends with -", stops=("--",), most=11)
    assert written(pieces) == "ends with -" and pieces[-1].reason == "max_tokens"


def test_half_characters_wait_and_offsets_agree():
    pieces, writer = spell("é→x", prompt="ü")
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.text for token in tokens] == ["", "é", "", "", "→", "x"]
    assert [token.offset for token in tokens] == [1, 1, 2, 2, 2, 3]
    assert writer.prompt == "ü" and [token.offset for token in writer.prompt_tokens] == [0, 0, 0]
    pieces, _ = spell([0xC3, TOKENIZER.eos_id], ends=TOKENIZER.end_ids)
    assert written(pieces) == "\ufffd" and pieces[-1].reason == "eos"
    pieces, writer = spell([0xA9], prompt=[TOKENIZER.bos_id, 97, 0xC3])  # the prompt ends within a character
    assert writer.prompt == "a" and written(pieces) == "é"


def test_a_text_is_that_of_generate_py(tiny):
    """With a tokenizer that adds a space before texts, too: `LanguageModel.write` is the reference."""
    model = tiny(vocab_size=TOKENIZER.vocab_size)
    text = text_of("", 5, 20, (0.8, None, 0.95), ends=TOKENIZER.end_ids)
    driven = Driven(model)
    driven.engine.submit([text])
    driven.until_over([text])
    assert written(driven.pieces[id(text)]) == LanguageModel(model, TOKENIZER).write("", 20, seed=5)
