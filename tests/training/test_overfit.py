"""The overfit check: it learns records by heart, or says what is most likely wrong."""

import itertools
import random

import pytest
from texts import usual_spm, write_records
from trainers import run_settings

import train_trm_lm
from src.data.records import answer_of
from src.errors import UserError
from src.training.overfit import State, check, overfit, prepare, verdict
from src.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("unchecked")  # whole runs; the tests of the parts check annotations
SMALL = {"d_model": 32, "recursion": "none", "optimizer": "muon", "lr": 0.02, "max_seq_len": 64, "batch_size": 32}


def words(n):
    """Questions of four letters; the answer is the last letter. Chance is a quarter."""
    every = random.Random(0).sample(list(map("".join, itertools.product("abcd", repeat=4))), n)
    return [{"question": word, "answer": word[-1]} for word in every]


@pytest.fixture
def settings(tmp_path):
    """settings(rows, **changes): the settings of a check on all of these records."""

    def settings(rows, name="rows", **changes):
        path = write_records(tmp_path / f"{name}.jsonl", rows)
        data = {"records": True, "train_paths": [path], "cache_dir": str(tmp_path / "cache")}
        run = {"overfit": len(rows), "max_steps": 200, "save_dir": str(tmp_path / "run")}
        return run_settings({**SMALL, **data, **run, **changes})

    return settings


def test_it_learns_records_by_heart_and_writes_no_run(settings, tmp_path, capsys):
    rows = [*words(3), {"question": "What?", "answer": "京 is\nan answer"}, {"question": "long" * 20, "answer": "x"}]
    options = {"recursion": "trm", "latent_steps": 1, "deep_steps": 1, "lr": 1e-2, "dropout": 0.3, "weight_decay": 1.0}
    assert overfit(settings(rows, overfit=4, **options))
    said = capsys.readouterr().err
    assert "1 of 5 records dropped" in said and " nats/token, 4 of 4 answers right\n" in said
    assert said.splitlines()[-1].startswith("all 4 answers are right, after ")
    assert not (tmp_path / "run").exists()
    trainer, records = prepare(settings(rows, overfit=3))
    assert [record.question for record in records] == [row["question"] for row in rows[:3]]
    assert len(trainer.train_set) == 3 and trainer.config.batch_size == 3


def test_shuffled_labels_stay_at_chance_on_held_out_records(settings):
    rows, right = words(250), {}
    held = prepare(settings(rows[200:], "held"))
    answers = [row["answer"] for row in rows[:200]]
    shuffled = random.Random(1).sample(answers, 200)
    for name, labels in (("real", answers), ("shuffled", shuffled)):
        trainer, _ = prepare(settings([row | {"answer": a} for row, a in zip(rows, labels)], name))
        trainer.enter_stage()
        for _ in range(40):
            trainer.train_step(next(trainer.loader))
        state = check(trainer, held[0].train_set, held[1], 0.0)
        right[name] = 50 - len(state.unlearned or state.wrong)
    assert right["real"] >= 48 and right["shuffled"] <= 25, right  # at chance: 12.5, standard deviation 3


def test_what_works_against_learning_by_heart_is_left_out(settings):
    options = {"recursion": "loop", "deep_steps": 3, "dropout": 0.1, "visit_dropout": 0.5, "start_noise": 1.0}
    trainer, _ = prepare(settings(words(8), sample_depth=True, least_depth=2, **options))
    config = trainer.raw.config
    assert (config.dropout, config.visit_dropout, config.start_noise, trainer.config.sample_depth) == (0, 0, 0, False)


def test_a_learning_rate_that_is_wrong(settings, capsys):
    assert not overfit(settings(words(8), lr=1e-6, max_steps=20))
    closing = capsys.readouterr().err.splitlines()[-1]
    assert closing.startswith("the loss does not fall (") and "after 20 steps" in closing
    assert "most likely the learning rate is wrong (--lr 1e-06): try 3e-06 and 3.33333e-07" in closing


def test_a_check_that_is_too_short(settings, tmp_path, capsys):
    assert not overfit(settings(words(200), max_steps=12))
    closing = capsys.readouterr().err.splitlines()[-1]
    assert f"of 200 answers are not learned yet, such as {tmp_path / 'rows.jsonl'}:" in closing
    assert " nats/token, after 12 steps in " in closing
    assert closing.endswith("most likely it needs more steps (--max_steps)")


def test_a_loss_that_jumps():
    state = State(30, 60.0, 0.9, words(2), [])
    sentence = verdict(TrainConfig(lr=0.3), 4, [3.0, 0.5, 0.9], state)
    rose = "the loss fell to 0.50 nats/token and rose to 0.90, after 30 steps in 60 seconds"
    assert sentence == f"{rose}: most likely the learning rate is wrong (--lr 0.3): try 0.1"


def test_answers_that_the_tokenizer_cannot_write(settings, tmp_path, capsys):
    usual_spm(tmp_path)
    rows = [{"question": f"the {word}", "answer": f"{word} 7"} for word in ("cat", "hat", "dog")]
    options = {"tokenizer": "sentencepiece", "sp_model": str(tmp_path / "usual.model")}
    assert not overfit(settings(rows, **options))
    closing = capsys.readouterr().err.splitlines()[-1]
    assert closing.startswith("each token is learned, but 3 of 3 answers are wrong (")
    assert f"is generated in place of {answer_of('cat 7')!r}" in closing and "the tokenizer loses characters" in closing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"records": False}, "--overfit needs questions with answers: add --records true"),
        ({"streaming": True}, "leave out --streaming"),
        ({"mixture": [1.0]}, "leave out --mixture"),
        ({"init_from": "runs/x"}, "leave out --init_from"),
        ({"causal": False}, "leave --causal out"),
        ({"full_bptt": True, "optimizer_step": "supervision"}, "full_bptt needs one update"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, changes, said):
    with pytest.raises(UserError, match=said):
        overfit(settings(words(2), **changes))


def test_a_contradiction_is_named(settings, tmp_path):
    rows = [*words(3), {"question": words(3)[1]["question"], "answer": "x"}]
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=f"{path}:2 and {path}:4 have the same question and different answers"):
        overfit(settings(rows))


def test_the_command(tmp_path, capsys):
    path = write_records(tmp_path / "a.jsonl", words(4))
    flags = {**SMALL, "records": "true", "train_paths": path, "overfit": 4, "tokenizer": "byte", "device": "cpu"}
    flags |= {"precision": "fp32", "cache_dir": str(tmp_path), "n_heads": 2, "max_steps": 1}
    words_of = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert train_trm_lm.main(words_of) == 1
    assert "of 4 answers are not learned yet" in (said := capsys.readouterr().err) or "the loss does not fall" in said
    with pytest.raises(UserError, match="overfit is 0: set it to 1 or more, or leave it out"):
        train_trm_lm.main([*words_of, "--overfit", "0"])
