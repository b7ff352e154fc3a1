"""The training loop: what a run leaves behind, exactness of resuming and of split batches, and what it refuses."""

import dataclasses
import json
import math
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train_trm_lm
from src.checkpoint import load_model, load_state
from src.config import UserError
from src.dataset import DataConfig
from src.losses import IGNORE
from src.metrics import read_metrics
from src.model import TRMConfig
from src.runtime import RuntimeConfig
from src.trainer import TrainConfig, create_trainer

CLASSES = (TrainConfig, DataConfig, TRMConfig, RuntimeConfig)
TINY = {
    **{"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "max_seq_len": 16, "tokenizer": "byte"},
    **{"batch_size": 8, "max_steps": 8, "warmup_steps": 2, "lr": 3e-3, "eval_batches": 2, "log_every": 1},
    **{"sample_tokens": 0, "compile": False, "device": "cpu", "precision": "fp32"},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Settings that name a small corpus of short documents, and a cache that all tests of this file share."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, numbers in (("train", range(120)), ("valid", range(120, 150))):
        lines = (json.dumps({"text": f"def f{n}(x):\n    return x{' + x' * (n % 7)}\n"}) + "\n" for n in numbers)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    paths = {f"{name}_paths": [str(folder / f"{name}.jsonl")] for name in ("train", "valid")}
    return {**paths, "cache_dir": str(folder / "cache")}


@pytest.fixture(autouse=True)
def no_plot(request, monkeypatch):
    """Drawing takes longer than a tiny run; only the test of the run folder draws."""
    if "draws" not in request.keywords:
        monkeypatch.setattr("src.trainer.plot_learning_curve", lambda *args: None)


@pytest.fixture
def make(corpus, tmp_path):
    """make(name, **settings): a Trainer of tiny settings whose run folder is tmp_path/name."""

    def make(name="run", **changes):
        values = {**TINY, **corpus, "save_dir": str(tmp_path / name), **changes}
        parts = [{f.name: values.pop(f.name) for f in dataclasses.fields(c) if f.name in values} for c in CLASSES]
        assert not values, f"no such settings: {values}"
        return create_trainer(*(cls(**part) for cls, part in zip(CLASSES, parts)))

    return make


def during(trainer, step, action):
    """Let `action` happen at the end of the given training step."""
    train_step = trainer.train_step

    def with_action(batch):
        train_step(batch)
        if trainer.step == step:
            action()

    trainer.train_step = with_action


def same(a, b):
    """Whether two nests of tensors, numbers and containers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_checkpoints(a, b):
    """Weights, averages, and all that resuming needs but the time it took."""
    for name in ("model.safetensors", "ema.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = load_state(a), load_state(b)
    for state in states:
        state.pop("elapsed")
    assert same(*states)


@pytest.mark.parametrize("family", ["none", "loop", "trm"])
def test_every_family_learns(make, family, tmp_path):
    figures = make(recursion=family, max_steps=60, lr=1e-2, ema_decay=0.9).train()
    assert figures["valid_loss"] < 2.8 < math.log(256)  # half of what knowing nothing costs
    losses = [r["ce_loss"] for r in read_metrics(tmp_path / "run") if "ce_loss" in r]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    assert figures["valid_bits_per_byte"] > figures["valid_loss"] / math.log(2)  # EOS costs, and is no byte of text


class TestRunFolder:
    @pytest.mark.draws
    def test_holds_what_the_readme_says(self, make, tmp_path, capsys):
        trainer = make(max_steps=6, eval_every=2, save_every=3, sample_tokens=5, sample_prompt="def ")
        folder = tmp_path / "run"
        assert (folder / "config.yaml").exists()  # before step 0
        figures = trainer.train()
        assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert list(folder.glob("events.out.tfevents*"))
        samples = (folder / "samples.txt").read_text()
        assert [line.split()[2].rstrip(",") for line in samples.splitlines() if line.startswith("===")] == list("246")
        assert samples.count("\ndef ") == 3
        records = read_metrics(folder)
        assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in records if "valid_loss" in r] == [2, 4, 6]
        assert records[-1].items() >= figures.items()
        assert [r["tokens"] for r in records if "loss" in r] == [n * 8 * 16 for n in range(1, 7)]
        for link in ("last", "best"):
            model, tokenizer = load_model(folder / link)
            assert tokenizer.vocab_size == model.config.vocab_size
        assert (folder / "last").resolve().name == "step_00000006"
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err

    def test_config_yaml_is_a_config_file(self, make, tmp_path):
        trainer = make(init_from=None, supervision_weights="0.3,1.0", max_minutes=5.0)
        saved = str(tmp_path / "run" / "config.yaml")
        config, data, model, runtime = train_trm_lm.parse_args(["--config", saved])
        assert config == trainer.config and runtime == RuntimeConfig("cpu", "fp32")
        assert data.train_paths and data.tokenizer == "byte"
        ran = dataclasses.replace(trainer.raw.config, vocab_size=model.vocab_size, pad_token_id=model.pad_token_id)
        assert model == ran

    def test_best_is_the_best_and_last_the_last(self, make, tmp_path, monkeypatch):
        losses = iter([3.0, 2.0, 2.5, 2.7])
        figures = {"valid_bits_per_byte": 1.0, "valid_accuracy": 0.0}
        monkeypatch.setattr("src.trainer.evaluate", lambda *a, **k: {"valid_loss": next(losses), **figures})
        make(max_steps=8, eval_every=2, save_every=1, keep_checkpoints=1).train()
        folder = tmp_path / "run"
        assert (folder / "best").resolve().name == "step_00000004"
        assert (folder / "last").resolve().name == "step_00000008"
        assert sorted(p.name for p in folder.glob("*step_*")) == ["step_00000004", "step_00000008"]

    def test_config_json_is_strict_json(self, make, tmp_path):
        """A run that ends before its first evaluation has no best loss yet, and JSON has no infinity."""
        trainer = make()
        during(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM))
        trainer.train()

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        json.loads((tmp_path / "run" / "last" / "config.json").read_text(), parse_constant=refuse)


# AdamW divides by the gradient's own size, which turns rounding errors of tiny gradients into whole steps. With the
# gradient clipped under AdamW's epsilon (1e-8) an update is linear in the gradient, so that rounding stays rounding.
LINEAR = {"grad_clip": 1e-9, "lr": 1.0, "min_lr_ratio": 1.0, "warmup_steps": 1, "weight_decay": 0.0}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.raw.parameters()])


class TestSplitBatches:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"packing": False},  # rows of different length: parts with different numbers of targets
            {"supervision_weights": "linear", "supervision_steps": 3},
            {"supervision_weights": "last"},
            {"full_bptt": True},
            {"optimizer_step": "supervision"},
            {"recursion": "none"},
        ],
        ids=str,
    )
    def test_parts_equal_the_whole(self, make, changes):
        trained, norms = [], []
        for parts in (1, 4):
            trainer = make(str(parts), grad_accum=parts, max_steps=4, **LINEAR, **changes)
            start = weights(trainer).clone()
            trainer.train()
            trained.append(weights(trainer) - start)
            norms.append([r["grad_norm"] for r in read_metrics(trainer.folder) if "grad_norm" in r])
        moved = trained[0].norm()
        assert moved > 1e-3  # the comparison is of something
        assert (trained[1] - trained[0]).norm() < 1e-4 * moved  # fp32 sums in another order
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)

    def test_targets_count_not_rows(self, make):
        """One part holds 1 target, another 16 x 2, the last none: the loss is that of all 33 tokens at once."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 250, (8, 17), generator=generator)
        targets = ids[:, 1:].clone()
        targets[1], targets[0, 1:], targets[2:4], targets[6:] = IGNORE, IGNORE, IGNORE, IGNORE
        batch = {"input_ids": ids[:, :-1], "target_ids": targets}
        ends = []
        for parts in (1, 4):
            trainer = make(str(parts), grad_accum=parts, **LINEAR)
            trainer.started = time.monotonic()
            start = weights(trainer).clone()
            trainer.train_step(batch)
            ends.append(weights(trainer) - start)
        assert ends[0].isfinite().all() and ends[0].norm() > 1e-4
        assert (ends[1] - ends[0]).norm() < 1e-4 * ends[0].norm()  # fp32 sums in another order

    def test_supervision_step_makes_an_update_each(self, make):
        trainer = make(optimizer_step="supervision", supervision_steps=3)
        trainer.train()
        assert trainer.ema.updates == 3 * 8
        assert make("other").config.optimizer_step == "batch"


class TestRepeating:
    def test_same_seed_same_weights(self, make):
        a, b = make("a", dropout=0.2), make("b", dropout=0.2)
        a.train(), b.train()
        assert_same_checkpoints(a.folder / "last", b.folder / "last")
        assert a.folder.joinpath("samples.txt").read_bytes() == b.folder.joinpath("samples.txt").read_bytes()
        other = make("c", dropout=0.2, seed=1)
        other.train()
        assert not torch.equal(weights(other), weights(a))

    def test_evaluation_and_sampling_draw_nothing(self, make):
        """How often a run looks at itself does not change what it learns."""
        a = make("a", dropout=0.2, eval_every=1, save_every=1, sample_tokens=4, keep_checkpoints=9)
        b = make("b", dropout=0.2, eval_every=100, log_every=5)
        a.train(), b.train()
        assert torch.equal(weights(a), weights(b))

    def test_global_random_state_does_not_matter(self, make):
        a = make("a", dropout=0.2)
        a.train()
        torch.manual_seed(99)
        b = make("b", dropout=0.2)
        torch.manual_seed(77)
        b.train()
        assert torch.equal(weights(a), weights(b))


class TestResume:
    @pytest.mark.parametrize(
        "changes",
        [
            {"dropout": 0.2},
            {"recursion": "loop", "dropout": 0.2, "tie_embeddings": True},
            {"optimizer": "muon", "optimizer_step": "supervision"},
            {"packing": False, "grad_accum": 2, "num_workers": 1},
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
        """Steps after the last checkpoint are lost, and made again exactly."""
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

    def test_free_settings_may_change(self, make):
        make()
        make(resume=True, eval_every=3, log_every=2, grad_accum=2, keep_checkpoints=5)

    @pytest.mark.parametrize("content", ["", "lr: [", "- 1", "\xff"])
    def test_broken_config_yaml(self, make, tmp_path, content):
        make()
        (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="config.yaml"):
            make(resume=True)

    def test_last_that_leads_nowhere_is_no_fresh_start(self, make, tmp_path):
        """A run of hours must not start over because its newest checkpoint was moved away."""
        make(save_every=4).train()
        last = (tmp_path / "run" / "last").resolve()
        last.rename(tmp_path / "run" / "moved")
        try:
            step = make(save_every=4, resume=True).step
        except UserError:
            return
        assert step > 0

    @pytest.mark.parametrize("content", [None, b"", b"garbage"])
    def test_state_missing_or_broken(self, make, tmp_path, content):
        make().train()
        path = tmp_path / "run" / "last" / "state" / "training.pt"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match="training.pt.*--init_from"):
            make(resume=True)


class TestStopping:
    def test_signal_during_an_evaluation_ends_with_a_checkpoint(self, make, monkeypatch):
        """Ctrl-C ends a run with a checkpoint of its last step, also when it comes between two steps."""
        trainer = make(eval_every=2, save_every=100)
        evaluate, calls = trainer.evaluate, []

        def interrupted(**options):
            calls.append(trainer.step)
            figures = evaluate(**options)
            if trainer.step == 4:
                signal.raise_signal(signal.SIGTERM)
                figures["valid_loss"] = 9.9  # no improvement, so that nothing else asks for a checkpoint
            return figures

        trainer.evaluate = interrupted
        trainer.train()
        assert trainer.step == 4 and calls == [2, 4]
        assert (trainer.folder / "last").resolve().name == "step_00000004"

    def test_time_that_ends_during_an_evaluation(self, make, monkeypatch):
        """The end of a run judges it on the whole validation text and saves it, whatever used up its time."""
        late, real = [0.0], time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])
        trainer = make(eval_every=2, save_every=100, max_minutes=10.0, max_steps=1000)
        evaluate, wholes = trainer.evaluate, []

        def slow(whole=False):
            wholes.append(whole)
            figures = evaluate(whole=whole)
            if trainer.step == 4:
                late[0] += 601
                figures["valid_loss"] = 9.9
            return figures

        trainer.evaluate = slow
        trainer.train()
        assert (trainer.folder / "last").resolve().name == f"step_{trainer.step:08d}"
        assert wholes[-1] is True

    def test_max_minutes_takes_the_rate_to_its_floor(self, make, monkeypatch):
        late, real = [0.0], time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])
        trainer = make(max_minutes=2.0, max_steps=1000, lr=1e-2, min_lr_ratio=0.1, warmup_steps=2)
        for step in range(1, 40):
            during(trainer, step, lambda: late.__setitem__(0, late[0] + 3))
        trainer.train()
        assert 39 <= trainer.step <= 40
        rates = [r["lr"] for r in read_metrics(trainer.folder) if "lr" in r]
        assert rates[0] == pytest.approx(0.5e-2, rel=0.02)  # half way through the warm-up
        assert all(a >= b for a, b in zip(rates[1:], rates[2:]))
        assert 1e-3 <= rates[-1] < 1.1e-3

    def test_the_rate_follows_the_steps(self, make):
        trainer = make(max_steps=10, lr=1e-2, min_lr_ratio=0.1, warmup_steps=4)
        trainer.train()
        rates = [r["lr"] for r in read_metrics(trainer.folder) if "lr" in r]
        cosines = [0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
        warm = [0.25, 0.5, 0.75] + [1] * 7
        assert rates == pytest.approx([1e-2 * w * (0.1 + 0.9 * c) for w, c in zip(warm, cosines)])


class TestInitFrom:
    def test_starts_from_the_averaged_weights(self, make, tmp_path):
        make("first", ema_decay=0.5).train()
        source = tmp_path / "first"
        wanted = load_file(source / "best" / "ema.safetensors")
        trainer = make("second", init_from=str(source), lr=1e-4)
        assert trainer.step == 0 and same({k: v for k, v in trainer.raw.state_dict().items()}, wanted)
        trainer.train()
        again = make("second", init_from=str(source), lr=1e-4, resume=True)
        assert again.step == 8

    def test_config_yaml_tells_the_model_that_runs(self, make, tmp_path):
        make("first").train()
        default = {"d_model": 256, "n_heads": 4, "d_ff": None}
        trainer = make("second", init_from=str(tmp_path / "first"), **default)
        written = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
        assert trainer.raw.config.d_model == 16 and written["d_model"] == 16


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"max_steps": 0}, "max_steps is 0"),
            ({"batch_size": 6, "grad_accum": 4}, "batch_size 6"),
            ({"lr": 0.0}, "lr must be over 0"),
            ({"ema_decay": 1.0}, "ema_decay"),
            ({"max_minutes": 0.0}, "max_minutes"),
            ({"weight_decay": -0.1}, "weight_decay"),
            ({"grad_clip": -1.0}, "grad_clip"),
            ({"eval_batches": -1}, "eval_batches"),
            ({"sample_tokens": -1}, "sample_tokens"),
            ({"warmup_steps": -1}, "warmup_steps"),
            ({"seed": 1 << 70}, "seed"),
        ],
        ids=str,
    )
    def test_impossible_ones_die_early(self, change, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**change)

    def test_unwritable_save_dir(self, make, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write to save_dir"):
            make("file/run")
        with pytest.raises(UserError, match="cannot write to save_dir"):
            make("file")
        assert (tmp_path / "file").read_text() == ""

    def test_no_ema(self, make, tmp_path):
        trainer = make(ema_decay=0.0)
        trainer.train()
        assert not (trainer.folder / "last" / "ema.safetensors").exists()
        assert make(ema_decay=0.0, resume=True).step == 8

    def test_sample_of_eos_or_nothing(self, make):
        trainer = make(sample_tokens=0, sample_prompt="")
        assert trainer.sample() == ""
        trainer = make("b", sample_tokens=3, sample_prompt="x" * 99)  # longer than the context
        assert trainer.sample().startswith("x" * 99)
