"""Optimizers with their parameter groups, the learning-rate schedule, and the moving average of weights."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from src.checkpoint import unshared


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float, betas) -> list[Optimizer]:
    """AdamW (fused), or Muon for the matrices inside blocks and AdamW for the rest (arXiv:2502.16982).

    Weight decay acts on matrices, not on gains, biases and embeddings. Each group keeps its peak rate as `peak_lr`."""
    matrices, others = [], []
    for path, p in model.named_parameters():
        if p.requires_grad:
            inner = p.ndim == 2 and not path.startswith(("embed", "pos_embed", "head", "q_head"))
            (matrices if inner else others).append((path, p))
    decayed = [p for path, p in others if path == "head.weight"]
    rest = [p for path, p in others if path != "head.weight"]
    inner = [p for _, p in matrices]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if name == "adamw":
        groups.append({"params": inner, "weight_decay": weight_decay})
    groups = [g for g in groups if g["params"]]
    optimizers = [AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]
    if name == "muon":
        # match_rms_adamw makes an update as large as AdamW's, so one learning rate suits both
        optimizers.append(Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def cosine_schedule(step: int, warmup_steps: int, progress: float, floor: float) -> float:
    """Factor of the peak learning rate: linear warm-up over warmup_steps, a cosine down to `floor` at progress 1."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return warm * (floor + (1 - floor) * cosine)


class EMA:
    """Exponential moving average of a model's parameters and buffers, under their names; tied weights once.

    The decay ramps up as (1 + updates) / (10 + updates), so that the first average is not the initial weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: t.detach().clone() for name, t in unshared(model.state_dict()).items()}

    @torch.no_grad()
    def update(self, model: nn.Module):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [live[name] for name in self.average], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module):
        """Exchange the model's weights with the averaged ones; a second call undoes it."""
        for name, tensor in unshared(model.state_dict()).items():
            kept = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)
