"""Collect the documents of many files in one text file for training.

    python extract_texts.py data/wiki/*.jsonl.gz --output data/train_texts.txt
    python extract_texts.py books/ more.parquet --text_field body --max_docs 10000
    python extract_texts.py notes.jsonl --strict --output data/notes.txt     # stop at the first bad line
    python extract_texts.py gsm8k/train.jsonl --records --output data/maths.txt      # questions with answers

Reads files, globs and folders with their subfolders; data/README.md lists the file formats. Writes one UTF-8 text file
with the line <|endoftext|> after each document. All scripts of this project read it back as the same documents. A
document that contains such a line is escaped, as src/data/readers.py explains. Text is streamed, so memory use does not
grow with its size. Messages on stderr give the counts, and say what was skipped and why.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from src.config import parse_flags, run
from src.data.corpus import MAX_DOC_MB, find_files, read_pieces, suffixes_of
from src.data.readers import SEPARATOR, SUFFIXES, escaped
from src.data.records import RecordsConfig
from src.errors import UserError
from src.files.folders import replacing_file
from src.files.text import check_is_file


@dataclass
class ExtractConfig:
    """What to read and where to write it.

    Args:
        paths: files, globs or folders to read; the flag name may be left out
        output: text file to write
        max_docs: stop after this many documents; all if not given
        text_field: name of the JSON field or parquet column that holds the text
        strict: stop with an error at a bad line, instead of skipping it
        max_doc_mb: skip .jsonl and .parquet documents longer than this many million characters
    """

    paths: list[str] = field(default_factory=list)
    output: str = "train_texts.txt"
    max_docs: int | None = None
    text_field: str = "text"
    strict: bool = False
    max_doc_mb: float = MAX_DOC_MB

    def __post_init__(self):
        if self.max_docs is not None and self.max_docs < 1:
            raise ValueError(f"max_docs is {self.max_docs}: set it to 1 or more")


def parse_args(argv=None):
    config, records = parse_flags(__doc__, ExtractConfig, RecordsConfig, argv=argv, positional="paths")
    if not config.paths:
        raise UserError("no paths given: give files, globs or folders to read")
    return config, records.in_place_of(config.text_field)


def extract(files, config, text_field, output, skipped):
    """Write the documents of `files` to an open text file. text_field is that of `read_pieces`.

    Returns (number of documents, bytes of text), and counts what was skipped in `skipped`, {reason: count}."""
    n_docs = n_bytes = 0
    with tqdm(unit="B", unit_scale=True, desc="text") as bar:
        pieces = read_pieces(files, text_field, config.strict, skipped, max_doc_mb=config.max_doc_mb)
        for piece, is_last in escaped(pieces):
            output.write(piece)
            size = len(piece.encode())
            n_bytes += size
            bar.update(size)
            if is_last:
                output.write(f"\n{SEPARATOR}\n")
                n_docs += 1
                if n_docs == config.max_docs:
                    break
    return n_docs, n_bytes


def main(argv=None):
    config, text_field = parse_args(argv)
    files = find_files(config.paths, suffixes_of(text_field))
    others = (*(suffix for suffix in SUFFIXES if suffix != ".txt"), ".gz")
    if not config.output or config.output.lower().endswith(others):
        raise UserError(f"output is {config.output!r}, but plain text is written: choose a name that ends in .txt")
    if os.path.realpath(config.output) in map(os.path.realpath, files):
        raise UserError(f"output {config.output} is one of the files to read: choose another --output")
    if os.path.lexists(config.output):
        check_is_file(config.output, f"output {config.output}")
    skipped = Counter()
    try:
        # after a crash, there is no half-written output
        with replacing_file(config.output) as new, open(new, "w", encoding="utf-8", newline="\n") as output:
            n_docs, n_bytes = extract(files, config, text_field, output, skipped)
    except OSError as error:
        raise UserError(f"cannot write {config.output}: {error.strerror or error}") from None
    reasons = ", ".join(f"{n} x {reason}" for reason, n in skipped.items()) or "nothing"
    print(f"{config.output}: {n_docs} documents, {n_bytes} bytes; skipped: {reasons}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
