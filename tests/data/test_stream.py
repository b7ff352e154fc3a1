"""Streaming: ranks and workers read each document once per epoch, windows are those of the tokenized set, and resuming
is exact."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from texts import BYTE, flat, saved, shards_of, take, write

from src.data import order, readers, stream
from src.data.corpus import NoDocument
from src.data.loader import create_train_loader
from src.data.shards import Shards
from src.data.stream import StreamingDataset, share_of
from src.dataset import DataConfig, PackedDataset, prepare_data, tokenize_corpus
from src.errors import UserError


def stream_of(*corpora, seq_len=8, **options):
    return StreamingDataset(Shards(list(corpora)), BYTE, seq_len, **options)


def loaders(data, batch_size, world=1, num_workers=0, seed=0):
    return [create_train_loader(data, batch_size, seed, rank, world, num_workers) for rank in range(world)]


# who reads what


@pytest.mark.parametrize("n_shards, readers", [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (7, 3), (100, 256)])
def test_shares_are_equal_and_without_overlap_or_loss(n_shards, readers):
    shares = [list(share_of(n_shards, reader, readers)) for reader in range(readers)]
    pieces = [[(at, part) for at, low, high in share for part in range(low, high)] for share in shares]
    assert sorted(flat(pieces)) == [(at, part) for at in range(n_shards) for part in range(readers)]
    assert {len(share) for share in pieces} == {n_shards}
    assert max(map(len, shares)) <= n_shards // readers + 2


@pytest.mark.parametrize("n_shards, n_documents", [(8, 3), (5, 8), (3, 8), (1, 24)])
def test_two_ranks_and_two_workers_read_every_document_once_an_epoch(tmp_path, n_shards, n_documents):
    files = shards_of(tmp_path, n_shards, n_documents)
    data, total = stream_of(files, shuffle_buffer=4), n_shards * n_documents
    ranks = loaders(data, 4, world=2, num_workers=2)
    first, second = (flat(flat(take(rank, total // 4)) for rank in ranks) for _ in range(2))
    everything = [f"d{n:06d}" for n in range(total)]
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(first), tuple(second), tuple(everything)}) == 3  # shuffled, and in another order each epoch
    assert [rank.samples for rank in ranks] == [2 * total] * 2
    assert {len(row) for row in take(ranks[0], 1)} == {2}


def test_an_epoch_has_its_own_order_of_shards_and_its_own_seed(tmp_path):
    data = stream_of(shards_of(tmp_path, 12, 1), shuffle_buffer=1)
    (loader,), (other,) = loaders(data, 12), loaders(data, 12, seed=1)
    epochs = take(loader, 3)
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, *take(other, 3)]))) == 6
    assert loader.epoch == 2


def test_the_buffer_shuffles_within_an_epoch(tmp_path):
    (file,) = shards_of(tmp_path, 1, 40)
    (plain,), (mixed,) = (loaders(stream_of([file], shuffle_buffer=size), 40) for size in (1, 10))
    (in_order,), (shuffled,) = take(plain, 1), take(mixed, 1)
    assert in_order == [f"d{n:06d}" for n in range(40)]
    for start in range(0, 40, 10):
        assert sorted(shuffled[start : start + 10]) == in_order[start : start + 10] != shuffled[start : start + 10]


# windows


@pytest.mark.parametrize("segment", [False, True])
def test_windows_are_those_of_the_tokenized_set(tmp_path, monkeypatch, segment):
    monkeypatch.setattr(readers, "PIECE_CHARS", 20)
    texts = ["".join(chr(97 + (7 * n + i) % 26) for i in range(n)) for n in (3, 50, 1, 1, 2, 17, 31, 9)]
    file = write(tmp_path / "a.jsonl", texts)
    store = tokenize_corpus([file], BYTE, cache_dir=str(tmp_path / "cache"))
    packed = PackedDataset(store, 6, segment, (BYTE.bos_id, BYTE.eos_id))
    batch = next(create_train_loader(stream_of([file], seq_len=6, segment=segment, shuffle_buffer=1), len(packed)))
    assert len(packed) * 6 > packed.n_targets  # the last window continues with the next epoch here
    for i in range(len(packed) - 1):
        assert torch.equal(batch["input_ids"][i], packed[i].input_ids)
        assert torch.equal(batch["target_ids"][i], packed[i].target_ids)
        assert not segment or torch.equal(batch["attention_mask"][i], packed[i].attention_mask)
    left = packed.n_targets - 6 * (len(packed) - 1)
    again = [BYTE.eos_id, *store[: 6 - left].tolist()]
    assert batch["target_ids"][-1].tolist() == [*store[-left:].tolist(), *again[1:]]


def test_a_long_document_is_shared_in_pieces_that_each_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARS", 7)
    file = write(tmp_path / "a.jsonl", ["".join(f"p{n:06d}" for n in range(16))])
    ranks = loaders(stream_of([file], shuffle_buffer=3), 2, world=2)
    assert sorted(flat(flat(take(rank, 8)) for rank in ranks)) == [f"p{n:06d}" for n in range(16)]


def test_bytes_per_token_is_that_of_the_text_as_it_is_drawn(tmp_path):
    a, b = write(tmp_path / "a.jsonl", ["abc"]), write(tmp_path / "b.jsonl", ["abcdefghi"])
    data = stream_of([a], [b], weights=[3, 1])
    assert data.bytes_per_token == pytest.approx((3 * 3 / 4 + 9 / 10) / 4)
    assert data.with_seq_len(4).bytes_per_token == data.bytes_per_token


def test_bytes_per_token_of_a_mixture_with_records_is_that_of_the_tokenized_one(tmp_path):
    """A record has fewer targets than a window of text, so it counts for less at the same weight."""
    text = write(tmp_path / "text.jsonl", ["def f(x): return x + 1"] * 20)
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"question": f"{n} + 1", "answer": f"é{n + 1}"}) + "\n" for n in range(20)))
    found = []
    for streaming in (True, False):
        options = {"records": True, "tokenizer": "byte", "mixture": [1, 1], "streaming": streaming}
        paths = [str(text), str(records)]
        config = DataConfig(paths, [str(records)], cache_dir=str(tmp_path / "cache"), **options)
        found.append(prepare_data(config, None, 32)[1].bytes_per_token)
    assert found[0] == pytest.approx(found[1], rel=0.02)  # windows at the end of the text are cut


# state


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_resumed_stream_gives_the_batches_of_the_unbroken_one(tmp_path, num_workers):
    files = shards_of(tmp_path, 3, 14)
    data = stream_of(files[:2], files[2:], seq_len=5, weights=[2, 1], segment=True, shuffle_buffer=6)
    (unbroken,) = loaders(data, 4, num_workers=num_workers)
    states, batches = [], []
    for _ in range(30):
        states.append(saved(unbroken.state_dict()))
        batches.append(next(unbroken))
    assert unbroken.epoch >= 1 and len({len(repr(state)) // 40 for state in states}) < 3  # the state does not grow
    for done in (0, 1, 2, 7, 20):
        (resumed,) = loaders(data, 4, num_workers=num_workers)
        resumed.load_state_dict(states[done])
        assert resumed.samples == 4 * done
        if done == 7:
            resumed.load_state_dict(saved(resumed.state_dict()))  # as in a run that is killed before its first step
        for batch in batches[done : done + 8]:
            again = next(resumed)
            assert batch.keys() == again.keys() and all(torch.equal(batch[name], again[name]) for name in batch)


@pytest.mark.slow
def test_a_resumed_stream_in_a_fresh_process(tmp_path):
    files = shards_of(tmp_path, 2, 30)
    (loader,) = loaders(stream_of(files, shuffle_buffer=8), 2, num_workers=2)
    take(loader, 11)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    program = (
        "import sys, torch; sys.path[:0] = ['tests', 'tests/data']; from test_stream import *\n"
        f"(loader,) = loaders(stream_of({files!r}, shuffle_buffer=8), 2, num_workers=2)\n"
        f"loader.load_state_dict(torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True))\n"
        "print(json.dumps(take(loader, 12)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == take(loader, 12), done.stderr


def test_the_buffer_is_replayed_not_lost(tmp_path):
    files = shards_of(tmp_path, 1, 60)
    data = stream_of(files, shuffle_buffer=50)
    (loader,) = loaders(data, 5)
    seen = flat(take(loader, 3))
    state = loader.state_dict()
    assert "d0000" not in repr(state) and len(repr(state)) < 2000
    (resumed,) = loaders(data, 5)
    resumed.load_state_dict(saved(state))
    rest = flat(take(resumed, 9))
    assert (
        sorted(seen + rest) == [f"d{n:06d}" for n in range(60)] and sorted(rest[:35] + seen) == sorted(seen + rest)[:50]
    )


def test_batch_size_and_seq_len_may_change(tmp_path):
    data = stream_of(shards_of(tmp_path, 1, 64), shuffle_buffer=16)
    (whole,), (first,), (second,) = loaders(data, 4), loaders(data, 4), loaders(data, 8)
    expected = flat(take(whole, 16))
    seen = flat(take(first, 4))
    second.load_state_dict(first.state_dict())
    assert seen + flat(take(second, 6)) == expected and second.samples == 64
    (longer,) = loaders(data.with_seq_len(16), 2)
    longer.load_state_dict(first.state_dict())  # 16 windows of 8 tokens are 8 of 16 tokens: half of the new buffer
    rows = [row for _ in range(4) for row in next(longer)["input_ids"].tolist()]
    assert {len(row) for row in rows} == {16} and longer.samples == 24
    starts = {bytes(row[:7]).decode() for row in rows}
    assert len(starts) == 8 and starts <= {f"d{n:06d}" for n in range(0, 32, 2)}


def test_a_state_of_other_readers_or_data_is_refused(tmp_path):
    files = shards_of(tmp_path, 2, 8)
    data = stream_of(files)
    state = loaders(data, 2)[0].state_dict()
    for change, said in (
        (loaders(data, 2, world=2)[0], "processes was 1 in the saved run and is 2 now"),
        (loaders(data, 2, num_workers=2)[0], "num_workers was 0 in the saved run and is 2 now"),
        (loaders(data, 2, seed=5)[0], "seed was 0 in the saved run and is 5 now"),
        (loaders(stream_of(files[:1]), 2)[0], "the hash of the training files was"),
        (loaders(stream_of(files, shuffle_buffer=3), 2)[0], "shuffle_buffer was 2048 in the saved run and is 3 now"),
        (loaders(stream_of(files[:1], files[1:]), 2)[0], "the hash of the training files was"),
    ):
        with pytest.raises(UserError, match=said):
            change.load_state_dict(state)
    packed = PackedDataset(tokenize_corpus(files, BYTE, cache_dir=str(tmp_path / "cache")), 8)
    tokenized = create_train_loader(packed, 2)
    with pytest.raises(UserError, match="the saved run was streaming"):
        tokenized.load_state_dict(state)
    with pytest.raises(UserError, match="the saved run was not streaming"):
        loaders(data, 2)[0].load_state_dict(tokenized.state_dict())


# mixtures


@pytest.mark.parametrize("num_workers", [0, 2])
def test_mixture_has_its_proportions(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(order, "DRAWS", 20)
    a, b = shards_of(tmp_path, 2, 10, "a"), shards_of(tmp_path, 1, 30, "b")
    data = stream_of(a, b, weights=[0.7, 0.3])
    (loader,) = loaders(data, 20, num_workers=num_workers)
    batches = take(loader, 6)
    assert [Counter(d[0] for d in batch) for batch in batches] == [{"a": 14, "b": 6}] * 6
    assert take(loaders(data, 20, num_workers=num_workers)[0], 6) == batches
    assert take(loaders(data, 20, num_workers=num_workers, seed=1)[0], 6) != batches


# faults


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", ["gone", "cut", "short", "grown"])
def test_a_shard_that_changes_during_the_run_is_named(tmp_path, num_workers, fault):
    files = [write(tmp_path / f"{n}.jsonl.gz", [f"d{n}{i:05d}" for i in range(40)]) for n in range(2)]
    data = stream_of(files, shuffle_buffer=2)
    (loader,) = loaders(data, 2, num_workers=num_workers)
    take(loader, 2)
    for file in map(Path, files):
        content = file.read_bytes()
        if fault == "gone":
            file.unlink()
        elif fault == "cut":  # the size is unchanged, but the end is missing
            file.write_bytes(content[:-20] + content[:20])
        else:
            file.write_bytes(content[:-20] if fault == "short" else content + content)
    expected = {"gone": "restore it", "cut": "cannot be read to its end"}.get(fault, "bytes when the run began and has")
    with pytest.raises(UserError, match=rf"[01]\.jsonl\.gz .*{expected}") as caught:
        take(loader, 200)
    assert "\n" not in str(caught.value)


def test_empty_files_among_others_are_passed_over(tmp_path):
    files = [*shards_of(tmp_path, 2, 6), write(tmp_path / "x.jsonl", [])]
    assert sorted(flat(take(loaders(stream_of(files), 12)[0], 1))) == [f"d{n:06d}" for n in range(12)]
    with pytest.raises(NoDocument, match="x.jsonl: empty"):
        stream_of(files[2:])
    other = write(tmp_path / "y.jsonl", ["text"])
    with pytest.raises(NoDocument, match=r"available fields: text \(set --text_field\)"):
        StreamingDataset(Shards([[other]], text_field="body"), BYTE, 8)


def test_fewer_documents_than_readers(tmp_path):
    ranks = loaders(stream_of(shards_of(tmp_path, 1, 2)), 3, world=3)
    assert flat(flat(take(rank, 2)) for rank in ranks[:2]) == ["d000000", "d000000", "d000001", "d000001"]
    with pytest.raises(UserError, match="too few documents for 3 readers .* smaller num_workers"):
        next(ranks[2])


def test_bad_lines_are_named_once(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "d000001"}\n{broken\n{"text": "d000002"}\n')
    data = stream_of([str(path)])
    take(loaders(data, 2)[0], 9)
    assert capsys.readouterr().err.count("a.jsonl:2: skipped, broken JSON") == 1
    with pytest.raises(UserError, match="a.jsonl:2: broken JSON"):
        StreamingDataset(Shards([[str(path)]], strict=True), BYTE, 8)


# memory


def test_no_more_is_held_than_the_buffer(tmp_path, monkeypatch):
    files = shards_of(tmp_path, 2, 300)
    data = stream_of(files, shuffle_buffer=10)
    alive, most = Counter(), []

    class Window(stream.Window):
        def __new__(cls, *values):
            alive["n"] += 1
            most.append(alive["n"])
            return super().__new__(cls, *values)

        def __del__(self):
            alive["n"] -= 1

    monkeypatch.setattr(stream, "Window", Window)
    monkeypatch.setattr(stream, "ENCODED", 4)
    read = []
    pieces = Shards.pieces
    monkeypatch.setattr(
        Shards, "pieces", lambda self, *args: (read.append(piece) or piece for piece in pieces(self, *args))
    )
    (loader,) = loaders(data, 5)
    for step in range(1, 100):
        next(loader)
        assert len(read) <= 5 * step + 2 * 10 + 4 + 2
    assert max(most) <= 2 * 10 + 2


# prepare_data


def test_held_back_documents_are_not_in_the_stream(tmp_path):
    files = shards_of(tmp_path, 3, 200)
    settings = {"tokenizer": "byte", "streaming": True, "shuffle_buffer": 8, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(files, **settings)
    _, train, valid = prepare_data(config, None, 8)
    held = set(bytes(i if i < 256 else 32 for i in valid.store[:].tolist()).decode().split())
    n_read = 600 - len(held)
    seen = flat(take(create_train_loader(train, 1), n_read))
    assert 3 <= len(held) <= 25 and held <= {f"d{n:06d}" for n in range(200)}
    assert sorted([*seen, *held]) == [f"d{n:06d}" for n in range(600)]
    assert str(train).startswith("a stream of 3 files")
    with pytest.raises(UserError, match=r"d0.jsonl.gz: too few documents to hold some back: set --valid_paths"):
        prepare_data(config, None, 5000)


def test_a_tokenizer_for_a_stream_is_trained_on_the_starts_of_its_files(tmp_path, capsys):
    texts = [f"the cat number {i} sat on the mat" for i in range(300)]
    files = [write(tmp_path / f"{n}.jsonl", texts) for n in range(2)]
    config = DataConfig(files[:1], files[1:], streaming=True, cache_dir=str(tmp_path / "c"), document_mask=True)
    tokenizer, train, _ = prepare_data(config, 300, 16)
    assert tokenizer.vocab_size == 300 and "training a SentencePiece model" in capsys.readouterr().err
    assert next(create_train_loader(train, 3))["attention_mask"].shape == (3, 16)
    assert prepare_data(config, 300, 16)[0].fingerprint == tokenizer.fingerprint
    assert "training a" not in capsys.readouterr().err


def test_a_sample_has_the_proportions_of_the_mixture(tmp_path):
    """A tokenizer that is trained on the sample then suits the text that is trained on."""
    a, b = ([write(tmp_path / f"{x}{n}.jsonl", [x * 100] * 50) for n in range(40)] for x in "ab")
    text = "".join(Shards([a, b]).sample(40_000, [3, 1]))
    assert text.count("a") == pytest.approx(30_000, rel=0.05) and text.count("b") == pytest.approx(10_000, rel=0.05)
    assert "".join(Shards([a[:2]]).sample(10**9)) == "a" * 10_000


def test_a_sample_has_whole_small_files_and_the_starts_of_large_ones(tmp_path):
    """The start of a source file, its licence and imports, is not like the rest."""
    small = [tmp_path / f"{n:03d}.txt" for n in range(500)]
    for n, path in enumerate(small):
        path.write_text(f"licence {n} " + "code " * 100)
    texts = list(Shards([list(map(str, small))]).sample(50_000))
    assert len(texts) == pytest.approx(100, abs=4) and all(text.endswith("code ") for text in texts)
    numbers = [int(text.split()[1]) for text in texts]
    assert numbers[0] == 0 and numbers[-1] > 490 and max(b - a for a, b in zip(numbers, numbers[1:])) <= 6
    large = [write(tmp_path / f"{n}.jsonl", [f"{n} " * 50] * 100) for n in range(4)]
    texts = list(Shards([large]).sample(4_000))
    assert Counter(text[0] for text in texts) == dict.fromkeys("0123", 10)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_of_a_mixture_knows_the_words_of_the_larger_weight(tmp_path, streaming):
    """Both corpora are of the same size, larger than the sample; the weights decide which words become pieces."""
    words = {x: [f"{x}{'kmpt'[n % 4]}{'aeiou'[n % 5]}{'lrns'[n % 4]}{n}" for n in range(60)] for x in "vw"}
    found = {}
    for weights in ([20, 1], [1, 20]):
        files = []
        for x, names in words.items():
            path = tmp_path / f"{x}.jsonl"
            files.append(write(path, [" ".join(names[(i + j) % 60] for j in range(20)) for i in range(400)]))
        options = {"streaming": streaming, "cache_dir": str(tmp_path / f"c{weights[0]}")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("src.dataset.ON_THE_SPOT_BYTES", 30_000)
            config = DataConfig(files, [files[0]], mixture=weights, **options)
            tokenizer = prepare_data(config, 320, 16)[0]
        found[weights[0]] = [len(tokenizer.encode(" ".join(names))) for names in words.values()]
    assert found[20][0] < found[1][0] and found[20][1] > found[1][1]


def test_mixture_by_flag(tmp_path):
    a, b = shards_of(tmp_path, 1, 100, "a"), shards_of(tmp_path, 1, 100, "b")
    for streaming in (False, True):
        config = DataConfig(
            a + b, a, tokenizer="byte", mixture=[3, 1], streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        _, train, _ = prepare_data(config, None, 8)
        letters = next(create_train_loader(train, 1000))["input_ids"].flatten()
        share = (letters == ord("a")).sum() / ((letters == ord("a")) | (letters == ord("b"))).sum()
        assert share.item() == pytest.approx(0.75, abs=0.04)  # 1000 of DRAWS draws
    for weights in ([1], [1, 0], [1, float("inf")]):
        with pytest.raises(ValueError, match="mixture"):
            DataConfig(a + b, mixture=weights)
    with pytest.raises(ValueError, match="streaming needs packing"):
        DataConfig(packing=False, streaming=True)


def test_files_are_looked_at_when_the_run_begins(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        Shards([[os.path.join(tmp_path, "nowhere.jsonl")]])
