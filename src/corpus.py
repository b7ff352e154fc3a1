"""Files to documents: .jsonl, .jsonl.gz, .parquet, .txt and .py, read as streams.

In a .txt file documents are separated by a line that holds only <|endoftext|>; the line break before that line belongs
to the separator, so a document keeps its own last line break, or its lack of one. Without separators, and in .py files
always, the file is one document; extract_texts.py writes such files.

Documents travel as pieces of at most PIECE_CHARS characters with a mark on the last one, so that a file which is one
document of many GB passes in flat memory, and no end-of-document falls between the pieces.
"""

import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections import Counter

from src.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".py")
SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 65_536
REPORTED = 3  # this many bad lines of each kind are named on stderr, the rest only counted
NO_FIELD, NOT_TEXT, EMPTY = "no text field", "text is not a string", "empty text"
BAD_JSON, BAD_UTF8, NOT_OBJECT = "broken JSON", "invalid UTF-8", "not a JSON object"
_END_BYTES = 1024**2  # of the start and of the end of a file: what fingerprint_files looks at
_STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class NoDocument(UserError):
    """The files hold no document that can be used."""


def find_files(paths):
    """Sorted list of the data files that files, globs and folders (searched through) name, each once.

    Raises UserError for a path that does not exist, or that leads to no file of the kinds in SUFFIXES.
    """
    found = set()
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.path.expanduser(os.fspath(path))
        if os.path.isdir(path):
            files = [f for f in _walk(path, {"__pycache__"}) if f.endswith(SUFFIXES)]
        elif os.path.exists(path):
            files = [path] if path.endswith(SUFFIXES) else []
        elif glob.has_magic(path):
            files = [f for f in glob.glob(path, recursive=True) if f.endswith(SUFFIXES) and os.path.isfile(f)]
        else:
            raise UserError(f"{path} does not exist")
        if not files:
            raise UserError(f"{path} leads to no data file; the kinds that are read are {', '.join(SUFFIXES)}")
        found.update(files)
    return sorted(found)


def _walk(root, skips):
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in skips and not d.startswith(".")]
        yield from (os.path.join(folder, name) for name in names)


def stdlib_files(min_bytes=200, valid_share=20):
    """(train_paths, valid_paths): the .py sources of the running interpreter's standard library, about one file in
    `valid_share` held back by a hash of its relative path. Without tests, installed packages, and files that are tiny,
    not UTF-8, or made for this machine."""
    root = sysconfig.get_paths()["stdlib"]
    parts = ([], [])
    for path in sorted(f for f in _walk(root, _STDLIB_SKIPS) if f.endswith(".py")):
        with open(path, "rb") as file:
            source = file.read()
        if len(source) < min_bytes or not _is_utf8(source) or os.path.basename(path).startswith("_sysconfigdata"):
            continue
        name = os.path.relpath(path, root).replace(os.sep, "/")
        parts[content_hash(name.encode()) % valid_share == 0].append(path)
    if not parts[0] or not parts[1]:
        raise UserError(f"{root} has no sources of the standard library; give --train_paths")
    return parts


def fingerprint_files(files):
    """[(name without folders, bytes, digest)] of files: the digest (hex) is of size, first and last MiB, so that a
    file which was replaced by one of the same size is noticed, whatever that size. UserError where one cannot be read.
    """
    found = []
    for path in files:
        try:
            with open(path, "rb") as file:
                size = os.path.getsize(path)
                ends = file.read(_END_BYTES)
                file.seek(max(len(ends), size - _END_BYTES))
                ends += file.read(_END_BYTES)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): put it back") from None
        found.append((os.path.basename(path), size, f"{content_hash(size.to_bytes(8, 'big') + ends):016x}"))
    return found


def content_hash(data):
    """A 64-bit number that depends on the bytes alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _is_utf8(data):
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_documents(paths, text_field="text", strict=False, skipped=None):
    """Documents (str) of files, globs and folders, one whole document at a time; arguments as in `read_pieces`."""
    pieces = []
    for piece, is_last in read_pieces(paths, text_field, strict, skipped):
        pieces.append(piece)
        if is_last:
            yield "".join(pieces)
            pieces.clear()


def read_pieces(paths, text_field="text", strict=False, skipped=None, report=True):
    """Documents as (piece, is_last) pairs; pieces are cut after a line break where there is one.

    A bad line is skipped and counted by reason in `skipped` (a Counter), and, unless report=False, the first few are
    named on stderr; strict=True makes it a UserError. Raises UserError for a file that cannot be read to its end, and
    NoDocument where nothing is left, which names the fields that are there if every line lacks the text field.
    """
    files = find_files(paths)
    log = _SkipLog(strict, Counter() if skipped is None else skipped, report)
    is_empty = True
    for path in files:
        read = next(r for suffix, r in _READERS.items() if path.endswith(suffix))
        try:
            for piece in read(path, text_field, log):
                is_empty = False
                yield piece
        except (OSError, EOFError, zlib.error) as error:  # pyarrow's are turned into OSError by its reader
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read to its end, is it cut short? ({reason})") from None
    if is_empty:
        _refuse_empty(files, text_field, log)
    if log.skipped and skipped is None and report:  # else the caller tells
        print(f"skipped: {log.summary()}", file=sys.stderr)


def _refuse_empty(files, text_field, log):
    names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    if log.fields:
        fields = ", ".join(log.fields)
        raise NoDocument(f"no line of {names} has the field {text_field!r}; fields there: {fields} (--text_field)")
    counts = f" ({log.summary()})" if log.skipped else ""
    raise NoDocument(f"no document in {names}: {'nothing usable' if counts else 'empty'}{counts}")


class _SkipLog:
    """Counts bad lines, names the first few, and stops at the first one when strict."""

    def __init__(self, strict, skipped, report):
        self.strict, self.skipped, self.report = strict, skipped, report
        self.fields = {}  # names seen in lines without the text field, in order

    def add(self, reason, path, line, fields=()):
        if self.strict:
            raise UserError(f"{path}:{line}: {reason}" + (f"; fields there: {', '.join(fields)}" if fields else ""))
        self.skipped[reason] += 1
        self.fields.update(dict.fromkeys(fields if len(self.fields) < 20 else ()))
        if self.report and self.skipped[reason] <= REPORTED:
            print(f"{path}:{line}: skipped, {reason}", file=sys.stderr)

    def summary(self):
        return ", ".join(f"{n} x {reason}" for reason, n in self.skipped.items())


def _read_jsonl(path, text_field, log):
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                log.add(BAD_UTF8, path, number)
            except (ValueError, RecursionError):
                log.add(BAD_JSON, path, number)
            else:
                if not isinstance(record, dict):
                    log.add(NOT_OBJECT, path, number)
                elif text_field not in record:
                    log.add(NO_FIELD, path, number, list(record))
                else:
                    yield from _checked(record[text_field], path, number, log)


def _checked(text, path, number, log):
    """Pieces of one record's text, or a note of what is wrong with it."""
    if not isinstance(text, str):
        log.add(NOT_TEXT, path, number)
    elif not text.strip():
        log.add(EMPTY, path, number)
    elif not _is_encodable(text):
        log.add(BAD_UTF8, path, number)
    else:
        yield from cut(text)


def _is_encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return False
    return True


def cut(text):
    """(piece, is_last) pairs of a document."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end], False
        start = end
    yield text[start:], True


def _read_parquet(path, text_field, log):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                log.add(NO_FIELD, path, 1, table.schema_arrow.names)
                return
            number = 0
            for batch in table.iter_batches(batch_size=200, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        log.add(BAD_UTF8, path, number)
                    else:
                        yield from _checked(text, path, number, log)
    except pa.ArrowException as error:
        raise OSError(str(error).split("\n")[0]) from None


def _read_txt(path, text_field, log, separator=SEPARATOR):
    """Pieces of a text file's documents. A line break is passed on only with the line after it, because the one before
    a separator is not part of the document."""
    pieces, size, is_begun = [], 0, False  # the document being read: what is not yielded yet; whether some of it is
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError:
                log.add(BAD_UTF8, path, number)
                continue
            if line.rstrip("\r\n") == separator:
                yield from _ended("".join(pieces).removesuffix("\n"), is_begun)
                pieces, size, is_begun = [], 0, False
                continue
            if pieces and size + len(line) > PIECE_CHARS:
                yield from ((piece, False) for piece, _ in cut("".join(pieces).removesuffix("\n")))
                pieces, size, is_begun = ["\n"], 1, True
            pieces.append(line)
            size += len(line)
    yield from _ended("".join(pieces), is_begun)


def _ended(text, is_begun):
    """The rest of a document; one of white space alone is none."""
    if is_begun or text.strip():
        yield from cut(text)


def _read_py(path, text_field, log):
    yield from _read_txt(path, text_field, log, separator=None)


_READERS = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".py": _read_py,
}
