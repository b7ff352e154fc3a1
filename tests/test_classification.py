"""Labelled data, the two classifiers against what they are made of, and figures computed by hand."""

import gzip
import math

import pytest
import torch
from texts import BYTE

from src.errors import UserError
from src.exits import ExitRule
from src.tasks.classification import (
    Example,
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    draw_confusion,
    encode,
    find_label_names,
    predict,
    read_examples,
    read_label_names,
    report,
)

NAMES = ["bad", "good"]
FAMILIES = ["none", "loop", "trm"]
TEXTS = ["good", "", "a film that is far too long for it", "x y"]


def model_of(tiny, family="trm", **settings):
    return tiny(vocab_size=BYTE.vocab_size, recursion=family, **{"n_layers": 1, "max_seq_len": 24} | settings)


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "1 ||| It 's fine ||| really\n\nbad ||| no\n0 |||\n"),
        ("a.tsv", "1\tIt 's fine ||| really\ngood\tno\n0\t\n".replace("good", "bad")),
        (
            "a.jsonl",
            '{"label": 1, "text": "It \'s fine ||| really"}\n{"label": "bad", "text": "no", "id": 3}\n'
            '{"label": "0", "text": ""}\n',
        ),
    ],
)
def test_three_forms_of_one_content(tmp_path, name, content):
    expected = [Example("It 's fine ||| really", 1), Example("no", 0), Example("", 0)]
    (tmp_path / name).write_text(content)
    assert read_examples(tmp_path / name, NAMES) == expected
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(content)
    assert read_examples(tmp_path / f"{name}.gz", NAMES) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"1 ||| a\n2 ||| b\n", "a.txt, line 2: label '2' is none of 0 bad, 1 good"),
        ("a.txt", b"1 ||| a\n\nno label here\n", "a.txt, line 3: there is no ` ||| `"),
        ("a.tsv", b"1 ||| a\n", "a.tsv, line 1: there is no tab"),
        ("a.jsonl", b'{"label": 1}\n', "a.jsonl, line 1: this is no JSON object with `label` and `text`"),
        ("a.jsonl", b'{"label": 1, "text": \n', "a.jsonl, line 1"),
        ("a.txt", b"1 ||| a\n0 ||| \xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.txt", b"\n \n", "holds no labelled text"),
        ("a.txt.gz", b"1 ||| a\n", "a.txt.gz: "),
        ("missing/a.txt", None, "No such file"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        read_examples(tmp_path / name, NAMES)


def test_label_names(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('["bad", "good"]')
    assert read_label_names(path) == NAMES
    for wrong in ('["bad"]', '["bad", "bad"]', '["bad", 1]', '{"bad": 0}', "[", '["", "a"]'):
        path.write_text(wrong)
        with pytest.raises(UserError, match="give a JSON list of two or more different names"):
            read_label_names(path)
    with pytest.raises(UserError, match="No such file"):
        read_label_names(tmp_path / "none.json")


def test_names_found_in_the_data(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("10 ||| a\n2 ||| b\n2 ||| c\n")
    assert find_label_names(path) == [str(i) for i in range(11)]
    path.write_text("spam ||| a\nham ||| b\nspam ||| c\n")
    assert find_label_names(path) == ["ham", "spam"]


def test_a_text_keeps_its_end():
    samples, cut = encode([Example("abcdefgh", 1), Example("abc", 0), Example("", 1)], BYTE, context=4)
    rows = [sample.input_ids.tolist() for sample in samples]
    assert rows == [[BYTE.bos_id, *b"fgh"], [BYTE.bos_id, *b"abc"], [BYTE.bos_id]] and cut == 1
    assert [sample.target_ids.tolist() for sample in samples] == [[-100, -100, -100, 1], [-100, -100, -100, 0], [1]]


# ---- the classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_shot_is_the_models_own_probability(tiny, family):
    """By hand: the probability of every byte of the name, one forward pass each, after text and suffix."""
    model = model_of(tiny, family, max_seq_len=64)
    classifier = LlamaZeroShotClassifier(model, BYTE, ["bad", "fine"], " {labels}? ")
    assert classifier.suffix == " bad or fine? "
    found = classifier(TEXTS)
    for text, row in zip(TEXTS, found):
        for name, score in zip(["bad", "fine"], row):
            ids, total = [BYTE.bos_id, *f"{text} bad or fine?".encode()], 0.0
            for byte in f" {name}".encode():
                total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[byte].item()
                ids.append(byte)
            assert score.item() == pytest.approx(total, abs=1e-4)


def test_zero_shot_alone_and_in_a_batch(tiny):
    classifier = LlamaZeroShotClassifier(model_of(tiny), BYTE, ["a", "b", "c"])
    assert classifier.suffix == " Is this movie a, b, c? This movie is "
    together = classifier(TEXTS, batch_size=12)
    alone = torch.cat([classifier([text], batch_size=1) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.shape == (4, 3)


def test_zero_shot_by_depth(tiny):
    classifier = LlamaZeroShotClassifier(model_of(tiny, supervision_steps=3), BYTE, NAMES)
    one, three = (classifier(TEXTS, rule=ExitRule("fixed", depth)) for depth in (1, 3))
    torch.testing.assert_close(three, classifier(TEXTS))
    assert (one - three).abs().min() > 1e-4
    by_depth = classifier.by_depth(TEXTS)
    assert by_depth.shape == (3, 4, 2) and torch.equal(by_depth[0], one) and torch.equal(by_depth[2], three)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"coda_layers": 1, "norm": "pre", "tie_embeddings": True}], ids=str)
def test_logits_are_of_the_last_real_state(tiny, family, settings):
    """The head is linear, so logits of the language model are those of the classifier with the head's weights."""
    model = model_of(tiny, family, **settings)
    samples, _ = encode([Example(text, 0) for text in TEXTS], BYTE, model.config.max_seq_len)
    expected = [model(s.input_ids[None], return_steps=True).logits[:, 0, -1] for s in samples]  # each alone
    classifier = LlamaEmbeddingClassifier(model, [str(i) for i in range(BYTE.vocab_size)]).eval()
    with torch.no_grad():
        classifier.classifier.weight.copy_(classifier.head.weight)
    for batch_size in (1, 3, 4):
        found = predict(classifier, samples, batch_size)
        torch.testing.assert_close(found, torch.stack(expected, dim=1), atol=2e-5, rtol=1e-5)
    assert found.shape == (2 if family == "trm" else 1, 4, BYTE.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_used_weight_learns_from_the_label(tiny, family):
    classifier = LlamaEmbeddingClassifier(model_of(tiny, family), NAMES)
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier(torch.tensor([[BYTE.bos_id, *b"ab"]]))[..., 0].sum().backward()
    without = {name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == ({"model.q_head.weight", "model.q_head.bias"} if family == "trm" else set())
    assert classifier.head.weight.grad is None


def test_dropout_reaches_the_blocks(tiny):
    classifier = LlamaEmbeddingClassifier(model_of(tiny), NAMES, dropout=0.5)
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.dropout.p = 0.0
    ids = torch.tensor([[BYTE.bos_id, *b"abc"]])
    assert not torch.equal(classifier.train()(ids), classifier(ids))
    assert torch.equal(classifier.eval()(ids), classifier(ids))
    assert classifier.model.net.blocks[0].attn.dropout == 0.5


# ---- figures --------------------------------------------------------------------------------------------------------


def test_report_by_hand(tmp_path):
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = report(predicted, labels, 4)
    assert found.counts.tolist() == [[2, 1, 0, 0], [0, 1, 2, 0], [0] * 4, [0] * 4]
    assert found.accuracy == pytest.approx(3 / 6)
    assert found.per_class[0] == pytest.approx((1.0, 2 / 3, 0.8))
    assert found.per_class[1] == pytest.approx((1 / 2, 1 / 3, 0.4))
    assert found.per_class[2][0] == 0.0 and math.isnan(found.per_class[2][1])
    assert all(math.isnan(figure) for figure in found.per_class[3])
    assert found.macro_f1 == pytest.approx((0.8 + 0.4) / 2)  # of the labels that occur
    path = draw_confusion(found, ["a", "b", "c", "d"], tmp_path / "c.png", "four")
    assert path.read_bytes().startswith(b"\x89PNG")
