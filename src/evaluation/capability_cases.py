"""Cases for the tests of `capabilities.py`, made from Python files by seed. Nothing here needs a model.

Each function draws at most `count` cases with a `random.Random`. The same files and seed give the same cases for every
model and tokenizer, except in `copy_cases`, whose distances are counted in tokens.
"""

import ast
import io
import itertools
import random
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from typing import NamedTuple

from src.data.records import prompt_of
from src.files.text import parse_python

CONTEXT = 600  # characters before a bracket or an indented line; a multiple of what such a decision needs
REACH = 200  # most characters between a bracket and its partner
PAIRS = {"(": ")", "[": "]", "{": "}"}
CLOSERS = tuple(PAIRS.values())
QUOTES = ("'", '"')
LEVELS = ("deeper", "same", "shallower")
CUE = "result ="  # stands before a name, and again where the name is asked for


class Choice(NamedTuple):
    """A context with several candidates for what follows, of which one is right."""

    context: str
    candidates: tuple[str, ...]
    right: int  # index of the right candidate
    group: str


class Completion(NamedTuple):
    """A prompt and the text that follows it in the file."""

    prompt: str
    truth: str


# ---- text -----------------------------------------------------------------------------------------------------------


def excerpts(texts: list[str], count: int, size: int, rng: random.Random) -> list[str]:
    """Returns `count` different excerpts of `size` characters, or fewer if the texts are small.

    An excerpt starts at a line or at the end of a sentence. Long texts are drawn more often than short ones."""
    texts = [text for text in texts if text.strip()]
    weights, found = list(map(len, texts)), {}
    for text in rng.choices(texts, weights, k=4 * count) if texts else ():
        start = rng.randrange(max(1, len(text) - size + 1))
        place = re.compile(r"(?<=[\n.。])\s*(?=\S)").search(text, start) if start else None
        start = place.start() if place and len(text) - place.start() >= size else start
        found[text[start : start + size]] = None
    return [part for part in found if part.strip()][:count]


def lines_of(text: str) -> list[str]:
    """Returns the lines of a text with their line breaks, as tokenize counts them: form feeds do not end a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def line_cases(texts: list[str], count: int, rng: random.Random) -> list[Completion]:
    """Returns statements of one line, each with all text before it. Lines of under 6 characters are left out."""
    usable = {}
    for text in texts:
        lines = lines_of(text)
        rows = [row - 1 for row, _ in _statements(text) if row > 3]
        rows = [i for i in rows if len(lines[i].strip()) > 5 and lines[i].strip()[0] not in "'\""]
        if rows:
            usable[text] = lines, rows
    found = []
    for _ in range(4 * count // max(1, len(usable)) + 1):  # each file gives about as many cases
        for lines, rows in _shuffled(list(usable.values()), rng):
            i = rng.choice(rows)
            found.append(Completion("".join(lines[:i]), lines[i].rstrip("\n")))
    return list(dict.fromkeys(found))[:count]


def functions(texts: list[str], rng: random.Random) -> Iterator[Completion]:
    """Yields functions in random order: `def` line and docstring as the prompt, the statements after it as the truth.

    Methods are moved to the left margin. Decorators are left out."""
    nodes = [(text, node) for text in texts for node in _documented(text)]
    for text, node in _shuffled(nodes, rng):
        lines = textwrap.dedent("".join(lines_of(text)[node.lineno - 1 : node.end_lineno]))
        lines = lines_of(lines)
        size = node.body[0].end_lineno - node.lineno + 1  # lines of the prompt
        prompt, truth = "".join(lines[:size]), "".join(lines[size:]).rstrip() + "\n"
        if prompt.startswith(("def ", "async def ")) and is_function(prompt + truth):
            yield Completion(prompt, truth)


def _documented(text):
    """Returns the functions of a source that have a docstring and at least one more statement, on lines of its own."""
    nodes = ast.walk(parse_python(text) or ast.Module([], []))
    found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [n for n in found if ast.get_docstring(n) and len(n.body) > 1 and n.body[1].lineno > n.body[0].end_lineno]


def is_function(text: str) -> bool:
    """Whether a text is valid Python and starts with a function that has a statement after its docstring."""
    tree = parse_python(text)
    body = getattr(tree.body[0], "body", []) if tree is not None and tree.body else []
    return len(body) > 1


def cut_function(text: str, is_whole: bool) -> str:
    """Returns the part of a continuation that belongs to the function: up to the first line at the left margin.

    If there is no such line, the text was cut off in its last line, which is dropped, unless is_whole."""
    lines = lines_of(text)
    for i, line in enumerate(lines):
        if line.strip() and not line[0].isspace():
            return "".join(lines[:i])
    return text if is_whole else "".join(line for line in lines if line.endswith("\n"))


# ---- brackets and indentation ---------------------------------------------------------------------------------------


def bracket_cases(texts: list[str], count: int, rng: random.Random) -> list[Choice]:
    """Returns places where a bracket closes in a file, as many for each kind, so that no fixed answer is better.

    Group "bracket": the candidates are the three closing brackets. Group "nested": the right bracket and that of the
    next outer bracket, which has another kind."""
    every = [case for text in texts for case in _brackets(text)]
    kinds, nested = {}, {}
    for case in _shuffled(every, rng):
        of_kind = kinds if case.group == "bracket" else nested.setdefault(case.candidates, {})
        of_kind.setdefault(case.right, []).append(case)
    found = _balanced(kinds, count)
    for _, both in sorted(nested.items()):
        found += _balanced(both, count // len(CLOSERS)) if len(both) == 2 else []
    return found


def _brackets(text):
    stack, starts = [], _line_starts(text)
    for token in _tokens(text):
        if token.type != tokenize.OP:
            continue
        at = starts[token.start[0] - 1] + token.start[1]
        if token.string in PAIRS:
            stack.append((token.string, at))
        elif token.string in CLOSERS and stack:
            kind, opened = stack.pop()
            context = _before(text, at)
            if text[at] != token.string or at - opened > REACH or not context or context[-1] in "\n ":
                continue
            yield Choice(context, CLOSERS, CLOSERS.index(token.string), "bracket")
            if stack and stack[-1][0] != kind and at - stack[-1][1] <= REACH:
                both = tuple(sorted((PAIRS[kind], PAIRS[stack[-1][0]])))
                yield Choice(context, both, both.index(token.string), "nested")


def quote_cases(texts: list[str], count: int, rng: random.Random) -> list[Choice]:
    """Returns places where a string of one line ends, half of them for each kind of quote."""
    kinds = {}
    for text in _shuffled(texts, rng):
        starts = _line_starts(text)
        for token in _tokens(text):
            string = token.string
            if token.type != tokenize.STRING or string[0] not in QUOTES or not 4 <= len(string) <= REACH:
                continue
            at = starts[token.start[0] - 1] + token.start[1] + len(string) - 1
            inside = set(string[1:-1])
            if token.start[0] == token.end[0] and not inside & {*QUOTES, "\\"} and text[at] == string[0]:
                case = Choice(_before(text, at), QUOTES, QUOTES.index(string[0]), "quote")
                kinds.setdefault(string[0], []).append(case)
    return _balanced({kind: _shuffled(cases, rng) for kind, cases in sorted(kinds.items())}, count)


def indent_cases(texts: list[str], count: int, rng: random.Random) -> list[Choice]:
    """Returns lines whose indentation is asked for: the candidates are the line at three levels of indentation.

    A third of the lines each is deeper than the line before (after a colon), as deep, and one level less deep."""
    kinds = {level: [] for level in LEVELS}
    for text in _shuffled(texts, rng):
        depths = _statements(text)
        lines, starts = lines_of(text), _line_starts(text)
        for (before, old), (row, new) in itertools.pairwise(depths):
            # levels of 4 blanks, a line before that has all three choices, and no blank line in between
            if old < 4 or row != before + 1 or abs(new - old) not in (0, 4) or old % 4:
                continue
            code = lines[row - 1].strip()
            if code.split(":")[0].split(" ")[0] in ("else", "elif", "except", "finally"):
                continue  # the word itself shows the level
            level = LEVELS[0] if new > old else LEVELS[1] if new == old else LEVELS[2]
            candidates = tuple(f"\n{' ' * depth}{code}\n" for depth in (old + 4, old, old - 4))
            context = _before(text, starts[row - 1] - 1)
            kinds[level].append(Choice(context, candidates, LEVELS.index(level), level))
    return _balanced({level: _shuffled(cases, rng) for level, cases in kinds.items()}, count)


def _statements(text):
    """Returns [(row, indentation in blanks)] of the statements that fit on one line."""
    found, first = [], None
    for token in _tokens(text):
        if token.type in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            continue
        if first is None:
            first = token
        if token.type == tokenize.NEWLINE:
            if first.start[0] == token.start[0] and "\t" not in first.line[: first.start[1]]:
                found.append((first.start[0], first.start[1]))
            first = None
    return found


def _tokens(text):
    """Yields the tokens of a source, up to the first error."""
    try:
        yield from tokenize.generate_tokens(io.StringIO(text).readline)
    except (tokenize.TokenError, SyntaxError):
        return


def _line_starts(text):
    return [0, *itertools.accumulate(map(len, io.StringIO(text)))]


def _before(text, at):
    """Returns the last lines before a place, at most CONTEXT characters."""
    start = max(0, at - CONTEXT)
    if start:
        start = text.find("\n", start) + 1
    return text[start:at] if start < at else ""


def _balanced(kinds, count):
    """Returns as many cases of each kind, at most `count` in all."""
    most = min(map(len, kinds.values()), default=0)
    return [case for cases in kinds.values() for case in cases[: min(most, count // len(kinds))]]


# ---- names and numbers ----------------------------------------------------------------------------------------------


def copy_cases(
    texts: list[str], distance: int, count: int, n_tokens: Callable[[str], int], rng: random.Random
) -> list[Choice]:
    """Returns cases in which a name stands once, about `distance` tokens before the place where it is asked for.

    Between them are statements of the files that contain neither name. The candidates are this name and another one of
    the same length, and each pair of names is asked for both ways: a model that ignores the context is right in exactly
    half of the cases. Returns no case if the distance is too short for the lines that hold the names."""
    words = {word for text in texts for word in re.findall(r"\b[a-z]+_[a-z]+\b", text)}
    names = sorted(word for word in words if 7 <= len(word) <= 14)
    code, found = _plain_statements(texts), []
    for _ in range(20 * count if names and code else 0):  # a draw may fail
        first = rng.choice(names)
        others = [name for name in names if len(name) == len(first) and name != first]
        if not others:
            continue
        pair = (first, rng.choice(others))
        start = rng.randrange(len(code))
        usable = (line for line in code[start:] + code[:start] if not any(name in line for name in pair))
        contexts = _fill(pair, usable, distance, n_tokens)
        candidates = tuple(f" {name}()\n" for name in pair)
        found += [Choice(context, candidates, i, str(distance)) for i, context in enumerate(contexts)]
        if len(found) >= count:
            break
    return found


def _plain_statements(texts):
    """Returns the statements that can stand anywhere, without indentation: mostly assignments and calls."""
    found = []
    for text in texts:
        lines = lines_of(text)
        code = (lines[row - 1].strip() for row, _ in _statements(text))
        found += [line for line in code if not re.match(r"(return|yield|raise|break|continue|pass|del)\b|['\"@]", line)]
    return [line for line in found if ":" not in line and CUE.split()[0] not in line]


def _fill(pair, lines, distance, n_tokens):
    """Returns the context for each name, or () if the lines do not fill at least 85 % of the distance."""
    heads = [f"{CUE} {name}()\n" for name in pair]
    room = distance - max(n_tokens(head) for head in heads)
    filler = ""
    for line in itertools.islice(lines, 20 + distance):
        if room < 0.15 * distance:
            break
        if (size := n_tokens(line + "\n")) <= room:
            filler, room = f"{filler}{line}\n", room - size
    contexts = [head + filler + CUE for head in heads]
    reached = [n_tokens(context) - n_tokens(CUE) for context in contexts]
    return contexts if 0.85 * distance <= min(reached) and max(reached) <= distance and filler else ()


def addition_cases(digits: int, count: int, rng: random.Random) -> list[Completion]:
    """Returns additions of two numbers that both have as many digits, as the prompts of make_problems.py's records."""
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
    pairs = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]
    return [Completion(prompt_of(f"{a} + {b}"), str(a + b)) for a, b in pairs]


def addition_chance(digits: int) -> float:
    """Returns the share of the most frequent sum among all additions of `addition_cases`."""
    return 1 / (10 if digits == 1 else 9 * 10 ** (digits - 1))


# ---- drawing --------------------------------------------------------------------------------------------------------


def _shuffled(items, rng):
    return rng.sample(items, len(items))
