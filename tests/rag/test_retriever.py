"""Reading files, chunks, near copies, retrieval, and the index on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.data.corpus import SOURCES
from src.data.samples import QUERY_MARKER, prepare_code_input
from src.errors import UserError
from src.rag import index as index_module
from src.rag.chunks import Source, chunks_of, cut_file, read_sources
from src.rag.index import open_retriever
from src.rag.near_copies import LineIndex
from src.rag.retriever import Bm25Search, fit_context
from src.tokenizer import read_tokenizer

READ = "def read_settings(path):\n    with open(path) as file:\n        return json.load(file)\n\n\n"
DRAW = "def draw_picture(canvas, colour):\n    canvas.fill(colour)\n    canvas.show()\n    return canvas\n\n\n"
LONG = "class Big:\n" + "".join(f"    def method_{n}(self):\n" + "        self.x += 1\n" * 9 for n in range(6))


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "read.py").write_text("import json\n\n\n" + READ * 3)
    (folder / "draw.py").write_text("import canvas\n\n\n" + DRAW * 3)
    (folder / "notes.md").write_text("Settings are read from a path.\n")
    return folder


def opened(repo, **options):
    return open_retriever([repo], **({"cache_dir": repo.parent / "cache", "report": False} | options))


# ---- chunks


def test_python_is_cut_at_definitions():
    text = "import os\n" + "A = 1\n" * 8 + "\n\n@cache\ndef f():\n" + "    pass\n" * 9 + "\n\nB = 2\nC = 3\n"
    assert cut_file("a.py", text) == [(1, 9), (12, 22), (25, 26)]


def test_long_classes_are_cut_at_methods_and_long_functions_by_lines():
    assert cut_file("a.py", LONG) == [(n * 10 + 1 + (n > 0), n * 10 + 11) for n in range(6)]
    text = "def f():\n" + "    x = 1\n" * 99
    assert cut_file("a.py", text, 40) == [(1, 40), (41, 80), (81, 100)]


def test_short_definitions_share_a_chunk():
    assert cut_file("a.py", "def f():\n    pass\n\n\ndef g():\n    pass\n") == [(1, 6)]


@pytest.mark.parametrize("text", ["def f(:\n" * 50, "x = 1\n" * 50], ids=["broken", "plain"])
def test_other_text_is_cut_by_lines(text):
    assert cut_file("a.py" if "def" in text else "a.txt", text, 20) == [(1, 20), (21, 40), (41, 50)]


def test_every_line_is_in_exactly_one_chunk():
    for path in ("src/trainer.py", "src/rag/chunks.py", "README.md"):
        text = Path(path).read_text(encoding="utf-8")
        lines = text.split("\n")
        ranges = cut_file(path, text, 30)
        covered = [n for first, last in ranges for n in range(first, last + 1)]
        assert len(covered) == len(set(covered)) and max(last - first for first, last in ranges) < 30
        assert not [n for n in set(range(1, len(lines) + 1)) - set(covered) if lines[n - 1].strip()]
        (chunk, *_) = chunks_of([Source(path, text, path)], [ranges])
        assert chunk.text == "\n".join(lines[chunk.first - 1 : chunk.last]) + "\n"


# ---- files


def test_what_cannot_be_read_is_skipped_in_one_line(repo, capsys):
    (repo / "image.png").write_bytes(b"\x89PNG\0\0")
    (repo / "latin.py").write_bytes("größe = 1".encode("latin-1"))
    (repo / ".git").mkdir()
    (repo / ".git" / "config.py").write_text("hidden = 1\n")
    (repo / "empty.py").write_text("\n")
    assert [source.path for source in read_sources([repo])] == ["draw.py", "notes.md", "read.py"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "image.png, latin.py (1 binary, 1 not UTF-8)" in err
    assert [source.path for source in read_sources([repo], [".md"], report=False)] == ["notes.md"]


def test_links_that_form_a_circle_do_no_harm(repo):
    (repo / "inner").mkdir()
    os.symlink(repo, repo / "inner" / "loop")
    os.symlink(repo / "inner", repo / "again")
    os.symlink("self", repo / "self")
    assert len(read_sources([repo], report=False)) == 3


def test_a_word_stands_for_the_sources_of_this_python(repo, monkeypatch):
    monkeypatch.setitem(SOURCES, "stdlib", lambda: [str(repo / "read.py")])
    assert [source.real_path for source in read_sources(["stdlib"])] == [str(repo / "read.py")]
    monkeypatch.chdir(repo.parent)
    (repo.parent / "stdlib").write_text("a file of that name comes first")
    assert [source.text for source in read_sources(["stdlib"])] == ["a file of that name comes first"]


def test_a_file_with_two_names_is_read_once(repo):
    os.symlink(repo / "read.py", repo / "same.py")
    assert len(read_sources([repo, repo / "read.py"], report=False)) == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no files"),
        (lambda folder: (folder / "a.bin").write_bytes(b"\0" * 9), "1 binary"),
        (lambda folder: (folder / "a.py").write_bytes(b"\xff\xfe\xfa"), "1 not UTF-8"),
        (lambda folder: (folder / "a.py").write_bytes(b"x" * 2_000_001), "1 too large"),
    ],
    ids=["empty", "binary", "undecodable", "large"],
)
def test_nothing_to_retrieve_from_is_one_line(make, said, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=f"there is no text to retrieve from.*{said}.*: give a folder"):
        open_retriever([tmp_path], cache_dir=tmp_path)


def test_a_missing_path_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_retriever([tmp_path / "nowhere"])


# ---- near copies


def lines(start, stop):
    return "".join(f"value_{n} = compute({n})\n" for n in range(start, stop))


def test_near_copies_share_half_of_the_shorter_text():
    found = LineIndex([lines(0, 20), lines(0, 11) + lines(100, 109), lines(0, 9) + lines(200, 211), lines(0, 4), "x"])
    assert found.near_copies(lines(0, 20)) == [0, 1, 3]
    assert found.near_copies("\n\n".join(lines(0, 20).upper().split("\n"))) == []
    assert found.near_copies(lines(0, 20).replace("\n", "  \n\n")) == [0, 1, 3]
    assert found.near_copies(lines(0, 2)) == []  # too little to say
    assert LineIndex([]).near_copies(lines(0, 20)) == []
    short = "from package import name\n"
    assert LineIndex([short, lines(0, 9), short]).near_copies(short) == [0, 2]  # equal, though too short to say


def test_imports_and_licences_do_not_make_a_near_copy():
    head = "".join(f"# licence line number {n}\nimport package_number_{n}\n" for n in range(30))
    assert LineIndex([head + lines(0, 5)]).near_copies(head + lines(5, 10)) == []


# ---- retrieval


@pytest.mark.parametrize("method", ["tfidf", "bm25"])
def test_the_similar_chunk_comes_first(method, repo):
    if method == "bm25":
        pytest.importorskip("bm25s")
    retriever = opened(repo, method=method)
    reading, drawing = retriever.retrieve(["json.load(open(settings_path))", "canvas.show(colour)"], 2)
    assert reading[0].path == "read.py" and drawing[0].path == "draw.py"
    assert 1 >= reading[0].score >= reading[1].score > 0
    hit = drawing[0]
    assert hit.where() == f"draw.py:{hit.chunk.first}-{hit.chunk.last}, score {hit.score:.2f}"
    assert hit.where(2).startswith(f"draw.py:{hit.chunk.first}-{hit.chunk.first + 1}, ")


@pytest.mark.parametrize("method", ["tfidf", "bm25"])
def test_a_file_never_retrieves_itself_or_a_near_copy(method, repo):
    if method == "bm25":
        pytest.importorskip("bm25s")
    text = (repo / "read.py").read_text()
    (repo / "moved.py").write_text(text.replace("import json", "import json5"))
    retriever = opened(repo, method=method)
    query = "    return json.load(file)"
    assert {hit.path for hit in retriever.retrieve([query], 9)[0]} >= {"read.py", "moved.py"}
    own = retriever.near_copies(text)
    assert [retriever.sources[number].path for number in own] == ["moved.py", "read.py"]
    assert not {hit.path for hit in retriever.retrieve([query], 9, [own])[0]} & {"read.py", "moved.py"}


@pytest.mark.parametrize("query", ["", "1 + 1", "zzz_unknown_name"])
def test_bm25_without_a_common_term_finds_nothing(query, repo):
    pytest.importorskip("bm25s")
    assert opened(repo, method="bm25").retrieve([query], 2) == [[]]


def test_bm25_scores_are_shares(repo):
    pytest.importorskip("bm25s")
    search = Bm25Search(["alpha beta gamma", "alpha delta", "epsilon"])
    scores, rows = search(["alpha beta", "epsilon epsilon"], 3, [[], []])
    assert rows[0].tolist() == [0, 1, -1] and rows[1].tolist() == [2, -1, -1]
    assert 0 < scores[0, 1] < scores[0, 0] < 1 and scores[0, 2] == float("-inf")
    assert search(["alpha"], 3, [[(0, 1)]])[1].tolist() == [[1, -1, -1]]
    assert Bm25Search(["1", "2"])(["alpha"], 1, None)[1].tolist() == [[-1]]


def test_equal_scores_of_bm25_go_to_the_lower_row(repo):
    pytest.importorskip("bm25s")
    texts = ["same words", "other text", *["same words"] * 5]
    scores, rows = Bm25Search(texts)(["same"], 3, None)
    assert rows.tolist() == [[0, 2, 3]] and len(set(scores[0])) == 1
    assert Bm25Search(texts)(["same"], 9, [[(0, 1)]])[1].tolist() == [[2, 3, 4, 5, 6, -1, -1, -1, -1]]


def test_missing_bm25s_is_one_line(monkeypatch, repo):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match="needs the package bm25s: pip install"):
        opened(repo, method="bm25")


# ---- the index on disk


class Spy:
    """Counts the texts that are embedded."""

    def __init__(self, monkeypatch):
        self.texts = []
        embed = index_module.make_embedder(*("tfidf", 64)).__class__.embed

        def counted(embedder, texts):
            self.texts += texts
            return embed(embedder, texts)

        monkeypatch.setattr("src.rag.embedder.TextEmbedder.embed", counted)

    def taken(self):
        texts, self.texts = self.texts, []
        return texts


def test_only_changed_files_are_embedded_again(repo, monkeypatch):
    spy = Spy(monkeypatch)
    for n in range(6):
        (repo / f"more_{n}.py").write_text(lines(n * 10, n * 10 + 9))
    first = opened(repo)
    assert len(spy.taken()) == len(first.chunks)
    again = opened(repo)
    assert spy.taken() == [] and again.chunks == first.chunks
    (repo / "draw.py").rename(repo / "a_drawing.py")  # another place in the order, the same content
    opened(repo)
    assert spy.taken() == []
    (repo / "more_0.py").write_text("def entirely_new(argument):\n    return argument\n")
    (repo / "more_1.py").unlink()
    changed = opened(repo)
    assert spy.taken() == ["def entirely_new(argument):\n    return argument\n"]
    assert changed.retrieve(["entirely_new argument"])[0][0].path == "more_0.py"
    fresh = opened(repo, cache_dir=repo.parent / "other")
    assert fresh.chunks == changed.chunks
    for query in ("canvas", "settings path", "value_33"):  # the idf may differ a little, the order of files does not
        assert fresh.retrieve([query])[0][0].path == changed.retrieve([query])[0][0].path


def test_an_unchanged_index_is_not_written_again(repo, monkeypatch):
    (repo / "copy_of_read.py").write_text((repo / "read.py").read_text())  # two files of the same content
    first = opened(repo)
    monkeypatch.setattr(index_module, "_save", None)
    assert opened(repo).chunks == first.chunks


def test_many_changes_fit_the_embedder_again(repo, monkeypatch):
    opened(repo)
    spy = Spy(monkeypatch)
    for n in range(6):
        (repo / f"more_{n}.py").write_text(lines(n * 10, n * 10 + 9))
    changed = opened(repo)
    assert len(spy.taken()) == len(changed.chunks)


def test_a_broken_index_is_one_line(repo):
    opened(repo)
    (folder,) = [path for path in (repo.parent / "cache").iterdir() if path.is_dir()]
    manifest = (folder / "manifest.json").read_text()
    for broken in ('{"stale": 0}', manifest.replace("]]]", "]"), '{"files": [], "stale": 0}'):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(UserError, match=r"delete this folder|broken JSON"):
            opened(repo)
    (folder / "manifest.json").write_text(manifest)
    (folder / "store.json").write_text('{"rows": 9, "identity": {"method": "checkpoint", "dim": 256}}')
    with pytest.raises(UserError, match="another embedder"):
        opened(repo)


def test_settings_have_indexes_of_their_own(repo):
    assert {len(opened(repo, dim=dim).retrieve(["canvas"])[0]) for dim in (16, 32)} == {1}
    assert len([path for path in (repo.parent / "cache").iterdir() if path.is_dir()]) == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="every folder is writable here")
def test_an_unwritable_cache_is_one_line(repo):
    (repo.parent / "cache").mkdir()
    (repo.parent / "cache").chmod(0o500)
    with pytest.raises(UserError, match="cannot write to cache_dir"):
        opened(repo)


# ---- the context of a prompt


def test_context_fits_the_budget_and_has_the_best_chunk_last():
    tokenizer = read_tokenizer("byte")
    texts = ["best = 1\nbetter = 2\n", "second = 2\n", "third = 3\n" * 20, "fourth = 4\n"]
    marker = len(QUERY_MARKER) + 1
    for budget, expected in (
        (marker + 60, "fourth = 4\nsecond = 2\nbest = 1\nbetter = 2\n"),
        (marker + 20, "best = 1\nbetter = 2\n"),
        (marker + 12, "best = 1\n"),
        (marker + 3, ""),
        (3, ""),
    ):
        context, kept = fit_context(tokenizer, texts, budget)
        assert sum(kept) == context.count("\n")
        assert context == expected
        assert not context or len(tokenizer.encode(prepare_code_input(context, ""))) <= budget
    assert fit_context(tokenizer, [], 99) == ("", [])
    assert fit_context(tokenizer, texts, 20, "").kept == [2, 0, 0, 0]


def test_rag_needs_no_torch():
    """Retrieval itself is numpy alone; only the embedders of models import torch."""
    code = "import sys, src.rag.store, src.rag.embedder, src.rag.near_copies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
