"""Reads documents from files, globs and folders, as streams. `src/data/readers.py` has a reader for each format.

Documents are passed on in pieces of at most PIECE_CHARS characters, so memory stays flat even if a file is a single
document of many GB. The last piece of each document is marked: the end-of-sequence token (EOS) follows it.
"""

import glob
import hashlib
import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from src.data.licences import names_another_licence, packages_of_files
from src.data.readers import READERS, SUFFIXES, SkipLog, suffix_of
from src.errors import UserError, few
from src.files.text import check_is_file, is_text, same_file_key

MAX_DOC_MB = 32  # million characters; limit for documents of .jsonl and .parquet files, which are in memory as a whole
_END_BYTES = 1024**2  # fingerprint_files reads this many bytes at the start and at the end of a file
_STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_PACKAGE_SKIPS = {"test", "tests", "testing", "_vendor", "_vendored", "vendor", "vendored", "__pycache__"}
_LEAST_BYTES = 200  # smaller source files are mostly empty


class NoDocument(UserError):
    """The error for files that contain no usable document."""


def find_files(paths, suffixes=SUFFIXES, held_out=tuple):
    """Returns the sorted data files in `paths` (files, globs, folders). A file that has several names is listed once.

    The words of SOURCES stand for the sources of this Python, unless there is a file of that name. held_out: called if
    there is a word; returns files that a word does not stand for, though they are among its sources. Prints on stderr
    which other files of a folder or glob are skipped. Raises UserError if a path does not exist, cannot be searched, or
    yields no file with one of the suffixes."""
    found = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.path.expanduser(os.fspath(path))
        if is_word(path):
            named = [f for f in files_of_word(path) if _has(f, suffixes)]
            files = without(named, held_out())
            if named and not files:
                raise UserError(f"{path}: valid_paths has all of its files, so that none is left: name fewer there")
        elif os.path.isdir(path):
            files = _files_in(path, suffixes)
        elif glob.has_magic(path) and not os.path.lexists(path):
            files = _files_of_glob(path, suffixes)
        elif not os.path.lexists(path):
            if path.startswith("site-packages/"):
                package = "/".join(path.split("/")[:2])
                raise UserError(f"{path} is no package: name a whole one, such as {package}, or give a path")
            raise UserError(f"{path} does not exist" + f" in {os.getcwd()}" * (not os.path.isabs(path)))
        else:
            check_is_file(path, path)
            files = [path] if _has(path, suffixes) else []
        if not files:
            raise UserError(f"{path}: no data file found; supported types are {', '.join(suffixes)}")
        for file in sorted(files):
            found.setdefault(same_file_key(file), file)
    return sorted(found.values())


def without(files, held_out):
    """Returns the files that are not among `held_out`, under any of their names."""
    others = set(map(same_file_key, held_out))
    return [file for file in files if same_file_key(file) not in others]


def is_word(path: str) -> bool:
    """Whether a path is a word of SOURCES or one package, such as site-packages/numpy, and not the name of a file."""
    path = path.rstrip("/")  # a shell may add one
    is_package = path.startswith("site-packages/") and path.count("/") == 1
    return (path in SOURCES or is_package) and not os.path.lexists(path)


def files_of_word(word: str) -> list[str]:
    """Returns the files that a word stands for, see `is_word`.  Raises UserError if there are none."""
    word = word.rstrip("/")
    if word in SOURCES:
        return SOURCES[word]()
    paths = [os.path.join(root, word.removeprefix("site-packages/")) for root in package_roots()]
    folders = [path for path in paths if os.path.isdir(path)]
    modules = [f"{path}.py" for path in paths if os.path.isfile(f"{path}.py")]
    if not folders and not modules:
        raise UserError(f"{word}: no such package is installed: give the name that `import` takes")
    return modules + (package_files(folders) if folders else [])


def suffixes_of(text_field):
    """Returns the suffixes of the files that `read_pieces` reads with this text_field."""
    return SUFFIXES if isinstance(text_field, str) else text_field.suffixes


def _has(path, suffixes):
    return os.fspath(path).lower().endswith(tuple(suffixes))


def _files_in(root, suffixes):
    """Returns the data files of a folder. Reports everything else in it in one line on stderr."""
    files, skipped = [], []
    for path in walk(root, {"__pycache__"}, skipped):
        is_hidden = os.path.basename(path).startswith(".")  # macOS creates ._a.txt next to a.txt
        if _has(path, suffixes) and not is_hidden and os.path.isfile(path):
            files.append(path)
        else:
            skipped.append(path)
    _say_skipped(root, [os.path.relpath(path, root) for path in skipped])
    return files


def _files_of_glob(pattern, suffixes):
    """Returns the data files that a glob hits, and those of the folders that it hits. Reports other files on stderr."""
    files, skipped, folder = [], [], None
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: path.split(os.sep)):
        if folder and path.startswith(folder):  # ** hits a folder, and then what is in it
            continue
        if os.path.isdir(path):
            folder = os.path.join(path, "")
            files += _files_in(path, suffixes)
        else:
            (files if _has(path, suffixes) and os.path.isfile(path) else skipped).append(path)
    _say_skipped(pattern, skipped)
    return files


def _say_skipped(where, names):
    """Prints on stderr which files of a folder or glob are skipped, in one line."""
    if names:
        print(f"{where}: skipped {few(names)} (hidden, a broken link, unreadable, or of another type)", file=sys.stderr)


def walk(root, ignored, skipped):
    """Yields the paths of all files under `root`. Follows links to folders, but enters each folder only once.

    Does not enter hidden folders and those named in `ignored`. Adds hidden and unreadable folders to `skipped`."""

    def unreadable(error):
        if error.filename == root:
            raise UserError(f"{error.filename} cannot be searched: {error.strerror}")
        skipped.append(error.filename)

    seen = {same_file_key(root)}
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        hidden = [d for d in subfolders if d in ignored or d.startswith(".")]
        skipped.extend(os.path.join(folder, name) for name in hidden if name.startswith("."))
        # in reverse order, because a dict keeps the last value of a key: here, the first of a folder's names
        new = {same_file_key(os.path.join(folder, d)): d for d in sorted(set(subfolders) - set(hidden), reverse=True)}
        subfolders[:] = sorted(d for key, d in new.items() if key not in seen)
        seen.update(new)
        yield from (os.path.join(folder, name) for name in sorted(names))


def stdlib_files(min_bytes=_LEAST_BYTES, valid_share=20):
    """Returns (train_paths, valid_paths): .py files of the running interpreter's standard library.

    About one file in `valid_share` is for validation, chosen by a hash of its relative path. Tests, installed packages
    and files that are tiny, not UTF-8 or specific to this machine are left out."""
    root = sysconfig.get_paths()["stdlib"]
    parts = ([], [])
    for path in _sources(root, _STDLIB_SKIPS, min_bytes):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        parts[content_hash(name.encode()) % valid_share == 0].append(path)
    if not parts[0] or not parts[1]:
        raise UserError(f"{root} does not contain the sources of the standard library: set --train_paths")
    return parts


def package_roots():
    """Returns the folders of the packages that are installed for the running interpreter."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys((paths["purelib"], paths["platlib"])))


def package_files(roots=None, permissive=False):
    """Returns the .py files of the packages that are installed for the running interpreter.

    Tests, copies of other packages, and files that are tiny or not UTF-8 are left out. roots: folders to search; by
    default, the site-packages of this interpreter. permissive: leave out packages whose licence is not known to be
    permissive, see `licence_of`, and name them on stderr."""
    roots = package_roots() if roots is None else roots
    files = [path for root in roots if os.path.isdir(root) for path in _sources(root, _PACKAGE_SKIPS, _LEAST_BYTES)]
    if permissive:
        files = _permissive(files, roots)
    if not files:
        raise UserError(f"{', '.join(map(str, roots))} contains no sources of packages: give folders instead")
    return files


def _permissive(files, roots):
    """Returns the files that belong to a package with a permissive licence and name no other licence.

    Says on stderr what is left out."""
    owners, left, others = packages_of_files(roots), {}, []
    for path in files:
        package = owners.get(os.path.realpath(path))
        if not (package and package.is_permissive):
            left[path] = f"{package.name} ({package.licence})" if package else f"{os.path.basename(path)} (no package)"
        elif names_another_licence(Path(path).read_bytes()):
            others.append(path)
    if left:
        print(f"left out, licence not known to be permissive: {few(dict.fromkeys(left.values()))}", file=sys.stderr)
    if others:
        print(f"left out, they name a licence that is not permissive: {few(others)}", file=sys.stderr)
    left |= dict.fromkeys(others)
    return [path for path in files if path not in left]


def _sources(root, ignored, min_bytes):
    """Yields the sorted .py files of a folder that can be read, have at least min_bytes and are UTF-8 text."""
    for path in sorted(f for f in walk(root, ignored, []) if f.endswith(".py")):
        if os.path.basename(path).startswith("_sysconfigdata") or not os.path.isfile(path):
            continue
        try:
            source = Path(path).read_bytes()
        except OSError:  # not readable for this user
            continue
        if len(source) >= min_bytes and b"\0" not in source and is_text(source.decode(errors="surrogateescape")):
            yield path


SOURCES = {  # words that stand for files
    "stdlib": lambda: stdlib_files()[0],
    "stdlib-valid": lambda: stdlib_files()[1],
    "site-packages": package_files,
    "permissive-packages": lambda: package_files(permissive=True),
}


def fingerprint_files(files):
    """Returns [(base name, size in bytes, digest)] of files; the digest covers the size and the first and last MiB.

    Bytes of a name that are not UTF-8 become escapes such as \\xe9. Raises UserError if a file is unreadable."""
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
        name = os.fsencode(os.path.basename(path)).decode(errors="backslashreplace")
        found.append((name, size, f"{content_hash(size.to_bytes(8, 'big') + ends):016x}"))
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
    """Yields documents as (piece, is_last) pairs. Long documents are cut, after a line break if possible.

    text_field is the name of the field with the text. With a `RecordFields` of src/data/records.py in its place, each
    record is a document of two pieces, the prompt and the answer.

    Bad lines are skipped, and so are .jsonl and .parquet documents of over max_doc_mb million characters. They are
    counted by reason in `skipped` (a Counter), and the first few are named on stderr unless report=False. Raises
    UserError if a file cannot be read to its end, and, with strict=True, at the first bad line. Raises NoDocument if no
    document is found."""
    if not 1 <= max_doc_mb * 1e6 <= 1e12:
        raise UserError(f"max_doc_mb is {max_doc_mb}: set it over 0 and to at most a million")
    is_field = isinstance(text_field, str)
    files = find_files(paths, suffixes_of(text_field))
    log = SkipLog(strict, Counter() if skipped is None else skipped, report, int(max_doc_mb * 1e6))
    is_empty = True
    for path in files:
        for piece in READERS[suffix_of(path)](path, text_field, log) if is_field else text_field.pieces(path, log):
            is_empty = False
            yield piece
    if is_empty:
        refuse_empty(files, text_field, log)
    if log.skipped and skipped is None and report:  # a caller that passes `skipped` prints the summary itself
        print(f"skipped: {log.summary()}", file=sys.stderr)


def refuse_empty(files, text_field, log):
    """Raises NoDocument with the reason why no document was found. The arguments are those of the readers."""
    if log.fields:
        wanted, flags = f"the field {text_field!r}", "--text_field"
        if not isinstance(text_field, str):
            wanted, flags = text_field, "--question_field and --answer_field"
        elif {"question", "answer"} <= {name.lower() for name in log.fields}:
            flags = "--records true"
        fields = f"available fields: {', '.join(log.fields)} (set {flags})"
        raise NoDocument(f"no record of {few(files)} has {wanted}; {fields}")
    raise NoDocument(f"no document in {few(files)}: {f'nothing usable ({log.summary()})' if log.skipped else 'empty'}")
