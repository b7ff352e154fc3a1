"""What is in data files: number, fields, lengths, duplicates, overlap with other files. `inspect_data.py` prints it.

`measure` reads the files once. It keeps 24 bytes per document (three hashes) and a count per length, so memory stays
small for any corpus. `figures_of` turns the result into numbers.

A document of text files is one text. A document of records is a question with its answer: duplicates are compared with
both, overlap with another set only by the question.
"""

import hashlib
import itertools
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from src.data.readers import READERS, SkipLog, suffix_of
from src.data.records import ROW_READERS, answer_of, prompt_of
from src.errors import UserError

SHOWN = 300  # characters of an example
MOST_FIELDS = 1000  # field names that are counted; a file that uses ids as names could have millions
BATCH = 200  # pieces per call of the tokenizer
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
CHARACTERS, TOKENS = "characters", "tokens"
QUESTION, ANSWER = "question characters", "answer characters"
ANSWER_TOKENS, RECORD_TOKENS = "answer tokens", "record tokens"  # of a record: the prompt and the answer


class Document(NamedTuple):
    """One document: its file, its place there, its lengths {name: n}, three 64-bit hashes, and its shortened text.

    whole: hash of the text, or of question and answer. key: hash of the part that is compared with other sets, the text
    or the question. normal: the same after white space and case are normalised."""

    path: str
    place: str
    lengths: dict[str, int]
    whole: int
    key: int
    normal: int
    text: str


@dataclass
class Measures:
    """What `measure` collects. The arrays have one hash per document; lengths has {length: number} for each name."""

    files: Counter = field(default_factory=Counter)
    lengths: dict[str, Counter] = field(default_factory=dict)
    whole: array = field(default_factory=lambda: array("Q"))
    key: array = field(default_factory=lambda: array("Q"))
    normal: array = field(default_factory=lambda: array("Q"))
    examples: list[str] = field(default_factory=list)

    def __len__(self):
        return len(self.whole)


class Hashes:
    """64-bit hashes of a text that arrives in pieces: as it is, and with white space and case normalised."""

    def __init__(self):
        self._exact, self._normal = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        self._has_word = self._has_gap = False  # whether a word came, and white space after it

    def add(self, piece):
        self._exact.update(piece.encode())
        words = piece.casefold().split()
        if words and self._has_word and (self._has_gap or piece[0].isspace()):
            self._normal.update(b" ")
        self._normal.update(" ".join(words).encode())
        self._has_gap = piece[-1:].isspace() or self._has_gap and not words
        self._has_word = self._has_word or bool(words)
        return self

    def values(self):
        """Returns (exact, normalised)."""
        return tuple(int.from_bytes(each.digest(), "big") for each in (self._exact, self._normal))


def shorten(text, most=SHOWN):
    """Returns the start of a text; characters that a terminal might execute become code points."""
    is_plain = lambda c: c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs"  # noqa: E731
    start = "".join(c if is_plain(c) else f"<U+{ord(c):04X}>" for c in text[:most])
    return start + (" ..." if len(text) > most else "")


def documents(files, text_field, log, tokenizer=None) -> Iterator[Document]:
    """Yields the Document of each text or record. text_field is that of `read_pieces`; log is a SkipLog.

    With a tokenizer, they have lengths in tokens as well, without BOS and EOS."""
    read = _texts if isinstance(text_field, str) else _records
    for path in files:
        yield from read(str(path), text_field, log, tokenizer)


def _texts(path, text_field, log, tokenizer):
    """Yields the Documents of one file of text. A long document is tokenized in pieces, as in training."""
    number, n_chars, n_tokens, start, hashes = 1, 0, 0, "", Hashes()
    for batch in _batches(READERS[suffix_of(path)](path, text_field, log)):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch]) if tokenizer else batch
        for (piece, is_last), ids in zip(batch, encoded):
            hashes.add(piece)
            n_chars, n_tokens = n_chars + len(piece), n_tokens + len(ids)
            start += piece[: SHOWN + 1 - len(start)]
            if is_last:
                lengths = {CHARACTERS: n_chars} | ({TOKENS: n_tokens} if tokenizer else {})
                exact, normal = hashes.values()
                yield Document(path, f"{path}, document {number}", lengths, exact, exact, normal, shorten(start))
                number, n_chars, n_tokens, start, hashes = number + 1, 0, 0, "", Hashes()


def _records(path, fields, log, tokenizer):
    """Yields the Documents of one file of records."""
    for batch in _batches(fields.records(path, log)):
        tokens = [{}] * len(batch)
        if tokenizer:
            prompts = tokenizer.encode_batch([prompt_of(record.question) for record in batch])
            answers = tokenizer.encode_batch([tokenizer.continuing(answer_of(record.answer)) for record in batch])
            tokens = [{ANSWER_TOKENS: len(a), RECORD_TOKENS: len(p) + len(a)} for p, a in zip(prompts, answers)]
        for record, counts in zip(batch, tokens):
            lengths = {QUESTION: len(record.question), ANSWER: len(record.answer)} | counts
            key, normal = Hashes().add(record.question).values()
            whole, _ = Hashes().add(f"{record.question}\0{record.answer}").values()
            text = prompt_of(shorten(record.question)) + answer_of(shorten(record.answer))
            yield Document(path, f"{path}:{record.line}", lengths, whole, key, normal, text)


def _batches(items):
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, BATCH)), [])


def measure(files, text_field, log, tokenizer=None, n_examples=0) -> Measures:
    """Returns the Measures of the documents in files; the arguments are those of `documents`."""
    found = Measures(files=Counter(dict.fromkeys(map(str, files), 0)))
    for document in documents(files, text_field, log, tokenizer):
        found.files[document.path] += 1
        for name, length in document.lengths.items():
            found.lengths.setdefault(name, Counter())[length] += 1
        for name in ("whole", "key", "normal"):
            getattr(found, name).append(getattr(document, name))
        if len(found) <= n_examples:
            found.examples.append(document.text)
    return found


# ---- fields ---------------------------------------------------------------------------------------------------------


def fields_of(files, max_chars) -> list[dict]:
    """Returns {name, types: {type: number}, share} for each field of .jsonl, .json and .parquet files.

    share: the part of all records in which the field is not null; None if a Parquet file does not say it. Names beyond
    MOST_FIELDS are left out. Fields are in the order in which they first occur."""
    types, filled, n_records = {}, Counter(), 0
    for path in files:
        if suffix_of(path) == ".parquet":
            n_records += _add_columns(path, types, filled)
        elif suffix_of(path) in ROW_READERS:
            for _, row in ROW_READERS[suffix_of(path)](path, SkipLog(False, Counter(), False, max_chars)):
                n_records += 1
                for name, value in row.items():
                    if name in types or len(types) < MOST_FIELDS:
                        types.setdefault(name, Counter())[KINDS.get(type(value), "null")] += 1
                        filled[name] += value is not None
    return [
        {"name": name, "types": dict(kinds), "share": filled[name] / max(1, n_records) if filled[name] >= 0 else None}
        for name, kinds in types.items()
    ]


def _add_columns(path, types, filled):
    """Counts the columns of a Parquet file, from its metadata alone, and returns its number of rows.

    The number of filled values becomes minus infinity if the file does not have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            info, schema = table.metadata, table.schema_arrow
            leaves = {table.schema.column(i).path: i for i in range(len(table.schema))}
            for group in range(info.num_row_groups):  # broken metadata raises an error here; `_nulls` would abort
                next(table.reader.iter_batches(0, [group], list(range(len(table.schema)))), None)
            for name, kind in zip(schema.names[:MOST_FIELDS], schema.types):
                types.setdefault(name, Counter())[str(kind)] += info.num_rows
                nulls = [_nulls(info.row_group(g), leaves.get(name)) for g in range(info.num_row_groups)]
                filled[name] += float("-inf") if None in nulls else info.num_rows - sum(nulls)
            return info.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read to its end, is it truncated? ({str(error).splitlines()[0]})") from None


def _nulls(group, column):
    """Returns the number of nulls of a column in a row group, or None if unknown, as for lists and objects."""
    statistics = None if column is None else group.column(column).statistics
    return statistics.null_count if statistics is not None and statistics.has_null_count else None


# ---- figures --------------------------------------------------------------------------------------------------------


def summary(counts: dict[int, int]) -> dict:
    """Returns n, total, min, median, mean, p95 and max of lengths given as {length: number}.

    median and p95 are lengths that occur: the smallest that is not exceeded by 50 or 95 % of the documents."""
    lengths, sums = _sorted(counts)
    n, total = int(sums[-1]), sum(length * number for length, number in counts.items())
    median, p95 = (int(lengths[np.searchsorted(sums, share * n)]) for share in (0.5, 0.95))
    low, high = int(lengths[0]), int(lengths[-1])
    return {"n": n, "total": total, "min": low, "median": median, "mean": total / n, "p95": p95, "max": high}


def _sorted(counts):
    """Returns (ascending lengths, number of documents up to each of them)."""
    lengths = np.array(sorted(counts), np.int64)
    return lengths, np.cumsum([counts[int(length)] for length in lengths])


def histogram(counts: dict[int, int], most_bins: int) -> list[tuple[int, int | None, int]]:
    """Returns (first length, last length, number) of about `most_bins` bins of equal, round width, without gaps.

    If some lengths are far above the 99th percentile, the last bin has all of those, and None as its last length."""
    lengths, sums = _sorted(counts)
    low, high = int(lengths[0]), int(lengths[np.searchsorted(sums, 0.99 * sums[-1])])
    width = next(w for k in itertools.count() for w in (10**k, 2 * 10**k, 5 * 10**k) if w * most_bins > high - low)
    first, n_bins = low // width * width, high // width - low // width + 1
    numbers = np.diff(sums, prepend=0)
    filled = np.bincount(np.minimum((lengths - first) // width, n_bins), numbers, n_bins + 1).astype(int).tolist()
    bins = [(first + i * width, first + (i + 1) * width - 1, filled[i]) for i in range(n_bins)]
    return bins + [(first + n_bins * width, None, filled[-1])] * bool(filled[-1])


def fit(counts: dict[int, int], n_start: int, max_seq_len: int, of_records: bool) -> dict:
    """Returns what happens to documents at a max_seq_len, given their lengths in tokens without BOS and EOS.

    n_start: 1 if texts start with BOS, else 0. longer: documents with more input tokens than that; records of this kind
    are dropped. Text is cut into `windows`, and loses nothing; with packing false, `cut_tokens` of `tokens` are lost.
    These two include an EOS for each document."""
    if of_records:
        longer = sum(number for length, number in counts.items() if length + n_start > max_seq_len)
        return {"max_seq_len": max_seq_len, "longer": longer}
    targets = {length + 1: number for length, number in counts.items()}  # with EOS; the inputs are as many, with BOS
    n_targets = sum(length * number for length, number in targets.items())
    return {
        "max_seq_len": max_seq_len,
        "longer": sum(number for length, number in targets.items() if length > max_seq_len),
        "windows": -(-(n_targets - 1) // max_seq_len) if n_targets > max_seq_len else 0,
        "tokens": n_targets,
        "cut_tokens": sum((length - max_seq_len) * n for length, n in targets.items() if length > max_seq_len),
    }


def repeats(hashes) -> dict:
    """Returns documents that equal an earlier one: their number, and the most frequent one with its positions.

    first, second: its first two positions; None if there is no duplicate."""
    hashes = np.frombuffer(hashes, np.uint64)
    values, numbers = np.unique(hashes, return_counts=True)
    if len(values) == len(hashes):
        return {"repeated": 0, "most": 1, "first": None, "second": None}
    # of several that are equally frequent, the one that comes first
    top = np.isin(hashes, values[numbers == numbers.max()]).argmax()
    first, second = np.flatnonzero(hashes == hashes[top])[:2].tolist()
    return {"repeated": len(hashes) - len(values), "most": int(numbers.max()), "first": first, "second": second}


def overlap(found: Measures, other: Measures) -> dict:
    """Returns how many documents (or questions) of `found` are in `other`: exactly, and with white space and case
    normalised; `example` is the position of the first of the latter, or None."""
    exact, normal = (
        np.isin(np.frombuffer(getattr(found, name), np.uint64), np.frombuffer(getattr(other, name), np.uint64))
        for name in ("key", "normal")
    )
    example = int(normal.argmax()) if normal.any() else None
    return {"other": len(other), "exact": int(exact.sum()), "normalised": int(normal.sum()), "example": example}


def documents_at(positions, files, text_field, max_chars) -> dict[int, Document]:
    """Returns {position: Document} for positions in the order of `measure`; reads the files again up to the last."""
    last = max(positions, default=-1)
    log = SkipLog(False, Counter(), False, max_chars)
    read = itertools.islice(documents(files, text_field, log), last + 1)
    return {position: document for position, document in enumerate(read) if position in positions}


def figures_of(found: Measures, of_records: bool, n_start: int = 1, max_seq_len: int | None = None) -> dict:
    """Returns the figures of a set, as for the JSON file. max_seq_len needs lengths in tokens.

    Each length also has its histogram. `repeated_questions` counts records whose question was there before."""
    figures = {"kind": "records" if of_records else "documents", "n": len(found), "files": dict(found.files)}
    figures["lengths"] = {
        name: summary(counts) | {"histogram": histogram(counts, 16)} for name, counts in found.lengths.items()
    }
    figures["duplicates"] = repeats(found.whole)
    figures["duplicates"]["repeated_normalised"] = repeats(found.normal)["repeated"]
    if of_records:
        figures["duplicates"]["repeated_questions"] = repeats(found.key)["repeated"]
    if max_seq_len is not None:
        figures["fit"] = fit(found.lengths[RECORD_TOKENS if of_records else TOKENS], n_start, max_seq_len, of_records)
    return figures
