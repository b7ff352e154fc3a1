"""Replaces folders (checkpoints, exports) and files completely or not at all.

Files in a folder that its writer did not write are kept.
The new folder is first written as `.NAME.writing` next to the old one. Then the old one is renamed to `.NAME.old`, and
the new one takes its name. After a crash between the two renames, only `.NAME.old` exists; `recover` restores it.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from src.errors import UserError


@contextlib.contextmanager
def replacing(folder, owns: Callable[[str], bool]):
    """Yields an empty folder to fill, which then replaces `folder`. After an error, `folder` is unchanged.

    owns(name) says whether an entry of the old folder is the writer's. Other entries are kept, even if the new folder
    has one of the same name. Raises UserError if `folder` is a file, and OSError if it cannot be written."""
    # replaces the target of a link, not the link itself; Path.resolve would raise RuntimeError for a loop of links
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write a folder to {folder}: it is a file; choose another name, or remove it")
    beside, aside = recover(folder)
    try:
        beside.mkdir(parents=True)
        yield beside
        _sync(beside)
        for entry in sorted(folder.iterdir()) if folder.exists() else ():
            if not owns(entry.name):
                _link(entry, beside / entry.name)
        if folder.exists():
            folder.rename(aside)
        beside.rename(folder)
    finally:
        recover(folder)


@contextlib.contextmanager
def replacing_file(path):
    """Yields the path of a new file to write, which then replaces `path`. After an error, `path` is unchanged.

    Replaces the target of a link, not the link. Raises OSError if the file cannot be written."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def holds_model(path) -> bool:
    """Whether a text is the path of a folder that looks like a checkpoint or a run."""
    return any(os.path.exists(f"{path}/{name}") for name in ("model.safetensors", "best", "last"))


def replace_file(path, text: str):
    """Writes a file as UTF-8: after a crash, it is the old one or the new one.  Raises OSError if it cannot."""
    with replacing_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def recover(folder: Path) -> tuple[Path, Path]:
    """Restores the old folder if `replacing` crashed, and removes leftovers. Returns (.NAME.writing, .NAME.old)."""
    beside, aside = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "old"))
    if aside.exists() and not os.path.lexists(folder):
        aside.rename(folder)
    for left in (beside, aside):
        shutil.rmtree(left, ignore_errors=True)
    return beside, aside


def remove(folder: Path, owns: Callable[[str], bool]):
    """Deletes the writer's entries of a folder, and the folder itself if it is empty after that."""
    for entry in folder.iterdir():
        if owns(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    with contextlib.suppress(OSError):  # the folder is not empty: it has files of the user
        folder.rmdir()


def _sync(folder: Path):
    """Forces a folder's files to disk, so that a rename never makes incomplete files visible."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        elif os.name != "nt":  # Windows cannot open folders
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def _link(source, target):
    """Puts a file, link or folder at a second path as well, and replaces what is there.

    Uses hard links if the disk supports them, else copies."""
    if os.path.isfile(target):
        os.unlink(target)
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no hard links on this disk or system
        shutil.copy2(source, target, follow_symlinks=False)
