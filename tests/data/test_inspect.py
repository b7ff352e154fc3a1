"""What is in data files: fields, lengths, duplicates, overlap; inspect_data.py as a user runs it."""

import json
from array import array
from collections import Counter

import numpy as np
import pytest
from texts import BYTE, store_of, write, write_records

import inspect_data
from src.config import run
from src.data import inspect
from src.data.inspect import Hashes, documents_at, fields_of, fit, histogram, measure, overlap, repeats, summary
from src.data.inspect_report import percent, table
from src.data.readers import SkipLog
from src.data.record_rows import RecordDataset
from src.data.records import RecordFields
from src.dataset import PackedDataset, WikiJsonlDataset
from src.errors import UserError

TEXTS = ["one two", "three\n", "One  TWO ", "one two", "x" * 70_000 + "\n" + "y" * 70_000, "one two"]


def measured(paths, text_field="text", tokenizer=None, **options):
    return measure(paths, text_field, SkipLog(True, Counter(), True, 10**6), tokenizer, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_every_format_gives_the_same_measures(tmp_path, name):
    texts = [text.rstrip("\n") for text in TEXTS]
    path = write(tmp_path / name, texts)
    found = measured([path], tokenizer=BYTE, n_examples=2)
    lengths = Counter(map(len, texts))
    assert found.lengths == {"characters": lengths, "tokens": lengths} and found.files == {path: 6}
    assert found.examples == texts[:2]
    assert repeats(found.whole) == {"repeated": 2, "most": 3, "first": 0, "second": 3}
    assert repeats(found.normal)["repeated"] == 3
    (quoted,) = documents_at({3}, [path], "text", 10**6).values()
    assert quoted.text == "one two" and quoted.place == f"{path}, document 4"
    types = {"a.parquet": {"text": {"string": 6}, "n": {"int64": 6}}, "a.txt": {}}.get(name, {"text": {"string": 6}})
    assert fields_of([path], 10**6) == [{"name": n, "types": t, "share": 1.0} for n, t in types.items()]


def test_hashes_do_not_depend_on_the_pieces():
    text = " A b\n\n  Straße\tDÉ  "
    whole = Hashes().add(text).values()
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = [0, *sorted(rng.integers(0, len(text) + 1, 4).tolist()), len(text)]
        pieces = Hashes()
        for start, end in zip(cuts, cuts[1:]):
            pieces.add(text[start:end])
        assert pieces.values() == whole
    assert Hashes().add("a B strasse dé").values()[1] == whole[1] != Hashes().add("ab strasse dé").values()[1]
    assert Hashes().add("a b strasse dé").values()[0] != whole[0]


def test_records(tmp_path):
    rows = [{"question": "Two?", "answer": a, "level": n} for n, a in enumerate(["2", "2", 3, None])]
    rows += [{"question": "two ?", "answer": "2"}, {"question": "One?", "answer": "12"}]
    path, other = write_records(tmp_path / "a.json", rows), write_records(tmp_path / "b.jsonl", rows[-2:-1])
    log = SkipLog(False, Counter(), False, 1000)
    found = measure([path], RecordFields(), log, BYTE, 1)
    assert log.skipped == {"answer is neither a string nor a number": 1}
    prompt = len("Input:  \n Output:")
    assert found.lengths == {
        "question characters": {4: 4, 5: 1},
        "answer characters": {1: 4, 2: 1},
        "answer tokens": {2: 4, 3: 1},
        "record tokens": {prompt + 4 + 2: 3, prompt + 7: 2},
    }
    figures = inspect.figures_of(found, True, 1, prompt + 7)
    assert figures["fit"] == {"max_seq_len": prompt + 7, "longer": 2}
    assert figures["duplicates"] == {
        **{"repeated": 1, "most": 2, "first": 0, "second": 1},
        **{"repeated_questions": 2, "repeated_normalised": 2},
    }
    assert found.examples == ["Input: Two? \n Output: 2"]
    others = measure([other], RecordFields(), log)
    assert overlap(found, others) == {"other": 1, "exact": 1, "normalised": 1, "example": 3}
    fields = {each["name"]: (each["types"], each["share"]) for each in fields_of([path], 1000)}
    assert fields["answer"] == ({"string": 4, "integer": 1, "null": 1}, 5 / 6)
    assert fields["level"] == ({"integer": 4}, 4 / 6)


def test_columns_of_parquet(tmp_path):
    path = write_records(tmp_path / "a.parquet", [{"text": "a", "n": None, "tags": ["x"]}, {"text": "b", "n": 2}])
    assert [(each["name"], each["share"]) for each in fields_of([path], 1000)] == [
        ("text", 1),
        ("n", 0.5),
        ("tags", None),
    ]


def test_summary_and_histogram():
    lengths = np.random.default_rng(1).geometric(0.02, 999)
    counts = dict(Counter(lengths.tolist()))
    figures = summary(counts)
    assert figures["mean"] == pytest.approx(lengths.mean()) and figures["total"] == lengths.sum()
    assert (figures["min"], figures["median"], figures["max"]) == (lengths.min(), np.median(lengths), lengths.max())
    assert figures["p95"] == np.sort(lengths)[int(0.95 * 999)]
    bins = histogram(counts, 10)
    assert sum(number for _, _, number in bins) == 999 and len(bins) <= 12 and bins[-1][1] is None
    for low, high, number in bins:
        assert number == ((lengths >= low) & (lengths <= (high or 10**9))).sum()
    assert histogram({5: 3}, 10) == [(5, 5, 3)] and histogram({0: 1, 9: 1}, 10) == [
        (n, n, n in (0, 9)) for n in range(10)
    ]


def test_fit():
    counts = {7: 2, 8: 1, 20: 1}  # 8, 8, 9 and 21 tokens with EOS
    expected = {"max_seq_len": 8, "longer": 2, "windows": 6, "tokens": 46, "cut_tokens": 14}
    assert fit(counts, 1, 8, False) == expected
    assert fit(counts, 0, 8, True)["longer"] == 1 and fit(counts, 1, 8, True)["longer"] == 2
    assert fit(counts, 1, 46, False)["windows"] == 0 and fit(counts, 1, 45, False)["windows"] == 1


def test_fit_is_what_training_does(tmp_path, capsys):
    texts = ["a" * n for n in (7, 7, 8, 20, 3, 40)]
    counts = Counter(map(len, texts))
    store = store_of(tmp_path, texts)
    for seq_len in (1, 8, 9, 64, len(store) - 1):
        figures = fit(counts, 1, seq_len, False)
        assert figures["windows"] == len(PackedDataset(store, seq_len)) and figures["tokens"] == len(store)
        assert figures["tokens"] - figures["cut_tokens"] == WikiJsonlDataset(store, BYTE, seq_len).n_targets
    with pytest.raises(UserError, match="one window needs"):
        PackedDataset(store, len(store))
    assert fit(counts, 1, len(store), False)["windows"] == 0
    path = write_records(tmp_path / "r.jsonl", [{"question": text, "answer": "b"} for text in texts])
    found = measured([path], RecordFields(), BYTE)
    for seq_len in (23, 27, 28, 60):
        kept = RecordDataset(path, BYTE, seq_len, cache_dir=str(tmp_path / "cache"))
        assert len(texts) - len(kept) == fit(found.lengths["record tokens"], 1, seq_len, True)["longer"]


def test_repeats_takes_the_most_frequent():
    assert repeats(array("Q", [5, 7, 2**64 - 1, 7, 5, 2**64 - 1, 7])) == {
        **{"repeated": 4, "most": 3, "first": 1, "second": 3}
    }
    assert repeats(array("Q", [1, 2])) == {"repeated": 0, "most": 1, "first": None, "second": None}


def test_wide_characters_take_two_columns():
    assert list(table(["field", "type"], [["京都", "string"], ["a", "b"]], left=2)) == [
        *("  field  type", "  京都   string", "  a      b")
    ]


def test_percent():
    values = [0, 0.0001, 0.01, 0.25, 0.99999, 1]
    assert list(map(percent, values)) == ["0 %", "< 0.1 %", "1.0 %", "25.0 %", "> 99.9 %", "100 %"]


def test_the_script(tmp_path, capsys):
    path, other = (
        write(tmp_path / "a.jsonl", [*TEXTS, "a\x1b[2Jb\u3000c"]),
        write(tmp_path / "b.txt", ["ONE two", "more"]),
    )
    with open(path, "a") as file:
        file.write('{"text": 1}\n{"body"\n')
    flags = ["--tokenizer", "byte", "--max_seq_len", "100", "--examples", "7", "--against", other]
    inspect_data.main([path, *flags, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert f"{path}: 7 documents, 140,045 characters\n" in out and "\x1b" not in out and "a<U+001B>[2Jb\u3000c" in out
    assert "  text   string 87.5 %, integer 12.5 %     100 %\n" in out
    assert f"occurs 3 times, at first in {path}, document 1\n  and {path}, document 4:\n    one two\n" in out
    assert "  0 (0 %) documents are among its 2 exactly\n  4 (57.1 %) if white space and case are ignored\n" in out
    assert "  1 (14.3 %) documents are longer than one window\n" in out
    assert "  text is not a string      1\n" in out and f"{path}:9: skipped, broken JSON" in err
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["skipped"] == {"text is not a string": 1, "broken JSON": 1}
    assert figures["lengths"]["tokens"]["max"] == 140_001 and figures["overlap"]["normalised"] == 4
    assert figures["duplicates"]["second"] == {"place": f"{path}, document 4", "text": "one two"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no paths given"),
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["a.txt", "--max_seq_len", "8"], "add --tokenizer"),
        (["a.txt", "--plot", "a.pdf"], "ends in .png"),
        (["a.txt", "--examples", "-1"], "examples is -1"),
        (["a.txt", "--against", "./a.txt"], "in --paths and in --against"),
        (["a.txt", "--json", "a.txt"], "also read"),
        (["a.txt", "--records"], "a.txt: no data file found"),
        (["a.jsonl"], "available fields: body"),
        (["a.txt", "--against", "a.jsonl"], "available fields: body"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", ["a"])
    write(tmp_path / "a.jsonl", ["a"], field="body")
    with pytest.raises(SystemExit) as caught:
        run(lambda: inspect_data.main(flags))
    out = capsys.readouterr()
    assert caught.value.code == 2 and out.out == "" and said in out.err.splitlines()[-1]
    assert out.err.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "a.txt").read_text() == "a\n<|endoftext|>\n"
