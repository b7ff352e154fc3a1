"""Replacing folders: completely or not at all, and files that the writer did not write stay."""

import os
import shutil

import pytest

from src.errors import UserError
from src.files import folders
from src.files.folders import recover, remove, replacing, replacing_file

OURS = {"data", "sub"}.__contains__


def write(folder, text, error=None):
    with replacing(folder, OURS) as beside:
        (beside / "data").write_text(text)
        (beside / "README.md").write_text("ours")
        if error:
            raise error


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_what_is_the_users_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *args, **how: (_ for _ in ()).throw(OSError("none here")))
    folder = tmp_path / "m"
    write(folder, "old")
    (folder / "README.md").write_text("mine")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("history")
    (folder / "sub").mkdir()
    (folder / "sub" / "part").write_text("of the old one")
    (folder / "link").symlink_to("data")
    write(folder, "new")
    assert content(folder) == {".git/objects/ab": "history", "README.md": "mine", "data": "new", "link": "new"}
    assert os.readlink(folder / "link") == "data" and os.listdir(tmp_path) == ["m"]


def test_after_an_error_all_is_as_it_was(tmp_path):
    write(tmp_path / "m", "old")
    for error in (KeyboardInterrupt(), UserError("no"), OSError("full")):
        with pytest.raises(type(error)):
            write(tmp_path / "m", "new", error)
        assert content(tmp_path / "m")["data"] == "old" and os.listdir(tmp_path) == ["m"]
    with pytest.raises(OSError):
        write(tmp_path / "n", "new", OSError("full"))
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("crash_at", [1, 2], ids=["before the old one is aside", "between the two renames"])
def test_a_crash_loses_nothing(tmp_path, monkeypatch, crash_at):
    """Simulates a power cut, after which nothing is cleaned up: recover and the next writer restore the old folder."""
    folder, calls, rename = tmp_path / "m", [], type(tmp_path).rename
    write(folder, "old")
    (folder / "notes").write_text("mine")

    def cut(path, target):
        calls.append(path)
        if len(calls) == crash_at:
            monkeypatch.setattr(folders, "recover", lambda folder: None)
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "new")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 2
    recover(folder)
    assert content(folder) == {"README.md": "ours", "data": "old", "notes": "mine"} and os.listdir(tmp_path) == ["m"]
    write(folder, "new")
    assert content(folder)["data"] == "new" and content(folder)["notes"] == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "disk" / "m", "old")
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    write(tmp_path / "m", "new")
    assert (tmp_path / "m").is_symlink() and content(tmp_path / "disk" / "m")["data"] == "new"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(UserError, match="cannot write a folder to .*m: it is a file"):
        write(tmp_path / "m", "new")
    assert (tmp_path / "m").read_text() == "mine"


def test_a_loop_of_links_is_an_os_error(tmp_path):
    """Callers turn OSError into one line; they do not expect the RuntimeError of Path.resolve."""
    (tmp_path / "m").symlink_to("m")
    for folder in (tmp_path / "m", tmp_path / "m" / "sub"):
        with pytest.raises(OSError):
            write(folder, "new")
    assert os.listdir(tmp_path) == ["m"] and (tmp_path / "m").is_symlink()


def test_remove(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, "old")
        (tmp_path / name / "README.md").unlink()
    (tmp_path / "b" / "notes").write_text("mine")
    remove(tmp_path / "a", OURS)
    remove(tmp_path / "b", OURS)
    assert os.listdir(tmp_path) == ["b"] and content(tmp_path / "b") == {"notes": "mine"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "m", "old")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m", tmp_path / "m" / "data")}
    assert modes == {"m": 0o777 & ~umask, "data": 0o666 & ~umask}
    shutil.rmtree(tmp_path / "m")


def test_a_file_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/a")
    for text in ("old", "new"):
        with replacing_file(tmp_path / "link") as new:
            new.write_text(text)
    with pytest.raises(KeyError), replacing_file(tmp_path / "link") as new:
        new.write_text("half")
        raise KeyError
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "a").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["a"] and sorted(os.listdir(tmp_path)) == ["disk", "link"]
