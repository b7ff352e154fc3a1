"""The engine's number of threads: the fastest one is found, and found again when it changes."""

from collections import Counter

import pytest
import torch

from src.page import threads
from src.page.threads import PERIOD, TRIAL, Threads, plan


def numbers(seconds, most, turns):
    """The numbers of threads of some turns, if turn t with n threads takes seconds(n, t)."""
    plans = plan(most)
    found = [next(plans)]
    for turn in range(1, turns):
        found.append(plans.send(seconds(found[-1], turn)))
    return found


@pytest.mark.parametrize(("best", "tried"), [(6, [6, 3, 1]), (3, [6, 3, 1]), (1, [6, 3, 1])])
def test_the_fastest_number_is_used(best, tried):
    trials = len(tried) * (TRIAL + 1)
    found = numbers(lambda n, turn: 1 + abs(n - best), 6, trials + PERIOD + trials)
    assert found[:trials] == found[trials + PERIOD :] == [n for n in tried for _ in range(TRIAL + 1)]
    assert found[trials : trials + PERIOD] == [best] * PERIOD


def test_a_slow_turn_does_not_decide():
    found = numbers(lambda n, turn: 100.0 if turn == 3 else 1 / n, 2, 3 * TRIAL)
    assert found[-1] == 2


def test_another_number_becomes_the_fastest():
    first = 2 * (TRIAL + 1) + PERIOD
    found = numbers(lambda n, turn: n if turn < first else 1 / n, 2, 2 * first)
    assert found[first - 1] == 1 and found[-1] == 2


def test_each_number_of_rows_has_its_own(monkeypatch):
    set_to = []
    monkeypatch.setattr(threads, "free_cores", lambda most: 2)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: set_to[-1] if set_to else 2)
    monkeypatch.setattr(threads.torch, "set_num_threads", set_to.append)
    clock, used = [0.0], Counter()
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def turn(rows):
        n = torch.get_num_threads()
        used[rows, n] += 1
        clock[0] += 1 / n if rows == 64 else n  # threads pay for many rows only

    ours = Threads()
    for _ in range(200):
        for rows in (2, 64):
            ours.run(rows, lambda rows=rows: turn(rows))
    ours.run(2, lambda: turn(2))
    assert set_to[-1] == 1
    ours.use_all()
    assert set_to[-1] == 2
    ours.restore()
    trials = TRIAL + 1
    assert used == {(2, 2): trials, (2, 1): 201 - trials, (64, 1): trials, (64, 2): 200 - trials}
    assert set_to[-1] == 2


def test_one_core_is_not_tried(monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda most: 1)
    before, seen = torch.get_num_threads(), []
    ours = Threads()
    ours.run(3, lambda: seen.append(torch.get_num_threads()))
    ours.restore()
    assert seen == [1] and torch.get_num_threads() == before and not ours.plans


def test_a_failed_turn_leaves_the_plan_as_it_was(monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda most: 2)
    ours = Threads()
    with pytest.raises(ZeroDivisionError):
        ours.run(1, lambda: 1 / 0)
    for _ in range(40):
        ours.run(1, lambda: None)
    ours.restore()
