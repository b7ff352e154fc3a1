"""The training loop: the files of a run, split batches, repeatable runs, init_from, and settings that are refused."""

import dataclasses
import json
import math
import shutil
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from texts import usual_spm
from trainers import TINY, assert_same_checkpoints, during, read_metrics, same

import train_trm_lm
from src.checkpoint import load_model
from src.errors import UserError
from src.evaluation.evaluation import evaluate_rows, sample_text
from src.losses import IGNORE, cross_entropy
from src.model import TRMConfig
from src.training.create import create_trainer
from src.training.train_config import RuntimeConfig, TrainConfig, read_settings

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")  # whole runs; the tests of the parts check annotations


@pytest.mark.parametrize("family", ["none", "loop", "trm"])
def test_every_family_learns(make, family, tmp_path):
    figures = make(recursion=family, max_steps=60, lr=1e-2, ema_decay=0.9).train()
    assert figures["valid_loss"] < 2.8 < math.log(256)  # half the loss of a uniform guess
    losses = [r["ce_loss"] for r in read_metrics(tmp_path / "run") if "ce_loss" in r]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    assert figures["valid_bits_per_byte"] > figures["valid_loss"] / math.log(2)  # EOS has no bytes


def test_a_model_beyond_this_machines_memory(make):
    """The size is checked first: the system might grant the memory and kill the process when it is used."""
    with pytest.raises(UserError, match=r"the model needs [\d,]+ GiB, this machine has \d+: make it smaller"):
        make(d_model=2**20, d_ff=2**24)


def test_bits_per_byte_only_where_the_tokenizer_gives_the_text_back(make, tmp_path, capsys):
    usual_spm(tmp_path)
    lossy = {"tokenizer": "sentencepiece", "sp_model": str(tmp_path / "usual.model")}
    figures = make(max_steps=2, eval_batches=0, **lossy).train()
    said = capsys.readouterr().err
    assert "the tokenizer loses" in said and "nats/token" in said and "bits/byte" not in said
    assert math.isnan(figures["valid_bits_per_byte"]) and figures["valid_loss"] > 0
    records = read_metrics(tmp_path / "run")
    told = [r[name] for r in records for name in ("bits_per_byte", "valid_bits_per_byte") if name in r]
    assert len(told) >= 3 and all(value is None or math.isnan(value) for value in told)


def test_a_mean_over_rows_gives_no_bits_per_byte(make, tmp_path):
    make(max_steps=2, loss_mean="row").train()
    records = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert records and all("bits_per_byte" not in record for record in records)


def test_gradients_do_not_depend_on_the_environment(make, tmp_path, monkeypatch):
    norms = []
    for parts in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", parts)
        make(f"parts{parts}", max_steps=2).train()
        norms.append([r["grad_norm"] for r in read_metrics(tmp_path / f"parts{parts}") if "grad_norm" in r])
    assert norms[0] == norms[1] and norms[0]


def test_the_last_evaluation_is_told(make, capsys):
    make(max_steps=1, eval_batches=1).train()
    assert "the last evaluation, on all validation data: " in capsys.readouterr().err


def test_an_evaluation_takes_parts_of_all_the_text_and_as_few_rows_at_once_as_training(make, monkeypatch):
    trainer, seen = make(eval_batches=1, batch_size=8, grad_accum=4), []
    monkeypatch.setattr("src.evaluation.evaluation.evaluate", lambda model, batches, *rest: seen.extend(batches))
    trainer.measure(1)
    assert [len(batch["input_ids"]) for batch in seen] == [2] * 4
    starts = [row.tolist() for batch in seen for row in batch["input_ids"]]
    n = len(trainer.valid_set)
    assert n > 16 and starts == [trainer.valid_set[row * n // 8].input_ids.tolist() for row in range(8)]


def test_a_run_that_a_signal_ends_has_no_last_figures(make):
    trainer = make(max_steps=8, eval_every=2)
    during(trainer, 5, lambda: signal.raise_signal(signal.SIGINT))
    assert trainer.train() == {}
    assert make(max_steps=8, eval_every=2, resume=True).train()["valid_loss"] > 0


class TestRunFolder:
    def test_holds_what_the_readme_says(self, make, tmp_path, capsys):
        trainer = make(draws=True, max_steps=6, eval_every=2, save_every=3, sample_tokens=5, sample_prompt="def ")
        folder = tmp_path / "run"
        assert (folder / "config.yaml").exists()  # before step 0
        figures = trainer.train()
        assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert list(folder.glob("events.out.tfevents*"))
        samples = (folder / "samples.txt").read_text()
        assert [line.split()[2].rstrip(":") for line in samples.splitlines() if line.startswith("===")] == list("246")
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
        monkeypatch.setattr("src.trainer.evaluate_rows", lambda *a, **k: {"valid_loss": next(losses), **figures})
        make(max_steps=8, eval_every=2, save_every=1, keep_checkpoints=1).train()
        folder = tmp_path / "run"
        assert (folder / "best").resolve().name == "step_00000004"
        assert (folder / "last").resolve().name == "step_00000008"
        assert sorted(p.name for p in folder.glob("*step_*")) == ["step_00000004", "step_00000008"]

    @pytest.mark.parametrize(
        ("losses", "best"), [((3.0, math.nan, 5.0, 4.0), 2), ((3.0, math.nan, 2.0, 4.0), 6)], ids=str
    )
    def test_an_evaluation_that_failed_is_not_the_best(self, make, tmp_path, monkeypatch, losses, best):
        found = iter(losses)
        figures = {"valid_bits_per_byte": 1.0, "valid_accuracy": 0.0}
        monkeypatch.setattr("src.trainer.evaluate_rows", lambda *a, **k: {"valid_loss": next(found), **figures})
        make(max_steps=8, eval_every=2, save_every=2).train()
        assert (tmp_path / "run" / "best").resolve().name == f"step_{best:08}"

    def test_best_is_judged_on_the_same_text(self, make, tmp_path, monkeypatch):
        """The last evaluation uses all validation text, so its loss must not be compared with those on a part of it."""
        trainer = make(max_steps=8, eval_every=2, eval_batches=1, save_every=2)

        def falling_loss_but_the_rest_is_harder(model, dataset, rows, *rest, **more):
            loss = 3.0 - 0.1 * trainer.step + (1.0 if rows == len(dataset) else 0.0)
            return {"valid_loss": loss, "valid_bits_per_byte": loss, "valid_accuracy": 0.0}

        monkeypatch.setattr("src.trainer.evaluate_rows", falling_loss_but_the_rest_is_harder)
        trainer.train()
        assert (tmp_path / "run" / "best").resolve().name == "step_00000008"

    def test_config_json_is_strict_json(self, make, tmp_path):
        """A run that ends before its first evaluation has a best loss of infinity, which JSON cannot express."""
        trainer = make()
        during(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM))
        trainer.train()

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        json.loads((tmp_path / "run" / "last" / "config.json").read_text(), parse_constant=refuse)


# AdamW divides by the gradient's size, which can turn a rounding error in a tiny gradient into a full step. If the
# gradient is clipped to less than AdamW's epsilon (1e-8), updates are linear in it, so rounding errors stay small.
LINEAR = {"grad_clip": 1e-9, "lr": 1.0, "min_lr_ratio": 1.0, "warmup_steps": 1, "weight_decay": 0.0}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.raw.parameters()])


class TestSplitBatches:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"packing": False, "max_seq_len": 64},  # rows of different length: parts with different numbers of targets
            {"packing": False, "max_seq_len": 64, "loss_mean": "row"},
            {"packing": False, "max_seq_len": 64, "loss_mean": "row", "act_target": "stable"},
            {"token_loss": "stablemax", "recursion": "loop", "halting": True, "deep_steps": 3},
            {"supervision_weights": "linear", "supervision_steps": 3},
            {"supervision_weights": "last"},
            {"supervision_weights": "1,0,1"},  # of two steps: the last one has weight 0, the update comes before it
            {"full_bptt": True},
            {"optimizer_step": "supervision"},
            {"recursion": "none"},
            {"recursion": "loop", "deep_steps": 3, "supervision_weights": "linear"},
        ],
        ids=str,
    )
    def test_parts_equal_the_whole(self, make, changes):
        trained, norms = [], []
        for parts in (1, 4):
            trainer = make(str(parts), grad_accum=parts, max_steps=2, **LINEAR, **changes)
            if "packing" in changes:
                assert len({(row.target_ids != IGNORE).sum().item() for row in trainer.train_set}) > 3
            start = weights(trainer).clone()
            trainer.train()
            trained.append(weights(trainer) - start)
            norms.append([r["grad_norm"] for r in read_metrics(trainer.folder) if "grad_norm" in r])
        moved = trained[0].norm()
        assert moved > 1e-3  # the weights did move
        assert (trained[1] - trained[0]).norm() < 1e-4 * moved  # fp32 sums in another order
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)

    def test_targets_count_not_rows(self, make):
        """One part has 1 target, another 2 x 16, the last none: the update is that of all 33 targets in one batch."""
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

    def test_the_loop_learns_from_each_visit(self, make):
        """The logged loss is the weighted mean of the visits' losses, and its gradient moves the weights."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 250, (8, 17), generator=generator)
        batch, ends = {"input_ids": ids[:, :-1], "target_ids": ids[:, 1:]}, []
        for weights_of in (None, "last", "linear"):
            trainer = make(f"{weights_of}", recursion="loop", deep_steps=3, supervision_weights=weights_of, **LINEAR)
            with torch.no_grad():
                steps = trainer.raw(**batch, return_steps=True).logits
            losses = [cross_entropy(logits, batch["target_ids"]).item() for logits in steps]
            trainer.started = time.monotonic()
            trainer.train_step(batch)
            expected = sum(s * loss for s, loss in enumerate(losses, 1)) / 6 if weights_of == "linear" else losses[-1]
            assert len(losses) == 3 and trainer.window.losses[1].item() == pytest.approx(expected, rel=1e-5)
            ends.append(weights(trainer))
        assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])

    @pytest.mark.parametrize("update", ["batch", "supervision"])
    def test_gradients_are_those_of_the_weighted_losses(self, make, monkeypatch, update):
        """One update has the gradient of the model's own loss; an update per step has N times its share of it."""
        options = {"supervision_weights": "linear", "supervision_steps": 3, "grad_clip": 0, "lr": 1e-9}
        trainer = make(optimizer_step=update, **options)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 250, (8, 17), generator=generator)
        batch, found = {"input_ids": ids[:, :-1], "target_ids": ids[:, 1:]}, []

        def gradient():
            return torch.cat([p.grad.detach().flatten() for p in trainer.raw.parameters()])

        update_weights = trainer.update_weights
        monkeypatch.setattr(trainer, "update_weights", lambda: (found.append(gradient()), update_weights()))
        trainer.started = time.monotonic()
        trainer.train_step(batch)
        expected, carry = [], None
        for weight in (1, 2, 3):
            trainer.raw.zero_grad()
            out = trainer.raw(**batch, supervision_steps=1, carry=carry)
            out.loss.backward()
            expected.append(weight / 6 * gradient())
            carry = out.carry
        trainer.raw.zero_grad()
        trainer.raw(**batch).loss.backward()
        torch.testing.assert_close(sum(expected), gradient(), rtol=1e-4, atol=1e-7)
        expected = [sum(expected)] if update == "batch" else [3 * each for each in expected]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert (ours - theirs).norm() < 1e-4 * theirs.norm()  # fp32 sums in another order

    def test_supervision_step_makes_an_update_each(self, make):
        trainer = make(optimizer_step="supervision", supervision_steps=3)
        trainer.train()
        assert trainer.ema.updates == 3 * 8
        assert make("other").config.optimizer_step == "batch"


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_evaluations_and_samples_use_the_averaged_weights(make, decay):
    """`best` is chosen by the weights that are loaded later."""
    trainer = make(ema_decay=decay, max_steps=20, lr=3e-2, sample_tokens=20, eval_every=20)
    figures = trainer.train()
    loaded, last = (load_model(trainer.folder / "last", ema=ema)[0] for ema in (True, False))
    data, pad_id = trainer.valid_set, trainer.tokenizer.pad_id
    losses = [evaluate_rows(model, data, len(data), 8, pad_id)["valid_loss"] for model in (loaded, last)]
    assert figures["valid_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert (abs(losses[1] / losses[0] - 1) > 1e-3) == (decay > 0)
    sample = sample_text(loaded, trainer.tokenizer, "", 20, trainer.config.seed)
    assert sample in (trainer.folder / "samples.txt").read_text(encoding="utf-8")


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
        """How often a run evaluates and samples does not change its weights."""
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


class TestInitFrom:
    @pytest.fixture
    def from_first(self, corpus, tmp_path):
        """from_first(*flags): settings of a run in tmp_path/second with init_from tmp_path/first."""
        folders = {"init_from": str(tmp_path / "first"), "save_dir": str(tmp_path / "second")}
        model = {field.name for field in dataclasses.fields(TRMConfig)}
        own = {name: value for name, value in TINY.items() if name not in model}
        path = tmp_path / "second.yaml"
        path.write_text(yaml.safe_dump(own | corpus | folders | {"max_steps": 4}))
        return lambda *flags: read_settings(["--config", str(path), *flags])

    def test_starts_from_the_averaged_weights(self, make, tmp_path):
        make("first", ema_decay=0.5).train()
        source = tmp_path / "first"
        wanted = load_file(source / "best" / "ema.safetensors")
        trainer = make("second", init_from=str(source), lr=1e-4)
        assert trainer.step == 0 and same({k: v for k, v in trainer.raw.state_dict().items()}, wanted)
        trainer.train()
        again = make("second", init_from=str(source), lr=1e-4, resume=True)
        assert again.step == 8

    def test_model_settings_are_those_of_the_checkpoint_where_none_are_given(self, make, from_first, tmp_path):
        make("first", gate=True, supervision_steps=1).train()
        trainer = create_trainer(from_first("--supervision_steps", "3", "--full_bptt"))
        config = trainer.raw.config
        assert (config.d_model, config.gate, config.supervision_steps, config.full_bptt) == (16, True, 3, True)
        weights = load_file(tmp_path / "first" / "best" / "ema.safetensors")
        assert same(dict(trainer.raw.state_dict()), weights)
        written = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
        assert (written["d_model"], written["gate"], written["supervision_steps"]) == (16, True, 3)

    def test_resumes_with_the_same_flags_and_without_the_source(self, make, from_first, tmp_path):
        make("first", supervision_steps=1).train()
        create_trainer(from_first("--supervision_steps", "3")).train()
        shutil.rmtree(tmp_path / "first")
        assert create_trainer(from_first("--supervision_steps", "3", "--resume")).raw.config.supervision_steps == 3
        assert create_trainer(from_first("--resume")).step == 4
        with pytest.raises(UserError, match="--supervision_steps is 2, but the run in .* has 3"):
            create_trainer(from_first("--supervision_steps", "2", "--resume"))

    def test_weights_keep_their_shapes(self, make, from_first):
        make("first").train()
        for name, value in (("d_model", "32"), ("vocab_size", "300")):
            with pytest.raises(UserError, match=rf"ema.safetensors does not fit a model with another {name}: change"):
                create_trainer(from_first(f"--{name}", value, "--supervision_steps", "3"))

    def test_keeps_its_tokenizer(self, make, from_first):
        make("first").train()
        for flags in (["--tokenizer", "other.json"], ["--tokenizer", "sentencepiece", "--sp_model", "other.model"]):
            with pytest.raises(UserError, match="--init_from brings its own tokenizer"):
                create_trainer(from_first(*flags))

    def test_refuses_the_tokenizer_byte_where_the_checkpoint_has_another(self, make, from_first, tmp_path):
        usual_spm(tmp_path)
        make("first", tokenizer="sentencepiece", sp_model=str(tmp_path / "usual.model"), max_steps=1).train()
        with pytest.raises(UserError, match="--init_from brings its own tokenizer"):
            create_trainer(from_first("--tokenizer", "byte"))

    def test_a_plain_transformer_becomes_the_block_of_a_loop(self, make, from_first):
        plain = make("first", recursion="none", norm="pre", tie_embeddings=True)
        plain.train()
        loop = create_trainer(from_first("--recursion", "loop", "--injection", "none", "--deep_steps", "1"))
        ids = torch.arange(32).view(2, 16)
        with plain.as_judged(), torch.no_grad():
            assert torch.equal(plain.raw.eval()(ids).logits, loop.raw.eval()(ids).logits)


class TestSettings:
    def test_full_bptt_with_an_update_after_each_step(self, make):
        with pytest.raises(UserError, match="full_bptt needs one update for all supervision steps"):
            make(optimizer_step="supervision", full_bptt=True)

    def test_a_vocabulary_that_the_tokenizer_does_not_have_is_told(self, make, capsys):
        assert make(vocab_size=8000).raw.config.vocab_size == 259
        assert "vocab_size is 259, that of the tokenizer" in capsys.readouterr().err

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
