"""Tests of trace.py and trace_picture.py: reading per-step predictions, and showing them as picture, table and JSON."""

import io
import json
import re
from math import log, log2

import pytest
import torch
from matplotlib import font_manager, image

from src.errors import UserError
from src.evaluation import trace as t
from src.evaluation import trace_picture as picture
from src.evaluation.trace import Trace, print_table, read_thought, visible, write_json
from src.evaluation.trace_picture import draw_trace
from src.exits import ExitRule
from src.sampling import Thought, generate
from src.tokenizer import ByteLevelTokenizer

BYTES = ByteLevelTokenizer()
ANSI = re.compile(r"\033\[[\d;]*m")


def thought(text, *steps, halt=None, depth=None, rows=1):
    """Makes a Thought over bytes. Each step gives some characters' probabilities; all others share the rest equally."""
    p = torch.empty(len(steps), rows, BYTES.vocab_size, dtype=torch.float64)
    for s, chosen in enumerate(steps):
        p[s] = (1 - sum(chosen.values())) / (BYTES.vocab_size - len(chosen))
        for character, share in chosen.items():
            p[s, :, ord(character)] = share
    halts = None if halt is None else torch.logit(torch.tensor(halt))[:, None].expand(-1, rows)
    tokens = torch.full((rows,), ord(text) if isinstance(text, str) else text)
    return Thought(p.log().float(), halts, torch.full((rows,), depth or len(steps)), tokens)


def traced(*thoughts, tokenizer=BYTES, **options):
    trace = Trace(tokenizer, **options)
    for one in thoughts:
        trace.append(one)
    return trace


def settling(n=1):
    """Returns a trace of n tokens whose likeliest token is first 'b', then 'a', which is written."""
    return traced(*(thought("a", {"a": 0.2, "b": 0.6}, {"a": 0.5, "b": 0.25}, {"a": 0.9, "b": 0.05}) for _ in range(n)))


class TestReading:
    def test_values_by_hand(self):
        steps = {"a": 0.5, "b": 0.25}, {"a": 0.125, "b": 0.625}  # and 0.25 over the other 257
        token = read_thought(thought("a", *steps, halt=[0.25, 0.75]), BYTES)
        assert (token["token"], token["text"], token["depth"], token["halted"]) == (97, "a", 2, False)
        assert token["probability"] == pytest.approx([0.5, 0.125], abs=1e-6)
        assert token["rank"] == [1, 2]
        rest = 0.25 * (2 + log2(257))
        assert token["entropy"] == pytest.approx([1 + rest, 0.375 - 0.625 * log2(0.625) + rest], abs=1e-5)
        assert token["kl"][0] is None
        assert token["kl"][1] == pytest.approx(0.125 * log(0.25) + 0.625 * log(2.5), abs=1e-5)
        assert token["halt"] == pytest.approx([0.25, 0.75], abs=1e-6)

    def test_candidates_hold_the_written_token_and_the_top_of_every_step(self):
        steps = {"a": 0.5, "b": 0.3}, {"c": 0.6, "d": 0.3}
        token = read_thought(thought("z", *steps), BYTES, top=2)
        assert {c["text"] for c in token["candidates"]} == set("abcdz")
        assert token["candidates"][0]["text"] == "c"
        shares = {c["text"]: c["probability"] for c in token["candidates"]}
        assert shares["a"] == pytest.approx([0.5, 0.1 / 257], abs=1e-6)
        assert shares["z"] == token["probability"]
        assert token["rank"][1] == 3

    def test_candidates_sum_to_one_where_all_are_asked_for(self):
        logits = torch.randn(3, 1, BYTES.vocab_size)
        token = read_thought(Thought(logits, None, torch.tensor([3]), torch.tensor([7])), BYTES, top=999)
        sums = [sum(c["probability"][s] for c in token["candidates"]) for s in range(3)]
        assert sums == pytest.approx([1, 1, 1], abs=1e-5)  # 259 roundings to 6 digits
        assert max(token["entropy"]) < log2(BYTES.vocab_size)

    def test_what_comes_after_the_halt_is_left_out(self):
        one = thought("a", {"a": 0.4}, {"a": 0.9}, {"a": 0.9}, {"a": 0.9}, halt=[0.1, 0.99, 0.99, 0.99], depth=2)
        token = read_thought(one, BYTES)
        assert token["halted"] and token["depth"] == 2
        assert all(len(token[name]) == 2 for name in ("probability", "rank", "entropy", "kl", "halt"))
        assert not read_thought(one, BYTES, limit=2)["halted"]
        assert read_thought(thought("a", {"a": 0.4}), BYTES, limit=4)["halted"]

    def test_changes_of_mind(self):
        steps = {"b": 0.6}, {"b": 0.7}, {"a": 0.5}, {"b": 0.5}, {"b": 0.5}
        token = read_thought(thought("a", *steps), BYTES)
        assert [c["text"] for c in t.likeliest(token)] == ["b", "b", "a", "b", "b"]
        assert t.changes_of_mind(token) == [False, False, True, True, False]

    def test_a_trace_ends_with_eos_and_keeps_one_row(self):
        trace = traced(thought("a", {"a": 0.5}, rows=2), thought(BYTES.eos_id, {"a": 0.5}), thought(256, {"a": 0.5}))
        assert [(token["position"], token["text"]) for token in trace] == [(0, "a"), (1, "<eos>")]

    @pytest.mark.parametrize("exit", [ExitRule(max_recursion_depth=3), ExitRule("halt", 3, 0.5), ExitRule("kl", 3)])
    def test_of_a_real_model(self, tiny, exit):
        """With greedy decoding the token written is the likeliest after the last step, in every row of a batch."""
        model = tiny(recursion="trm", vocab_size=BYTES.vocab_size)
        trace, ids = Trace(BYTES, row=1, limit=3), torch.randint(0, 256, (2, 4))
        written = list(generate(model, ids, 5, temperature=0, exit=exit, thoughts=trace))
        assert [token["token"] for token in trace] == [int(column[1]) for column in written]
        for token in trace:
            assert token["rank"][-1] == 1 and t.likeliest(token)[-1]["token"] == token["token"]
            assert token["halted"] == (token["depth"] < 3) and len(token["halt"]) == token["depth"]


class TestText:
    def test_parts_of_characters_and_special_tokens(self):
        texts = [t.token_text(BYTES, i) for i in (*"é".encode(), 65, BYTES.bos_id, BYTES.eos_id, BYTES.pad_id)]
        assert texts == ["<0xC3>", "<0xA9>", "A", "<bos>", "<eos>", "<unk>"]

    def test_blanks_and_what_cannot_be_seen(self):
        assert visible(" a\n\tb") == "␣a↵⇥b"
        assert visible("\n" + 12 * " ") == "↵␣×12"
        assert visible("\x1b[31m\u200b") == "<U+001B>[31m<U+200B>"

    def test_width_and_clipping(self):
        assert t.text_width("ab京都e\u0301") == 7
        assert t.clip("abcdef", 6) == "abcdef" and t.clip("abcdefg", 6) == "abcde…"
        assert t.clip("京都大学", 6) == "京都…" and t.text_width(t.clip("京都大学", 4)) <= 4


class TestJson:
    def test_round_trip(self, tmp_path):
        trace = settling(3)
        write_json(trace, tmp_path / "out.json", 'say "京"\n')
        read = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert read == {"prompt": 'say "京"\n', "tokens": list(trace)}
        draw_trace(read["tokens"], tmp_path / "again.png")

    def test_no_place(self, tmp_path):
        with pytest.raises(UserError, match="cannot write .*out.json: No such file"):
            write_json(settling(), tmp_path / "nowhere" / "out.json")


class TestPicture:
    def texts(self, axes):
        return [text.get_text() for text in axes.texts]

    def bars(self, axes):
        return axes.collections[0].get_paths()

    @pytest.mark.parametrize("n, panels", [(1, 1), (11, 2), (41, 3)])
    def test_panels(self, tmp_path, n, panels):
        figure = draw_trace(traced(*[thought("a", {"a": 0.9})] * n, top=1), tmp_path / "out.png", "x")
        assert len(figure.axes) == panels
        height, width, _ = image.imread(tmp_path / "out.png").shape
        assert (figure.get_size_inches() * 150).tolist() == pytest.approx([width, height], abs=1)

    def test_names_where_the_mind_changes_and_the_final_share(self, tmp_path):
        axes = draw_trace(settling(), tmp_path / "out.png").axes[0]
        names = self.texts(axes)
        assert names.count("b") == 1 and names.count("a") == 2 and "90%" in names  # labels b and a, and the heading a

    def test_bars_are_probabilities(self, tmp_path):
        axes = draw_trace(settling(), tmp_path / "out.png").axes[0]
        ground, written, rival = (path.vertices for path in self.bars(axes)[:3])
        x = (written[:, 0] - picture.LEFT) / picture.BAR
        assert x.max() == pytest.approx(0.9) and x.min() == 0
        assert sorted(set(x.round(4))) == [0, 0.2, 0.5, 0.9]
        begin = (rival[:, 0].min() - picture.LEFT) / picture.BAR
        assert begin == pytest.approx(0.2)  # where the written one ends
        assert ground[:, 0].max() - picture.LEFT == pytest.approx(picture.BAR)

    def test_the_halt_is_marked_at_its_depth(self, tmp_path):
        early = thought("a", {"a": 0.9}, {"a": 0.9}, {"a": 0.9}, halt=[0.99, 0.99, 0.99], depth=1)
        late = thought("a", {"a": 0.3}, {"a": 0.5}, {"a": 0.9}, halt=[0.1, 0.2, 0.3])
        figure = draw_trace(traced(early, late), tmp_path / "out.png")
        marks = next(c for c in figure.axes[0].collections if c.get_label() == "halts").get_segments()
        assert len(marks) == 1 and set(marks[0][:, 1]) == {0.9 * 0.23}
        assert "halted early" in [text.get_text() for text in figure.legends[0].texts]

    def test_one_step_shows_the_likeliest_tokens(self, tmp_path):
        """Dollar signs and backslashes are drawn literally, not parsed as formulas."""
        steps = {"$": 0.5, "a": 0.25, "\\": 0.125}
        figure = draw_trace(traced(thought("a", steps)), tmp_path / "out.png", "$x^$")
        told = " ".join(text.get_text() for text in figure.texts)
        assert "$x^$" in told and "one recursion step; a recursive model" in told
        names = self.texts(figure.axes[0])
        assert [name for name in names if name in steps] == ["a", "$", "a", "\\"] and "likeliest" in names
        bars = [(path.vertices[:, 0].max() - picture.LEFT) / picture.BAR for path in self.bars(figure.axes[0])]
        assert bars[:6] == pytest.approx([1, 0.5, 1, 0.25, 1, 0.125], abs=1e-5)

    def test_all_halted_after_the_first_step(self, tmp_path):
        """The picture differs from that of a model with a single step."""
        trace = traced(thought("a", {"a": 0.9}), limit=4)
        assert "step 1" in self.texts(draw_trace(trace, tmp_path / "out.png").axes[0])
        assert t.summary(trace) == "1 token, 1 recursion step; 0 changed on the way"

    @pytest.mark.slow
    def test_many_tokens_and_steps(self, tmp_path):
        steps = [{"a": 0.05 + 0.05 * s, "b": 0.1} for s in range(16)]
        trace = traced(*[thought("a", *steps)] * (picture.DRAWN + 20))
        figure = draw_trace(trace, tmp_path / "out.png")
        assert len(figure.axes) == picture.DRAWN // 20
        assert any(f"drawn: the first {picture.DRAWN}" in text.get_text() for text in figure.texts)
        assert (figure.get_size_inches() * 150 < 2**14).all()

    def test_another_script(self, tmp_path, capsys):
        """A character is drawn in a font that has it, or as its code point; matplotlib would warn of an empty box."""
        words = "京都"
        trace = traced(thought("a", {"a": 0.5}))
        trace[0]["candidates"][0]["text"] = trace[0]["text"] = words
        axes = draw_trace(trace, tmp_path / "out.png").axes[0]
        has_font = "京" in set().union(*(picture._characters(f.fname) for f in TestFonts.installed()))
        assert (words in self.texts(axes)) == has_font
        assert ("#97" in self.texts(axes)) == ("京" in capsys.readouterr().err) == (not has_font)

    def test_refusals_come_before_the_work(self, tmp_path):
        with pytest.raises(UserError, match=r"name a file that ends in .png"):
            t.check_path(str(tmp_path / "out.docx"))
        with pytest.raises(UserError, match="No such file"):
            t.check_path(str(tmp_path / "nowhere" / "out.png"))
        (tmp_path / "is_folder.json").mkdir()
        with pytest.raises(UserError, match="is_folder.json: Is a directory"):
            t.check_path(str(tmp_path / "is_folder.png"))
        (tmp_path / "old.json").write_text("kept")
        t.check_path(str(tmp_path / "old.png"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["is_folder.json", "old.json"]
        assert (tmp_path / "old.json").read_text() == "kept"


class TestFonts:
    @staticmethod
    def installed():
        return [f for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name and f.style == "normal"]

    def test_plain_text_needs_one_font(self):
        assert picture.choose_fonts("def ␣↵⇥…×") == ([picture.MONO], set())

    def test_characters_without_a_font(self):
        fonts = picture.Fonts([picture.MONO], {"京", "都"})
        assert fonts.show(" 京", 5) == "␣<U+4EAC>"
        assert fonts.show("京都", 5) == "#5" and fonts.show("京都") == "<U+4EAC><U+90FD>"

    def test_another_font_helps_out(self):
        """Uses matplotlib's own fonts: finds a character that the sans font has and the monospaced one lacks."""
        sans, mono = (picture._characters(font_manager.findfont(name)) for name in ("DejaVu Sans", picture.MONO))
        other = next(c for c in sorted(sans - mono) if c.isprintable())
        names, missing = picture.choose_fonts("a" + other)
        assert missing == set() and len(names) == 2 and names[0] == picture.MONO
        assert other in picture._characters(font_manager.findfont(names[1]))

    def test_a_character_that_no_font_has(self):
        assert picture.choose_fonts("a\U000e0fff") == ([picture.MONO], {"\U000e0fff"})


class TestTable:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")

    def table(self, trace, color=False):
        stream = io.StringIO()
        print_table(trace, stream, color)
        return stream.getvalue().splitlines()

    def test_lines(self):
        head, *lines = self.table(settling(2))
        assert head.split() == ["token", "depth", "step", "1", "step", "2", "step", "3"]
        assert lines[0].split() == ["a", "3", "b", "60%", "▸a", "50%", "a", "90%"]
        assert lines[2].startswith("▸ the likeliest token differs") and "■" not in lines[2]
        assert lines[3] == "2 tokens, 3 recursion steps; 2 changed on the way"

    def test_one_step_shows_the_likeliest_tokens(self):
        head, line, *end = self.table(traced(thought("b", {"a": 0.5, "b": 0.25, "c": 0.125})))
        assert head.split()[2:] == ["likeliest", "2nd", "3rd", "4th"]  # as many as fit
        assert line.split()[:8] == ["b", "1", "a", "50%", "b", "25%", "c", "12%"]
        assert end == ["1 token, one recursion step; a recursive model takes more with --max_recursion_depth 4"]

    def test_the_halt_is_marked(self):
        lines = self.table(traced(thought("a", {"a": 0.9}, {"a": 0.9}, depth=1), thought("b", {"a": 0.9}, {"b": 0.9})))
        assert lines[1].split() == ["a", "1■", "a", "90%"]
        assert lines[2].split() == ["b", "2", "a", "90%", "▸b", "90%"]
        assert "■ halted early" in lines[3] and "1.50 recursion steps on average, 2 at most" in lines[4]

    @pytest.mark.parametrize("width", [40, 80, 200])
    def test_it_fits_the_terminal(self, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", str(width))
        steps = [{"a": 0.05 + 0.05 * s, "b": 0.1} for s in range(16)]
        trace = traced(*[thought("a", *steps)] * 2)
        for token in trace:
            token["text"] = token["candidates"][0]["text"] = "京都大学の図書館です"
        lines = self.table(trace, color=True)
        widths = [t.text_width(ANSI.sub("", line)) for line in lines[:3]]
        assert widths[1] == widths[2] <= width
        shown = re.findall(r"step (\d+)", lines[0])
        assert (shown[0], shown[-1]) == ("1", "16" if len(shown) > 1 else "1")
        assert (f"{len(shown)} of 16 steps fit this terminal" in "".join(lines)) == (len(shown) < 16)

    def test_shades_tell_the_written_token_and_its_probability(self):
        lines = self.table(settling(), color=True)
        assert re.findall(r"\033\[([\d;]+)m.(\w)", lines[1]) == [
            (t.ORANGES[3], "b"),
            (t.BLUES[2], "a"),
            (t.BLUES[4], "a"),
        ]

    def test_no_colour_where_none_is_wanted(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        def has_colour(stream):
            print_table(settling(), stream)
            return "\033" in stream.getvalue()

        monkeypatch.delenv("NO_COLOR", raising=False)
        assert has_colour(Terminal()) and not has_colour(io.StringIO())
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_colour(Terminal())

    def test_no_sequence_of_the_text_reaches_the_terminal(self):
        assert "\033" not in "".join(self.table(traced(thought("\033", {"\033": 0.9}))))
