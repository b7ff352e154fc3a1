"""The clock behind tokens/s and time left: compiling and evaluating are reported but not counted."""

import io
import math
import types

import pytest

from src.training import progress
from src.training.progress import Clock, progress_bar

CURRICULUM = types.SimpleNamespace(tokens=lambda step: 100 * step)


@pytest.fixture
def now(monkeypatch):
    """A clock whose time the test sets: now[0], in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_compiling_is_told_and_not_counted(now):
    said, stage = [], object()
    clock, bar = Clock(compiles=True), progress_bar(total=4, file=io.StringIO())
    with clock.compiling(stage, 0, bar, said.append):
        now[0] += 40
    assert said == ["compiling, about 40 s, or a few if torch has the result in its cache"] and clock.compile_s == 40
    assert math.isnan(clock.tokens_per_s(CURRICULUM, 1))  # the window holds only the step that compiled
    with clock.compiling(stage, 1, bar, said.append):
        now[0] += 2
    with clock.paused():
        now[0] += 30
    assert clock.tokens_per_s(CURRICULUM, 2) == 50  # 100 tokens in 2 s
    assert clock.minutes_left(72.0, 3, None) == pytest.approx(32 * 3 / 60)
    with clock.compiling(object(), 2, bar, said.append):  # the next stage compiles again
        now[0] += 5
    assert len(said) == 2 and clock.compile_s == 45


def test_without_a_compiler_nothing_is_told(now):
    said, clock = [], Clock(compiles=False)
    with clock.compiling(object(), 0, progress_bar(total=1, file=io.StringIO()), said.append):
        now[0] += 4
    assert said == [] and clock.tokens_per_s(CURRICULUM, 1) == 25


def test_the_time_that_is_left_ends_with_max_minutes(now):
    clock = Clock(compiles=False)
    assert clock.minutes_left(60.0, 100, 3) == 2 and clock.minutes_left(200.0, 100, 3) == 0
    assert clock.minutes_left(60.0, 0.5, 3) == 0.5  # the steps are used up first
