"""The files of the page: short, without markup from texts, without requests to other hosts."""

import re
from pathlib import Path

import pytest

STATIC = Path(__file__).resolve().parents[2] / "src" / "page" / "static"
FILES = sorted(path.name for path in STATIC.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_and_asks_no_other_host(name):
    text = (STATIC / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) < 400 and max(map(len, lines)) <= 120
    others = set(re.findall(r"\w+://[\w.]+", text)) - {"http://www.w3.org"}  # the name of SVG's namespace
    assert others == set()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_the_page_has_no_script_or_style_of_its_own():
    """The server's policy allows files of this server only."""
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>([^<]*)</script>", text) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=", text)
    for path in re.findall(r'(?:href|src)="static/([^"]+)"', text):
        assert path in FILES


def test_modules_import_each_other_without_a_circle():
    imports = {
        name: set(re.findall(r'from "\./([\w.]+)"', (STATIC / name).read_text(encoding="utf-8")))
        for name in FILES
        if name.endswith(".js")
    }
    assert all(imported in imports for found in imports.values() for imported in found)
    left = dict(imports)
    while free := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in free}
    assert left == {}, "these modules import each other in a circle"
