"""extract_texts.py and train_spm.py as a user runs them: output files, counts, and one clear line for every mistake."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from texts import write_records

import extract_texts
import train_spm
from src.data.corpus import read_documents
from src.errors import UserError
from src.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = ["one\ntwo\n", "京都は日本の都市。", "  three 😀  "]


def write_gz(path, texts):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in texts)
    return str(path)


def run_script(name, *args):
    """Run a script in its own process.  Returns (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_extract_texts_keeps_every_document(tmp_path, capsys):
    source, output = write_gz(tmp_path / "a.jsonl.gz", TEXTS), tmp_path / "train_texts.txt"
    (tmp_path / "b.jsonl").write_text('{"text": "more"}\n{broken\n{"text": ""}\n')
    extract_texts.main([source, str(tmp_path / "b.jsonl"), "--output", str(output)])
    assert list(read_documents([output])) == [*TEXTS, "more"]
    n_bytes = sum(len(t.encode()) for t in [*TEXTS, "more"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"4 documents, {n_bytes} bytes; skipped: 1 x broken JSON, 1 x empty text" in captured.err
    first = output.read_bytes()
    extract_texts.main([source, str(tmp_path / "b.jsonl"), "--output", str(output)])
    assert output.read_bytes() == first and not list(tmp_path.glob(".*"))


def test_extract_texts_max_docs_and_text_field(tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(f'{{"body": "doc {i}"}}\n' for i in range(9)))
    output = tmp_path / "out.txt"
    extract_texts.main([str(tmp_path / "b.jsonl"), "--output", str(output), "--text_field", "body", "--max_docs", "2"])
    assert list(read_documents([output])) == ["doc 0", "doc 1"]


def test_extract_texts_of_records(tmp_path, capsys):
    rows = [{"question": "1 + 1?", "answer": 2.0}, {"question": "?", "answer": ""}, {"question": "a\nb", "answer": "c"}]
    source, output = write_records(tmp_path / "a.json", rows), tmp_path / "texts.txt"
    extract_texts.main([source, "--records", "--output", str(output)])
    expected = ["Input: 1 + 1? \n Output: 2", "Input: a\nb \n Output: c"]
    assert list(read_documents([output])) == expected
    assert "2 documents, 47 bytes; skipped: 1 x empty answer" in capsys.readouterr().err


def test_extract_texts_refuses(tmp_path):
    source = write_gz(tmp_path / "a.jsonl.gz", TEXTS)
    text = tmp_path / "in.txt"
    text.write_text("x")
    (tmp_path / "bad.jsonl").write_text("{\n")
    for args, message in [
        ([], "no paths given"),
        ([str(tmp_path / "nowhere.jsonl")], "nowhere.jsonl does not exist"),
        ([str(text), "--output", str(text)], "is one of the files to read"),
        ([str(text), "--output", str(tmp_path / "o.txt.gz")], "plain text is written: choose a name that ends in .txt"),
        ([str(text), "--output", ""], "plain text is written"),
        ([str(text), "--max_doc_mb", "1e300"], "max_doc_mb is 1e.300: set it over 0"),
        ([str(text), "--max_doc_mb", "-1"], "max_doc_mb is -1.0: set it over 0"),
        ([source, "--output", str(tmp_path)], "is a folder"),
        ([source, "--output", str(text / "out.txt")], "cannot write"),
        ([source, "--output", str(tmp_path / "o.txt"), "--text_field", "body"], "available fields: text"),
        ([str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "o.txt"), "--strict"], "bad.jsonl:1: broken JSON"),
        ([source, "--max_docs", "0"], "max_docs"),
    ]:
        with pytest.raises(UserError, match=message):
            extract_texts.main(args)
    assert text.read_text() == "x" and not (tmp_path / "o.txt").exists() and not list(tmp_path.glob(".*"))


def test_train_spm_writes_a_model_and_measures_it(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("".join(f"the cat number {i} sat on the mat\n" for i in range(2000)))
    args = ["--input", str(text), "--vocab_size", "300", "--model_prefix"]
    train_spm.main([*args, str(tmp_path / "a")])
    captured = capsys.readouterr()
    assert captured.out == "" and "spm_train --model_prefix=" in captured.err and "--vocab_size=300" in captured.err
    assert "wrote" in captured.err and "bytes per token" in captured.err
    assert read_tokenizer(tmp_path / "a.model").vocab_size == 300 and (tmp_path / "a.vocab").exists()
    train_spm.main([*args, str(tmp_path / "b")])
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_train_spm_refuses(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("a few words only\n" * 9)
    for args, message in [
        ([], "--input is missing"),
        (["--input", str(tmp_path / "no.txt")], "no.txt does not exist"),
        (["--input", str(text)], "vocab_size 16000 is too large for this text: the largest possible is"),
        (["--input", str(text), "--vocab_size", "20"], "too small"),
        (["--input", str(text), "--model_type", "words"], "set it to bpe, unigram or char"),
        (["--input", str(text), "--seed", "-1"], "seed is -1: set it from 0 to 4294967295"),
        (["--input", str(text), "--model_prefix", ""], "model_prefix is '', which has no file name"),
        (["--input", str(text), "--vocab_size", "275", "--model_prefix", str(text / "m")], "cannot write"),
    ]:
        with pytest.raises(UserError, match=message):
            train_spm.main(args)


@pytest.mark.parametrize("script", ["extract_texts.py", "train_spm.py", "train_tokenizer.py"])
def test_a_mistake_is_one_line_and_exit_code_2(script, tmp_path):
    args = ["missing.txt"] if script == "extract_texts.py" else ["--input", "missing.txt"]
    code, out, err = run_script(script, *args)
    assert (code, out, err) == (2, "", f"error: missing.txt does not exist in {ROOT}\n")
    code, out, _ = run_script(script, "--help")
    assert code == 0 and "--text_field" in out and "python " + script in out
