"""Records: questions with answers. Reads them from files, and gives the text that a model sees.

A model is trained on `Input: <question> \\n Output:` (`prompt_of`) followed by ` <answer>` (`answer_of`) and EOS. To
answer a question, generation continues the same prompt. `final_answer` takes the part of a written answer that counts.

The shapes of these data sets are known by the names of their fields:

    GSM8K, reasoning-gym    question, answer
    SVAMP                   Body and Question, joined by a space; Answer

RECORD_SUFFIXES lists the file formats: one JSON object per line, a row of a table, or an object in a JSON list.
"""

import contextlib
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from src.data.corpus import MAX_DOC_MB, find_files, refuse_empty
from src.data.readers import BAD_UTF8, NOT_OBJECT, SUFFIXES, TOO_LONG, SkipLog, json_objects, parquet_rows, suffix_of
from src.errors import UserError, few
from src.files.text import is_text, read_json

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # a line or row without the fields is skipped
RECORD_SUFFIXES = (*LINE_SUFFIXES, ".json")
SHAPES = ((("question",), "answer"), (("Body", "Question"), "Answer"))  # fields of the question, field of the answer
NO_RECORD, BAD_QUESTION = "no question and answer", "question is not a string"
BAD_ANSWER = "answer is neither a string nor a number"
EMPTY_QUESTION, EMPTY_ANSWER = "empty question", "empty answer"
_LARGE = 1e16  # a float can be a whole number beyond this, but not all of its digits are known
_GROUPED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")  # a number such as 1,234,567


class Record(NamedTuple):
    """One question with its answer, without white space around them.

    line is the number of its line, row or list item in the file, from 1; extra has the record's other fields."""

    question: str
    answer: str
    path: str
    line: int
    extra: dict


class RecordFields(NamedTuple):
    """The names of a record's fields, None = those of SHAPES. Takes the place of text_field where records are read."""

    question: str | None = None
    answer: str | None = None
    suffixes = RECORD_SUFFIXES

    def __str__(self):
        shapes = dict.fromkeys(self._shapes())
        return "the fields " + ", or ".join(f"{', '.join(question)} and {answer}" for question, answer in shapes)

    def _names_in(self, row):
        """Returns the names of a row's fields, the answer's last, or None if it lacks some."""
        return next(((*q, a) for q, a in self._shapes() if all(name in row for name in (*q, a))), None)

    def _shapes(self):
        return [((self.question,) if self.question else q, self.answer or a) for q, a in SHAPES]

    def fit(self, path) -> bool:
        """Whether the first object or row of a file has these fields; of a .json, which is never text, any of its
        items. False for a file that cannot be read."""
        is_of_records = os.fspath(path).lower().endswith(RECORD_SUFFIXES)
        most = None if suffix_of(path) == ".json" else 1
        with contextlib.suppress(UserError):
            rows = ROW_READERS[suffix_of(path)](path, quiet_log()) if is_of_records else ()
            return any(self._names_in(row) for _, row in itertools.islice(rows, most))
        return False

    def alike(self, files) -> list[str]:
        """Returns the files of a corpus that are read in the same way: as records, if one of them has these fields,
        else as text. Prints on stderr which others are skipped. Raises UserError if there are only others."""
        are_records = {path: self.fit(path) for path in files}
        suffixes = LINE_SUFFIXES if any(are_records.values()) else SUFFIXES
        alike = [path for path in files if are_records[path] or os.fspath(path).lower().endswith(suffixes)]
        others = few(sorted(set(files) - set(alike)))
        if not alike:
            advice = "correct the file, or --question_field and --answer_field"
            raise UserError(f"{others}: no list of records with {self}: {advice}")
        if others:
            why = (
                "no records, unlike other files of the path"
                if any(are_records.values())
                else "neither records nor text"
            )
            print(f"skipped {others} ({why})", file=sys.stderr)
        return alike

    def pieces(self, path, log):
        """Yields every record of a file as a document of two (piece, is_last) pairs: the prompt, then the answer."""
        for record in self.records(path, log):
            yield prompt_of(record.question), False
            yield answer_of(record.answer), True

    def records(self, path, log) -> Iterator[Record]:
        """Yields the records of one file. Logs and skips those without a usable question and answer."""
        for number, row in ROW_READERS[suffix_of(path)](path, log):
            record = self._record(row, path, number, log.max_chars)
            if isinstance(record, Record):
                yield record
            else:
                log.add(record, path, number, list(row) if record == NO_RECORD else ())

    def _record(self, row, path, line, max_chars):
        """Returns the Record of a file's object or row, or what is wrong with it (str)."""
        names = self._names_in(row)
        if names is None:
            return NO_RECORD
        *parts, answer = (row[name] for name in names)
        if any(isinstance(part, bytes) for part in (*parts, answer)):
            return BAD_UTF8
        if not all(isinstance(part, str) for part in parts):
            return BAD_QUESTION
        question, answer = " ".join(parts).strip(), as_text(answer)
        if answer is None:
            return BAD_ANSWER
        if not (question and answer):
            return EMPTY_ANSWER if question else EMPTY_QUESTION
        if not is_text(question + answer):  # a JSON escape can be half of a surrogate pair
            return BAD_UTF8
        if len(question) + len(answer) > max_chars:
            return TOO_LONG
        return Record(question, answer, str(path), line, _others(row, names))


def _others(row, names):
    """Returns the other fields of a row, without binary ones, which no report can show."""
    return {name: value for name, value in row.items() if name not in names and not isinstance(value, bytes)}


def as_text(answer):
    """Returns the text of an answer: 10.0 becomes 10. Returns None if it is neither a string nor a finite number."""
    if isinstance(answer, Decimal) and answer.is_finite():  # `normalize` would round to 28 digits
        answer = int(answer) if answer == int(answer) else f"{answer:f}".rstrip("0")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < _LARGE:
        answer = int(answer)
    if isinstance(answer, float) and not abs(answer) < float("inf"):
        return None
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return answer.strip() if isinstance(answer, str) else str(answer) if is_number else None


def _listed(path, log):
    """Yields (number from 1, object) of the items of a .json file."""
    items = read_json(path)
    if not isinstance(items, list):
        raise UserError(
            f"{path} is not a list of records: write [{{...}}, {{...}}], or one object per line in a .jsonl"
        )
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield number, item
        else:
            log.add(NOT_OBJECT, path, number)


def quiet_log():
    """Returns a SkipLog that prints nothing."""
    return SkipLog(False, Counter(), False, int(MAX_DOC_MB * 1e6))


ROW_READERS = {".jsonl": json_objects, ".parquet": parquet_rows, ".json": _listed}


@dataclass
class RecordsConfig:
    """Questions with answers in place of text.

    Args:
        records: read questions with answers; the text is the prompt `Input: <question> \\n Output:` with the answer
        question_field: with records, name of the field or column with the question; by default question (GSM8K,
            reasoning-gym), or Body and Question (SVAMP)
        answer_field: with records, name of the field or column with the answer; by default answer or Answer
    """

    records: bool = False
    question_field: str | None = None
    answer_field: str | None = None

    def __post_init__(self):
        for name in ("question_field", "answer_field"):
            if getattr(self, name) is not None and not self.records:
                raise ValueError(f"{name} needs records true: add --records true, or leave it out")

    def in_place_of(self, text_field: str):
        """Returns what `read_pieces` takes as its text_field."""
        if self.records and text_field != "text":
            raise UserError("text_field is for plain text, but records true reads questions and answers: leave it out")
        return RecordFields(self.question_field, self.answer_field) if self.records else text_field


def read_records(paths, question_field=None, answer_field=None, log=None, max_doc_mb=MAX_DOC_MB) -> Iterator[Record]:
    """Yields the records of files, globs and folders.

    question_field and answer_field name the fields; None = those of SHAPES. Bad records are counted in `log`, a
    SkipLog; without one, the first few of each kind and a summary are printed on stderr, and records of over max_doc_mb
    million characters count as bad. Raises UserError if a file cannot be read to its end or is a .json without a list,
    and NoDocument if there is no usable record."""
    fields, files = RecordFields(question_field, answer_field), find_files(paths, RECORD_SUFFIXES)
    counts = log or SkipLog(False, Counter(), True, int(max_doc_mb * 1e6))
    is_empty = True
    for path in files:
        for record in fields.records(path, counts):
            is_empty = False
            yield record
    if is_empty:
        refuse_empty(files, fields, counts)
    if log is None and counts.skipped:
        print(f"skipped: {counts.summary()}", file=sys.stderr)


def prompt_of(question: str) -> str:
    """Returns the text before the answer. Its tokens in training are those that generation starts from."""
    return f"Input: {question} \n Output:"


def answer_of(answer: str) -> str:
    """Returns the text that follows the prompt; EOS comes after it."""
    return f" {answer}"


def final_answer(text: str) -> str:
    """Returns the part of an answer that counts: what follows the last ####, if there is one, as in GSM8K.

    White space around it and the commas inside numbers are removed: `... so #### 1,200` becomes `1200`."""
    return _GROUPED.sub(lambda number: number[0].replace(",", ""), text.rpartition("####")[2].strip())
