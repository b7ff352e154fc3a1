"""The tests of what a model can do, on models that are built to know the answer, or to know nothing."""

import itertools
import json
import random
import re
from math import log2, nan
from types import SimpleNamespace

import pytest
import torch
from texts import BYTE, usual_spm, write

import eval_capabilities
from src.checkpoint import save_checkpoint
from src.config import run
from src.errors import UserError
from src.evaluation import capabilities as tests
from src.evaluation import capability_answers as answers
from src.evaluation import capability_cases as make
from src.evaluation.capabilities import Material, Result
from src.evaluation.capability_report import draw_capabilities, shown, table
from src.model import TRMConfig
from src.rag.gain import retrieval_gain

CODE = '''"""A module for the tests."""


class Shop:
    """A shop with goods."""

    def total_price(self, goods, rates):
        """Return the price of all goods."""
        price_sum = 0
        for name in goods:
            price_sum += goods[name]
            rate_of = rates["usual"]
            if rate_of > 0:
                price_sum = round(price_sum * (1 + rate_of), 2)
                tax_paid = [rates['tax']]
            price_sum += 1
        self.last_sum = {name: goods[name] for name in goods}
        return price_sum

    def cheap_goods(self, goods, most_paid):
        """Return the names of goods that cost little."""
        found_names = [name for name in goods if goods[name] < most_paid]
        self.old_names = {name: len(name) for name in found_names}
        rows_made = [{"name": name} for name in found_names]
        print(rows_made, "and", 'names', [self.old_names[name] for name in found_names])
        return found_names
'''
LONG = CODE + "".join(f"number{i} = {7919 * i}\n" for i in range(60))


class Fake:
    """A model made of a function: the bytes of a text -> the byte that comes next (None: nothing is known).

    It has what scoring and generation use of a TRMModel. All bytes are equally likely if nothing is known. After BOS,
    or a BOS of its own, it sees the whole text; padding is left out."""

    training = False

    def __init__(self, following=lambda text: None, max_seq_len=512):
        settings = {"d_model": 8, "n_heads": 1, "n_layers": 1, "recursion": "none"}
        self.config = TRMConfig(vocab_size=BYTE.vocab_size, max_seq_len=max_seq_len, **settings)
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self.following = following

    def eval(self):
        return self

    train = new_cache = lambda self, *args, **options: []

    def __call__(self, ids, attention_mask=None, cache=None, exit=None, return_steps=False):
        rows = [[i for i, real in zip(*row) if real] for row in zip(ids.tolist(), self._mask(ids, attention_mask))]
        if cache is not None:  # it holds the rows so far
            cache[:] = [old + new for old, new in zip(cache or [[]] * len(rows), rows)]
        logits = torch.zeros(*ids.shape, BYTE.vocab_size)
        for number, row in enumerate(rows):
            whole = row if cache is None else cache[number]
            seen = bytes(i for i in whole if i < 256)
            places = [t for t, real in enumerate(self._mask(ids, attention_mask)[number]) if real]
            for t, size in zip(places, range(len(whole) - len(row) + 1, len(whole) + 1)):
                index = self.following(seen[: size - len(whole) + len(seen)])
                if index is not None:
                    logits[number, t, index] = 40
        steps = torch.ones_like(ids)
        return SimpleNamespace(logits=logits[None] if return_steps else logits, carry=SimpleNamespace(steps=steps))

    @staticmethod
    def _mask(ids, mask):
        return (torch.ones_like(ids) if mask is None else mask).tolist()


def knower(*texts):
    """A model that knows these texts: what follows the last characters, and EOS after their end."""
    texts = [text.encode() for text in texts]

    def following(seen):
        for size in (60, 30, 15, 8):
            for text in texts:
                at = text.find(seen[-size:]) if len(seen) >= size else -1
                if at >= 0:
                    end = at + size
                    return text[end] if end < len(text) else BYTE.eos_id
        return None

    return Fake(following)


def copier(reach=10_000):
    """A model that repeats what followed an earlier occurrence of the last characters, at most `reach` bytes ago."""

    def following(seen):
        for size in (12, 8):
            at = seen.rfind(seen[-size:], max(0, len(seen) - reach), len(seen) - 1) if len(seen) > size else -1
            if at >= 0:
                return seen[at + size]
        return None

    return Fake(following)


def adder(error=0):
    """A model that continues an addition with its result plus `error`."""

    def following(seen):
        asked = re.fullmatch(r"Input: (\d+) \+ (\d+) \n Output:( \d*)?", seen.decode())
        if asked is None:
            return None
        answer = f" {int(asked[1]) + int(asked[2]) + error}".encode()
        done = len(asked[3] or "")
        return answer[done] if done < len(answer) else BYTE.eos_id

    return Fake(following)


def material(share=0.1, sources=(CODE,)):
    return Material(list(sources), {"code": list(sources)}, 0, share)


def values(results):
    return {r.name: r.value for r in results}


def test_a_model_that_knows_the_text_reaches_the_best_figures():
    model = knower(CODE)
    found = values(tests.bits_per_domain(model, BYTE, material()))
    assert found["code"] < 1  # the first bytes of an excerpt cannot be known
    assert values(tests.next_lines(model, BYTE, material())) == {"exactly right": 1, "edit similarity": 1}
    found = values(tests.closers(model, BYTE, material()))
    assert len(found) == 4 and min(found.values()) == pytest.approx(1)
    assert set(values(tests.indentation(model, BYTE, material())).values()) == {1}


def test_a_uniform_model_is_exactly_at_chance():
    model, every = Fake(), []
    for test in (tests.bits_per_domain, tests.next_lines, tests.closers, tests.indentation, tests.copying):
        every += test(model, BYTE, material())
    found = {(r.test, r.name): r for r in every}
    assert found["bits", "code"].value == pytest.approx(log2(BYTE.vocab_size))
    assert found["lines", "exactly right"].value == 0
    right = found.pop(("brackets", "probability of the right one"))
    assert right.value == pytest.approx(1 / BYTE.vocab_size)
    ranked = [r for r in every if r.chance_from.startswith("computed")]
    assert {r.test for r in ranked} == {"brackets", "indent", "copy"}
    for r in ranked:  # ranking is by bytes, and the shallower line has the fewest
        expected = {"one level back": 1, "same level": 0, "deeper after a colon": 0}.get(r.name, r.chance)
        assert r.value == pytest.approx(expected), r


def test_copying_reaches_as_far_as_the_model():
    found = tests.copying(copier(), BYTE, material(0.1, [LONG]))
    assert [r.name.split()[0] for r in found] == ["32", "64", "128", "256", "484"] * 2
    assert {r.value for r in found} == {1} and {r.chance for r in found} == {0.5, 0}
    near = values(tests.copying(copier(reach=110), BYTE, material(0.1, [LONG])))
    assert near["64 tokens, ranked"] == near["64 tokens, completed"] == 1
    assert near["256 tokens, ranked"] == 0.5 and near["256 tokens, completed"] == 0


def test_arithmetic_is_exact():
    assert set(values(tests.arithmetic(adder(), BYTE, material())).values()) == {1}
    assert set(values(tests.arithmetic(adder(error=1), BYTE, material())).values()) == {0}
    sums = [a + b for a in range(10, 100) for b in range(10, 100)]
    assert make.addition_chance(2) == pytest.approx(max(map(sums.count, set(sums))) / len(sums))
    assert make.addition_chance(1) == 1 / 10


def test_valid_python_is_parsed_and_bounded_by_the_true_text():
    cases = list(make.functions([CODE], random.Random(0)))
    assert sorted(case.prompt.split("(")[0] for case in cases) == ["def cheap_goods", "def total_price"]
    known = knower(*(case.prompt + case.truth for case in cases))
    broken = knower(*(case.prompt + "    return (1\n\nx" for case in cases))
    (good,), (bad,) = (tests.valid_python(model, BYTE, material()) for model in (known, broken))
    assert good.cases == 2 and good.value == good.best == 1 and good.chance == bad.value == 0
    empty = tests.valid_python(knower(*(case.prompt for case in cases)), BYTE, material())
    assert empty[0].value == 0  # a docstring alone is valid, but it is no continuation


@pytest.mark.parametrize(
    ("text", "is_whole", "expected"),
    [
        ("    a = 1\n    b\n\ndef g():\n", False, "    a = 1\n    b\n\n"),
        ("    a = 1\n    b = (", False, "    a = 1\n"),
        ("    a = 1\n    b", True, "    a = 1\n    b"),
        ("x", False, ""),
    ],
)
def test_a_continuation_is_cut_where_the_function_ends(text, is_whole, expected):
    assert make.cut_function(text, is_whole) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    'doc'\n    return 1\n", True),
        ("def f():\n    'doc'\n", False),
        ("def f():\n    'doc'\n    return (\n", False),
        ("def f():\n    'doc'\n    '\\d'\n", True),
        ("def f():\n    'doc'\n    \0\n", False),
        ("", False),
        ("(" * 5000, False),
    ],
    ids=["function", "docstring alone", "open bracket", "invalid escape", "NUL", "empty", "too deep"],
)
def test_functions_are_parsed_without_warnings(text, expected, recwarn):
    assert make.is_function(text) is expected and not recwarn


def test_cases_are_balanced_and_true():
    rng = random.Random(0)
    brackets = make.bracket_cases([CODE * 9], 30, rng)
    plain = [case for case in brackets if case.group == "bracket"]
    assert sorted(case.right for case in plain) == [0] * 10 + [1] * 10 + [2] * 10
    assert all(case.context[-100:] + case.candidates[case.right] in CODE * 9 for case in brackets)
    nested = [case for case in brackets if case.group == "nested"]
    assert nested and 2 * sum(case.right for case in nested) == len(nested)
    quotes = make.quote_cases([CODE * 9], 10, rng)
    assert sum(case.right for case in quotes) == 5
    indents = make.indent_cases([CODE], 9, rng)
    assert [case.group for case in indents] == [level for level in make.LEVELS for _ in range(2)]
    assert all(case.context[-50:] + case.candidates[case.right] in CODE for case in indents)
    again = make.bracket_cases([CODE * 9], 30, random.Random(0))
    assert brackets == again and brackets != make.bracket_cases([CODE * 9], 30, random.Random(1))


def test_names_are_asked_for_both_ways_at_the_distance():
    for distance in (80, 200):
        cases = make.copy_cases([CODE], distance, 10, len, random.Random(0))
        assert len(cases) == 10
        for one, other in zip(cases[::2], cases[1::2]):
            assert one.candidates == other.candidates and (one.right, other.right) == (0, 1)
        for case in cases:
            names = [candidate.strip() for candidate in case.candidates]
            assert case.context.count(names[case.right]) == 1 and names[1 - case.right] not in case.context
            assert 0.85 * distance <= len(case.context) - len(make.CUE) <= distance
    assert make.copy_cases([CODE], 16, 10, len, random.Random(0)) == []
    assert make.copy_cases(["x = 1\n"], 80, 10, len, random.Random(0)) == []


@pytest.mark.parametrize(("family", "steps"), [("none", 0), ("loop", 3), ("trm", 2)])
def test_depth_gain_is_the_change_of_the_steps(tiny, family, steps):
    more = {"loop": {"deep_steps": 3}, "trm": {"supervision_steps": 1}}.get(family, {})
    model = tiny(vocab_size=BYTE.vocab_size, n_layers=1, recursion=family, max_seq_len=64, **more)
    found = tests.depth_gain(model, BYTE, material(0.1))
    if not steps:
        assert found == []
        return
    *bits, change = found
    names = ["step 1", "step 2", "step 3"] if family == "loop" else ["step 1", "step 2 (not trained)"]
    assert [r.name for r in bits] == names
    assert change.value == pytest.approx(bits[-1].value / bits[0].value - 1) and change.value != 0
    assert bits[0].chance == pytest.approx(tests.byte_entropy(make.excerpts([CODE], 2, 1200, material().rng("depth"))))


def test_steps_that_were_not_trained_to_answer_are_said_to_be_so(tiny, tmp_path):
    model = tiny(vocab_size=BYTE.vocab_size, n_layers=1, recursion="loop", max_seq_len=64, deep_steps=3)
    for least, change in ((2, "change from step 2 to 3"), (3, "change from step 1 to 3")):
        found = tests.depth_gain(model, BYTE, material(0.1)._replace(least_depth=least))
        untrained = [" (not trained)" in r.name for r in found[:3]]
        assert untrained == [step < least for step in (1, 2, 3)] and found[3].name == change
    assert found[3].value == pytest.approx(found[2].value / found[0].value - 1)
    save_checkpoint(tmp_path / "m", model, BYTE, info={"least_depth": 2})
    config = eval_capabilities.parse_args([str(tmp_path / "m"), "--only", "depth"])
    assert eval_capabilities.read_material(config).least_depth == 2


def linked_files(count=6):
    """Files of which every two have one function in common, so that none is a near copy of another one."""
    rng, texts = random.Random(0), ["# A licence that all files have.\n" * 9] * count
    for i, j in itertools.combinations(range(count), 2):
        name, *words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(21))
        lines = "".join(f"    {a} = {b}\n" for a, b in zip(words[::2], words[1::2]))
        for n in (i, j):
            texts[n] += f"\n\ndef {name}():\n{lines}"
    return texts


def test_retrieval_gain_of_models_that_copy_and_that_ignore_their_context():
    given, names = Material([], {}, 0, 0.5, linked_files()), []
    for r in retrieval_gain(copier(), BYTE, given):
        names.append((r.name, r.cases))
        assert r.value < -0.3 and r.interval[0] <= r.value <= r.interval[1] < r.chance < 0.05, r
    assert names == [("alone", 24), ("in place of older code", 24), ("near the start of files", 12)]
    given = given._replace(share=0.1)
    assert retrieval_gain(copier(), BYTE, given) == retrieval_gain(copier(), BYTE, given)
    for r in retrieval_gain(Fake(), BYTE, given):  # also of the licence nothing is known
        assert r.value == r.chance == 0 and r.interval == pytest.approx((0, 0))
    assert retrieval_gain(copier(), BYTE, Material([CODE], {})) == []  # no repository
    assert retrieval_gain(copier(), BYTE, given._replace(repository=["x = 1\n" * 9])) == []  # too short
    assert retrieval_gain(Fake(max_seq_len=100), BYTE, given) == []


def test_small_functions():
    assert tests.byte_entropy(["aabb", "ccdd"]) == 2
    assert answers.edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert answers.edit_similarity("", "") == 1 and answers.edit_similarity("", "a") == 0
    assert [answers.credit([1, 1, 0], i) for i in range(3)] == [0.5, 0.5, 0]
    assert tests.interval([1] * 5 + [0] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert tests.interval([0.0] * 40) == pytest.approx((0, 0.0876), abs=1e-4)
    assert [shown(0.5, "share"), shown(1e-5, "share"), shown(float("nan"), "bits/byte")] == ["0.500", "1e-05", "-"]
    row = table([Result("copy", "16 tokens", 0.75, "share", 4, 0.5, "computed: 1 of 2", (0.3, 0.95))]).splitlines()[1]
    assert row.split() == "copy 16 tokens 0.750 0.300 to 0.950 share 0.500 4 computed: 1 of 2".split()


def test_tokens_are_found_by_their_bytes():
    words = SimpleNamespace(vocab_size=6, id_to_bytes=[b"", b"\n", b"\n  ", b"a", b"\n", b"ab"].__getitem__)
    spelling = answers.Spelling(words)
    assert sorted(spelling.starting_with(b"\n")) == [1, 2, 4] and sorted(spelling.starting_with(b"ab")) == [5]
    assert sorted(spelling.first_of(b"\n ")) == [1, 2, 4] and sorted(spelling.first_of(b"abc")) == [3, 5]


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny):
    home = tmp_path_factory.mktemp("capabilities")
    model = tiny(vocab_size=BYTE.vocab_size, n_layers=1, latent_steps=1, max_seq_len=128)
    save_checkpoint(home / "trm", model, BYTE)
    usual = usual_spm(home)
    save_checkpoint(home / "usual", tiny(vocab_size=usual.vocab_size, n_layers=1), usual)
    save_checkpoint(home / "bidirectional", tiny(vocab_size=BYTE.vocab_size, causal=False), BYTE)
    (home / "code.py").write_text(CODE)
    write(home / "notes.txt", ["Some notes in English. " * 9])
    return home


def start(home, *words, checkpoint="trm"):
    return eval_capabilities.main([str(home / checkpoint), "--device", "cpu", *map(str, words)])


def test_lines_are_those_of_tokenize():
    assert make.lines_of("a\fb\n\n  c\x85\nd") == ["a\fb\n", "\n", "  c\x85\n", "d"] and make.lines_of("") == []


def test_the_script_writes_a_table_a_json_file_and_a_picture(home, capsys, monkeypatch):
    monkeypatch.setattr(eval_capabilities, "PACKAGE", "no_such_package")
    (home / "numbers.py").write_text(LONG.removeprefix(CODE))
    words = [
        "--code",
        home / "code.py",
        home / "numbers.py",
        "--quick",
        "--only",
        "indent",
        "bits",
        "arithmetic",
        "retrieval",
    ]
    words += ["--text", f"notes={home}/notes.txt", "--json", home / "out.json", "--plot", home / "out.png"]
    start(home, *words)
    first, out = (home / "out.json").read_text(), capsys.readouterr().out
    rows = json.loads(first)["results"]
    assert [row["test"] for row in rows] == ["bits"] * 2 + ["indent"] * 4 + ["arithmetic"] * 5 + ["retrieval"] * 3
    assert [row["name"] for row in rows[:2]] == ["code", "notes"] and len(out.splitlines()) == len(rows) + 1
    assert all(shown(row["value"], row["unit"]) in line for row, line in zip(rows, out.splitlines()[1:]))
    assert (home / "out.png").read_bytes().startswith(b"\x89PNG")
    start(home, *words[:-2])
    assert (home / "out.json").read_text() == first


def test_without_a_value_there_is_no_picture(tmp_path, capsys):
    nothing = Result("bits", "code", nan, "bits/byte", 1, 8.0, "computed", None)
    assert draw_capabilities([nothing], str(tmp_path / "out.png")) is None
    assert not (tmp_path / "out.png").exists() and "out.png was not drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "words", "said"),
    [
        ("trm", ["--code", "HOME", "--json", "HOME/code.py"], "code.py is also read"),
        ("trm", ["--text", "a=HOME/no*.txt", "--json", "HOME/notes.txt"], "notes.txt is also read"),
        ("bidirectional", [], "causal is false"),
        ("usual", [], "the tokenizer loses line breaks"),
        ("nowhere", [], "no checkpoint folder"),
        ("trm", ["--only", "cooking"], "only is 'cooking': choose from bits, valid"),
        ("trm", ["--text", "notes.txt"], "write NAME=PATH"),
        ("trm", ["--plot", "out.jpg"], "ends in .png"),
        ("trm", ["--code", "HOME/notes.txt"], "no .py file"),
        ("trm", ["--text", "a=HOME/nowhere.txt", "--only", "bits"], "nowhere.txt does not exist"),
    ],
)
def test_mistakes_are_one_line(home, capsys, checkpoint, words, said):
    with pytest.raises(SystemExit) as caught:
        run(lambda: start(home, *(word.replace("HOME", str(home)) for word in words), checkpoint=checkpoint))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(errors) == 1 and said in errors[0]


def test_files_without_cases(home, capsys):
    (home / "bare.py").write_text("x = 1\n" * 50)
    with pytest.raises(UserError, match="no test has a case"):
        start(home, "--code", home / "bare.py", "--only", "valid", "brackets")
    assert "valid: this model or these files have no case" in capsys.readouterr().err


def test_a_puzzle_checkpoint_is_refused():
    with pytest.raises(UserError, match="puzzle model"):
        eval_capabilities.main(["checkpoints/sudoku", "--device", "cpu"])
