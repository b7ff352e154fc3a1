"""Flags and YAML files: precedence, forms of values, and one clear line with exit code 2 for every mistake."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import extract_texts
import generate
import train_trm_lm
from src.config import before_torch, parse_flags, run
from src.dataset import DataConfig
from src.errors import UserError
from src.model import TRMConfig
from src.training.train_config import RuntimeConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (TrainConfig, DataConfig, TRMConfig, RuntimeConfig)


def parse(*argv):
    """{field: value} of a training command line."""
    return {k: v for part in train_trm_lm.parse_args(list(argv)) for k, v in vars(part).items()}


@pytest.fixture
def config_file(tmp_path):
    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refused(capsys, *argv, parse_args=train_trm_lm.parse_args):
    """Returns the one-line error that a wrong command line ends with."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: parse_args(list(argv)))
    out = capsys.readouterr()
    assert caught.value.code == 2 and out.out == ""
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and out.err.endswith("\n")
    return out.err


def test_a_file_changes_the_defaults_of_the_dataclasses(config_file):
    assert train_trm_lm.parse_args(["--config", config_file("")]) == tuple(cls() for cls in CLASSES)


def test_a_field_lives_in_one_dataclass():
    names = [f.name for cls in CLASSES for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


class TestOrder:
    def test_file_over_defaults_and_flags_over_file(self, config_file):
        path = config_file("lr: 3e-4\nd_model: 64\ntrain_paths: [a, b c]\nresume: true\nsp_model: null\n")
        got = parse("--config", path)
        assert (got["lr"], got["d_model"], got["train_paths"], got["resume"]) == (3e-4, 64, ["a", "b c"], True)
        assert got["batch_size"] == TrainConfig.batch_size and got["sp_model"] is None
        got = parse("--config", path, "--lr", "0.5", "--resume", "false", "--train_paths", "x")
        assert (got["lr"], got["d_model"], got["train_paths"], got["resume"]) == (0.5, 64, ["x"], False)

    @pytest.mark.parametrize("flag", [["--config", "{}"], ["--config={}"]], ids=str)
    def test_flags_win_wherever_they_stand(self, config_file, flag):
        flag = [word.format(config_file("lr: 3e-4\nd_model: 64\nresume: false\n")) for word in flag]
        got = parse("--lr", "0.5", "--resume", *flag)
        assert (got["lr"], got["d_model"], got["resume"]) == (0.5, 64, True)

    def test_what_is_written_is_read_back(self, config_file):
        parts = train_trm_lm.parse_args(["--lr", "1e-5", "--train_paths", "京都", "null", "--sample_prompt", "[a: b"])
        values = {k: v for part in parts for k, v in dataclasses.asdict(part).items()}
        assert train_trm_lm.parse_args(["--config", config_file(yaml.safe_dump(values, allow_unicode=True))]) == parts


class TestForms:
    @pytest.mark.parametrize(
        ("words", "value"),
        [
            (["--resume"], True),
            (["--resume", "true"], True),
            (["--resume", "false"], False),
            (["--resume=false"], False),
            (["--resume", "--lr", "1"], True),
            ([], False),
        ],
        ids=str,
    )
    def test_bool(self, words, value):
        assert parse(*words)["resume"] is value

    @pytest.mark.parametrize(("words", "value"), [(["--compile"], True), (["--compile", "false"], False), ([], None)])
    def test_bool_that_may_be_absent(self, words, value):
        assert parse(*words)["compile"] is value

    @pytest.mark.parametrize(
        ("words", "value"),
        [
            (["a"], ["a"]),
            (["a", "b"], ["a", "b"]),
            (["a b", "*.txt"], ["a b", "*.txt"]),
            (["1", "null", "true"], ["1", "null", "true"]),
            (['["a", "b"]'], ['["a", "b"]']),
        ],
        ids=str,
    )
    def test_list(self, words, value):
        assert parse("--train_paths", *words, "--lr", "1")["train_paths"] == value

    @pytest.mark.parametrize("text", ["", " ", "null", "123", "true", "[x", "{a: b}", "- a", "#", "a: b", "'", "京都"])
    def test_text_stays_text(self, text):
        assert parse("--sample_prompt", text)["sample_prompt"] == text
        assert generate.parse_args(["--prompt", text])[0].prompt == [text]
        assert generate.parse_args(["--prompt", text, text, "--seed", "1"])[0].prompt == [text, text]

    @pytest.mark.parametrize("text", ["[1, 2", "[[京都]]", "[1, 2]", "[a]", "[]"])
    def test_a_prompt_may_look_like_a_list(self, text):
        """Python code and wiki markup may begin with brackets."""
        assert generate.parse_args(["--prompt", text])[0].prompt == [text]
        assert parse("--mixture", "[]")["mixture"] == []  # numbers cannot be meant as text

    def test_positional(self):
        seed, folder = ["--seed", "3"], "checkpoints/python"
        for words in ([folder, *seed], [*seed, folder], ["--checkpoint", folder, *seed]):
            config = generate.parse_args(words)[0]
            assert (config.checkpoint, config.seed) == ("checkpoints/python", 3)
        assert generate.parse_args([])[0].checkpoint is None

    def test_a_value_may_look_like_a_flag(self):
        assert parse("--sample_prompt", "--lr")["sample_prompt"] == "--lr"
        assert parse("--sample_prompt=--lr")["sample_prompt"] == "--lr"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "fast"], ["--lr fast", "float"]),
        (["--max_steps", "2.5"], ["--max_steps 2.5", "int"]),
        (["--resume", "maybe"], ["unrecognized", "maybe"]),
        (["--optimizer", "sgd"], ["--optimizer sgd", "adamw", "muon"]),
        (["--norm", "mid"], ["--norm mid", "post", "pre", "sandwich"]),
        (["--learning_rate", "1"], ["--learning_rate"]),
        (["--max_step", "1"], ["--max_step"]),  # no abbreviations: they would break lists and switches
        (["--batch", "8"], ["--batch"]),
        (["word"], ["word"]),
        (["-x"], ["-x"]),
        (["--lr"], ["--lr"]),
        (["--train_paths"], ["--train_paths"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", ".inf"], ["lr is inf"]),
        (["--max_steps", "null"], ["--max_steps None", "int"]),
        (["--max_steps", "0"], ["max_steps is 0"]),
        (["--config"], ["--config"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--config", "tests"], ["tests"]),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line(capsys, words, said):
    line = refused(capsys, *words)
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lr: fast\n", ["lr", "fast", "float"]),
        ("learning_rate: 1\n", ["learning_rate"]),
        ("d_model: 64.5\n", ["d_model", "64.5", "int"]),
        ("d_model: true\n", ["d_model", "int"]),
        ("resume: 1\n", ["resume", "bool"]),
        ("optimizer: sgd\n", ["optimizer", "sgd", "muon"]),
        ("train_paths: {a: 1}\n", ["train_paths"]),
        ("save_dir: null\n", ["save_dir"]),
        ("lr: [\n", ["line 2"]),
        ("- lr\n- 1\n", []),
        ("just words\n", []),
        (b"lr: 1\xff\xfe\n", []),
        (b"\x00\x01", []),
        ("max_steps: 2\nlr: 1\nmax_steps: 3\n", ["line 3", "max_steps", "line 1"]),
        ("monitoring:\n  tensorboard: true\n  tensorboard: false\n", ["line 3", "tensorboard", "line 2"]),
        ("lr: 1\nmax_steps:\n", ["settings.yaml", "max_steps is left empty"]),
        ("sample_prompt:\n", ["settings.yaml", "sample_prompt is left empty"]),
        ("monitoring: {tensorboard: }\n", ["settings.yaml", "monitoring: tensorboard is left empty"]),
        ("lr: .inf\n", ["lr is inf", "finite"]),
        ("weight_decay: .nan\n", ["weight_decay is nan", "finite"]),
        ("mixture: [1, .inf]\ntrain_paths: [a, b]\n", ["mixture is inf", "finite"]),
        ("monitoring: {cpu_warning_threshold: .inf}\n", ["monitoring: cpu_warning_threshold is inf"]),
        ("mixture: [1e308, 1e308]\ntrain_paths: [a, b]\n", ["mixture", "every weight"]),
        ('save_dir: ""\n', ["save_dir is empty"]),
        ('cache_dir: ""\n', ["cache_dir is empty"]),
        ('cache_dir: "a\\0b"\n', ["cache_dir contains a NUL"]),
        ("seed: !!int x\n", ["line 1", "tags"]),
        ("batch_size: 1:30\n", ["--batch_size 1:30", "int"]),
        ("config: other.yaml\n", ["there is no setting config"]),
        ("monitoring: {tensorbord: true}\n", ["monitoring", "tensorbord"]),
        ("curriculum: {class_path: thisx.X}\n", ["class_path", "import nothing"]),
        ("curriculum: {stages: [{class_path: thisx.X, init_args: {}}]}\n", ["class_path", "import nothing"]),
        ("monitoring: thisx.X\n", ["monitoring", "import nothing"]),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_line(capsys, config_file, content, said):
    line = refused(capsys, "--config", config_file(content))
    assert all(part in line for part in said), line


def test_the_home_folder_is_no_folder_called_tilde(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--save_dir=~/runs/x")["save_dir"] == f"{tmp_path}/runs/x"
    values = parse("--config", config_file("cache_dir: ~/c\nsample_prompt: ~/is home\n"))
    assert (values["cache_dir"], values["sample_prompt"]) == (f"{tmp_path}/c", "~/is home")
    assert parse("--config", config_file("train_paths: [~/a, stdlib]\n"))["train_paths"] == [f"{tmp_path}/a", "stdlib"]


@pytest.mark.parametrize("content", ["# only a header\n{}\n", "", "# only a header\n", "max_minutes:\nmonitoring:\n"])
def test_a_file_without_settings_changes_nothing(config_file, content):
    assert parse("--config", config_file(content)) == parse("--config", config_file("{}"))


@pytest.mark.parametrize(
    "words",
    [
        ["--curriculum", '{"class_path": "thisx.X"}'],
        ["--curriculum", "thisx.X"],
        ["--curriculum.stages", '[{"class_path": "thisx.X"}]'],
        ["--curriculum.class_path", "thisx.X"],
        ["--monitoring", "thisx.X"],
        ["--monitoring", '{"class_path": "thisx.X", "init_args": {}}'],
        ["--config", '{"curriculum": {"class_path": "thisx.X"}}'],
        ["--lr", "!!python/name:thisx.X"],
        ["--config", "{file}"],
    ],
    ids=str,
)
def test_settings_import_nothing(capsys, config_file, monkeypatch, tmp_path, words):
    (tmp_path / "thisx.py").write_text("class X:\n    stages = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = config_file("curriculum: {stages: [{class_path: thisx.X}]}\nmonitoring: {class_path: thisx.X}\n")
    refused(capsys, *(word.replace("{file}", path) for word in words))
    assert "thisx" not in sys.modules


@pytest.mark.parametrize("flag", ["--lr", "--curriculum", "--curriculum.stages", "--batch_size"])
def test_a_deep_nest_in_a_flag_is_one_line(capsys, flag):
    line = refused(capsys, flag, "[" * 100_000)
    assert flag in line and len(line) < 1000


def test_a_number_is_not_octal_or_time(config_file):
    got = parse("--config", config_file("batch_size: 010\nlr: 1e-3\nresume: yes\nsample_prompt: 2024-01-01\n"))
    assert (got["batch_size"], got["lr"], got["resume"], got["sample_prompt"]) == (10, 1e-3, True, "2024-01-01")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--d_model", "10", "--n_heads", "3"], "d_model 10"),
        (["--n_heads", "4", "--n_kv_heads", "3"], "n_kv_heads 3"),
        (["--d_model", "12", "--n_heads", "4"], "head size 3"),
        (["--mixer", "mlp"], "causal"),
        (["--dropout", "1"], "dropout is 1"),
        (["--supervision_steps", "0"], "supervision_steps is 0"),
        (["--supervision_weights", "heavy"], "supervision_weights"),
        (["--recursion", "trm", "--injection", "none"], "injection"),
        (["--deep_steps", "2", "--grad_deep_steps", "3"], "grad_deep_steps"),
        (["--act_threshold", "0"], "act_threshold"),
        (["--vocab_size", "0"], "vocab_size is 0"),
        (["--sp_model", "a.model", "--tokenizer", "byte"], "sp_model"),
        (["--document_mask", "--packing", "false"], "document_mask"),
        (["--num_workers", "-1"], "num_workers"),
        (["--batch_size", "6", "--grad_accum", "4"], "batch_size 6"),
        (["--token_loss", "stablemax"], "token_loss stablemax is for puzzles"),
    ],
    ids=str,
)
def test_impossible_combinations(capsys, words, said):
    assert said in refused(capsys, *words)


def test_a_list_of_invalid_bytes_is_one_line(capsys):
    err = refused(capsys, "--prompt", "a\udcff", parse_args=generate.parse_args)
    assert err.startswith("error: --prompt: a value is not valid UTF-8: correct it")


def test_a_list_that_is_given_twice(capsys):
    """The last flag counts, as for other settings, and the run says so. A flag and words without one do not go on."""
    for words in ("--train_paths a --train_paths=b", "--train_paths a --max_steps 3 --train_paths b"):
        assert parse(*words.split())["train_paths"] == ["b"]
        assert capsys.readouterr().err == "--train_paths is given twice: only the last one counts\n"
    err = refused(capsys, "a.jsonl", "--paths", "b.jsonl", parse_args=extract_texts.parse_args)
    assert "--paths is given twice, with the flag and without it" in err


def test_too_many_words(capsys):
    assert "'b'" in refused(capsys, "a", "b", parse_args=generate.parse_args)


def documented(cls, start=""):
    """Yields (flag, field name, class docstring) for every setting; the flags of a section are `section.name`."""
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from documented(f.type, f"{start}{f.name}.")
        else:
            yield start + f.name, f.name, cls.__doc__


@pytest.mark.parametrize(
    ("parse_args", "classes"),
    [(train_trm_lm.parse_args, CLASSES), (generate.parse_args, (generate.GenerateConfig,))],
    ids=["train", "generate"],
)
def test_help_teaches_every_flag(capsys, monkeypatch, parse_args, classes):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for flag, name, doc in (setting for cls in classes for setting in documented(cls)):
        entry = re.search(rf" --{flag} [^ ]+ (.*?\(.*?default: .*?\))(?= --| [A-Z]|$)", flat.split("options:")[1])
        assert entry, f"--{flag} is not in the help"
        line = re.search(rf"^\s+{name}: (.+)$", doc, re.M)
        assert line and len(line[1]) > 5, f"{flag} has no line under Args:"
        assert " ".join(line[1].split()) in entry[1], f"--{flag}: {entry[1]}"
    assert "python " in text  # example commands


def test_help_shows_no_flag_that_is_refused(capsys):
    with pytest.raises(SystemExit):  # jsonargparse would add --train_paths+ and --curriculum.stages.help
        train_trm_lm.parse_args(["--help"])
    options = capsys.readouterr().out.split("\noptions:")[1]
    shown = {flag for line in re.findall(r"^  (-.*)", options, re.M) for flag in re.findall(r"--[\w.]+\+?", line)}
    known = {f"--{flag}" for cls in CLASSES for flag, _, _ in documented(cls)}
    assert shown == known | {"--help", "--config", "--curriculum", "--monitoring", "--rag"}


def test_a_class_of_ones_own():
    @dataclasses.dataclass
    class Paths:
        """What to read.

        Args:
            paths: files
            twice: read them two times
            limit: documents
        """

        paths: list[str] | None = None
        twice: bool = False
        limit: int | None = None

        def __post_init__(self):
            if self.limit == 0:
                raise ValueError("limit is 0: leave it out")

    def of(*argv):
        return parse_flags("About.", Paths, argv=argv, positional="paths")[0]

    assert of("a", "b", "--limit", "3", "c") == Paths(["a", "b", "c"], False, 3)
    assert of("--paths", "a", "--twice") == Paths(["a"], True)
    with pytest.raises(UserError, match="limit is 0"):
        of("--limit", "0")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n  lines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["mistake", "interrupt"],
)
def test_run(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code and capsys.readouterr().err == line


def test_a_deleted_working_folder_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="2"):
        run(lambda: None)
    assert "the current folder was deleted: change to" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--batch_size", str(2**40)], ["--max_steps", "0"]])
def test_sizes_of_a_run_are_bounded(flags):
    with pytest.raises(UserError, match="set it to 1"):
        parse_flags("About.", TrainConfig, argv=flags)


class TestStart:
    """The start of a script: flags are parsed before slow imports, and any state of the standard streams works."""

    def test_flags_are_answered_before_torch_is_imported(self):
        """--help and a wrong flag, for every script. One process is enough, because none of them imports torch."""
        code = """if True:
            import contextlib, glob, io, runpy, sys
            sys.path.insert(0, ".")
            for script in sorted(glob.glob("*.py")):
                for flag, code in (("--help", 0), ("--nonsense", 2)):
                    out = io.StringIO()
                    sys.argv = [script, flag]
                    try:
                        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                            runpy.run_path(script, run_name="__main__")
                        assert False, script
                    except SystemExit as end:
                        assert end.code == code, (script, flag, out.getvalue())
                    assert ("usage:" if code == 0 else "error: there is no setting") in out.getvalue(), script
                    assert "torch" not in sys.modules, script
            """
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_the_command_line_is_read_once(self, monkeypatch):
        times = []

        def parse_args(argv=None):
            times.append(argv)
            return argv or "command line"

        assert before_torch(parse_args) is parse_args and times == []  # imported
        parse_args.__module__ = "__main__"
        first = before_torch(parse_args)
        assert times == [None] and first() == "command line" and times == [None]
        assert first(["--seed"]) == ["--seed"] and times == [None, ["--seed"]]

    def test_a_notebooks_streams(self, monkeypatch):
        """Under %run in a notebook, stdout has no reconfigure() and no file descriptor."""
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        for argv, code in ((["--prompt", "京", "--max_new_tokens", "1"], None), (["--temperature", "x"], 2)):
            with pytest.raises(SystemExit) as end:
                run(lambda argv=argv: generate.main(argv))
            assert end.value.code == code
        assert out.getvalue().startswith("京")

    @pytest.mark.parametrize("closed", ["<&- >&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_streams_are_empty_ones(self, closed):
        code = "import sys; from src.config import run; run(lambda: print('京', sys.stdin.read(), file=sys.stderr))"
        shell = f'"$0" -c "$1" {closed}'
        done = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=ROOT, capture_output=True, input=b"")
        assert (done.returncode, done.stderr.decode().strip(), done.stdout) == (0, "" if "2>" in closed else "京", b"")

    def test_text_is_utf8_whatever_the_locale(self):
        code = "import sys; from src.config import run; run(lambda: print('京') or print('京', file=sys.stderr))"
        env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
        assert done.returncode == 0 and done.stdout.decode() == done.stderr.decode() == "京\n"

    @pytest.mark.parametrize(
        ("words", "said"), [(["once upon"], "--prompt 'once upon'?"), (["a", "b"], "mean --prompt?")]
    )
    def test_a_text_in_the_place_of_the_checkpoint(self, words, said):
        with pytest.raises(UserError, match="did you mean") as refused:
            generate.main(words)
        assert str(refused.value).endswith(said)
