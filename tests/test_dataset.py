"""Files to documents, documents to tokens, tokens to windows and batches."""

import glob
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src import corpus, token_store
from src.config import UserError
from src.corpus import find_files, read_documents, read_pieces, stdlib_files
from src.dataset import (
    IGNORE,
    DataConfig,
    PackedDataset,
    Sample,
    TokenStore,
    WikiJsonlDataset,
    collate_batch,
    create_dataloader,
    prepare_data,
    tokenize_corpus,
)
from src.tokenizer import ByteLevelTokenizer, train_sentencepiece

BYTE = ByteLevelTokenizer()
KYOTO = Path(__file__).parents[2] / "shared" / "data" / "ja_wiki_kyoto"


def write_jsonl(path, texts, field="text"):
    lines = "".join(json.dumps({field: t}, ensure_ascii=False) + "\n" for t in texts).encode()
    (gzip.open if str(path).endswith(".gz") else open)(path, "wb").write(lines)
    return str(path)


def store_of(tmp_path, texts, **options):
    path = write_jsonl(tmp_path / "docs.jsonl", texts)
    return tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache"), **options)


def stream_of(texts):
    return [i for t in texts for i in [*t.encode(), BYTE.eos_id]]


# files


def test_find_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/d.parquet", "e.py", "skip.json", ".hidden"):
        (tmp_path / name).write_text("x")
    names = lambda paths: [os.path.relpath(p, tmp_path) for p in find_files(paths)]  # noqa: E731
    assert names([tmp_path]) == ["a.jsonl.gz", "b.jsonl", "e.py", "sub/c.txt", "sub/d.parquet"]
    assert names([f"{tmp_path}/*.jsonl", tmp_path / "b.jsonl"]) == ["b.jsonl"]
    assert names([f"{tmp_path}/**/*.txt"]) == ["sub/c.txt"]
    for bad in ("nowhere.txt", "*.md", "skip.json"):
        with pytest.raises(UserError, match=bad.replace("*", r"\*")):
            find_files([f"{tmp_path}/{bad}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty leads to no data file"):
        find_files([tmp_path / "empty"])


def test_stdlib_files():
    train, valid = stdlib_files()
    assert (train, valid) == stdlib_files()
    assert not set(train) & set(valid)
    assert 0.02 < len(valid) / len(train) < 0.1
    assert not [p for p in train + valid if {"test", "tests", "site-packages"} & set(Path(p).parts[-4:])]
    assert any(p.endswith("argparse.py") for p in train + valid)


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one\ntwo\n", "京都\r\n😀", "  three  ", "\nfour\n\n"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "a.jsonl.gz", texts)
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes("".join(f"{t}\n<|endoftext|>\n" for t in texts).encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        assert list(read_documents([tmp_path / name])) == texts, name
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfno separator\n\nat all\n")
    assert list(read_documents([tmp_path / "plain.txt"])) == ["no separator\n\nat all\n"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("ab \n", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=5))
def test_long_documents_are_cut_without_loss(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_CHARS", 7)
    (tmp_path / "a.txt").write_bytes("".join(f"{t}\n<|endoftext|>\n" for t in texts).encode())
    write_jsonl(tmp_path / "a.jsonl", texts)
    for name in ("a.txt", "a.jsonl"):
        assert list(read_documents([tmp_path / name])) == texts
        assert all(len(p) <= 7 or "\n" not in p[:-1] for p, _ in read_pieces([tmp_path / name]))


# bad input

BAD_LINES = [
    (b"{broken", corpus.BAD_JSON),
    (b"[" * 100_000, corpus.BAD_JSON),
    (b'{"text": "\xff\xfe"}', corpus.BAD_UTF8),
    (b'{"text": "\\ud800"}', corpus.BAD_UTF8),
    (b'{"body": "x"}', corpus.NO_FIELD),
    (b'{"text": 3}', corpus.NOT_TEXT),
    (b'{"text": null}', corpus.NOT_TEXT),
    (b'{"text": " "}', corpus.EMPTY),
    (b"[1]", corpus.NOT_OBJECT),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_named_and_skipped_or_refused(tmp_path, capsys, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "fine"}')
    skipped = Counter()
    assert list(read_documents([path], skipped=skipped)) == ["good", "fine"]
    assert skipped == {reason: 1}
    assert f"a.jsonl:3: skipped, {reason}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"a.jsonl:3: {reason}"):
        list(read_documents([path], strict=True))


def test_only_the_first_bad_lines_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 50 + b'{"text": "x"}\n')
    list(read_documents([tmp_path / "a.jsonl"]))
    err = capsys.readouterr().err
    assert err.count("broken JSON") == corpus.REPORTED + 1 and "50 x broken JSON" in err


def test_non_utf8_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("fine\n日本".encode() + b"\n" + "日本".encode("euc-jp") + b"\nlast")
    skipped = Counter()
    assert list(read_documents([tmp_path / "a.txt"], skipped=skipped)) == ["fine\n日本\nlast"]
    assert skipped == {corpus.BAD_UTF8: 1}


def test_no_line_has_the_text_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_jsonl(tmp_path / "a.jsonl", ["x", "y"], field="body")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"has the field 'text'; fields there: body \(--text_field\)"):
            tokenize_corpus([tmp_path / name], BYTE, cache_dir=str(tmp_path / "cache"))
        assert list(read_documents([tmp_path / name], text_field="body"))[0] == "x"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.py"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=f"no document in .*{name}: empty"):
            tokenize_corpus([tmp_path / name], BYTE, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=name):
        prepare_data(DataConfig([str(tmp_path / name)], cache_dir=str(tmp_path / "cache")), None, 8)
    write_jsonl(tmp_path / "b.jsonl", ["x"])
    assert list(read_documents([tmp_path])) == ["x"]


def test_truncated_or_broken_archives(tmp_path):
    path = write_jsonl(tmp_path / "cut.jsonl.gz", [os.urandom(4000).hex()])
    whole = Path(path).read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"not gzip", whole[:200] + b"\0" * 99 + whole[300:]):
        Path(path).write_bytes(content)
        with pytest.raises(UserError, match="cut.jsonl.gz cannot be read to its end"):
            tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 garbage PAR1")
    with pytest.raises(UserError, match="bad.parquet cannot be read"):
        tokenize_corpus([tmp_path / "bad.parquet"], BYTE, cache_dir=str(tmp_path / "cache"))
    Path(path).write_bytes(whole)  # nothing of the failures was kept
    assert tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache")).n_documents == 1


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="cache_dir .*file.*--cache_dir"):
        tokenize_corpus([tmp_path / "a.jsonl"], BYTE, cache_dir=str(tmp_path / "file" / "c"))


# the store


def test_store_is_the_stream_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "ROWS", 3)
    texts = [f"document {i} 日本\n" * (i % 4 + 1) for i in range(20)]
    store = store_of(tmp_path, texts)
    stream = stream_of(texts)
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
    monkeypatch.setattr(corpus, "PIECE_CHARS", 5)
    assert store_of(tmp_path, ["a longer\ntext", "b"])[:].tolist() == stream_of(["a longer\ntext", "b"])


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


def test_processes_share_files_without_changing_the_stream(tmp_path):
    for i in range(5):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"file {i} line {j}" for j in range(3)] if i != 3 else [])
    one = tokenize_corpus([tmp_path], BYTE, cache_dir=str(tmp_path / "c1"))
    many = tokenize_corpus([tmp_path], BYTE, cache_dir=str(tmp_path / "c2"), num_proc=5)
    assert one[:].tolist() == many[:].tolist() and one.doc_ends.tolist() == many.doc_ends.tolist()


def test_an_error_in_a_process_reaches_the_user(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["fine"])
    path = write_jsonl(tmp_path / "b.jsonl.gz", ["cut"])
    Path(path).write_bytes(Path(path).read_bytes()[:-5])
    with pytest.raises(UserError, match="b.jsonl.gz cannot be read to its end"):
        tokenize_corpus([tmp_path], BYTE, cache_dir=str(tmp_path / "c"), num_proc=2)


def test_two_processes_at_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"line {i}" for i in range(300)])
    program = (
        "from src.token_store import tokenize_corpus as t; from src.tokenizer import ByteLevelTokenizer as B\n"
        f"print(len(t([{path!r}], B(), cache_dir={str(tmp_path / 'cache')!r})))"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program]
    runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == [str(sum(len(f"line {i}") + 1 for i in range(300)))] * 2


def test_a_killed_run_leaves_no_half_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"line {i}" for i in range(300)])
    program = (
        "import os, sys; from src import token_store as t; from src.tokenizer import ByteLevelTokenizer as B\n"
        "take, n = t._take, []\n"
        "def dying(*a):\n    n.append(1)\n    return os._exit(9) if len(n) == 2 else take(*a)\n"
        f"t._take = dying\nt.tokenize_corpus([{path!r}], B(), cache_dir={str(tmp_path / 'cache')!r})"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True).returncode == 9
    assert tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache")).n_documents == 300


# windows


def make_packed(tmp_path, n_tokens, seq_len, segment=False):
    rng = np.random.default_rng(n_tokens)
    lengths = rng.integers(1, 9, size=n_tokens)
    texts, left = [], n_tokens
    for length in lengths:
        if left >= 2:
            size = int(min(length, left - 1)) if left - 1 - min(length, left - 1) != 1 else left - 1
            texts.append("".join(rng.choice(list("abcdefgh"), size)))
            left -= size + 1
    store = store_of(tmp_path, texts)
    return PackedDataset(store, seq_len, segment), stream_of(texts)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_tokens=st.integers(20, 120), seq_len=st.integers(1, 18))
def test_every_token_is_a_target_exactly_once(n_tokens, seq_len, tmp_path):
    packed, stream = make_packed(tmp_path, n_tokens, seq_len)
    targets = []
    for i in range(len(packed)):
        sample = packed[i]
        assert sample.input_ids.shape == sample.target_ids.shape == (seq_len,)
        kept = sample.target_ids != IGNORE
        assert torch.equal(sample.target_ids[:-1][kept[:-1]], sample.input_ids[1:][kept[:-1]])
        targets += sample.target_ids[kept].tolist()
    assert targets == stream[1:] and packed.n_targets == len(targets)
    assert packed[0].input_ids[0] == stream[0]
    assert packed.bytes_per_token == packed.store.n_bytes / len(targets)


def test_a_document_ends_with_eos_and_the_next_begins_with_bos(tmp_path):
    store = store_of(tmp_path, ["ab", "c", "defg"])
    bos, eos = ByteLevelTokenizer.bos_id, ByteLevelTokenizer.eos_id
    sample = PackedDataset(store, 6, bos_eos=(bos, eos))[0]
    assert sample.input_ids.tolist() == [97, 98, bos, 99, bos, 100]
    assert sample.target_ids.tolist() == [98, eos, 99, eos, 100, 101]


def test_segments_number_the_documents_of_a_window(tmp_path):
    packed = PackedDataset(store_of(tmp_path, ["ab", "c", "defg"]), 6, segment=True)
    assert [packed[i].attention_mask.tolist() for i in range(len(packed))] == [[1, 1, 2, 2, 3, 3], [1, 2, 2, 2, 2, 2]]
    assert packed[1].target_ids.tolist() == [IGNORE] * 3 + [*b"fg", BYTE.eos_id]
    assert PackedDataset(packed.store, 6)[0].attention_mask is None


def test_shorter_than_one_window(tmp_path):
    with pytest.raises(UserError, match="the text has 4 tokens, one window needs 9: give more text or a smaller"):
        PackedDataset(store_of(tmp_path, ["abc"]), 8)
    path = write_jsonl(tmp_path / "one.jsonl", ["abc"])
    with pytest.raises(UserError, match="4 tokens"):
        prepare_data(DataConfig([path], tokenizer="byte", cache_dir=str(tmp_path / "c")), None, 8)


def test_padded_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["abcdefgh", "xy"])
    rows = WikiJsonlDataset([path], BYTE, 4, cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 2
    assert rows[0].input_ids.tolist() == [BYTE.bos_id, *b"abc"] and rows[0].target_ids.tolist() == [*b"abcd"]
    assert rows[1].input_ids.tolist() == [BYTE.bos_id, *b"xy"]
    assert rows[1].target_ids.tolist() == [*b"xy", BYTE.eos_id]
    assert rows.bytes_per_token == 6 / 7
    batch = collate_batch([rows[0], rows[1]], pad_id=BYTE.pad_id)
    assert batch["input_ids"].tolist() == [[BYTE.bos_id, *b"abc"], [BYTE.bos_id, *b"xy", BYTE.pad_id]]
    assert batch["target_ids"].tolist() == [[*b"abcd"], [*b"xy", BYTE.eos_id, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_collate_leaves_the_mask_out_where_nothing_is_padded():
    ids = torch.arange(3)
    assert set(collate_batch([Sample(ids, ids, None)] * 2)) == {"input_ids", "target_ids"}
    with_mask = collate_batch([Sample(ids, ids, None), Sample(ids, ids, torch.tensor([1, 1, 2]))])
    assert with_mask["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 2]]


# batches


class Numbers(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Sample(torch.tensor([i]), torch.tensor([i]), None)


def batches(n, size, count, **options):
    loader = create_dataloader(Numbers(n), size, **options)
    return [b["input_ids"].flatten().tolist() for b in islice(loader, count)]


def test_order_is_a_function_of_seed_and_index():
    a = batches(10, 4, 10, seed=3)
    assert a == batches(10, 4, 10, seed=3) != batches(10, 4, 10, seed=4)
    flat = [i for b in a for i in b]
    epochs = [flat[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(10, 4, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("done", [1, 2, 3, 7])
def test_a_resumed_loader_goes_on_exactly(done):
    assert batches(10, 4, 10)[done:] == batches(10, 4, 10 - done, start=done * 4)


def test_workers_do_not_change_the_order():
    assert batches(10, 4, 6, num_workers=2) == batches(10, 4, 6)


def test_fewer_samples_than_a_batch():
    first = batches(3, 7, 2)
    assert [len(b) for b in first] == [7, 7] and sorted(first[0][:3]) == [0, 1, 2]


def test_one_pass_in_order():
    assert batches(5, 2, 99, shuffle=False) == [[0, 1], [2, 3], [4]]


# prepare_data


def test_held_back_documents_are_disjoint_and_stable(tmp_path):
    texts = [f"text number {i}" for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = DataConfig([path], tokenizer="byte", cache_dir=str(tmp_path / "c"), document_mask=True)
    tokenizer, train, valid = prepare_data(config, None, 16, save_dir=str(tmp_path / "run"))
    documents = [BYTE.decode(d.store[:].tolist()) for d in (train, valid)]
    assert sorted(len(d) for d in documents) == [valid.store.n_bytes, train.store.n_bytes]
    assert train.store.n_documents + valid.store.n_documents == 400 and 5 <= valid.store.n_documents <= 40
    assert train[0].attention_mask is not None and os.path.exists(tmp_path / "run" / "tokenizer_config.json")
    write_jsonl(tmp_path / "a.jsonl", texts[:200] + ["new"] + texts[200:])  # held-back documents stay held back
    _, _, valid2 = prepare_data(config, None, 16)
    assert set(split(valid)) <= set(split(valid2))


def split(dataset):
    ids = dataset.store[:].tolist()
    return "|".join(BYTE.decode([i]) if i != BYTE.eos_id else "" for i in ids).replace("|", "").split("text number")


def test_one_document_is_parted_by_its_end(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 60)
    config = DataConfig([str(tmp_path / "a.txt")], tokenizer="byte", cache_dir=str(tmp_path / "c"))
    _, train, valid = prepare_data(config, None, 16)
    assert len(train.store) + len(valid.store) == 19 * 60 + 1 and len(valid.store) == 57
    assert "the last" in capsys.readouterr().err


def test_tokenizer_on_the_spot_is_made_once(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [f"the cat number {i} sat on the mat" for i in range(300)])
    config = DataConfig([path], cache_dir=str(tmp_path / "c"))
    tokenizer, train, _ = prepare_data(config, 300, 16)
    assert tokenizer.vocab_size == 300 and "training a SentencePiece model" in capsys.readouterr().err
    again, train2, _ = prepare_data(config, 300, 16)
    assert "training" not in capsys.readouterr().err and again.fingerprint == tokenizer.fingerprint
    assert train.store[:].tolist() == train2.store[:].tolist()
    (model,) = glob.glob(str(tmp_path / "c" / "*.model"))
    with_model = prepare_data(DataConfig([path], [path], sp_model=model, cache_dir=str(tmp_path / "c")), None, 16)
    assert with_model[0].fingerprint == tokenizer.fingerprint and len(with_model[2].store) > len(train.store)
    with pytest.raises(UserError, match="largest possible"):
        prepare_data(config, 50_000, 16)


def test_impossible_settings():
    for values in ({"sp_model": "x", "tokenizer": "byte"}, {"num_proc": 0}, {"document_mask": True, "packing": False}):
        with pytest.raises(ValueError):
            DataConfig(**values)


@pytest.mark.skipif(not KYOTO.exists(), reason="../shared/data/ja_wiki_kyoto is not here")
def test_japanese_wikipedia(tmp_path):
    path = str(KYOTO / "validation_0.jsonl.gz")
    config = DataConfig([path], cache_dir=str(tmp_path / "c"))
    tokenizer, train, valid = prepare_data(config, 4000, 64)
    assert isinstance(train.store, TokenStore) and train.store.n_documents + valid.store.n_documents == 141
    texts = list(read_documents([path]))
    assert [tokenizer.decode(tokenizer.encode(t)) for t in texts] == texts
    assert valid.bytes_per_token > 3  # one Japanese character is three bytes
