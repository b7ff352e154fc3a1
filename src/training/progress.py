"""What a run shows while it goes on: bars, tokens/s, time left."""

import contextlib
import math
import sys
import time

import torch
from tqdm import tqdm

from src.runtime import COMPILE_S


def progress_bar(batches=None, **options) -> tqdm:
    """A bar on stderr, over what is given; a log file wants few lines."""
    return tqdm(batches, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


class Window:
    """Sums over the training steps since the last line of the log, which is their mean; a part of the run's state."""

    def __init__(self, device):
        self.losses = torch.zeros(3, device=device)  # loss, cross-entropy, halting loss: this process's share
        self.steps, self.visits = 0, 0
        self.good = 0  # steps whose gradient was finite: those alone are in `losses`

    def count(self, visits: int):
        """One more step, in which the network was visited so often."""
        self.steps += 1
        self.visits += visits

    def means(self, accelerator) -> dict:
        """{name: mean per step} for the log, NaN where no step was good.  All processes take part."""
        loss, ce, act = (accelerator.reduce(self.losses) / (self.good or math.nan)).tolist()
        depth = self.visits / max(1, self.steps)
        return {"loss": loss, "ce_loss": ce, "act_loss": act, "recursion_depth": depth}

    def state_dict(self, accelerator) -> dict:
        """Losses are summed over the processes, which all take part."""
        counts = {"steps": self.steps, "good": self.good, "visits": self.visits}
        return {"losses": accelerator.reduce(self.losses), **counts}

    def load_state_dict(self, state: dict, is_main: bool):
        """The main process takes the losses of all."""
        if is_main:
            self.losses.copy_(state["losses"])
        self.steps, self.good, self.visits = state["steps"], state["good"], state["visits"]


class Clock:
    """When the window began over which tokens/s is measured, and how long compiling took, which counts as nothing."""

    def __init__(self, compiles: bool):
        self.compiles, self.compiled, self.compile_s = compiles, None, 0.0
        self.start(0)

    def start(self, step: int, seconds: float = 0.0):
        """A window begins with this step, or began so many seconds ago."""
        self.step, self.began = step, time.monotonic() - seconds

    def seconds(self) -> float:
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def paused(self):
        """Inside, the time is none of the training's."""
        before = time.monotonic()
        yield
        self.began += time.monotonic() - before

    @contextlib.contextmanager
    def compiling(self, stage, step: int, bar: tqdm, say):
        """Around a training step: the first one of a stage compiles, which is told, and the window begins after it."""
        if not self.compiles or self.compiled is stage:
            yield
            return
        say(f"compiling, about {COMPILE_S} s; seconds where the same was compiled before")
        before = time.monotonic()
        yield
        self.compiled, self.compile_s = stage, self.compile_s + time.monotonic() - before
        self.start(step + 1)
        bar.unpause()

    def tokens_per_s(self, curriculum, step: int) -> float:
        """NaN where the window is a step that compiled, and no more."""
        tokens = curriculum.tokens(step) - curriculum.tokens(self.step)
        return tokens / self.seconds() if tokens else math.nan

    def minutes_left(self, elapsed: float, steps_left: float, max_minutes: float | None) -> float:
        """Of a run that took `elapsed` s so far; steps_left: in units of the steps done."""
        left = (elapsed - self.compile_s) / 60 * steps_left
        return left if max_minutes is None else max(0.0, min(left, max_minutes - elapsed / 60))
