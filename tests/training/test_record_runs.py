"""Training on records: the validation loss is that of the answers, and a resume is exact."""

import math
import signal

import pytest
import torch
from texts import write_records
from trainers import assert_same_checkpoints, during, read_metrics

from src.losses import IGNORE
from src.runtime import Choice

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")  # whole runs; the tests of the parts check annotations


@pytest.fixture
def records(tmp_path, corpus):
    """Settings for records of additions in tmp_path."""
    problems = [{"question": f"{a} + {b}?", "answer": a + b} for a in range(12) for b in range(10)]
    paths = {"train_paths": [write_records(tmp_path / "train.jsonl", problems[:100])]}
    paths["valid_paths"] = [write_records(tmp_path / "valid.jsonl", problems[100:])]
    return {**paths, "records": True, "max_seq_len": 32, "cache_dir": corpus["cache_dir"]}


def test_the_validation_loss_is_that_of_the_answers(make, records, tmp_path):
    trainer = make(**records, max_steps=2, ema_decay=0.0, sample_tokens=3)
    figures = trainer.train()
    losses, n_bytes = [], 0
    for inputs, targets, _ in trainer.valid_set:
        with torch.no_grad():
            logprobs = trainer.raw.eval()(inputs[None]).logits[0].log_softmax(-1)
        losses += [-logprobs[t, target].item() for t, target in enumerate(targets.tolist()) if target != IGNORE]
        n_bytes += len(bytes(target for target in targets.tolist() if 0 <= target < 256))
    assert len(losses) == n_bytes + 20
    assert figures["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures["valid_bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-5)
    assert "step 2: validation" in (said := (tmp_path / "run" / "samples.txt").read_text())
    assert "Input: 10 + 0? \n Output:" in said  # the first validation question


@pytest.mark.parametrize("changes", [{}, {"streaming": True}, {"mixture": [2, 1]}, {"packing": True}], ids=str)
def test_rows_of_any_length_share_one_compiled_graph(make, records, corpus, changes, monkeypatch):
    kinds = []
    monkeypatch.setattr("src.trainer.choose_compile", lambda *_: Choice(True, "for this test"))
    monkeypatch.setattr(torch, "compile", lambda part, dynamic: kinds.append(dynamic) or part)
    text = corpus if changes.get("packing") else records
    paths = text["train_paths"] + (corpus["train_paths"] if "mixture" in changes else [])
    make(**{**text, **changes, "train_paths": paths})
    assert kinds == [text is records] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True, "shuffle_buffer": 10, "mixture": [2, 1]},
        {"mixture": [2, 1], "dropout": 0.2, "grad_accum": 2},
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights(make, records, corpus, changes):
    paths = records["train_paths"] + (corpus["train_paths"] if "mixture" in changes else [])
    settings = {**records, **changes, "train_paths": paths, "save_every": 3}
    straight = make("straight", **settings)
    straight.train()
    stopped = make("broken", **settings)
    during(stopped, 4, lambda: signal.raise_signal(signal.SIGINT))
    stopped.train()
    second = make("broken", resume=True, **settings)
    assert second.step == 4

    def die():
        raise RuntimeError("power cut")

    during(second, 7, die)
    with pytest.raises(RuntimeError):
        second.train()
    third = make("broken", resume=True, **settings)
    assert third.step == 6
    third.train()
    assert_same_checkpoints(straight.folder / "last", third.folder / "last")
    losses = [[record["loss"] for record in read_metrics(t.folder) if "loss" in record] for t in (straight, third)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
