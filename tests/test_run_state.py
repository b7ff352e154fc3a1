"""What a run goes on from is checked whole before any of it is used: a broken one is named, the one before is taken."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import assert_same_checkpoints

from src.errors import UserError
from src.run_state import check

pytest_plugins = "training"  # the fixtures make and corpus
pytestmark = pytest.mark.usefixtures("unchecked")
SETTINGS = {"save_every": 4, "eval_every": 100, "keep_checkpoints": 3, "dropout": 0.1}


@pytest.fixture(scope="module")
def states(corpus, tmp_path_factory):
    """A run of 8 steps of each optimizer, with checkpoints of step 4 and of step 8."""
    from training import TINY, trainer_of

    home = tmp_path_factory.mktemp("states")
    return {
        name: run_of(trainer_of, {**TINY, **corpus, **SETTINGS, "optimizer": name, "save_dir": str(home / name)})
        for name in ("adamw", "muon")
    }


def run_of(trainer_of, settings):
    trainer = trainer_of({**settings, "monitoring": settings_without_events()})
    trainer.train()
    return trainer


def settings_without_events():
    from src.train_config import MonitoringConfig

    return MonitoringConfig(tensorboard=False)


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


class TestCheck:
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_a_whole_state_passes(self, states, name):
        trainer = states[name]
        for folder in sorted(trainer.folder.glob("step_*")):
            check(trainer.config, folder, torch.load(folder / "state" / "training.pt"))

    @pytest.mark.parametrize("what", BREAKS)
    def test_what_is_broken_is_told(self, states, what):
        trainer = states["adamw"]
        folder = trainer.folder / "step_00000008"
        state = torch.load(folder / "state" / "training.pt")
        BREAKS[what](state)
        with pytest.raises(UserError, match=r"step_00000008/state/training\.pt is broken: "):
            check(trainer.config, folder, state)

    def test_muon(self, states):
        trainer = states["muon"]
        folder = trainer.folder / "step_00000008"
        state = torch.load(folder / "state" / "training.pt")
        entry(state, 1)["momentum_buffer"] = torch.zeros(3)
        with pytest.raises(UserError, match="training.pt is broken: 0.momentum_buffer"):
            check(trainer.config, folder, state)

    @pytest.mark.parametrize("state", [None, [], 3, {}])
    def test_no_state_at_all(self, states, state):
        with pytest.raises(UserError, match="training.pt is broken"):
            check(states["adamw"].config, states["adamw"].folder / "step_00000008", state)

    def test_a_stream(self, make):
        trainer = make(streaming=True, shuffle_buffer=4, num_workers=1, save_every=100)
        trainer.train()
        folder = trainer.folder / "step_00000008"

        def state():
            return torch.load(folder / "state" / "training.pt")

        check(trainer.config, folder, state())
        for breaks in (
            lambda s: s["loaders"][0].pop("loader"),
            lambda s: s["loaders"][0].update(epoch="x"),
            lambda s: readers(s)[0].update(drawn=-1),
            lambda s: readers(s)[0].update(windows=None),
            lambda s: readers(s)[0]["windows"][0].update(given="x"),
            lambda s: readers(s)[0]["windows"][0].update(start=[0, 0, 0]),
            lambda s: readers(s)[0]["windows"][0]["start"].__setitem__(1, 2**70),
        ):
            broken = state()
            breaks(broken)
            with pytest.raises(UserError, match="training.pt is broken"):
                check(trainer.config, folder, broken)


def readers(state):
    """The states of a stream's readers, wherever torchdata keeps them."""
    if not isinstance(state, (dict, list)):
        return []
    own = [state] if isinstance(state, dict) and "drawn" in state else []
    return own + [found for inner in (state.values() if isinstance(state, dict) else state) for found in readers(inner)]


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
    """A state's groups are not read: they hold what the settings say, or what they should not."""
    make(**SETTINGS).train()
    make("straight", **SETTINGS).train()
    run = make(resume=True, **SETTINGS).folder
    path = run / "step_00000008" / "state" / "training.pt"
    (run / "step_00000008" / "model.safetensors").unlink()  # so that step 4 is gone on from
    path = run / "step_00000004" / "state" / "training.pt"
    state = torch.load(path)
    for optimizer in state["optimizers"]:
        optimizer["param_groups"] = [{"params": [0], "lr": "x", "peak_lr": 1e9, "betas": (5.0, 5.0)}]
    torch.save(state, path)
    trainer = make(resume=True, **SETTINGS)
    trainer.train()
    assert_same_checkpoints(run.parent / "straight" / "last", run / "last")
