"""Training on puzzles: rows with their own puzzles and states, one update per supervision step, exact resume."""

import os
import signal

import numpy as np
import pytest
import torch
from trainers import TINY_PUZZLES, assert_same_checkpoints, during, puzzle_settings, read_metrics

from src.checkpoint import load_network, load_state, read_info
from src.errors import UserError
from src.losses import IGNORE
from src.model import Carry
from src.optim import make_optimizers
from src.tasks.puzzle_data import HeldOut, PuzzleDraws, load_puzzles, read_form
from src.tasks.puzzle_rows import PuzzleRows
from src.tasks.puzzle_trainer import create_puzzle_trainer


@pytest.fixture
def make(tmp_path, monkeypatch):
    def make(name="run", draws=False, **changes):
        if not draws:
            monkeypatch.setattr("src.training.monitor.plot_learning_curve", lambda *args: None)
        return create_puzzle_trainer(puzzle_settings({**TINY_PUZZLES, "save_dir": str(tmp_path / name), **changes}))

    return make


class TestRows:
    @pytest.fixture
    def rows(self, make):
        trainer = make()
        return PuzzleRows(trainer.train_set, 8, trainer.raw, explore=0.0)

    def test_they_start_with_the_first_puzzles_and_the_initial_state(self, rows):
        batch = next(rows)
        expected = rows.draws.take(np.arange(8))
        assert (
            batch["input_ids"].tolist() == expected[0].tolist() and batch["target_ids"].tolist() == expected[1].tolist()
        )
        assert (batch["y"] == rows.model.y_init).all() and (batch["z"] == rows.model.z_init).all()

    def test_only_rows_that_halt_are_replaced(self, rows):
        before = next(rows)
        y = torch.randn(8, 16, 16)
        halts = torch.tensor([True, False] * 4)
        rows.advance(y, 2 * y, halts, torch.tensor([True] * 3 + [False] * 5))
        batch, expected = next(rows), rows.draws.take(np.arange(8, 12))
        assert batch["input_ids"][::2].tolist() == expected[0].tolist()
        assert torch.equal(batch["input_ids"][1::2], before["input_ids"][1::2])
        assert torch.equal(batch["y"][1::2], y[1::2]) and torch.equal(batch["z"][1::2], 2 * y[1::2])
        assert (batch["y"][::2] == rows.model.y_init).all() and rows.steps.tolist() == [0, 1] * 4
        assert rows.take_counts() == [4, 2, 4] and rows.take_counts() == [0, 0, 0]

    def test_the_most_steps_end_a_puzzle(self, rows):
        no = torch.zeros(8, dtype=torch.bool)
        for step in range(3):
            assert rows.steps.tolist() == [step] * 8 or step == 0
            next(rows)
            rows.advance(rows.y, rows.z, no, no)
        assert rows.is_done.all() and rows.take_counts() == [8, 0, 24]

    def test_exploring_rows_do_not_halt_before_their_least_step(self, make):
        trainer = make(batch_size=400, supervision_steps=5)
        rows = PuzzleRows(trainer.train_set, 400, trainer.raw, explore=0.25)
        next(rows)
        least = rows.least.clone()
        assert 60 < (least > 0).sum() < 140 and set(least.tolist()) == {0, 2, 3, 4, 5}
        yes = torch.ones(400, dtype=torch.bool)
        for step in range(1, 3):
            rows.advance(rows.y, rows.z, yes, yes)
            assert torch.equal(rows.is_done, least <= step)

    def test_processes_take_different_puzzles(self, make):
        trainer = make()
        parts = [next(PuzzleRows(trainer.train_set, 4, trainer.raw, rank=rank, world=2)) for rank in (0, 1)]
        together = torch.stack([part["input_ids"] for part in parts], 1).flatten(0, 1)
        assert together.tolist() == trainer.train_set.take(np.arange(8))[0].tolist()

    def test_a_state_of_other_rows_is_refused(self, rows, make):
        other = PuzzleRows(rows.draws, 4, rows.model)
        with pytest.raises(UserError, match="1 processes with 8 rows each"):
            other.load_state_dict(rows.state_dict())


class TestSteps:
    def test_a_step_is_one_supervision_step_from_the_rows_states(self, make):
        """The update is that of the loss after one step; the new states are the carry of that step."""
        trainer = make(optimizer="adamw", ema_decay=0.0, grad_clip=0.0)
        trainer.enter_stage()
        twin = load_copy(trainer)
        batch = next(trainer.loader)
        ids, targets = batch["input_ids"].clone(), batch["target_ids"].clone()
        out = twin(ids, targets, supervision_steps=1, carry=Carry(batch["y"], batch["z"], 0))
        out.loss.backward()
        expected = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
        trainer.train_step(batch)
        assert trainer.step == 1 and trainer.grad_norm == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(trainer.loader.y, out.carry.y, atol=1e-6) and (trainer.loader.steps == 1).all()
        assert trainer.window.losses.tolist() == pytest.approx(
            [out.loss.item(), out.ce_loss.item(), out.act_loss.item()], rel=1e-5
        )

    @pytest.mark.parametrize("loss_mean", ["row", "token"])
    def test_parts_of_a_batch_give_the_same_gradient(self, make, loss_mean):
        norms = []
        for parts in (1, 4):
            trainer = make(f"run{parts}", grad_accum=parts, loss_mean=loss_mean)
            trainer.enter_stage()
            batch = next(trainer.loader)
            trainer.train_step(batch)
            norms.append((trainer.grad_norm, trainer.loader.y))
        assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)
        assert torch.allclose(norms[0][1], norms[1][1], atol=1e-5)

    @pytest.mark.parametrize(
        "model", [{"recursion": "none", "n_layers": 2}, {"recursion": "loop"}, {"prefix_tokens": 2, "puzzle_ids": 3}]
    )
    def test_other_models_train(self, make, model):
        trainer = make(**model, max_steps=3)
        figures = trainer.train()
        assert 0 <= figures["valid_exact_accuracy"] <= 1
        assert load_network(trainer.folder / "last").config.recursion == trainer.raw.config.recursion

    def test_puzzles_without_a_known_answer_are_not_judged(self, make):
        """As the secret answers of ARC: an answer without targets has no wrong cell."""
        trainer = make(eval_batches=0)
        grids = trainer.valid_set.grids
        labels = grids.labels.copy()
        labels[1:] = 0
        for known in (grids.take(slice(1)), grids._replace(labels=labels)):
            trainer.valid_set.grids = known
            figures = trainer.measure(None)
            if known.n_rows == 1:
                one = figures
        assert figures == one

    def test_it_learns(self, make):
        trainer = make(max_steps=80, d_model=32, d_ff=64, batch_size=32, lr=4e-3, eval_every=80)
        trainer.train()
        losses = [r["ce_loss"] for r in read_metrics(trainer.folder) if "ce_loss" in r]
        assert losses[-1] < 0.6 * losses[0]


def load_copy(trainer):
    from src.model import TRMModel

    twin = TRMModel(trainer.raw.config)
    twin.load_state_dict(trainer.raw.state_dict())
    return twin.train()


class TestEvaluation:
    def test_figures(self, make):
        """Accuracies equal those that one call of the model gives, and more steps than trained can be asked for."""
        trainer = make(eval_steps=5, ema_decay=0.0)
        figures = trainer.measure(None)
        grids = trainer.valid_set.grids
        inputs, labels = (torch.from_numpy(a.astype(np.int64)) for a in (grids.inputs, grids.labels))
        with torch.no_grad():
            out = trainer.raw.eval()(inputs, supervision_steps=5, return_steps=True)
        right = out.logits.argmax(-1) == labels
        for step in range(1, 6):
            assert figures[f"valid_exact_step_{step}"] == pytest.approx(right[step - 1].all(-1).float().mean().item())
            assert figures[f"valid_cell_step_{step}"] == pytest.approx(right[step - 1].float().mean().item(), abs=1e-6)
            halts = (out.halt_logits[step - 1] > 0) == right[step - 1].all(-1)
            assert figures[f"valid_halt_step_{step}"] == pytest.approx(halts.float().mean().item())
        assert "valid_exact_step_6" not in figures and any(name.startswith("valid_exact_clues_") for name in figures)

    def test_cells_without_a_target_do_not_count(self, make):
        trainer = make(ema_decay=0.0)
        grids = trainer.valid_set.grids
        labels = grids.labels.copy()
        labels[:, 1:] = 0
        trainer.valid_set = HeldOut(grids._replace(labels=labels))
        figures = trainer.measure(None)
        assert figures["valid_exact_accuracy"] == figures["valid_cell_accuracy"]  # the only cell, or none
        draws = PuzzleDraws(trainer.train_set.kind, trainer.valid_set.grids, 0, False)
        targets = next(iter(PuzzleRows(draws, 2, trainer.raw)))["target_ids"]
        assert (targets[:, 1:] == IGNORE).all() and (targets[:, 0] != IGNORE).all()

    def test_of_equal_accuracies_the_lower_loss_is_better(self, make, monkeypatch):
        trainer = make(eval_every=3, max_steps=12)
        losses = {3: 1.5, 6: 1.2, 9: 1.3, 12: 1.2}
        figures = {"valid_exact_accuracy": 0.0, "valid_cell_accuracy": 0.5, "valid_exact_step_1": 0.0}
        monkeypatch.setattr(trainer, "measure", lambda limit: figures | {"valid_loss": losses[trainer.step]})
        trainer.train()
        assert (trainer.folder / "best").resolve().name == "step_00000006"
        assert (trainer.best, trainer.best_loss) == (1.0, 1.2)

    def test_a_run_logs_them_and_draws(self, make, capsys):
        trainer = make(draws=True)
        trainer.train()
        records = read_metrics(trainer.folder)
        judged = [r for r in records if "valid_exact_accuracy" in r]
        assert [r["step"] for r in judged] == [6, 12]
        assert any("exact_accuracy" in r and r["steps_per_puzzle"] <= 3 for r in records)
        assert (trainer.folder / "learning_curve.png").stat().st_size > 5000
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 12: exact")]
        assert len(lines) == 1 and "exact by step: 1: " in lines[0]
        info = read_info(trainer.folder)
        assert info["best_valid_error"] == 1 - max(r["valid_exact_accuracy"] for r in judged)
        assert read_form(trainer.folder / "best").kind.name == "sudoku4"


class TestResume:
    @pytest.mark.parametrize("stop", [5, 8])
    def test_stopped_and_resumed(self, make, stop):
        make("straight", dropout=0.2).train()
        first = make("broken", dropout=0.2)
        during(first, stop, lambda: signal.raise_signal(signal.SIGTERM))
        first.train()
        second = make("broken", dropout=0.2, resume=True)
        assert second.step == stop
        second.train()
        assert_same_checkpoints(first.folder.parent / "straight" / "last", second.folder / "last")

    def test_killed_and_resumed(self, make, tmp_path):
        """SIGKILL between two checkpoints."""
        make("straight").train()
        child = os.fork()
        if child == 0:
            try:
                trainer = make("broken")
                during(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
                trainer.train()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        trainer = make("broken", resume=True)
        assert trainer.step == 6  # the evaluation at step 6 was an improvement, so it was saved
        trainer.train()
        assert_same_checkpoints(tmp_path / "straight" / "last", tmp_path / "broken" / "last")

    def test_the_rows_are_in_the_state(self, make):
        trainer = make()
        trainer.train()
        rows = load_state(trainer.folder / "last")["loaders"][0]
        assert rows["y"].shape == (8, 16, 16) and rows["drawn"] >= 8 and len(rows["least"]) == 8

    def test_other_puzzles_are_refused(self, make, tmp_path):
        trainer = make()
        trainer.train()
        path = tmp_path / "run" / "corpus.json"
        path.write_text(path.read_text().replace('"train": "', '"train": "0'))
        with pytest.raises(UserError, match="the puzzles changed after the run .*train changed"):
            make(resume=True)
        assert make(resume=True, allow_changed_corpus=True).step == 12

    def test_other_settings_are_refused(self, make):
        make()
        with pytest.raises(UserError, match=r"--explore is 0.1, but the run in .* has 0.5"):
            make(resume=True, explore=0.1)


class TestStart:
    def test_from_a_checkpoint(self, make, tmp_path):
        make("first").train()
        second = make("second", init_from=str(tmp_path / "first"), supervision_steps=5)
        source = load_network(tmp_path / "first")
        assert torch.equal(second.raw.head.weight, source.head.weight) and second.raw.config.supervision_steps == 5
        with pytest.raises(UserError, match="16 cells and 6 tokens, not for sudoku6"):
            make("third", init_from=str(tmp_path / "first"), puzzle="sudoku6", n_puzzles=60)

    def test_stages_change_the_depth_only(self, make):
        from src.training.train_config import CurriculumConfig, CurriculumStage

        stages = [CurriculumStage(steps=4, supervision_steps=2), CurriculumStage(steps=4, latent_steps=2)]
        trainer = make(curriculum=CurriculumConfig(stages))
        trainer.train()
        assert trainer.step == 8 and trainer.raw.config.latent_steps == 2
        with pytest.raises(ValueError, match=r"curriculum.stages\[0\]: a run on puzzles cannot use batch_size"):
            make("other", curriculum=CurriculumConfig([CurriculumStage(steps=4, batch_size=4)]))

    def test_identifiers_out_of_range(self, make, monkeypatch):
        def with_ids(config):
            data = load_puzzles(config)
            return data._replace(train=data.train._replace(puzzle_ids=data.train.puzzle_ids + 7))

        monkeypatch.setattr("src.tasks.puzzle_trainer.load_puzzles", with_ids)
        with pytest.raises(UserError, match="identifiers up to 7: set puzzle_ids to 8 or more"):
            make(prefix_tokens=1, puzzle_ids=4)


class TestPuzzleEmbeddings:
    def test_sign_sgd_with_rates_of_its_own(self, make):
        """Warm-up over two steps: the first learning rate is half the peak. The embedding starts at 0."""
        trainer = make(prefix_tokens=2, puzzle_ids=3, puzzle_lr=0.5, puzzle_weight_decay=0.0, ema_decay=0.0, lr=1e-3)
        trainer.enter_stage()
        trainer.train_step(next(trainer.loader))
        table = trainer.raw.puzzle_embed.weight.detach()
        assert (table[0].abs() == 0.25).all() and not table[1:].any()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == [0.0005] * (len(groups) - 1) + [0.25]

    def test_defaults_follow_the_rest(self, make):
        trainer = make(prefix_tokens=2, puzzle_ids=3, lr=0.003, weight_decay=0.7)
        (group,) = trainer.optimizers[-1].param_groups
        assert (group["peak_lr"], group["weight_decay"]) == (0.003, 0.7)
        assert len(make("registers", prefix_tokens=2).optimizers) == len(trainer.optimizers) - 1

    def test_a_run_of_a_version_without_it_is_refused(self, make, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("src.tasks.puzzle_trainer.make_optimizers", lambda *args: make_optimizers(*args[:-1]))
            make(prefix_tokens=2, puzzle_ids=3, max_steps=2).train()
        with pytest.raises(UserError, match="of a version with other optimizers: start from its weights"):
            make(prefix_tokens=2, puzzle_ids=3, max_steps=2, resume=True)
