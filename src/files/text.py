"""Opens text and JSON files: the rules for encoding, line ends and size are here.

Every reader of text, JSON and names uses this module, so that all scripts read a file in the same way. Files are UTF-8,
or what their byte order mark says; the mark is not part of the text. All line ends become \\n.
"""

import ast
import codecs
import gzip
import io
import json
import os
import re
import unicodedata
import warnings
import zlib

from src.errors import UserError

MOST_BYTES = 256 * 1024**2  # limit for a file that is read as a whole: settings, names, prompts, tokenizers
MOST_LINE = 32 * 1024**2  # limit in characters for a line that is read as a whole, such as a JSON record
MOST_SKIPPED = 8  # read_lines skips a line over its limit, but raises UserError for one over this many times the limit
MOST_DEPTH = 100  # limit for nested lists and objects in JSON
BOMS = {  # longest first, because the mark of UTF-32-LE starts with that of UTF-16-LE
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NUL = "holds NUL bytes: it is binary, or UTF-16 without a byte order mark (convert it with iconv -f UTF-16{} -t UTF-8)"


def read_bytes(path, what: str = "", most: int = MOST_BYTES) -> bytes:
    """Returns the content of a file. Raises UserError, which starts with `what` (a flag), if the file cannot be read or
    has more than `most` bytes."""
    where = f"{what} {path}".strip()
    try:
        is_stream = re.fullmatch(r"/dev/(stdin|fd/\d+)", os.fspath(path))  # `<(...)` in a shell: a pipe with a writer
        if not is_stream:
            check_is_file(path, where)
        is_small = is_stream or os.path.getsize(path) <= most
        with open(path, "rb") as file:
            data = file.read(most + 1 if is_stream else -1) if is_small else b""
        if not is_small or len(data) > most:
            raise UserError(f"{where} has over {most:,} bytes, too many for a file of this type: correct the path")
        return data
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def check_is_file(path, where):
    """Raises UserError, which starts with `where`, unless the path is a regular file: opening a pipe could block."""
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        kind = "this is a folder"
    elif os.path.exists(path):
        kind = "this is a pipe or a device"
    else:
        kind = "a broken link" if os.path.islink(path) else "no such file"
    raise UserError(f"{where}: {kind}; correct the path")


def open_text(path) -> io.TextIOWrapper:
    """Opens a text file of any size, gzipped or not, as a stream of str.

    Invalid bytes become lone surrogates; `is_text` detects them. Raises UserError if it is not a file, or if its start
    has NUL bytes, as in UTF-16 without a byte order mark. Reading the stream may raise OSError, EOFError, zlib.error
    and UnicodeDecodeError."""
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
    """Yields (number from 1, line with its \\n) of a text file of any size, in flat memory.

    A line of more than `most` characters is yielded in parts if `cuts` is true, else as None. Raises UserError if the
    file cannot be read to the end, or, without `cuts`, if a line has over MOST_SKIPPED * most characters."""
    number, passed = 1, 0  # the current line, and how many of its characters were read
    try:
        with open_text(path) as file:
            while part := file.readline(most):
                ends = part.endswith("\n") or len(part) < most
                if cuts or not passed:
                    yield number, part if cuts or ends else None
                number, passed = number + ends, 0 if ends else passed + len(part)
                if passed > MOST_SKIPPED * most and not cuts:
                    raise UserError(f"{path}:{number}: a line of over {passed:,} characters: split it or fix the path")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path} cannot be read to its end, is it truncated? ({reason})") from None


def same_file_key(path):
    """Returns a key that is equal for all names of one file: spellings of its path, symbolic links, hard links."""
    info = os.stat(path)
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)


def is_text(line: str) -> bool:
    """Whether a line has no lone surrogates. They come from invalid bytes of a file, or from JSON escapes."""
    try:
        return line.isascii() or bool(line.encode())
    except UnicodeEncodeError:
        return False


def text_width(text: str) -> int:
    """Returns the terminal columns of a text: 2 per wide East Asian character, 0 per combining character."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def encoding_of(start: bytes) -> tuple[str, int]:
    """Returns (encoding, length of its byte order mark) of a text that begins with `start`; UTF-8 if it has no mark."""
    for mark, encoding in BOMS.items():
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode(data: bytes, where) -> str:
    """Returns the text of a whole file: UTF-8, or what its byte order mark says. Line ends become \\n.

    Raises UserError, which starts with `where`, if the bytes are not valid in that encoding."""
    encoding, skip = encoding_of(data[:4])
    try:
        text = data[skip:].decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text: save it as UTF-8 (or as UTF-16 with a byte order mark)") from None
    if "\0" in text:
        raise UserError(f"{where} {_NUL.format('LE')}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path, what: str = "") -> str:
    """Returns the text of a small file; see `decode`."""
    return decode(read_bytes(path, what), f"{what} {path}".strip())


def parse_json(text: str, where):
    """Returns the value of a JSON text. Raises UserError, which starts with `where`, if it is broken or too deep."""
    try:
        value = json.loads(text)
        if _depth(value) <= MOST_DEPTH:
            return value
    except (ValueError, RecursionError):  # a number with thousands of digits is a ValueError too
        raise UserError(f"{where} is broken JSON: fix it, or copy it again") from None
    raise UserError(f"{where} nests over {MOST_DEPTH} lists and objects, too many for a file of this type: flatten it")


def _depth(value) -> int:
    """Returns how deeply lists and objects are nested."""
    if not isinstance(value, (dict, list)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(each) for each in inner if isinstance(each, (dict, list))), default=0)


def read_json(path, what: str = "") -> dict | list | str | int | float | bool | None:
    """Returns the value of a JSON file. Raises UserError if it cannot be read or is broken."""
    where = f"{what} {path}".strip()
    value = parse_json(read_text(path, what), where)
    if not is_text(json.dumps(value, ensure_ascii=False)):  # a JSON escape can be half of a surrogate pair
        raise UserError(f"{where} has an escape for half a character, such as {chr(92)}ud800: remove it")
    return value


def read_object(path, what: str = "") -> dict:
    """Returns the object in a JSON file. Raises UserError if it holds anything else."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} is not a JSON object: copy it again".strip())
    return value


def parse_python(text: str) -> ast.Module | None:
    """Returns the syntax tree of a text, or None if it is not valid Python. Never executes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes in a string
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: NUL, or a number of 5,000 digits
            return None
