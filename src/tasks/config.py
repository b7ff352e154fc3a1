"""The settings of a task, which scripts read before they import torch."""

from dataclasses import dataclass
from typing import Literal

SUFFIX = " Is this movie {labels}? This movie is "


@dataclass
class FinetuneConfig:
    """Fine-tuning.

    Args:
        save_dir: run folder: config, metrics.jsonl, checkpoints, confusion.png
        tune: full = all weights, head = the new layer alone, lora = adapters on the linear layers (needs peft)
        lora_rank: rank of the adapters
        epochs: times through the training texts; the best epoch on the dev set is kept
        batch_size: texts per optimizer step
        lr: peak learning rate, after a warm-up of a tenth of the run; falls to 0 along a cosine
        head_lr: peak learning rate of the new layer; default ten times lr
        weight_decay: decoupled weight decay of matrices
        dropout: probability of dropping, before the new layer and in the blocks
        grad_clip: largest norm of the gradient; 0 = no clipping
        balance: every label counts alike in the loss, however rare it is
        seed: seed of the order of examples and of dropout
        resume: go on from the newest checkpoint of save_dir
    """

    save_dir: str = "runs/classifier"
    tune: Literal["full", "head", "lora"] = "full"
    lora_rank: int = 8
    epochs: int = 5
    batch_size: int = 32
    lr: float = 3e-4
    head_lr: float | None = None
    weight_decay: float = 0.01
    dropout: float = 0.1
    grad_clip: float = 1.0
    balance: bool = False
    seed: int = 0
    resume: bool = False

    def __post_init__(self):
        for name in ("lora_rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        self.head_lr = 10 * self.lr if self.head_lr is None else self.head_lr
        if not (self.lr > 0 and self.head_lr > 0 and 0 <= self.dropout < 1):
            raise ValueError("lr and head_lr must be over 0, dropout 0 or more and under 1: correct them")
        if not (self.weight_decay >= 0 and self.grad_clip >= 0 and 0 <= self.seed < 2**63):
            raise ValueError("weight_decay, grad_clip and seed must be 0 or more: correct them")
