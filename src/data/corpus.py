"""Files to documents: .jsonl, .txt (both gzipped or not), .parquet and .py, read as streams through `src.files.text`.

In a .txt file documents are separated by a line that holds only <|endoftext|>; the line break before that line belongs
to the separator, so a document keeps its own last line break, or its lack of one. Without separators, and in .py files
always, the file is one document.

extract_texts.py writes such .txt files (`escaped`). What plain text cannot hold it writes in another form, which is
read back: <|endoftext|> inside a document as <|\\endoftext|>, a carriage return as <|\\r|>, NUL as <|\\0|>, U+FEFF as
<|\\ufeff|>; and a document that holds such a form itself gets one more backslash. All other text stays as it is.

Documents travel as pieces of at most PIECE_CHARS characters with a mark on the last one, so that a file which is one
document of many GB passes in flat memory, and no end-of-document falls between the pieces.
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

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz", ".py")  # in capitals too
SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 65_536
MAX_DOC_MB = 32  # of a document that is held in memory whole
REPORTED = 3  # this many bad lines of each kind are named on stderr, the rest only counted
NO_FIELD, NOT_TEXT, EMPTY = "no text field", "text is not a string", "empty text"
BAD_JSON, BAD_UTF8, NOT_OBJECT = "broken JSON", "invalid UTF-8", "not a JSON object"
TOO_LONG, HAS_NUL = "longer than max_doc_mb", "NUL character"
_CHARS = {"r": "\r", "0": "\0", "ufeff": "\ufeff"}
_NAMES = {char: name for name, char in _CHARS.items()}
_TO_ESCAPE = re.compile(r"<\|(\\*)(endoftext|r|0|ufeff)\|>|[\r\0\ufeff]")
_ESCAPED = re.compile(r"<\|\\(\\*)(endoftext|r|0|ufeff)\|>")
_BEGUN = re.compile(r"<(\|(\\*([a-z0]*\|?)?)?)?\Z")  # what may go on as one of them
_SHARED_BYTES = 64 * 1024**2  # of values that rows of a Parquet file share, decoded at once
_END_BYTES = 1024**2  # of the start and of the end of a file: what fingerprint_files looks at
_STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class NoDocument(UserError):
    """The files hold no document that can be used."""


def find_files(paths):
    """Sorted list of the data files that files, globs and folders (linked ones too) name, each once by any name.

    What a folder holds besides is said on stderr. UserError for a path that does not exist, cannot be searched, or
    leads to no file of the kinds in SUFFIXES."""
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
            raise UserError(f"{path} leads to no data file; the kinds that are read are {', '.join(SUFFIXES)}")
        for file in sorted(files):
            found.setdefault(same_file_key(file), file)
    return sorted(found.values())


def same_file_key(path):
    """Equal for two names of one file: other spellings of the path, links, hard links."""
    info = os.stat(path)
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)


def _kind(path):
    """The longest of SUFFIXES that the path has, or None."""
    return max((suffix for suffix in SUFFIXES if os.fspath(path).lower().endswith(suffix)), key=len, default=None)


def _files_in(root):
    """The data files of a folder; what else is there is said in one line on stderr."""
    files, left = [], []
    for path in _walk(root, {"__pycache__"}, left):
        is_hidden = os.path.basename(path).startswith(".")  # such as ._a.txt, which macOS puts beside a.txt
        (files if _kind(path) and not is_hidden and os.path.isfile(path) else left).append(path)
    if left:
        why = "hidden, links to nowhere, unreadable, or of other kinds"
        print(f"{root}: not read: {few(os.path.relpath(path, root) for path in left)} ({why})", file=sys.stderr)
    return files


def _walk(root, skips, left):
    """Paths of all files, through linked folders too, each folder once; those passed over are added to `left`."""

    def unreadable(error):
        if error.filename == root:
            raise UserError(f"{error.filename} cannot be searched: {error.strerror}")
        left.append(error.filename)

    seen = {same_file_key(root)}
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        hidden = [d for d in subfolders if d in skips or d.startswith(".")]
        left.extend(os.path.join(folder, name) for name in hidden if name.startswith("."))
        new = {same_file_key(os.path.join(folder, d)): d for d in sorted(set(subfolders) - set(hidden), reverse=True)}
        subfolders[:] = sorted(d for key, d in new.items() if key not in seen)
        seen.update(new)
        yield from (os.path.join(folder, name) for name in sorted(names))


def stdlib_files(min_bytes=200, valid_share=20):
    """(train_paths, valid_paths): the .py sources of the running interpreter's standard library, about one file in
    `valid_share` held back by a hash of its relative path. Without tests, installed packages, and files that are tiny,
    not UTF-8, or made for this machine."""
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
        raise UserError(f"{root} has no sources of the standard library; give --train_paths")
    return parts


def fingerprint_files(files):
    """[(name without folders, bytes, digest of size, first and last MiB)] of files.  UserError where unreadable."""
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


def read_documents(paths, text_field="text", strict=False, skipped=None, max_doc_mb=MAX_DOC_MB):
    """Documents (str) of files, globs and folders, one whole document at a time; arguments as in `read_pieces`."""
    pieces = []
    for piece, is_last in read_pieces(paths, text_field, strict, skipped, max_doc_mb=max_doc_mb):
        pieces.append(piece)
        if is_last:
            yield "".join(pieces)
            pieces.clear()


def read_pieces(paths, text_field="text", strict=False, skipped=None, report=True, max_doc_mb=MAX_DOC_MB):
    """Documents as (piece, is_last) pairs; pieces are cut after a line break where there is one.

    A bad line, and a document of .jsonl or .parquet of over max_doc_mb million characters, is counted by reason in
    `skipped` (a Counter), and, unless report=False, the first few are named on stderr; strict=True makes it a
    UserError. Raises UserError for a file that cannot be read to its end, and NoDocument where nothing is left."""
    if not 1 <= max_doc_mb * 1e6 <= 1e12:
        raise UserError(f"max_doc_mb is {max_doc_mb}: set it over 0, to a million at most")
    files = find_files(paths)
    log = _SkipLog(strict, Counter() if skipped is None else skipped, report, int(max_doc_mb * 1e6))
    is_empty = True
    for path in files:
        for piece in _READERS[_kind(path).removesuffix(".gz")](path, text_field, log):
            is_empty = False
            yield piece
    if is_empty:
        _refuse_empty(files, text_field, log)
    if log.skipped and skipped is None and report:  # else the caller tells
        print(f"skipped: {log.summary()}", file=sys.stderr)


def _refuse_empty(files, text_field, log):
    if log.fields:
        fields = ", ".join(log.fields)
        raise NoDocument(f"no line of {few(files)} has the field {text_field!r}; fields there: {fields} (--text_field)")
    raise NoDocument(f"no document in {few(files)}: {f'nothing usable ({log.summary()})' if log.skipped else 'empty'}")


class _SkipLog:
    """Counts bad lines, names the first few, and stops at the first one when strict."""

    def __init__(self, strict, skipped, report, max_chars):
        self.strict, self.skipped, self.report, self.max_chars = strict, skipped, report, max_chars
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


def _good_lines(path, log, most, cuts=False):
    """(number, line) as in `read_lines`, without the lines that are no text or too long, which the log counts."""
    number = bad = 0
    for number, line in read_lines(path, most, cuts):
        if line is None:
            log.add(TOO_LONG, path, number)
        elif not (line.isascii() or is_text(line)):  # asked first, because a call takes longer
            bad += 1
            log.add(BAD_UTF8, path, number)
        else:
            yield number, line
    if log.report and 2 * bad > number:
        advice = f"find its encoding and convert it, such as iconv -f SHIFT_JIS -t UTF-8 {path}"
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
    """Pieces of one record's text, or a note of what is wrong with it."""
    if not isinstance(text, str):
        log.add(NOT_TEXT, path, number)
    elif not text.strip():
        log.add(EMPTY, path, number)
    elif len(text) > log.max_chars:
        log.add(TOO_LONG, path, number)
    elif not is_text(text):  # JSON can spell half of a surrogate pair
        log.add(BAD_UTF8, path, number)
    else:
        yield from cut(text)


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
        raise UserError(f"{path} cannot be read to its end, is it cut short? ({str(error).splitlines()[0]})") from None


def _parquet_values(table, path, text_field, log):
    """(number from 1, value) of a column, without the row groups that no text can be in."""
    number = 0
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    indices = [paths.index(text_field)] if text_field in paths else []  # a list or a struct has others
    for group in range(table.num_row_groups):
        info = table.metadata.row_group(group)
        if indices:  # no rows, but what would abort the process in `info.column` is an exception here
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
    """How many rows of a Parquet column chunk to decode at once, at most 200; 0 where they cannot be text of max_chars.

    A few hundred bytes can hold gigabytes: compressed to nothing, or one value that many rows point to."""
    size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
    if size > max_chars and (size > n_rows * 4 * max_chars or size > 1000 * packed):
        return 0
    shared = (column.data_page_offset - column.dictionary_page_offset) if column.has_dictionary_page else 1
    return max(1, min(200, _SHARED_BYTES * packed // max(1, shared * size)))


def _read_txt(path, text_field, log, separator=SEPARATOR):
    """Pieces of a text file's documents. A line break is passed on only with the line after it, because the one before
    a separator is not part of the document."""
    pieces, size, is_begun, last = [], 0, False, 0  # what is not yielded yet of a document; whether some of it is
    ends = () if separator is None else (separator, f"{separator}\n")
    for number, line in _good_lines(path, log, max(PIECE_CHARS, 64), cuts=True):
        if "\0" in line:
            log.add(HAS_NUL, path, number)
            continue
        is_start, last = number != last, number  # of a line, which may come in parts
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
    """The rest of a document; one of white space alone is none."""
    if is_begun or text.strip():
        yield from cut(text)


def escaped(pieces):
    """Pieces as extract_texts.py writes them: see the docstring of this module."""
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
    """Pieces with all matches replaced; the beginning of one at the end of a piece waits for the next piece."""
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
