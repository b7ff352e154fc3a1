"""solve_puzzles.py as a user runs it: boards, files, generated puzzles, traces, and one line for every mistake."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run_script
from trainers import TINY_PUZZLES, puzzle_model, puzzle_settings

import solve_puzzles
from experiments import puzzle_curves
from src.checkpoint import save_checkpoint
from src.errors import UserError
from src.tasks.curve_report import read_curve
from src.tasks.puzzle_data import PuzzleForm, fingerprint, load_puzzles
from src.tasks.puzzle_folder import kind_named, write_arc_folder, write_folder
from src.tasks.puzzle_input import generated_boards
from src.training import run_folder

BOARD = "3....2....4..1.."
SOLVED = "3412123423414123"
ARC_DATA = Path(__file__).parents[2] / "shared" / "data" / "arc_agi"
SEVERAL = "3....24..1......"


def save_model(folder, name="sudoku4", names=None, **changes):
    kind = kind_named(name)
    save_checkpoint(folder, puzzle_model(kind, **{"supervision_steps": 3} | changes), PuzzleForm(kind, names))
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
            f"\ufeff{BOARD}\r{SOLVED}\r\n",
        ],
        ids=["lines", "blocks", "mixed", "a mark and other line ends"],
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
        with pytest.raises(UserError, match="this model knows an ARC task by its puzzle id, and single boards have"):
            call(with_ids, "--paths", tmp_path / "arc.json")
        with pytest.raises(UserError, match="--votes needs symmetries, and a board of arc alone has none"):
            call(folder, "--board", "12", "--votes", 4)
        with pytest.raises(UserError, match="only write a submission: leave out output, curve and trace"):
            call(folder, "--paths", tmp_path / "arc.json", "--votes", 4, "--trace")
        with pytest.raises(UserError, match="--submission is for a model of ARC"):
            call(folder, "--board", "12", "--submission", tmp_path / "s.json")

    def test_votes_on_arc_tasks(self, call, tmp_path):
        """A folder with puzzle ids, a model that has names of them, and the tasks as JSON or as the folder's test."""
        pair = {"input": [[1, 2], [3, 4]], "output": [[4, 3], [2, 1]]}
        tasks = {"a": {"train": [pair], "test": [pair, {"input": [[5]]}]}, "b": {"train": [pair], "test": [pair]}}
        paths = [tmp_path / f"{name}.json" for name in "cd"]
        for path, name in zip(paths, tasks):
            path.write_text(json.dumps({name: tasks[name]}))
        names = write_arc_folder(tmp_path / "npy", [], paths, 3).names
        changes = {"d_model": 8, "supervision_steps": 1, "prefix_tokens": 1, "puzzle_ids": len(names)}
        folder = save_model(tmp_path / "arc", "arc", names, **changes)
        out, err = call(folder, "--paths", *paths, "--votes", 3)
        assert "2 tasks of arc, up to 3 votes: pass@1 0.0000, pass@2 0.0000 on the 2 whose outputs are known" in err
        attempts = json.loads(out)
        assert {name: len(pairs) for name, pairs in attempts.items()} == {"a": 2, "b": 1}
        assert set(attempts["b"][0]) == {"attempt_1", "attempt_2"}
        assert call(folder, "--paths", tmp_path / "npy", "--submission", tmp_path / "s.json", "--votes", 3).out == ""
        assert json.loads((tmp_path / "s.json").read_text()) == attempts
        call(folder, "--paths", tmp_path / "npy", "--submission", tmp_path / "s.json", "--limit", 1, "--exit", "halt")
        assert set(json.loads((tmp_path / "s.json").read_text())) == {"a"}
        with pytest.raises(UserError, match="task a is given twice"):
            call(folder, "--paths", paths[0], tmp_path / "npy", "--votes", 3)

    @pytest.mark.skipif(not ARC_DATA.exists(), reason="../shared/data/arc_agi is not here")
    def test_votes_on_real_arc_tasks(self, call, tmp_path):
        folder = save_model(tmp_path / "arc", "arc", d_model=8, supervision_steps=1)
        words = ("--paths", ARC_DATA / "arc-agi_evaluation_challenges.json.gz", "--votes", 2, "--limit", 12)
        err = call(folder, *words, "--submission", tmp_path / "s.json").err
        assert "12 tasks of arc, up to 2 votes: pass@1 0.0000, pass@2 0.0000 on the 12 whose" in err
        attempts = json.loads((tmp_path / "s.json").read_text())
        pairs = [pair for task in attempts.values() for pair in task]
        assert len(attempts) == 12 and len(pairs) >= 12 and all(pair["attempt_2"] for pair in pairs)

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
        call(solver, "--board", BOARD, "--trace", tmp_path / "c.JSON", "--steps", 2)
        assert {p.name for p in tmp_path.iterdir()} == {"b.json", "c.JSON"}
        assert len(json.loads((tmp_path / "b.json").read_text())["steps"]) == 20

    @pytest.mark.parametrize("words", [["--trace"], ["--trace", "-"], ["--trace", "-", "--steps", 3]])
    def test_on_the_terminal(self, solver, call, words):
        out, err = call(solver, "--board", BOARD, *words)
        assert "step 1 " in err and "step 3" in err and "sudoku4: wrong after 3 steps" in err and "step" not in out


class TestHeldOut:
    @pytest.fixture
    def run(self, tmp_path):
        """A run folder as train_puzzles.py leaves it, with a random model."""
        settings = puzzle_settings({**TINY_PUZZLES, "save_dir": str(tmp_path), "puzzle": "sudoku4"})
        run_folder.start(tmp_path, settings.flat(), None).release()
        data = load_puzzles(settings.puzzle)
        run_folder.keep_corpus(tmp_path, fingerprint(data))
        save_model(tmp_path / "step_00000001")
        return tmp_path, data.valid

    def test_the_boards_of_the_run(self, run, call):
        folder, valid = run
        call(folder / "step_00000001", "--held_out", "true", "--output", folder / "solved.csv")
        with open(folder / "solved.csv", encoding="utf-8") as file:
            questions = [row["question"] for row in csv.DictReader(file)]
        assert questions == [kind_named("sudoku4").to_text(board, line_breaks=False) for board in valid.inputs]

    def test_of_a_run_whose_first_checkpoint_is_gone(self, run, call):
        folder, valid = run
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("init_from: null", "init_from: runs/deleted"))
        call(folder / "step_00000001", "--held_out", "true", "--output", folder / "solved.csv")
        assert len((folder / "solved.csv").read_text().splitlines()) == 1 + valid.n_rows

    def test_changed_puzzles(self, run, call):
        folder, _ = run
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("n_puzzles: 120", "n_puzzles: 121"))
        with pytest.raises(UserError, match="are no longer the same"):
            call(folder / "step_00000001", "--held_out", "true")

    def test_a_checkpoint_without_its_run(self, solver, call):
        with pytest.raises(UserError, match="is not in the folder of its run"):
            call(solver, "--held_out", "true")


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
            (
                ["--board", BOARD, "--generate", "3"],
                "give boards to solve by one of --board, --paths, --generate and --held_out",
            ),
            ([], "give boards to solve by one of"),
            (["--board", BOARD, "--low", "3"], "low, high and difficulty are for --generate"),
            (["--generate", "3", "--low", "2"], "clues 2 to 8 do not fit"),
            (["--generate", "-1"], "generate is -1: set it from 0"),
            (["--board", BOARD, "--votes", "0"], "votes is 0: set it from 1"),
            (["--board", BOARD, "--steps", "0"], "steps is 0: set it from 1"),
            (["--board", BOARD, "--halt_threshold", "1.5"], "halt_threshold is 1.5: set it from 0 to 1"),
            (["--board", BOARD, "--votes", "5000"], "--votes is 5000, but sudoku4 has only"),
            (["--board", BOARD, "--trace", "b.doc"], "--trace b.doc: name a file that ends in .png"),
            (["--board", BOARD, "--curve", "c.pdf"], "curve is c.pdf: choose a file name that ends in .png"),
            (["--board", BOARD, "--output", "none/s.csv"], "cannot write none/s.csv"),
            (["--board", BOARD, "--output", "s.csv.gz"], "s.csv.gz: the file is not compressed: leave out .gz"),
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
    assert "| all | 40 |" in err and "| clues 10 |" in err
    with pytest.raises(UserError, match="leave out exit"):
        call(solver, "--generate", 4, "--exit", "halt", "--curve", picture)
    with pytest.raises(UserError, match=r"--curve starts from the \d steps of training: set --steps to \d or more"):
        call(solver, "--generate", 4, "--steps", 1, "--curve", picture)
    with pytest.raises(UserError, match="copies is for --curve"):
        call(solver, "--generate", 4, "--copies", 2)
    plain = save_model(home / "plain_curve", recursion="none")
    with pytest.raises(UserError, match="leave out --curve"):
        call(plain, "--generate", 4, "--curve", picture)


def test_the_curve_of_copies_is_kept_and_merged(solver, home, call, tmp_path, capsys):
    """Starts without noise are equal, so they only cost more; four votes cost four times the steps."""
    picture, words = tmp_path / "curve.png", ("--generate", 40, "--low", 10, "--high", 15)
    err = call(solver, *words, "--curve", picture, "--copies", 2, 4, "--start_noise", 0).err
    curve = read_curve(picture.with_suffix(".json"))
    points = {point[:2]: point for point in curve.points}
    assert points["starts", 2] == ("starts", 2, 6, curve.full.exact)
    halt = points["halt", 0.5]
    assert points["starts+halt", 4][2:] == pytest.approx((4 * halt.steps, halt.exact))
    assert points["votes", 4].steps == 12 and points["votes+halt", 2].steps <= 6
    attempt = call(solver, *words, "--votes", 4, "--exit", "halt").err
    assert f"exact {points['votes+halt', 4].exact:.4f}" in attempt
    assert f"mean steps {points['votes+halt', 4].steps / 4:.2f}" in attempt
    assert "| votes+halt | 4 |" in err and curve.bins[0].boards == 40
    puzzle_curves.main([str(picture.with_suffix(".json"))] * 2 + ["--output", str(tmp_path / "both.png")])
    assert f"| {curve.full.exact:.4f}, {curve.full.exact:.4f} |" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 10_000
    call(solver, "--generate", 40, "--low", 10, "--high", 15, "--data_seed", 2, "--curve", tmp_path / "d.png")
    with pytest.raises(UserError, match="d.json has other boards than .*curve.json: measure both"):
        puzzle_curves.main([str(picture.with_suffix(".json")), str(tmp_path / "d.json")])
    other = save_model(home / "other_curve", supervision_steps=2, halting=False)
    err = call(other, *words, "--curve", tmp_path / "c.png", "--copies", 2).err
    assert "not in the curve: starts 2: --starts needs a halting head" in err and "| votes | 2 | 4.00 |" in err
    with pytest.raises(UserError, match="c.json has trained 2, .*curve.json has 3: merge"):
        puzzle_curves.main([str(picture.with_suffix(".json")), str(tmp_path / "c.json")])


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
