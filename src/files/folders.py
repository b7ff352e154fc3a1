"""Folders that are written over (checkpoints, exports): whole or not at all, and only what the writer wrote goes.

A new folder is made beside its place as `.NAME.writing`. Then the old one goes aside as `.NAME.old`, and the new one
takes its place. A crash between these two leaves `.NAME.old` alone, which `recover` puts back.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from src.errors import UserError


@contextlib.contextmanager
def replacing(folder, owns: Callable[[str], bool]):
    """Yields an empty folder to fill, which then takes the place of `folder`; after an error, all is as it was.

    owns(name): whether the writer wrote an entry of the old folder; what it did not write stays there, in the place of
    what the new one has under that name. UserError where `folder` is a file, OSError where it cannot be written."""
    folder = Path(folder).resolve()  # of a link, what it leads to
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is to be written there: choose another name, or remove it")
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


def recover(folder: Path) -> tuple[Path, Path]:
    """Clear away what a crash of `replacing` left beside a folder; returns the paths (.NAME.writing, .NAME.old)."""
    beside, aside = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "old"))
    if aside.exists() and not os.path.lexists(folder):
        aside.rename(folder)
    for left in (beside, aside):
        shutil.rmtree(left, ignore_errors=True)
    return beside, aside


def remove(folder: Path, owns: Callable[[str], bool]):
    """Delete what the writer wrote in a folder, and the folder where nothing else is in it."""
    for entry in folder.iterdir():
        if owns(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    with contextlib.suppress(OSError):  # something of the user's is in it
        folder.rmdir()


def _sync(folder: Path):
    """Force a folder's files to disk before a rename makes them visible."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        elif os.name != "nt":  # Windows opens no folders
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def _link(source, target):
    """The same file, link or folder in a second place, without a copy where the disk can; over what is there."""
    if os.path.isfile(target):
        os.unlink(target)
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a disk or a system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
