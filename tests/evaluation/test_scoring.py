"""Tests of scoring against a slow version (one token at a time), of what is counted, and of exit rules."""

import math

import pytest
import torch
from texts import BYTE, write

from src.data.corpus import read_pieces
from src.errors import UserError
from src.evaluation.scoring import (
    Size,
    choose_stride,
    corpus_windows,
    score_continuations,
    score_corpus,
    score_tokens,
    windows,
)
from src.exits import ExitRule
from src.losses import IGNORE

V, C = BYTE.vocab_size, 16  # vocabulary of bytes; context of the tiny models
TEXTS = ["The quick brown fox jumps over the lazy dog.", "x", "def f(x):\n    return x\n", "東京は夜の七時。雨が降る。"]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(vocab_size=V, n_layers=1, latent_steps=1, supervision_steps=3)


def slow_logprob(model, documents, start_of, n_prefix=1):
    """Returns the log-probability of the documents' ids after a prefix. start_of(t): first id in target t's context.

    Every target has its own row, and only rows of equal length share a batch, so that there is no padding."""
    rows = [(ids[start_of(t) : t], ids[t]) for ids in documents for t in range(n_prefix, len(ids))]
    total = 0.0
    for length in {len(row) for row, _ in rows}:
        alike, targets = zip(*(row for row in rows if len(row[0]) == length))
        logprobs = model(torch.tensor(alike)).logits[:, -1].double().log_softmax(-1)
        total += sum(logprobs[i, target].item() for i, target in enumerate(targets))
    return total


def of_bytes(text):
    return [BYTE.bos_id, *text.encode()]


def window_start(stride):
    """Returns a function: target t -> start of the first window that contains it."""
    return lambda t: max(0, -(-(t - C) // stride)) * stride


# ---- a corpus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_strided_score_is_that_of_a_slow_loop(model, stride):
    expected = slow_logprob(model, map(of_bytes, TEXTS), window_start(stride))
    n, chars = sum(len(text.encode()) for text in TEXTS), sum(map(len, TEXTS))
    score = score_corpus(model, BYTE, TEXTS, stride=stride, batch_size=3)
    assert score.size == Size(documents=4, tokens=n, bytes=n, chars=chars, words=9 + 1 + 4 + 2 + 1)
    assert score.figures.loss == pytest.approx(-expected / n, rel=1e-5)
    assert score.figures.bits_per_byte == pytest.approx(-expected / math.log(2) / n, rel=1e-5)
    assert score.figures.bits_per_char == pytest.approx(-expected / math.log(2) / chars, rel=1e-5)
    assert score.figures.nats_per_char == pytest.approx(-expected / chars, rel=1e-5)
    assert score.figures.perplexity == pytest.approx(math.exp(-expected / n), rel=1e-4)
    assert score.figures.word_perplexity == pytest.approx(math.exp(-expected / 17), rel=1e-4)


def test_words_and_ends_of_lines_are_counted_across_the_pieces_of_a_document(model):
    pieces = [("two wo", False), ("rds\n", False), ("", False), (" and three", False), (" more", True), ("one", True)]
    assert score_corpus(model, BYTE, pieces).size.words == 2 + 1 + 3 + 1
    assert score_corpus(model, BYTE, pieces, max_tokens=8).size.words == 2  # "two word"


@pytest.mark.parametrize("family", ["none", "loop", "trm"])
def test_a_document_alone_scores_as_in_a_batch(tiny, family):
    model = tiny(vocab_size=V, recursion=family)
    alone = [score_corpus(model, BYTE, [text], batch_size=1) for text in TEXTS]
    together = score_corpus(model, BYTE, TEXTS, batch_size=64)
    loss = sum(s.figures.loss * s.size.tokens for s in alone) / together.size.tokens
    assert together.figures.loss == pytest.approx(loss, rel=1e-6)


def test_figures_of_a_model_that_knows_nothing(tiny):
    model = tiny(vocab_size=V)
    torch.nn.init.zeros_(model.head.weight)  # all tokens are equally likely; argmax picks the first, byte 0
    figures = score_corpus(model, BYTE, ["\0a\0\0", "\0"]).figures
    assert figures.bits_per_byte == pytest.approx(math.log2(V), rel=1e-6)
    assert figures.perplexity == pytest.approx(V, rel=1e-5)
    assert figures.accuracy == 0.8


def test_bits_per_character_of_japanese_are_three_times_those_per_byte(model):
    score = score_corpus(model, BYTE, [TEXTS[3]])
    assert (score.size.bytes, score.size.chars) == (39, 13)
    assert score.figures.bits_per_char == pytest.approx(3 * score.figures.bits_per_byte)


def test_tokens_and_documents_are_bounded(model):
    assert score_corpus(model, BYTE, TEXTS, max_docs=2).size == Size(2, 45, 45, 45, 10)
    assert score_corpus(model, BYTE, TEXTS, max_tokens=45).size == Size(2, 45, 45, 45, 10)
    assert score_corpus(model, BYTE, TEXTS[3:], max_tokens=7).size == Size(1, 7, 7, 3, 1)  # the third character is cut
    cut, whole = score_corpus(model, BYTE, TEXTS[:1], max_tokens=9), score_corpus(model, BYTE, [TEXTS[0][:9]])
    assert cut == whole


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_files_score_as_their_texts(model, tmp_path, suffix):
    path = write(tmp_path / f"texts{suffix}", TEXTS)
    assert score_corpus(model, BYTE, read_pieces([path])) == score_corpus(model, BYTE, TEXTS)


def test_a_document_in_pieces_is_one_document(model):
    text = TEXTS[0]
    pieces = [(text[:3], False), (text[3:30], False), (text[30:], True), (TEXTS[1], True)]
    assert score_corpus(model, BYTE, pieces) == score_corpus(model, BYTE, TEXTS[:2])


def test_nothing_to_score_and_strides_that_cannot_be(model, tiny):
    with pytest.raises(UserError, match="no token to score"):
        score_corpus(model, BYTE, [])
    for stride in (0, 17):
        with pytest.raises(UserError, match=f"stride is {stride}: set it from 1 to the context of 16"):
            score_corpus(model, BYTE, TEXTS, stride=stride)
    with pytest.raises(UserError, match="cannot be scored as a language model"):
        score_corpus(tiny(vocab_size=V, causal=False), BYTE, TEXTS)
    assert choose_stride(model.config) == 8


def test_the_mode_of_the_model_is_left_as_it_was(model):
    model.train()
    score = score_corpus(model, BYTE, TEXTS[1:2])
    assert model.training
    model.eval()
    assert score == score_corpus(model, BYTE, TEXTS[1:2])


# ---- windows and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 18, 24, 25, 50])
@pytest.mark.parametrize("n_prefix", [1, 4])
def test_every_token_is_scored_once_with_enough_context(n, stride, n_prefix):
    ids = list(range(n_prefix + n))  # each token is its own position
    pieces = [ids[n_prefix : n_prefix + 7], [], ids[n_prefix + 7 :]]
    seen = []
    for sample in windows(ids[:n_prefix], pieces, C, stride):
        first, is_target = sample.input_ids[0].item(), sample.target_ids != IGNORE
        assert len(sample.input_ids) <= C
        assert sample.input_ids.tolist() == ids[first : first + len(sample.input_ids)]
        assert (sample.target_ids == sample.input_ids + 1)[is_target].all()
        seen += sample.target_ids[is_target].tolist()
        assert first == 0 or is_target.nonzero()[0].item() >= C - stride
    assert seen == ids[n_prefix:]


def test_documents_are_read_as_they_are_scored(model):
    size, read = Size(), []

    def documents():
        for text in TEXTS:
            read.append(text)
            yield text

    samples = corpus_windows(model.config, BYTE, documents(), size)
    next(samples)
    assert read == TEXTS[:1]
    assert len(list(samples)) == 11 and read == TEXTS


def test_tokens_of_rows_that_are_padded(model):
    ids = torch.randint(0, 256, (2, 8))
    targets = torch.randint(0, 256, (2, 8))
    targets[0, :3] = targets[1, 5:] = IGNORE
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    logits = model(ids).logits
    targets[0, 6] = logits[0, 6].argmax()
    scores = score_tokens(model, ids, targets, mask)
    assert scores.logprobs.shape == (1, 2, 8) and scores.is_likeliest.shape == (1, 2, 8)
    for row, t in ((0, 3), (0, 6), (1, 0), (1, 4)):
        expected = logits[row, t].log_softmax(-1)[targets[row, t]].item()
        assert scores.logprobs[0, row, t].item() == pytest.approx(expected, abs=1e-5)
    assert scores.logprobs[0][targets == IGNORE].abs().max() == 0
    assert scores.is_likeliest[0, 0, 6] and not scores.is_likeliest[0][targets == IGNORE].any()
    assert (scores.depth == 3).all()


# ---- continuations --------------------------------------------------------------------------------------------------


def test_continuations_are_scored_after_their_prefix(model):
    ids = of_bytes(TEXTS[0])
    pairs = [(ids[:1], ids[1:5]), (ids[:6], ids[6:7]), (ids[:3], []), (ids[:40], ids[40:44])]
    answers = score_continuations(model, pairs, batch_size=2)
    for (prefix, more), answer in zip(pairs, answers):
        whole = (prefix + more)[-C - 1 :]  # as much of the prefix as fits
        expected = slow_logprob(model, [whole], lambda t: 0, n_prefix=len(whole) - len(more))
        assert answer.logprob == pytest.approx(expected, rel=1e-5)
    assert answers[2] == (0.0, True) and answers[0].is_greedy is False


def test_a_continuation_longer_than_the_context_is_scored_in_windows(model):
    ids = of_bytes(TEXTS[0])
    (alone,) = score_continuations(model, [(ids[:1], ids[1:])], stride=5)
    assert alone.logprob == pytest.approx(slow_logprob(model, [ids], window_start(5)), rel=1e-5)
    (answer,) = score_continuations(model, [(ids[:20], ids[20:])], stride=5)
    kept = ids[20 - (C - 5) :]  # context - stride tokens before the first one
    assert answer.logprob == pytest.approx(slow_logprob(model, [kept], window_start(5), n_prefix=C - 5), rel=1e-5)


def test_what_the_model_would_write_is_greedy(model):
    prompt = torch.tensor([of_bytes("ab")])
    ids = model.generate(prompt, 5, temperature=0)[0].tolist()
    other = ids[:-1] + [(ids[-1] + 1) % V]
    answers = score_continuations(model, [(ids[:3], ids[3:]), (ids[:3], other[3:])])
    assert [answer.is_greedy for answer in answers] == [True, False]


# ---- depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["none", "loop", "trm"])
def test_trained_depth_is_what_no_rule_gives(tiny, family):
    model = tiny(vocab_size=V, recursion=family, n_layers=1, latent_steps=1, deep_steps=3, supervision_steps=2)
    trained = {"none": 1, "loop": 3, "trm": 2}[family]
    plain = score_corpus(model, BYTE, TEXTS)
    fixed = score_corpus(model, BYTE, TEXTS, rule=ExitRule("fixed", trained), per_step=True)
    assert len(fixed.steps) == trained and plain.steps == []
    assert fixed.steps[-1] == fixed.figures
    assert fixed.figures == pytest.approx(plain.figures, rel=1e-6)
    assert fixed.depth == plain.depth == trained and fixed.saved == 0.0
    assert fixed.visits == {"none": 1, "loop": 3, "trm": 2 * 3 * 2}[family]
    expected = slow_logprob(model, map(of_bytes, TEXTS), window_start(8))
    assert plain.figures.loss == pytest.approx(-expected / plain.size.tokens, rel=1e-5)


def test_each_step_of_the_table_is_that_fixed_depth(model):
    table = score_corpus(model, BYTE, TEXTS, rule=ExitRule(max_recursion_depth=4), per_step=True)
    for step, figures in enumerate(table.steps, 1):
        alone = score_corpus(model, BYTE, TEXTS, rule=ExitRule(max_recursion_depth=step))
        assert figures == pytest.approx(alone.figures, rel=1e-6)
        assert alone.depth == step and alone.saved == pytest.approx(1 - step / 3)
    assert len({figures.loss for figures in table.steps}) == 4


def test_a_halting_threshold_of_0_is_one_step_and_of_1_is_all(model):
    first = score_corpus(model, BYTE, TEXTS, rule=ExitRule("halt", act_threshold=0.0), per_step=True)
    every = score_corpus(model, BYTE, TEXTS, rule=ExitRule("halt", act_threshold=1.0), per_step=True)
    plain = score_corpus(model, BYTE, TEXTS, per_step=True)
    assert (first.depth, every.depth) == (1.0, 3.0)
    assert first.saved == pytest.approx(2 / 3) and first.visits == model.config.visits_per_step
    assert first.figures == pytest.approx(plain.steps[0], rel=1e-6)
    assert first.steps == [first.figures] * 3  # a stopped token keeps its prediction
    assert every.figures == pytest.approx(plain.figures, rel=1e-6)


def test_depth_counts_each_token_once(model):
    """The mean depth is over scored tokens only, not over the context that windows repeat."""
    rule = ExitRule("halt", act_threshold=0.75)
    score = score_corpus(model, BYTE, TEXTS[:1], rule=rule)
    steps = 0
    for sample in corpus_windows(model.config, BYTE, TEXTS[:1], Size()):
        steps += model(sample.input_ids[None], exit=rule).carry.steps[0][sample.target_ids != IGNORE].sum().item()
    assert 1.05 < score.depth < 2.95
    assert score.depth == pytest.approx(steps / 44)
