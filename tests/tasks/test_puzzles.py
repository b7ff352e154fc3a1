"""Boards as text, files of boards, splits and leaks, shown on 4 x 4 Sudoku and on a kind made for these tests."""

import gzip

import numpy as np
import pytest

from src.errors import UserError
from src.tasks import puzzles
from src.tasks.puzzles import Grids, PuzzleKind, check_leak, find_leaks, make_grids, read_csv, split_by_orbit
from src.tasks.sudoku import Sudoku, generate

QUESTION, ANSWER = "12..34.....34..1", "1234341221434321"


class Letters(PuzzleKind):
    """Two letters; the answer is the same, and exchanging the letters is a symmetry."""

    def __init__(self):
        super().__init__("letters", 1, 2, "?ab", {"A": "a"})

    def verify(self, board, answer):
        return None if (board == answer).all() else "it differs"

    def orbits(self, inputs, labels):
        return [bytes(sorted(row)) for row in labels]


def letters(*texts, groups=None):
    tokens = np.array([Letters().from_text(text) for text in texts])
    grids = make_grids(tokens, tokens.copy(), {"size": np.arange(len(texts))})
    return grids if groups is None else grids._replace(groups=np.array(groups, np.int32))


def csv_file(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- boards ----


def test_text_and_tokens_are_inverse():
    kind = Sudoku(4)
    board = kind.from_text(QUESTION)
    assert board.tolist() == [2, 3, 1, 1, 4, 5, 1, 1, 1, 1, 1, 4, 5, 1, 1, 2]
    assert kind.to_text(board, line_breaks=False) == QUESTION
    assert kind.to_text(board) == "12..\n34..\n...3\n4..1"
    assert (kind.from_text(kind.to_text(board)) == board).all()
    assert Letters().from_text("Ab").tolist() == [1, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("1...", "a sudoku4 board has 16 cells (4 x 4), this one has 4: add or remove cells"),
        (QUESTION + "1", "this one has 17"),
        ("", "this one has 0"),
        ("5" + QUESTION[1:], "cell 1 is '5': a sudoku4 board is written with '.12340_'"),
        (QUESTION[:-1] + "x", "cell 16 is 'x'"),
        (QUESTION[:-1] + "?", "cell 16 is '?'"),  # the sign for padding
        (QUESTION[:-1] + "ÿ", "cell 16 is 'ÿ'"),
        (QUESTION[:-1] + "一", "cell 16 is '一'"),
    ],
)
def test_texts_that_are_no_board_are_refused(text, message):
    with pytest.raises(UserError) as error:
        Sudoku(4).from_text(text)
    assert message in str(error.value)


def test_many_texts_are_parsed_as_one_is():
    kind = Sudoku(4)
    tokens, is_board = kind.parse([QUESTION, "1", QUESTION[:-1] + "一", ANSWER, QUESTION[:-1] + "\ud800"])
    assert is_board.tolist() == [True, False, False, True, False]
    assert (tokens[0] == kind.from_text(QUESTION)).all() and (tokens[3] == kind.from_text(ANSWER)).all()
    assert not tokens[[1, 2, 4]].any()
    assert kind.parse([])[0].shape == (0, 16)


def test_rows_are_taken_with_everything_that_belongs_to_them():
    grids = letters("ab", "aa", "bb")
    some = grids.take(np.array([True, False, True]))
    assert isinstance(some, Grids) and some.n_rows == 2
    assert some.groups.tolist() == [0, 2] and some.difficulty["size"].tolist() == [0, 2]
    assert grids.take(np.array([2, 0])).inputs.tolist() == [[2, 2], [1, 2]]


# ---- splits ----


def test_a_split_keeps_orbits_whole():
    grids = letters(*["ab", "ba"] * 20, *["aa"] * 30, *["bb"] * 30)
    for seed in range(10):
        train, test = split_by_orbit(Letters(), grids, 0.3, seed)
        assert train.n_rows + test.n_rows == 100 and test.n_rows in (30, 40)
        check_leak(Letters(), train, test)
        assert (split_by_orbit(Letters(), grids, 0.3, seed)[1].groups == test.groups).all()
    assert len({split_by_orbit(Letters(), grids, 0.3, seed)[1].inputs[0].tobytes() for seed in range(10)}) > 1


def test_a_split_keeps_groups_whole():
    """aa and ab share group 0, ba and bb share group 1, ab and ba are one orbit: all four stay together."""
    with pytest.raises(UserError, match="all 4 letters puzzles are one orbit"):
        split_by_orbit(Letters(), letters("aa", "ab", "ba", "bb", groups=[0, 0, 1, 1]), 0.5, 0)
    train, test = split_by_orbit(Letters(), letters("aa", "ab", "ba", "bb", groups=[0, 0, 1, 2]), 0.2, 0)
    assert (train.n_rows, test.n_rows) == (3, 1)


@pytest.mark.parametrize("share", [0, 1, -1, 1.5])
def test_a_share_must_leave_something_on_both_sides(share):
    with pytest.raises(UserError, match="set it between 0 and 1"):
        split_by_orbit(Letters(), letters("aa", "bb"), share, 0)


def test_a_small_share_still_has_one_orbit():
    train, test = split_by_orbit(Letters(), letters("aa", "aa", "bb"), 0.01, 0)
    assert (train.n_rows, test.n_rows) == (2, 1)


def test_leaks_are_named():
    with pytest.raises(UserError) as error:
        check_leak(Letters(), letters("aa", "ab"), letters("bb", "ba", "ab", "ba", "ba"))
    assert str(error.value) == (
        "4 of 5 test grids are training grids under a symmetry of letters (test rows 1, 2, 3 and 1 more; row 1 is "
        "training row 1; rows count from 0): remove them, or split by orbit"
    )
    assert find_leaks(Letters(), letters("aa", "ab"), letters("bb", "ba", "aa")) == {1: 1, 2: 0}
    check_leak(Letters(), letters("aa", "ab"), letters("bb"))


def test_one_row_of_a_training_group_stands_for_all_unless_the_kind_says_no(monkeypatch):
    train, test = letters("aa", "ab", groups=[3, 3]), letters("ab")
    check_leak(Letters(), train, test)
    monkeypatch.setattr(Letters, "one_orbit_per_group", False)
    with pytest.raises(UserError, match="row 0 is training row 1"):
        check_leak(Letters(), train, test)


# ---- files ----


def test_a_file_is_read_with_its_rating(tmp_path):
    lines = ["source,question,answer,rating", f"x,{QUESTION},{ANSWER},7", f"y,{QUESTION.replace('.', '0')},{ANSWER},oh"]
    grids = read_csv(Sudoku(4), csv_file(tmp_path / "a.csv", *lines))
    assert (grids.inputs[0] == Sudoku(4).from_text(QUESTION)).all() and (grids.inputs[1] == grids.inputs[0]).all()
    assert (grids.labels[0] == Sudoku(4).from_text(ANSWER)).all()
    assert grids.difficulty["rating"][0] == 7 and np.isnan(grids.difficulty["rating"][1])
    assert grids.difficulty["clues"].tolist() == [7, 7] and grids.difficulty["guess"].tolist() == [False, False]
    assert grids.puzzle_ids.tolist() == [0, 0] and grids.groups.tolist() == [0, 1]


@pytest.mark.parametrize("header", ["question,answer", "Solution , PUZZLE", "\ufeffquizzes,solutions"])
def test_columns_are_found_by_name(tmp_path, header):
    columns = [ANSWER, QUESTION] if header.startswith("S") else [QUESTION, ANSWER]
    grids = read_csv(Sudoku(4), csv_file(tmp_path / "a.csv", header, ",".join(columns), ""))
    assert grids.n_rows == 1 and set(grids.difficulty) == {"clues", "rounds", "guess"}


def test_gzipped_files_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f"question,answer\r\n{QUESTION},{ANSWER}\r\n".encode()))
    assert read_csv(Sudoku(4), tmp_path / "a.csv.gz").n_rows == 1


def test_bad_puzzles_are_named_skipped_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(puzzles, "CHUNK", 2)
    monkeypatch.setattr(puzzles, "REPORTED", 6)
    lines = [
        "question,answer",
        f"{QUESTION},{ANSWER}",
        f"{QUESTION},{ANSWER[:-1]}2",
        f"2{QUESTION[1:]},{ANSWER}",
        f"{QUESTION[1:]},{ANSWER}",
        f"{QUESTION},{ANSWER[:-1]}9",
        QUESTION,
        f"{QUESTION},{ANSWER[:2]}.{ANSWER[3:]}",
        f"{QUESTION},{ANSWER}",
        "1" * 200_000,
    ]
    path = csv_file(tmp_path / "a.csv", *lines)
    assert read_csv(Sudoku(4), path).n_rows == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: skipped line 3, wrong answer: row 4 has 2 twice",
        f"{path}: skipped line 4, wrong answer: row 1, column 1 is 1, but its clue is 2",
        f"{path}: skipped line 5, question: a sudoku4 board has 16 cells (4 x 4), this one has 15: add or remove cells",
        f"{path}: skipped line 6, answer: cell 16 is '9': a sudoku4 board is written with '.12340_'",
        f"{path}: skipped line 7, answer: a sudoku4 board has 16 cells (4 x 4), this one has 0: add or remove cells",
        f"{path}: skipped line 8, wrong answer: row 1, column 3 is blank",
        f"{path}: 7 of 9 puzzles skipped",
    ]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([""], "must name two columns: question/puzzle/quizzes/input and answer/"),
        (["question,result", f"{QUESTION},{ANSWER}"], "the header 'question,result' must name two columns"),
        (["question,answer"], "holds no puzzle below its header"),
        (
            ["question,answer", "1,2", "3,4"],
            "none of the 2 puzzles .* is usable as sudoku4; line 2, question: a sudoku4",
        ),
        (["question,answer", f"{QUESTION},{ANSWER[:-1]}4"], "line 2, wrong answer: row 4 has 4 twice"),
    ],
)
def test_files_without_a_good_puzzle_are_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_csv(Sudoku(4), csv_file(tmp_path / "a.csv", *lines))


def test_an_open_quote_does_not_take_in_the_puzzles_after_it(tmp_path):
    lines = ["question,answer", f'"{QUESTION},{ANSWER}', *[f"{QUESTION},{ANSWER}"] * 3]
    with pytest.raises(UserError, match="a.csv, line 5: unexpected end of data: correct the line"):
        read_csv(Sudoku(4), csv_file(tmp_path / "a.csv", *lines))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_csv(Sudoku(4), tmp_path / "a.csv")
    data = gzip.compress("\n".join(["question,answer"] + [f"{QUESTION},{ANSWER}"] * 5000).encode())
    (tmp_path / "a.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_csv(Sudoku(4), tmp_path / "a.csv.gz")


def test_a_file_of_generated_puzzles_is_read_back(tmp_path):
    kind, grids = Sudoku(6), generate(6, 50, (10, 20), seed=0)
    rows = [f"{kind.to_text(q, False)},{kind.to_text(a, False)}" for q, a in zip(grids.inputs, grids.labels)]
    again = read_csv(kind, csv_file(tmp_path / "a.csv", "question,answer", *rows))
    assert (again.inputs == grids.inputs).all() and (again.labels == grids.labels).all()
    assert all((again.difficulty[name] == values).all() for name, values in grids.difficulty.items())


def test_a_file_without_answers(tmp_path, capsys):
    """The only right answer takes the place of one that is missing; there is none if there are several."""
    several = "3....24..1......"
    lines = ["question,answer", f"{QUESTION},", f"{several},", f"33{'.' * 14},", f"{QUESTION},{ANSWER}", f"{several},x"]
    grids = read_csv(Sudoku(4), csv_file(tmp_path / "a.csv", *lines), needs_answers=False)
    texts = [Sudoku(4).to_text(label, line_breaks=False) for label in grids.labels]
    assert texts == [ANSWER, "?" * 16, ANSWER]
    err = capsys.readouterr().err
    assert "skipped line 4, question: row 1 has 3 twice" in err and "skipped line 6, answer: " in err
    assert "2 of 5 puzzles skipped" in err
    alone = read_csv(Sudoku(4), csv_file(tmp_path / "b.csv", "id,puzzle", f"7,{QUESTION}"), needs_answers=False)
    assert np.array_equal(alone.labels, grids.labels[:1])
    with pytest.raises(UserError, match="must name question/puzzle/quizzes/input for a column"):
        read_csv(Sudoku(4), csv_file(tmp_path / "c.csv", "id,text", f"7,{QUESTION}"), needs_answers=False)
    with pytest.raises(UserError, match="must name two columns: question/"):
        read_csv(Sudoku(4), tmp_path / "b.csv")
    with pytest.raises(UserError, match="line 2, answer: a sudoku4 board has 16 cells"):
        read_csv(Sudoku(4), csv_file(tmp_path / "d.csv", "question,answer", f"{QUESTION},"))


def test_leaks_of_groups_of_pairs(monkeypatch):
    """Ids 2 and 4 are augmentations of ids 1 and 3: only pairs of the lowest id of a group are compared."""
    monkeypatch.setattr(Letters, "one_orbit_per_group", False)
    train = letters("aa", "ab", "bb", "ba", groups=[0] * 4)._replace(puzzle_ids=np.array([1, 1, 2, 2], np.int32))
    test = letters("ab", "ba", groups=[0] * 2)._replace(puzzle_ids=np.array([3, 4], np.int32))
    assert find_leaks(Letters(), train, test) == {0: 1}
    monkeypatch.setattr(Letters, "invariants", lambda self, inputs, labels: [bytes(sorted(row)) for row in inputs])
    assert find_leaks(Letters(), train, test) == {0: 1}
    monkeypatch.setattr(Letters, "invariants", lambda self, inputs, labels: [bytes([len(inputs)]) for _ in inputs])
    assert find_leaks(Letters(), train, test.take(np.array([0]))) == {}  # as if no orbit could be the same
