"""train_trm_lm.py and generate.py as a user runs them: the texts, and one clear line for every mistake.

Most tests call main() in this process. Few start a process, because each process needs seconds to import torch."""

import gzip
import io
import json
import os
import shutil

import pytest
import torch
from scripts import SMALL, run_script, start

import generate
import train_trm_lm
from src.checkpoint import load_model
from src.config import run
from src.runtime import choose_compile

pytest_plugins = "scripts"  # the fixtures home and data
SCRIPTS = {"train_trm_lm.py": train_trm_lm.main, "generate.py": generate.main}


@pytest.fixture(scope="module")
def trained(home, data):
    """A run folder made by the script, and the script's stdout and stderr."""
    words = ["train_trm_lm.py", *SMALL, *data, "--save_dir", home / "run", "--max_steps", 30, "--lr", 0.01]
    code, out, err = run_script(*words)
    assert code == 0, err
    return home / "run", out, err


@pytest.fixture
def call(capfd):
    """call(script, *words) runs a script in this process and returns (exit code, stdout, stderr)."""

    def call(script, *words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(lambda: SCRIPTS[script]([str(word) for word in words]))
        return caught.value.code or 0, *capfd.readouterr()

    return call


def assert_one_line(code, out, err, *said):
    """Check how a user's mistake ends: code 2, empty stdout, and one line with `error:` at the end of stderr."""
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    assert all(part in lines[-1] for part in said), lines[-1]


class TestTraining:
    def test_stdout_is_empty_and_stderr_tells(self, trained):
        folder, out, err = trained
        assert out == "" and "Traceback" not in err
        assert "cpu, fp32 (as requested); eager (as requested)" in err
        assert "done: step 30, validation" in err and f"python generate.py {folder} --prompt" in err
        for name in ("config.yaml", "metrics.jsonl", "learning_curve.png", "samples.txt", "last", "best"):
            assert (folder / name).exists(), name

    def test_the_hint_at_the_end_works(self, trained, call):
        hint = next(line for line in trained[2].splitlines() if line.startswith("done:"))
        script, *words = hint.partition("python ")[2].replace("'...'", "def").split()
        code, out, _ = call(script, *words, "--max_new_tokens", 3)
        assert code == 0 and out.startswith("def")

    def test_resume_by_the_run_folders_own_config(self, home, trained, call):
        copy = home / "copy"
        shutil.copytree(trained[0], copy, symlinks=True)
        config = (copy / "config.yaml").read_text().replace(str(trained[0]), str(copy))
        (copy / "config.yaml").write_text(config)
        assert_one_line(*call("train_trm_lm.py", "--config", copy / "config.yaml"), "holds a run", "--resume true")
        code, out, err = call("train_trm_lm.py", "--config", copy / "config.yaml", "--resume")
        assert code == 0 and out == "" and "after step 30" in err


class TestGenerating:
    def test_one_prompt_in_a_process(self, trained):
        words = ["generate.py", trained[0], "--prompt", "def f", "--max_new_tokens", 12, "--seed", 1]
        code, out, err = run_script(*words, "--device", "cpu")
        assert code == 0, err
        assert out.startswith("def f") and out.endswith("\n") and "tokens/s" not in out
        assert "EMA weights" in err and "tokens/s" in err and "Traceback" not in err

    def test_seed_repeats_and_matters(self, trained, call):
        texts = [
            call("generate.py", trained[0], "--prompt", "def", "--max_new_tokens", 20, "--temperature", 2, *seed)[1]
            for seed in (["--seed", 1], ["--seed", 1], ["--seed", 2], [], [])
        ]
        assert texts[0] == texts[1] != texts[2] and texts[3] != texts[4]

    @pytest.mark.parametrize(
        "choice", [["--temperature", 0], ["--temperature", 1, "--seed", 5, "--top_k", 40]], ids=str
    )
    @pytest.mark.parametrize("prompts", [["def f"], ["def f", "x", "    return"]], ids=len)
    def test_no_cache_is_the_same_text(self, trained, call, choice, prompts):
        """The texts are longer than the context of 32 tokens, so this covers the end of the context too."""
        words = [trained[0], "--prompt", *prompts, "--max_new_tokens", 50, *choice]
        code, out, _ = call("generate.py", *words)
        assert code == 0 and out == call("generate.py", *words, "--no_cache")[1]

    def test_each_token_its_own_depth(self, trained, call):
        words = [trained[0], "--prompt", "def f", "--max_new_tokens", 20, "--temperature", 0]
        plain = call("generate.py", *words)
        full = call("generate.py", *words, "--exit", "halt", "--act_threshold", 1)
        assert full[1] == plain[1] and "; 2.00 of 2 recursion steps, 12.0 visits per token" in full[2]
        assert "recursion steps" not in plain[2]
        none = call("generate.py", *words, "--exit", "halt", "--act_threshold", 0, "--max_recursion_depth", 7)
        assert "; 1.00 of 7 recursion steps, 6.0 visits per token" in none[2]
        deeper = call("generate.py", *words, "--max_recursion_depth", 3)
        assert deeper[0] == 0 and "; 3.00 of 3 recursion steps" in deeper[2]
        assert_one_line(*call("generate.py", *words, "--max_recursion_depth", 0), "max_recursion_depth is 0")
        assert_one_line(*call("generate.py", *words, "--exit", "soon"), "--exit soon", "fixed", "halt", "kl")

    def test_int8(self, trained, call):
        words = [trained[0], "--prompt", "def f", "--max_new_tokens", 8, "--temperature", 0, "--precision", "int8"]
        code, out, _ = call("generate.py", *words)
        assert code == 0 and out.startswith("def f") and out == call("generate.py", *words)[1]

    def test_trace(self, trained, call, tmp_path):
        words = [trained[0], "--prompt", "def f", "--max_new_tokens", 4, "--temperature", 0]
        plain = call("generate.py", *words)
        table = call("generate.py", *words, "--trace")
        assert table[:2] == plain[:2] and "\x1b" not in table[2] and len(table[2]) > len(plain[2])
        picture = call("generate.py", *words, "--trace", tmp_path / "t.png")
        assert picture[:2] == plain[:2] and (tmp_path / "t.png").stat().st_size > 1000
        facts = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
        assert "def f" + "".join(token["text"] for token in facts["tokens"]) == plain[1].removesuffix("\n")
        assert_one_line(*call("generate.py", *words, "--trace", tmp_path / "none" / "t.png"), "none")
        assert_one_line(*call("generate.py", *words, "--trace", tmp_path / "t.doc"), ".png")
        assert_one_line(
            *call("generate.py", "--prompt_file", tmp_path / "t.json", "--trace", tmp_path / "t.png"), "also"
        )

    def test_several_texts(self, trained, call):
        words = [trained[0], "--prompt", "def a", "def b", "--num_samples", 2, "--max_new_tokens", 6, "--seed", 3]
        code, out, err = call("generate.py", *words, "--temperature", 1.5)
        texts = out.removesuffix("\n").split("\n\ndef ")
        assert code == 0 and len(texts) == 4
        assert [t.removeprefix("def ")[0] for t in texts] == ["a", "a", "b", "b"] and texts[0] != texts[1]
        assert "tokens/s" in err

    def test_more_texts_than_are_written_at_once(self, trained, call):
        words = [trained[0], "--prompt", "def a", "--num_samples", 18, "--max_new_tokens", 12, "--seed", 3]
        code, out, _ = call("generate.py", *words, "--temperature", 2)
        texts = out.removesuffix("\n").split("\n\ndef a")
        assert code == 0 and len(texts) == len(set(texts)) == 18
        assert out == call("generate.py", *words, "--temperature", 2)[1]

    def test_a_text_does_not_depend_on_those_beside_it(self, trained, call):
        words = ["--max_new_tokens", 8, "--temperature", 0]
        alone = call("generate.py", trained[0], "--prompt", "def f1", *words)[1]
        beside = call("generate.py", trained[0], "--prompt", "def f1", "    return x", *words)[1]
        assert beside.startswith(alone)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_prompt_file(self, trained, call, tmp_path, encoding):
        (tmp_path / "p.txt").write_bytes("def one\ndef two\r\n京\x0b都\n".encode(encoding))
        code, out, _ = call("generate.py", trained[0], "--prompt_file", tmp_path / "p.txt", "--max_new_tokens", 0)
        assert code == 0 and out == "def one\n\ndef two\n\n京\x0b都\n"

    @pytest.mark.parametrize("words", [["--prompt", ""], []], ids=str)
    def test_empty_prompt_starts_from_bos(self, trained, call, words):
        code, out, err = call("generate.py", trained[0], *words, "--max_new_tokens", 5, "--temperature", 0)
        assert code == 0 and "tokens/s" in err
        model, tokenizer = load_model(trained[0])
        ids = model.generate(torch.tensor([[tokenizer.bos_id]]), 5, temperature=0.0, eos_id=tokenizer.eos_id)
        assert out == tokenizer.decode(ids[0, 1:].tolist()) + "\n"

    def test_never_half_a_character(self, trained, call):
        """A byte model at a high temperature generates broken UTF-8, but the output is still valid text."""
        words = ["--max_new_tokens", 200, "--temperature", 9, "--top_p", 1, "--seed", 0]
        code, out, _ = call("generate.py", trained[0], "--prompt", "京都", *words)
        assert code == 0 and out.startswith("京都") and "\ufffd" in out

    def test_interactive(self, trained, call, monkeypatch):
        long = "x" * 99
        lines = io.BytesIO(f"\ufeffdef a\r\n{long}\n\n".encode() + b"caf\xe9\ndef b\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="ascii"))
        code, out, err = call("generate.py", trained[0], "--interactive", "--max_new_tokens", 0)
        assert code == 0 and out == "def a\n\ndef b\n"
        assert err.count("prompt> ") == 6 and err.count("error: the prompt has 100 tokens") == 1
        assert err.count("error: the prompt is not UTF-8 text") == 1

    def test_reader_that_goes_away(self, trained):
        """`generate.py ... | head -c 1` is not an error."""
        words = ["generate.py", trained[0], "--prompt", "def", "--max_new_tokens", 4000, "--temperature", 1]
        child = start(*words)
        child.stdout.read(1)
        child.stdout.close()
        err = child.stderr.read()
        assert child.wait(timeout=120) in (0, 120) and "Traceback" not in err and "BrokenPipe" not in err

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
    def test_a_full_disk(self, trained):
        words = ["generate.py", trained[0], "--prompt", "def", "--max_new_tokens", 3]
        with open("/dev/full", "w") as full:
            child = start(*words, stdout=full)
        _, err = child.communicate(timeout=120)
        assert child.returncode == 2 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: [Errno 28] No space left on device")

    def test_the_released_checkpoint(self, call):
        code, out, _ = call("generate.py", "--prompt", "def main(", "--max_new_tokens", 20, "--seed", 1)
        assert code == 0 and out.startswith("def main(") and len(out) > 20


def broken_checkpoints(folder, home):
    """Make copies of a checkpoint with one fault each.  Returns {name: (folder, part of the error message)}."""
    faults = {
        "no_weights": (lambda f: (f / "ema.safetensors").unlink() or (f / "model.safetensors").unlink(), "missing"),
        "cut_weights": (lambda f: os.truncate(f / "ema.safetensors", 999), "cut short"),
        "no_tokenizer": (lambda f: (f / "tokenizer_config.json").unlink(), "no tokenizer"),
        "no_config": (lambda f: (f / "config.json").unlink(), "config.json"),
        "cut_config": (lambda f: os.truncate(f / "config.json", 99), "config.json is broken"),
        "vocabulary": (
            lambda f: (f / "config.json").write_text(
                (f / "config.json").read_text().replace('"vocab_size": 259', '"vocab_size": 300')
            ),
            "tokens, the model 300",
        ),
    }
    made = {}
    for name, (break_it, said) in faults.items():
        copy = home / "broken" / name
        shutil.copytree((folder / "last").resolve(), copy, dirs_exist_ok=True)
        break_it(copy)
        made[name] = (copy, said)
    return made


class TestMistakesOfGenerating:
    def test_broken_checkpoints(self, trained, home, call):
        for name, (folder, said) in broken_checkpoints(trained[0], home).items():
            assert_one_line(*call("generate.py", folder, "--prompt", "x"), said, name)

    def test_wrong_calls(self, trained, call, tmp_path):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        (tmp_path / "utf16.txt").write_bytes("def".encode("utf-16-le"))
        (tmp_path / "none.txt").touch()
        for words, said in [
            (["--prompt", "x" * 99], "the prompt has 100 tokens, the context holds 32"),
            (["--prompt", *["ok"] * 17, "x" * 9999], "prompt 18 has 10000 tokens, the context holds 32"),
            (["--prompt_file", tmp_path / "none.txt"], "none.txt is empty: write one prompt per line"),
            (["--prompt_file", tmp_path / "nowhere.txt"], "nowhere.txt"),
            (["--prompt_file", tmp_path / "latin.txt"], "latin.txt is not UTF-8 text"),
            (["--prompt_file", tmp_path / "utf16.txt"], "utf16.txt holds NUL bytes"),
            (["--prompt_file", "/dev/zero"], "--prompt_file /dev/zero: this is a pipe or a device"),
            (["--prompt_file", tmp_path], "prompt_file"),
            (["--prompt", "\udcff"], "prompt"),
            (["--temperature", "-1"], "temperature"),
            (["--top_k", "0"], "top_k"),
            (["--top_p", "1.5"], "top_p"),
            (["--max_new_tokens", "-1"], "max_new_tokens"),
            (["--num_samples", "0"], "num_samples"),
            (["--interactive", "--prompt", "x"], "leave out --prompt"),
            (["--trace", "--max_new_tokens", "0"], "set max_new_tokens to 1"),
            (["--act_threshold", "0.5"], "act_threshold is for --exit halt"),
            (["--exit", "halt", "--kl_threshold", "0.5"], "kl_threshold is for --exit kl"),
            (["--max_recursion_depth", 10**8], "max_recursion_depth is 100000000"),
            (["--device", "tpu"], "--device tpu"),
            (["--precision", "fp16", "--device", "cpu"], "--precision fp16"),
            (["--prompts", "x"], "--prompts"),
        ]:
            assert_one_line(*call("generate.py", trained[0], *words), said)
        for words, said in [
            ([tmp_path / "nowhere"], "nowhere"),
            ([tmp_path], "is neither a checkpoint"),
            ([tmp_path / "latin.txt"], "latin.txt"),
            ([trained[0], "another"], "another"),
            (["--prompt", "x", trained[0]], "write the checkpoint before it"),
        ]:
            assert_one_line(*call("generate.py", *words), said)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_that_is_not_here(self, trained, call):
        assert_one_line(*call("generate.py", trained[0], "--device", "cuda"), "--device cuda")


class TestMistakesOfTraining:
    def test_wrong_data(self, call, tmp_path, home):
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": f"words number {n}"}) + "\n" for n in range(50)))
        with gzip.open(tmp_path / "whole.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps({"text": os.urandom(99).hex()}) + "\n" for n in range(200)))
        whole = (tmp_path / "whole.jsonl.gz").read_bytes()
        contents = {
            "empty.jsonl": b"",
            "empty.txt": b"",
            "field.jsonl": b'{"body": "x"}\n' * 9,
            "broken.jsonl": b'{"text": "x"\n' * 9,
            "cut.jsonl.gz": whole[: len(whole) // 2],
            "notgz.jsonl.gz": b"plain text",
            "latin.txt": b"caf\xe9 \xff\n" * 9,
            "short.txt": b"short",
            "image.png": b"\x89PNG",
            "not.parquet": b"PAR1 no",
            "no.model": b"no model",
            "no.json": b"{}",
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        keys = {"field.jsonl": "available fields: body", "broken.jsonl": "broken JSON", "latin.txt": "UTF-8"}
        keys |= {"short.txt": "max_seq_len", "image.png": "no data file", "empty.txt": "empty"}
        cases = [
            (["--train_paths", tmp_path / name], keys.get(name, name))
            for name in contents
            if name not in ("no.model", "no.json")
        ]
        cases += [
            (["--train_paths", tmp_path / "nowhere.jsonl"], "nowhere.jsonl does not exist"),
            (["--train_paths", text, "--valid_paths", tmp_path / "nowhere"], "nowhere does not exist"),
            (["--train_paths", text, "--valid_paths", tmp_path / "short.txt"], "max_seq_len"),
            (["--train_paths", text, "--text_field", "body"], "available fields: text"),
            (["--train_paths", text, "--tokenizer", tmp_path / "no.model"], "no.model"),
            (["--train_paths", text, "--tokenizer", tmp_path / "no.json"], "no.json"),
            (["--train_paths", text, "--tokenizer", tmp_path / "nowhere"], "nowhere"),
            (["--train_paths", text, "--tokenizer", "sentencepiece", "--sp_model", tmp_path / "no.model"], "no.model"),
            (["--train_paths", text, "--tokenizer", "sentencepiece", "--vocab_size", 9999], "vocab_size"),
            (["--train_paths", tmp_path / "broken.jsonl", "--strict"], "broken.jsonl:1"),
            (["--train_paths", text, "--init_from", tmp_path / "nowhere"], "nowhere"),
            (["--train_paths", text, "--cache_dir", text / "cache"], "cache"),
        ]
        for words, said in cases:
            words = [*SMALL, "--cache_dir", home / "cache", "--save_dir", tmp_path / "run", *words]
            assert_one_line(*call("train_trm_lm.py", *words), said)
            assert not (tmp_path / "run").exists(), words

    def test_wrong_settings(self, call, data, tmp_path, home):
        (tmp_path / "file").write_text("")
        for words, said in [
            (["--d_model", 10, "--n_heads", 3], "d_model 10"),
            (["--device", "tpu"], "--device tpu"),
            (["--precision", "fp16"], "--precision fp16"),
            (["--save_dir", tmp_path / "file" / "run"], "save_dir"),
            (["--save_dir", tmp_path / "file"], "save_dir"),
            (["--seed", 1 << 70], "seed"),
            (["--causal", "false"], "causal false is for puzzles"),
            (["--weight_decay", -1], "weight_decay"),
            (["--sample_tokens", -1], "sample_tokens"),
            (["--sample_prompt", "\udcff"], "sample_prompt"),
        ]:
            words = [*SMALL, *data, "--save_dir", tmp_path / "run", "--max_steps", 2, *words]
            assert_one_line(*call("train_trm_lm.py", *words), said)
            assert not (tmp_path / "run").exists(), words
        if not torch.cuda.is_available():
            words = [*SMALL, *data, "--save_dir", tmp_path / "run", "--device", "cuda"]
            assert_one_line(*call("train_trm_lm.py", *words), "--device cuda")

    @pytest.mark.slow
    def test_in_a_process(self, trained, data):
        words = ["train_trm_lm.py", *SMALL, *data, "--save_dir", trained[0]]
        assert_one_line(*run_script(*words), f"save_dir {trained[0]} holds a run")


@pytest.mark.slow
def test_with_nothing_but_defaults_it_trains(home, tmp_path):
    """Training without data and tokenizer flags, as in the README, but with a small model and only three steps."""
    small = "--d_model 32 --n_heads 2 --max_seq_len 64 --batch_size 4 --sample_tokens 8 --eval_batches 2".split()
    words = [*small, "--max_steps", 3, "--cache_dir", home / "cache", "--save_dir", tmp_path / "run"]
    compiles = choose_compile(None, torch.device("cpu")).value
    # asked for, because by default a run of three steps is too short to be compiled
    code, out, err = run_script("train_trm_lm.py", *words, *["--compile"] * compiles)
    assert code == 0 and out == "", err[-2000:]
    assert "the Python standard library" in err and "done: step 3" in err
    assert ("compiling, about" in err) == compiles
    code, out, err = run_script("generate.py", tmp_path / "run", "--prompt", "def main(", "--max_new_tokens", 5)
    assert code == 0 and out.startswith("def main("), err
