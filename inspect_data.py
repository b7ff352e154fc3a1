"""Show what is in data files before training: number, fields, lengths, duplicates, overlap with another set.

    python inspect_data.py data/wiki
    python inspect_data.py data/wiki --tokenizer data/wiki.model --max_seq_len 512 --plot runs/lengths.png
    python inspect_data.py gsm8k/train.jsonl --records true --tokenizer byte --max_seq_len 1024
    python inspect_data.py data/train.jsonl --records true --against data/test.jsonl --json runs/train.json

Reads files, globs and folders; data/README.md lists the file formats. With --records true, it reads questions with
answers. Prints tables on stdout, and writes only the files of --plot and --json. Lengths are in characters, with
--tokenizer also in tokens (without BOS and EOS). Memory use is small: 24 bytes per document.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

from src.config import check_distinct, check_png, check_writable, parse_flags, run, write_text
from src.data.corpus import MAX_DOC_MB, find_files, refuse_empty, suffixes_of
from src.data.inspect import documents_at, fields_of, figures_of, measure, overlap
from src.data.inspect_report import draw_lengths, report
from src.data.readers import SkipLog
from src.data.records import RecordsConfig
from src.errors import UserError
from src.files.text import same_file_key


@dataclass
class InspectConfig:
    """What to read and what to show.

    Args:
        paths: files, globs or folders to read; the flag name may be left out
        against: files, globs or folders of another set; counts how many documents (with records: questions) are in
            both
        tokenizer: measure lengths in tokens too: byte, or the path of a .model, tokenizer.json or .bin file or of a
            checkpoint folder
        max_seq_len: count what training would cut off or drop at this context length, in tokens
        examples: number of examples to print, from the start of the first file
        plot: .png file to draw, with histograms of the lengths
        json: file for all figures, as JSON
        text_field: name of the JSON field or parquet column that holds the text
        max_doc_mb: skip .jsonl and .parquet documents longer than this many million characters
    """

    paths: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    max_seq_len: int | None = None
    examples: int = 2
    plot: str | None = None
    json: str | None = None
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB

    def __post_init__(self):
        if self.max_seq_len is not None and self.tokenizer is None:
            raise ValueError("max_seq_len counts tokens: add --tokenizer, or leave it out")
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise ValueError(f"max_seq_len is {self.max_seq_len}: set it to 1 or more")
        if not 0 <= self.examples <= 1000:
            raise ValueError(f"examples is {self.examples}: set it from 0 to 1000")
        check_png("plot", self.plot)
        if not 1 <= self.max_doc_mb * 1e6 <= 1e12:
            raise ValueError(f"max_doc_mb is {self.max_doc_mb}: set it over 0 and to at most a million")


def parse_args(argv=None):
    """Returns (InspectConfig, text_field of `read_pieces`)."""
    config, records = parse_flags(__doc__, InspectConfig, RecordsConfig, argv=argv, positional="paths")
    if not config.paths:
        raise UserError("no paths given: give files, globs or folders to read")
    return config, records.in_place_of(config.text_field)


def files_of(config, text_field):
    """Returns the files of the set and of the other set.  Raises UserError if a file is in both."""
    files = find_files(config.paths, suffixes_of(text_field))
    others = find_files(config.against, suffixes_of(text_field)) if config.against else []
    keys = {same_file_key(path) for path in files}
    for path in others:
        if same_file_key(path) in keys:
            raise UserError(f"{path} is in --paths and in --against: leave it out of one of them")
    check_distinct([config.plot, config.json], [*files, *others])
    for path in (config.plot, config.json):
        if path is not None:
            check_writable(path)
    return files, others


def inspect(config, text_field):
    """Returns the figures of a set, and its Measures."""
    files, others = files_of(config, text_field)
    tokenizer = None
    if config.tokenizer is not None:
        from src.tokenizer import read_tokenizer  # takes a moment to import

        tokenizer = read_tokenizer(config.tokenizer)
    log = SkipLog(False, Counter(), True, int(config.max_doc_mb * 1e6))
    found = measure(files, text_field, log, tokenizer, config.examples)
    if not len(found):
        refuse_empty(files, text_field, log)
    n_start = len(tokenizer.start([0])) - 1 if tokenizer else 0
    figures = figures_of(found, not isinstance(text_field, str), n_start, config.max_seq_len)
    figures |= {"fields": fields_of(files, log.max_chars), "skipped": dict(log.skipped), "examples": found.examples}
    if others:
        log = SkipLog(False, Counter(), True, log.max_chars)
        other = measure(others, text_field, log)
        if not len(other):
            refuse_empty(others, text_field, log)
        figures["overlap"] = overlap(found, other) | {"skipped": dict(log.skipped)}
    quote(figures, files, text_field, log.max_chars)
    return figures, found


def quote(figures, files, text_field, max_chars):
    """Replace the positions of example documents in the figures by {place, text}, which needs to read them again."""
    slots = [(figures["duplicates"], name) for name in ("first", "second")]
    slots += [(figures["overlap"], "example")] if "overlap" in figures else []
    wanted = {values[name] for values, name in slots} - {None}
    quoted = documents_at(wanted, files, text_field, max_chars)
    for values, name in slots:
        if values[name] is not None:
            document = quoted[values[name]]
            values[name] = {"place": document.place, "text": document.text}


def main(argv=None):
    config, text_field = parse_args(argv)
    figures, found = inspect(config, text_field)
    for line in report(figures):
        print(line)
    if config.plot is not None:
        draw_lengths(found.lengths, figures, config.plot)
    if config.json is not None:
        write_text(config.json, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
