"""Tests of checkpoint folders: exact round trips, no code run from files, clear errors, intact after a crash."""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from src import checkpoint
from src.checkpoint import load_config, load_model, load_state, read_weights, resolve, save_checkpoint
from src.errors import UserError
from src.model import TRMConfig, TRMModel
from src.model_config import loss_weights
from src.tokenizer import ByteLevelTokenizer
from src.training.run_folder import point, prune

TOKENIZER = ByteLevelTokenizer()


@pytest.fixture
def model(tiny):
    return tiny(vocab_size=TOKENIZER.vocab_size, d_model=8, n_heads=2, d_ff=16)


@pytest.fixture
def saved(model, tmp_path):
    """A complete checkpoint folder with averaged weights and a state."""
    folder = tmp_path / "whole"
    ema = {name: t + 1 for name, t in checkpoint.own_state(model).items()}
    save_checkpoint(folder, model, TOKENIZER, ema, {"step": 3, "optimizers": [{"x": torch.ones(2)}]}, {"step": 3})
    return folder


class TestRoundTrip:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", ["trm", "loop", "none"])
    def test_bit_for_bit(self, tiny, tmp_path, tied, family):
        model = tiny(
            vocab_size=TOKENIZER.vocab_size, tie_embeddings=tied, recursion=family, positions="learned", gate=True
        )
        save_checkpoint(tmp_path / "c", model, TOKENIZER)
        loaded, tokenizer = load_model(tmp_path / "c")
        assert loaded.config == model.config and not loaded.training
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert tied == (loaded.head.weight is loaded.embed.weight)
        assert tokenizer.fingerprint == TOKENIZER.fingerprint
        ids = torch.randint(0, 250, (2, 9))
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        "settings",
        [
            {"mixer": "mlp"},
            {"mixer": "mlp", "mixer_ff": 40, "prefix_tokens": 2, "norm_gain": False},
            {"positions": "learned", "prefix_tokens": 2, "puzzle_ids": 3, "token_loss": "stablemax"},
        ],
        ids=str,
    )
    def test_models_of_puzzles(self, tiny, tmp_path, settings):
        model = tiny(vocab_size=TOKENIZER.vocab_size, causal=False, **settings)
        save_checkpoint(tmp_path / "c", model, TOKENIZER)
        loaded, _ = load_model(tmp_path / "c")
        ids = torch.randint(0, 250, (2, 16))
        assert loaded.config == model.config and torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("norm", ["post", "pre"])
    def test_the_mixer_of_an_older_checkpoint(self, tiny, tmp_path, norm):
        """Its hidden width was d_ff; its post-norm was over the channels, which this version does not compute."""
        model = tiny(vocab_size=TOKENIZER.vocab_size, causal=False, mixer="mlp", mixer_ff=24, norm=norm)
        save_checkpoint(tmp_path / "c", model, TOKENIZER)
        path = tmp_path / "c" / "config.json"
        config = json.loads(path.read_text())
        config["format"] = 2
        del config["model"]["mixer_ff"]
        path.write_text(json.dumps(config))
        if norm == "pre":
            assert load_model(tmp_path / "c")[0].config.mixer_ff == 24
        else:
            with pytest.raises(UserError, match="mixer mlp with norm post now normalises over the sequence"):
                load_model(tmp_path / "c")

    @pytest.mark.parametrize("tied", [False, True])
    def test_averaged_weights_are_used_where_they_are(self, tiny, tmp_path, capsys, tied):
        model = tiny(vocab_size=TOKENIZER.vocab_size, tie_embeddings=tied)
        ema = {name: t + 1 for name, t in checkpoint.own_state(model).items()}
        save_checkpoint(tmp_path / "c", model, TOKENIZER, ema)
        averaged, _ = load_model(tmp_path / "c")
        assert torch.equal(averaged.embed.weight, model.embed.weight + 1)
        assert "EMA weights" in capsys.readouterr().err
        plain, _ = load_model(tmp_path / "c", ema=False)
        assert torch.equal(plain.embed.weight, model.embed.weight)
        captured = capsys.readouterr()
        assert "plain weights" in captured.err and captured.out == ""

    def test_state(self, saved):
        state = load_state(saved)
        assert state["step"] == 3 and torch.equal(state["optimizers"][0]["x"], torch.ones(2))

    def test_dtype_on_loading(self, saved):
        model, _ = load_model(saved, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_nothing_depends_on_time_or_path(self, model, tmp_path):
        contents = []
        for name in ("a", "b/c"):
            save_checkpoint(tmp_path / name, model, TOKENIZER, info={"step": 1})
            contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
            os.utime(tmp_path, (0, 0))
            time.sleep(0.01)
        assert contents[0] == contents[1] and len(contents[0]) == 3

    def test_written_over(self, model, saved):
        with torch.no_grad():
            model.embed.weight.zero_()
        save_checkpoint(saved, model, TOKENIZER)
        assert not load_model(saved)[0].embed.weight.any()
        assert sorted(p.name for p in saved.parent.iterdir()) == ["whole"]


class TestNoCodeFromFiles:
    @pytest.fixture
    def evil(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        return Evil()

    @pytest.mark.parametrize("write", ["torch", "pickle"])
    def test_state(self, saved, evil, write, tmp_path):
        path = saved / "state" / "training.pt"
        torch.save({"step": 1, "x": evil}, path) if write == "torch" else path.write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match="training.pt is broken"):
            load_state(saved)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json", "tokenizer_config.json"])
    def test_other_files(self, saved, evil, name, tmp_path):
        torch.save(evil, saved / name)
        if name == "model.safetensors":  # it is only read if there are no averaged weights
            (saved / "ema.safetensors").unlink()
        with pytest.raises(UserError, match=name):
            load_model(saved)
        assert not (tmp_path / "owned").exists()


class TestBroken:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
    def test_missing_file(self, model, tmp_path, name):
        save_checkpoint(tmp_path / "c", model, TOKENIZER)
        (tmp_path / "c" / name).unlink()
        with pytest.raises(UserError, match="no tokenizer" if "tokenizer" in name else name):
            load_model(tmp_path / "c")

    @pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
    def test_cut_short(self, saved, name, share):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=name):
            load_model(saved, ema=name.startswith("ema"))

    def test_cut_short_state(self, saved):
        path = saved / "state" / "training.pt"
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(UserError, match="training.pt is broken"):
            load_state(saved)
        path.unlink()
        with pytest.raises(UserError, match="training.pt is missing.*--init_from"):
            load_state(saved)

    def test_weights_of_another_model(self, tiny, saved, tmp_path):
        for changes in ({"d_model": 16}, {"n_layers": 3}, {"recursion": "none"}, {"tie_embeddings": True}):
            other = tiny(**{"vocab_size": TOKENIZER.vocab_size, "n_heads": 2, "d_model": 8, "d_ff": 16, **changes})
            save_checkpoint(tmp_path / "other", other, TOKENIZER)
            (saved / "ema.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
            with pytest.raises(UserError, match="ema.safetensors does not fit its config.json"):
                load_model(saved)

    def test_vocabulary_that_does_not_match(self, tiny, tmp_path):
        save_checkpoint(tmp_path / "c", tiny(vocab_size=23), TOKENIZER)
        with pytest.raises(UserError, match=f"tokenizer has {TOKENIZER.vocab_size} tokens, the model 23"):
            load_model(tmp_path / "c")

    @pytest.mark.parametrize(
        "content",
        [
            *("", "{", "[]", "3", "null", "{}", '{"model": 3}', '{"model": null}', '{"model": []}', "\xff"),
            *(json.dumps({"model": {name: value}}) for name in ("d_model", "norm", "dropout") for value in ("x", [])),
            *(json.dumps({"model": m}) for m in ({"width": 3}, {"d_model": -8}, {"d_model": 9, "n_heads": 2})),
            *(
                json.dumps({"model": m})
                for m in ({"d_model": 8.0, "vocab_size": 259}, {"supervision_weights": 5}, {"n_layers": None})
            ),
        ],
    )
    def test_config(self, saved, content, unchecked):
        (saved / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="config.json"):
            load_model(saved)

    @pytest.mark.parametrize("number", [4, 0, "3", None, [3]])
    def test_another_format(self, saved, number):
        content = json.loads((saved / "config.json").read_text()) | {"format": number}
        (saved / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="config.json has format .*, but this version reads 1 to 3"):
            load_model(saved)

    def test_config_alone(self, saved):
        assert load_config(saved) == load_model(saved)[0].config

    def test_unwritable(self, model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write the checkpoint"):
            save_checkpoint(tmp_path / "file" / "c", model, TOKENIZER)

    def test_disk_full(self, model, saved, tmp_path):
        """The writers of weights and state raise other errors than OSError. The old checkpoint stays intact."""
        import resource

        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (saved / "model.safetensors").stat().st_size
        try:
            for limit, state in ((size // 2, None), (size + 99, {"x": torch.zeros(size)})):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
                with pytest.raises(UserError, match="cannot write the checkpoint"):
                    save_checkpoint(tmp_path / "new", model, TOKENIZER, state=state)
                with pytest.raises(UserError, match="cannot write the checkpoint"):
                    save_checkpoint(saved, model, TOKENIZER, state=state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)
        load_model(saved)
        assert not (tmp_path / "new").exists()


class TestRunFolder:
    @pytest.fixture
    def run(self, model, tmp_path):
        """A run folder of three checkpoints."""
        for step in (1, 2, 3):
            save_checkpoint(tmp_path / f"step_{step:08d}", model, TOKENIZER)
        return tmp_path

    def test_means_best_then_last(self, run):
        with pytest.raises(UserError, match="is neither a checkpoint"):
            resolve(run)
        point(run / "last", "step_00000003")
        assert resolve(run).resolve().name == "step_00000003"
        point(run / "best", "step_00000002")
        assert resolve(run).resolve().name == "step_00000002"
        assert resolve(run / "last").resolve().name == "step_00000003"
        assert resolve(run / "step_00000001") == run / "step_00000001"
        load_model(run)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="nowhere"):
            resolve(tmp_path / "nowhere")
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path):
            with pytest.raises(UserError, match="correct the path"):
                resolve(path)

    def test_point_moves_a_link(self, run):
        for step in (1, 2, 2, 3):
            point(run / "last", f"step_{step:08d}")
            assert os.readlink(run / "last") == f"step_{step:08d}"  # relative: the run folder may be moved
        assert sorted(p.name for p in run.iterdir()) == ["last"] + [f"step_{s:08d}" for s in (1, 2, 3)]

    @pytest.mark.parametrize(
        ("best", "keep", "left"),
        [
            (1, 1, [1, 3]),
            (3, 1, [3]),
            (2, 2, [2, 3]),
            (3, 2, [2, 3]),
            (1, 9, [1, 2, 3]),
            (None, 1, [3]),
            (None, 2, [2, 3]),
        ],
    )
    def test_prune(self, run, best, keep, left):
        point(run / "last", "step_00000003")
        if best:
            point(run / "best", f"step_{best:08d}")
        prune(run, keep)
        assert sorted(p.name for p in run.glob("step_*")) == [f"step_{s:08d}" for s in left]

    def test_prune_keeps_the_newest_when_later_ones_are_broken(self, run):
        point(run / "last", "step_00000002")
        prune(run, 1, "step_00000002")  # the run went back before step 3
        assert sorted(p.name for p in run.glob("step_*")) == ["step_00000002", "step_00000003"]

    def test_prune_removes_what_a_crash_left(self, run):
        point(run / "last", "step_00000003")
        (run / ".step_00000002.writing").mkdir()
        prune(run, 9)
        assert not list(run.glob(".step_*"))


class TestWholeAtAnyMoment:
    def test_killed_while_writing(self, tmp_path):
        """Kills a process that saves all the time, at ten random moments: `last` is always a complete checkpoint."""
        torch.manual_seed(0)
        model = TRMModel(TRMConfig(vocab_size=TOKENIZER.vocab_size, d_model=32, n_heads=2))
        rng, steps = random.Random(5), []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                self.save_forever(tmp_path, model)
            time.sleep(rng.uniform(0.02, 0.3) + (0 if steps else 0.3))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if not steps and not (tmp_path / "last").exists():
                continue  # killed before it had written one
            loaded, _ = load_model(tmp_path / "last")
            steps.append(load_state(tmp_path / "last")["step"])
            expected = torch.full_like(model.embed.weight, float(steps[-1]))
            assert torch.equal(loaded.embed.weight, expected)  # weights, state and average of the same step
            assert torch.equal(read_weights(tmp_path / "last" / "model.safetensors")["embed.weight"], expected)
        assert len(steps) >= 8 and steps == sorted(steps) and steps[-1] > steps[0]

    @staticmethod
    def save_forever(folder, model):
        try:
            step = load_state(folder / "last")["step"] if (folder / "last").exists() else 0
            while True:
                step += 1
                with torch.no_grad():
                    model.embed.weight.fill_(step)
                weights = checkpoint.own_state(model)
                save_checkpoint(folder / f"step_{step:08d}", model, TOKENIZER, weights, {"step": step})
                point(folder / "last", f"step_{step:08d}")
                prune(folder, 2)
        finally:
            os._exit(1)

    @pytest.mark.parametrize("crashing", ["pathlib.Path.rename", "os.replace", "os.rename", "shutil.rmtree"])
    def test_stopped_between_two_steps_of_writing(self, model, tmp_path, monkeypatch, crashing):
        """If writing stops at any file operation, the link still leads to a complete checkpoint."""
        save_checkpoint(tmp_path / "step_00000001", model, TOKENIZER)
        point(tmp_path / "last", "step_00000001")

        def crash(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(crashing, crash)
        with contextlib.suppress(KeyboardInterrupt):
            save_checkpoint(tmp_path / "step_00000002", model, TOKENIZER)
            point(tmp_path / "last", "step_00000002")
            prune(tmp_path, 1)
        monkeypatch.undo()
        load_model(tmp_path / "last")
        save_checkpoint(tmp_path / "step_00000003", model, TOKENIZER)  # leftovers do not interfere
        point(tmp_path / "last", "step_00000003")
        load_model(tmp_path / "last")

    def test_figures_are_json(self, model, tmp_path):
        """JSON has no infinity, so such a figure raises an error; the file would be unreadable for other programs."""
        with pytest.raises(ValueError, match="JSON"):
            save_checkpoint(tmp_path / "c", model, TOKENIZER, info={"best_valid_loss": math.inf})
        assert not (tmp_path / "c").exists()


class TestOldCheckpoints:
    """Loads tests/old_checkpoints, written by commit 4906ad7: concat injection, a gate, a prelude; weights in fp16."""

    OLD = Path(__file__).parent / "old_checkpoints"
    # logits of four tokens after the text, and the greedy continuation, as computed by that commit
    TOLD = {
        "trm": ([-1.0531080961, -1.3970839977, 1.0263417959, -0.4019035137], [241] * 8),
        "loop": ([0.6901095510, -0.2419453114, -0.1444563568, 0.5429365635], [125, 97, 155, 45, 125, 46, 169, 39]),
    }

    @pytest.mark.parametrize("family", TOLD)
    def test_they_compute_what_they_did(self, family):
        model, _ = load_model(self.OLD / family)
        ids, (logits, text) = torch.arange(97, 105)[None], self.TOLD[family]
        with torch.no_grad():
            assert model(ids).logits[0, -1, 97:101].tolist() == pytest.approx(logits, abs=1e-4)
        assert model.generate(ids, 8, temperature=0)[0, 8:].tolist() == text

    def test_a_loop_is_trained_on_by_its_last_visit_alone(self, tmp_path):
        """Old configs contain `equal`, a default that the loop ignored; in new checkpoints it is kept."""
        config = load_config(self.OLD / "loop")
        assert config.supervision_weights is None and loss_weights(config, 3) == [0, 0, 1]
        assert load_config(self.OLD / "trm").supervision_weights == "equal"
        asked = dataclasses.replace(config, supervision_weights="equal")
        save_checkpoint(tmp_path / "new", TRMModel(asked), ByteLevelTokenizer())
        assert load_config(tmp_path / "new") == asked and loss_weights(asked, 3) == [1, 1, 1]
