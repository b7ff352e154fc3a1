"""Training windows with retrieved code: their tokens, targets and choices, resume, and settings that are refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import train_trm_lm
from src.config import build
from src.data.token_store import tokenize_corpus
from src.dataset import MixedDataset, PackedDataset
from src.errors import UserError
from src.losses import IGNORE
from src.rag.dataset import RAGDatasetWrapper
from src.rag.index import open_retriever
from src.rag.pipeline import build_rag
from src.rag.retriever import fit_context
from src.tokenizer import ByteLevelTokenizer
from src.training.rag_config import RagConfig
from tests.scripts import SMALL

TOKENIZER = ByteLevelTokenizer()
SEQ, CONTEXT = 192, 96


def module(n):
    return "".join(f"def shape_{n}_{i}(width_{n}):\n    return width_{n} * {i} + offset_{n}\n\n\n" for i in range(6))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of documents and of other files to retrieve from, store of the documents, retriever)."""
    folder = tmp_path_factory.mktemp("rag")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": module(n)}) + "\n" for n in range(4)))
    (folder / "lib").mkdir()
    for n in range(4):
        (folder / "lib" / f"use_{n}.py").write_text(f"def use_{n}(width_{n}):\n    print(width_{n}, offset_{n})\n" * 4)
    (folder / "lib" / "copy_2.py").write_text(module(2).replace("* 3", "* 4"))
    store = tokenize_corpus(folder / "docs.jsonl", TOKENIZER, cache_dir=str(folder / "cache"))
    return folder, store, open_retriever([folder / "lib"], cache_dir=folder / "cache", report=False)


def wrapped(made, seed=0, **changes):
    data = PackedDataset(made[1], SEQ, bos_eos=(TOKENIZER.bos_id, TOKENIZER.eos_id))
    config = RagConfig(**({"context_tokens": CONTEXT, "query_tokens": 60} | changes))
    return RAGDatasetWrapper(data, made[2], TOKENIZER, config, seed)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_every_token_is_a_target_once_and_context_never(threshold, made):
    data, store = wrapped(made, threshold=threshold), made[1]
    targets = []
    for sample in data:
        assert len(sample.input_ids) == len(sample.target_ids) == SEQ and sample.attention_mask is None
        counted = sample.target_ids != IGNORE
        targets += sample.target_ids[counted].tolist()
        first = int(counted.nonzero()[0])
        assert counted[first:].all(), "the targets of a window are one run at its end"
    retrieved_first = len(data[0].target_ids) - int((data[0].target_ids != IGNORE).sum())
    assert targets == store[1 + retrieved_first : len(store)].tolist()
    assert retrieved_first == 0 if threshold == 1 else retrieved_first <= CONTEXT


def test_a_window_is_the_retrieved_code_and_then_the_files_own_past(made):
    data, store = wrapped(made), made[1]
    n_retrieved = 0
    for number, sample in enumerate(data):
        start = min(number * (SEQ - CONTEXT), len(store) - 1 - SEQ)
        n = next(n for n in range(CONTEXT + 1) if sample.input_ids[n:].tolist() == inputs(store, start + n, start))
        assert sample.target_ids[CONTEXT:].max() < 256 or TOKENIZER.eos_id in sample.target_ids
        n_retrieved += n > 0
        if n:
            text = TOKENIZER.decode(sample.input_ids[:n].tolist())
            assert text.endswith("# ---- current file ----\n") and ("print(" in text or "def " in text)
    assert n_retrieved == sum(bool(texts) for texts in data.chunks) > len(data) // 2
    assert f"{100 * n_retrieved / len(data):.0f} % of them" in str(data)


def inputs(store, first, start):
    ids = store[first : start + SEQ]
    return np.where(ids == TOKENIZER.eos_id, TOKENIZER.bos_id, ids).tolist()


def test_below_the_threshold_a_window_is_an_ordinary_one(made):
    data = wrapped(made, threshold=1.0)
    assert not any(data.chunks) and np.nanmax(data.scores) > 0.2
    for number in range(len(data)):
        start = min(number * (SEQ - CONTEXT), len(made[1]) - 1 - SEQ)
        assert data[number].input_ids.tolist() == inputs(made[1], start, start)


def test_near_copies_of_a_document_are_not_retrieved(made):
    data, store = wrapped(made, threshold=0.0), made[1]
    assert data.near_copies == 1 and "1 files are near copies" in str(data)
    positions = [CONTEXT + number * data.step for number in range(len(data.chunks))]
    seen = [texts for p, texts in zip(positions, data.chunks) if store.documents_of(p + 1, p + 2)[0] == 2]
    assert any(seen) and not any("shape_2" in text for texts in seen for text in texts)


def test_the_query_ends_before_the_first_target(made, monkeypatch):
    (store, retriever), asked = made[1:], []
    monkeypatch.setattr(retriever, "retrieve", lambda queries, k, excluded: asked.extend(queries) or [])
    RAGDatasetWrapper(
        PackedDataset(store, SEQ), retriever, TOKENIZER, RagConfig(context_tokens=CONTEXT, query_tokens=60)
    )
    expected = []
    for at in range(CONTEXT, len(store) - 1, SEQ - CONTEXT):
        ends = [end for end in store.doc_ends.tolist() if end <= at + 1]
        expected.append(TOKENIZER.decode(store[max([at - 59, *ends]) : at + 1].tolist()))
    assert asked == [query for query in expected if query] and len(asked) >= 5


def test_windows_depend_on_seed_and_number_alone(made):
    half = wrapped(made, share=0.5)
    again, other = wrapped(made, share=0.5), wrapped(made, seed=1, share=0.5)
    for number in reversed(range(len(half))):
        assert torch.equal(half[number].input_ids, again[number].input_ids)
    assert half.chunks == again.chunks != other.chunks
    assert 0 < sum(map(bool, half.chunks)) < sum(map(bool, wrapped(made).chunks))


def test_another_length_uses_the_same_choices(made):
    data = wrapped(made)
    longer = data.with_seq_len(SEQ + 40)
    assert longer.seq_len == SEQ + 40 and longer.chunks is data.chunks
    targets = [t for sample in longer for t in sample.target_ids[sample.target_ids != IGNORE].tolist()]
    assert targets == made[1][len(made[1]) - len(targets) : len(made[1])].tolist()
    assert len(data.with_seq_len(SEQ)) == len(data)
    with pytest.raises(UserError, match="context_tokens is 96"):
        data.with_seq_len(CONTEXT)
    with pytest.raises(IndexError):
        data[len(data)]


def test_build_rag_wraps_each_corpus_and_refuses_other_data(made):
    folder, store, _ = made
    config = RagConfig(paths=[str(folder / "lib")], context_tokens=CONTEXT)
    retrieval = build_rag(config, folder / "cache")
    mixed = retrieval.wrap(MixedDataset([PackedDataset(store, SEQ)] * 2, [1, 3]), TOKENIZER)
    assert all(isinstance(each, RAGDatasetWrapper) for each in mixed.datasets) and mixed.weights == [1, 3]
    assert mixed.with_seq_len(SEQ + 8).bytes_per_token == pytest.approx(store.n_bytes / (len(store) - 1))
    with pytest.raises(UserError, match="leave out --streaming, --document_mask"):
        retrieval.wrap(PackedDataset(store, SEQ, segment=True), TOKENIZER)
    with pytest.raises(UserError, match="context_tokens"):
        retrieval.wrap(PackedDataset(store, CONTEXT), TOKENIZER)
    assert len(retrieval.fingerprint) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 0}, {"context_tokens": 0}, {"threshold": 1.5}, {"share": -1.0}, {"method": "checkpoint"}, {"chunks": 3}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(RagConfig, wrong, "rag: ")


def test_the_context_is_what_generation_writes(made):
    """Training encodes the chunks as generate.py does."""
    data = wrapped(made)
    number = next(n for n, texts in enumerate(data.chunks) if texts)
    text = fit_context(TOKENIZER, data.chunks[number], CONTEXT).text + "# ---- current file ----\n"
    assert TOKENIZER.decode(data[number].input_ids.tolist()).startswith(text)


def test_a_run_with_rag_resumes_exactly(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("src.training.monitor.plot_learning_curve", lambda *args: None)  # takes seconds
    folder = made[0]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text((folder / "lib" / "use_0.py").read_text())
    words = [*SMALL, "--train_paths", str(folder / "docs.jsonl"), "--valid_paths", str(folder / "docs.jsonl")]
    words += ["--cache_dir", str(folder / "cache"), "--max_seq_len", "128", "--save_every", "2", "--eval_every", "4"]
    words += ["--rag.paths", str(tmp_path / "lib"), "--rag.context_tokens", "64", "--sample_tokens", "0"]
    words += ["--rag.threshold", "0.1", "--keep_checkpoints", "4", "--monitoring.tensorboard", "false"]

    def train(name, *more):
        train_trm_lm.main([*words, "--save_dir", str(tmp_path / name), *more])
        return (tmp_path / name / "last" / "model.safetensors").read_bytes()

    whole = train("whole", "--max_steps", "4")
    assert "with retrieved code" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "whole" / "step_00000004")
    for link in ("last", "best"):
        (tmp_path / "whole" / link).unlink()
    assert train("whole", "--max_steps", "4", "--resume") == whole
    assert train("without", "--max_steps", "4", "--rag.threshold", "1.0") != whole
    shutil.rmtree(tmp_path / "whole" / "step_00000004")
    (tmp_path / "lib" / "b.py").write_text("other = 1\n")
    with pytest.raises(UserError, match=r"retrieved files added: b\.py"):
        train("whole", "--max_steps", "4", "--resume")
