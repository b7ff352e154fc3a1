"""Dropout that costs little on a CPU.

PyTorch draws the random numbers of a compiled dropout one by one on a CPU. That can take as long as the matrix products
of a small model. Here a CPU draws 64 random bits at a time, for four elements. Other devices use PyTorch's dropout.
"""

import torch
from torch import Tensor, nn

LEVELS = 2**16  # probabilities are rounded to a multiple of 1 / LEVELS


@torch.library.custom_op("trm::random_words", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_words(x: Tensor) -> Tensor:
    """Returns uniform int16 numbers, one for each element of x, from PyTorch's default generator for the CPU.

    An operation of its own: torch.compile leaves it as it is, so compiled dropout has the masks of eager dropout. It
    takes x, not its size, because torch.compile merges calls with equal arguments: two layers would share a mask."""
    n = x.numel()
    return torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n].view(x.shape)


@random_words.register_fake
def _(x):
    return torch.empty(x.shape, dtype=torch.int16)


def dropout(x: Tensor, scores: Tensor, p: float) -> Tensor:
    """Returns x with each element 0 with probability p, else divided by 1 - p.  For a CPU and 0 < p < 1.

    scores: a tensor of the same shape that is in memory anyway, such as x itself or what it was computed from."""
    dropped = min(max(1, round(p * LEVELS)), LEVELS - 1)
    is_kept = random_words(scores) >= dropped - LEVELS // 2
    return torch.where(is_kept, x * (LEVELS / (LEVELS - dropped)), 0.0)


class Dropout(nn.Dropout):
    """Dropout of the elements of a tensor, as nn.Dropout, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not (self.training and 0 < self.p < 1):
            return super().forward(x)
        return dropout(x, x, self.p)
