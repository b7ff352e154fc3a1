"""What a run shows while it goes on: bars, tokens/s, time left."""

import contextlib
import math
import sys
import time

from tqdm import tqdm

from src.runtime import COMPILE_S


def progress_bar(batches=None, **options) -> tqdm:
    """A bar on stderr, over what is given; a log file wants few lines."""
    return tqdm(batches, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


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
