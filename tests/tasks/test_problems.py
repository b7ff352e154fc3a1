"""make_problems.py: right answers, distinct questions, disjoint sets, and one clear line for every mistake."""

import json
import sys

import numpy as np
import pytest

import make_problems
from src.config import run
from src.data.records import read_records
from src.errors import UserError
from src.tasks import problems
from src.tasks.problems import OWN, count_distinct, draw, key_of


def make(path, *words):
    make_problems.main([*map(str, words), "--output", str(path)])
    return list(read_records([path]))


@pytest.mark.parametrize("is_reversed", [False, True])
def test_sums_are_right_and_lengths_equally_frequent(is_reversed):
    problems = draw("addition", 4000, 1, 4, np.random.default_rng(0), is_reversed)
    lengths = []
    for question, answer, _, difficulty in problems:
        a, b = question.split(" + ")
        assert int(answer[::-1] if is_reversed else answer) == int(a) + int(b) and str(int(a)) == a
        assert difficulty == max(len(a), len(b))
        lengths += [len(a), len(b)]
    counts = np.bincount(lengths, minlength=5)[1:]
    assert abs(counts - 2000).max() < 6 * np.sqrt(8000 * 0.25 * 0.75)  # six standard deviations


def test_parity_copy_and_reverse():
    rng = np.random.default_rng(0)
    for name, right in (("parity", lambda w: str(int(w, 2).bit_count() % 2)), ("copy", str), ("reverse", None)):
        for question, answer, _, difficulty in draw(name, 100, 2, 5, rng):
            word = question.removeprefix(f"{name} ")
            assert answer == (right(word) if right else "".join(reversed(word))) and difficulty == len(word)


def test_all_problems_of_a_small_task_are_found_once(tmp_path):
    records = make(tmp_path / "all.jsonl", "addition", "--max_digits", 1, "--size", 55)
    assert {key_of(f"{a} + {b}") for a in range(10) for b in range(10)} == {key_of(r.question) for r in records}
    assert len(records) == count_distinct("addition", 1, 1) == 55


def test_excluded_questions_are_left_out_in_both_orders(tmp_path, capsys):
    train = make(tmp_path / "train.parquet", "addition", "--max_digits", 1, "--size", 40)
    test = make(
        tmp_path / "test.jsonl", "addition", "--max_digits", 1, "--size", 15, "--exclude", tmp_path / "train.parquet"
    )
    assert not {key_of(r.question) for r in train} & {key_of(r.question) for r in test}
    assert train[0].extra["difficulty"] == 1 and json.loads(train[0].extra["metadata"])["digits"] == [1, 1]
    assert "40 problems; removed: " in capsys.readouterr().err


def test_white_space_around_a_question_does_not_matter():
    assert key_of("What is it?\n") == key_of("What is it?") != key_of("What is it ?")
    selection = problems.Distinct([key_of("a")])
    given = [problems.Problem(f"{name}\n", "1", {}, None) for name in "abcd"]
    found = selection.take(iter([given[0], None, given[1], None, given[2], given[3]]), 2)
    assert [problem.question for problem in found] == ["b\n", "c\n"]
    assert (selection.drawn, selection.left_out) == (5, 1)  # so the next seed is that of d


def test_mistakes(tmp_path):
    (tmp_path / "old.jsonl").write_text("kept")
    for words, said in [
        (["addition", "--size", "56", "--max_digits", "1"], "has only 55 problems"),
        (["addition", "--output", str(tmp_path / "x.csv")], "ends in .parquet or .jsonl"),
        (["parity", "--set", "a=1"], "tasks of reasoning-gym"),
        (["chain_sum", "--max_digits", "1"], "are for addition, .*: chain_sum has options, see set"),
        (["addition", "--output", str(tmp_path / "old.jsonl")], "exists"),
    ]:
        with pytest.raises(UserError, match=said):
            make_problems.main(["--output", str(tmp_path / "x.jsonl"), *words])
    assert (tmp_path / "old.jsonl").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_tasks_of_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    words = ["chain_sum", "--size", 20, "--terse", "true", "--set", "min_terms=3", "max_terms=3"]
    for record in make(tmp_path / "sums.jsonl", *words):
        first, *rest = record.question.replace("- ", "-").replace("+ ", "").split()
        assert int(record.answer) == int(first) + sum(map(int, rest)) and record.extra["difficulty"] == 3
    for record in make(tmp_path / "boards.parquet", "mini_sudoku", "--size", 5, "--terse", "true"):
        assert all(q in ("_", a) for q, a in zip(record.question.split(), record.answer.split(), strict=True))
        assert record.question.split().count("_") == record.extra["difficulty"]
    for words, said in [
        (["chain_smu"], "did you mean chain_sum"),
        (["propositional_logic"], "several answers, and none is given: choose another task"),
        (["chain_sum", "--set", "x=1"], "no such option"),
        (["maze", "--set", "max_grid_size=6", "min_dist=30", "max_dist=31"], "makes none of 20 items"),
        (
            ["caesar_cipher", "--terse", "true"],
            "--terse: caesar_cipher has no short form; the tasks with one are mini_",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            make(tmp_path / "x.jsonl", *words)


def test_items_that_a_generator_gives_up_on_are_skipped(capsys):
    class Items(list):
        def __getitem__(self, number):
            if number % 2:
                raise RuntimeError("no path found")
            return number

    assert list(problems._made("maze", Items(), 50)) == [n if n % 2 == 0 else None for n in range(50)]
    assert capsys.readouterr().err == "maze: item 1 cannot be made (no path found), skipped; so are others\n"


def test_without_reasoning_gym_its_tasks_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit) as caught:
        run(lambda: make(tmp_path / "x.jsonl", "chain_sum"))
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and not list(tmp_path.iterdir())
    assert (
        line.startswith("error: chain_sum is no task of this project (") and "run pip install reasoning-gym==" in line
    )
    make_problems.main(["--list", "true"])
    assert capsys.readouterr().out.split() == list(OWN)
