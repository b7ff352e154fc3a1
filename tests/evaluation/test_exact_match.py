"""eval_lm.py --exact_match: answers of a model that knows eight sums by heart, its tables and files, and bad input."""

import json

import numpy as np
import pytest
import torch
from texts import BYTE

import eval_lm
from src.checkpoint import load_model, save_checkpoint
from src.config import run
from src.data.records import Record, answer_of, prompt_of
from src.errors import UserError
from src.evaluation import exact_match
from src.losses import IGNORE

KNOWN = {f"{a} plus {b}": str(a + b) for a, b in [(1, 2), (3, 4), (5, 5), (9, 8), (10, 20), (31, 45), (60, 9), (99, 1)]}


def record_of(question, answer, **extra):
    return Record(question, answer, "sums.jsonl", 1, extra)


@pytest.fixture(scope="module")
def knowing(tiny):
    """A TRM that answers the questions of KNOWN after two supervision steps."""
    size = {"vocab_size": BYTE.vocab_size, "d_model": 32, "n_layers": 1, "d_ff": 64, "max_seq_len": 40}
    model = tiny(**size, latent_steps=1, deep_steps=1, supervision_steps=2, halting=False, positions="learned")
    rows = [(BYTE.encode(prompt_of(q), bos=True), [*BYTE.encode(answer_of(a)), BYTE.eos_id]) for q, a in KNOWN.items()]
    width = max(len(q) + len(a) for q, a in rows) - 1
    ids, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORE)
    for row, (q, a) in enumerate(rows):
        whole = torch.tensor([*q, *a])
        ids[row, : len(whole) - 1], targets[row, len(q) - 1 : len(whole) - 1] = whole[:-1], whole[len(q) :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    model.train()
    for _ in range(80):
        loss = model(ids, target_ids=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory, knowing, tiny):
    """A folder with checkpoints, with the eight sums, and with two records of which the model knows neither answer."""
    home = tmp_path_factory.mktemp("exact")
    save_checkpoint(home / "trm", knowing, BYTE)
    save_checkpoint(home / "none", tiny(vocab_size=BYTE.vocab_size, recursion="none", max_seq_len=40), BYTE)
    lines = [{"question": q, "answer": a} for q, a in KNOWN.items()]
    lines += [{"question": "1 plus 2", "answer": "4"}, {"question": "x" * 40, "answer": "too long"}]
    (home / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "long.jsonl").write_text(json.dumps(lines[-1]) + "\n")
    (home / "empty.jsonl").write_text("")
    return home


def start(home, *words, checkpoint="trm", paths="sums.jsonl"):
    return eval_lm.main(
        [str(home / checkpoint), "--exact_match", "--paths", str(home / paths), "--device", "cpu", *map(str, words)]
    )


def test_a_model_that_knows_the_answers(home, capsys):
    files = {name: home / f"out{suffix}" for name, suffix in (("json", ".json"), ("wrong", ".jsonl"), ("plot", ".png"))}
    start(home, *(word for name, path in files.items() for word in (f"--{name}", path)))
    head, depths, levels = capsys.readouterr().out.split("\n\n")
    assert head == "9 records, 1 skipped that exceed the context of 40 tokens"
    found = json.loads(files["json"].read_text())
    assert found["exact"][-1] == 8 / 9 and found["depths"] == [1, 2] and (found["records"], found["skipped"]) == (9, 1)
    assert depths.splitlines()[2].split() == ["2", "88.89%"]
    assert {level: f["records"] for level, f in found["by_difficulty"].items()} == {"1": 5, "2": 4}
    assert [row.split()[-1] for row in levels.splitlines()[1:]] == ["80.00%", "100.00%"]
    wrong = [json.loads(line) for line in files["wrong"].read_text().splitlines()]
    place = {"path": str(home / "sums.jsonl"), "line": 9}
    assert wrong[0] == {"question": "1 plus 2", "expected": "4", "got": "3", "depth": 2} | place
    assert len(wrong) == round(9 * (2 - sum(found["exact"])))
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_more_steps_than_in_training_and_fewer_records(home, capsys):
    start(home, "--max_recursion_depth", 3, "--max_docs", 4)
    head, depths, _ = capsys.readouterr().out.split("\n\n")
    assert head.startswith("4 records") and [row.split()[0] for row in depths.splitlines()[1:]] == ["1", "2", "3"]


def test_a_plain_model_has_one_depth(home, capsys):
    start(home, checkpoint="none")
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == ["depth  exact", "    1  0.00%"]


def answers_of(model, questions, **options):
    records = [record_of(question, "?" * 4) for question in questions]
    found, _ = exact_match.read_questions(records, BYTE, model.config.max_seq_len)
    return exact_match.answer_all(model, BYTE, found, [1, 2], 4, **options)


def test_an_answer_does_not_depend_on_its_batch(knowing):
    questions = [*KNOWN, "7 plus 7", "1234 plus 5", "what"]
    answers = answers_of(knowing, questions)
    assert answers.greedy == answers_of(knowing, questions, rows=2).greedy
    assert [text.strip() for text in answers.greedy[1][:8]] == list(KNOWN.values())
    assert answers_of(knowing, questions[::-1]).greedy[1] == answers.greedy[1][::-1]


def test_the_likeliest_sample_wins(knowing):
    """A model that knows the answer is sure of it, so that it is among the samples and is the likeliest."""
    answers = answers_of(knowing, KNOWN, best_of=4)
    assert [text.strip() for text in answers.best[1]] == list(KNOWN.values())
    unknown = answers_of(knowing, ["7 plus 7"] * 20, best_of=16).best[1]
    likeliest = answers_of(knowing, ["7 plus 7"], best_of=64, seed=1).best[1][0]
    assert unknown.count(likeliest) > 10  # a single sample is another text more often


def test_best_of_is_reported_beside_greedy(home, capsys):
    start(home, "--best_of", 2, "--json", home / "best.json")
    assert capsys.readouterr().out.split("\n\n")[1].split("\n")[0].split() == ["depth", "exact", "best", "of", "2"]
    assert len(json.loads((home / "best.json").read_text())["exact_best"]) == 2


@pytest.mark.parametrize(
    ("question", "extra", "field", "level"),
    [
        ("12 plus 345", {}, None, 3),
        ("0012 plus 3", {}, None, 2),
        ("1,200,000 plus 1", {}, None, 7),
        ("no number", {}, None, 0),
        ("0 plus 0", {}, None, 1),
        ("12 plus 345", {"difficulty": 7}, None, 7),
        ("12 plus 345", {"difficulty": float("nan")}, None, 3),
        ("12 plus 345", {"difficulty": 7, "steps": "many"}, "steps", "many"),
        ("12 plus 345", {"difficulty": [1, 2]}, None, "[1, 2]"),
    ],
)
def test_difficulty(question, extra, field, level):
    assert exact_match.difficulty_of(record_of(question, "?", **extra), field) == level


def levels_of(levels):
    questions = [exact_match.Question(record_of("?", "?"), [], 0, "", level) for level in levels]
    return {name: int(np.sum(is_in)) for name, is_in in exact_match.by_level(questions).items()}


def test_a_difficulty_without_bound_is_a_word():
    record = Record("1+1", "2", "a.jsonl", 1, {"difficulty": float("inf")})
    assert exact_match.difficulty_of(record) == "inf"


def test_groups_of_difficulty():
    assert levels_of([10, 9, 9]) == {"9": 2, "10": 1}
    assert levels_of([1234567, 1234568]) == {"1234567": 1, "1234568": 1} and levels_of([0.5]) == {"0.5": 1}
    assert levels_of(["hard", 1, "easy", "hard"]) == {"1": 1, "easy": 1, "hard": 2}
    many = levels_of([i / 100 for i in range(160)])
    assert list(many.values()) == [10] * 16 and list(many)[:2] == ["0 to 0.09", "0.1 to 0.19"]
    assert sum(levels_of([0] * 100 + list(range(40))).values()) == 140


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--paths", "{home}/empty.jsonl"], "no document in"),
        (["--paths", "{home}/long.jsonl"], "all 1 records are longer than the model's context of 40 tokens"),
        (["--paths", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--answer_field", "solution"], "solution"),
        (["--difficulty_field", "level"], "record 1 has no field 'level'; further fields: none"),
        (["--best_of", "0"], "best_of is 0"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--plot", "exact.jpg"], "ends in .png"),
        (["--wrong", "{home}/sums.jsonl"], "is also read"),
        (["--paths", "{home}", "--wrong", "{home}/sums.jsonl"], "is also read"),
        (["--text_field", "question"], "text_field is for plain text, but exact_match reads records"),
        (["--max_doc_mb", "0.000001"], "sums.jsonl: nothing usable ("),
        (["--wrong", "nowhere/wrong.jsonl"], "cannot write nowhere/wrong.jsonl"),
        (["--exit", "kl"], "answers at every fixed depth"),
        (["--stride", "4"], "without depth_curve, lm_eval, stride, max_tokens"),
        (["--exact_match", "false", "--best_of", "2"], "best_of needs exact_match"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(home, words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: start(home, *(word.format(home=home) for word in words)))
    out = capsys.readouterr()
    errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and out.out == "" and len(errors) == 1 and said in errors[0]


def test_bad_records_are_skipped_and_counted(home, tmp_path, capsys):
    (tmp_path / "mixed.jsonl").write_text('{"question": "1 plus 2", "answer": 3}\n{"question": "1 plus 2"}\nno json\n')
    start(home, paths=tmp_path / "mixed.jsonl")
    out = capsys.readouterr()
    assert out.out.startswith("1 record, 0 skipped") and "1 x broken JSON" in out.err


def test_only_causal_models_answer(tiny):
    model = tiny(causal=False, vocab_size=BYTE.vocab_size, max_seq_len=40)
    with pytest.raises((UserError, ValueError), match="causal"):
        answers_of(model, ["1 plus 2"])


def test_the_loaded_model_is_the_one_that_was_saved(home):
    model, tokenizer = load_model(home / "trm")
    questions, _ = exact_match.read_questions([record_of("1 plus 2", "3")], tokenizer, 40)
    assert exact_match.answer_all(model, tokenizer, questions, [2]).greedy == [[" 3"]]
