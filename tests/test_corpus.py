"""Files to documents: every format, and every way in which a file can be bad."""

import gzip
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import BYTE, write

from src import corpus
from src.corpus import escaped, find_files, fingerprint_files, read_documents, read_pieces, stdlib_files
from src.dataset import DataConfig, prepare_data
from src.errors import UserError
from src.token_store import tokenize_corpus

# files


def test_find_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/d.parquet", "e.py", "skip.json", ".hidden"):
        (tmp_path / name).write_text("x")
    names = lambda paths: [os.path.relpath(p, tmp_path) for p in find_files(paths)]  # noqa: E731
    assert names([tmp_path]) == ["a.jsonl.gz", "b.jsonl", "e.py", "sub/c.txt", "sub/d.parquet"]
    assert names([f"{tmp_path}/*.jsonl", tmp_path / "b.jsonl"]) == ["b.jsonl"]
    assert names([f"{tmp_path}/**/*.txt"]) == ["sub/c.txt"]
    for bad in ("nowhere.txt", "*.md", "skip.json"):
        with pytest.raises(UserError, match=bad.replace("*", r"\*")):
            find_files([f"{tmp_path}/{bad}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty leads to no data file"):
        find_files([tmp_path / "empty"])


def test_stdlib_files():
    train, valid = stdlib_files()
    assert (train, valid) == stdlib_files()
    assert not set(train) & set(valid)
    assert 0.02 < len(valid) / len(train) < 0.1
    assert not [p for p in train + valid if {"test", "tests", "site-packages"} & set(Path(p).parts[-4:])]
    assert any(p.endswith("argparse.py") for p in train + valid)


def test_a_fingerprint_sees_size_start_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_END_BYTES", 4)
    path, found = tmp_path / "a.txt", []
    for content in (b"", b"abc", b"abd", b"abcdefghijkl", b"abcdXXXXijkl", b"Xbcdefghijkl", b"abcdefghijkX", b"abcdef"):
        path.write_bytes(content)
        [(name, size, digest)] = fingerprint_files([path])
        assert (name, size) == ("a.txt", len(content))
        found.append(digest)
    assert found[3] == found[4]  # the middle of a large file is not looked at
    assert len(set(found)) == len(found) - 1
    (tmp_path / "b.txt").write_bytes(b"abcdef")
    assert fingerprint_files([tmp_path / "b.txt", path]) == [("b.txt", 6, found[-1]), ("a.txt", 6, found[-1])]
    with pytest.raises(UserError, match="gone.txt cannot be read"):
        fingerprint_files([tmp_path / "gone.txt"])


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one\ntwo\n", "京都\r\n😀", "  three  ", "\nfour\n\n"]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "a.jsonl.gz", texts)
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes("".join(f"{t}\n<|endoftext|>\n" for t in texts).replace("\r", "<|\\r|>").encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "a.txt.gz"):
        assert list(read_documents([tmp_path / name])) == texts, name
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfno separator\n\nat all\n")
    assert list(read_documents([tmp_path / "plain.txt"])) == ["no separator\n\nat all\n"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("ab \n", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=5))
def test_long_documents_are_cut_without_loss(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_CHARS", 7)
    (tmp_path / "a.txt").write_bytes("".join(f"{t}\n<|endoftext|>\n" for t in texts).encode())
    write(tmp_path / "a.jsonl", texts)
    for name in ("a.txt", "a.jsonl"):
        assert list(read_documents([tmp_path / name])) == texts
        assert all(len(p) <= 7 or "\n" not in p[:-1] for p, _ in read_pieces([tmp_path / name]))


HARD = [
    "<|endoftext|>",
    "<|\\endoftext|>",
    "<|\\r|>",
    "<|\\\\r|>",
    "<|\\0|>",
    "<|\\ufeff|>",
    "<|",
    "\\",
    "r|>",
    "|>",
    "0",
    "\n",
]
HARD += ["\r", "\r\n", "\0", "\ufeff", "\x85", "\u2028", "\x0c", "京", "😀", "a", " ", "<", "|", "endoftext"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.sampled_from(HARD), min_size=1, max_size=14).map("".join), min_size=1, max_size=4),
    size=st.sampled_from([3, 7, 65_536]),
)
def test_what_extract_texts_writes_reads_back(documents, size, tmp_path, monkeypatch):
    """The same documents, after any number of passes, wherever pieces are cut."""
    monkeypatch.setattr(corpus, "PIECE_CHARS", size)
    documents = [text for text in documents if text.strip()] or ["x"]
    write(tmp_path / "0.jsonl", documents)
    source = tmp_path / "0.jsonl"
    for number in range(1, 4):
        with open(tmp_path / f"{number}.txt", "w", encoding="utf-8", newline="\n") as file:
            for piece, is_last in escaped(read_pieces([source])):
                file.write(piece + f"\n{corpus.SEPARATOR}\n" * is_last)
        source = tmp_path / f"{number}.txt"
        assert list(read_documents([source])) == documents
    assert (tmp_path / "2.txt").read_bytes() == (tmp_path / "1.txt").read_bytes()


# bad input

BAD_LINES = [
    (b"{broken", corpus.BAD_JSON),
    (b"[" * 100_000, corpus.BAD_JSON),
    (b'{"text": "\xff\xfe"}', corpus.BAD_UTF8),
    (b'{"text": "\\ud800"}', corpus.BAD_UTF8),
    (b'{"body": "x"}', corpus.NO_FIELD),
    (b'{"text": 3}', corpus.NOT_TEXT),
    (b'{"text": null}', corpus.NOT_TEXT),
    (b'{"text": " "}', corpus.EMPTY),
    (b"[1]", corpus.NOT_OBJECT),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_named_and_skipped_or_refused(tmp_path, capsys, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "fine"}')
    skipped = Counter()
    assert list(read_documents([path], skipped=skipped)) == ["good", "fine"]
    assert skipped == {reason: 1}
    assert f"a.jsonl:3: skipped, {reason}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"a.jsonl:3: {reason}"):
        list(read_documents([path], strict=True))


def test_only_the_first_bad_lines_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 50 + b'{"text": "x"}\n')
    list(read_documents([tmp_path / "a.jsonl"]))
    err = capsys.readouterr().err
    assert err.count("broken JSON") == corpus.REPORTED + 1 and "50 x broken JSON" in err


def test_non_utf8_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("fine\n日本".encode() + b"\n" + "日本".encode("euc-jp") + b"\nlast")
    skipped = Counter()
    assert list(read_documents([tmp_path / "a.txt"], skipped=skipped)) == ["fine\n日本\nlast"]
    assert skipped == {corpus.BAD_UTF8: 1}


def test_no_line_has_the_text_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "a.jsonl", ["x", "y"], field="body")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"has the field 'text'; fields there: body \(--text_field\)"):
            tokenize_corpus([tmp_path / name], BYTE, cache_dir=str(tmp_path / "cache"))
        assert list(read_documents([tmp_path / name], text_field="body"))[0] == "x"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.py"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=f"no document in .*{name}: empty"):
            tokenize_corpus([tmp_path / name], BYTE, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=name):
        prepare_data(DataConfig([str(tmp_path / name)], cache_dir=str(tmp_path / "cache")), None, 8)
    write(tmp_path / "b.jsonl", ["x"])
    assert list(read_documents([tmp_path])) == ["x"]


def test_truncated_or_broken_archives(tmp_path):
    path = write(tmp_path / "cut.jsonl.gz", [os.urandom(4000).hex()])
    whole = Path(path).read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"not gzip", whole[:200] + b"\0" * 99 + whole[300:]):
        Path(path).write_bytes(content)
        with pytest.raises(UserError, match="cut.jsonl.gz cannot be read to its end"):
            tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 garbage PAR1")
    with pytest.raises(UserError, match="bad.parquet cannot be read"):
        tokenize_corpus([tmp_path / "bad.parquet"], BYTE, cache_dir=str(tmp_path / "cache"))
    Path(path).write_bytes(whole)  # nothing of the failures was kept
    assert tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache")).n_documents == 1


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    write(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="cache_dir .*file.*--cache_dir"):
        tokenize_corpus([tmp_path / "a.jsonl"], BYTE, cache_dir=str(tmp_path / "file" / "c"))
