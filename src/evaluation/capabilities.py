"""Tests of what a causal language model can do. docs/capabilities.md explains each of them.

Each test makes its cases from Python files by seed (`capability_cases.py`), lets the model answer them
(`capability_answers.py`), and returns its results with the number of cases and the chance level: what a model without
the ability reaches. Text that a model writes is parsed at most, never executed. The test of retrieved code has the
same form, but is in `src/rag/gain.py`, because the core does not import `src/rag`; eval_capabilities.py adds it.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import fmean
from typing import NamedTuple

from src.errors import UserError
from src.evaluation import capability_cases as make
from src.evaluation.capability_answers import (
    character_probabilities,
    credit,
    edit_similarity,
    log_probabilities,
    write,
)
from src.evaluation.scoring import choose_stride, score_corpus
from src.exits import ExitRule, max_depth

EXCERPT = 1200  # characters of a text that is scored
DIGITS = (1, 2, 3, 4, 5)
# every character of these must come back from the tokenizer
SAMPLE = "".join(map(chr, range(32, 127))) + "\n\n        return x\n    y = 1\n"


class Result(NamedTuple):
    """One figure of a test."""

    test: str
    name: str
    value: float
    unit: str  # "share" of the cases, "bits/byte", or "change" of bits per byte
    cases: int
    chance: float
    chance_from: str  # how the chance level is known: computed or measured
    interval: tuple[float, float] | None  # 95 % confidence interval
    best: float | None = None  # of the true text, measured in the same way


class Material(NamedTuple):
    """What the cases are made from, and how many."""

    sources: list[str]  # Python files that the model has not seen
    domains: dict[str, list[str]]  # name -> texts, for bits per byte
    seed: int = 0
    share: float = 1.0  # of the usual number of cases
    repository: Sequence[str] = ()  # Python files of one project that the model has not seen, for retrieval
    least_depth: int = 1  # the first recursion step that the model was trained to answer after

    def count(self, usual: int) -> int:
        return max(1, round(usual * self.share))

    def rng(self, name: str) -> random.Random:
        """Returns the random numbers of one test, which do not depend on the tests before it."""
        return random.Random(f"{self.seed} {name}")


def check_model(model, tokenizer):
    """Raises UserError if the model is not a causal language model, or if its tokenizer does not keep code as it is."""
    choose_stride(model.config)
    if tokenizer.lost_bytes(SAMPLE, tokenizer.encode(SAMPLE)):
        advice = "use a model whose tokenizer was made with train_spm.py or train_tokenizer.py"
        raise UserError(f"the tokenizer loses line breaks, blanks or ASCII characters of Python code: {advice}")


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns Wilson's 95 % confidence interval of the mean of values from 0 to 1. It is exact enough for any share,
    and too wide rather than too narrow for values between 0 and 1."""
    values = list(values)
    n, p, z = len(values), fmean(values), 1.96
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def _share(test, name, values, chance, chance_from, best=None) -> Result:
    values = [float(value) for value in values]
    return Result(test, name, fmean(values), "share", len(values), chance, chance_from, interval(values), best)


# ---- bits per byte --------------------------------------------------------------------------------------------------


def bits_per_domain(model, tokenizer, material: Material) -> list[Result]:
    """Bits per byte of excerpts of each domain's texts."""
    found = []
    for name, texts in material.domains.items():
        parts = make.excerpts(texts, material.count(40), EXCERPT, material.rng(name))
        if parts:
            figures = score_corpus(model, tokenizer, parts).figures
            found.append(_bits("bits", name, figures.bits_per_byte, parts))
    return found


def _bits(test, name, value, texts):
    chance_from = "measured: entropy of single bytes"
    return Result(test, name, value, "bits/byte", len(texts), byte_entropy(texts), chance_from, None)


def byte_entropy(texts: list[str]) -> float:
    """Returns the entropy of single bytes of the texts: bits per byte of a model that knows their frequencies alone."""
    counts = Counter("".join(texts).encode())
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def depth_gain(model, tokenizer, material: Material) -> list[Result]:
    """Bits per byte after each recursion step, at least two, and the change from the first trained to the last one."""
    if model.config.recursion == "none":
        return []
    trained = max_depth(model.config)
    least = min(material.least_depth, trained)
    parts = make.excerpts(material.sources, material.count(20), EXCERPT, material.rng("depth"))
    rule = ExitRule(max_recursion_depth=max(2, trained))
    steps = score_corpus(model, tokenizer, parts, rule=rule, per_step=True).steps
    found = []
    for number, figures in enumerate(steps, 1):
        name = f"step {number}" + " (not trained)" * (not least <= number <= trained)
        found.append(_bits("depth", name, figures.bits_per_byte, parts))
    first = least if least < len(steps) else 1  # a single trained step is compared with the first one
    change = steps[-1].bits_per_byte / steps[first - 1].bits_per_byte - 1
    name = f"change from step {first} to {len(steps)}"
    return [*found, Result("depth", name, change, "change", len(parts), 0.0, "computed: depth is not used", None)]


# ---- code that the model writes -------------------------------------------------------------------------------------


def valid_python(model, tokenizer, material: Material) -> list[Result]:
    """Share of sampled functions that are valid Python with a statement; also of the true text and of random text."""
    new_tokens = min(96, model.config.max_seq_len // 2)
    room, rng = model.config.max_seq_len - new_tokens - 1, material.rng("valid")
    fits = (case for case in make.functions(material.sources, rng) if len(tokenizer.encode(case.prompt)) <= room)
    cases = list(islice(fits, material.count(96)))
    if not cases:
        return []
    truths = [tokenizer.encode(case.truth) for case in cases]
    vocabulary = [index for ids in truths for index in ids]

    def share(continuations):
        pairs = zip(cases, continuations)
        return [make.is_function(case.prompt + make.cut_function(*continuation)) for case, continuation in pairs]

    options = {"temperature": 0.8, "top_p": 0.95, "seed": material.seed}
    answers = write(model, tokenizer, [case.prompt for case in cases], new_tokens, _has_left, **options)
    true = [(tokenizer.decode(ids[:new_tokens]), len(ids) <= new_tokens) for ids in truths]
    rand = [(tokenizer.decode(rng.choices(vocabulary, k=new_tokens)), False) for _ in cases]
    chance, best = fmean(share(rand)), fmean(share(true))
    return [_share("valid", "sampled functions", share(answers), chance, "measured: tokens in random order", best)]


def _has_left(text):
    """Whether a text has reached the line after a function."""
    return bool(re.search(r"\n\S", text))


def next_lines(model, tokenizer, material: Material) -> list[Result]:
    """Greedy next lines: share that is exactly right, and mean edit similarity."""
    cases = make.line_cases(material.sources, material.count(96), material.rng("lines"))
    if not cases:
        return []
    longest = max(len(tokenizer.encode(f"\n{case.truth}\n")) for case in cases)
    new_tokens = min(longest + 2, model.config.max_seq_len // 2)
    prompts, truths = [case.prompt for case in cases], [case.truth.rstrip() for case in cases]
    lines = [_line(a.text) for a in write(model, tokenizer, prompts, new_tokens, _has_line, temperature=0)]
    others, chance_from = truths[1:] + truths[:1], "measured: the line of another case"

    def similarities(lines):
        return [edit_similarity(line.strip(), truth.strip()) for line, truth in zip(lines, truths)]

    def exact(lines):
        return [line == truth for line, truth in zip(lines, truths)]

    return [
        _share("lines", "exactly right", exact(lines), fmean(exact(others)), chance_from),
        _share("lines", "edit similarity", similarities(lines), fmean(similarities(others)), chance_from),
    ]


def _line(text):
    """Returns the first line that is not blank."""
    return next((line.rstrip() for line in text.split("\n") if line.strip()), "")


def _has_line(text):
    return bool(re.search(r"\S.*\n", text))


# ---- structure ------------------------------------------------------------------------------------------------------


def closers(model, tokenizer, material: Material) -> list[Result]:
    """The right closing bracket or quote ranked against wrong ones, and its probability."""
    cases = make.bracket_cases(material.sources, material.count(120), material.rng("brackets"))
    cases += make.quote_cases(material.sources, material.count(60), material.rng("quotes"))
    scores = character_probabilities(model, tokenizer, cases)
    names = {"bracket": ") ] or }", "nested": "inner before outer bracket", "quote": "' or \""}
    found = []
    for group, name in names.items():
        mine = [(case, row) for case, row in zip(cases, scores) if case.group == group]
        if mine:
            size = len(mine[0][0].candidates)
            values = [credit(row, case.right) for case, row in mine]
            found.append(_share("brackets", name, values, 1 / size, f"computed: 1 of {size}"))
    if cases:
        counts = Counter(character for text in material.sources for character in text)
        right = [case.candidates[case.right] for case in cases]
        chance = fmean(counts[character] / counts.total() for character in right)
        values = [row[case.right] for case, row in zip(cases, scores)]
        chance_from = "measured: frequency of the character"
        found.append(_share("brackets", "probability of the right one", values, chance, chance_from))
    return found


def indentation(model, tokenizer, material: Material) -> list[Result]:
    """The right indentation of a line ranked against the two others."""
    cases = make.indent_cases(material.sources, material.count(90), material.rng("indent"))
    scores = log_probabilities(model, tokenizer, cases)
    values = [credit(row, case.right) for case, row in zip(cases, scores)]
    names = {"deeper": "deeper after a colon", "same": "same level", "shallower": "one level back"}
    groups = {name: [v for v, case in zip(values, cases) if case.group == level] for level, name in names.items()}
    groups["all levels"] = values
    return [_share("indent", name, group, 1 / 3, "computed: 1 of 3") for name, group in groups.items() if group]


def copying(model, tokenizer, material: Material) -> list[Result]:
    """A name that stood once in the context, by distance: ranked against another name, and completed from its start."""
    ranked, completed = [], []
    for distance in copy_distances(model.config.max_seq_len, tokenizer):
        rng = material.rng(f"copy {distance}")
        count, n_tokens = max(2, material.count(40)), lambda text: len(tokenizer.encode(text))
        cases = make.copy_cases(material.sources, distance, count, n_tokens, rng)
        if not cases:
            continue
        scores = log_probabilities(model, tokenizer, cases)
        values = [credit(row, case.right) for case, row in zip(cases, scores)]
        ranked.append(_share("copy", f"{distance} tokens, ranked", values, 0.5, "computed: 1 of 2"))
        partners = [case for pair in zip(cases[1::2], cases[::2]) for case in pair]  # that have the other name
        chance = fmean(_completed(model, tokenizer, partners, [1 - case.right for case in partners]))
        values, chance_from = (
            _completed(model, tokenizer, cases, [case.right for case in cases]),
            "measured: without the name",
        )
        completed.append(_share("copy", f"{distance} tokens, completed", values, chance, chance_from))
    return ranked + completed


def _completed(model, tokenizer, cases, asked) -> list[bool]:
    """Returns whether the model completes the candidate that is asked for, after the context and the name's start."""
    starts, ends = zip(*(case.candidates[i].rstrip("()\n").split("_") for case, i in zip(cases, asked)))
    prompts = [f"{case.context}{start}_" for case, start in zip(cases, starts)]
    new_tokens = max(len(tokenizer.encode(end)) for end in ends) + 2
    answers = write(model, tokenizer, prompts, new_tokens, _has_word, in_word=True, temperature=0)
    return [re.match(r"\w*", answer.text)[0] == end for answer, end in zip(answers, ends)]


def _has_word(text):
    return bool(re.search(r"\W", text))


def copy_distances(context: int, tokenizer) -> list[int]:
    """Returns 16, 32, 64, ... and the longest distance in tokens that leaves room in the context for the names."""
    longest = context - len(tokenizer.encode(f"{make.CUE} four_and_ten()\n")) - 4
    distances = [16 * 2**k for k in range(20) if 16 * 2**k < 0.8 * longest]
    return distances + [longest] * (longest >= 16)


def arithmetic(model, tokenizer, material: Material) -> list[Result]:
    """Additions answered exactly, by the number of digits."""
    found = []
    for digits in DIGITS:
        cases = make.addition_cases(digits, material.count(40), material.rng(f"arithmetic {digits}"))
        new_tokens = len(tokenizer.encode(" " + "9" * (digits + 1))) + 3
        prompts = [case.prompt for case in cases]
        if max(len(tokenizer.encode(prompt)) for prompt in prompts) + new_tokens >= model.config.max_seq_len:
            break
        texts = [a.text for a in write(model, tokenizer, prompts, new_tokens, _has_line, temperature=0)]
        values = [_line(text).strip() == case.truth for text, case in zip(texts, cases)]
        name = f"{digits} digit{'s' * (digits > 1)}"
        found.append(_share("arithmetic", name, values, make.addition_chance(digits), "computed: most frequent sum"))
    return found


TESTS = {
    "bits": bits_per_domain,
    "valid": valid_python,
    "lines": next_lines,
    "brackets": closers,
    "indent": indentation,
    "copy": copying,
    "arithmetic": arithmetic,
    "depth": depth_gain,
}
