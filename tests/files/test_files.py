"""Opening files: encodings with a byte order mark, line ends, damaged files, endless lines, and paths to non-files."""

import gzip
import json
import os

import pytest

from src.errors import UserError
from src.files import text as files
from src.files.text import is_text, read_json, read_lines, read_text

TEXT = "one 京 😀\r\ntwo\rthree\n\nlast\u2028line"
LINES = ["one 京 😀\n", "two\n", "three\n", "\n", "last\u2028line"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_text_is_the_same_in_every_encoding_with_a_mark(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(path.read_bytes()))
    assert read_text(path) == "".join(LINES)
    for file in (path, tmp_path / "a.txt.GZ"):
        assert list(read_lines(file)) == list(enumerate(LINES, 1))
    path.write_bytes('{"a": "京"}\r\n'.encode(encoding))
    assert read_json(path) == {"a": "京"}


def test_big_endian_marks(tmp_path):
    for encoding, mark in (("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff")):
        (tmp_path / "a.txt").write_bytes(mark + TEXT.encode(encoding))
        assert [line for _, line in read_lines(tmp_path / "a.txt")] == LINES


@pytest.mark.parametrize(("encoding", "named"), [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
def test_utf16_without_a_mark_is_refused_by_name(tmp_path, encoding, named):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\r\n".encode(encoding))
    with pytest.raises(
        UserError, match=f"a.txt holds NUL bytes: .* UTF-16 without a byte order mark.*iconv -f {named}"
    ):
        list(read_lines(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="holds NUL bytes"):
        read_text(tmp_path / "a.txt")


def test_wrong_bytes_are_told_from_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("fine 京\n".encode() + b"\xff\n" + "京".encode("shift_jis") + b"\nfine\n")
    assert [is_text(line) for _, line in read_lines(tmp_path / "a.txt")] == [True, False, False, True]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + "ab\n".encode("utf-16-le") + b"\x00\xd8\n\0")  # half a pair
    assert [is_text(line) for _, line in read_lines(tmp_path / "a.txt")] == [True, False]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + "ab\n".encode("utf-16-le")[:-1])
    with pytest.raises(UserError, match="a.txt cannot be read to its end"):
        list(read_lines(tmp_path / "a.txt"))


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_that_are_too_long(tmp_path, end):
    (tmp_path / "a.txt").write_text(f"ab\n{'c' * 20}\nabc\n{'d' * 9}{end}")
    assert list(read_lines(tmp_path / "a.txt", 4)) == [(1, "ab\n"), (2, None), (3, "abc\n"), (4, None)]
    parts = list(read_lines(tmp_path / "a.txt", 4, cuts=True))
    assert max(len(part) for _, part in parts) <= 4
    lines = ["".join(part for at, part in parts if at == number) for number in (1, 2, 3, 4)]
    assert lines == ["ab\n", "c" * 20 + "\n", "abc\n", "d" * 9 + end]
    (tmp_path / "a.txt").write_text("c" * 4 * (files.MOST_SKIPPED + 2))
    with pytest.raises(UserError, match="a.txt:1: a line of over .* characters: split it"):
        list(read_lines(tmp_path / "a.txt", 4))
    assert sum(len(part) for _, part in read_lines(tmp_path / "a.txt", 4, cuts=True)) == 40


@pytest.mark.parametrize("read", [read_text, read_json, lambda path: list(read_lines(path))])
def test_what_is_no_file_is_one_line_and_waits_for_nothing(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "folder.txt").mkdir()
    for path, said in (
        (tmp_path / "pipe.txt", "this is a pipe or a device"),
        ("/dev/zero", "this is a pipe or a device"),
        (tmp_path / "link.txt", "a broken link"),
        (tmp_path / "circle.txt", "a broken link"),
        (tmp_path / "folder.txt", "this is a folder"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path / "nul\0.txt", "nul"),
        (tmp_path / ("long" * 99), "long"),
    ):
        with pytest.raises(UserError, match=said):
            read(path)


def test_json_of_any_depth_and_width_is_a_value_or_one_line(tmp_path):
    path = tmp_path / "a.json"
    for content in ("[" * 5000, "[" * 100_000, '{"a":' * 5000, "9" * 5000, "{", "", '{"a": 1} x'):
        path.write_text(content)
        with pytest.raises(UserError, match="a.json is broken JSON"):
            read_json(path)
    path.write_text("[" * 101 + "]" * 101)
    with pytest.raises(UserError, match="a.json nests over 100"):
        read_json(path)
    path.write_text(json.dumps([[1] * 10_000]))
    assert read_json(path) == [[1] * 10_000]


def test_a_file_that_is_read_whole_is_bounded(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    with pytest.raises(UserError, match="a.txt has over 9 bytes"):
        files.read_bytes(tmp_path / "a.txt", most=9)
    assert files.read_bytes(tmp_path / "a.txt", most=10) == b"0123456789"


def test_a_pipe_of_the_shell_is_read():
    """`--prompt_file <(command)` passes /dev/fd/N. A named pipe, whose writer may be absent, is refused above."""
    read, write = os.pipe()
    os.write(write, "one\ntwo é".encode())
    os.close(write)
    assert files.read_text(f"/dev/fd/{read}") == "one\ntwo é"
    os.close(read)
