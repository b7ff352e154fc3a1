"""Tokens on disk: the stream, its cache, and the processes that fill it."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from texts import BYTE, store_of, tokens_of, write

from src.data import readers, token_store
from src.data.token_store import tokenize_corpus
from src.data.tokenizer_training import train_sentencepiece
from src.errors import UserError

# the store


def test_a_user_without_a_home_makes_no_folder_called_tilde(monkeypatch):
    for name in ("HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user id without an entry
    assert token_store.default_cache_dir() == os.path.join(tempfile.gettempdir(), f"generative-trm-{os.getuid()}")


def test_store_is_the_stream_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "ROWS", 3)
    texts = [f"document {i} 日本\n" * (i % 4 + 1) for i in range(20)]
    store = store_of(tmp_path, texts)
    stream = tokens_of(texts)
    assert len(store._chunks) > 5 and len(store) == len(stream)
    assert store[:].dtype == np.int64 and store[:].tolist() == stream
    for a in range(0, len(stream), 17):
        for b in (a, a + 1, a + 40, a + 200):
            assert store[a:b].tolist() == stream[a:b]
    assert store[-5:].tolist() == stream[-5:]
    assert store.n_bytes == sum(len(t.encode()) for t in texts) and store.n_documents == 20
    ends = np.flatnonzero(np.array(stream) == BYTE.eos_id) + 1
    assert store.doc_ends.tolist() == ends.tolist()
    documents = store.documents_of(0, len(stream))
    assert documents.tolist() == [i for i, t in enumerate(texts) for _ in range(len(t.encode()) + 1)]
    again = pickle.loads(pickle.dumps(store))
    assert again[:].tolist() == stream


def test_pieces_of_one_document_have_one_eos(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARS", 5)
    assert store_of(tmp_path, ["a longer\ntext", "b"])[:].tolist() == tokens_of(["a longer\ntext", "b"])


def test_split(tmp_path):
    store = store_of(tmp_path, ["abcd", "efgh", "ij"])
    head, tail = store.split(7, BYTE)
    assert head[:].tolist() == store[:7].tolist() and tail[:].tolist() == store[7:].tolist()
    assert (head.n_bytes, tail.n_bytes) == (6, 4)
    assert (head.doc_ends.tolist(), tail.doc_ends.tolist()) == ([5, 7], [3, 6])
    assert pickle.loads(pickle.dumps(tail))[:].tolist() == tail[:].tolist()


def test_cache_is_keyed_by_content(tmp_path, monkeypatch):
    first = store_of(tmp_path, ["abc", "def"])[:].tolist()
    monkeypatch.setattr(token_store, "held_back", None)  # reading again would fail
    os.rename(tmp_path / "docs.jsonl", tmp_path / "other.jsonl")
    again = tokenize_corpus([tmp_path / "other.jsonl"], BYTE, cache_dir=str(tmp_path / "cache"))
    assert again[:].tolist() == first
    monkeypatch.undo()
    assert store_of(tmp_path, ["abc", "deg"])[:].tolist() != first
    sp = train_sentencepiece(["abc def " * 50], vocab_size=280)
    assert tokenize_corpus([tmp_path / "other.jsonl"], sp, cache_dir=str(tmp_path / "cache"))[:].tolist() != first


class Telling(type(BYTE)):
    """A byte tokenizer that records which processes use it."""

    def __init__(self, folder):
        self.folder = folder

    def encode_batch(self, texts):
        (self.folder / str(os.getpid())).touch()
        return super().encode_batch(texts)


@pytest.mark.parametrize("sizes", [(30,), (30, 0, 30), (2, 30, 1), (1, 30, 0, 9, 9, 9)])
def test_processes_share_the_work_without_changing_the_stream(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(token_store, "ROWS", 2)
    for i, size in enumerate(sizes):
        write(tmp_path / f"{i}.jsonl", [f"file {i} line {j}" for j in range(size)])
    one = tokenize_corpus([tmp_path], BYTE, cache_dir=str(tmp_path / "c1"))
    (tmp_path / "seen").mkdir()
    many = tokenize_corpus([tmp_path], Telling(tmp_path / "seen"), cache_dir=str(tmp_path / "c2"), num_proc=2)
    assert one[:].tolist() == many[:].tolist() and one.doc_ends.tolist() == many.doc_ends.tolist()
    assert len(os.listdir(tmp_path / "seen")) == 2 and str(os.getpid()) not in os.listdir(tmp_path / "seen")
    tokenize_corpus([tmp_path], Telling(None), cache_dir=str(tmp_path / "c2"))  # from the cache, with another num_proc


def test_files_are_shared_by_their_size(tmp_path):
    files = [str(tmp_path / f"{i}.txt") for i in range(6)]
    for file, size in zip(files, (10, 10, 30, 20, 10, 40)):
        Path(file).write_text("x" * size)
    assert token_store._groups(files, 2) == [files[:3], files[3:]]
    assert token_store._groups(files, 3) == [files[:3], files[3:5], files[5:]]
    assert token_store._groups(files, 1) == token_store._groups(files, 6) == [files]


def test_an_error_in_a_process_reaches_the_user(tmp_path):
    write(tmp_path / "a.jsonl", ["fine"])
    path = write(tmp_path / "b.jsonl.gz", ["cut"])
    Path(path).write_bytes(Path(path).read_bytes()[:-5])
    with pytest.raises(UserError, match="b.jsonl.gz cannot be read to its end"):
        tokenize_corpus([tmp_path], BYTE, cache_dir=str(tmp_path / "c"), num_proc=2)


def test_two_processes_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"line {i}" for i in range(300)])
    program = (
        "from src.data.token_store import tokenize_corpus as t; from src.tokenizer import ByteLevelTokenizer as B\n"
        f"print(len(t([{path!r}], B(), cache_dir={str(tmp_path / 'cache')!r})))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == [str(sum(len(f"line {i}") + 1 for i in range(300)))] * 2


def test_a_killed_run_leaves_no_half_cache(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"line {i}" for i in range(300)])
    program = (
        "import os, sys; from src.data import token_store as t; from src.tokenizer import ByteLevelTokenizer as B\n"
        "take, n = t._take, []\n"
        "def dying(*a):\n    n.append(1)\n    return os._exit(9) if len(n) == 2 else take(*a)\n"
        f"t._take = dying\nt.tokenize_corpus([{path!r}], B(), cache_dir={str(tmp_path / 'cache')!r})"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True).returncode == 9
    assert tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache")).n_documents == 300
