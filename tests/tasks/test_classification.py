"""Tests of labelled data, of the two classifiers against the bare language model, and of metrics by hand."""

import gzip
import json
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
    spelling,
    write_answers,
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
        ("a.txt", b"1 ||| a\n2 ||| b\n", "a.txt, line 2: label '2' is not one of 0 bad, 1 good"),
        ("a.txt", b"1 ||| a\n\nno label here\n", "a.txt, line 3: there is no ` ||| `"),
        ("a.tsv", b"1 ||| a\n", "a.tsv, line 1: there is no tab"),
        ("a.jsonl", b'{"label": 1}\n', "a.jsonl, line 1: not a JSON object with `label` and `text`"),
        ("a.jsonl", b'{"label": 1, "text": \n', "a.jsonl, line 1"),
        ("a.txt", b"1 ||| a\n0 ||| \xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.txt", b"\n \n", "has no labelled text"),
        ("a.csv", b"1,a\n", "a.csv: files of labelled texts are .tsv, .jsonl or .txt, not .csv: convert it"),
        ("a.parquet", b"PAR1", "a.parquet: files of labelled texts are .tsv, .jsonl or .txt, not .parquet"),
        (
            "a.tsv",
            b'"label"\t"text"\n1\t"a"\n',
            "a.tsv: its cells are in quotes: write it without quotes, or as .jsonl",
        ),
        ("a.tsv", b'"text"\n"a"\n', "a.tsv: its cells are in quotes"),
        ("a.tsv", b"label\tphrase\n1\ta\n0\tb\n", "a.tsv, line 1 looks like a header, but 'phrase' is no known name"),
        ("a.txt", b"Label ||| title\n1 ||| a\n", "a.txt, line 1 looks like a header, but 'title' is no known name"),
        ("a.txt.gz", b"1 ||| a\n", "a.txt.gz cannot be read to its end"),
        ("missing/a.txt", None, "a.txt: no such file"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        read_examples(tmp_path / name, NAMES)


def test_numbers_need_names_in_a_given_order(tmp_path):
    (tmp_path / "a.txt").write_text("bad ||| a\n1 ||| b\n")
    with pytest.raises(
        UserError, match="line 2: label '1' is not one of bad, good: say what the numbers mean with --la"
    ):
        read_examples(tmp_path / "a.txt", NAMES, takes_numbers=False)
    assert [example.label for example in read_examples(tmp_path / "a.txt", NAMES)] == [0, 1]
    (tmp_path / "b.txt").write_text("7 ||| a\n")
    with pytest.raises(UserError, match="label '7' is not one of 0, 1: correct the label or the names"):
        read_examples(tmp_path / "b.txt", ["0", "1"], takes_numbers=False)


def test_label_names(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('["bad", "good"]')
    assert read_label_names(path) == NAMES
    for start in ("\ufeff", ""):  # with a byte order mark, as Windows writes it
        path.write_text(f'{start}["bad ", "good"]\r\n', encoding="utf-8")
        assert read_label_names(path) == NAMES
    path.write_text("[")
    with pytest.raises(UserError, match="names.json is broken JSON"):
        read_label_names(path)
    many = json.dumps([str(i) for i in range(1001)])
    for wrong in ('["bad"]', '["bad", "bad "]', '["bad", 1]', '{"bad": 0}', '["", "a"]', '["a ||| b", "c"]', many):
        path.write_text(wrong)
        with pytest.raises(UserError, match="give a JSON list of two or more different names"):
            read_label_names(path)
    with pytest.raises(UserError, match="no such file"):
        read_label_names(tmp_path / "none.json")


def test_names_found_in_the_data(tmp_path):
    path = tmp_path / "a.txt"
    for labels, names in (
        (("10", "2", "2"), ["2", "10"]),
        (("spam", "ham", "spam"), ["ham", "spam"]),
        (("1", "-1", "0.5", "0"), ["-1", "0", "0.5", "1"]),
        (("x", "404", "500"), ["404", "500", "x"]),
        (("999999999", "0"), ["0", "999999999"]),
    ):
        path.write_text("".join(f"{label} ||| text {i}\n" for i, label in enumerate(labels)))
        assert find_label_names(path) == names
        assert [names[example.label] for example in read_examples(path, names)] == list(labels)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "label\ttext\n1\tgood\n0\tbad\n"),
        ("a.tsv", "Sentence\tLabel\ngood\t1\nbad\t0\n"),
        ("a.tsv", "id\tCategory\tnote\ttext\n7\t1\tx\tgood\n8\t0\ty\tbad\n"),
        ("a.txt", "sentiment ||| review\n1 ||| good\n0 ||| bad\n"),
        ("a.txt", "\ufeff1 ||| good\r\n0 ||| bad\r\n"),
        ("a.jsonl", '{"Sentence": "good", "Class": 1}\n{"Sentence": "bad", "Class": 0.0}\n'),
        ("a.JSONL", '{"text": "good", "label": "1"}\r{"text": "bad", "label": "0"}\r'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_columns_go_by_their_names_and_files_by_their_mark(tmp_path, name, content, encoding):
    data = content.removeprefix("\ufeff" if encoding != "utf-8" else "").encode(encoding)
    (tmp_path / name).write_bytes(data)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert find_label_names(path) == ["0", "1"]
        assert read_examples(path, ["0", "1"]) == [Example("good", 1), Example("bad", 0)]


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_one_label_in_two_spellings(tmp_path, kind):
    """Joined files with a mark each; an accent as a part of its letter (Linux) or as a character (macOS)."""
    form = {".txt": "\ufeff{} ||| good\n", ".jsonl": '\ufeff{{"label": "{}", "text": "good"}}\n'}[kind]
    path = tmp_path / f"a{kind}"
    path.write_text("".join(map(form.format, ("caf\u00e9", "cafe\u0301", "bar"))), encoding="utf-8")
    assert find_label_names(path) == ["bar", "caf\u00e9"]
    for names in (["bar", "caf\u00e9"], ["bar", "cafe\u0301"]):
        assert [example.label for example in read_examples(path, names)] == [1, 1, 0]
        assert spelling(path, names) == names


def test_bool_labels_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
    assert find_label_names(tmp_path / "a.jsonl") == ["false", "true"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "a good film\t1\nbad\t0\n", "2 different labels in 2 lines, such as 'a good film': the label comes"),
        ("a.tsv", "so good a film\tpos\nso bad a film\tneg\n", "swap the columns, name them in a header line, or give"),
        ("a.txt", "良い ||| pos\n最高 ||| pos\n悪い ||| neg\n最悪 ||| neg\n", "4 different labels in 4 lines"),
        ("a.txt", "".join(f"l{i} ||| t{i}\n" for i in range(30)), "30 different labels in 30 lines"),
        ("a.txt", "".join(f"l{i // 3} ||| t{i}\n" for i in range(3003)), "1,001 different labels in 3,003 lines"),
        ("a.txt", "1 ||| a\n1 ||| b\n", "every text has the label '1': give texts of two labels"),
        ("a.txt", "1 ||| a\n ||| b\n", "line 2: there is no ` ||| ` between label and text, or the label is empty"),
        ("a.txt", "9" * 5000 + " ||| a\n1 ||| b\n", "line 1: '" + "9" * 60 + "' cannot be a label"),
        ("a.jsonl", '{"label": ' + "9" * 5000 + ', "text": "a"}', "line 1 is broken JSON"),
        ("a.jsonl", '{"label": [1], "text": "a"}', "line 1: not a JSON object with `label` and `text`"),
        ("a.jsonl", '{"label": "x\\ny", "text": "a"}', "cannot be a label"),
        ("a.jsonl", '{"label": "x ||| y", "text": "a"}', "cannot be a label"),
        ("a.jsonl", '{"label": 1, "text": "a"}\n{"label": 0, "text": "\\ud800"}', "line 2 has an escape for half"),
        ("a.jsonl", '{"label": "\\ud800", "text": "a"}', "line 1 has an escape for half a character"),
        ("a.txt", "a\tb ||| c\nd ||| e\n", "line 1: 'a\\tb' cannot be a label"),  # a .tsv could not be read back
        ("a.jsonl", "[" * 5000, "line 1 is broken JSON"),
        ("a.tsv", "label\tid\ttext\n1\t2\n", "line 2 has 2 columns, the header 3"),
        ("a.tsv", "id\ttext\n1\tgood\n", "line 2: there is no tab"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        find_label_names(tmp_path / name)
    assert said in str(caught.value)


def test_a_damaged_archive_of_labels_is_one_line(tmp_path):
    whole = gzip.compress("".join(f'{{"label": {i % 2}, "text": "{i * 7919}"}}\n' for i in range(999)).encode())
    for content in (whole[:-9], whole[:99], whole[:60] + b"\xff\0" * 9 + whole[80:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="a.jsonl.gz"):
            read_examples(tmp_path / "a.jsonl.gz", ["0", "1"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "good\nbad\n"),
        ("a.txt", "||| good\n||| bad\n"),
        ("a.tsv", "good\nbad\n"),
        ("a.tsv", "id\tsentence\n0\tgood\n1\tbad\n"),
        ("a.jsonl", '{"text": "good"}\n{"text": "bad", "label": null}\n'),
    ],
)
def test_texts_without_labels(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    examples = read_examples(tmp_path / name, NAMES, needs_labels=False)
    assert examples == [Example("good", None), Example("bad", None)]
    assert [sample.target_ids[-1].item() for sample in encode(examples, BYTE, 9)[0]] == [-100, -100]
    with pytest.raises(UserError, match="add the label"):
        read_examples(tmp_path / name, NAMES)


@pytest.mark.parametrize("kind", [".txt", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "names", "spelt"),
    [
        ("-1 ||| bad\n0 ||| so\n1 ||| good\n", ["-1", "0", "1"], ["-1", "0", "1"]),
        ("1 ||| a\n0 ||| b\n", NAMES, ["0", "1"]),
        ("good ||| a\nbad ||| b\n", NAMES, NAMES),
        ("a\nb\n", NAMES, NAMES),
    ],
)
def test_answers_are_spelt_as_the_file_has_its_labels_and_read_back(tmp_path, content, names, spelt, kind):
    (tmp_path / "a.txt").write_text(content)
    assert spelling(tmp_path / "a.txt", names) == spelt
    labels, texts = [*spelt, spelt[0]], ["of two\nlines\r\n", "tab\t||| bars", "京 \u2028 都", ""][: len(names)] + [""]
    write_answers(tmp_path / f"out{kind}", labels, texts)
    shown = texts if kind == ".jsonl" else [" ".join(text.splitlines()).strip() for text in texts]
    assert read_examples(tmp_path / f"out{kind}", names) == [
        Example(text, spelt.index(label)) for label, text in zip(labels, shown)
    ]


def test_a_text_keeps_its_end():
    samples, cut = encode([Example("abcdefgh", 1), Example("abc", 0), Example("", 1)], BYTE, context=4)
    rows = [sample.input_ids.tolist() for sample in samples]
    assert rows == [[BYTE.bos_id, *b"fgh"], [BYTE.bos_id, *b"abc"], [BYTE.bos_id]] and cut == 1
    assert [sample.target_ids.tolist() for sample in samples] == [[-100, -100, -100, 1], [-100, -100, -100, 0], [1]]


# ---- the classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_shot_is_the_models_own_probability(tiny, family):
    """The reference computes each byte of the name after text and suffix, with one forward pass per byte."""
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
    """The head is linear: a classifier with the head's weights gives the language model's logits."""
    model = model_of(tiny, family, **settings)
    samples, _ = encode([Example(text, 0) for text in TEXTS], BYTE, model.config.max_seq_len)
    expected = [model(s.input_ids[None], return_steps=True).logits[:, 0, -1] for s in samples]  # each alone
    classifier = LlamaEmbeddingClassifier(model, [str(i) for i in range(BYTE.vocab_size)]).eval()
    with torch.no_grad():
        classifier.classifier.weight.copy_(classifier.head.weight)
    for batch_size in (1, 3, 4):
        found = predict(classifier, samples, batch_size)
        torch.testing.assert_close(found, torch.stack(expected, dim=1), atol=2e-5, rtol=1e-5)
    assert found.shape == ({"trm": 2, "loop": 2, "none": 1}[family], 4, BYTE.vocab_size)  # each recursion step answers


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


@pytest.mark.parametrize(("n_labels", "n_texts"), [(20, 400), (21, 0), (300, 0)])
def test_a_confusion_picture_of_many_labels_is_shaded_only(tmp_path, monkeypatch, n_labels, n_texts):
    labels, drawn, figures = torch.arange(n_labels), [], []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, *args, **options: drawn.append(args))
    monkeypatch.setattr("src.tasks.classification.save_picture", lambda figure, path: figures.append(figure) or path)
    draw_confusion(report(labels, labels, n_labels), [f"label {i}" for i in range(n_labels)], tmp_path / "c.png")
    assert len(drawn) == n_texts and figures[0].get_figheight() < 15
    assert len(figures[0].axes[0].get_xticks()) <= 20


def test_labels_of_dollars_are_drawn(tmp_path):
    found = report(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), 3)
    path = draw_confusion(found, ["$", "$$", "$$$"], tmp_path / "a.png", "a$b$")
    assert path.read_bytes()[:4] == b"\x89PNG"
