"""How files are opened: the one place that decides what encoding, line ends and size a file may have.

Every reader of text, JSON and names goes through here, so that a file means the same to every script: UTF-8, or what a
byte order mark at its start says (which is no part of the text); line ends are \\n, whatever system wrote them.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from pathlib import Path

from src.errors import UserError

MOST_BYTES = 256 * 1024**2  # of a file that is read whole: settings, names, prompts, tokenizers
MOST_LINE = 32 * 1024**2  # characters of a line that is read whole, such as a record of JSON
MOST_SKIPPED = 8  # times as long may a line be that is passed over; beyond that it is no file of lines
MOST_DEPTH = 100  # lists and objects inside each other in JSON
BOMS = {  # longest first, as UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NUL = "holds NUL bytes: it is binary, or UTF-16 without a byte order mark (iconv -f UTF-16{} -t UTF-8 makes it UTF-8)"


def read_bytes(path, what: str = "", most: int = MOST_BYTES) -> bytes:
    """The content of a file.  UserError, after `what` (a flag), where it cannot be read or is over `most` bytes."""
    where = f"{what} {path}".strip()
    try:
        check_is_file(path, where)
        if os.path.getsize(path) > most:
            raise UserError(f"{where} holds over {most:,} bytes: this is no file of that kind")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that holds a NUL
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def check_is_file(path, where):
    """UserError, which names `where`, unless a path leads to a regular file: to open a pipe would wait for ever."""
    if not os.path.isfile(path):
        is_link, there = os.path.islink(path), os.path.exists(path)
        kind = "this is a pipe or a device" if there else "a link to nowhere" if is_link else "no such file"
        raise UserError(f"{where}: {'this is a folder' if os.path.isdir(path) else kind}; correct the path")


def open_text(path) -> io.TextIOWrapper:
    """A text file of any size, gzipped or not, as a stream of str.  Bytes that are no text are lone surrogates in it.

    UserError for what is no file or begins with NUL bytes; OSError, EOFError, zlib.error and UnicodeDecodeError as the
    file is read."""
    check_is_file(path, path)
    file = (gzip.open if os.fspath(path).lower().endswith(".gz") else open)(path, "rb")
    try:
        head = file.peek(4096)[:4096]
        encoding, skip = encoding_of(head[:4])
        if encoding == "utf-8" and b"\0" in head:
            raise UserError(f"{path} {_NUL.format('LE' if head.find(0) % 2 else 'BE')}")
        file.read(skip)
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, encoding, "surrogateescape" if encoding == "utf-8" else "surrogatepass")


def read_lines(path, most: int = MOST_LINE, cuts: bool = False):
    """(number from 1, line with its \\n) of a text file of any size, in flat memory.

    A line of more than `most` characters comes in parts where cuts is true, else it is one None.  UserError where the
    file cannot be read to its end, or a line is MOST_SKIPPED times as long as can be taken."""
    number, passed = 1, 0  # line, characters of it that are read already
    try:
        with open_text(path) as file:
            while part := file.readline(most):
                ends = part.endswith("\n") or len(part) < most
                if cuts or not passed:
                    yield number, part if cuts or ends else None
                number, passed = number + ends, 0 if ends else passed + len(part)
                if passed > MOST_SKIPPED * most and not cuts:
                    raise UserError(f"{path}:{number}: a line of over {passed:,} characters: this is no file of lines")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path} cannot be read to its end, is it cut short? ({reason})") from None


def is_text(line: str) -> bool:
    """Whether a line has no lone surrogate: wrong bytes of a file, or half of a pair that JSON spells."""
    try:
        return line.isascii() or bool(line.encode())
    except UnicodeEncodeError:
        return False


def encoding_of(start: bytes) -> tuple[str, int]:
    """(encoding, bytes of its mark) of a text that begins with `start`: UTF-8 where there is no byte order mark."""
    for mark, encoding in BOMS.items():
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode(data: bytes, where) -> str:
    """Text of a whole file: UTF-8, or what its byte order mark says; line ends become \\n.  UserError, which names
    `where`, for bytes that are no such text."""
    encoding, skip = encoding_of(data[:4])
    try:
        text = data[skip:].decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text: save it as UTF-8 (or as UTF-16 with a byte order mark)") from None
    if "\0" in text:
        raise UserError(f"{where} {_NUL.format('LE')}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path, what: str = "") -> str:
    """The text of a small file; see `decode`."""
    return decode(read_bytes(path, what), f"{what} {path}".strip())


def parse_json(text: str, where):
    """The value of a JSON text.  UserError, which names `where`, where it is broken or nested over MOST_DEPTH deep."""
    try:
        value = json.loads(text)
        if _depth(value) <= MOST_DEPTH:
            return value
    except (ValueError, RecursionError):  # ValueError also for a number of thousands of digits
        raise UserError(f"{where} is broken JSON: mend it, or copy it again") from None
    raise UserError(f"{where} nests over {MOST_DEPTH} lists and objects: this is no file of that kind")


def _depth(value) -> int:
    """How many lists and objects are inside each other."""
    if not isinstance(value, (dict, list)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(each) for each in inner if isinstance(each, (dict, list))), default=0)


def read_json(path, what: str = "") -> dict | list | str | int | float | bool | None:
    """The value of a JSON file.  UserError where it cannot be read or is broken."""
    where = f"{what} {path}".strip()
    value = parse_json(read_text(path, what), where)
    if not is_text(json.dumps(value, ensure_ascii=False)):  # JSON can spell half of a surrogate pair
        raise UserError(f"{where} holds half of a character ({chr(92)}ud800 or such): correct it")
    return value


def read_object(path, what: str = "") -> dict:
    """The object in a JSON file.  UserError where there is none."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds no JSON object: copy it again".strip())
    return value
