"""Settings of a task. Scripts read them before they import torch."""

from dataclasses import dataclass
from typing import Literal

# the default zero-shot question; {labels} becomes the label names
SUFFIX = " Is this movie {labels}? This movie is "


@dataclass
class FinetuneConfig:
    """Fine-tuning.

    Args:
        save_dir: run folder: config, metrics.jsonl, checkpoints, dev_confusion.png
        tune: what is trained: full = all weights, head = only the new layer, lora = adapters on the linear layers
            (needs peft)
        lora_rank: rank of the LoRA adapters
        epochs: passes over the training texts; the epoch that is best on the dev set is kept
        batch_size: texts per optimizer step
        lr: peak learning rate; reached after a tenth of the run, then decays to 0 along a cosine
        head_lr: peak learning rate of the new layer; default: 10 x lr
        weight_decay: decoupled weight decay of the matrices
        dropout: dropout probability, before the new layer and in the blocks
        grad_clip: the gradient is scaled down to this norm if it is larger; 0 = no clipping
        balance: give every label the same total weight in the loss, even if it is rare
        seed: seed of the order of the texts and of dropout
        resume: continue from the newest checkpoint in save_dir
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
            raise ValueError("set lr and head_lr above 0, and dropout to 0 or more and below 1")
        if not (self.weight_decay >= 0 and self.grad_clip >= 0 and 0 <= self.seed < 2**63):
            raise ValueError("set weight_decay and grad_clip to 0 or more, and seed from 0 to 2^63 - 1")
