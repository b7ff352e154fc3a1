"""Rows of records: the mask, dropped records, mixtures, streams, and what is held back. tests/test_tokenizer.py checks
the tokens of the prompt with every kind of tokenizer."""

import functools

import pytest
import torch
from texts import BYTE, flat, saved, write, write_records

from src.data.loader import create_train_loader
from src.data.record_rows import RecordDataset
from src.data.records import answer_of, prompt_of
from src.data.samples import collate_batch
from src.dataset import DataConfig, MixedDataset, prepare_data
from src.errors import UserError
from src.losses import IGNORE
from src.tasks.maths import MathDataset

MASKED = IGNORE


def problems(numbers):
    return [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in numbers]


def text_of(problem):
    return prompt_of(problem["question"]) + answer_of(problem["answer"])


def texts_of(batch):
    """The text of each row, without special tokens."""
    return [BYTE.decode(row) for row in batch["input_ids"].tolist()]


@pytest.fixture
def dataset(tmp_path):
    """dataset(rows, length): a RecordDataset with one token per byte."""

    def make(rows, length=64, **options):
        path = write_records(tmp_path / "rows.jsonl", rows)
        return RecordDataset(path, BYTE, length, cache_dir=str(tmp_path / "cache"), **options)

    return make


# rows


def test_the_loss_covers_the_answer_and_its_eos(dataset):
    rows = dataset([{"question": "1 + 1?", "answer": 2.0}, {"question": "京?", "answer": "都\n市"}])
    prompt, answer = list(b"Input: 1 + 1? \n Output:"), list(b" 2")
    inputs, targets, mask = rows[0]
    assert inputs.tolist() == [BYTE.bos_id, *prompt, *answer]
    assert targets.tolist() == [MASKED] * len(prompt) + answer + [BYTE.eos_id] and mask is None
    assert [t for t in rows[1].target_ids.tolist() if t != MASKED] == [*" 都\n市".encode(), BYTE.eos_id]
    assert rows.n_targets == 3 + 9
    assert rows.bytes_per_token == (2 + 8) / (3 + 9)
    assert rows.prompt(0) == "Input: 1 + 1? \n Output:" and str(rows) == "2 records of at most 64 tokens"
    batch = collate_batch([rows[0], rows[1]], BYTE.pad_id)
    assert batch["input_ids"].shape == (2, 30) == batch["target_ids"].shape
    gap = 30 - len(inputs)
    assert batch["attention_mask"][0].tolist() == [1] * len(inputs) + [0] * gap
    assert batch["target_ids"][0, -gap:].tolist() == [MASKED] * gap


def test_without_bos_a_row_starts_with_the_prompt(dataset, monkeypatch):
    monkeypatch.setattr(BYTE, "add_bos", False)
    rows = dataset(problems([1]))
    prompt = BYTE.encode(rows.prompt(0), bos=True)
    inputs, targets, _ = rows[0]
    assert inputs.tolist() == prompt + list(b" 2")
    assert targets.tolist() == [MASKED] * (len(prompt) - 1) + list(b" 2") + [BYTE.eos_id]


def test_a_record_that_does_not_fit_is_dropped_and_never_cut(dataset, capsys):
    rows = problems([1, 1000, 5, 70])
    lengths = [len(text_of(row)) + 1 for row in rows]
    kept = dataset(rows, lengths[2])
    assert f"2 of 4 records dropped: over {lengths[2]} tokens\n" in capsys.readouterr().err
    assert texts_of(collate_batch(kept, BYTE.pad_id)) == [text_of(rows[0]), text_of(rows[2])]
    assert all(row.target_ids[-1] == BYTE.eos_id for row in kept)
    assert kept.n_targets == 3 + 4 and kept.bytes_per_token == 5 / 7
    longer = kept.with_seq_len(64)
    assert [len(row.input_ids) for row in longer] == lengths
    capsys.readouterr()
    assert len(longer.with_seq_len(64)) == 4 and capsys.readouterr().err == ""
    said = f"none of the 4 records fits in max_seq_len 9: the shortest has {lengths[0]} tokens; raise max_seq_len"
    with pytest.raises(UserError, match=said):
        dataset(rows, 9)


def test_maths_as_plain_tensors(tmp_path):
    path = write_records(tmp_path / "a.json", [{"q": "1 + 1?", "a": 2}, {"q": "1 + 1 + 1?", "a": 3}])
    data = MathDataset(path, BYTE, 28, "q", "a", cache_dir=str(tmp_path))
    assert len(data) == 1
    row = {name: values.tolist() for name, values in data[0].items()}
    prompt, answer = [BYTE.bos_id, *b"Input: 1 + 1? \n Output:"], [*b" 2", BYTE.eos_id]
    assert row["input_ids"] == [*prompt, *answer, BYTE.pad_id]
    assert row["attention_mask"] == [1] * 27 + [0]
    assert row["labels"] == [MASKED] * len(prompt) + answer + [MASKED]
    assert len(MathDataset(path, BYTE, 27, "q", "a", cache_dir=str(tmp_path))) == 1
    (batch,) = torch.utils.data.DataLoader(data, 4)
    assert batch["labels"].shape == (1, 28)


# what a run reads


@pytest.fixture
def prepare(tmp_path):
    """prepare(**settings) is prepare_data on records, with one token per byte."""
    write_records(tmp_path / "train.jsonl", problems(range(200)))
    write_records(tmp_path / "valid.json", problems(range(300, 310)))
    write(tmp_path / "text.jsonl", [f"document {n}" for n in range(100)])

    def prepare(*names, seq_len=32, vocab_size=None, **settings):
        settings = {"tokenizer": "byte"} | settings | {"records": True, "cache_dir": str(tmp_path / "cache")}
        paths = {"train_paths": [str(tmp_path / name) for name in names]}
        if "valid_paths" in settings:
            settings["valid_paths"] = [str(tmp_path / name) for name in settings["valid_paths"]]
        return prepare_data(DataConfig(**paths, **settings), vocab_size, seq_len)

    return prepare


@pytest.mark.parametrize("streaming", [False, True])
def test_some_records_are_held_back_without_validation_files(prepare, streaming):
    _, train, valid = prepare("train.jsonl", streaming=streaming)
    batches = create_train_loader(train, 20, pad_id=BYTE.pad_id)
    seen = set(flat(texts_of(next(batches)) for _ in range(20)))
    held = set(texts_of(collate_batch(valid, BYTE.pad_id)))
    assert len(held) >= 5 and not seen & held
    assert seen | held == set(map(text_of, problems(range(200))))
    if not streaming:
        assert len(train) + len(valid) == 200


def test_a_stream_holds_the_same_questions_back_from_every_file(prepare, tmp_path):
    """Another file may have a question of the validation records with another answer."""
    others = [{"question": problem["question"], "answer": "?"} for problem in problems(range(400))]
    write_records(tmp_path / "z.jsonl", others)
    _, train, valid = prepare("train.jsonl", "z.jsonl", streaming=True)
    held = {valid.prompt(number) for number in range(len(valid))}
    loader = create_train_loader(train, 20, pad_id=BYTE.pad_id)
    seen = set(flat(texts_of(next(loader)) for _ in range(40)))
    assert len(held) >= 5 and not held & {text.rpartition(" ")[0] for text in seen}
    assert seen < set(map(text_of, [*others, *problems(range(200))]))
    assert sum(text.endswith(" ?") for text in seen) > 0.9 * 400
    assert sum(not text.endswith(" ?") for text in seen) == 200 - len(held)


@pytest.mark.parametrize("valid", [["valid.json"], []])
def test_a_stream_reads_a_file_of_two_corpora_as_each_of_them_does(prepare, tmp_path, valid):
    (tmp_path / "both").mkdir()
    write_records(tmp_path / "both" / "qa.jsonl", problems(range(200)))
    write(tmp_path / "both" / "zbooks.jsonl", [f"chapter {n}" for n in range(100)])
    _, train, _ = prepare("both", "both/zbooks.jsonl", mixture=[1, 1], streaming=True, valid_paths=valid)
    batch = next(create_train_loader(train, 100, pad_id=BYTE.pad_id))
    is_record = [text.startswith("Input:") for text in texts_of(batch)]
    assert 30 < sum(is_record) < 70
    assert all(IGNORE not in row for row, is_one in zip(batch["target_ids"].tolist(), is_record) if not is_one)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_has_a_json_or_says_why_not(prepare, tmp_path, streaming):
    options = {"mixture": [1, 1], "valid_paths": ["valid.json"], "streaming": streaming}
    write_records(tmp_path / "late.json", [{"about": "sums"}, *problems(range(50))])
    batch = next(create_train_loader(prepare("late.json", "text.jsonl", **options)[1], 20, pad_id=BYTE.pad_id))
    assert 5 <= sum(text.startswith("Input:") for text in texts_of(batch)) <= 15
    (tmp_path / "late.json").write_text('[{"question"')
    with pytest.raises(UserError, match=r"late\.json: no list of records with the fields question and answer, or "):
        prepare("train.jsonl", "late.json", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_of_records_and_text(prepare, streaming, capsys):
    settings = {"mixture": [3, 1], "valid_paths": ["valid.json"], "streaming": streaming}
    _, train, valid = prepare("train.jsonl", "text.jsonl", **settings)
    assert "the mixture has records, and plain text in " in capsys.readouterr().err
    assert isinstance(valid, RecordDataset) and len(valid) == 10
    assert valid.n_targets == 10 * len(" 600.")  # the answers with EOS
    loader = create_train_loader(train, 100, pad_id=BYTE.pad_id)
    batches = [next(loader) for _ in range(20)]
    texts = flat(map(texts_of, batches))
    drawn = [text for text in texts if text.startswith("Input:")]
    assert 0.74 <= len(drawn) / len(texts) <= 0.76
    assert set(drawn) == set(map(text_of, problems(range(200))))
    for text, targets in zip(texts, batches[0]["target_ids"]):
        answer = bytes(t for t in targets.tolist() if 0 <= t < 256).decode()
        assert answer == text.partition("Output:")[2] if text in drawn else answer
    held = prepare("train.jsonl", "text.jsonl", mixture=[3, 1], streaming=streaming)[2]
    assert 5 <= len(held) < 30


@pytest.mark.parametrize("streaming", [False, True])
def test_fill_in_the_middle_rearranges_the_text_of_a_mixture_and_no_record(prepare, tmp_path, streaming):
    write(tmp_path / "long.jsonl", [f"a document of a few words, number {n}" for n in range(100)])
    settings = {"mixture": [1, 1], "valid_paths": ["valid.json"], "streaming": streaming, "shuffle_buffer": 8}
    batches = []
    for rate in (1.0, 0.0):
        tokenizer, train, _ = prepare("train.jsonl", "long.jsonl", fim_rate=rate, seq_len=64, **settings)
        batches.append(next(create_train_loader(train, 40, pad_id=BYTE.pad_id)))
    rearranged, plain = ([batch[name].tolist() for name in ("input_ids", "target_ids")] for batch in batches)
    middle, n_records = BYTE.vocab_size + 2, 0
    for row, as_before in zip(zip(*rearranged), zip(*plain)):
        is_record = as_before[0][1:7] == list(b"Input:")
        assert (row == as_before) == is_record != (middle in row[0])
        n_records += is_record
    assert 15 <= n_records <= 25


def test_a_mixture_counts_bytes_per_token_by_weight(prepare):
    _, train, _ = prepare("train.jsonl", "text.jsonl", mixture=[1, 1], valid_paths=["valid.json"])
    assert isinstance(train, MixedDataset)
    records, text = train.datasets
    per_row = [records.n_targets / len(records), text.n_targets / len(text)]
    expected = (per_row[0] * records.bytes_per_token + per_row[1] * text.bytes_per_token) / sum(per_row)
    assert train.bytes_per_token == pytest.approx(expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_stream_of_records_goes_on_exactly(prepare, num_workers):
    _, train, _ = prepare(
        "train.jsonl", "text.jsonl", mixture=[3, 1], valid_paths=["valid.json"], streaming=True, shuffle_buffer=6
    )
    start = functools.partial(create_train_loader, train, 4, num_workers=num_workers)
    unbroken, states, batches = start(), [], []
    for _ in range(60):
        states.append(saved(unbroken.state_dict()))
        batches.append(next(unbroken))
    for at in (0, 1, 7, 40):
        resumed = start()
        resumed.load_state_dict(states[at])
        for expected in batches[at : at + 6]:
            batch = next(resumed)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_ranks_read_each_record_of_a_stream_once_an_epoch(prepare):
    _, train, _ = prepare("train.jsonl", valid_paths=["valid.json"], streaming=True, shuffle_buffer=4)
    ranks = [create_train_loader(train, 10, 0, rank, 2) for rank in range(2)]
    seen = flat(texts_of(next(loader)) for loader in ranks for _ in range(20))
    assert sorted(seen) == sorted(map(text_of, problems(range(200))))


def test_a_stream_drops_long_records_and_says_so(prepare, capsys):
    length = len(text_of(problems([5])[0])) + 1
    _, train, _ = prepare("train.jsonl", seq_len=length, valid_paths=["train.jsonl"], streaming=True)
    said = capsys.readouterr().err
    assert f"190 of the first 200 records are over {length} tokens: training drops such records\n" in said
    batch = next(create_train_loader(train, 10, pad_id=BYTE.pad_id))
    assert set(texts_of(batch)) == set(map(text_of, problems(range(10))))
    assert train.bytes_per_token == pytest.approx((5 * 2 + 5 * 3) / (5 * 3 + 5 * 4))
    with pytest.raises(UserError, match=r"no record fits in max_seq_len 9 tokens: raise max_seq_len"):
        prepare("train.jsonl", seq_len=9, valid_paths=["train.jsonl"], streaming=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"records": False, "question_field": "q"}, "question_field needs records true"),
        ({"train_paths": []}, "records needs train_paths"),
        ({"document_mask": True}, "document_mask is for plain text"),
        ({"packing": False}, "packing is for plain text"),
        ({"text_field": "body"}, "text_field is for plain text"),
        ({"fim_rate": 0.5}, "fim_rate is for plain text"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_records(settings, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**{"records": True, "train_paths": ["a.jsonl"], **settings})
    if settings.get("train_paths") is None and settings.get("records", True):
        DataConfig(**{"records": True, "train_paths": ["a", "b"], "mixture": [1, 1], **settings})


def test_files_without_records_are_refused(prepare, tmp_path):
    with pytest.raises(UserError, match=r"text\.jsonl has the fields question and answer, .*available fields: text"):
        prepare("text.jsonl", valid_paths=["valid.json"])
    with pytest.raises(UserError, match="none of the mixture's train_paths has the fields question and answer"):
        prepare("text.jsonl", "text.jsonl", mixture=[1, 1], valid_paths=["valid.json"])
    write_records(tmp_path / "few.jsonl", problems([1]))
    with pytest.raises(UserError, match="set --valid_paths"):
        prepare("few.jsonl")


def test_a_tokenizer_is_trained_on_records_and_text(prepare):
    options = {"tokenizer": "sentencepiece", "mixture": [1, 1], "valid_paths": ["valid.json"]}
    tokenizer, train, _ = prepare("train.jsonl", "text.jsonl", **options, vocab_size=300)
    assert max(len(tokenizer.encode(word)) for word in (" Output:", "document")) <= 4
    assert len(train.datasets[0]) == 200
