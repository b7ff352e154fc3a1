"""Runs eval_lm.py like a user: tables, files, exit rules, and a one-line message for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from texts import BYTE, usual_spm, write

import eval_lm
from src.checkpoint import save_checkpoint
from src.config import run
from src.data.corpus import stdlib_files
from src.errors import UserError
from src.evaluation.scoring import score_corpus
from src.exits import ExitRule

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x\n", "東京は夜の七時。"]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(vocab_size=BYTE.vocab_size, n_layers=1, latent_steps=1, supervision_steps=3)


@pytest.fixture(scope="module")
def home(tmp_path_factory, model, tiny):
    """A folder with checkpoints of a TRM, a loop and a plain transformer, and with texts."""
    home = tmp_path_factory.mktemp("eval")
    save_checkpoint(home / "trm", model, BYTE)
    for family in ("loop", "none"):
        save_checkpoint(home / family, tiny(vocab_size=BYTE.vocab_size, n_layers=1, recursion=family), BYTE)
    write(home / "texts.jsonl", TEXTS)
    (home / "empty.jsonl").write_text("")
    return home


def start(home, *words, checkpoint="trm", paths="texts.jsonl"):
    paths = ["--paths", str(home / paths)] if paths else []
    return eval_lm.main([str(home / checkpoint), *paths, "--device", "cpu", *map(str, words)])


def rows_of(table):
    """Returns the cells of a table's rows, without its header."""
    return [line.split() for line in table.splitlines()[1:]]


def test_more_steps_than_in_training(home, capsys):
    start(home, "--max_recursion_depth", 6, "--max_tokens", 20)
    out = capsys.readouterr().out
    assert out.endswith("mean recursion depth 6.00 of 3 trained, 24.00 visits per token, 100.0% more visits\n")


def test_tables_and_json(home, model, capsys):
    start(home, "--json", home / "found.json", "--batch_size", 2, "--stride", 5)
    out = capsys.readouterr().out
    expected = score_corpus(model, BYTE, TEXTS, stride=5, per_step=True)
    head, table, depth = out.split("\n\n")
    assert head == "3 documents, 91 tokens, 91 bytes, 75 characters"
    assert [row[:3] for row in rows_of(table)] == [
        [str(step), f"{f.loss:.4f}", f"{f.bits_per_byte:.4f}"] for step, f in enumerate(expected.steps, 1)
    ]
    last = expected.figures
    line, depth = depth.split("\n", 1)
    per_word = f"perplexity {last.word_perplexity:,.6g} per word or line end"
    assert line == f"in the end {last.nats_per_char:.4f} nats/character, {per_word}"
    assert depth == "mean recursion depth 3.00 of 3 trained, 12.00 visits per token, 0.0% of the visits saved\n"
    found = json.loads((home / "found.json").read_text())
    assert found["loss"] == pytest.approx(expected.figures.loss, rel=1e-6)
    assert found["steps"][-1]["bits_per_byte"] == found["bits_per_byte"]
    assert (found["documents"], found["tokens"], found["bytes"], found["chars"]) == (3, 91, 91, 75)
    assert found["exit"]["exit"] == "fixed" and found["checkpoint"] == str(home / "trm")


def test_the_weights_of_the_last_step_in_place_of_the_average(home, tiny, tmp_path):
    one, other = (tiny(seed, vocab_size=BYTE.vocab_size, n_layers=1, recursion="none") for seed in (0, 1))
    save_checkpoint(tmp_path / "both", one, BYTE, ema=dict(other.named_parameters()))
    losses = []
    for ema in ("true", "false"):
        start(home, "--ema", ema, "--json", tmp_path / "found.json", checkpoint=tmp_path / "both")
        losses.append(json.loads((tmp_path / "found.json").read_text())["loss"])
    expected = [score_corpus(model, BYTE, TEXTS).figures.loss for model in (other, one)]
    assert losses == pytest.approx(expected, rel=1e-6) and losses[0] != losses[1]


def test_an_exit_rule(home, model, capsys):
    start(home, "--exit", "halt", "--act_threshold", 0.7, "--max_recursion_depth", 2, "--json", home / "halt.json")
    rule = ExitRule("halt", 2, act_threshold=0.7)
    expected = score_corpus(model, BYTE, TEXTS, rule=rule)
    found = json.loads((home / "halt.json").read_text())
    assert 1 < expected.depth < 2
    assert [found[k] for k in ("depth", "visits", "visits_saved")] == [expected.depth, expected.visits, expected.saved]
    assert found["loss"] == pytest.approx(expected.figures.loss, rel=1e-6) and len(found["steps"]) == 2
    assert f"mean recursion depth {expected.depth:.2f} of 3 trained" in capsys.readouterr().out


def test_the_standard_library_is_the_default_text(home, capsys):
    start(home, "--max_tokens", 40, paths=None)
    out = capsys.readouterr()
    with open(stdlib_files()[1][0], encoding="utf-8") as file:
        first = file.read(40)
    assert out.out.startswith(f"1 document, 40 tokens, 40 bytes, {len(first)} characters")
    assert "validation files of the Python standard library" in out.err


def test_depth_curve(home, model, capsys):
    start(home, "--depth_curve", home / "curve.png", "--max_docs", 1, "--max_tokens", 12, "--max_recursion_depth", 4)
    assert (home / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((home / "curve.json").read_text())
    said = capsys.readouterr()
    assert "the text is too short for calibrated exits, which need about 1,000 tokens" in said.err
    everything, _, _, cheapest, *note = said.out.split("\n\n")
    rows = rows_of(everything)
    assert len(rows) == len(found["points"]) and [row[0] for row in rows[:4]] == ["fixed"] * 4
    assert {row[0] for row in rows} == {"fixed", "halt", "kl", "oracle"}
    fixed = score_corpus(model, BYTE, [TEXTS[0][:12]], rule=ExitRule(max_recursion_depth=4), per_step=True)
    assert [row[5] for row in rows[:4]] == [f"{f.bits_per_byte:.4f}" for f in fixed.steps]
    assert rows[2][6] == "+0.00%"
    best = min(range(3), key=lambda step: fixed.steps[step].bits_per_byte)
    better = f"a fixed depth of {best + 1} beats the trained depth 3: compare the rules with it\n"
    is_far = fixed.steps[best].bits_per_byte < 0.999 * fixed.steps[2].bits_per_byte  # else it is noise
    assert note == ([better] if is_far else [])
    assert {row[0]: row[1] for row in rows_of(cheapest)} == {
        k: f"{p['setting']:g}" for k, p in found["cheapest"].items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stride", "0"], "stride is 0: set it from 1 to the context of 16 tokens"),
        (["--stride", "17"], "stride is 17"),
        (["--paths", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--paths", "{home}/empty.jsonl"], "no document in"),
        (["--text_field", "body"], "has the field 'body'; available fields: text"),
        (["--max_tokens", "0"], "max_tokens is 0"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--depth_curve", "curve.jpg"], "ends in .png"),
        (["--depth_curve", "nowhere/curve.png"], "cannot write nowhere/curve.png: No such file"),
        (["--json", "{home}"], "Is a directory"),
        (["--json", "{home}/texts.jsonl"], "texts.jsonl is also read, or written by another flag"),
        (["--paths", "{home}/te*.jsonl", "--json", "{home}/texts.jsonl"], "texts.jsonl is also read"),
        (["--depth_curve", "{home}/curve.png", "--json", "{home}/curve.json"], "written by another flag"),
        (["--num_fewshot", "2"], "include_path and num_fewshot need lm_eval"),
        (["--act_threshold", "0.5"], "act_threshold is for --exit halt"),
        (["--exit", "halt", "--kl_threshold", "0.5"], "kl_threshold is for --exit kl"),
        (["--depth_curve", "curve.png", "--exit", "kl"], "leave out exit"),
        (["--lm_eval", "a"], "leave out paths"),
        (["--max_recursion_depth", "0"], "max_recursion_depth is 0"),
        (["--exit", "soon"], "--exit soon"),
        (["{home}/loop", "--exit", "halt"], "has no halting head: choose exit kl or fixed"),
        (["{home}/none", "--max_recursion_depth", "2"], "recursion none has a single visit"),
        (["{home}/none", "--exit", "halt"], "recursion none has a single visit"),
        (["{home}/none", "--depth_curve", "{home}/curve.png"], "no depth curve"),
        (["{home}/nothing"], "no checkpoint folder"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(home, words, said, capsys):
    words = [word.format(home=home) for word in words]
    checkpoint = [] if not words[0].startswith("-") else [str(home / "trm")]
    paths = [] if "--paths" in words else ["--paths", str(home / "texts.jsonl")]
    with pytest.raises(SystemExit) as caught:
        run(lambda: eval_lm.main([*checkpoint, *words, *paths]))
    out = capsys.readouterr()
    errors = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and out.out == ""
    assert len(errors) == 1 and said in errors[0] and out.err.endswith(errors[0] + "\n")


def test_the_harness(home, model, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    lines = ["task: texts", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {home}/texts.jsonl}}}}"]
    lines += ["test_split: test", "output_type: loglikelihood_rolling", "doc_to_text: ''", "doc_to_target: '{{text}}'"]
    lines += ["metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]"]
    (home / "texts.yaml").write_text("\n".join(lines))
    start(home, "--lm_eval", home / "texts.yaml", "--max_docs", 2, "--json", home / "harness.json", paths=None)
    bits = score_corpus(model, BYTE, TEXTS[:2]).figures.bits_per_byte
    found = json.loads((home / "harness.json").read_text())["results"]["texts"]
    assert found["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    out = capsys.readouterr().out
    assert out.startswith("|Tasks") and f"{bits:.4f}" in out


def test_the_harness_is_missing(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as caught:
        run(lambda: start(home, "--lm_eval", "texts", paths=None))
    assert caught.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(
        "error: lm-evaluation-harness"
    )


def test_in_a_process_of_its_own(home):
    words = ["eval_lm.py", home / "loop", "--paths", home / "texts.jsonl", "--device", "cpu"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 documents, 91 tokens" in done.stdout and len(done.stdout.split("\n\n")) == 3


def test_no_bits_per_byte_of_text_that_does_not_come_back(home, tiny, tmp_path, capsys):
    """A tokenizer that loses Japanese text would get a better figure for it: 1.7 bits per byte instead of 9."""
    usual = usual_spm(tmp_path)
    save_checkpoint(tmp_path / "usual", tiny(vocab_size=usual.vocab_size, n_layers=1), usual)
    write(tmp_path / "ja.txt", ["東京は夜の七時。", "the cat"])
    write(tmp_path / "en.txt", ["the cat sat", "the mat"])
    figures = {}
    for name in ("ja", "en"):
        eval_lm.main(
            [str(tmp_path / "usual"), "--paths", str(tmp_path / f"{name}.txt"), "--json", str(tmp_path / "out.json")]
        )
        figures[name] = json.loads((tmp_path / "out.json").read_text()), *capsys.readouterr()
    found, out, err = figures["ja"]
    assert found["bits_per_byte"] is None and found["steps"][0]["bits_per_char"] is None and found["loss"] > 0
    assert out.splitlines()[3].split()[2:4] == ["-", "-"] and found["lost"] == 24
    assert "loses 77.4 % of the text's bytes" in err
    found, out, err = figures["en"]
    assert found["bits_per_byte"] > 0 and found["lost"] == 0 and "warning" not in err
    with pytest.raises(UserError, match="there are no bits per byte"):
        curve = ["--depth_curve", str(tmp_path / "curve.png")]
        eval_lm.main([str(tmp_path / "usual"), "--paths", str(tmp_path / "ja.txt"), *curve])
