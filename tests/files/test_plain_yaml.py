"""YAML for settings: what is written can be read back, and everything that settings do not need is rejected."""

import math
import random
import time

import pytest

from src.errors import UserError
from src.files.plain_yaml import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *(("", None), ("~", None), ("null", None), ("NULL", None), ("true", True), ("No", False), ("on", True)),
        *(("1", 1), ("-12", -12), ("1_000", 1000), ("1e-3", 0.001), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0)),
        *((".inf", math.inf), ("-.Inf", -math.inf), ("010", "010"), ("1:30", "1:30"), ("0x10", "0x10")),
        *(("2024-01-01", "2024-01-01"), ("'yes'", "yes"), ('"1"', "1"), ("a b", "a b"), ("<<", "<<"), ("=", "=")),
    ],
)
def test_words(word, value):
    got = parse_yaml(f"key: {word}\nlist: [{word or '~'}]\n", "c.yaml")
    assert got == {"key": value, "list": [value]} and type(got["key"]) is type(value)


def test_nan():
    assert math.isnan(parse_yaml(".nan", "c.yaml"))


@pytest.mark.parametrize("text", ["", "\n", "# a comment\n", "---\n", "null", "--- # nothing\n...\n"])
def test_nothing_is_set(tmp_path, text):
    assert parse_yaml(text, "c.yaml") is None
    (tmp_path / "c.yaml").write_text(text)
    assert read_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_windows_writes(tmp_path, encoding):
    (tmp_path / "c.yaml").write_bytes("a: 京都\r\nb: [1,\r\n 2]\r\n".encode(encoding))
    assert read_yaml(tmp_path / "c.yaml") == {"a": "京都", "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: a is already set in line 1"),
        ("s:\n  t:\n    a: 1\n    a: 1\n", "line 4: a is already set in line 3"),
        ("l: [{a: 1}, {a: 2, a: 3}]", "line 1: a is already set in line 1"),
        ("a: !!int 3", "line 1: tags"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: tags"),
        ("a: 1\nb: !x {c: 1}", "line 2: tags"),
        ("a: &x [1]\nb: *x", "line 1: .*anchors"),
        ("b: *x", "line 1: .*aliases"),
        ("a: 1\n---\na: 2\n", "2 documents"),
        ("[" * 100_000, "nest over 100 deep"),
        ("- " * 100_000, "nest over 100 deep"),
        ("{a: " * 100_000, "nest over 100 deep"),
        ("? [a]\n: b", "plain word"),
        ("!!str a: b", "plain word"),
        ("a: [1", "not a valid settings file"),
        ("a: b: c", "not a valid settings file"),
        ("a: \ud800", "not a valid settings file"),
        ("a: \x00", "not a valid settings file"),
        ("a: " + "x" * 9_000_000, "over .* characters"),
    ],
    ids=range(19),
)
def test_refused_in_no_time(text, said):
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"c.yaml.*{said}"):
        parse_yaml(text, "c.yaml")
    assert time.perf_counter() - start < 1  # seconds


def test_no_map(tmp_path):
    for text in ("- a\n", "only words\n", "3\n"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match="c.yaml holds no settings"):
            read_yaml(tmp_path / "c.yaml")


def test_as_deep_as_it_may_be():
    assert parse_yaml("[" * 99 + "1" + "]" * 99, "c.yaml") == eval("[" * 99 + "1" + "]" * 99)


def test_every_text_and_number_comes_back():
    rng = random.Random(0)
    letters = "0123456789eE._+-:~ynofNaninf#'\"\\ \n\t,[]{}&*!|>%@\x85\u2028京"
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 6))) for _ in range(400)]
    texts += ["1e-3", "yes", "null", "010", "1:30", "~", "", " x ", "\x07", "=", "<<", "京\u3000都 " * 60, "😀"]
    numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-30, 30) for _ in range(100)]
    numbers += [0, -1, 10**40, math.inf, 1e-5, True, None]
    value = {"texts": texts, "numbers": numbers, "names": dict.fromkeys((t for t in texts if t), 1), "none": [[], {}]}
    assert parse_yaml(dump_yaml(value), "c.yaml") == value
