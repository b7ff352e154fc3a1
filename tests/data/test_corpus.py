"""Reading documents from files: all formats, and all kinds of bad input."""

import base64
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import BYTE, write, write_records

from src.data import corpus, readers
from src.data.corpus import find_files, fingerprint_files, package_files, read_documents, read_pieces, stdlib_files
from src.data.readers import escaped
from src.data.records import RecordFields
from src.data.token_store import tokenize_corpus
from src.dataset import DataConfig, prepare_data
from src.errors import UserError

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
    with pytest.raises(UserError, match="empty: no data file found"):
        find_files([tmp_path / "empty"])


def test_a_glob_reads_the_folders_that_it_hits_and_says_what_it_skips(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gl/a.jsonl", "gl/sub/b.jsonl", "gl/sub/deep/c.txt", "gl/sub/d.csv", "gl/sub.py", "gl/e.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    expected = ["gl/a.jsonl", "gl/sub.py", "gl/sub/b.jsonl", "gl/sub/deep/c.txt"]
    assert find_files(["gl/*"]) == expected
    why = "(hidden, a broken link, unreadable, or of another type)"
    assert capsys.readouterr().err == f"gl/sub: skipped d.csv {why}\ngl/*: skipped gl/e.csv {why}\n"
    for pattern in ("gl/**", "**", "g*"):
        assert find_files([pattern]) == expected
        assert capsys.readouterr().err.count("d.csv") == 1  # ** hits a folder and its files
    assert find_files(["gl/*.jsonl"]) == expected[:1] and capsys.readouterr().err == ""


def test_stdlib_files():
    train, valid = stdlib_files()
    assert (train, valid) == stdlib_files()
    assert not set(train) & set(valid)
    assert 0.02 < len(valid) / len(train) < 0.1
    assert not [p for p in train + valid if {"test", "tests", "site-packages"} & set(Path(p).parts[-4:])]
    assert any(p.endswith("argparse.py") for p in train + valid)


def test_package_files(tmp_path):
    source = "def f():\n    return 'a sentence of some length, so that the file is not tiny'\n" * 4
    for name in ("b/c.py", "a.py", "b/tests/t.py", "test/t.py", "b/_vendor/v.py", "b/testing/t.py", ".hidden/h.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(source.encode() + b"\xe9")
    (tmp_path / "b/lib.so").write_bytes(b"\x7fELF" * 100)
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    found = [os.path.relpath(path, tmp_path) for path in package_files([tmp_path])]
    assert found == ["a.py", "b/c.py"]
    with pytest.raises(UserError, match="contains no sources of packages"):
        package_files([tmp_path / "nowhere"])


def test_words_for_the_sources_of_this_python(tmp_path, monkeypatch, capsys):
    train, valid = stdlib_files()
    assert find_files(["stdlib", "stdlib-valid"]) == sorted(train + valid) and find_files("stdlib-valid") == valid
    monkeypatch.setattr("src.data.corpus.sysconfig.get_paths", lambda: dict.fromkeys(("purelib", "platlib"), tmp_path))
    (tmp_path / "a.py").write_text("x = 1\n" * 40)
    (tmp_path / "b.so").write_bytes(b"\x7fELF")
    assert find_files("site-packages") == [str(tmp_path / "a.py")]
    assert capsys.readouterr().err == ""  # the other files of packages are not named
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site-packages").mkdir()
    with pytest.raises(UserError, match="site-packages: no data file found"):  # a folder of that name comes first
        find_files("site-packages")


def test_a_linked_folder_is_searched_once_and_a_circle_ends(tmp_path, capsys):
    for folder, name in (("disk/w", "b.jsonl"), ("data", "a.jsonl")):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / name, [name])
    (tmp_path / "data/w").symlink_to("../disk/w")
    (tmp_path / "data/again").symlink_to("../disk/w")
    (tmp_path / "disk/w/up").symlink_to("../../data")
    (tmp_path / "data/circle").symlink_to(".")
    (tmp_path / "data/itself").symlink_to("itself")
    assert sorted(read_documents([tmp_path / "data"])) == ["a.jsonl", "b.jsonl"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data: skipped itself (hidden, a broken link" in err


def test_the_same_file_under_two_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "c.JSONL")
    for names in (
        ["a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl")],
        ["a.jsonl", "b.jsonl", "c.JSONL"],
        ["."],
        ["*l"],
    ):
        assert list(read_documents(names)) == ["x"], names


def test_suffixes_in_capitals(tmp_path):
    for name in ("A.JSONL", "b.Jsonl.GZ", "c.PARQUET", "d.TXT", "e.TXT.GZ", "f.PY"):
        path = tmp_path / name
        write(tmp_path / name.lower(), [name]) if name[0] in "Abcd" else path.write_text(name)
        os.replace(tmp_path / name.lower() if name[0] in "Abcd" else path, path)
    (tmp_path / "e.TXT.GZ").write_bytes(gzip.compress(b"e.TXT.GZ"))
    assert sorted(read_documents([tmp_path])) == sorted(os.listdir(tmp_path))


def test_what_a_folder_holds_besides_is_said(tmp_path, capsys):
    for name in ("a.txt", "._a.txt", "b.json", ".git/c.txt", "__pycache__/d.py", "e.md", "f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert list(read_documents([tmp_path])) == ["x"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "skipped .git, ._a.txt, b.json and 4 more" in err
    find_files([tmp_path / "a.txt"])
    assert capsys.readouterr().err == ""
    for name, said in (("pipe.txt", "this is a pipe or a device"), ("gone.txt", "a broken link")):
        with pytest.raises(UserError, match=f"{name}: {said}"):
            find_files([tmp_path / name])


def test_a_folder_that_cannot_be_searched_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    write(tmp_path / "a.txt", ["x"])
    scandir, locked = os.scandir, {tmp_path / "in"}

    def refusing(path):  # the tests may run as root, to whom permissions do not apply
        if Path(path) in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert find_files([tmp_path]) == [str(tmp_path / "a.txt")]
    assert "skipped in (" in capsys.readouterr().err
    locked.add(tmp_path)
    with pytest.raises(UserError, match="cannot be searched: Permission denied"):
        find_files([tmp_path])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_with_a_mark_and_all_line_ends(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\rthree\r\n<|endoftext|>\r\n京".encode(encoding))
    (tmp_path / "b.py").write_bytes("x = 1\r\n<|endoftext|>\r\n".encode(encoding))
    (tmp_path / "c.jsonl").write_bytes('{"text": "a\\r\\nb"}\r\n{"text": "京"}\r\n'.encode(encoding))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    expected = ["one\ntwo\nthree", "京", "x = 1\n<|endoftext|>\n", "a\r\nb", "京", "a\r\nb", "京"]
    assert list(read_documents([tmp_path])) == expected


def test_utf16_without_a_mark_is_refused(tmp_path):
    for name, content in (("a.txt", "one\r\ntwo\r\n"), ("b.jsonl", '{"text": "x"}\r\n'), ("c.py", "x = 1\r\n")):
        (tmp_path / name).write_bytes(content.encode("utf-16-le"))
        with pytest.raises(UserError, match=f"{name} holds NUL bytes.*UTF-16.*iconv"):
            list(read_documents([tmp_path / name]))


def test_a_nul_further_on_is_a_bad_line(tmp_path):
    (tmp_path / "a.txt").write_text("fine\n" * 2000 + "b\0d\nlast\n")
    skipped = Counter()
    assert list(read_documents([tmp_path / "a.txt"], skipped=skipped)) == ["fine\n" * 2000 + "last\n"]
    assert skipped == {readers.HAS_NUL: 1}


@pytest.mark.parametrize(("bad", "reason"), [(b"\xff", readers.BAD_UTF8), (b"\0", readers.HAS_NUL)])
def test_a_long_line_is_broken_at_its_bad_parts(tmp_path, capsys, bad, reason):
    """Such a line is read in parts: what follows the bad one is not glued to what came before it."""
    part, path, before = readers.PIECE_CHARS * b"a", tmp_path / "a.txt", "before\n" * 1000
    for line, kept in (
        (part + bad + b"b" * 200_000 + bad, part + b"\n" + 2 * readers.PIECE_CHARS * b"b" + b"\n"),
        (part + b"b" + bad, part + b"\n"),
        (bad + part, b"a\n"),
    ):
        path.write_bytes(before.encode() + line + b"\nlast\n")
        skipped = Counter()
        assert list(read_documents([path], skipped=skipped)) == [f"{before}{kept.decode()}last\n"]
        assert skipped == {reason: 1}
        assert capsys.readouterr().err == f"{path}:1001: skipped, {reason}\n"


def test_a_file_of_another_encoding_is_named_with_a_remedy(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("日本語\n京都\nascii\n".encode("shift_jis"))
    assert list(read_documents([tmp_path / "a.txt"])) == ["ascii\n"]
    err = capsys.readouterr().err
    assert "a.txt: 2 of 3 lines are not UTF-8: convert the file to UTF-8, for example with iconv -f SHIFT_JIS" in err


def test_a_fingerprint_sees_size_start_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_END_BYTES", 4)
    path, found = tmp_path / "a.txt", []
    for content in (b"", b"abc", b"abd", b"abcdefghijkl", b"abcdXXXXijkl", b"Xbcdefghijkl", b"abcdefghijkX", b"abcdef"):
        path.write_bytes(content)
        [(name, size, digest)] = fingerprint_files([path])
        assert (name, size) == ("a.txt", len(content))
        found.append(digest)
    assert found[3] == found[4]  # the middle of a large file is not read
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
    monkeypatch.setattr(readers, "PIECE_CHARS", 7)
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
    """The documents stay the same after several passes, wherever pieces are cut."""
    monkeypatch.setattr(readers, "PIECE_CHARS", size)
    documents = [text for text in documents if text.strip()] or ["x"]
    write(tmp_path / "0.jsonl", documents)
    source = tmp_path / "0.jsonl"
    for number in range(1, 4):
        with open(tmp_path / f"{number}.txt", "w", encoding="utf-8", newline="\n") as file:
            for piece, is_last in escaped(read_pieces([source])):
                file.write(piece + f"\n{readers.SEPARATOR}\n" * is_last)
        source = tmp_path / f"{number}.txt"
        assert list(read_documents([source])) == documents
    assert (tmp_path / "2.txt").read_bytes() == (tmp_path / "1.txt").read_bytes()


# bad input

BAD_LINES = [
    (b"{broken", readers.BAD_JSON),
    (b"[" * 100_000, readers.BAD_JSON),
    (b'{"text": "\xff\xfe"}', readers.BAD_UTF8),
    (b'{"text": "\\ud800"}', readers.BAD_UTF8),
    (b'{"body": "x"}', readers.NO_FIELD),
    (b'{"text": 3}', readers.NOT_TEXT),
    (b'{"text": null}', readers.NOT_TEXT),
    (b'{"text": " "}', readers.EMPTY),
    (b"[1]", readers.NOT_OBJECT),
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
    assert err.count("broken JSON") == readers.REPORTED + 1 and "50 x broken JSON" in err


def test_non_utf8_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("fine\n日本".encode() + b"\n" + "日本".encode("euc-jp") + b"\nlast")
    skipped = Counter()
    assert list(read_documents([tmp_path / "a.txt"], skipped=skipped)) == ["fine\n日本\nlast"]
    assert skipped == {readers.BAD_UTF8: 1}


def test_no_line_has_the_text_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "a.jsonl", ["x", "y"], field="body")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"has the field 'text'; available fields: body \(set --text_field\)"):
            tokenize_corpus([tmp_path / name], BYTE, cache_dir=str(tmp_path / "cache"))
        assert list(read_documents([tmp_path / name], text_field="body"))[0] == "x"


def test_records_read_as_text_name_the_flag(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"available fields: question, answer \(set --records true\)"):
        list(read_documents([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.py"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for _ in range(2):  # the second time, a cache exists
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
    Path(path).write_bytes(whole)  # the cache has nothing from the failed attempts
    assert tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache")).n_documents == 1


def test_lines_and_documents_are_bounded(tmp_path, capsys):
    texts = ["short", "long " * 20, "京" * 30, "fine"]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        write(tmp_path / name, texts)
        skipped = Counter()
        options = {"skipped": skipped, "max_doc_mb": 60e-6}
        assert list(read_documents([tmp_path / name], **options)) == ["short", "京" * 30, "fine"]
        assert skipped == {readers.TOO_LONG: 1}
        with pytest.raises(UserError, match=f"{name}:2: longer than max_doc_mb"):
            list(read_documents([tmp_path / name], max_doc_mb=60e-6, strict=True))
    write(tmp_path / "a.txt", texts)
    assert list(read_documents([tmp_path / "a.txt"], max_doc_mb=60e-6)) == texts  # no limit for .txt
    path = write(tmp_path / "b.jsonl", texts)
    config = DataConfig([path], [write(tmp_path / "v.jsonl", ["valid text"])], tokenizer="byte", max_doc_mb=60e-6)
    for streaming in (False, True):
        config = dataclasses.replace(config, streaming=streaming, cache_dir=str(tmp_path / "c"))
        _, train, _ = prepare_data(config, None, 4)
        if not streaming:
            assert train.store.n_bytes == len("short" + "京" * 30 + "fine") + 60
        assert "b.jsonl:2: skipped, longer than max_doc_mb" in capsys.readouterr().err or streaming


def test_max_doc_mb_is_a_limit_for_the_text_alone(tmp_path):
    """Not for its line, in which a Japanese character can take 6, nor for the documents beside it."""
    texts = ["short", "long " * 4000, "京" * 200, "fine"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"question": text, "answer": "1", "solution": "x" * 5000} for text in texts]
    write_records(tmp_path / "b.jsonl", rows)
    write(tmp_path / "c.parquet", texts)
    for name, field in (("a.jsonl", "text"), ("b.jsonl", RecordFields()), ("c.parquet", "text")):
        skipped = Counter()
        found = list(read_documents([tmp_path / name], field, skipped=skipped, max_doc_mb=0.001))
        kept = ["short", "京" * 200, "fine"]
        assert found == (kept if field == "text" else [f"Input: {text} \n Output: 1" for text in kept])
        assert skipped == {readers.TOO_LONG: 1}, name


def parquet(path, column, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": column}), path, **options)
    return path


def test_a_parquet_column_of_any_type_is_text_or_said(tmp_path):
    import pyarrow as pa

    texts = ["a", "京\n"]
    for kind in (
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ):
        column = pa.array([text.encode() if pa.types.is_binary(kind) else text for text in texts], type=pa.string())
        parquet(tmp_path / "a.parquet", column.cast(kind))
        assert list(read_documents([tmp_path / "a.parquet"])) == texts, kind
    binary = pa.array([None, "x", "", b"\xff", b"y"], type=pa.binary())
    for column in (binary, binary.view(pa.string())):
        path, skipped = parquet(tmp_path / "a.parquet", column), Counter()
        assert list(read_documents([path], skipped=skipped)) == ["x", "y"]
        assert skipped == {readers.NOT_TEXT: 1, readers.EMPTY: 1, readers.BAD_UTF8: 1}
    for values in ([1, 2], [["a"], ["b"]], [{"text": "a"}], [1.5], [True]):
        path = parquet(tmp_path / "b.parquet", pa.array(values))
        with pytest.raises(
            UserError, match=r"no document in .*b.parquet: nothing usable \(\d x text is not a string\)"
        ):
            list(read_documents([path]))
    with pytest.raises(UserError, match="no document in .*b.parquet: empty"):
        list(read_documents([parquet(tmp_path / "b.parquet", pa.array([], pa.string()))]))
    for content in (b"", b"PAR1", b"no parquet at all", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="b.parquet cannot be read to its end"):
            list(read_documents([path]))


def test_parquet_is_decoded_in_bounded_batches(tmp_path, monkeypatch, capsys):
    """A file of a few hundred bytes can decode to gigabytes, so its metadata limit the rows decoded at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * 1_000_000]))
    options = {"compression": "brotli", "write_statistics": False, "store_schema": False}
    path = parquet(tmp_path / "a.parquet", shared, **options)
    assert path.stat().st_size < 1000
    with pq.ParquetFile(path) as table:
        column = table.metadata.row_group(0).column(0)
        assert readers._rows_at_a_time(column, 300, 32_000_000) <= 150
        assert readers._rows_at_a_time(column, 300, 900_000) == 0
        batches = [batch.nbytes for batch in table.iter_batches(readers._rows_at_a_time(column, 300, 32_000_000))]
        assert max(batches) < 150_000_000
    for most, n_named in ((32_000_000, readers.REPORTED), (900_000, 1)):  # row by row, and as a whole
        monkeypatch.setattr(readers, "MOST_LINE", most)
        with pytest.raises(UserError, match="no document in .*a.parquet: nothing usable .300 x longer than max_doc_mb"):
            list(read_documents([path], max_doc_mb=0.9))
        assert capsys.readouterr().err.count("a.parquet:") == n_named
    plain = parquet(tmp_path / "b.parquet", pa.array([f"document {i}" * 9 for i in range(900)]))
    with pq.ParquetFile(plain) as table:
        assert readers._rows_at_a_time(table.metadata.row_group(0).column(0), 900, 32_000_000) == 200


MEASURED = """
import resource, sys
from collections import Counter
from src.data.corpus import read_pieces
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    size = sum(len(piece) for piece, _ in read_pieces([sys.argv[1]], report=False))
except Exception as error:
    size = type(error).__name__
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_flat_whatever_a_file_unpacks_to(tmp_path):
    """A line of 400 MB; a line of 3 GB in 3 MB of gzip; 2 GB of text in a Parquet file of under 1,000 bytes."""
    import pyarrow as pa

    with open(tmp_path / "a.txt", "wb") as file:
        file.writelines(b"long " * 200_000 for _ in range(400))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.writelines(b"x" * 1_000_000 for _ in range(3000))
    options = {"compression": "brotli", "write_statistics": False, "store_schema": False}
    for name, rows, size in (("c", 20, 100_000_000), ("d", 2000, 1_000_000)):
        shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
        parquet(tmp_path / f"{name}.parquet", shared, **options)
    expected = {"a.txt": "400000000", "b.jsonl.gz": "UserError", "c.parquet": "NoDocument", "d.parquet": "2000000000"}
    for name, size in expected.items():
        command = [sys.executable, "-c", MEASURED, str(tmp_path / name)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        found, megabytes = done.stdout.split()
        assert found == size and int(megabytes) < 250, (name, done.stdout)


# The column metadata give two different sizes for a histogram. A check in pyarrow aborts the process because of that.
ABORTS = (
    "eNqVU0FrE0EUfrO7Ccu6wVSY7Y7mMB6yjZA2aaFBJCpv09QEE2wC0osHt3FNC2mSJltTPQlePHr05h/wLCroRejZkyfpSQShB48endldE4ki"
    "+GDmffPevPe992Z3C9urVKOvCX1FGtSg/BzAndoiAAS7Pu94AR+LNehzctbc9wKDXDDvDfpLhH18eIXXl3o9vuPzteJFQ8RBx7v/4c2Yf3n7"
    "8tuTd/z7i+ePVWH1+E5CKMPg/IgCtej5PDVpmiZpMlOC3OIckTwKJt1OhBELCyL2TE4Ru0lU9ekmiHLv0o2GyAGCtAiQIkBSOihiqSm9rEEk"
    "iVjPc9r6L4+txwAsyP3FOs99rFCNldfBTo47u/6+RzWgZla1tcA/CrLQyEg2LavYpA+WyTIs70CGmmwdkmkW3aKKZVqfFetEcU6Io/9jAMZs"
    "ACwvegaqyFbSQpWt94QlmQOmIJQUWkxB+mH+Z4r1gzjHqvNV+b9u/yC6JFlkW9apZpmObn3SgGVsE9vtW9vXoinYp6QgpdRFIS2M5CbiBN0u"
    "biJ2sRK60HURmxJUEOuhYaYxgm5zem4+KhSuXxagWqmGxoncqzgVCd3DOF9T8ogr9an7Nkb1uC3pv4HYwY04+TRJi4b11vD30mP+Wrvn11o4"
    "CwnxVbD50BsdHPrBcmc4XPZGo8GEP/BH4z3xdmulleLKKsuLkcmpFcSnsyX+sJ/jFaNr"
)


def test_parquet_that_would_abort(tmp_path):
    (tmp_path / "a.parquet").write_bytes(zlib.decompress(base64.b64decode(ABORTS)))
    with pytest.raises(UserError, match="a.parquet cannot be read to its end"):
        list(read_documents([tmp_path / "a.parquet"]))


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    write(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="cache_dir .*file.*--cache_dir"):
        tokenize_corpus([tmp_path / "a.jsonl"], BYTE, cache_dir=str(tmp_path / "file" / "c"))
