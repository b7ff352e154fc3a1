"""Stopping and resuming: a resume is exact, and a run ends with a checkpoint, whatever ended it."""

import math
import signal
import time

import pytest
from trainers import assert_same_checkpoints, during, read_metrics, same

from src.checkpoint import follow, load_model, read_info
from src.errors import UserError
from src.training import run_folder
from src.training.run_folder import point

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")  # whole runs; the tests of the parts check annotations


class TestResume:
    @pytest.mark.parametrize(
        "changes",
        [
            {"dropout": 0.2},
            {"recursion": "loop", "dropout": 0.2, "tie_embeddings": True},
            {"optimizer": "muon", "optimizer_step": "supervision"},
            {"packing": False, "grad_accum": 2, "num_workers": 1},
            {"fim_rate": 0.9, "max_seq_len": 48},
            {"fim_rate": 0.9, "max_seq_len": 48, "streaming": True, "shuffle_buffer": 4},
        ],
        ids=str,
    )
    def test_interrupted_run_ends_with_the_same_weights(self, make, changes, capsys):
        straight = make("straight", **changes)
        straight.train()
        first = make("broken", **changes)
        during(first, 4, lambda: signal.raise_signal(signal.SIGINT))
        first.train()
        assert first.step == 4
        assert "stopped by SIGINT after step 4" in capsys.readouterr().err
        second = make("broken", resume=True, **changes)
        assert second.step == 4
        second.train()
        assert_same_checkpoints(straight.folder / "last", second.folder / "last")
        steps = [r["step"] for r in read_metrics(second.folder) if "loss" in r]
        assert steps == list(range(1, 9))
        logs = [
            [(r["step"], r["loss"], r["lr"]) for r in read_metrics(t.folder) if "loss" in r] for t in (straight, second)
        ]
        assert logs[0] == logs[1]

    def test_killed_between_checkpoints(self, make):
        """Steps after the last checkpoint are lost and repeated exactly."""
        straight = make("straight", dropout=0.2, save_every=3)
        straight.train()
        first = make("broken", dropout=0.2, save_every=3)

        def die():
            raise RuntimeError("power cut")

        during(first, 5, die)
        with pytest.raises(RuntimeError):
            first.train()
        second = make("broken", resume=True, dropout=0.2, save_every=3)
        assert second.step == 3
        second.train()
        assert_same_checkpoints(straight.folder / "last", second.folder / "last")
        assert [r["step"] for r in read_metrics(second.folder) if "loss" in r] == list(range(1, 9))

    @pytest.mark.parametrize("stop", [4, 8])
    def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(self, make, monkeypatch, stop):
        options = {"eval_every": 4, "eval_batches": 1}
        straight = make("straight", **options)
        straight.train()
        first = make("broken", **options)
        during(first, stop, lambda: signal.raise_signal(signal.SIGINT))
        assert first.train() == {}
        assert stop not in [r["step"] for r in read_metrics(first.folder) if "valid_loss" in r]
        make("broken", resume=True, **options).train()
        found = [
            [
                (r["step"], r.get("valid_loss"), r.get("final_valid_loss"))
                for r in read_metrics(t.folder)
                if "loss" not in r
            ]
            for t in (straight, first)
        ]
        assert found[0] == found[1] and [step for step, *_ in found[0]] == [4, 8, 8]
        best = [follow(t.folder / "best").resolve() for t in (straight, first)]
        assert best[0].name == best[1].name and read_info(best[0]) == read_info(best[1])
        weights = [load_model(folder)[0].state_dict() for folder in best]
        assert same(*weights)

    def test_a_last_evaluation_that_was_killed_is_made_up_for(self, make, monkeypatch, capsys):
        options = {"eval_every": 8, "eval_batches": 1}
        straight = make("straight", **options)
        expected = straight.train()
        first = make("broken", **options)
        measure = first.measure

        def dies_at_the_end(limit):
            if limit is None:
                raise RuntimeError("power cut")
            return measure(limit)

        monkeypatch.setattr(first, "measure", dies_at_the_end)
        with pytest.raises(RuntimeError, match="power cut"):
            first.train()
        assert make("broken", resume=True, **options).train() == expected
        assert read_metrics(first.folder)[-1]["final_valid_loss"] == expected["valid_loss"]
        capsys.readouterr()
        assert make("broken", resume=True, **options).train() == {}  # it is not done twice
        assert "the last evaluation" not in capsys.readouterr().err

    @pytest.mark.parametrize("killed_at", [4, 8])
    def test_killed_before_the_links(self, make, monkeypatch, killed_at):
        """A checkpoint that is complete but not linked is `last` after a resume, and `best` if it was the best."""

        def run(**more):
            trainer = make(eval_every=2, save_every=2, keep_checkpoints=1, **more)
            monkeypatch.setattr(trainer, "score", lambda figures: float(trainer.step != killed_at))
            trainer.train()
            return trainer.folder

        def dies(link, name):
            if name == f"step_{killed_at:08d}":
                raise RuntimeError("power cut")
            point(link, name)

        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "point", dies)
            with pytest.raises(RuntimeError, match="power cut"):
                run()
        folder = run(resume=True)
        assert follow(folder / "best").resolve().name == f"step_{killed_at:08d}"
        assert follow(folder / "last").resolve().name == "step_00000008"

    def test_before_the_first_checkpoint_a_run_starts_over(self, make):
        make()
        trainer = make(resume=True)
        trainer.train()
        assert trainer.step == 8

    def test_a_finished_run_stays_as_it_is(self, make, tmp_path):
        make().train()
        before = {p: p.read_bytes() for p in sorted((tmp_path / "run" / "last").rglob("*.safetensors"))}
        make(resume=True).train()
        assert {p: p.read_bytes() for p in sorted((tmp_path / "run" / "last").rglob("*.safetensors"))} == before

    def test_save_dir_in_use(self, make, tmp_path):
        make()
        with pytest.raises(UserError, match="holds a run.*--resume true"):
            make()
        assert make(resume=True).step == 0

    @pytest.mark.parametrize(("name", "old", "new"), [("lr", 0.003, 0.5), ("d_model", 16, 32), ("max_steps", 8, 9)])
    def test_changed_setting(self, make, name, old, new):
        make()
        with pytest.raises(UserError, match=rf"--{name} is {new}, but the run in .* has {old}"):
            make(resume=True, **{name: new})

    def test_a_setting_that_is_younger_than_the_run_had_its_default(self, make, tmp_path, capsys):
        depths = {"sample_depth": True, "deep_steps": 3}
        path = make(**depths).folder / "config.yaml"
        lines = [line for line in path.read_text().splitlines(True) if not line.startswith("least_depth: 1")]
        path.write_text("".join(lines))
        with pytest.raises(UserError, match=r"--least_depth is 2, but the run in .* has 1"):
            make(resume=True, least_depth=2, **depths)
        capsys.readouterr()
        make(resume=True, **depths)
        assert "--least_depth" not in capsys.readouterr().err

    def test_free_settings_may_change(self, make, capsys):
        make()
        capsys.readouterr()
        make(resume=True, eval_every=3, log_every=2, grad_accum=2, keep_checkpoints=5)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
        assert said == [
            "--grad_accum is 2, and was 1 before",
            "--eval_every is 3, and was 200 before",
            "--log_every is 2, and was 1 before",
            "--keep_checkpoints is 5, and was 2 before",
        ]

    @pytest.mark.parametrize("content", ["", "lr: [", "- 1", "\xff"])
    def test_broken_config_yaml(self, make, tmp_path, content):
        make()
        (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="config.yaml"):
            make(resume=True)

    def test_last_that_leads_nowhere_is_no_fresh_start(self, make, tmp_path):
        """A long run must not start over silently because its newest checkpoint was moved away."""
        make(save_every=4).train()
        last = (tmp_path / "run" / "last").resolve()
        last.rename(tmp_path / "run" / "moved")
        try:
            step = make(save_every=4, resume=True).step
        except UserError:
            return
        assert step > 0

    @pytest.mark.parametrize("content", [None, b"", b"garbage"])
    def test_state_missing_or_broken(self, make, tmp_path, content, capsys):
        make().train()
        path = tmp_path / "run" / "last" / "state" / "training.pt"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match="none of the checkpoints .* can be read.*--init_from"):
            make(resume=True)
        assert "training.pt" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state/training.pt"])
    def test_broken_newest_checkpoint(self, make, tmp_path, name, capsys):
        """The previous checkpoint is used, with a message, and the run ends with the same result."""
        settings = {"dropout": 0.2, "save_every": 3}
        make(**settings).train()
        whole = {n: (tmp_path / "run" / "last" / n).read_bytes() for n in ("model.safetensors", "ema.safetensors")}
        newest = tmp_path / "run" / "step_00000008" / name
        newest.write_bytes(newest.read_bytes()[:-9])
        trainer = make(resume=True, **settings)
        assert trainer.step == 6
        assert f"{newest} is broken" in (err := capsys.readouterr().err) and "checkpoint before" in err
        trainer.train()
        assert whole == {n: (tmp_path / "run" / "last" / n).read_bytes() for n in whole}
        assert [r["step"] for r in read_metrics(trainer.folder) if "loss" in r] == list(range(1, 9))


class TestStopping:
    def test_signal_during_an_evaluation_ends_with_a_checkpoint(self, make, monkeypatch):
        """Ctrl-C ends a run with a checkpoint of its last step, even if it arrives between two steps."""
        trainer = make(eval_every=2, save_every=100)
        evaluate, calls = trainer.evaluate, []

        def interrupted(limit):
            calls.append(trainer.step)
            figures = evaluate(limit)
            if trainer.step == 4:
                signal.raise_signal(signal.SIGTERM)
                figures["valid_loss"] = 9.9  # no improvement, which would cause a checkpoint by itself
            return figures

        trainer.evaluate = interrupted
        trainer.train()
        assert trainer.step == 4 and calls == [2, 4]
        assert (trainer.folder / "last").resolve().name == "step_00000004"

    def test_time_that_ends_during_an_evaluation(self, make, monkeypatch):
        """The run still ends with an evaluation on all validation text and a checkpoint."""
        late, real = [0.0], time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])
        trainer = make(eval_every=2, eval_batches=1, save_every=100, max_minutes=10.0, max_steps=1000)
        evaluate, limits = trainer.evaluate, []

        def slow(limit):
            limits.append(limit)
            figures = evaluate(limit)
            if trainer.step == 4:
                late[0] += 601
                figures["valid_loss"] = 9.9
            return figures

        trainer.evaluate = slow
        trainer.train()
        assert (trainer.folder / "last").resolve().name == f"step_{trainer.step:08d}"
        assert limits[-1] == 1 and "final_valid_loss" in read_metrics(trainer.folder)[-1]

    def test_max_minutes_takes_the_rate_to_its_floor(self, make, monkeypatch):
        late, real = [0.0], time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])
        trainer = make(max_minutes=2.0, max_steps=1000, lr=1e-2, min_lr_ratio=0.1, warmup_steps=2)
        for step in range(1, 40):
            during(trainer, step, lambda: late.__setitem__(0, late[0] + 3.1))
        trainer.train()
        assert 38 <= trainer.step <= 40
        rates = [r["lr"] for r in read_metrics(trainer.folder) if "lr" in r]
        assert rates[0] == pytest.approx(0.5e-2, rel=0.02)  # the first of two warm-up steps
        assert all(a >= b for a, b in zip(rates[1:], rates[2:]))
        assert 1e-3 <= rates[-1] < 1.1e-3

    def test_the_rate_follows_the_steps(self, make):
        trainer = make(max_steps=10, lr=1e-2, min_lr_ratio=0.1, warmup_steps=4)
        trainer.train()
        rates = [r["lr"] for r in read_metrics(trainer.folder) if "lr" in r]
        cosines = [0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
        warm = [0.25, 0.5, 0.75] + [1] * 7
        assert rates == pytest.approx([1e-2 * w * (0.1 + 0.9 * c) for w, c in zip(warm, cosines)])
