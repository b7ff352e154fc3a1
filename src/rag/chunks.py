"""Reads source files and cuts them into chunks: Python by its syntax tree, other text by lines.

A chunk is a function, a class, or a run of other lines of a module. Chunks that are too long are cut; those with fewer
than LEAST_LINES are joined with the next one. Every line that is not blank belongs to exactly one chunk.
"""

import ast
import os
import sys
from collections import Counter
from typing import NamedTuple

from src.data.corpus import files_of_word, is_word, walk
from src.errors import UserError, few
from src.files.text import decode, parse_python, same_file_key

MOST_FILE_BYTES = 2_000_000  # a larger text file is mostly data or generated code
LEAST_LINES = 8  # a shorter chunk is found because of a single common name, and contains too little to help
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


class Source(NamedTuple):
    """A text file. `path` is shown to the user: relative to the folder that was searched, if there is only one."""

    path: str
    text: str
    real_path: str


class Chunk(NamedTuple):
    """Lines first to last (from 1, both included) of a source."""

    file: int
    first: int
    last: int
    text: str


def source_files(paths, suffixes=()) -> list[tuple[str, str]]:
    """Returns sorted (path to show, path to open) of all files in files and folders.

    Words such as stdlib and site-packages stand for the sources of this Python, as in train_paths. Hidden files and
    folders are left out. A folder that is reached through several links is entered once, so links that form a circle do
    no harm. Raises UserError if a path does not exist."""
    found = {}
    for path in paths:
        path = os.path.expanduser(os.fspath(path))
        if is_word(path):
            inside = files_of_word(path)
        elif not os.path.exists(path):
            raise UserError(f"{path}: there is nothing to retrieve from, no such file or folder: correct the path")
        else:
            inside = walk(path, SKIPPED_FOLDERS, []) if os.path.isdir(path) else [path]
        for file in inside:
            is_hidden = os.path.basename(file).startswith(".") and file != path
            if os.path.isfile(file) and not is_hidden and file.endswith(tuple(suffixes) or ""):
                shown = os.path.relpath(file, path) if os.path.isdir(path) and len(paths) == 1 else file
                found.setdefault(same_file_key(file), (shown.replace(os.sep, "/"), file))
    return sorted(found.values())


def read_sources(paths, suffixes=(), report=True) -> list[Source]:
    """Returns the text files in files and folders. One line on stderr says which files are left out, and why.

    Raises UserError if no text file is left."""
    sources, skipped, names = [], Counter(), []
    for shown, path in source_files(paths, suffixes):
        text = _read(path, skipped)
        if text is None:
            names.append(shown)
        elif text.strip():
            sources.append(Source(shown, text, path))
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
    where = few(map(str, paths))
    if not sources:
        wanted = f" in files that end with {' or '.join(suffixes)}" * bool(suffixes)
        why = f"there is no text to retrieve from{wanted} ({reasons or 'no files'})"
        raise UserError(f"{where}: {why}: give a folder of source code")
    if skipped and report:
        print(f"{where}: skipped {few(names)} ({reasons})", file=sys.stderr)
    return sources


def _read(path, skipped: Counter) -> str | None:
    """Returns the text of a file, or counts in `skipped` why it has none."""
    try:
        if os.path.getsize(path) > MOST_FILE_BYTES:
            skipped["too large"] += 1
            return None
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        skipped["unreadable"] += 1
        return None
    if b"\0" in data[:8192] and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        skipped["binary"] += 1
        return None
    try:
        return decode(data, path)
    except UserError:
        skipped["not UTF-8"] += 1
        return None


def cut_file(path: str, text: str, most_lines: int = 40) -> list[tuple[int, int]]:
    """Returns the line ranges (first, last), from 1, of the chunks of a file."""
    lines = text.split("\n")
    tree = parse_python(text) if path.endswith((".py", ".pyi")) else None
    starts, ranges = [1], []
    for start in sorted(_bounds(tree.body, most_lines) if tree else ()):
        if start - starts[-1] >= min(LEAST_LINES, most_lines):
            starts.append(start)
    for start, following in zip(starts, [*starts[1:], len(lines) + 1]):
        for first in range(start, following, most_lines):
            ranges.append((first, min(first + most_lines, following) - 1))
    return [trimmed for each in ranges if (trimmed := _trim(lines, *each))]


def _trim(lines, first, last):
    """Returns the range without blank lines at its ends, or None if nothing is left."""
    while first <= last and not lines[first - 1].strip():
        first += 1
    while last >= first and not lines[last - 1].strip():
        last -= 1
    return (first, last) if first <= last else None


def _bounds(body, most_lines):
    """Returns the first line of each function and class, and of the run of other statements after it.

    The methods of a class that is too long become chunks of their own."""
    starts, after_definition = [], False
    for node in body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        if is_definition or after_definition:
            starts.append(first)
        if isinstance(node, ast.ClassDef) and node.end_lineno - first >= most_lines:
            starts += _bounds(node.body, most_lines)
        after_definition = is_definition
    return starts


def chunks_of(sources: list[Source], ranges: list[list[tuple[int, int]]]) -> list[Chunk]:
    """Returns the chunks of all sources in order; ranges[i] are the line ranges of source i."""
    chunks = []
    for number, (source, each) in enumerate(zip(sources, ranges)):
        lines = source.text.split("\n")
        chunks += [Chunk(number, first, last, "\n".join(lines[first - 1 : last]) + "\n") for first, last in each]
    return chunks
