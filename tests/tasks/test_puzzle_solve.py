"""Solving boards with a model: steps, early stopping, noisy starts, votes.  Random models are enough for all of it."""

import math

import numpy as np
import pytest
import torch
from trainers import puzzle_model

from src.errors import UserError
from src.model import Carry, TRMConfig, TRMModel, TRMOutput
from src.tasks.arc import Arc
from src.tasks.board_trace import BoardTrace
from src.tasks.mazes import Maze
from src.tasks.puzzle_eval import Answers, Solved, solve
from src.tasks.puzzle_input import generated_boards
from src.tasks.puzzle_report import summary
from src.tasks.puzzle_solve import Attempt, Effort, attempts, run_steps
from src.tasks.puzzles import Symmetries
from src.tasks.sudoku import Sudoku

KINDS = {
    **{
        f"sudoku{size} {symmetries}": Sudoku(size, symmetries)
        for size in (4, 6, 9)
        for symmetries in ("all", "relabel")
    },
    **{"maze square": Maze(5), "maze wide": Maze(4, 6)},
}
SUDOKU = KINDS["sudoku4 relabel"]
GRIDS = generated_boards(SUDOKU, 24, low=4, high=8)
IDS = np.zeros(24, np.int32)


def make_model(kind=SUDOKU, seed=0, **changes) -> TRMModel:
    return puzzle_model(kind, seed, **changes)


def expit(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def boards(n=24):
    return torch.from_numpy(GRIDS.inputs[:n].astype(np.int64))


def last(*words, **options) -> Attempt:
    *_, attempt = attempts(*words, **options)
    return attempt


class TestSteps:
    def test_they_are_those_of_one_call(self):
        model, inputs = make_model(), boards()
        with torch.no_grad():
            out = model(inputs, supervision_steps=7, return_steps=True)
        found = list(run_steps(model, inputs, steps=7))
        assert len(found) == 7
        for step, logits, halts in zip(found, out.logits, out.halt_logits):
            assert torch.allclose(step.logits, logits, atol=1e-5) and torch.allclose(step.halt_logits, halts, atol=1e-5)
            assert torch.equal(step.answers, logits.argmax(-1)) and step.rows.tolist() == list(range(24))
            assert torch.allclose(step.certainty, logits.softmax(-1).max(-1).values, atol=1e-5)

    def test_the_default_is_the_depth_of_training(self):
        assert len(list(run_steps(make_model(), boards(2)))) == 5

    @pytest.mark.parametrize(("recursion", "expected"), [("loop", 3), ("none", 1)])
    def test_other_families(self, recursion, expected):
        """A loop answers after each visit."""
        model = make_model(recursion=recursion, deep_steps=3, halting=False)
        with torch.no_grad():
            out = model(boards(4), return_steps=True)
        found = list(run_steps(model, boards(4)))
        assert len(found) == expected and all(step.halt_logits is None for step in found)
        assert torch.allclose(torch.stack([step.logits for step in found]), out.logits, atol=1e-5)

    def test_noise_moves_the_first_state(self):
        model, noise = make_model(), torch.randn(2, 2, 16, 16)
        plain, zero, noisy = (
            next(iter(run_steps(model, boards(2), noise=each))).logits for each in (None, 0 * noise, noise)
        )
        assert torch.allclose(plain, zero, atol=1e-6) and not torch.allclose(plain, noisy, atol=0.1)

    def test_rows_leave_and_the_rest_gets_cheaper(self, monkeypatch):
        model = make_model()
        fixed = list(run_steps(model, boards()))
        threshold = torch.stack([step.halt_logits for step in fixed]).quantile(0.7).item()
        sizes, forward = [], model.forward
        monkeypatch.setattr(
            model, "forward", lambda ids, *args, **kw: sizes.append(len(ids)) or forward(ids, *args, **kw)
        )
        found = list(run_steps(model, boards(), halt_logit=threshold))
        assert sizes == [len(step.rows) for step in found] and 24 == sizes[0] > sizes[1] > sizes[-1] > 0
        for before, after in zip(found, found[1:]):
            assert after.rows.tolist() == before.rows[before.halt_logits <= threshold].tolist()

    def test_no_row_is_left(self):
        assert len(list(run_steps(make_model(), boards(), halt_logit=-math.inf))) == 1


class TestExit:
    def test_each_row_has_the_answer_of_the_step_where_it_first_passed(self):
        model = make_model()
        fixed = list(run_steps(model, boards()))
        halts = torch.stack([step.halt_logits for step in fixed]).numpy()
        threshold = float(np.quantile(halts, 0.7))
        passes = halts > threshold
        first = np.where(passes.any(0), passes.argmax(0), 4)
        assert len(set(first.tolist())) >= 3
        attempt = last(
            model, SUDOKU, GRIDS.inputs, IDS, Effort(halts=True, halt_threshold=expit(threshold), batch_size=7)
        )
        for row, step in enumerate(first):
            assert attempt.answers[row].tolist() == fixed[step].answers[row].tolist()
            assert attempt.certainty[row] == pytest.approx(fixed[step].certainty[row].numpy(), abs=1e-4)
            assert attempt.halt[row] == pytest.approx(expit(halts[step, row]), abs=1e-4)
        assert attempt.steps.tolist() == (first + 1).tolist()

    @pytest.mark.parametrize(("threshold", "steps"), [(0.0, 1), (1.0, 5)])
    def test_the_ends_of_the_threshold(self, threshold, steps):
        attempt = last(make_model(), SUDOKU, GRIDS.inputs, IDS, Effort(halts=True, halt_threshold=threshold))
        assert (attempt.steps == steps).all()


class TestBatches:
    @pytest.mark.parametrize(
        "effort", [Effort(), Effort(starts=3, start_noise=1.0), Effort(votes=4), Effort(halts=True)]
    )
    def test_their_size_does_not_matter(self, effort):
        model = make_model()
        parts = [list(attempts(model, SUDOKU, GRIDS.inputs, IDS, effort._replace(batch_size=n))) for n in (5, 256)]
        assert len(parts[0]) == len(parts[1])
        for one, other in zip(*parts):
            assert np.array_equal(one.answers, other.answers) and np.array_equal(one.steps, other.steps)
            assert np.allclose(one.certainty, other.certainty, atol=1e-4) and np.allclose(
                one.halt, other.halt, atol=1e-4
            )

    def test_a_board_alone_and_among_others(self):
        """The random numbers of a board depend on its number, not on the boards around it."""
        effort = Effort(votes=3, starts=2, start_noise=1.0, seed=3)
        together = last(make_model(), SUDOKU, GRIDS.inputs, IDS, effort)
        alone = last(make_model(), SUDOKU, GRIDS.inputs[7:8], IDS[7:8], effort, first=7)
        assert alone.answers[0].tolist() == together.answers[7].tolist()
        assert alone.halt[0] == pytest.approx(together.halt[7], abs=1e-5)

    def test_puzzle_ids_reach_the_model(self):
        model = make_model(prefix_tokens=2, puzzle_ids=3)
        with torch.no_grad():
            model.puzzle_embed.weight.normal_(std=3)
            expected = model(boards(), puzzle_ids=torch.arange(24) % 3).logits.argmax(-1)
        found = last(model, SUDOKU, GRIDS.inputs, np.arange(24) % 3, Effort())
        assert np.array_equal(found.answers, expected.numpy())
        assert not np.array_equal(found.answers, last(model, SUDOKU, GRIDS.inputs, IDS, Effort()).answers)


class TestStarts:
    def test_one_start_is_the_fixed_run(self):
        model = make_model()
        with torch.no_grad():
            out = model(boards(), return_steps=True)
        for effort in (Effort(starts=1, start_noise=5.0), Effort(starts=3, start_noise=0.0)):
            found = list(attempts(model, SUDOKU, GRIDS.inputs, IDS, effort))
            assert np.array_equal(np.stack([each.answers for each in found]), out.logits.argmax(-1).numpy())
            assert np.allclose([each.halt for each in found], out.halt_logits.sigmoid().numpy(), atol=1e-5)

    def test_the_highest_halting_logit_is_chosen(self):
        model = make_model()
        with torch.no_grad():
            plain = model(boards()).halt_logits.sigmoid().numpy()
        few, many = (last(model, SUDOKU, GRIDS.inputs, IDS, Effort(starts=n, start_noise=1.0)).halt for n in (1, 6))
        assert np.allclose(few, plain, atol=1e-5) and (many >= plain - 1e-5).all() and (many > plain + 0.01).any()

    def test_the_seed_decides(self):
        runs = [
            last(make_model(), SUDOKU, GRIDS.inputs, IDS, Effort(starts=4, start_noise=1.0, seed=s)).halt
            for s in (1, 1, 2)
        ]
        assert np.array_equal(runs[0], runs[1]) and not np.allclose(runs[0], runs[2], atol=1e-3)


class TestSymmetries:
    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_they_are_undone_exactly(self, kind):
        grids, rng = generated_boards(kind, 40), np.random.default_rng(1)
        symmetries = kind.draw_symmetries(rng, 40)
        images = [symmetries.apply(each) for each in (grids.inputs, grids.labels)]
        assert not np.array_equal(images[0], grids.inputs) and kind.are_right(*images).all()
        assert np.array_equal(symmetries.undo(images[0]), grids.inputs)
        assert np.array_equal(symmetries.undo(images[1]), grids.labels)
        values = np.arange(40.0 * kind.cells).reshape(40, -1)
        assert np.array_equal(symmetries.undo_cells(np.take_along_axis(values, symmetries.cells, 1)), values)

    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_augmentation_is_one_of_them(self, kind):
        grids = generated_boards(kind, 10)
        augmented = kind.augment(np.random.default_rng(5), grids.inputs, grids.labels)
        symmetries = kind.draw_symmetries(np.random.default_rng(5), 10)
        assert all(np.array_equal(symmetries.apply(b), a) for b, a in zip((grids.inputs, grids.labels), augmented))


class Oracle(TRMModel):
    """A model that answers copy c of each board with `say(board, c)`: an answer (L,), and a halting logit."""

    def __init__(self, kind, say, copies, has_head=True):
        size = {"max_seq_len": kind.cells, "vocab_size": kind.vocab_size}
        super().__init__(TRMConfig(**size, d_model=8, causal=False, supervision_steps=1, halting=has_head))
        self.say, self.copies, self.seen = say, copies, []

    def forward(self, inputs, *args, **kwargs):
        self.seen.append(inputs.numpy().astype(np.uint8))
        answers, halts = zip(*(self.say(b, row % self.copies) for row, b in enumerate(self.seen[-1])))
        logits = 9.0 * torch.nn.functional.one_hot(torch.from_numpy(np.stack(answers).astype(np.int64)), 6)
        halts = torch.tensor(halts)[None] if self.config.halting else None
        return TRMOutput(None, None, None, logits[None], halts, Carry(logits, logits, 1))


class TestVotes:
    def elect(self, answers, halts, has_head=True):
        """The result for the first board, of votes for answers (one token in all cells) with halting logits."""
        kind = Sudoku(4, "all")

        def say(board, copy):
            token, halt = answers[copy], halts[copy]
            return symmetries.apply(np.full((votes, 16), token, np.uint8))[copy], halt

        votes = len(answers)
        oracle = Oracle(kind, say, votes, has_head)
        symmetries = drawn(kind, votes, seed=(4, 0))
        attempt = last(oracle, kind, GRIDS.inputs[:1], IDS[:1], Effort(votes=votes, seed=4))
        assert np.array_equal(oracle.seen[0], symmetries.apply(np.repeat(GRIDS.inputs[:1], votes, axis=0)))
        return attempt

    def test_the_most_frequent_answer_wins(self):
        attempt = self.elect([2, 3, 4, 3, 5], [9.0, 0.0, 9.0, -1.0, 9.0])
        assert (attempt.answers == 3).all()
        assert attempt.halt[0] == pytest.approx(expit([0.0, -1.0]).mean(), abs=1e-6) and attempt.steps[0] == 1

    def test_then_the_highest_mean_halting_probability(self):
        assert (self.elect([2, 2, 3, 3, 4], [0.5, 0.5, 2.0, -0.5, 9.0]).answers == 3).all()

    def test_without_a_head_the_first_of_equal_counts(self):
        attempt = self.elect([4, 2, 3], [0.0, 0.0, 0.0], has_head=False)
        assert (attempt.answers == 4).all() and attempt.halt is None

    @pytest.mark.parametrize("kind", [Sudoku(4, "all"), Maze(5), Maze(4, 6)], ids=lambda kind: kind.name)
    def test_a_model_that_repeats_the_board(self, kind):
        """Whatever the symmetries, undoing them gives the board itself, and all votes agree."""
        grids = generated_boards(kind, 3)
        attempt = last(
            Oracle(kind, lambda board, copy: (board, 1.0 + copy), 4), kind, grids.inputs, IDS[:3], Effort(votes=4)
        )
        assert np.array_equal(attempt.answers, grids.inputs)
        assert attempt.halt == pytest.approx([expit([1.0, 2.0, 3.0, 4.0]).mean()] * 3, abs=1e-6)

    def test_the_certainty_is_that_of_a_vote_for_the_answer(self):
        """Cell by cell, of the vote with the highest halting logit among those for the answer that was chosen."""
        kind, model = Sudoku(4, "all"), make_model()
        attempt = last(model, kind, GRIDS.inputs[:1], IDS[:1], Effort(votes=3))
        symmetries = drawn(kind, 3, seed=(0, 0))
        with torch.no_grad():
            images = symmetries.apply(np.repeat(GRIDS.inputs[:1], 3, axis=0))
            out = model(torch.from_numpy(images.astype(np.int64)))
        answers = symmetries.undo(out.logits.argmax(-1).numpy().astype(np.uint8))
        certainty = symmetries.undo_cells(out.logits.softmax(-1).amax(-1).numpy())
        agree = np.flatnonzero((answers == attempt.answers[0]).all(1))
        best = agree[out.halt_logits.numpy()[agree].argmax()]
        assert attempt.certainty[0] == pytest.approx(certainty[best], abs=1e-4)
        assert np.ptp(certainty[best]) > 0.1  # so that an exchange of cells would be seen

    def test_boards_have_symmetries_of_their_own(self):
        kind = Sudoku(4, "all")
        oracle = Oracle(kind, lambda board, copy: (board, 0.0), 4)
        last(oracle, kind, np.repeat(GRIDS.inputs[:1], 2, axis=0), IDS[:2], Effort(votes=4))
        one, other = np.split(oracle.seen[0], 2)
        assert np.array_equal(one[0], other[0]) and (one[1:] != other[1:]).any(1).all()

    def test_one_vote_is_the_board_as_it_is(self):
        model = make_model()
        one, many = (last(model, SUDOKU, GRIDS.inputs, IDS, Effort(votes=n)) for n in (1, 5))
        with torch.no_grad():
            assert np.array_equal(one.answers, model(boards()).logits.argmax(-1).numpy())
        assert many.answers.shape == one.answers.shape and not np.array_equal(many.answers, one.answers)


def drawn(kind, n, seed) -> Symmetries:
    """The symmetries that `attempts` draws, found by trying: the identity, then the first different ones."""
    rng, found = np.random.default_rng(seed), [(np.arange(kind.cells), np.arange(kind.vocab_size, dtype=np.uint8))]
    while len(found) < n:
        more = kind.draw_symmetries(rng, max(64, 2 * n))
        for cells, tokens in zip(*more):
            if not any(np.array_equal(cells, c) and np.array_equal(tokens, t) for c, t in found):
                found.append((cells, tokens))
    return Symmetries(*(np.stack(each) for each in zip(*found[:n])))


class TestRefusals:
    @pytest.mark.parametrize(
        ("effort", "model", "message"),
        [
            ({"halts": True}, {"halting": False}, "--exit halt needs a halting head, which this model does not have"),
            ({"starts": 2}, {"halting": False}, "--starts needs a halting head"),
            ({"steps": 4}, {"recursion": "loop"}, "--steps is for recursion trm, and this model has loop"),
            ({"steps": 4}, {"recursion": "none"}, "--steps is for recursion trm, and this model has none"),
            ({"halts": True}, {"recursion": "loop", "halting": True}, "--exit halt is for recursion trm"),
            ({"starts": 2}, {"recursion": "none"}, "--starts is for recursion trm"),
        ],
        ids=lambda value: None if isinstance(value, dict) else str(value)[:24],
    )
    def test_a_model_that_cannot(self, effort, model, message):
        with pytest.raises(UserError, match=message):
            Effort(**effort).check(make_model(**model), SUDOKU)

    @pytest.mark.parametrize(
        ("kind", "votes", "message"),
        [
            (Arc(), 2, "--votes needs symmetries, and a board of arc alone has none"),
            (Maze(5), 9, "--votes is 9, but maze5x5 has only 8 symmetries: set it to 8 or less"),
            (Maze(4, 6), 5, "only 4 symmetries"),
            (SUDOKU, 25, "only 24 symmetries"),
        ],
        ids=lambda value: value.name if hasattr(value, "name") else None,
    )
    def test_votes_without_symmetries(self, kind, votes, message):
        with pytest.raises(UserError, match=message):
            Effort(votes=votes).check(make_model(), kind)

    def test_as_many_votes_as_symmetries(self):
        Effort(votes=24).check(make_model(), SUDOKU)
        Effort(votes=8).check(make_model(), Maze(5))


def test_the_table_of_steps_counts_boards_that_have_stopped():
    """Two parts of two boards; the first stops after two steps, the second after three."""
    last_attempts = [Attempt(GRIDS.labels[:2], np.ones((2, 16), np.float32), None, np.full(2, n)) for n in (2.0, 3.0)]
    exact = [np.array([[0, 0], [1, 1]]), np.array([[0, 0], [1, 0], [0, 1]])]
    parts = [
        Solved(Answers(np.arange(2) + 2 * i, is_exact * 1.0, is_exact * 1.0, is_exact == 1, None), None, attempt, 0.5)
        for i, (is_exact, attempt) in enumerate(zip(exact, last_attempts))
    ]
    lines = summary(SUDOKU, GRIDS.take(slice(4)), parts)
    assert lines[0] == "4 boards of sudoku4: exact 0.7500, cells 0.7500, halting 1.0000, mean steps 2.50, 4.0 boards/s"
    assert lines[2].split() == ["exact", "0.000", "0.750", "0.750"]


def test_a_trace_ends_where_its_board_has_stopped():
    model = make_model()
    threshold = expit(np.quantile(np.concatenate([s.halt_logits for s in run_steps(model, boards())]), 0.8))
    effort = Effort(halts=True, halt_threshold=threshold)
    (part,) = solve(model, SUDOKU, GRIDS, effort)
    first = GRIDS.take(np.argsort(part.last.steps, kind="stable"))
    trace = BoardTrace(SUDOKU, first.inputs[0], first.labels[0])
    (part,) = solve(model, SUDOKU, first, effort, trace.add)
    assert len(trace.steps) == part.last.steps[0] < part.last.steps.max()


def test_figures_after_early_stopping():
    """After a board has stopped, its answer counts at all later steps; batches of different depth are joined."""
    model = make_model()
    threshold = expit(np.quantile(np.concatenate([s.halt_logits for s in run_steps(model, boards())]), 0.8))
    effort = Effort(halts=True, halt_threshold=threshold, batch_size=2)
    parts = list(solve(model, SUDOKU, GRIDS, effort))
    depths = {len(part.answers.is_exact) for part in parts}
    assert len(depths) > 1 and [row for part in parts for row in part.answers.rows] == list(range(24))
    for part in parts:
        rows = part.answers.rows
        assert part.answers.is_exact[-1].tolist() == SUDOKU.are_right(GRIDS.inputs[rows], part.last.answers).tolist()
        assert part.answers.cells[-1] == pytest.approx((part.last.answers == GRIDS.labels[rows]).mean(1))
    lines = summary(SUDOKU, GRIDS, parts)
    steps = np.concatenate([part.last.steps for part in parts])
    assert lines[0].startswith("24 boards of sudoku4: exact 0.") and f"mean steps {steps.mean():.2f}" in lines[0]
    assert lines[1].split() == ["after", "step", *map(str, range(1, max(depths) + 1))]
    clues = next(line for line in lines if line.startswith("clues")).split()[1:]
    counts = [(GRIDS.difficulty["clues"] == int(n)).sum() for n in clues]
    assert lines[lines.index(next(line for line in lines if line.startswith("clues"))) + 1].split()[1:] == list(
        map(str, counts)
    )
