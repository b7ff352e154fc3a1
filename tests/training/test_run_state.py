"""A checkpoint is checked completely before it is used; a broken one is reported, and the previous one is used."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import TINY, assert_same_checkpoints, trainer_of

from src.checkpoint import load_state
from src.errors import UserError
from src.training.train_config import MonitoringConfig

pytest_plugins = "trainers"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")
SETTINGS = {"save_every": 4, "eval_every": 100, "keep_checkpoints": 3, "dropout": 0.1}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a finished run of 8 steps."""
    home, quiet = tmp_path_factory.mktemp("states"), MonitoringConfig(tensorboard=False)
    trainer = trainer_of({**TINY, **corpus, **SETTINGS, "monitoring": quiet, "save_dir": str(home / "run")})
    trainer.train()
    return trainer.folder


def entry(state, optimizer=0, number=0):
    return state["optimizers"][optimizer]["state"][number]


BREAKS = {
    "moment is a scalar": lambda s: entry(s).update(exp_avg=torch.tensor(0.0)),
    "moment is halved": lambda s: entry(s).update(exp_avg=entry(s)["exp_avg"].flatten()[::2].clone()),
    "moment of another shape": lambda s: entry(s).update(exp_avg_sq=entry(s)["exp_avg_sq"].T.clone()),
    "moment of another dtype": lambda s: entry(s).update(exp_avg=entry(s)["exp_avg"].double()),
    "moment is NaN": lambda s: entry(s)["exp_avg"].view(-1)[3].fill_(math.nan),
    "second moment below 0": lambda s: entry(s)["exp_avg_sq"].view(-1)[3].fill_(-1.0),
    "moment repeats one number": lambda s: entry(s).update(exp_avg=torch.zeros(1).expand(entry(s)["exp_avg"].shape)),
    "moment is sparse": lambda s: entry(s).update(exp_avg=entry(s)["exp_avg"].to_sparse()),
    "moment is a list": lambda s: entry(s).update(exp_avg=[0.0]),
    "moment is missing": lambda s: entry(s).pop("exp_avg"),
    "moment is None": lambda s: entry(s).update(exp_avg=None),
    "steps of a parameter are many": lambda s: entry(s).update(step=torch.ones(7)),
    "steps of a parameter are none": lambda s: entry(s).update(step=torch.tensor(-1.0)),
    "a parameter too many": lambda s: s["optimizers"][0]["state"].update({99: entry(s)}),
    "a parameter by name": lambda s: s["optimizers"][0]["state"].update(x=entry(s)),
    "no entries": lambda s: s["optimizers"][0]["state"].clear(),
    "no optimizers": lambda s: s["optimizers"].clear(),
    "an optimizer is a list": lambda s: s["optimizers"].__setitem__(0, []),
    "no step": lambda s: s.pop("step"),
    "step far ahead": lambda s: s.update(step=2**40),
    "step before the start": lambda s: s.update(step=-3),
    "another step": lambda s: s.update(step=7),
    "step is a text": lambda s: s.update(step="8"),
    "step is true": lambda s: s.update(step=True),
    "step is a tensor": lambda s: s.update(step=torch.tensor(8)),
    "elapsed is NaN": lambda s: s.update(elapsed=math.nan),
    "elapsed is infinite": lambda s: s.update(elapsed=math.inf),
    "best is a list": lambda s: s.update(best=[1.0]),
    "updates are a text": lambda s: s.update(ema_updates="1"),
    "no scaler": lambda s: s.pop("scaler"),
    "scaler is a number": lambda s: s.update(scaler=3),
    "no position": lambda s: s["loaders"].clear(),
    "position is a text": lambda s: s["loaders"][0].update(samples="many"),
    "position beyond all": lambda s: s["loaders"][0].update(samples=2**80),
    "an epoch of nothing": lambda s: s["loaders"][0].update(epoch_samples=0),
    "position is None": lambda s: s["loaders"].__setitem__(0, None),
    "no curriculum": lambda s: s.pop("curriculum"),
    "stages are None": lambda s: s.update(curriculum={"starts": None}),
    "no window": lambda s: s.pop("window"),
    "window of two losses": lambda s: s["window"].update(losses=torch.zeros(2)),
    "window is NaN": lambda s: s["window"].update(losses=torch.full((3,), math.nan)),
    "window of -1 steps": lambda s: s["window"].update(steps=-1),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_told(finished, tmp_path, what):
    folder = shutil.copytree(finished / "step_00000008", tmp_path / "step_00000008")
    state = load_state(folder)
    BREAKS[what](state)
    torch.save(state, folder / "state" / "training.pt")
    with pytest.raises(UserError, match=r"step_00000008/state/training\.pt is broken: "):
        load_state(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json", "tokenizer_config.json"])
def test_every_file_is_looked_at(finished, tmp_path, name):
    folder = shutil.copytree(finished / "step_00000008", tmp_path / "step_00000008")
    (folder / "mine.txt").write_text("of no concern")
    assert load_state(folder)["step"] == 8
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1  # flip one bit
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is broken: it differs from what was written"):
        load_state(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_state(folder)


def test_a_checkpoint_of_a_version_without_digests(make, capsys):
    """It is used, with a message.  An optimizer state of another model is refused, as fused kernels do not check it."""
    make(**SETTINGS).train()
    folder = make(**SETTINGS, resume=True).folder / "step_00000008"
    (folder / "state" / "digests.json").unlink()
    assert make(**SETTINGS, resume=True).step == 8
    assert f"{folder} has no state/digests.json" in capsys.readouterr().err
    for what in ("moment is a scalar", "moment is halved", "moment is a list", "a parameter too many"):
        state = load_state(folder)
        BREAKS[what](state)
        torch.save(state, folder / "state" / "training.pt")
        with pytest.raises(UserError, match="optimizer state is for another model"):
            make(**SETTINGS, resume=True)


@pytest.mark.parametrize("broken", ["moment is a scalar", "step far ahead", "average", "weight"])
def test_the_checkpoint_before_is_taken(make, capsys, broken):
    straight = make("straight", **SETTINGS)
    straight.train()
    trainer = make(**SETTINGS)
    trainer.train()
    folder = trainer.folder / "step_00000008"
    if broken in BREAKS:
        path = folder / "state" / "training.pt"
        state = torch.load(path)
        BREAKS[broken](state)
        torch.save(state, path)
    else:
        path = folder / ("ema.safetensors" if broken == "average" else "model.safetensors")
        tensors = load_file(path)
        tensors.pop("embed.weight")
        save_file(tensors, path)
    capsys.readouterr()
    trainer = make(**SETTINGS, resume=True)
    assert trainer.step == 4
    err = capsys.readouterr().err
    assert str(path) in err and "going back to the checkpoint before" in err
    trainer.train()
    assert_same_checkpoints(straight.folder / "last", trainer.folder / "last")


def test_rates_come_from_the_settings(make):
    """The saved parameter groups are ignored: the settings already determine them, and a file may be wrong."""
    make(**SETTINGS).train()
    make("straight", **SETTINGS).train()
    run = make(resume=True, **SETTINGS).folder
    path = run / "step_00000008" / "state" / "training.pt"
    (run / "step_00000008" / "model.safetensors").unlink()  # so that the run resumes from step 4
    path = run / "step_00000004" / "state" / "training.pt"
    state = torch.load(path)
    for optimizer in state["optimizers"]:
        optimizer["param_groups"] = [{"params": [0], "lr": "x", "peak_lr": 1e9, "betas": (5.0, 5.0)}]
    torch.save(state, path)
    (path.parent / "digests.json").unlink()
    trainer = make(resume=True, **SETTINGS)
    trainer.train()
    assert_same_checkpoints(run.parent / "straight" / "last", run / "last")
