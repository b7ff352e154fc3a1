"""Words that stand for installed packages, and the licences of packages."""

import email.message
import os

import pytest
from texts import install

from src.data.corpus import find_files
from src.data.licences import licence_of, names_another_licence
from src.dataset import DataConfig, prepare_data
from src.errors import UserError


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of installed packages: one, two (under the MPL), three, and a module that no package installed."""
    install(tmp_path, one="License-Expression: MIT", two="License: MPL-2.0", three="License: BSD")
    (tmp_path / "own.py").write_text("x = 1\n" * 40)
    monkeypatch.setattr("src.data.corpus.package_roots", lambda: [tmp_path])
    return tmp_path


def test_words_for_packages(packages, monkeypatch, capsys):
    names = lambda *args: [os.path.relpath(p, packages) for p in find_files(*args)]  # noqa: E731
    assert names("site-packages") == ["one/a.py", "own.py", "three/a.py", "two/a.py"]
    assert names(["site-packages/two"]) == ["two/a.py"] and capsys.readouterr().err == ""
    assert names("permissive-packages") == ["one/a.py", "three/a.py"]
    assert "not known to be permissive: own.py (no package), two (MPL-2.0)\n" in capsys.readouterr().err
    held_out = find_files("site-packages/one")
    assert names("permissive-packages", (".py",), lambda: held_out) == ["three/a.py"]
    assert names(held_out, (".py",), lambda: held_out) == ["one/a.py"]  # a file that is named is there
    assert names("site-packages/own") == ["own.py"]  # a module without a folder
    assert names("site-packages/one/") == ["one/a.py"]
    with pytest.raises(UserError, match="site-packages/one/a is no package: name a whole one, such as site-pack.*/one"):
        find_files("site-packages/one/a")
    with pytest.raises(
        UserError, match="site-packages/four: no such package is installed: give the name that `import`"
    ):
        find_files("site-packages/four")
    with pytest.raises(UserError, match="permissive-packages: valid_paths has all of its files"):
        find_files("permissive-packages", (".py",), lambda: find_files("site-packages"))
    config = DataConfig(["permissive-packages"], ["site-packages/one"], tokenizer="byte", cache_dir=str(packages / "c"))
    _, train, valid = prepare_data(config, None, 16)
    assert b"three" in bytes(train.store[:].tolist()[:-1]) and b"one" not in bytes(train.store[:].tolist()[:-1])
    assert bytes(valid.store[:].tolist()[:-1]).endswith(b"one")


def test_a_file_may_have_another_licence_than_its_package(packages, capsys):
    header = "# Adapted from a program under the GNU Lesser General Public License\n"
    (packages / "one" / "a.py").write_text(header + "x = 1\n" * 40)
    assert find_files("permissive-packages") == [str(packages / "three" / "a.py")]
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("left out, they name a licence that is not permissive: ") and said[-1].endswith("a.py")


@pytest.mark.parametrize(
    "text, found",
    [
        ("Licensed under the GPL-3.0", True),
        ("# SPDX-License-Identifier: LGPL-2.1-or-later", True),
        ("GPLv2", True),
        ("Mozilla Public License", True),
        ("under CC-BY-SA 4.0", True),
        ("Attribution-ShareAlike", True),
        ("Licensed under the Apache License, Version 2.0", False),
        ("MIT, BSD, CC-BY 4.0, gpl_path, MPLS, sample", False),
    ],
)
def test_licences_that_a_file_names(text, found):
    assert names_another_licence(text.encode()) is found


def test_sources_that_cannot_be_read_are_left_out(packages):
    (packages / "three" / "b.py").write_bytes(b"x = 1\n" * 40 + b"\0")
    (packages / "three" / "c.py").mkdir()
    assert find_files("site-packages/three") == [str(packages / "three" / "a.py")]


def test_the_default_text_leaves_out_validation_files(capsys):
    from src.data.corpus import stdlib_files
    from src.dataset import find_text

    held = stdlib_files()[0][:3]
    (train,), valid = find_text(DataConfig(valid_paths=held))
    assert sorted(valid) == sorted(held) and not set(train) & set(held)
    assert len(train) == len(stdlib_files()[0]) - 3 and "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, licence, is_permissive",
    [
        ({"License-Expression": "MIT"}, "MIT", True),
        ({"License-Expression": "mit AND (Apache-2.0 WITH LLVM-exception)"}, None, True),
        ({"License-Expression": "MIT OR GPL-3.0-only", "License": "MIT"}, None, False),
        ({"Classifier": "License :: OSI Approved :: BSD License", "License": "any text"}, "BSD License", True),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, None, False),
        ({"Classifier": "License :: OSI Approved", "License": "MIT"}, "OSI Approved", False),
        ({"Classifier": "Typing :: Typed", "License": "3-Clause BSD License"}, "3-Clause BSD License", True),
        ({"License": "Apache 2.0 and LGPL"}, None, False),
        ({"License": "MIT or GPLv3"}, None, False),
        ({"License": "MIT with Commons Clause"}, None, False),
        ({"Classifier": "License :: OSI Approved :: MIT License", "License": "GPL"}, "MIT License, GPL", False),
        ({"License": "Permission is hereby granted, as by MIT, " * 9}, "unknown", False),
        ({"License": "See LICENSE"}, "See LICENSE", False),
        ({}, "unknown", False),
    ],
)
def test_licence_of_a_package(fields, licence, is_permissive):
    metadata = email.message.Message()
    for name, value in fields.items():
        metadata[name] = value
    found = licence_of(metadata)
    assert found[1] is is_permissive and licence in (None, found[0])
