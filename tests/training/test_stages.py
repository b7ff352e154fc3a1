"""A curriculum in the trainer: stages start at their step, train, and continue after a stop."""

import signal
from collections import Counter

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainers import assert_same_checkpoints, during, read_metrics

import train_trm_lm
from src.checkpoint import least_depth, load_config, load_model, resolve
from src.errors import UserError
from src.evaluation.evaluation import evaluate_rows
from src.metrics import flops_per_token
from src.model_config import TRMConfig
from src.training.depths import depth_of_step
from src.training.train_config import CurriculumConfig, CurriculumStage, TrainConfig

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")  # whole runs; the tests of the parts check annotations
STAGES = [
    {"steps": 3, "seq_len": 8, "batch_size": 16, "latent_steps": 1, "supervision_steps": 1},
    {"steps": 4, "latent_steps": 2, "dim": 32},
    {"steps": 3, "seq_len": 16, "batch_size": 8, "supervision_steps": 2, "dim": 48, "lr_factor": 0.5},
]


def curriculum(*stages):
    return CurriculumConfig([CurriculumStage(**stage) for stage in stages])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stages_are_entered_and_logged(make, optimizer, capsys):
    trainer = make(curriculum=curriculum(*STAGES), optimizer=optimizer, schedule="constant")
    trainer.train()
    assert trainer.step == 10 and trainer.raw.config.d_model == 48 and trainer.raw.config.n_heads == 6
    lines = [r for r in read_metrics(trainer.folder) if "loss" in r]
    assert [r["tokens"] for r in lines] == [128 * n for n in range(1, 11)]
    assert [r["recursion_depth"] for r in lines] == [4, 4, 4, 6, 6, 6, 6, 12, 12, 12]
    assert [r["lr"] for r in lines][-4:] == pytest.approx([3e-3, 1.5e-3, 1.5e-3, 1.5e-3])
    assert "stage 2: steps 3 to 7" in capsys.readouterr().err
    assert load_file(trainer.folder / "last" / "model.safetensors")["embed.weight"].shape[1] == 48


@pytest.mark.parametrize("stop", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 9)), 3, 7])
def test_a_run_goes_on_in_its_stage(make, stop):
    """This includes a stop at exactly the step where a stage ends."""
    settings = {"curriculum": curriculum(*STAGES), "dropout": 0.1}
    straight = make("straight", **settings)
    straight.train()
    first = make("broken", **settings)
    during(first, stop, lambda: signal.raise_signal(signal.SIGINT))
    first.train()
    second = make("broken", resume=True, **settings)
    assert second.step == stop
    second.train()
    assert_same_checkpoints(straight.folder / "last", second.folder / "last")
    logs = [[(r["step"], r["loss"]) for r in read_metrics(t.folder) if "loss" in r] for t in (straight, second)]
    assert logs[0] == logs[1] and len(logs[0]) == 10


def test_an_evaluation_that_a_signal_prevented_is_of_its_own_stage(make):
    """The run stops where a stage ends and an evaluation is due; the resumed run makes it up, with the model so far."""
    settings = {"curriculum": curriculum(*STAGES), "eval_every": 3}
    straight = make("straight", **settings)
    straight.train()
    first = make("broken", **settings)
    during(first, 3, lambda: signal.raise_signal(signal.SIGINT))
    first.train()
    assert not any("valid_loss" in r for r in read_metrics(first.folder))
    second = make("broken", resume=True, **settings)
    assert second.eval_due and second.raw.config.d_model == 16
    second.train()
    logs = [
        [(r["step"], r["valid_loss"]) for r in read_metrics(t.folder) if "valid_loss" in r] for t in (straight, second)
    ]
    assert logs[0] == logs[1] and [step for step, _ in logs[0]] == [3, 6, 9, 10]
    assert_same_checkpoints(straight.folder / "best", second.folder / "best")


def test_growing_keeps_the_validation_loss(make):
    trainer = make(curriculum=curriculum({"steps": 20}, {"steps": 1, "dim": 32}), lr=1e-2)
    trainer.loss_before = None
    during(trainer, 20, lambda: setattr(trainer, "loss_before", trainer.measure(None)["valid_loss"]))
    enter = trainer.enter_stage

    def measured():
        enter()
        if trainer.step == 20:
            assert trainer.raw.config.d_model == 32
            assert trainer.measure(None)["valid_loss"] == pytest.approx(trainer.loss_before, abs=1e-5)

    trainer.enter_stage = measured
    trainer.train()
    assert trainer.loss_before < 5


def test_the_flops_of_a_run_are_those_of_its_stages(make):
    stages = make(curriculum=curriculum({"steps": 10, "deep_steps": 1}, {"steps": 30, "deep_steps": 4})).curriculum
    one, four = (flops_per_token(stage.model).train for stage in stages.stages)
    assert stages.flops() == 128 * (10 * one + 30 * four) and four > 1.5 * one
    assert stages.flops(one_at_a_time=True) == stages.flops() / 2  # the models have two supervision steps


def test_epochs_become_steps(make):
    trainer = make(curriculum=curriculum({"epochs": 0.25, "seq_len": 8}, {"epochs": 0.5, "seq_len": 16}))
    windows = len(trainer.train_set)
    assert trainer.curriculum.starts == [0, pytest.approx(0.5 * windows / 8, abs=1)]
    assert trainer.curriculum.total_steps == pytest.approx(windows / 8, abs=2)


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ([{"steps": 2, "batch_size": 6}], {"grad_accum": 4}, "batch_size 6 does not divide into grad_accum 4"),
        ([{"epochs": 1}], {"streaming": True}, "needs a tokenized corpus: use `steps`"),
        ([{"steps": 2, "seq_len": 99}], {}, "seq_len 99 is over max_seq_len 16"),
        ([{"steps": 2, "dim": 8}], {}, "a width can only grow"),
        ([{"steps": 2, "latent_steps": 1}], {"recursion": "loop"}, "stages.0.: recursion loop has no latent_steps"),
        ([{"steps": 2, "deep_steps": 3}], {"recursion": "none"}, "stages.0.: recursion none has no deep_steps"),
        (
            [{"steps": 2, "deep_steps": 1}, {"steps": 2, "deep_steps": 4}],
            {"recursion": "loop", "sample_depth": True, "least_depth": 2},
            "stages.0.: least_depth is 2: set it to 1 or less",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(make, stages, changes, message):
    with pytest.raises(UserError, match=message):
        make(curriculum=curriculum(*stages), **changes)


def test_changed_stages_are_refused_on_resume(make):
    make(curriculum=curriculum(*STAGES))
    with pytest.raises(UserError, match="--curriculum is .* but the run in .* has"):
        make(curriculum=curriculum(*STAGES[:2]), resume=True)


def test_the_section_of_the_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"curriculum": {"stages": STAGES}, "monitoring": {"slow_batch_threshold": 9}}))
    settings = train_trm_lm.parse_args(["--config", str(path)])
    assert settings.train.curriculum == curriculum(*STAGES)
    assert settings.train.monitoring.slow_batch_threshold == 9


def test_a_width_that_several_processes_cannot_reach_is_refused_at_the_start(make, monkeypatch):
    trainer = make(curriculum=curriculum(*STAGES))
    trainer.world = 2
    with pytest.raises(UserError, match="a stage's dim can grow in a single process only"):
        trainer._plan(trainer.curriculum.stages[0].model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rate_of_a_stage_reaches_every_weight(make, optimizer):
    """The logged rate says nothing about the optimizers: all of their groups must follow schedule and stage."""
    trainer = make(curriculum=curriculum(*STAGES), optimizer=optimizer, schedule="linear", lr=1e-3)
    logged, train_step = [], trainer.train_step

    def look(batch):
        train_step(batch)
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        assert [g["lr"] / g["peak_lr"] for g in groups] == pytest.approx([trainer.lr / 1e-3] * len(groups))
        logged.append(trainer.lr / 1e-3)

    trainer.train_step = look
    trainer.train()
    assert logged[0] == 0.5 and logged[4] == 1.0 and 0 < logged[9] < 0.5  # warm-up, peak, cooldown times lr_factor


class TestDepthByStep:
    def test_sampled(self, make):
        trainer = make(sample_depth=True, deep_steps=3, grad_deep_steps=2, max_steps=30)
        trainer.train()
        depths = {r["recursion_depth"] / 6 for r in read_metrics(trainer.folder) if "loss" in r}
        assert depths == {1, 2, 3}  # cycles; each is three visits in each of two supervision steps
        assert trainer.raw.config.deep_steps == 3 and trainer.raw.config.grad_deep_steps == 2

    def test_sampled_from_a_least_depth(self, make):
        trainer = make(sample_depth=True, least_depth=2, deep_steps=3, max_steps=30)
        trainer.train()
        assert {r["recursion_depth"] / 6 for r in read_metrics(trainer.folder) if "loss" in r} == {2, 3}

    @pytest.mark.parametrize(
        ("settings", "most"), [({"deep_steps": 2}, 2), ({"full_bptt": True, "supervision_steps": 1}, 1)]
    )
    def test_a_least_depth_over_the_model_s_is_refused(self, make, settings, most):
        with pytest.raises(UserError, match=f"least_depth is 3: set it to {most} or less, the most steps"):
            make(sample_depth=True, least_depth=3, **settings)

    def test_a_least_depth_that_nothing_reads_is_refused(self):
        with pytest.raises(ValueError, match="set it to 1, or to more with sample_depth"):
            TrainConfig(least_depth=2)

    @pytest.mark.parametrize(
        ("settings", "name"),
        [({"deep_steps": 1}, "deep_steps"), ({"full_bptt": True, "supervision_steps": 1}, "supervision_steps")],
    )
    def test_nothing_to_draw_from_is_refused(self, make, settings, name):
        with pytest.raises(UserError, match=f"sample_depth has nothing to draw from: set {name} to 2 or more"):
            make(sample_depth=True, **settings)

    def test_a_plain_model_has_no_depth_to_draw(self, make):
        assert make(recursion="none", sample_depth=True, least_depth=3).raw.config.recursion == "none"

    def test_sampled_supervision_steps(self, make):
        """With one graph through all steps, the steps are the recursion: their number is drawn, and not deep_steps."""
        settings = {"full_bptt": True, "supervision_weights": "last", "supervision_steps": 3, "deep_steps": 2}
        trainer = make(sample_depth=True, max_steps=30, **settings)
        trainer.train()
        depths = {r["recursion_depth"] / 6 for r in read_metrics(trainer.folder) if "loss" in r}
        assert depths == {1, 2, 3}  # supervision steps; each is two cycles of three visits
        assert trainer.raw.config.supervision_steps == 3

    def test_drawn_independently(self):
        config, whole = TrainConfig(sample_depth=True), TRMConfig(vocab_size=9, recursion="loop", deep_steps=4)
        drawn = [depth_of_step(config, whole, step, True).deep_steps for step in range(1600)]
        assert drawn == [depth_of_step(config, whole, step, True).deep_steps for step in range(1600)]
        pairs = Counter(zip(drawn, drawn[1:]))  # of one step and the next: 100 of each are expected
        assert len(pairs) == 16 and min(pairs.values()) > 60 and max(pairs.values()) < 140

    @pytest.mark.parametrize("settings", [{"sample_depth": True}, {"recursion_from": 0.5}], ids=str)
    def test_weights_that_some_depth_cannot_have_are_refused(self, make, settings):
        """With one visit, the only loss would have weight 0."""
        options = {"recursion": "loop", "deep_steps": 3, "supervision_weights": "0,0,1,0"}
        make("fixed", **options)
        with pytest.raises(UserError, match="sample_depth and recursion_from train at smaller depths too: .*weights"):
            make("drawn", **options, **settings)

    def test_switched_on_late(self, make):
        trainer = make(recursion_from=0.5, deep_steps=2, max_steps=8)
        trainer.train()
        depths = [r["recursion_depth"] for r in read_metrics(trainer.folder) if "loss" in r]
        assert depths == [3] * 4 + [12] * 4

    def test_before_it_starts_the_model_is_judged_and_saved_at_the_depth_that_it_has(self, make):
        options = {"eval_every": 2, "save_every": 2, "keep_checkpoints": 9, "max_steps": 8, "ema_decay": 0.0}
        trainer = make("late", recursion_from=0.5, deep_steps=2, **options)
        trainer.train()
        configs = [load_config(trainer.folder / f"step_{step:08d}") for step in (2, 4, 6, 8)]
        assert [(c.deep_steps, c.supervision_steps) for c in configs] == [(1, 1), (1, 1), (2, 2), (2, 2)]
        for step in (4, 6):  # an evaluation is that of the checkpoint of its step, at the depth in its config.json
            saved, told = load_model(trainer.folder / f"step_{step:08d}")[0], read_metrics(trainer.folder)
            found = evaluate_rows(saved, trainer.valid_set, len(trainer.valid_set), 8, trainer.tokenizer.pad_id)
            logged = next(r["valid_loss"] for r in told if r["step"] == step and "valid_loss" in r)
            assert found["valid_loss"] == pytest.approx(logged, rel=1e-5)

    def test_when_it_starts_the_best_checkpoint_is_chosen_anew(self, make, monkeypatch, capsys):
        """A plain model may be the better one, but whoever opens the run later expects the recursion."""
        trainer = make(recursion_from=0.5, deep_steps=2, max_steps=8, eval_every=2, save_every=2)
        monkeypatch.setattr(trainer, "score", lambda figures: trainer.step)  # the earlier, the better
        trainer.train()
        assert (trainer.folder / "best").resolve().name == "step_00000006"
        assert load_config(trainer.folder / "best").deep_steps == 2
        assert "step 4: the full recursion begins; the best checkpoint is chosen anew" in capsys.readouterr().err

    def test_a_run_that_ends_before_its_recursion_is_judged_has_no_older_best(self, make):
        trainer = make(recursion_from=0.5, deep_steps=2, max_steps=8, eval_every=4, save_every=2, keep_checkpoints=9)
        during(trainer, 5, lambda: signal.raise_signal(signal.SIGINT))
        trainer.train()
        assert not (trainer.folder / "best").exists() and load_config(trainer.folder / "last").deep_steps == 2
        assert resolve(trainer.folder).resolve().name == "step_00000005"

    def test_of_plain_models_nothing_is_chosen_anew(self, make, monkeypatch):
        trainer = make(recursion="none", recursion_from=0.5, max_steps=8, eval_every=2, save_every=2)
        monkeypatch.setattr(trainer, "score", lambda figures: trainer.step)
        trainer.train()
        assert (trainer.folder / "best").resolve().name == "step_00000002"

    @pytest.mark.parametrize(
        ("settings", "least"),
        [
            ({"recursion": "none"}, 1),
            ({"recursion": "loop", "deep_steps": 4}, 4),
            ({"recursion": "loop", "deep_steps": 4, "supervision_weights": "equal", "grad_deep_steps": 3}, 2),
            ({"recursion": "loop", "deep_steps": 4, "sample_depth": True, "least_depth": 2}, 2),
            ({"supervision_steps": 3}, 1),
            ({"supervision_steps": 3, "supervision_weights": "last"}, 3),
        ],
        ids=str,
    )
    def test_a_checkpoint_says_after_which_step_it_was_trained_to_answer(self, make, settings, least):
        trainer = make(max_steps=1, **settings)
        trainer.train()
        assert least_depth(trainer.folder) == least

    def test_once_it_has_begun_a_longer_run_does_not_end_it(self, make):
        settings = {"recursion_from": 0.5, "deep_steps": 2, "max_steps": 1000}
        first = make("late", max_minutes=1, **settings)
        during(first, 2, lambda: setattr(first, "started", first.started - 40))  # seconds: over half of the run
        during(first, 4, lambda: signal.raise_signal(signal.SIGINT))
        first.train()
        longer = make("late", max_minutes=100, resume=True, **settings)
        during(longer, 6, lambda: signal.raise_signal(signal.SIGINT))
        longer.train()
        assert [r["recursion_depth"] for r in read_metrics(longer.folder) if "loss" in r] == [3, 3, 12, 12, 12, 12]

    def test_a_sampled_depth_is_one_of_the_step(self, make):
        """The depth depends on the step alone, and a shallow step updates the weights like a shallow model."""
        a, b = make("a", sample_depth=True, deep_steps=2, max_steps=6), make("b", deep_steps=1, max_steps=6)
        a.enter_stage()
        batch = next(a.loader)
        while True:
            if depth_of_step(a.config, a.raw.config, a.step, True).deep_steps == 1:
                break
            a.step += 1
        b.step = a.step
        a.train_step(batch)
        b.train_step(batch)
        for ours, theirs in zip(a.raw.parameters(), b.raw.parameters()):
            assert torch.equal(ours, theirs)
