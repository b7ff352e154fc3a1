"""Progress of a run: bars, mean losses since the last line of the log, tokens per second, time left."""

import contextlib
import math
import sys
import time

import torch
from tqdm import tqdm

from src.runtime import COMPILE_S


def progress_bar(batches=None, **options) -> tqdm:
    """Returns a progress bar on stderr, over `batches` if given.  If stderr is a file, it updates rarely."""
    return tqdm(batches, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


class Window:
    """Sums of losses and visits over the training steps since the last line of the log. The next line has their means.

    It is saved in checkpoints: after a kill, a resumed run writes the same log as an unbroken one. A run that a signal
    ended has one line more, of its last step."""

    def __init__(self, device):
        self.losses = torch.zeros(3, device=device)  # loss, cross-entropy, halting loss; this process's share
        self.steps, self.visits = 0, 0
        self.good = 0  # steps with a finite gradient; `losses` sums only these

    def add(self, losses, visits: int, is_good: bool):
        """Add one step, in which the network was applied `visits` times.

        is_good: whether its gradient was finite. If not, its losses are left out, because they may be NaN."""
        self.steps += 1
        self.visits += visits
        if is_good:
            self.losses += losses
            self.good += 1

    def means(self, accelerator) -> dict:
        """Returns {name: mean per step}; losses are NaN if no step was good.  All processes must call this."""
        loss, ce, act = (accelerator.reduce(self.losses) / (self.good or math.nan)).tolist()
        depth = self.visits / max(1, self.steps)
        return {"loss": loss, "ce_loss": ce, "act_loss": act, "recursion_depth": depth}

    def state_dict(self, accelerator) -> dict:
        """Returns the state, with losses summed over all processes.  All of them must call this."""
        counts = {"steps": self.steps, "good": self.good, "visits": self.visits}
        return {"losses": accelerator.reduce(self.losses), **counts}

    def load_state_dict(self, state: dict, is_main: bool):
        """Restore a state. Only the main process restores the losses, because they are the sum over all processes."""
        if is_main:
            self.losses.copy_(state["losses"])
        self.steps, self.good, self.visits = state["steps"], state["good"], state["visits"]


class Clock:
    """Measures tokens per second since the last line of the log, without the time for compiling and evaluating."""

    def __init__(self, compiles: bool):
        self.compiles, self.compiled, self.compile_s = compiles, None, 0.0
        self.start(0)

    def start(self, step: int, seconds: float = 0.0):
        """Start a window at this step, as if `seconds` had already passed in it."""
        self.step, self.began = step, time.monotonic() - seconds

    def seconds(self) -> float:
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def paused(self):
        """Within this context, time does not count as training time."""
        before = time.monotonic()
        yield
        self.began += time.monotonic() - before

    @contextlib.contextmanager
    def compiling(self, stage, step: int, bar: tqdm, say):
        """Wrap a training step. The first step of a stage compiles: print this, and start the window after that
        step."""
        if not self.compiles or self.compiled is stage:
            yield
            return
        say(f"compiling, about {COMPILE_S} s, or a few if torch has the result in its cache")
        before = time.monotonic()
        yield
        self.compiled, self.compile_s = stage, self.compile_s + time.monotonic() - before
        self.start(step + 1)
        bar.unpause()

    def tokens_per_s(self, curriculum, step: int) -> float:
        """Returns the tokens per second in this window; NaN if its only step compiled."""
        tokens = curriculum.tokens(step) - curriculum.tokens(self.step)
        return tokens / self.seconds() if tokens else math.nan

    def minutes_left(self, elapsed: float, work_left: float, max_minutes: float | None) -> float:
        """Returns the estimated minutes left.  elapsed: seconds so far; work_left: remaining work / work done."""
        left = (elapsed - self.compile_s) / 60 * work_left
        return left if max_minutes is None else max(0.0, min(left, max_minutes - elapsed / 60))
