"""Runs train_classifier.py like a user: four options, their files, and a one-line message for every mistake."""

import json

import pytest
import torch
from texts import BYTE

import train_classifier
from src.checkpoint import load_model, save_checkpoint
from src.config import run
from src.errors import UserError
from src.sampling import generate_ids
from src.tasks.classification import LlamaZeroShotClassifier, read_examples

TRAIN = "".join(f"{int(text[-1] == 'a')} ||| {text}\n" for text in "aa ab ba b abba a bb bab abb baa".split())


@pytest.fixture
def model(tiny):
    return tiny(vocab_size=BYTE.vocab_size, n_layers=1, supervision_steps=2, max_seq_len=48)


@pytest.fixture
def home(tmp_path, model, monkeypatch):
    save_checkpoint(tmp_path / "trm", model, BYTE)
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "names.json").write_text('["no", "yes"]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words):
    return train_classifier.main(["trm", "--device", "cpu", *map(str, words)])


def test_generate(home, model, capsys):
    before = sorted(home.iterdir())
    start("--option", "generate", "--prompt", "ab", "--max_new_tokens", 9)
    out, outs = capsys.readouterr().out, ["low_temp_out", "low.txt", "high_temp_out", "high.txt"]
    assert sorted(home.iterdir()) == before  # no unrequested files
    words = [word if "." in word else f"--generated_sentence_{word}" for word in outs]
    start("--option", "generate", "--prompt", "ab", "--max_new_tokens", 9, *words)
    assert capsys.readouterr().out == out
    ids = torch.tensor([BYTE.encode("ab", bos=True)])
    for temperature in (0, 1):
        row = generate_ids(model, ids, 9, temperature=float(temperature), seed=0, eos_id=BYTE.eos_id)[0].tolist()
        row = row[: row.index(BYTE.eos_id)] if BYTE.eos_id in row else row
        text = (home / ("low.txt", "high.txt")[temperature]).read_text()
        assert text == BYTE.decode(row) + "\n" and f"temperature {temperature}: {text}" in out


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "ab"], ["prompt", "--dev", "train.txt", "--label_names", "names.json"]]
)
def test_precision_counts_for_every_option(home, monkeypatch, words):
    dtypes = []

    def load(*args):
        dtypes.append(args[2])
        return load_model(*args)

    monkeypatch.setattr(train_classifier, "load_model", load)
    start("--option", *words, "--precision", "bf16")
    assert dtypes == [torch.bfloat16]


def test_prompt(home, model, capsys):
    start("--option", "prompt", "--dev", "train.txt", "--label_names", "names.json", "--dev_out", "out.txt")
    out = capsys.readouterr().out
    examples = read_examples("train.txt", ["no", "yes"])
    scores = LlamaZeroShotClassifier(model, BYTE, ["no", "yes"])([example.text for example in examples])
    answers = [answer.label for answer in read_examples("out.txt", ["no", "yes"])]
    assert answers == scores.argmax(-1).tolist()
    right = sum(answer == example.label for answer, example in zip(answers, examples)) / 10
    assert f"dev: 10 texts, accuracy {right:.4f}" in out and f"{right:.4f}\n" in out.split("by recursion step: ")[1]


def test_finetune_then_predict(home, capsys):
    flags = ["--train", "train.txt", "--dev", "train.txt", "--test", "train.txt", "--label_names", "names.json"]
    flags += ["--epochs", 12, "--batch_size", 4, "--dropout", 0, "--lr", 3e-3, "--save_dir", "run"]
    start("--option", "finetune", *flags)
    out = capsys.readouterr().out
    assert out.startswith("dev: 10 texts, accuracy 1.0000, macro F1 1.0000\naccuracy by recursion step: ")
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("no ", "yes "))]
    assert rows == [["no", "1.000", "1.000", "1.000", "5", "5"], ["yes", "1.000", "1.000", "1.000", "5", "5"]] * 2
    folder = home / "run"
    assert (folder / "dev_out.txt").read_text() == (folder / "test_out.txt").read_text() == TRAIN
    assert (folder / "dev_confusion.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.out.tfevents.*"))
    judged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in judged if "valid_accuracy" in line] == list(range(1, 13))
    (home / "new.jsonl").write_text('{"label": "yes", "text": "abaa"}\n{"label": 0, "text": "aab"}\n')
    train_classifier.main(["run", "--option", "predict", "--test", "new.jsonl", "--test_out", "new_out.txt"])
    assert (home / "new_out.txt").read_text() == "1 ||| abaa\n0 ||| aab\n"
    assert "test: 2 texts, accuracy 1.0000" in capsys.readouterr().out


def test_names_out_of_the_training_texts(home, capsys):
    start("--option", "finetune", "--train", "train.txt", "--epochs", 1, "--save_dir", "run")
    assert json.loads((home / "run" / "best" / "config.json").read_text())["info"]["labels"] == ["0", "1"]
    assert capsys.readouterr().out == ""  # without dev and test there is nothing to report


def tiny_run(*words):
    """Fine-tunes until the model has memorized a few texts."""
    start("--option", "finetune", "--epochs", 12, "--batch_size", 4, "--dropout", 0, "--lr", 3e-3, *words)


@pytest.mark.parametrize("labels", ["-1 0 1", "404 500"])
def test_answers_are_in_the_users_own_labels_and_read_back(home, labels, capsys):
    """The answers of a fine-tuned model can be used as data, and the model predicts all of them right."""
    labels = labels.split()
    rows = [f"{label} ||| {'abc'[i] * (n + 1)}\n" for i, label in enumerate(labels) for n in range(4)]
    (home / "own.txt").write_text("".join(rows))
    tiny_run("--train", "own.txt", "--dev", "own.txt", "--save_dir", "run")
    assert (home / "run" / "dev_out.txt").read_text() == "".join(rows)
    assert json.loads((home / "run" / "best" / "config.json").read_text())["info"]["labels"] == labels
    capsys.readouterr()
    for out in ("again.txt", "again.tsv", "again.jsonl"):
        train_classifier.main(["run", "--option", "predict", "--dev", "run/dev_out.txt", "--dev_out", out])
        train_classifier.main(["run", "--option", "predict", "--dev", out])
        assert capsys.readouterr().out.count(f"dev: {len(rows)} texts, accuracy 1.0000") == 2


def test_numbers_mean_what_the_user_says(home, capsys):
    """Names found in the texts have no order, so numbers in other texts need --label_names."""
    words = (home / "train.txt").read_text().replace("1 |||", "good |||").replace("0 |||", "poor |||")
    (home / "words.txt").write_text(words)
    tiny_run("--train", "words.txt", "--save_dir", "run")
    (home / "order.json").write_text('["poor", "good"]')  # sorted, it is the other way round
    predict = ["run", "--option", "predict", "--dev", "train.txt"]
    with pytest.raises(UserError, match="label '1' is not one of good, poor: say what the numbers mean"):
        train_classifier.main(predict)
    capsys.readouterr()
    train_classifier.main([*predict, "--label_names", "order.json", "--dev_out", "out.txt"])
    train_classifier.main(["run", "--option", "predict", "--dev", "words.txt"])
    by_number, by_name = (line for line in capsys.readouterr().out.splitlines() if line.startswith("dev:"))
    assert by_number == by_name
    assert {line.split(" ||| ")[0] for line in (home / "out.txt").read_text().splitlines()} <= {"0", "1"}
    (home / "other.json").write_text('["poor", "fine"]')
    with pytest.raises(UserError, match="other.json: the classifier knows other labels: good, poor"):
        train_classifier.main([*predict, "--label_names", "other.json"])


def test_predict_takes_texts_without_labels(home, capsys):
    tiny_run("--train", "train.txt", "--label_names", "names.json", "--save_dir", "run")
    (home / "new.txt").write_text("abaa\naab\n")
    capsys.readouterr()
    train_classifier.main(["run", "--option", "predict", "--test", "new.txt", "--test_out", "answers.txt"])
    assert (home / "answers.txt").read_text() == "yes ||| abaa\nno ||| aab\n"
    captured = capsys.readouterr()
    assert captured.out == "" and "test: 2 texts without labels" in captured.err
    train_classifier.main(["run", "--option", "predict", "--test", "new.txt"])
    assert capsys.readouterr().out == "yes ||| abaa\nno ||| aab\n"  # printed if no output file is given
    start("--option", "prompt", "--test", "new.txt", "--label_names", "names.json", "--test_out", "answers.txt")
    assert [line.split(" ||| ")[1] for line in (home / "answers.txt").read_text().splitlines()] == ["abaa", "aab"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--option", "finetune", "--train", "bare.txt"], "bare.txt, line 1: there is no ` ||| `"),
        (["--option", "finetune", "--train", "train.txt", "--dev", "bare.txt"], "bare.txt, line 1: there is no"),
        (["--option", "prompt", "--dev", "train.txt"], "option prompt needs --label_names"),
        (["--option", "prompt", "--label_names", "names.json"], "needs texts: give --dev or --test"),
        (["--option", "finetune"], "option finetune needs --train"),
        (["--option", "finetune", "--train", "none.txt"], "none.txt: no such file"),
        (["--option", "finetune", "--train", "train.txt", "--label_names", "train.txt"], "train.txt is broken JSON"),
        (["--option", "finetune", "--train", "train.txt", "--dev", "other.txt"], "line 2: label '7' is not one of"),
        (["--option", "finetune", "--train", "train.txt", "--test", "other.txt"], "line 2: label '7' is not one of"),
        (["--option", "finetune", "--train", "train.txt", "--epochs", "0"], "epochs is 0"),
        (["--option", "finetune", "--train", "train.txt", "--save_dir", "train.txt/run"], "cannot write to save_dir"),
        (["--option", "predict", "--test", "train.txt"], "is not a classifier (no classifier.safetensors)"),
        (["--option", "generate", "--prompt", "x" * 60], "the prompt has 61 tokens, the context holds 48"),
        (["--option", "finetune", "--train", "train.txt", "--test_out", "./train.txt"], "./train.txt is also read"),
        (["--option", "prompt", "--label_names", "a", "--dev", "b", "--dev_out", "c", "--test_out", "c"], "c is also"),
        (["--option", "finetune", "--train", "train.txt", "--seed", str(2**63)], "seed from 0 to 2^63 - 1"),
        (["--option", "guess"], "--option guess: expected one of"),
        (["--option", "generate", "--dev_out", "none/out.txt"], "dev_out none/out.txt: its folder does not exist"),
        (["--option", "generate", "--test_out", "out.tsv.gz"], "test_out is out.tsv.gz, but the file is not"),
        (["--epoch", "3"], "did you mean --epochs"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_code_2(home, capsys, words, said):
    (home / "bare.txt").write_text("a\nb\n")
    (home / "other.txt").write_text("1 ||| a\n7 ||| b\n")
    with pytest.raises(SystemExit) as caught:
        run(lambda: start(*words))
    err = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and said in err[-1] and err[-1].startswith("error: ")
    assert not any(line.startswith("Traceback") for line in err)
