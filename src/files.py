"""How files are opened: the one place that decides what encoding, line ends and size a file may have.

Every reader of text, JSON and names goes through here, so that a file means the same to every script.
"""

import codecs
import json
import os
from pathlib import Path

from src.errors import UserError

MOST_BYTES = 256 * 1024**2  # of a file that is read whole: settings, names, prompts, tokenizers
MOST_DEPTH = 100  # lists and objects inside each other in JSON
BOMS = {  # longest first, as UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_bytes(path, what: str = "", most: int = MOST_BYTES) -> bytes:
    """The content of a file.  UserError, which begins with `what` (a flag, such as "--prompt_file"), where it cannot
    be read, is no regular file, or holds more than `most` bytes."""
    where = f"{what} {path}".strip()
    try:
        if not Path(path).is_file():
            raise UserError(
                f"{where}: {'this is a folder' if Path(path).is_dir() else 'no such file'}; correct the path"
            )
        if os.path.getsize(path) > most:
            raise UserError(f"{where} holds over {most:,} bytes: this is no file of that kind")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that holds a NUL
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def encoding_of(start: bytes) -> tuple[str, int]:
    """(encoding, bytes of its mark) of a text that begins with `start`: UTF-8 unless a byte order mark says otherwise."""
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
        raise UserError(f"{where} holds NUL characters: it is binary, or UTF-16 without a mark; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path, what: str = "") -> str:
    """The text of a small file; see `decode`.  UserError where it cannot be read."""
    return decode(read_bytes(path, what), f"{what} {path}".strip())


def parse_json(text: str, where):
    """The value of a JSON text.  UserError, which names `where`, where it is broken or nested over MOST_DEPTH deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for a number of thousands of digits
        raise UserError(f"{where} is broken JSON: mend it, or copy it again") from None
    if _is_deeper(value, MOST_DEPTH):
        raise UserError(f"{where} nests over {MOST_DEPTH} lists and objects: this is no file of that kind")
    return value


def read_json(path, what: str = "") -> dict | list | str | int | float | bool | None:
    """The value of a JSON file.  UserError where it cannot be read or is broken."""
    return parse_json(read_text(path, what), f"{what} {path}".strip())


def _is_deeper(value, depth) -> bool:
    level = [value]
    for _ in range(depth):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(outer):
    return outer.values() if isinstance(outer, dict) else outer
