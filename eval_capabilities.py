"""Test what a language model can do with Python code: complete lines, close brackets, copy names, add numbers, ...

    python eval_capabilities.py                                   # the released checkpoint
    python eval_capabilities.py runs/code --json code.json --plot code.png
    python eval_capabilities.py runs/code --only copy brackets    # some of the tests
    python eval_capabilities.py runs/code --quick                 # a quarter of the cases
    python eval_capabilities.py runs/code --code my_repository --text english=data/en.jsonl "notes=notes/*.txt"

The tests:

    bits         bits per byte by domain: the standard library, an installed package, and each --text
    valid        sampled functions that are valid Python; they are parsed, never executed
    lines        the next line, greedily: exactly right, and edit similarity
    brackets     the right closing bracket or quote ranked against wrong ones
    indent       the right indentation of a line ranked against wrong ones
    copy         a name that stood once in the context, by distance
    arithmetic   additions, by the number of digits
    depth        bits per byte after each recursion step
    retrieval    change of bits per byte by code retrieved from other files

The table on stdout has the number of cases and the chance level of each figure, and how this level is known: computed
or measured. docs/capabilities.md explains the tests. The cases depend on --seed and on the files alone, so two models
are tested on the same ones.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from typing import Literal

from src.config import before_torch, check_distinct, check_png, check_writable, parse_flags, run, write_json
from src.data.corpus import find_files
from src.errors import UserError, few

NAMES = ("bits", "valid", "lines", "brackets", "indent", "copy", "arithmetic", "depth", "retrieval")
PACKAGE = "accelerate"  # its version is pinned in requirements.txt
MOST_CHARACTERS = 20_000_000  # of one domain; more text is not read
QUICK = 0.25  # share of the cases with --quick


@dataclass
class CapabilityConfig:
    """Which model to test, and on what.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is tested
        only: tests to run, of bits, valid, lines, brackets, indent, copy, arithmetic, depth and retrieval; all if not
            given
        code: Python files from which the cases are made: files, globs or folders. If not given, the validation files of
            this Python's standard library, which training without paths does not use; for retrieval, the package
            accelerate
        text: further domains for bits per byte, as NAME=PATH; PATH is a file, glob or folder, and several with the same
            NAME are one domain
        text_field: name of the JSON field or parquet column that holds the text
        quick: make a quarter of the cases
        seed: seed of the cases and of the sampled text
        json: also write the figures to this JSON file
        plot: .png file in which to draw the figures
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of weights and arithmetic
    """

    checkpoint: str | None = None
    only: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    text_field: str = "text"
    quick: bool = False
    seed: int = 0
    json: str | None = None
    plot: str | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self):
        for name in self.only:
            if name not in NAMES:
                raise ValueError(f"only is {name!r}: choose from {', '.join(NAMES)}")
        for word in self.text:
            name, is_assigned, path = word.partition("=")
            if not (name and is_assigned and path):
                raise ValueError(f"text is {word!r}: write NAME=PATH, such as english=data/english.jsonl")
        check_png("plot", self.plot)

    @property
    def tests(self) -> list[str]:
        """The names of the tests to run, in the order of NAMES."""
        return [name for name in NAMES if not self.only or name in self.only]

    @property
    def domains(self) -> dict[str, list[str]]:
        """{name: paths} of the domains in `text`."""
        found = {}
        for word in self.text:
            name, _, path = word.partition("=")
            found.setdefault(name, []).append(path)
        return found


@before_torch
def parse_args(argv=None) -> CapabilityConfig:
    (config,) = parse_flags(__doc__, CapabilityConfig, argv=argv, positional="checkpoint")
    config.code = find_files(config.code) if config.code else []
    found = [(name, path) for name, paths in config.domains.items() for path in find_files(paths)]
    config.text = [f"{name}={path}" for name, path in found]
    check_distinct((config.json, config.plot), (*config.code, *(path for _, path in found)))
    for path in (config.json, config.plot):
        if path is not None:
            check_writable(path)
    return config


from tqdm import tqdm

from src.checkpoint import least_depth, load_model, resolve
from src.data.corpus import read_documents, stdlib_files
from src.evaluation.capabilities import TESTS, Material, check_model
from src.evaluation.capability_report import draw_capabilities, table
from src.metrics import describe_model
from src.rag.gain import retrieval_gain
from src.runtime import DTYPES, choose_device, choose_precision


def read_texts(paths, text_field="text") -> list[str]:
    """Returns the documents of files, globs and folders, until they have MOST_CHARACTERS."""
    texts, size = [], 0
    for text in read_documents(paths, text_field):
        texts.append(text)
        size += len(text)
        if size > MOST_CHARACTERS:
            break
    return texts


def python_files(paths) -> list[str]:
    return [path for path in find_files(paths) if path.endswith(".py")]


def read_material(config) -> Material:
    """Reads the files from which the cases are made."""
    files = python_files(config.code) if config.code else stdlib_files()[1]
    if not files:
        raise UserError(f"code has no .py file in {few(config.code)}: the cases are made from Python files")
    sources = read_texts(files)
    domains, package = {}, []
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported
    if spec is not None and {"bits", "retrieval"} & {*config.tests}:
        package = read_texts(python_files(spec.submodule_search_locations))
    if "bits" in config.tests:
        domains = {"code" if config.code else "standard library": sources}
        domains |= {f"package {PACKAGE}": package} if package else {}
        domains |= {name: read_texts(paths, config.text_field) for name, paths in config.domains.items()}
    share = QUICK if config.quick else 1.0
    least = least_depth(config.checkpoint)
    return Material(sources, domains, config.seed, share, sources if config.code else package, least)


def main(argv=None):
    config = parse_args(argv)
    device = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device)
    model, tokenizer = load_model(config.checkpoint, device, DTYPES[precision])
    check_model(model, tokenizer)
    material, results = read_material(config), []
    for name in (bar := tqdm(config.tests, unit="test")):
        bar.set_description(name)
        found = (TESTS | {"retrieval": retrieval_gain})[name](model, tokenizer, material)
        if not found:
            bar.write(f"{name}: this model or these files have no case, so the test is left out", file=sys.stderr)
        results += found
    if not results:
        raise UserError("no test has a case: give more Python files as --code, or choose other tests with --only")
    print(table(results))
    name = str(resolve(config.checkpoint))
    if config.json is not None:
        found = {"checkpoint": name, "seed": config.seed, "results": [r._asdict() for r in results]}
        write_json(config.json, found)
    if config.plot is not None:
        draw_capabilities(results, config.plot, describe_model(model), name)


if __name__ == "__main__":
    run(main)
