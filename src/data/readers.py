"""Readers of documents, one function per file format, and the text form in which extract_texts.py writes them.

READERS lists the formats. docs/architecture.md says which files to change for a new one.

In a .txt file, a line that holds only <|endoftext|> separates two documents. The line break before that line belongs to
the separator, not to the document. A .txt file without separators is one document, and a .py file always is.

extract_texts.py writes such .txt files (see `escaped`). It escapes what plain text cannot hold, and reading any .txt
file undoes this: <|endoftext|> inside a document is written as <|\\endoftext|>, a carriage return as <|\\r|>, NUL as
<|\\0|>, U+FEFF as <|\\ufeff|>. An escape that is already in a document gets one more backslash. All other text is
unchanged.
"""

import json
import os
import re
import sys

from src.errors import UserError
from src.files.text import MOST_LINE, check_is_file, is_text, read_lines

SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 65_536  # most characters of one piece, see corpus.py
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


class SkipLog:
    """Counts bad lines and names the first few on stderr; when strict, raises UserError for the first one."""

    def __init__(self, strict, skipped, report, max_chars):
        self.strict, self.skipped, self.report, self.max_chars = strict, skipped, report, max_chars
        self.fields = {}  # {name: None} of the fields in records that lack the text field, for the message

    def add(self, reason, path, line, fields=(), count=1):
        if self.strict:
            raise UserError(f"{path}:{line}: {reason}" + (f"; available fields: {', '.join(fields)}" if fields else ""))
        self.skipped[reason] += count
        if len(self.fields) < 20:
            self.fields.update(dict.fromkeys(fields))
        if self.report and self.skipped[reason] - count < REPORTED:
            print(f"{path}:{line}: skipped, {reason}", file=sys.stderr)

    def summary(self):
        return ", ".join(f"{n} x {reason}" for reason, n in self.skipped.items())


def _good_lines(path, log, most, cuts=False):
    """Yields (number, line) of the good lines of `read_lines`. Logs and skips lines that are too long or not text.

    With `cuts`, a long line comes in parts. A bad part is skipped and not the whole line; a line break takes its place,
    and the line counts once."""
    number = bad = begun = left = 0  # begun, left: number of the last line of which a part was passed on, or skipped
    for number, line in read_lines(path, most, cuts):
        if line is None:
            reason = TOO_LONG
        elif not (line.isascii() or is_text(line)):  # isascii first: saves a Python call for ASCII lines
            reason = BAD_UTF8
        elif cuts and "\0" in line:
            reason = HAS_NUL
        else:
            begun = number
            yield number, line
            continue
        if number != left:
            bad, left = bad + (reason == BAD_UTF8), number
            log.add(reason, path, number)
        if begun == number:
            begun = 0
            yield number, "\n"
    if log.report and 2 * bad > number:
        advice = f"convert the file to UTF-8, for example with iconv -f SHIFT_JIS -t UTF-8 {path}"
        print(f"{path}: {bad} of {number} lines are not UTF-8: {advice}", file=sys.stderr)


def read_jsonl(path, text_field, log):
    """Yields the pieces of the text field of every record, one JSON object per line."""
    for number, record in json_objects(path, log):
        if text_field in record:
            yield from _checked(record[text_field], path, number, log)
        else:
            log.add(NO_FIELD, path, number, list(record))


def json_objects(path, log):
    """Yields (number, object) of every line that is a JSON object. Logs and skips the others.

    max_doc_mb is for the text in it, which the caller checks: the line may be longer, for example by escapes."""
    for number, line in _good_lines(path, log, max(log.max_chars, MOST_LINE)):
        if not line.strip():
            continue
        try:
            record = json.loads(line.removeprefix("\ufeff"))  # a BOM may start any line of files that were joined
        except (ValueError, RecursionError):
            log.add(BAD_JSON, path, number)
        else:
            if isinstance(record, dict):
                yield number, record
            else:
                log.add(NOT_OBJECT, path, number)


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


def read_parquet(path, text_field, log):
    """Yields the pieces of the text column of every row."""
    for number, row in parquet_rows(path, log, text_field):
        yield from _checked(row[text_field], path, number, log)


def parquet_rows(path, log, column=None):
    """Yields (number from 1, {column: value}) of every row, with all columns or only the named one.

    Binary values become text. If all columns are read, values that are not UTF-8 become bytes: they may be in a column
    that nobody needs. Otherwise logs and skips such rows. Logs and skips row groups that are too large."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_is_file(path, path)
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column is not None and column not in names:
                log.add(NO_FIELD, path, 1, names)
                return
            for first, batch in _parquet_batches(table, path, column, log):
                for number, values in enumerate(zip(*batch.columns), first):
                    try:
                        row = {name: _plain(value, column is None) for name, value in zip(batch.schema.names, values)}
                    except UnicodeDecodeError:
                        log.add(BAD_UTF8, path, number)
                    else:
                        yield number, row
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read to its end, is it truncated? ({str(error).splitlines()[0]})") from None


def _plain(value, keeps_bytes):
    """Returns the Python value of an Arrow scalar, or None for a date that Python does not know."""
    kind = value.type
    try:
        value = value.as_py()
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:  # a ValueError too; a string column can hold such bytes as well
        if not keeps_bytes:
            raise
        return error.object
    except (OverflowError, ValueError, KeyError):  # a year over 9999, nanoseconds, an unknown time zone
        return None
    if isinstance(value, float) and kind.bit_width < 64:
        return float(str(kind.to_pandas_dtype()(value)))  # 0.1, not 0.10000000149011612
    return value


def _parquet_batches(table, path, column, log):
    """Yields (number of its first row from 1, batch of rows); logs and skips row groups that cannot be usable."""
    number, most = 1, max(log.max_chars, MOST_LINE)  # a small max_doc_mb is for documents, not for a group of them
    paths = [table.schema.column(i).path for i in range(len(table.schema))]  # longer for parts of lists and structs
    indices = [i for i, name in enumerate(paths) if column in (None, name)]
    for group in range(table.num_row_groups):
        info = table.metadata.row_group(group)
        if indices:  # read 0 rows first: broken metadata raises an error here; `info.column` would abort the process
            next(table.reader.iter_batches(0, [group], indices), None)
        sizes = (_rows_at_a_time(info.column(i), info.num_rows, most) for i in indices)
        if rows := min(sizes, default=0):
            columns = None if column is None else [column]
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                yield number, batch
                number += len(batch)
        else:
            log.add(TOO_LONG if indices else NOT_TEXT, path, number, count=info.num_rows)
            number += info.num_rows


def _rows_at_a_time(column, n_rows, max_chars):
    """Returns how many rows of a Parquet column chunk to decode at once: 1 to 200, or 0 to skip the chunk.

    A few hundred bytes can decode to gigabytes, if many rows share one long value or if the chunk is strongly
    compressed. A chunk that decodes to over max_chars bytes is skipped in two cases: if its rows must be too long on
    average (a character has at most 4 bytes), or if it decodes to over 1,000 times its compressed size."""
    size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
    if size > max_chars and (size > n_rows * 4 * max_chars or size > 1000 * packed):
        return 0
    shared = (column.data_page_offset - column.dictionary_page_offset) if column.has_dictionary_page else 1
    return max(1, min(200, _SHARED_BYTES * packed // max(1, shared * size)))


def read_txt(path, text_field, log, separator=SEPARATOR):
    """Yields the pieces of a text file's documents.

    A line break is held back until the next line is known, because a line break before a separator is not part of the
    document."""
    pieces, size = [], 0  # the part of the current document that is not yielded yet, and its length
    is_begun, last = False, 0  # whether a piece of the current document was yielded; number of the last line
    ends = () if separator is None else (separator, f"{separator}\n")
    for number, line in _good_lines(path, log, max(PIECE_CHARS, len(ends[-1]) if ends else 1), cuts=True):
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
    """Yields the pieces with all matches replaced. An incomplete match at the end of a piece goes to the next piece."""
    held = ""
    for piece, is_last in pieces:
        piece = held + piece
        begun = None if is_last else _BEGUN.search(piece, max(0, len(piece) - 1000))
        end = begun.start() if begun else len(piece)
        held = piece[end:]
        if end or is_last:
            yield pattern.sub(replace, piece[:end]), is_last


# suffix: function (path, text_field, log) that yields the pieces of all documents
READERS = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".txt": lambda *args: _replaced(read_txt(*args), _ESCAPED, _unescape),
    ".py": lambda *args: read_txt(*args, separator=None),
}
SUFFIXES = (*READERS, ".jsonl.gz", ".txt.gz")  # files may have them in upper case too


def suffix_of(path):
    """Returns the key of a data file's path in READERS: its suffix in lower case, without .gz."""
    return os.path.splitext(os.fspath(path).lower().removesuffix(".gz"))[1]
