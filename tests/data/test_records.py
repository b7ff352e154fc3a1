"""Records: questions with answers, read from every format; what is wrong with a bad one."""

import gzip
import os
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import write_records

from src.data import records
from src.data.corpus import NoDocument
from src.data.readers import BAD_JSON, BAD_UTF8, NOT_OBJECT, TOO_LONG, SkipLog
from src.data.records import Record, RecordFields, answer_of, as_text, final_answer, prompt_of, read_records
from src.errors import UserError

GSM8K = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(3)]
SVAMP = [{"ID": "a", "Body": "Jo has 2 pens.", "Question": "How many?", "Equation": "2", "Answer": 2.0}]
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.json", "A.JSON"])
def test_every_format_gives_the_same_records(tmp_path, name):
    path = tmp_path / name
    rows = [row | {"metadata": {"n": 1}} for row in GSM8K]
    write_records(path if name != "A.JSON" else path.with_suffix(".json"), rows)
    if name == "A.JSON":
        os.rename(path.with_suffix(".json"), path)
    expected = [
        Record(row["question"], row["answer"], str(path), number, {"metadata": {"n": 1}})
        for number, row in enumerate(GSM8K, 1)
    ]
    assert list(read_records(path)) == expected
    assert list(read_records([tmp_path])) == expected


def test_known_shapes_and_named_fields(tmp_path):
    write_records(tmp_path / "svamp.json", SVAMP)
    (record,) = read_records(tmp_path / "svamp.json")
    assert record[:2] == ("Jo has 2 pens. How many?", "2")
    assert record.extra == {"ID": "a", "Equation": "2"}
    path = write_records(tmp_path / "b.jsonl", [{"q": " a\n", "a": "b ", "answer": "c", "question": "d"}])
    asked = lambda *fields: next(read_records(path, *fields))[:2]  # noqa: E731
    assert asked() == ("d", "c")
    assert asked("q", "a") == ("a", "b")
    assert asked("q") == ("a", "c")
    assert asked(None, "a") == ("d", "b")


def test_numbers_become_text(tmp_path):
    answers = [1, 10.0, -2.5, 1e15, 1e300, 0, "7.0", 12345678901234567890]
    path = write_records(tmp_path / "a.jsonl", [{"question": "?", "answer": answer} for answer in answers])
    expected = ["1", "10", "-2.5", "1000000000000000", "1e+300", "0", "7.0", "12345678901234567890"]
    assert [record.answer for record in read_records(path)] == expected


def test_decimal_numbers_become_text(tmp_path):
    answers = ["10.00", "-2.50", "0.00", "1e-10", "12345678901234567890123456789.1234567891"]
    table = pa.table({"question": ["?"] * 5, "answer": pa.array(map(Decimal, answers), pa.decimal256(50, 10))})
    pq.write_table(table, tmp_path / "a.parquet")
    expected = ["10", "-2.5", "0", "0.0000000001", answers[-1]]
    assert [record.answer for record in read_records(tmp_path / "a.parquet")] == expected
    assert as_text(Decimal("1E+3")) == "1000" and as_text(Decimal("NaN")) is None


def test_bad_records_are_counted_and_named(tmp_path, capsys):
    good = {"question": "a", "answer": "b"}
    rows = [{"question": "a"}, good | {"question": 1}, good | {"answer": " "}, good | {"question": ""}]
    rows += [good | {"answer": answer} for answer in (None, [1], True, float("nan"), "\ud800")] + ["text", good]
    reasons = {records.NO_RECORD: 1, records.BAD_QUESTION: 1, records.EMPTY_ANSWER: 1, records.EMPTY_QUESTION: 1}
    reasons |= {records.BAD_ANSWER: 4, BAD_UTF8: 1, NOT_OBJECT: 1}
    path = write_records(tmp_path / "a.jsonl", rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"question"\n')
    counts = Counter()
    assert [record.line for record in read_records(path, log=SkipLog(False, counts, False, 1000))] == [11]
    assert counts == reasons | {BAD_JSON: 1}
    assert capsys.readouterr().err == ""
    assert len(list(read_records(path))) == 1
    assert f"{path}:3: skipped, empty answer\n" in (said := capsys.readouterr().err)
    assert said.splitlines()[-1].startswith("skipped: 1 x no question and answer, 1 x question is not a string, ")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no question and answer; available fields: question$"):
        list(read_records(path, log=SkipLog(True, Counter(), True, 1000)))
    path = write_records(tmp_path / "b.parquet", [good | {"question": "a" * 500}, good])
    assert [record.line for record in read_records(path, log=SkipLog(False, counts, False, 400))] == [2]
    assert counts[TOO_LONG] == 1


def test_the_files_of_a_corpus_are_read_alike(tmp_path, capsys):
    good = write_records(tmp_path / "gsm.jsonl", GSM8K)
    for name in ("LICENSE.txt", "book.txt", "info.json"):
        (tmp_path / name).write_text('{"title": "x"}')
    licence, book, info = (str(tmp_path / name) for name in ("LICENSE.txt", "book.txt", "info.json"))
    assert RecordFields().alike([licence, good, info]) == [good]
    assert capsys.readouterr().err == f"skipped {licence}, {info} (no records, unlike other files of the path)\n"
    assert RecordFields().alike([book, info]) == [book]
    assert capsys.readouterr().err == f"skipped {info} (neither records nor text)\n"
    assert RecordFields().alike([good, book]) == [good]
    capsys.readouterr()
    assert RecordFields().alike([good]) == [good] and capsys.readouterr().err == ""


def test_a_json_has_records_if_any_of_its_items_has_the_fields(tmp_path):
    """It cannot be read as text instead."""
    path = write_records(tmp_path / "a.json", [{"about": "x"}, *GSM8K])
    assert RecordFields().fit(path) and RecordFields().alike([path]) == [path]
    assert not RecordFields().fit(write_records(tmp_path / "b.jsonl", [{"text": "x"}, *GSM8K]))
    for content in ("[{broken", '{"question": "a", "answer": "b"}', '[{"about": "x"}]'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json: no list of records with the fields q and a: correct the file"):
            RecordFields("q", "a").alike([path])


def test_a_binary_column_that_nobody_needs(tmp_path):
    rows = [{"question": "a", "answer": "1", "image": b"\xff\xfe"}, {"question": "b", "answer": "2", "image": None}]
    path = write_records(tmp_path / "a.parquet", rows)
    found = list(read_records(path))
    assert [(r.question, r.answer) for r in found] == [("a", "1"), ("b", "2")] and "image" not in found[0].extra
    counts = Counter()
    path = write_records(
        tmp_path / "b.parquet", [{"question": b"\xff", "answer": "1"}, {"question": b"c", "answer": "3"}]
    )
    assert [r.question for r in read_records(path, log=SkipLog(False, counts, False, 100))] == ["c"]
    assert counts == {BAD_UTF8: 1}
    bad = pa.array([b"\xff", b"c"], pa.binary()).view(pa.string())
    for names in (("question", "answer"), ("answer", "question"), ("other", "question")):
        table = pa.table(dict(zip(names, (bad, ["a", "b"]))) | ({"answer": ["1", "2"]} if "other" in names else {}))
        pq.write_table(table, tmp_path / "c.parquet")
        counts.clear()
        n_found = sum(1 for _ in read_records(tmp_path / "c.parquet", log=SkipLog(False, counts, False, 100)))
        assert (n_found, counts) == ((2, {}) if "other" in names else (1, {BAD_UTF8: 1}))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_files_without_the_fields_are_refused(tmp_path, name):
    path = write_records(tmp_path / name, [{"body": "x", "n": 1}] * 5)
    advice = "available fields: body, n .set --question_field and --answer_field."
    with pytest.raises(NoDocument, match=f"has the fields question and answer, or Body, Question and Answer; {advice}"):
        list(read_records(path))
    with pytest.raises(NoDocument, match="has the fields body and y; available"):
        list(read_records(path, "body", "y"))


def test_files_that_are_no_records_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(UserError, match=r"a\.json is not a list of records"):
        list(read_records(tmp_path / "a.json"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"supported types are \.jsonl, \.jsonl\.gz, \.parquet, \.json$"):
        list(read_records(tmp_path / "a.txt"))
    with pytest.raises(NoDocument, match=r"nothing usable \(2 x empty answer\)"):
        list(read_records(write_records(tmp_path / "b.jsonl", [{"question": "a", "answer": ""}] * 2)))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.parquet cannot be read to its end"):
        list(read_records(tmp_path / "c.parquet"))


def test_the_texts_of_a_record():
    assert prompt_of("What?") + answer_of("42") == "Input: What? \n Output: 42"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 7.\n#### 1,200", "1200"),
        (" 42 ", "42"),
        ("#### 1 #### 2", "2"),
        ("$1,234,567.50", "$1234567.50"),
        ("1,2,3", "1,2,3"),
        ("1,234,56", "1,234,56"),
        ("a, b", "a, b"),
        ("####", ""),
    ],
)
def test_final_answers(text, expected):
    assert final_answer(text) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in shared/data")
def test_real_data_sets():
    assert [final_answer(record.answer) for record in read_records(SHARED / "gsm8k")][:3] == ["72", "10", "5"]
    assert sum(1 for _ in read_records(SHARED / "math_extra" / "SVAMP.json")) == 1000


def test_a_number_of_32_bits_keeps_its_digits(tmp_path):
    table = pa.table({"question": ["a", "b"], "answer": pa.array([0.1, 2.0], pa.float32())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [record.answer for record in read_records(tmp_path / "a.parquet")] == ["0.1", "2"]


def test_a_date_that_nobody_needs(tmp_path):
    """Dates after the year 9999, and a time zone that the system does not know."""
    for kind in (pa.timestamp("us"), pa.timestamp("us", "Mars/Base")):
        dates = pa.array([2**62], pa.int64()).cast(kind, safe=False)
        pq.write_table(pa.table({"question": ["a"], "answer": ["1"], "t": dates}), tmp_path / "a.parquet")
        assert [record.answer for record in read_records(tmp_path / "a.parquet")] == ["1"]


def test_a_mark_inside_joined_files(tmp_path):
    rows = [b'\xef\xbb\xbf{"question": "a", "answer": "%d"}\n' % i for i in range(2)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, rows)))
    assert [record.answer for record in read_records(tmp_path / "a.jsonl.gz")] == ["0", "1"]
