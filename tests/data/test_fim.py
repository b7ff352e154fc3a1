"""Fill-in-the-middle: what is in a rearranged row, which tokens are targets, determinism and resume."""

import io
import pickle
from itertools import islice

import numpy as np
import pytest
import sentencepiece as spm
import torch
from texts import saved, write

from src.data.fim import FillInMiddle, RearrangedDataset
from src.data.loader import create_train_loader
from src.data.samples import window_sample
from src.data.shards import Shards
from src.data.stream import StreamingDataset
from src.data.token_store import tokenize_corpus
from src.data.tokenizer_json import FIM_NAMES
from src.data.tokenizer_training import train_sentencepiece, train_tokenizer
from src.dataset import DataConfig, MixedDataset, PackedDataset, WikiJsonlDataset, prepare_data
from src.errors import UserError
from src.interop.hf_tokenizer import to_hf
from src.losses import IGNORE
from src.tokenizer import ByteLevelTokenizer, TokenizerWrapper
from src.training.rag_config import RagConfig

BYTE = ByteLevelTokenizer({"fill_in_the_middle": True})
PREFIX, SUFFIX, MIDDLE = BYTE.fim[:3]
TEXTS = [f"def f{n}(x):\n    return 'ü日本😀' + x * {n}\n" * (1 + n % 3) for n in range(40)]


def row_of(texts, tokenizer=BYTE):
    """A row of whole documents, as PackedDataset makes it."""
    ids = [tokenizer.eos_id, *(i for text in texts for i in tokenizer.encode(text, eos=True))]
    return window_sample(np.array(ids), None, (tokenizer.bos_id, tokenizer.eos_id))


def documents_of(sample, tokenizer=BYTE):
    """The documents of a row, each as (text, whether it was rearranged), with the parts in their old order."""
    ids = [*sample.input_ids.tolist(), int(sample.target_ids[-1])]
    assert ids[0] == tokenizer.bos_id
    found, start = [], 1
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    for end in [at for at, index in enumerate(ids) if at and index in ends]:
        part, start = ids[start:end], end + 1
        where = [part.index(index) for index in tokenizer.fim[:3] if index in part]
        if not where:
            found.append((tokenizer.decode(part), False))
            continue
        assert where[0] == 0 and where == sorted(where) and all(part.count(i) == 1 for i in tokenizer.fim[:3])
        first, second, third = part[1 : where[1]], part[where[1] + 1 : where[2]], part[where[2] + 1 :]
        if tokenizer.suffix_first:  # both sentinels stand before the suffix
            assert first == []
            found.append((tokenizer.decode([*third, *second]), True))
        else:
            found.append((tokenizer.decode([*first, *third, *second]), True))
    return found


def spaced_spm():
    """A SentencePiece model that adds a space before each text, as Llama's does."""
    options = {"vocab_size": 330, "byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "character_coverage": 0.98}
    model = io.BytesIO()
    options |= {"sentence_iterator": iter(TEXTS), "model_writer": model, "control_symbols": list(FIM_NAMES[0])}
    spm.SentencePieceTrainer.train(**options, model_type="bpe", hard_vocab_limit=False)
    return TokenizerWrapper(model.getvalue())


@pytest.fixture(scope="module", params=["byte", "spm", "bpe", "spaced spm", "spaced hf"])
def tokenizer(request, tmp_path_factory):
    """A tokenizer of each kind, and two that add a space before each text."""
    if request.param.startswith("spaced"):
        tok = to_hf(spaced_spm()) if request.param == "spaced hf" else spaced_spm()
        assert tok.prefix == " "
        return tok
    if request.param == "byte":
        return BYTE
    if request.param == "spm":
        return train_sentencepiece(iter(TEXTS), None, 330, fim=True)
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(write(folder / "t.jsonl", TEXTS), 285, folder / "bpe.json", fim=True)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_the_parts_join_to_the_documents(tokenizer, order):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.suffix_first = order == "spm"
    fim = FillInMiddle(tokenizer, 1.0)
    assert fim.tokenizer.suffix_first == (order == "spm")
    for seed in range(30):
        texts = TEXTS[seed : seed + 4]
        found = documents_of(fim(row_of(texts, tokenizer), (0, seed), 10_000), tokenizer)
        assert found == [(text, True) for text in texts]


def test_cuts_are_inside_tokens_and_their_tokens_are_those_of_the_part(tokenizer):
    fim, seen = FillInMiddle(tokenizer, 1.0), set()
    for seed in range(100):
        ids = fim(row_of(["return"], tokenizer), (0, seed), 99).input_ids.tolist()
        assert ids == row_of(["return"], tokenizer).input_ids.tolist()  # too short
        text = "return return return"
        ids = fim(row_of([text], tokenizer), (0, seed), 99).input_ids.tolist()
        at, end = ids.index(tokenizer.fim.suffix), ids.index(tokenizer.fim.middle)
        prefix, suffix = tokenizer.decode(ids[2:at]), tokenizer.decode_bytes(ids[at + 1 : end]).decode()
        assert text.startswith(prefix) and text.endswith(suffix)
        assert ids[: end + 1] == tokenizer.infill(prefix, suffix)  # a model is asked in the tokens it was trained on
        seen.add(len(prefix))
    assert len(seen) == len(text) + 1 or len(seen) > 15


def test_the_middle_follows_the_prefix_if_the_suffix_comes_first():
    tokenizer = ByteLevelTokenizer({"fill_in_the_middle": True, "suffix_first": True})
    sample = FillInMiddle(tokenizer, 1.0)(row_of([TEXTS[0]]), (0, 1), 999)
    ids = [*sample.input_ids.tolist(), int(sample.target_ids[-1])]
    at = ids.index(MIDDLE)
    after = tokenizer.decode(ids[at + 1 : -1])  # prefix and middle
    assert ids[:3] == [BYTE.bos_id, PREFIX, SUFFIX] and ids[-1] == BYTE.eos_id and TEXTS[0].startswith(after)
    suffix = TEXTS[0][len(after) :]
    assert 3 < len(after) < len(TEXTS[0]) and ids[3:at] == BYTE.encode(suffix)
    assert ids[: at + 3] == tokenizer.infill(after[:2], suffix)  # a model is asked in the tokens it was trained on
    assert sample.target_ids[at - 1 : at + 1].tolist() == [IGNORE, ids[at + 1]]  # no loss for the sentinel


def test_rate_is_the_share_of_documents():
    texts = ["x" * 20] * 50
    shares = [np.mean([cut for _, cut in documents_of(FillInMiddle(BYTE, 0.3)(row_of(texts), (0, n), 9999))])
              for n in range(20)]  # fmt: skip
    assert abs(np.mean(shares) - 0.3) < 0.06  # 4 standard deviations


def test_targets_are_the_next_inputs_without_the_sentinels():
    sample = FillInMiddle(BYTE, 1.0)(row_of(TEXTS[:3]), (1,), 10_000)
    following = sample.input_ids[1:]
    following = torch.where(following == BYTE.bos_id, BYTE.eos_id, following)
    is_sentinel = torch.isin(following, torch.tensor(BYTE.fim[:3]))
    assert int(is_sentinel.sum()) == 9
    assert torch.equal(sample.target_ids[:-1], torch.where(is_sentinel, IGNORE, following))
    assert int(sample.target_ids[-1]) == BYTE.eos_id


def test_a_window_keeps_its_length_and_its_last_document_ends_earlier(tmp_path):
    """The window starts and ends inside documents, and inside characters."""
    store = tokenize_corpus([write(tmp_path / "t.jsonl", TEXTS)], BYTE, cache_dir=str(tmp_path / "cache"))
    plain = PackedDataset(store, 150, True, (BYTE.bos_id, BYTE.eos_id))
    rows = RearrangedDataset(plain, FillInMiddle(BYTE, 1.0))
    whole, n_rearranged = "".join(text + "\0" for text in TEXTS), 0
    for index in range(len(plain) - 1):
        sample, before = rows[index, (0, index)], plain[index]
        assert sample.input_ids.shape == sample.target_ids.shape == sample.attention_mask.shape == (150,)
        first = int(before.input_ids[0])
        if int(sample.input_ids[0]) != BYTE.bos_id:  # the end of a document, too short to be rearranged
            continue
        n_rearranged += first != BYTE.bos_id  # the end of a document, in front of which BOS was added
        found = documents_of(sample)
        assert all(cut for _, cut in found[:-1])
        joined = "\0".join(text for text, _ in found)
        assert joined in whole
        kept, all_of_it = (
            len(
                bytes(i for i in [int(row.input_ids[0]), *row.target_ids.tolist()] if 0 <= i < 256).decode(
                    errors="ignore"
                )
            )
            for row in (sample, before)
        )
        assert all_of_it - 5 * (len(found) + 1) <= kept <= all_of_it
        starts = (sample.input_ids == BYTE.bos_id).long()
        starts[0] = 1
        assert torch.equal(sample.attention_mask, starts.cumsum(0))
    assert n_rearranged > 10
    last = len(plain) - 1
    assert IGNORE in plain[last].target_ids  # it repeats a part of the window before
    assert all(torch.equal(a, b) for a, b in zip(rows[last, (0, 0)], plain[last]))


def test_padded_rows(tmp_path):
    texts = ["a document of some length", "short", "x" * 100]
    rows = WikiJsonlDataset([write(tmp_path / "t.jsonl", texts)], BYTE, 60, cache_dir=str(tmp_path / "cache"))
    rows = RearrangedDataset(rows, FillInMiddle(BYTE, 1.0))
    first, second, third = (rows[index, (3, index)] for index in range(3))
    assert documents_of(first) == [(texts[0], True)] and documents_of(second) == [(texts[1], False)]
    assert len(third.input_ids) == 60 and documents_of(third) == [("x" * 56, True)]


def test_a_row_that_gets_shorter_is_filled_up_without_targets(monkeypatch):
    text = "a document of some length"
    row = row_of([text])
    monkeypatch.setattr(ByteLevelTokenizer, "encode_batch", lambda self, texts: [[1]] * len(texts))  # one token each
    sample = FillInMiddle(BYTE, 1.0)(row, (0,), 99)
    assert sample.target_ids.tolist() == [IGNORE, 1, IGNORE, 1, IGNORE, 1, BYTE.eos_id] + [IGNORE] * 19


@pytest.fixture
def sets(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", TEXTS[start:]) for name, start in (("a", 0), ("b", 20))]
    cache = str(tmp_path / "cache")
    corpora = [PackedDataset(tokenize_corpus([path], BYTE, cache_dir=cache), 64) for path in paths]
    fim = FillInMiddle(BYTE, 0.5)
    return RearrangedDataset(corpora[0], fim), RearrangedDataset(MixedDataset(corpora, [2, 1]), fim)


def inputs(batches):
    return torch.stack([batch["input_ids"] for batch in batches])


def test_batches_depend_on_seed_and_number_alone(sets):
    for rows in sets:
        batches = inputs(islice(create_train_loader(rows, 4, seed=1), 8))
        assert torch.isin(batches, torch.tensor(BYTE.fim[:3])).any(-1).float().mean() > 0.3
        assert not torch.equal(batches, inputs(islice(create_train_loader(rows, 4, seed=2), 8)))
        loader = create_train_loader(rows, 4, seed=1)
        for _ in range(5):
            next(loader)
        resumed = create_train_loader(rows, 4, seed=1)
        resumed.load_state_dict(saved(loader.state_dict()))
        assert torch.equal(inputs(islice(resumed, 3)), batches[5:])
        ranks = [inputs(islice(create_train_loader(rows, 4, 1, rank, 2), 8)) for rank in range(2)]
        assert torch.equal(torch.stack(ranks, 2).flatten(1, 2), batches)


def test_rows_of_another_length(sets):
    for rows in sets:
        longer = rows.with_seq_len(96)
        assert len(longer) < len(rows) and "rearranged" in str(longer)
        assert longer.bytes_per_token == pytest.approx(rows.bytes_per_token, rel=0.05)
        batches = inputs(islice(create_train_loader(longer, 4, seed=1), 8))
        assert batches.shape == (8, 4, 96) and bool((batches == MIDDLE).any())


def test_another_epoch_cuts_elsewhere(sets):
    rows, _ = sets
    n = len(rows)
    batches = [batch["input_ids"][0] for batch in islice(create_train_loader(rows, 1, seed=1), 2 * n)]
    same = sum(any(torch.equal(row, other) for other in batches[n:]) for row in batches[:n])
    assert same < n * 0.6  # a quarter of the windows and more is plain in both


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_gives_the_batches_of_the_unbroken_one(tmp_path, num_workers):
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", TEXTS)
    files = [[str(path) for path in sorted(tmp_path.glob("*.jsonl"))]]
    data = StreamingDataset(Shards(files), BYTE, 64, shuffle_buffer=8, fim=FillInMiddle(BYTE, 1.0))
    loader = create_train_loader(data, 4, seed=1, num_workers=num_workers)
    before = inputs(islice(loader, 5))
    state = saved(loader.state_dict())
    after = inputs(islice(loader, 5))
    assert before.shape == (5, 4, 64) and (before == MIDDLE).any(-1).float().mean() > 0.9
    resumed = create_train_loader(data, 4, seed=1, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert torch.equal(inputs(islice(resumed, 5)), after)


def test_prepare_data(tmp_path):
    paths = [write(tmp_path / "t.jsonl", TEXTS)]
    options = {"cache_dir": str(tmp_path / "cache"), "train_paths": paths, "valid_paths": paths}
    for tokenizer, streaming in (("byte", False), ("byte", True), ("sentencepiece", False)):
        data = DataConfig(**options, tokenizer=tokenizer, streaming=streaming, fim_rate=1.0)
        tok, train_set, valid_set = prepare_data(data, 320, 48, tmp_path / tokenizer)
        assert tok.fim is not None and type(valid_set) is PackedDataset
        batch = next(create_train_loader(train_set, 8))
        assert torch.isin(batch["input_ids"], torch.tensor(tok.fim[:3])).any()
        valid = torch.cat([valid_set[index].input_ids for index in range(len(valid_set))])
        assert not torch.isin(valid, torch.tensor(tok.fim[:3])).any()
        again, *_ = prepare_data(DataConfig(**options, tokenizer=str(tmp_path / tokenizer), fim_rate=1.0), None, 48)
        assert again.fim == tok.fim and again.fingerprint == tok.fingerprint
    ordered = DataConfig(**options, tokenizer="byte", fim_rate=1.0, fim_order="spm")
    prepare_data(ordered, None, 48, tmp_path / "spm")
    again, *_ = prepare_data(DataConfig(**options, tokenizer=str(tmp_path / "spm"), fim_rate=1.0), None, 48)
    assert again.suffix_first and not tok.suffix_first
    plain, *_ = prepare_data(DataConfig(**options), 320, 48)
    assert plain.fim is None and tok.vocab_size == plain.vocab_size == 320


def test_impossible_settings(tmp_path):
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"fim_rate is {rate}: set it from 0 to 1"):
            DataConfig(fim_rate=rate)
    with pytest.raises(ValueError, match="fim_order spm needs a fim_rate over 0"):
        DataConfig(fim_order="spm")
    with pytest.raises(ValueError, match="fim_rate and the section rag each change the windows: leave out one"):
        DataConfig(fim_rate=0.5, rag=RagConfig(paths=["src"]))
    with pytest.raises(UserError, match="fim_rate 0.5 needs a tokenizer with the sentinels of fill-in-the-middle"):
        FillInMiddle(ByteLevelTokenizer(), 0.5)
