"""Windows and batches of tokens, and prepare_data."""

import glob
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import BYTE, store_of, tokens_of, usual_spm, write

from src.data.corpus import read_documents
from src.data.samples import collate_batch
from src.dataset import (
    IGNORE,
    DataConfig,
    PackedDataset,
    Sample,
    TokenStore,
    WikiJsonlDataset,
    create_dataloader,
    prepare_data,
    tokenize_corpus,
)
from src.errors import UserError
from src.tokenizer import ByteLevelTokenizer

KYOTO = Path(__file__).parents[2] / "shared" / "data" / "ja_wiki_kyoto"

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
    return PackedDataset(store, seq_len, segment), tokens_of(texts)


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
    with pytest.raises(UserError, match="the text has 4 tokens, one window needs 9: use more text or set a smaller"):
        PackedDataset(store_of(tmp_path, ["abc"]), 8)
    path = write(tmp_path / "one.jsonl", ["abc"])
    with pytest.raises(UserError, match="4 tokens"):
        prepare_data(DataConfig([path], tokenizer="byte", cache_dir=str(tmp_path / "c")), None, 8)


def test_padded_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", ["abcdefgh", "xy"])
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


def test_a_space_that_the_tokenizer_adds_is_no_text(tmp_path):
    """Bits per byte are of the user's text, however the tokenizer marks the start of a document."""
    tokenizer = usual_spm(tmp_path)
    texts = ["the cat sat", "on the mat", "a cat"] * 4
    path = write(tmp_path / "a.jsonl", texts)
    store = tokenize_corpus([path], tokenizer, cache_dir=str(tmp_path / "cache"))
    size = sum(map(len, texts))
    assert tokenizer.prefix == " " and store.n_bytes == size
    rows = WikiJsonlDataset(store, tokenizer, 99)
    assert rows.bytes_per_token == size / len(store)
    cut = int(store.doc_ends[5])  # between two documents
    assert [part.n_bytes for part in store.split(cut, tokenizer)] == [size / 2, size / 2]


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
    path = write(tmp_path / "a.jsonl", texts)
    config = DataConfig([path], tokenizer="byte", cache_dir=str(tmp_path / "c"), document_mask=True)
    tokenizer, train, valid = prepare_data(config, None, 16, save_dir=str(tmp_path / "run"))
    documents = [BYTE.decode(d.store[:].tolist()) for d in (train, valid)]
    assert sorted(len(d) for d in documents) == [valid.store.n_bytes, train.store.n_bytes]
    assert train.store.n_documents + valid.store.n_documents == 400 and 5 <= valid.store.n_documents <= 40
    assert train[0].attention_mask is not None and os.path.exists(tmp_path / "run" / "tokenizer_config.json")
    write(tmp_path / "a.jsonl", texts[:200] + ["new"] + texts[200:])  # the held-back documents must stay the same
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
    assert "using the last 57 tokens for validation" in capsys.readouterr().err


def test_a_validation_file_that_is_training_text_is_said_by_name(tmp_path, capsys):
    a, b, c = (write(tmp_path / f"{name}.jsonl", [f"text {name} {i}" for i in range(9)]) for name in "abc")
    (tmp_path / "copy.jsonl").write_bytes(Path(b).read_bytes())
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    config = {"tokenizer": "byte", "cache_dir": str(tmp_path / "c")}
    for valid, said in (
        (f"{tmp_path}/link.jsonl", f"link.jsonl is also training text (as {a})"),
        (f"{tmp_path}/copy.jsonl", f"copy.jsonl is also training text (as {b})"),
        (a, "a.jsonl is also training text: its loss will be too low"),
        (c, ""),
    ):
        for streaming in (False, True):
            prepare_data(DataConfig([a, b], [valid], streaming=streaming, **config), None, 8)
            err = capsys.readouterr().err
            assert said in err and ("warning: validation file" in err) == bool(said)


def test_tokenizer_on_the_spot_is_made_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [f"the cat number {i} sat on the mat" for i in range(300)])
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


def test_a_tokenizer_of_a_mixture_is_made_anew_if_the_weights_change_places(tmp_path):
    paths = [write(tmp_path / f"{x}.jsonl", [f"the {x}{i} sat on the mat" for i in range(300)]) for x in "ab"]
    for order in (paths, paths[::-1], paths):
        config = DataConfig(order, paths[:1], mixture=[9, 1], cache_dir=str(tmp_path / "c"))
        prepare_data(config, 300, 16)
    assert len(glob.glob(str(tmp_path / "c" / "*.model"))) == 2


def test_impossible_settings():
    for values in (
        {"sp_model": "x", "tokenizer": "byte"},
        {"num_proc": 0},
        {"shuffle_buffer": 0},
        {"document_mask": True, "packing": False},
    ):
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
