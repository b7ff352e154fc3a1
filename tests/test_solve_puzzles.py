"""solve_puzzles.py as a user runs it: boards, files, generated puzzles, traces, and one line for every mistake."""

import csv
import gzip
import io
import json
import sys

import numpy as np
import pytest
import torch
from scripts import run_script
from trainers import puzzle_model

import solve_puzzles
from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.tasks.puzzle_data import PuzzleForm
from src.tasks.puzzle_folder import kind_named, write_folder
from src.tasks.puzzle_input import generated_boards

BOARD = "3....2....4..1.."
SOLVED = "3412123423414123"
SEVERAL = "3....24..1......"


def save_model(folder, name="sudoku4", **changes):
    kind = kind_named(name)
    save_checkpoint(folder, puzzle_model(kind, **{"supervision_steps": 3} | changes), PuzzleForm(kind))
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("solve")


@pytest.fixture(scope="module")
def solver(home):
    """A random model: the script does not need a good one."""
    return save_model(home / "sudoku4")


@pytest.fixture
def call(capsys):
    def call(*words):
        solve_puzzles.main([str(word) for word in words])
        return capsys.readouterr()

    return call


def lines_of(text):
    return text.splitlines()


class TestBoards:
    def test_one(self, solver, call):
        out, err = call(solver, "--board", BOARD)
        (answer,) = lines_of(out)
        assert len(answer) == 16 and set(answer) <= set("?.1234")
        assert "board 1: wrong: " in err and "; 3 steps, halting probability 0." in err

    def test_it_is_what_the_model_says(self, solver, call):
        from src.checkpoint import load_network

        ids = torch.from_numpy(kind_named("sudoku4").from_text(BOARD).astype(np.int64))[None]
        with torch.no_grad():
            tokens = load_network(solver)(ids, supervision_steps=7).logits.argmax(-1)[0]
        assert lines_of(call(solver, "--board", BOARD, "--steps", 7)[0]) == ["".join("?.1234"[t] for t in tokens)]

    def test_on_a_terminal_with_boxes(self, solver, call, monkeypatch):
        flat = lines_of(call(solver, "--board", BOARD)[0])[0]
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
        lines = lines_of(call(solver, "--board", BOARD)[0])
        assert len(lines) == 5 and lines[2] == "----+----"
        assert "".join(c for line in lines for c in line if c not in " |-+") == flat

    def test_a_right_answer_is_called_right(self, solver, call):
        """A full board needs the right answer only as a copy; a wrong copy is judged wrong, with the reason."""
        out, err = call(solver, "--board", SOLVED)
        assert ("board 1: right" in err) == (lines_of(out) == [SOLVED])

    def test_several_boards(self, solver, call):
        out, err = call(solver, "--board", BOARD, SOLVED)
        assert len(lines_of(out)) == 2 and "board 2: " in err and "2 boards of sudoku4: exact" in err
        assert lines_of(out)[0] == lines_of(call(solver, "--board", BOARD)[0])[0]

    @pytest.mark.parametrize(
        "text",
        [
            f"{BOARD}\n{SOLVED}\n",
            "3...\n.2..\n..4.\n.1..\n\n3412\n1234\n2341\n4123\n",
            f"\n{BOARD}\n\n\n3412 1234 2341 4123",
        ],
        ids=["lines", "blocks", "mixed"],
    )
    def test_stdin(self, solver, call, monkeypatch, text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert call(solver, "--board", "-")[0] == call(solver, "--board", BOARD, SOLVED)[0]

    def test_several_solutions(self, solver, call):
        err = call(solver, "--board", SEVERAL)[1]
        assert "the board has several solutions: any of them counts as right" in lines_of(err)

    def test_a_maze(self, home, call):
        folder = save_model(home / "maze", "maze3x4")
        out, err = call(folder, "--board", "S  #\n## #\nG   ")
        assert len(lines_of(out)[0]) == 12 and "board 1: wrong" in err

    def test_limit_and_seeds(self, solver, call):
        words = (solver, "--generate", 30, "--low", 5, "--starts", 3, "--start_noise", 2)
        first, again, other = (call(*words, "--seed", seed)[0] for seed in (1, 1, 2))
        assert first == again != other
        assert call(*words, "--seed", 1, "--limit", 4)[0].splitlines() == first.splitlines()[:4]


class TestFiles:
    def write(self, path, text):
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
            file.write(text)
        return path

    def test_with_answers(self, solver, call, tmp_path):
        path = self.write(tmp_path / "a.csv.gz", f"question,answer,rating\n{BOARD},{SOLVED},1\n{SOLVED},{SOLVED},2\n")
        out, err = call(solver, "--paths", path)
        assert out == call(solver, "--board", BOARD, SOLVED)[0]
        assert "rating" in err and "after step   " in err

    def test_bad_puzzles_are_named_and_skipped(self, solver, call, tmp_path):
        rows = [BOARD, "3..", "x" * 16, "33" + "." * 14, "123....4........", SEVERAL, SOLVED]
        out, err = call(solver, "--paths", self.write(tmp_path / "q.csv", "question\n" + "\n".join(rows) + "\n"))
        assert len(lines_of(out)) == 3
        assert "q.csv: skipped line 3, question: a sudoku4 board has 16 cells" in err
        assert "skipped line 4, question: cell 1 is 'x'" in err and "skipped line 5, question: row 1 has 3 twice" in err
        assert f"{tmp_path}/q.csv: 4 of 7 puzzles skipped" in err

    def test_an_answer_may_be_missing(self, solver, call, tmp_path):
        text = f"question,answer\n{BOARD},\n{BOARD},{SOLVED}\n{BOARD},{SOLVED[::-1]}\n"
        out, err = call(solver, "--paths", self.write(tmp_path / "q.csv", text))
        assert len(lines_of(out)) == 2 and "skipped line 4, wrong answer: " in err

    def test_a_folder(self, solver, call, tmp_path):
        kind = kind_named("sudoku4")
        grids = generated_boards(kind, 9)
        write_folder(tmp_path / "npy", kind, grids.take(slice(4)), grids.take(slice(4, 9)))
        out, err = call(solver, "--paths", tmp_path / "npy")
        assert out == call(solver, "--board", *(kind.to_text(b, line_breaks=False) for b in grids.inputs[4:]))[0]
        assert "clues" in err
        with pytest.raises(UserError, match="npy has sudoku4 puzzles, the model solves maze3x4: give others"):
            call(save_model(tmp_path / "maze", "maze3x4"), "--paths", tmp_path / "npy")

    def test_several_paths(self, solver, call, tmp_path):
        paths = [self.write(tmp_path / f"{i}.csv", f"puzzle\n{board}\n") for i, board in enumerate((BOARD, SOLVED))]
        assert call(solver, "--paths", *paths)[0] == call(solver, "--board", BOARD, SOLVED)[0]

    def test_arc(self, call, tmp_path):
        pair = {"input": [[1, 2], [3, 4]], "output": [[4, 3], [2, 1]]}
        tasks = {"a": {"train": [pair], "test": [pair, {"input": [[5]]}]}}
        (tmp_path / "arc.json").write_text(json.dumps(tasks))
        folder = save_model(tmp_path / "arc", "arc")
        err = call(folder, "--paths", tmp_path / "arc.json")[1]
        assert "board 1: wrong" in err and "board 2: not judged: its answer is not known" in err
        assert "1 board of arc: exact 0.0000" in err and "not judged, because no answer is known: 1 board\n" in err
        with_ids = save_model(tmp_path / "ids", "arc", prefix_tokens=1, puzzle_ids=4)
        with pytest.raises(UserError, match="this model knows an ARC task by its puzzle id"):
            call(with_ids, "--paths", tmp_path / "arc.json")
        with pytest.raises(UserError, match="--votes needs symmetries, and a board of arc alone has none"):
            call(folder, "--paths", tmp_path / "arc.json", "--votes", 4)

    def test_output(self, solver, call, tmp_path):
        words = (solver, "--generate", 30, "--exit", "halt", "--batch_size", 7)
        out, err = call(*words, "--output", tmp_path / "s.csv")
        assert out == "" and "30 boards of sudoku4" in err and "board 1" not in err
        with open(tmp_path / "s.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["answer"] for row in rows] == lines_of(call(*words)[0])
        assert {row["right"] for row in rows} <= {"yes", "no"} and {row["steps"] for row in rows} <= {"1", "2", "3"}
        assert all(0 <= float(row["halting"]) <= 1 for row in rows)
        again = call(solver, "--paths", tmp_path / "s.csv", "--exit", "halt")[1] if "yes" in str(rows) else "skipped"
        assert "puzzles skipped" in again or again == "skipped"  # wrong answers are no answers


class TestTrace:
    def test_files(self, solver, call, tmp_path):
        for name in ("b.png", "b.gif"):
            err = call(solver, "--board", BOARD, SOLVED, "--trace", tmp_path / name)[1]
            assert f"trace: {tmp_path / name} and {tmp_path / 'b.json'}" in err
            assert (tmp_path / name).stat().st_size > 5000
        data = json.loads((tmp_path / "b.json").read_text())
        assert data["question"] == BOARD and data["answer"] == SOLVED and len(data["steps"]) == 3
        assert data["steps"][-1]["board"] == lines_of(call(solver, "--board", BOARD)[0])[0]

    def test_json_alone(self, solver, call, tmp_path):
        call(solver, "--board", BOARD, "--trace", tmp_path / "b.json", "--steps", 20)
        assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
        assert len(json.loads((tmp_path / "b.json").read_text())["steps"]) == 20

    @pytest.mark.parametrize("words", [["--trace"], ["--trace", "-"], ["--trace", "-", "--steps", 3]])
    def test_on_the_terminal(self, solver, call, words):
        out, err = call(solver, "--board", BOARD, *words)
        assert "step 1 " in err and "step 3" in err and "sudoku4: wrong after 3 steps" in err and "step" not in out


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--board", BOARD + "1"], "the board: a sudoku4 board has 16 cells (4 x 4), this one has 17"),
            (["--board", "3.."], "the board: a sudoku4 board has 16 cells"),
            (["--board", BOARD, "3.."], "board 2: a sudoku4 board has 16 cells"),
            (["--board", "5" + BOARD[1:]], "the board: cell 1 is '5': a sudoku4 board is written with '.1234"),
            (["--board", "33" + "." * 14], "the board cannot be solved: row 1 has 3 twice; correct the board"),
            (["--board", BOARD, "123....4........"], "board 2 cannot be solved: it has no solution"),
            (["--paths", "none.csv"], "none.csv: no such file"),
            (["--paths", "."], ". is a folder without identifiers.json"),
            (["--board", BOARD, "--generate", "3"], "give boards to solve by one of --board, --paths and --generate"),
            ([], "give boards to solve by one of"),
            (["--board", BOARD, "--low", "3"], "low, high and difficulty are for --generate"),
            (["--generate", "3", "--low", "2"], "clues 2 to 8 do not fit"),
            (["--generate", "-1"], "generate is -1: set it from 0"),
            (["--board", BOARD, "--votes", "0"], "votes is 0: set it from 1"),
            (["--board", BOARD, "--steps", "0"], "steps is 0: set it from 1"),
            (["--board", BOARD, "--halt_threshold", "1.5"], "halt_threshold is 1.5: set it from 0 to 1"),
            (["--board", BOARD, "--votes", "5000"], "--votes is 5000, but sudoku4 has only"),
            (["--board", BOARD, "--trace", "b.doc"], "--trace b.doc: name a file that ends in .png"),
            (["--board", BOARD, "--output", "none/s.csv"], "cannot write none/s.csv"),
            (["--paths", "s.csv", "--output", "s.csv"], "s.csv is also read"),
            (["--paths", "s.json", "--trace", "s.png"], "s.json is also read"),
            (
                ["--board", BOARD, "--trace", "s.json", "--output", "s.json"],
                "s.json is also read, or written by another",
            ),
        ],
    )
    def test_boards_and_flags(self, solver, call, tmp_path, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as error:
            call(solver, *words)
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_an_empty_stdin(self, solver, call, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
        with pytest.raises(UserError, match="--board - found no board on stdin"):
            call(solver, "--board", "-")

    def test_checkpoints(self, call, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            UserError, match=r"no checkpoint folder at checkpoints/sudoku: train one with train_puzzles"
        ):
            call("--board", BOARD)
        with pytest.raises(UserError, match=f"did you mean --board {BOARD}"):
            call(BOARD, "--generate", "1")
        with pytest.raises(UserError, match=r"is no puzzle model \(no puzzle.json\)"):
            call(solve_puzzles.resolve(), "--board", BOARD)

    @pytest.mark.parametrize(
        ("model", "words", "message"),
        [
            ({"halting": False}, ["--exit", "halt"], "--exit halt needs a halting head"),
            ({"halting": False}, ["--starts", "2"], "--starts needs a halting head"),
            ({"recursion": "loop"}, ["--steps", "2"], "--steps is for recursion trm, and this model has loop"),
            ({"recursion": "none"}, ["--steps", "2"], "--steps is for recursion trm, and this model has none"),
        ],
    )
    def test_models(self, call, tmp_path, model, words, message):
        folder = save_model(tmp_path / "model", **model)
        with pytest.raises(UserError, match=message):
            call(folder, "--board", BOARD, *words)
        assert len(lines_of(call(folder, "--board", BOARD)[0])) == 1  # without the flag it works

    def test_puzzle_ids(self, call, tmp_path):
        kind = kind_named("sudoku4")
        grids = generated_boards(kind, 4)
        grids = grids._replace(puzzle_ids=np.arange(4, dtype=np.int32))
        write_folder(tmp_path / "npy", kind, grids, grids, ["<blank>", "a", "b", "c"])
        folder = save_model(tmp_path / "model", prefix_tokens=1, puzzle_ids=3)
        with pytest.raises(UserError, match="the boards have puzzle ids up to 3, the model knows 3"):
            call(folder, "--paths", tmp_path / "npy")


def test_the_curve_compares_stopping_rules(solver, home, call, tmp_path):
    picture = tmp_path / "curve.png"
    err = call(solver, "--generate", 40, "--low", 10, "--high", 15, "--steps", 6, "--curve", picture).err
    assert picture.stat().st_size > 10_000
    full = float(err.split("exact accuracy after all 3 steps: ")[1].split()[0])
    assert f"| fixed | 3 | 3.00 | {full:.4f} | 0% |" in err and "| fixed | 4 | 4.00 |" in err
    assert "| halt | 0.5 |" in err and "| random | 0.5 |" in err and "| oracle | 6 |" in err
    with pytest.raises(UserError, match="leave out exit"):
        call(solver, "--generate", 4, "--exit", "halt", "--curve", picture)
    plain = save_model(home / "plain_curve", recursion="none")
    with pytest.raises(UserError, match="leave out --curve"):
        call(plain, "--generate", 4, "--curve", picture)


def test_as_a_script(solver, tmp_path):
    code, out, err = run_script("solve_puzzles.py", solver, "--board", "-", "--trace", "-", stdin=f"{BOARD}\n")
    assert code == 0 and len(out.split()) == 1 and "board 1: " in err and "\033" not in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        solve_puzzles.parse_args(["--help"])
    out = capsys.readouterr().out
    assert "python solve_puzzles.py runs/sudoku4 --board 3....2....4..1.." in out
    for flag in ("--exit", "--starts", "--start_noise", "--votes", "--trace", "--output", "--limit"):
        assert flag in out
