"""Reads documents from files, as streams: .jsonl and .txt (plain or gzipped), .parquet and .py.

In a .txt file, a line that holds only <|endoftext|> separates two documents. The line break before that line belongs to
the separator, so every document keeps its own final line break, or has none. A .txt file without separators is one
document, and a .py file always is.

extract_texts.py writes such .txt files (see `escaped`). It escapes what plain text cannot hold, and reading the file
undoes this: <|endoftext|> inside a document is written as <|\\endoftext|>, a carriage return as <|\\r|>, NUL as
<|\\0|>, U+FEFF as <|\\ufeff|>. A document that already holds such an escape gets one more backslash in it. All other
text is unchanged.

Documents are passed on in pieces of at most PIECE_CHARS characters, and the last piece of each document is marked.
Memory therefore stays flat even if one file is a single document of many GB, and only the last piece gets an EOS.
"""

import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from src.errors import UserError, few
from src.files.text import check_is_file, is_text, read_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz", ".py")  # in upper case too
SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 65_536
MAX_DOC_MB = 32  # limit for a document that must be in memory as a whole (.jsonl, .parquet)
REPORTED = 3  # for each kind of bad line, name this many on stderr and only count the rest
NO_FIELD, NOT_TEXT, EMPTY = "no text field", "text is not a string", "empty text"
BAD_JSON, BAD_UTF8, NOT_OBJECT = "broken JSON", "invalid UTF-8", "not a JSON object"
TOO_LONG, HAS_NUL = "longer than max_doc_mb", "NUL character"
_CHARS = {"r": "\r", "0": "\0", "ufeff": "\ufeff"}
_NAMES = {char: name for name, char in _CHARS.items()}
_TO_ESCAPE = re.compile(r"<\|(\\*)(endoftext|r|0|ufeff)\|>|[\r\0\ufeff]")
_ESCAPED = re.compile(r"<\|\\(\\*)(endoftext|r|0|ufeff)\|>")
_BEGUN = re.compile(r"<(\|(\\*([a-z0]*\|?)?)?)?\Z")  # an incomplete escape at the end of a piece
_SHARED_BYTES = 64 * 1024**2  # limit for the decoded size of one batch of Parquet rows
_END_BYTES = 1024**2  # fingerprint_files reads this many bytes at the start and at the end of a file
_STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class NoDocument(UserError):
    """The files contain no usable document."""


def find_files(paths):
    """Returns the sorted data files in `paths` (files, globs, folders); a file with several names is listed once.

    Names the other files of a folder on stderr. Raises UserError if a path does not exist, cannot be searched, or
    yields no file with one of the SUFFIXES."""
    found = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.path.expanduser(os.fspath(path))
        if os.path.isdir(path):
            files = _files_in(path)
        elif glob.has_magic(path) and not os.path.lexists(path):
            files = [f for f in glob.glob(path, recursive=True) if _kind(f) and os.path.isfile(f)]
        elif not os.path.lexists(path):
            raise UserError(f"{path} does not exist" + f" in {os.getcwd()}" * (not os.path.isabs(path)))
        else:
            check_is_file(path, path)
            files = [path] if _kind(path) else []
        if not files:
            raise UserError(f"{path}: no data file found; supported types are {', '.join(SUFFIXES)}")
        for file in sorted(files):
            found.setdefault(same_file_key(file), file)
    return sorted(found.values())


def same_file_key(path):
    """Returns a key that is equal for all names of one file: spellings of its path, symbolic links, hard links."""
    info = os.stat(path)
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)


def _kind(path):
    """Returns the longest of SUFFIXES that the path ends with, or None."""
    return max((suffix for suffix in SUFFIXES if os.fspath(path).lower().endswith(suffix)), key=len, default=None)


def _files_in(root):
    """Returns the data files of a folder. Reports everything else in it in one line on stderr."""
    files, skipped = [], []
    for path in _walk(root, {"__pycache__"}, skipped):
        is_hidden = os.path.basename(path).startswith(".")  # macOS creates ._a.txt next to a.txt
        if _kind(path) and not is_hidden and os.path.isfile(path):
            files.append(path)
        else:
            skipped.append(path)
    if skipped:
        why = "hidden, a broken link, unreadable, or of another type"
        print(f"{root}: skipped {few(os.path.relpath(path, root) for path in skipped)} ({why})", file=sys.stderr)
    return files


def _walk(root, ignored, skipped):
    """Yields all file paths under `root`, in linked folders too, entering each folder once.

    Does not enter hidden folders, nor those named in `ignored`. Adds hidden and unreadable folders to `skipped`."""

    def unreadable(error):
        if error.filename == root:
            raise UserError(f"{error.filename} cannot be searched: {error.strerror}")
        skipped.append(error.filename)

    seen = {same_file_key(root)}
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        hidden = [d for d in subfolders if d in ignored or d.startswith(".")]
        skipped.extend(os.path.join(folder, name) for name in hidden if name.startswith("."))
        # sorted in reverse, so that of several links to one folder the first name is the one that stays in the dict
        new = {same_file_key(os.path.join(folder, d)): d for d in sorted(set(subfolders) - set(hidden), reverse=True)}
        subfolders[:] = sorted(d for key, d in new.items() if key not in seen)
        seen.update(new)
        yield from (os.path.join(folder, name) for name in sorted(names))


def stdlib_files(min_bytes=200, valid_share=20):
    """Returns (train_paths, valid_paths): .py files of the running interpreter's standard library.

    About one file in `valid_share` is for validation, chosen by a hash of its relative path. Tests, installed packages
    and files that are tiny, not UTF-8 or specific to this machine are left out."""
    root = sysconfig.get_paths()["stdlib"]
    parts = ([], [])
    for path in sorted(f for f in _walk(root, _STDLIB_SKIPS, []) if f.endswith(".py")):
        source = Path(path).read_bytes()
        is_utf8 = is_text(source.decode(errors="surrogateescape"))
        if len(source) < min_bytes or not is_utf8 or os.path.basename(path).startswith("_sysconfigdata"):
            continue
        name = os.path.relpath(path, root).replace(os.sep, "/")
        parts[content_hash(name.encode()) % valid_share == 0].append(path)
    if not parts[0] or not parts[1]:
        raise UserError(f"{root} does not contain the sources of the standard library: set --train_paths")
    return parts


def fingerprint_files(files):
    """Returns [(base name, size in bytes, digest)] of files; the digest covers the size and the first and last MiB.

    Raises UserError if a file is unreadable."""
    found = []
    for path in files:
        try:
            with open(path, "rb") as file:
                size = os.path.getsize(path)
                ends = file.read(_END_BYTES)
                file.seek(max(len(ends), size - _END_BYTES))
                ends += file.read(_END_BYTES)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): restore it") from None
        found.append((os.path.basename(path), size, f"{content_hash(size.to_bytes(8, 'big') + ends):016x}"))
    return found


def content_hash(data):
    """Returns a 64-bit hash of the bytes; unlike `hash`, it is the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def read_documents(paths, text_field="text", strict=False, skipped=None, max_doc_mb=MAX_DOC_MB):
    """Yields whole documents (str) from files, globs and folders; the arguments are those of `read_pieces`."""
    pieces = []
    for piece, is_last in read_pieces(paths, text_field, strict, skipped, max_doc_mb=max_doc_mb):
        pieces.append(piece)
        if is_last:
            yield "".join(pieces)
            pieces.clear()


def read_pieces(paths, text_field="text", strict=False, skipped=None, report=True, max_doc_mb=MAX_DOC_MB):
    """Yields documents as (piece, is_last) pairs. Long documents are cut after a line break if possible.

    Bad lines, and .jsonl and .parquet documents of over max_doc_mb million characters, are skipped. They are counted by
    reason in `skipped` (a Counter), and the first few are named on stderr unless report=False. With strict=True, the
    first one raises UserError. Raises UserError if a file cannot be read to the end, NoDocument if nothing is left."""
    if not 1 <= max_doc_mb * 1e6 <= 1e12:
        raise UserError(f"max_doc_mb is {max_doc_mb}: set it over 0 and to at most a million")
    files = find_files(paths)
    log = _SkipLog(strict, Counter() if skipped is None else skipped, report, int(max_doc_mb * 1e6))
    is_empty = True
    for path in files:
        for piece in _READERS[_kind(path).removesuffix(".gz")](path, text_field, log):
            is_empty = False
            yield piece
    if is_empty:
        _refuse_empty(files, text_field, log)
    if log.skipped and skipped is None and report:  # with its own `skipped`, the caller prints the summary
        print(f"skipped: {log.summary()}", file=sys.stderr)


def _refuse_empty(files, text_field, log):
    if log.fields:
        fields = f"available fields: {', '.join(log.fields)} (set --text_field)"
        raise NoDocument(f"no record of {few(files)} has the field {text_field!r}; {fields}")
    raise NoDocument(f"no document in {few(files)}: {f'nothing usable ({log.summary()})' if log.skipped else 'empty'}")


class _SkipLog:
    """Counts bad lines and names the first few on stderr; when strict, raises UserError for the first one."""

    def __init__(self, strict, skipped, report, max_chars):
        self.strict, self.skipped, self.report, self.max_chars = strict, skipped, report, max_chars
        self.fields = {}  # a dict as an ordered set: field names of the records that lack the text field

    def add(self, reason, path, line, fields=()):
        if self.strict:
            raise UserError(f"{path}:{line}: {reason}" + (f"; available fields: {', '.join(fields)}" if fields else ""))
        self.skipped[reason] += 1
        if len(self.fields) < 20:
            self.fields.update(dict.fromkeys(fields))
        if self.report and self.skipped[reason] <= REPORTED:
            print(f"{path}:{line}: skipped, {reason}", file=sys.stderr)

    def summary(self):
        return ", ".join(f"{n} x {reason}" for reason, n in self.skipped.items())


def _good_lines(path, log, most, cuts=False):
    """Yields (number, line) as `read_lines` does; logs and skips lines that are too long or not valid text."""
    number = bad = 0
    for number, line in read_lines(path, most, cuts):
        if line is None:
            log.add(TOO_LONG, path, number)
        elif not (line.isascii() or is_text(line)):  # isascii first: it saves a Python call for most lines
            bad += 1
            log.add(BAD_UTF8, path, number)
        else:
            yield number, line
    if log.report and 2 * bad > number:
        advice = f"convert the file to UTF-8, for example with iconv -f SHIFT_JIS -t UTF-8 {path}"
        print(f"{path}: {bad} of {number} lines are not UTF-8: {advice}", file=sys.stderr)


def _read_jsonl(path, text_field, log):
    for number, line in _good_lines(path, log, log.max_chars):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
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
    """Yields the pieces of one record's text, or logs what is wrong with it."""
    if not isinstance(text, str):
        log.add(NOT_TEXT, path, number)
    elif not text.strip():
        log.add(EMPTY, path, number)
    elif len(text) > log.max_chars:
        log.add(TOO_LONG, path, number)
    elif not is_text(text):  # a JSON escape can be half of a surrogate pair
        log.add(BAD_UTF8, path, number)
    else:
        yield from cut(text)


def cut(text):
    """Yields a document as (piece, is_last) pairs."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end], False
        start = end
    yield text[start:], True


def _read_parquet(path, text_field, log):
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_is_file(path, path)
    try:
        with pq.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                log.add(NO_FIELD, path, 1, table.schema_arrow.names)
                return
            for number, value in _parquet_values(table, path, text_field, log):
                try:
                    text = value.as_py()
                    text = text.decode() if isinstance(text, bytes) else text
                except UnicodeDecodeError:
                    log.add(BAD_UTF8, path, number)
                else:
                    yield from _checked(text, path, number, log)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read to its end, is it truncated? ({str(error).splitlines()[0]})") from None


def _parquet_values(table, path, text_field, log):
    """Yields (row number from 1, value) of a column; logs and skips row groups that cannot be usable text."""
    number = 0
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    indices = [paths.index(text_field)] if text_field in paths else []  # lists and structs have longer paths
    for group in range(table.num_row_groups):
        info = table.metadata.row_group(group)
        if indices:  # reads no rows, but raises if broken metadata would make `info.column` abort the process
            next(table.reader.iter_batches(0, [group], indices), None)
        column = info.column(indices[0]) if indices else None
        rows = 0 if column is None else _rows_at_a_time(column, info.num_rows, log.max_chars)
        if not rows:
            log.add(NOT_TEXT if column is None else TOO_LONG, path, number + 1)
            number += info.num_rows
            continue
        for batch in table.iter_batches(rows, row_groups=[group], columns=[text_field]):
            for value in batch.column(0):
                number += 1
                yield number, value


def _rows_at_a_time(column, n_rows, max_chars):
    """Returns how many rows of a Parquet column chunk to decode at once: 1 to 200, or 0 to skip the chunk.

    A few hundred bytes can decode to gigabytes: many rows may share one long value, or the chunk is strongly
    compressed. Skips a chunk whose rows must be longer than max_chars, or that decodes to 1,000 times its size."""
    size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
    if size > max_chars and (size > n_rows * 4 * max_chars or size > 1000 * packed):
        return 0
    shared = (column.data_page_offset - column.dictionary_page_offset) if column.has_dictionary_page else 1
    return max(1, min(200, _SHARED_BYTES * packed // max(1, shared * size)))


def _read_txt(path, text_field, log, separator=SEPARATOR):
    """Yields the pieces of a text file's documents. A line break is held until the next line is known, because the
    line break before a separator is not part of the document."""
    pieces, size = [], 0  # text of the current document that is not yielded yet, and its characters
    is_begun, last = False, 0  # whether a piece of the current document was yielded; number of the last line
    ends = () if separator is None else (separator, f"{separator}\n")
    for number, line in _good_lines(path, log, max(PIECE_CHARS, 64), cuts=True):
        if "\0" in line:
            log.add(HAS_NUL, path, number)
            continue
        is_start, last = number != last, number  # a long line comes in several parts
        if is_start and line in ends:
            yield from _ended("".join(pieces).removesuffix("\n"), is_begun)
            pieces, size, is_begun = [], 0, False
            continue
        if pieces and size + len(line) > PIECE_CHARS:
            text = "".join(pieces)
            yield from ((piece, False) for piece, _ in cut(text.removesuffix("\n")))
            pieces, is_begun = ["\n"] * text.endswith("\n"), True
            size = len(pieces)
        pieces.append(line)
        size += len(line)
    yield from _ended("".join(pieces), is_begun)


def _ended(text, is_begun):
    """Yields the rest of a document, unless the whole document is only white space."""
    if is_begun or text.strip():
        yield from cut(text)


def escaped(pieces):
    """Yields the pieces as extract_texts.py writes them; the docstring of this module describes the escapes."""
    return _replaced(pieces, _TO_ESCAPE, _escape)


def _escape(found):
    slashes, word = found.groups()
    if word is None:
        return f"<|\\{_NAMES[found[0]]}|>"
    return f"<|\\{slashes}{word}|>" if slashes or word == "endoftext" else found[0]


def _unescape(found):
    slashes, word = found.groups()
    return f"<|{slashes}{word}|>" if slashes or word == "endoftext" else _CHARS[word]


def _replaced(pieces, pattern, replace):
    """Yields the pieces with all matches replaced. A match that may continue in the next piece is kept back for it."""
    held = ""
    for piece, is_last in pieces:
        piece = held + piece
        begun = None if is_last else _BEGUN.search(piece, max(0, len(piece) - 1000))
        end = begun.start() if begun else len(piece)
        held = piece[end:]
        if end or is_last:
            yield pattern.sub(replace, piece[:end]), is_last


_READERS = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": lambda *args: _replaced(_read_txt(*args), _ESCAPED, _unescape),
    ".py": lambda *args: _read_txt(*args, separator=None),
}
