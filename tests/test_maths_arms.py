"""experiments/maths.py: its additions, its files, the arms of equal FLOPs, its tables, and a whole tiny comparison."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import arms, maths  # noqa: E402
from src.data.records import answer_of, prompt_of, read_records  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.metrics import flops_per_token  # noqa: E402
from src.model import TRMConfig  # noqa: E402

FORM = {"low": 1, "high": 4, "width": 5, "order": "normal", "seed": 0}


@pytest.mark.parametrize(
    ("order", "question", "answer"),
    [
        ("normal", "00007+00995", "001002"),
        ("answer", "00007+00995", "200100"),
        ("reversed", "70000+59900", "200100"),
    ],
)
def test_an_addition(order, question, answer):
    levels = {"difficulty": 3, "carries": 3}
    assert maths.addition(7, 995, 5, order) == {"question": question, "answer": answer} | levels


@pytest.mark.parametrize(
    ("a", "b", "columns"), [(1, 1, 0), (15, 15, 1), (445, 555, 3), (55, 55, 1), (99, 0, 0), (5095, 905, 3), (0, 0, 0)]
)
def test_the_longest_carry(a, b, columns):
    assert maths.longest_carry(a, b) == columns


def test_additions_for_training_and_for_tests_have_nothing_in_common():
    train, test = (list(maths.additions(500, **FORM, tests=tests)) for tests in (False, True))
    questions = {record["question"] for record in train}
    assert len(questions) == 500 and not questions & {record["question"] for record in test}
    for record in train + test:
        a, b = record["question"].split("+")
        assert int(record["answer"]) == int(a) + int(b) and len(a) == len(b) == 5 and len(record["answer"]) == 6
        assert record["difficulty"] == len(str(max(int(a), int(b))))
    assert {record["difficulty"] for record in train} == {1, 2, 3, 4}
    assert list(maths.additions(500, **FORM, tests=True)) == test


def test_additions_end_when_there_are_no_more():
    few = FORM | {"high": 1}
    train, test = (list(maths.additions(500, **few, tests=tests)) for tests in (False, True))
    pairs = [tuple(sorted(map(int, record["question"].split("+")))) for record in train + test]
    assert len(set(pairs)) == len(pairs) == 55  # a + b and b + a are one addition


def config_of(tmp_path, **changes):
    return maths.MathsConfig(**{"digits": 3, "n_train": 200, "n_test": 20, "output": str(tmp_path)} | changes)


def test_the_files_of_additions(tmp_path):
    data = maths.prepare(config_of(tmp_path))
    rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in data}
    assert {name: len(part) for name, part in rows.items()} == {"train": 180, "valid": 20, "test": 20, "beyond": 20}
    assert {record["difficulty"] for record in rows["beyond"]} == {4, 5}
    assert maths.prepare(config_of(tmp_path, beyond=0)).beyond is None


def test_other_data_in_the_folder_of_a_comparison(tmp_path):
    maths.prepare(config_of(tmp_path))
    (tmp_path / "runs.jsonl").write_text("")
    assert maths.prepare(config_of(tmp_path)).test == tmp_path / "test.jsonl"
    with pytest.raises(UserError, match="had other records: choose another output"):
        maths.prepare(config_of(tmp_path, order="reversed"))


def test_records_in_files(tmp_path, capsys):
    lines = [json.dumps({"question": f"{i} cats", "answer": str(i), "difficulty": i % 3, "id": i}) for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:4]))
    paths = {"train_paths": [str(tmp_path / "all.jsonl")], "test_paths": [str(tmp_path / "some.jsonl")]}
    data = maths.prepare(config_of(tmp_path / "out", **paths))
    train, valid, test = ([json.loads(line) for line in p.read_text().splitlines()] for p in data[:3])
    assert data.beyond is None and (len(train), len(valid), len(test)) == (33, 3, 4)
    assert sorted(int(r["answer"]) for r in train + valid) == list(range(4, 40))
    assert test[2] == {"question": "2 cats", "answer": "2", "difficulty": 2}
    assert "4 training records left out" in capsys.readouterr().err


def test_plain_flops_counts_visits_without_gradient():
    """Two of three visits per cycle ... with deep_steps 3, only the last of three cycles carries gradient."""
    size = {"vocab_size": 20, "max_seq_len": 8, "d_model": 64, "n_heads": 2, "n_layers": 2, "halting": False}
    recipe = TRMConfig(**size, latent_steps=2, deep_steps=3, supervision_steps=2)
    # per supervision step: 6 layer visits with gradient, which cost 6 FLOPs per weight, and 12 without, which cost 2
    assert arms.arm_flags("plain-flops", recipe, 4)["n_layers"] == 6 + 12 // 3
    assert arms.arm_flags("plain-flops", recipe, 4, steps_per_update=2)["n_layers"] in (20, 21)
    plain = arms.changed(recipe, arms.arm_flags("plain-flops", recipe, 4, 2))
    assert flops_per_token(plain).train == pytest.approx(flops_per_token(recipe).train, rel=0.03)


def test_the_shipped_recipe_is_one_of_this_script(tmp_path):
    data = maths.prepare(config_of(tmp_path, digits=10))
    settings = maths.recipe_of(config_of(tmp_path), data)
    assert settings.model.recursion == "trm" and settings.model.vocab_size == 259
    records = read_records([str(data.beyond)])
    longest = max(len(prompt_of(r.question) + answer_of(r.answer)) for r in records)
    assert longest + 1 <= settings.model.max_seq_len  # BOS; EOS is only a target


def test_tables():
    run = {"arm": "trm", "changes": {"lr": 0.004}, "is_sweep": False, "updates": 1000, "seconds": 60.0}
    run |= {"parameters": 86_400, "flops_per_token": 4_820_000, "likelihood": -0.1, "trained_steps": 2}
    found = {"by_step": [0.5, 0.75], "by_difficulty": {"1": 1.0, "2": 0.5}}
    runs = [
        run | found | {"seed": seed, "exact": 0.7 + 0.1 * seed, "beyond": found | {"exact": 0.25}} for seed in (1, 0)
    ]
    seeds, levels, depths = maths.tables(runs).split("\n\n")
    row = "| trm | 86.4K | 4.82 | 0.004 | 1,000 | 0.750 ± 0.071 | 0.250 | 0.700, 0.800 |"
    assert seeds.splitlines()[2] == row
    assert levels.splitlines()[0::2] == [
        "| difficulty | 1 | 2 | beyond: 1 | beyond: 2 |",
        "| trm | 1.000 | 0.500 | 1.000 | 0.500 |",
    ]
    assert depths.splitlines()[2:] == ["| exact | 0.500 | 0.750 |", "| beyond | 0.500 | 0.750 |"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--digits", "0"], "digits is 0"),
        (["--beyond", "-1"], "beyond is -1: set it to 0 or more"),
        (["--train_paths", "a.jsonl"], "give both"),
        (["--train_paths", "nowhere.jsonl", "--test_paths", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--arms", "llama"], "choose from trm"),
        (["--n_train", "20", "--recipe", "configs/demo.yaml"], "records true"),
        (["--n_train", "20", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        maths.main([*words, "--n_test", "10", "--output", str(tmp_path)])


@pytest.mark.slow
def test_a_comparison_of_equal_flops_continues_where_it_stopped(tmp_path, capsys):
    small = "d_model=16 n_heads=2 batch_size=8 compile=false eval_every=100000 precision=fp32".split()
    words = ["--digits", "1", "--beyond", "1", "--n_train", "60", "--n_test", "10", "--equal_flops", "6"]
    words += ["--lrs", "0.004", "--seeds", "0", "--output", str(tmp_path), "--overrides", *small]
    maths.main([*words, "--arms", "trm"])
    first = (tmp_path / "runs.jsonl").read_text()
    maths.main([*words, "--arms", "trm", "trm-1", "plain-flops"])
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert (tmp_path / "runs.jsonl").read_text().startswith(first) and len(runs) == 3
    effort = [run["updates"] * run["flops_per_token"] for run in runs]
    assert runs[0]["updates"] == 6 and effort == pytest.approx([effort[0]] * 3, rel=0.05)
    assert [len(run["by_step"]) for run in runs] == [8, 2, 1] and set(runs[0]["beyond"]["by_difficulty"]) == {"2"}
    assert "| plain-flops |" in capsys.readouterr().out
