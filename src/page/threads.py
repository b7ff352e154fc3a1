"""How many threads the engine uses: the number with which it is fastest.

The event loop and the clients need cores as well. If one of torch's threads has to wait for a core, the others wait for
it, so all cores together can be slower than one core less. Which number is best depends on the model, on the number of
rows, and on what else this machine does. So the engine tries.
"""

import statistics
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from src.runtime import free_cores

TRIAL, PERIOD = 16, 1000  # steps for which a number is tried; steps until all are tried again


def plan(most: int) -> Generator[int, float, None]:
    """Yields the number of threads for each step; `send` the seconds that this step took."""
    numbers = [most]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    while True:
        medians = {}
        for number in numbers:
            yield number  # not counted: threads start or end
            seconds = []
            for _ in range(TRIAL):
                seconds.append((yield number))
            medians[number] = statistics.median(seconds)
        best = min(medians, key=medians.get)
        for _ in range(PERIOD):
            yield best


class Threads:
    """Sets torch's number of threads for each step. `restore` sets the number that there was at the start."""

    def __init__(self):
        self.most = torch.get_num_threads()
        self.plans: dict[tuple[int, int], tuple[Generator[int, float, None], int]] = {}

    def run(self, rows: int, step: Callable[[], Any]):
        """Returns step() of so many rows, run with the number of threads that is best for about so many."""
        most = free_cores(self.most)
        if most == 1:
            _set(1)
            return step()
        key = most, rows.bit_length()
        if key not in self.plans:
            new = plan(most)
            self.plans[key] = new, next(new)
        numbers, number = self.plans[key]
        _set(number)
        start = time.perf_counter()
        done = step()
        self.plans[key] = numbers, numbers.send(time.perf_counter() - start)
        return done

    def use_all(self):
        """Sets as many threads as there are free cores: prompts have enough work for all."""
        _set(free_cores(self.most))

    def restore(self):
        _set(self.most)


def _set(number: int):
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
