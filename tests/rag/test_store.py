"""Exact search by cosine: equal to a sort of all scores, whatever the blocks; save, load, and what load refuses."""

import json

import numpy as np
import pytest

from src.errors import UserError
from src.rag import store as module
from src.rag.embedder import unit
from src.rag.store import MemoryVectorStore

IDENTITY = {"method": "tfidf", "dim": 16}


def vectors(n, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32))


def filled(*parts):
    store = MemoryVectorStore(16, IDENTITY)
    for part in parts:
        store.add(part)
    return store


@pytest.mark.parametrize("block", [7, 16, 8192])
def test_search_equals_a_sort_of_all_scores(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    kept, queries = vectors(50), vectors(20, 1)
    store = filled(kept[:20], kept[20:])
    exact = queries @ kept.astype(np.float16).astype(np.float32).T
    excluded = [[(number, number + 5), (40, 45)] for number in range(20)]
    for row, ranges in enumerate(excluded):
        for start, stop in ranges:
            exact[row, start:stop] = -np.inf
    scores, rows = store.search(queries, 4, excluded)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :4]
    assert np.array_equal(rows, expected)
    assert scores == pytest.approx(np.take_along_axis(exact, expected, 1), abs=1e-4)  # rounded


def test_components_that_no_query_has_do_not_change_a_score():
    store, queries = filled(vectors(50)), vectors(20, 1)
    queries[:, 3:] = 0
    padded = np.concatenate([queries, vectors(1, 2)])  # a query with all components
    for alone, together in zip(store.search(queries, 4), store.search(padded, 4)):
        assert together[:-1] == pytest.approx(alone, abs=1e-4)
    assert store.search(np.zeros((1, 16), np.float32), 2)[1].tolist() == [[0, 1]]


def test_too_few_rows_give_minus_one():
    scores, rows = filled(vectors(3)).search(vectors(2, 1), 5, [[], [(0, 3)]])
    assert sorted(rows[0, :3]) == [0, 1, 2] and rows[0, 3:].tolist() == [-1, -1]
    assert rows[1].tolist() == [-1] * 5 and np.isneginf(scores[1]).all()
    assert MemoryVectorStore(16, IDENTITY).search(vectors(1), 2)[1].tolist() == [[-1, -1]]


def test_equal_scores_go_to_the_lower_row():
    same = np.repeat(vectors(1), 6, axis=0)
    assert filled(same).search(same[:1], 3)[1].tolist() == [[0, 1, 2]]


def test_save_and_load(tmp_path):
    kept = vectors(30)
    store = filled(kept[:10], kept[10:])
    store.save(tmp_path / "index")
    loaded = MemoryVectorStore.load(tmp_path / "index", IDENTITY)
    assert len(loaded) == 30 and isinstance(loaded.array, np.memmap) and loaded.array.dtype == np.float16
    (scores, rows), (loaded_scores, loaded_rows) = store.search(kept, 3), loaded.search(kept, 3)
    assert np.array_equal(rows, loaded_rows) and scores == pytest.approx(loaded_scores, abs=1e-3)
    assert (tmp_path / "index" / "vectors.npy").stat().st_size < 30 * 16 * 2 + 200  # two bytes per component
    loaded.add(vectors(2, 3))
    assert len(loaded) == 32
    loaded.save(tmp_path / "index")  # over the file that is mapped
    assert len(MemoryVectorStore.load(tmp_path / "index", IDENTITY)) == 32


def test_take_keeps_the_order():
    kept = vectors(10)
    taken = filled(kept[:4], kept[4:]).take([9, 0, 5])
    assert np.array_equal(taken.array, kept[[9, 0, 5]].astype(np.float16))
    assert len(filled(kept).take([])) == 0


@pytest.mark.parametrize(
    "wrong",
    [np.ones((2, 3), np.float32), np.full((1, 16), np.nan, np.float32), np.ones(16, np.float32)],
    ids=["dimension", "not finite", "no rows"],
)
def test_add_refuses(wrong):
    with pytest.raises(ValueError, match=r"shape|finite"):
        filled().add(wrong)


@pytest.mark.parametrize(
    "other",
    [{"method": "tfidf", "dim": 32}, {"method": "checkpoint", "dim": 16, "model": "a"}],
    ids=["dimension", "embedder"],
)
def test_load_refuses_another_embedder(other, tmp_path):
    filled(vectors(3)).save(tmp_path / "index")
    with pytest.raises(UserError, match=r"index of another embedder \(method tfidf, dim 16, not .*delete"):
        MemoryVectorStore.load(tmp_path / "index", other)


def test_load_refuses_broken_files(tmp_path):
    folder = tmp_path / "index"
    filled(vectors(3)).save(folder)
    whole = (folder / "vectors.npy").read_bytes()
    (folder / "vectors.npy").write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"cannot be read"):
        MemoryVectorStore.load(folder, IDENTITY)
    (folder / "vectors.npy").write_bytes(whole)
    (folder / "store.json").write_text(json.dumps({"rows": 4, "identity": IDENTITY}))
    with pytest.raises(UserError, match="not complete"):
        MemoryVectorStore.load(folder, IDENTITY)
    (folder / "store.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        MemoryVectorStore.load(folder, IDENTITY)
