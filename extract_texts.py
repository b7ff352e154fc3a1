"""Gather the text of many files into one training file.

    python extract_texts.py data/wiki/*.jsonl.gz --output data/train_texts.txt
    python extract_texts.py books/ more.parquet --text_field body --max_docs 10000

Reads .jsonl, .txt (gzipped or not), .parquet and .py: files, globs, and folders with all that lies in them. Writes one
UTF-8 text file with a line <|endoftext|> after each document, which every script here reads back as the same documents
(src/data/corpus.py says how a document that holds such a line is written). Memory stays flat. Counts go to stderr, and
what was skipped and why.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from src.config import parse_flags, run
from src.data.corpus import MAX_DOC_MB, SEPARATOR, escaped, find_files, read_pieces
from src.errors import UserError
from src.files.text import check_is_file


@dataclass
class ExtractConfig:
    """Where text comes from, and where it goes.

    Args:
        paths: files, globs, folders (needs no flag name)
        output: the text file to write
        max_docs: stop after this many documents; none = all
        text_field: name of the text field (jsonl) or column (parquet)
        strict: a bad line is an error, not skipped
        max_doc_mb: documents of .jsonl and .parquet longer than this (million characters) are skipped
    """

    paths: list[str] = field(default_factory=list)
    output: str = "train_texts.txt"
    max_docs: int | None = None
    text_field: str = "text"
    strict: bool = False
    max_doc_mb: float = MAX_DOC_MB

    def __post_init__(self):
        if self.max_docs is not None and self.max_docs < 1:
            raise ValueError(f"max_docs is {self.max_docs}; it must be 1 or more")


def parse_args(argv=None):
    """Flags -> ExtractConfig."""
    (config,) = parse_flags(__doc__, ExtractConfig, argv=argv, positional="paths")
    if not config.paths:
        raise UserError("no paths given: name files, globs or folders to read")
    return config


def extract(files, config, output, skipped):
    """Write the documents of `files` to an open text file; returns (documents, bytes of text)."""
    n_docs = n_bytes = 0
    with tqdm(unit="B", unit_scale=True, desc="text") as bar:
        pieces = read_pieces(files, config.text_field, config.strict, skipped, max_doc_mb=config.max_doc_mb)
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
    """Read everything, write beside the output, rename it into place when it is whole."""
    config = parse_args(argv)
    files = find_files(config.paths)
    if not config.output or config.output.lower().endswith((".jsonl", ".gz", ".parquet", ".py")):
        raise UserError(f"output is {config.output!r}, and plain text is written: name a file that ends in .txt")
    if os.path.realpath(config.output) in map(os.path.realpath, files):
        raise UserError(f"output {config.output} is one of the files to read; choose another with --output")
    if os.path.lexists(config.output):
        check_is_file(config.output, f"output {config.output}")
    part, skipped = f"{config.output}.part", Counter()
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as output:
            n_docs, n_bytes = extract(files, config, output, skipped)
        os.replace(part, config.output)
    except OSError as error:
        raise UserError(f"cannot write {config.output}: {error.strerror or error}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)
    reasons = ", ".join(f"{n} x {reason}" for reason, n in skipped.items()) or "nothing"
    print(f"{config.output}: {n_docs} documents, {n_bytes} bytes; skipped: {reasons}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
