"""The training loader of tokenized sets: ranks, resuming, changes of batch_size and seq_len. See
test_stream.py for streams."""

import pytest
import torch
from texts import BYTE, flat, saved, shards_of, store_of, take

from src.data.loader import create_train_loader
from src.data.shift import ShiftedDataset
from src.data.token_store import tokenize_corpus
from src.dataset import DataConfig, MixedDataset, PackedDataset, WikiJsonlDataset, create_dataloader, prepare_data
from src.losses import IGNORE


@pytest.fixture
def packed(tmp_path):
    """40 windows of 8 tokens; each window is one document."""
    files = shards_of(tmp_path, 2, 20)
    return PackedDataset(tokenize_corpus(files, BYTE, cache_dir=str(tmp_path / "cache")), 8, bos_eos=(257, 258))


def rows(batch):
    return batch["input_ids"].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_batch_of_one_process(packed, num_workers):
    whole = create_train_loader(packed, 6, seed=3)
    ranks = [create_train_loader(packed, 6, 3, rank, 2, num_workers) for rank in range(2)]
    for _ in range(10):
        batch, parts = rows(next(whole)), [rows(next(rank)) for rank in ranks]
        assert parts == [batch[0::2], batch[1::2]]
    assert {loader.samples for loader in (whole, *ranks)} == {60} and whole.epoch == 1


def test_batches_are_those_of_the_dataloader(packed):
    plain = iter(create_dataloader(packed, 4, seed=9, start=12))
    loader = create_train_loader(packed, 4, seed=9)
    take(loader, 3)
    assert [rows(next(plain)) for _ in range(12)] == [rows(next(loader)) for _ in range(12)]


def test_a_state_moves_between_ranks_and_workers_and_batch_sizes(packed):
    expected = flat(rows(batch) for batch, _ in zip(create_train_loader(packed, 4, seed=1), range(30)))
    first = create_train_loader(packed, 4, seed=1)
    for _ in range(5):
        next(first)
    state = saved(first.state_dict())
    assert state == {"samples": 20, "epoch_samples": 40}
    ranks = [create_train_loader(packed, 8, 1, rank, 2, num_workers=rank) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for start in range(20, 100, 8):
        a, b = (rows(next(rank)) for rank in ranks)
        assert [a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]] == expected[start : start + 8]


def test_another_length_goes_on_after_the_same_part_of_the_text(packed):
    loader = create_train_loader(packed, 10)
    take(loader, 2)
    longer = create_train_loader(packed.with_seq_len(16), 5)
    longer.load_state_dict(loader.state_dict())
    assert len(longer.train_set) == 20 and longer.samples == 10  # half an epoch
    assert next(longer)["input_ids"].shape == (5, 16)
    padded = WikiJsonlDataset(packed.store, BYTE, 8)
    loader = create_train_loader(padded.with_seq_len(4), 10)
    loader.load_state_dict({"samples": 20, "epoch_samples": len(padded)})
    assert loader.samples == 20 and next(loader)["input_ids"].shape == (10, 4)


def test_shifted_windows_hold_every_token_once_in_each_epoch(packed):
    tokens, shifted = packed.store[:].tolist(), ShiftedDataset(packed)
    loader, shifts = create_train_loader(shifted, 4, seed=5), []
    for epoch in range(4):
        rows = torch.cat([next(loader)["target_ids"] for _ in range(10)])
        shifts.append(shifted.shift(5, epoch))
        assert sorted(rows[rows != IGNORE].tolist()) == sorted(tokens[1 + shifts[-1] :])
    assert len(set(shifts)) == 4 and all(0 <= shift < 8 for shift in shifts)


def test_a_run_on_shifted_windows_continues_where_it_stopped(packed):
    loader, again = (create_train_loader(ShiftedDataset(packed), 6, seed=3) for _ in range(2))
    expected = [rows(next(loader)) for _ in range(30)]
    again.load_state_dict({"samples": 6 * 17, "epoch_samples": 40})
    assert [rows(next(again)) for _ in range(13)] == expected[17:]
    assert rows(next(iter(create_dataloader(packed, 6, seed=3)))) != expected[0]


def test_shifted_windows_are_made_of_one_text(tmp_path):
    shards_of(tmp_path, 2, 20)
    options = {"train_paths": [str(tmp_path)], "tokenizer": "byte", "shift_windows": True}
    options["cache_dir"] = str(tmp_path.with_name("cache"))
    _, train, valid = prepare_data(DataConfig(**options), None, 8)
    assert isinstance(train, ShiftedDataset) and isinstance(valid, PackedDataset)
    assert train.with_seq_len(16).seq_len == 16 and train.bytes_per_token == train.rows.bytes_per_token
    for more in ({"streaming": True}, {"mixture": [1.0]}, {"fim_rate": 0.5}, {"records": True}, {"packing": False}):
        with pytest.raises(ValueError, match="shift_windows"):
            DataConfig(**options | more)


def test_the_global_random_state_is_left_alone(packed):
    before = torch.get_rng_state()
    take(create_train_loader(packed, 4, num_workers=2), 2)
    assert torch.equal(before, torch.get_rng_state())


# mixtures


def test_a_mixture_is_drawn_by_weight(tmp_path):
    sizes = {"a": 9, "b": 99}
    a, b = (PackedDataset(store_of(tmp_path / x, [x * 7] * n), 8) for x, n in sizes.items())
    mixed = MixedDataset([a, b], [3, 1])
    assert len(mixed) == 108 and str(mixed) == "3 x (9 windows of 8 tokens) + 1 x (99 windows of 8 tokens)"
    n_bytes, n_tokens = [3 * f(9) / 9 + f(99) / 99 for f in (lambda n: 7 * n, lambda n: 8 * n - 1)]
    assert mixed.bytes_per_token == pytest.approx(n_bytes / n_tokens)
    loader = create_train_loader(mixed, 100)
    assert sum(ord("a") in row for _ in range(100) for row in rows(next(loader))) == 7500
    longer = mixed.with_seq_len(16)
    assert longer.seq_len == 16 and len(longer) == 5 + 50 and longer[0].input_ids.shape == (16,)


def test_held_back_documents_of_a_mixture_are_in_no_corpus(tmp_path):
    (a,), (b,) = shards_of(tmp_path, 1, 200, "a"), shards_of(tmp_path, 1, 300, "b")
    settings = {"tokenizer": "byte", "cache_dir": str(tmp_path / "cache")}
    _, train, valid = prepare_data(DataConfig([a, b], mixture=[1, 1], **settings), None, 8)
    texts = [BYTE.decode(d.store[:].tolist()) for d in (*train.datasets, valid)]
    parts = [{text[i : i + 7] for i in range(0, len(text), 7)} for text in texts]
    assert sorted(flat(parts)) == sorted([f"a{n:06d}" for n in range(200)] + [f"b{n:06d}" for n in range(300)])
    assert {d[0] for d in parts[0]} == {"a"} and {d[0] for d in parts[2]} == {"a", "b"} and 5 < len(parts[2]) < 60
