"""Traces of a board: their data equals the model's outputs; their text and pictures show it."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_puzzle_solve import GRIDS, IDS, SUDOKU, make_model

from src.errors import UserError
from src.tasks.arc import Arc, frame
from src.tasks.board_picture import draw_steps, draw_trace
from src.tasks.board_trace import BoardTrace, board_text, check_trace_path, print_trace, verdict_of, write_trace
from src.tasks.mazes import PATH, Maze
from src.tasks.puzzle_folder import kind_named
from src.tasks.puzzle_input import generated_boards, split_boards
from src.tasks.puzzle_solve import Attempt, Effort, attempts
from src.tasks.puzzles import Grids
from src.tasks.sudoku import Sudoku


def trace_of(kind, inputs, labels, answers, halts=None, certainty=0.9) -> BoardTrace:
    """A trace of these answers, one per step."""
    trace = BoardTrace(kind, inputs, labels)
    for number, answer in enumerate(answers):
        p = np.full((1, len(answer)), certainty, np.float32)
        halt = None if halts is None else np.array(halts[number : number + 1], np.float32)
        trace.add(Attempt(np.array(answer, np.uint8)[None], p, halt, np.full(1, number + 1.0)))
    return trace


def approaching(kind, grids: Grids, steps=4) -> BoardTrace:
    """A trace of the first board that becomes right in the last step; at the first, all open cells have one token."""
    question, label = grids.inputs[0], grids.labels[0]
    cells = np.flatnonzero(question != label)
    answers = [np.where(question != label, kind.vocab_size - 1, question).astype(np.uint8)]
    for part in np.array_split(cells, steps - 1):
        answers.append(answers[-1].copy())
        answers[-1][part] = label[part]
    return trace_of(kind, question, label, answers, np.linspace(0.1, 0.9, steps), np.linspace(0.2, 1, kind.cells))


class TestData:
    def test_it_is_the_models_own_output(self, tmp_path):
        model = make_model()
        trace = BoardTrace(SUDOKU, GRIDS.inputs[3], GRIDS.labels[3])
        for attempt in attempts(model, SUDOKU, GRIDS.inputs[3:5], IDS[3:5], Effort(steps=6)):
            trace.add(attempt)
        write_trace(trace, tmp_path / "t.json")
        data = json.loads((tmp_path / "t.json").read_text())
        with torch.no_grad():
            ids = torch.from_numpy(GRIDS.inputs[3:4].astype(np.int64))
            out = model(ids, supervision_steps=6, return_steps=True)
        p = out.logits.double().softmax(-1)[:, 0]
        tokens = p.argmax(-1).numpy()
        assert (data["kind"], data["height"], data["width"]) == ("sudoku4", 4, 4)
        assert data["question"] == SUDOKU.to_text(GRIDS.inputs[3], line_breaks=False)
        assert data["answer"] == SUDOKU.to_text(GRIDS.labels[3], line_breaks=False)
        assert [step["step"] for step in data["steps"]] == [1, 2, 3, 4, 5, 6]
        for number, step in enumerate(data["steps"]):
            assert step["board"] == "".join(SUDOKU.symbols[token] for token in tokens[number])
            assert step["probability"] == pytest.approx(p[number].max(-1).values.tolist(), abs=1e-5)
            assert step["halt"] == pytest.approx(out.halt_logits[number, 0].sigmoid().item(), abs=1e-5)
            before = tokens[max(0, number - 1)]
            assert step["changed"] == np.flatnonzero(tokens[number] != before).tolist()
            assert step["wrong"] == np.flatnonzero(tokens[number] != GRIDS.labels[3]).tolist()
            assert step["right"] is False
        assert any(step["changed"] for step in data["steps"])

    def test_verdicts(self):
        trace = approaching(SUDOKU, GRIDS)
        assert [step["right"] for step in trace.steps] == [False, False, False, True]
        assert trace.steps[-1]["wrong"] == [] and trace.summary() == "right from step 4 of 4 on"
        n_wrong = len(trace.steps[0]["wrong"])
        assert [verdict_of(step) for step in (trace.steps[0], trace.steps[3])] == [f"{n_wrong} wrong", "right"]
        assert approaching(SUDOKU, GRIDS, 2).summary() == "right from step 2 of 2 on"
        back = trace_of(SUDOKU, GRIDS.inputs[0], GRIDS.labels[0], [GRIDS.labels[0], GRIDS.inputs[0]])
        assert back.summary() == "wrong after 2 steps, right on the way"

    def test_several_solutions(self):
        """Without a known answer no cell is called wrong; a board that is right by the rules is right."""
        question = SUDOKU.from_text("3....24..1......")
        answer, other = (SUDOKU.from_text(t) for t in ("3412124321344321", "3412124323414121"))
        trace = trace_of(SUDOKU, question, np.zeros(16, np.uint8), [other, answer])
        assert [(step["wrong"], step["right"]) for step in trace.steps] == [(None, False), ([], True)]
        assert [verdict_of(step) for step in trace.steps] == ["wrong", "right"]

    def test_another_shortest_path_is_not_wrong(self):
        kind = Maze(3)
        question = kind.from_text("S  \n   \n  G")
        paths = [kind.from_text(text) for text in ("Soo\n  o\n  G", "S  \no  \nooG")]
        trace = trace_of(kind, question, paths[0], paths)
        assert [step["wrong"] for step in trace.steps] == [[], []] and trace.steps[1]["right"] is True

    def test_arc_without_an_output(self):
        kind, grid = Arc(), frame(np.array([[1, 2], [3, 4]], np.uint8))
        trace = trace_of(kind, grid, np.zeros(900, np.uint8), [grid])
        assert trace.steps[0]["right"] is None and "not known" in trace.summary() and verdict_of(trace.steps[0]) == ""

    def test_many_steps(self):
        trace = trace_of(SUDOKU, GRIDS.inputs[0], GRIDS.labels[0], [GRIDS.labels[0]] * 100)
        shown = trace.shown()
        assert len(shown) == 16 and shown[0] == 0 and shown[-1] == 99 and shown == sorted(set(shown))


class TestText:
    def test_boards_with_boxes(self):
        board = SUDOKU.from_text("3412124321344321")
        assert board_text(SUDOKU, board) == "3 4 | 1 2\n1 2 | 4 3\n----+----\n2 1 | 3 4\n4 3 | 2 1"
        wide = board_text(Sudoku(6), generated_boards(Sudoku(6), 1).labels[0]).split("\n")
        assert len(wide) == 8 and wide[2] == "------+------" == wide[5]
        maze = Maze(3)
        assert board_text(maze, maze.from_text("S  \n## \nG  ")) == "S  \n## \nG  "

    @pytest.mark.parametrize("size", [4, 6, 9])
    def test_a_printed_board_can_be_read_again(self, size):
        kind = Sudoku(size)
        inputs = generated_boards(kind, 2).inputs
        text = "\n\n".join(board_text(kind, board) for board in inputs)
        assert [kind.from_text(board).tolist() for board in split_boards(kind, text)] == inputs.tolist()

    def test_a_row_of_floor_is_no_separator(self):
        maze = Maze(3)
        assert split_boards(maze, "S  \n   \nG  \n") == ["S  \n   \nG  "]

    def test_marks(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        right = SUDOKU.from_text("3412124321344321")
        question = SUDOKU.from_text("34..1243....4321")
        first, second = right.copy(), right.copy()
        first[[2, 3]], second[2], second[9] = SUDOKU.symbols.index("4"), SUDOKU.symbols.index("2"), 5
        print_trace(trace_of(SUDOKU, question, right, [first, second, right], [0.25, 0.5, 0.99]))
        lines = capsys.readouterr().err.split("\n")
        assert lines[0].split() == ["step", "1", "step", "2", "step", "3"]
        assert [part.strip() for part in re.split(r"\s{3,}", lines[1])] == ["3 4 | 4!4!", "3 4 | 2?2*", "3 4 | 1*2"]
        assert [part.strip() for part in re.split(r"\s{3,}", lines[4])] == ["2 1 | 3 4", "2 4?| 3 4", "2 1*| 3 4"]
        assert re.split(r"\s{3,}", lines[6]) == ["halt 0.25, 2 wrong", "halt 0.50, 2 wrong", "halt 0.99, right"]
        assert "* changed since the step before; ! wrong, ? changed and wrong" in lines
        assert lines[-2] == "sudoku4: right from step 3 of 3 on" and "\033" not in "".join(lines)

    def test_narrow_terminals(self, capsys, monkeypatch):
        trace = approaching(SUDOKU, GRIDS, 4)
        for columns, rows in (("18", 4), ("39", 2), ("200", 1)):
            monkeypatch.setenv("COLUMNS", columns)
            print_trace(trace)
            lines = capsys.readouterr().err.split("\n")
            assert sum(line.startswith("step") for line in lines) == rows
            assert max(len(line) for line in lines[: rows * 8]) <= int(columns)

    def test_colours(self, capsys, monkeypatch):
        trace = approaching(SUDOKU, GRIDS)
        plain = []
        for colour in (False, True):
            print_trace(trace, colour=colour)
            text = capsys.readouterr().err
            assert ("\033[1m" in text and "\033[1;38;5;166m" in text) == colour
            plain.append(re.sub(r"\033\[[\d;]*m", "", text).split("\n"))
        assert plain[0][:8] == [line.rstrip() for line in plain[1][:8]]  # the same boards without colours

    @pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_no_colours_where_they_are_not_wanted(self, monkeypatch, name, value):
        from src.tasks.board_trace import has_colour

        terminal = type("Terminal", (), {"isatty": lambda self: True})()
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert has_colour(terminal)
        monkeypatch.setenv(name, value)
        assert not has_colour(terminal)

    def test_mazes_show_their_floor(self, capsys):
        kind = Maze(3)
        question = kind.from_text("S  \n## \nG  ")
        print_trace(trace_of(kind, question, kind.solve(question[None])[0][0], [question]))
        assert "S ·!·!" in capsys.readouterr().err


def colours_of(path):
    """Returns the set of all (red, green, blue) in a picture."""
    image = Image.open(path).convert("RGB")
    return {colour for _, colour in image.getcolors(image.width * image.height)}


class TestPictures:
    @pytest.mark.parametrize("name", ["sudoku4", "sudoku6", "sudoku9", "maze5x5", "maze6x9"])
    def test_png(self, name, tmp_path):
        kind = kind_named(name)
        draw_trace(approaching(kind, generated_boards(kind, 1)), tmp_path / "b.png")
        found = colours_of(tmp_path / "b.png")
        assert {(0xD5, 0x5E, 0x00), (0xE6, 0x9F, 0x00)} <= found  # frames of wrong cells, corners of changed ones
        own = {(0xE4,) * 3} if name.startswith("sudoku") else {(0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)}
        assert own <= found  # clues; start and goal

    def test_every_shown_step_has_a_panel(self):
        trace = trace_of(SUDOKU, GRIDS.inputs[0], GRIDS.labels[0], [GRIDS.labels[0]] * 40, [0.5] * 40)
        (axes,) = draw_steps(trace, trace.shown()).axes
        texts = [text.get_text() for text in axes.texts]
        assert [t for t in texts if t.startswith("step")] == [f"step {number + 1}" for number in trace.shown()]
        assert texts.count("right") == 16 == texts.count("halting 0.50") and len(axes.images) == 16

    def test_colours_follow_certainty(self):
        """A sure digit is darker than an unsure one, and a clue is grey."""
        right = GRIDS.labels[0]
        p = np.where(np.arange(16) % 2, 0.3, 0.99)
        trace = trace_of(SUDOKU, GRIDS.inputs[0], right, [right], certainty=p)
        (image,) = draw_steps(trace, [0]).axes[0].images
        colours = np.asarray(image.get_array()).reshape(16, 3)
        clues = GRIDS.inputs[0] > 1
        assert np.ptp(colours[clues], axis=0).max() == 0 and len(set(colours[clues][0])) == 1
        red = colours[:, 0]
        assert red[~clues & (p < 0.5)].min() > red[~clues & (p > 0.5)].max()

    def test_a_path_has_its_colour(self):
        kind = Maze(5)
        grids = generated_boards(kind, 1, low=3)
        trace = trace_of(kind, grids.inputs[0], grids.labels[0], [grids.labels[0]], certainty=1.0)
        (image,) = draw_steps(trace, [0]).axes[0].images
        colours = np.asarray(image.get_array()).reshape(25, 3)
        assert np.allclose(colours[grids.labels[0] == PATH], np.array([0x00, 0x72, 0xB2]) / 255, atol=0.01)

    def test_gif(self, tmp_path):
        draw_trace(approaching(SUDOKU, GRIDS), tmp_path / "b.gif")
        with Image.open(tmp_path / "b.gif") as image:
            assert image.n_frames == 4 and image.info["loop"] == 0
            times = []
            for frame_number in range(4):
                image.seek(frame_number)
                times.append(image.info["duration"])
        assert times == [800, 800, 800, 3000]

    @pytest.mark.parametrize("suffix", ["pdf", "svg"])
    def test_vector_formats(self, suffix, tmp_path):
        draw_trace(approaching(SUDOKU, GRIDS), tmp_path / f"b.{suffix}")
        assert (tmp_path / f"b.{suffix}").read_bytes()[:5] == {"pdf": b"%PDF-", "svg": b"<?xml"}[suffix]

    def test_arc(self, tmp_path):
        kind, grid = Arc(), frame(np.array([[1, 2], [3, 4]], np.uint8))
        draw_trace(trace_of(kind, grid, grid, [grid], certainty=1.0), tmp_path / "a.png")
        assert {(0, 0x74, 0xD9), (0xFF, 0x41, 0x36)} <= colours_of(tmp_path / "a.png")  # colours 1 and 2

    def test_paths(self, tmp_path):
        check_trace_path(str(tmp_path / "b.png"))
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="b.doc: name a file that ends in .png"):
            check_trace_path(str(tmp_path / "b.doc"))
        with pytest.raises(UserError, match="cannot write"):
            check_trace_path(str(tmp_path / "none" / "b.png"))
        with pytest.raises(UserError, match="cannot write the picture"):
            draw_trace(approaching(SUDOKU, GRIDS), tmp_path / "none" / "b.png")
