"""The README, the map and the recipes match the repository: their paths, commands, flags, make targets and figures."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.metrics import count_parameters, format_params
from src.model import TRMConfig, TRMModel

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
MAP = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("[a-z]*.md"))]  # not RESULTS, LOG: history
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SUFFIXES = ".py .md .txt .yaml .toml .png .sh .model .vocab .json .jsonl .gz .parquet .safetensors".split()
# files that commands write or users bring: the README names them, but they are not in the repository
MADE = ("runs", "data", "../", "~", "/", "http", "$", "wiki", "step_", "state", "last", "best")
MADE_NAMES = {
    *("config.yaml", "config.json", "metrics.jsonl", "learning_curve.png", "samples.txt", "model.safetensors"),
    *("ema.safetensors", "train_texts.txt", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
}

needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not there")


def code_blocks(text):
    """Returns the fenced code blocks of a text, with continued lines joined."""
    blocks = re.findall(r"^[ ]*```[^\n]*\n(.*?)^[ ]*```", text, re.S | re.M)
    return [re.sub(r"\\\n\s*", " ", block) for block in blocks]


def commands(text):
    """Returns [(program, words)] for the shell commands in code blocks: `python x.py ...` and `make x`."""
    found = []
    for line in "\n".join(code_blocks(text)).splitlines():
        line = re.sub(r"^\s*(\$|>)\s+", "", line.split(" #")[0]).strip()
        for part in re.split(r"\s(?:&&|\||;|>)\s?", line):
            part = re.sub(r"^(\w+=\S+\s+)+", "", part.strip())  # OMP_NUM_THREADS=1 python ...
            part = re.sub(r"accelerate launch (--\w+ \S+\s+)*", "python ", part)
            if re.match(r"(\S*/)?(python3?|make)\s", part):
                program, *words = shlex.split(part)
                found.append((Path(program).name.removesuffix("3"), words))
    return found


def tree_entries(text):
    """Yields the paths of the annotated tree: a code block with one entry per line, and a comment after two spaces."""
    for block in code_blocks(text):
        if not re.search(r"^\W*(train_trm_lm\.py)\b", block, re.M) or re.search(r"^\W*python ", block, re.M):
            continue
        stack = []  # (indent, folder)
        for line in block.splitlines():
            entry = re.match(r"^([\s│├└─|`+-]*)([\w.*][\w.*/-]*)", line)
            if not entry:
                continue
            indent, names = len(entry[1]), re.split(r"\s{2,}|\s#", line[len(entry[1]) :])[0]
            while stack and stack[-1][0] >= indent:
                stack.pop()
            for name in names.replace(",", " ").split():
                if name.endswith("/") or Path(name).suffix in SUFFIXES or name in ("Makefile", "LICENSE"):
                    yield "/".join([*(folder for _, folder in stack), name.rstrip("/")])
            if names.split()[0].endswith("/"):
                stack.append((indent, names.split()[0].rstrip("/")))


def is_made(path):
    return path.startswith(MADE) or Path(path).name in MADE_NAMES or re.search(r"[<>{}$]|NNN|\.\.\.|[A-Z]{4,}/", path)


def exists(path):
    """Whether a path or glob, relative to the root, exists in the repository."""
    return next(ROOT.glob(path), None) is not None


def refused(script, words):
    """Returns the error of the script's own parser for these words, or None."""
    module = importlib.import_module(Path(script).stem)
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            module.parse_args(words)
    except SystemExit as stop:
        return err.getvalue() if stop.code else None
    except UserError as error:  # a file that an earlier command writes may be missing
        return None if any(map(is_made, words)) else str(error)
    return None


def check(program, words):
    """Check that a command can be run: its script or make target exists, and its flags are real."""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in words if "=" not in word and word not in targets]
        assert not unknown, f"make {unknown}: the Makefile has {targets}"
    elif words[0] == "-m":
        assert words[1] in ("pytest", "venv", "pip", "ruff", "tensorboard.main"), words
    elif words[0] not in ("-c", "-"):
        script, words = words[0], list(words[1:])
        assert (ROOT / script).is_file(), f"python {script}: no such file"
        if "config" in "".join(words) and not any(is_made(w) for w in words if w.endswith(".yaml")):
            assert all((ROOT / w).is_file() for w in words if w.endswith(".yaml")), words
        if any(w.endswith(".yaml") and is_made(w) for w in words):  # a run's config: check only the flags
            at = words.index("--config")
            words = words[:at] + words[at + 2 :]
        if "/" not in script:
            said = refused(script, words)
            assert said is None, f"python {script} {shlex.join(words)}: {said}"


@needs_readme
def test_it_says_how_to_begin():
    found = commands(TEXT)
    assert ("make", ["demo"]) in found and any(words[0] == "train_trm_lm.py" for p, words in found if p == "python")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ci and ("make", ["test"]) in found  # .ci/run runs the README's test command


@needs_readme
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_real(page):
    for program, words in commands(page.read_text(encoding="utf-8")):
        check(program, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_in_fenced_blocks_and_compiles(page):
    """Indented code could be wrapped as prose. Equations are indented: they have no command."""
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^    (?:python|make|import) .*", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    for code in re.findall(r"^```python\n(.*?)^```|<<'EOF'\n(.*?)^EOF", text, re.S | re.M):
        compile("".join(code), page.name, "exec")


@needs_readme
def test_its_python_runs(capsys, monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)
    assert names["text"].startswith("def main(") and len(names["text"]) > 40
    *figures, shapes, states = capsys.readouterr().out.splitlines()
    assert len(figures) == 2 and all(0 < float(number) < 12 for line in figures for number in line.split())
    config, length = names["lm"].model.config, len(names["seen"].ids)
    assert shapes == f"torch.Size([{length}]) torch.Size([{config.recursion_steps}, {length}, {config.vocab_size}])"
    assert states == f"torch.Size([{config.visits_per_step * config.train_steps}, {length}, {config.d_model}])"


@needs_readme
def test_every_inline_command_is_real():
    for inline in re.findall(r"`((?:python|make) [^`]+)`", TEXT):
        for program, words in commands(f"```\n{inline}\n```"):
            check(program, [word for word in words if word != "..."])


@needs_readme
def test_every_inline_flag_is_real():
    known = set()
    for script in SCRIPTS:
        module, out = importlib.import_module(Path(script).stem), io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            module.parse_args(["--help"])
        known |= set(re.findall(r"--(\w+)", out.getvalue()))
    named = set(re.findall(r"`--(\w+)", TEXT))
    assert named <= known | {"version"}, named - known


@pytest.mark.parametrize("page", [README, MAP], ids=lambda page: page.name)
def test_every_path_is_real(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`([\w./*~-]+)`", text) + re.findall(r"\]\(([^)#\s]+)\)", text)
    wrong = [
        path
        for path in paths
        if (path.endswith("/") or Path(path).suffix in SUFFIXES) and not is_made(path) and not exists(path.rstrip("/"))
    ]
    assert not wrong


def test_the_tree_is_the_tree():
    """The tree in docs/architecture.md names every script, module and recipe, and nothing else."""
    entries = list(tree_entries(MAP.read_text(encoding="utf-8")))
    wrong = [path for path in entries if not is_made(path) and next(ROOT.glob(path), None) is None]
    assert not wrong
    named = {path for entry in entries for path in ROOT.glob(entry)}
    real = {*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py"), *CONFIGS}
    assert {path.name for path in real - named} <= {"__init__.py"}


@pytest.mark.parametrize("page", [README, MAP], ids=lambda page: page.name)
def test_named_code_is_real(page):
    """Names in code style with a dot or a call, such as `TRMModel.latent_recursion`, exist in the source."""
    text = page.read_text(encoding="utf-8")
    source = "\n".join(p.read_text() for p in (*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py")))
    named = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)\(\)`", text)) | set(re.findall(r"`[A-Za-z]\w+\.([a-z]\w+)`", text))
    named = {name for name in named if f".{name}" not in SUFFIXES}
    assert {name for name in named if not re.search(rf"^\s*(?:def|class) {name}\b|\.{name}\b", source, re.M)} == set()


@needs_readme
def test_parameter_counts():
    """If a line names a config and a figure such as `1.64M parameters`, the config's model has that many."""
    for line in TEXT.splitlines():
        names, figures = re.findall(r"configs/(\w+)\.yaml", line), re.findall(r"([\d.]+[KMB]) parameters", line)
        if names and len(figures) == 1:
            config = parse_config(ROOT / "configs" / f"{names[0]}.yaml")[2]
            if config.vocab_size is not None:  # otherwise the tokenizer's file sets it, which is not in the repository
                assert parameters_of(config) == figures[0], line
    released = ROOT / "checkpoints" / "python"
    said = re.search(r"released[^.|]*?([\d.]+[KMB]) parameters", TEXT, re.S)
    if said and released.exists():
        from src.checkpoint import load_config

        assert format_params(count_parameters(TRMModel(load_config(released)))["total"]) == said[1]


def parse_config(path):
    """Parse a recipe with the script that it is for: only recipes of puzzles have the setting `puzzle`."""
    is_puzzle = re.search(r"^puzzle:", path.read_text(encoding="utf-8"), re.M)
    script = importlib.import_module("train_puzzles" if is_puzzle else "train_trm_lm")
    return script.parse_args(["--config", str(path)])


def parameters_of(config):
    with torch.device("meta"):
        return format_params(count_parameters(TRMModel(config))["total"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_are_real_and_say_what_they_are(path):
    """Every recipe can be parsed, and its header has a command that uses it."""
    config = parse_config(path)[2]
    assert config.to_dict() == TRMConfig(**config.to_dict()).to_dict()
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert "hardware" in header
    lines = [line.lstrip("# ").removeprefix("command").strip() for line in header.splitlines()]
    found = [c for line in lines for c in commands(f"```\n{line}\n```")]
    is_made = re.search("make (demo|puzzles)", header)  # the Makefile names the recipe
    assert is_made or any(f"configs/{path.name}" in " ".join(words) for _, words in found), header
    for program, words in found:
        check(program, words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_in_a_scripts_docstring_are_real(script):
    doc = importlib.import_module(Path(script).stem).__doc__
    found = commands(f"```\n{doc}\n```")
    assert any(words[0] == script for _, words in found), f"{script} shows no example"
    for program, words in found:
        check(program, words)


def test_scripts_and_modules_keep_their_size():
    for path in (*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py"), *(ROOT / "tests").glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 470, f"{path.name} has {len(lines)} lines"
        assert not re.search(r"/(home|root|work|tmp)/", "\n".join(lines)) or path.name == "test_readme.py", path.name


def test_no_root_script_hides_a_package():
    for script in SCRIPTS:
        assert Path(script).stem not in sys.stdlib_module_names
        assert Path(script).stem not in {"datasets", "evaluate", "onnx", "tokenizers", "transformers"}


class TestMakefile:
    text = (ROOT / "Makefile").read_text() if (ROOT / "Makefile").exists() else ""

    def test_targets(self):
        targets = set(re.findall(r"^([\w-]+):", self.text, re.M))
        assert targets >= {"help", "demo", "test", "test-slow", "lint", "bench", "clean"}

    def test_its_commands_are_real(self):
        recipe = re.sub(r"@?\$\(VENV\)", "python", self.text)
        lines = [line.strip() for line in recipe.splitlines() if line.startswith("\tpython ")]
        found = commands("```\n" + "\n".join(lines) + "\n```")
        assert len(found) >= 6
        for program, words in found:
            check(program, words)

    @pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
    def test_requirements_are_pinned(self, name):
        lines = (ROOT / name).read_text().splitlines()
        names = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
        assert ("-r requirements.txt" in names) == (name == "requirements-dev.txt")
        loose = [name for name in names if not re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+", name)]
        assert loose in ([], ["-r requirements.txt"])

    def test_each_target_installs_only_what_it_needs(self):
        needs = dict(re.findall(r"^([\w-]+): \$\((\w+)\)", self.text, re.M))
        assert needs["demo"] == "CORE" and needs["test"] == needs["lint"] == needs["bench"] == "DEV"


OUTPUTS = r"(?:--(?:output|save_dir|test_out|dev_out|trace|depth_curve|model_prefix|cache_dir)|(?<=\s)>)[ =]+([\w./-]+)"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_what_the_commands_write_is_ignored_by_git():
    """`git status` stays clean after every command of the README, the docs and the scripts' docstrings."""
    docs = [README, ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [path.read_text(encoding="utf-8") for path in docs if path.name != "LOG.md"]
    texts += [importlib.import_module(Path(script).stem).__doc__ for script in SCRIPTS]
    lines = [line for text in texts for line in text.splitlines() if re.search(r"python3? \S+\.py", line)]
    written = {path for line in lines for path in re.findall(OUTPUTS, line)}
    written |= {found[1] for line in lines if (found := re.search(r"convert\.py \S+ ([\w./-]+)", line))}
    assert len(written) > 15
    asked = subprocess.run(
        ["git", "check-ignore", "--stdin"], cwd=ROOT, input="\n".join(written), capture_output=True, text=True
    )
    assert written - set(asked.stdout.splitlines()) == set()
