"""Optimizers and parameter groups, learning-rate schedules, averaged weights, and AdamW written out for reading."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from src.runtime import DTYPES, choose_precision


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float, betas, puzzle=None) -> list[Optimizer]:
    """Returns [AdamW], or [AdamW, Muon]: Muon for the matrices inside blocks, AdamW for the rest (arXiv:2502.16982).

    name: adamw, muon, or muoneq (Muon with rows of equal norm). Weight decay applies to matrices only, not to gains,
    biases and embeddings. puzzle: (learning rate, weight decay) of a last optimizer, SparseSignSGD, for the embeddings
    of puzzle identifiers; None: AdamW trains them too."""
    matrices, head, others, tables = [], [], [], []
    for path, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if puzzle is not None and path == "puzzle_embed.weight":
            tables.append(p)
        elif p.ndim == 2 and not path.startswith(("embed", "pos_embed", "puzzle_embed", "head", "q_head")):
            matrices.append(p)
        elif path == "head.weight":  # a tied head is the embedding, which is in `others`
            head.append(p)
        else:
            others.append(p)
    groups = [{"params": head, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        groups.append({"params": matrices, "weight_decay": weight_decay})
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]
    if name != "adamw":
        optimizers.append(Muon(matrices, lr, weight_decay, equal_rows=name == "muoneq"))
    if tables:
        optimizers.append(SparseSignSGD(tables, *puzzle))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # the schedule sets lr = peak_lr * factor at every step
    return optimizers


class Muon(torch.optim.Muon):
    """A faster version of torch's Muon (https://kellerjordan.github.io/posts/muon).  Its updates have AdamW's size.

    It orthogonalises all matrices of the same shape in one batch, and it uses bf16 only if the hardware supports it: on
    other CPUs, bf16 products take longer than the whole rest of a small model's step.

    equal_rows: MuonEq-R (arXiv:2603.28254): scale each row of a matrix, the weights into one output, to norm 1 before
    the matrix is orthogonalised. Few steps of the iteration then come closer to an orthogonal matrix."""

    def __init__(self, params, lr: float, weight_decay: float, equal_rows: bool = False):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.equal_rows = equal_rows

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the loss from `closure` if one is given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params, grads, buffers, same_shape = [], [], [], {}
            self._init_group(group, params, grads, buffers)
            for p, grad, buffer in zip(params, grads, buffers):
                buffer.lerp_(grad, 1 - group["momentum"])
                same_shape.setdefault((p.shape, p.device), []).append((p, grad.lerp(buffer, group["momentum"])))
            for (shape, device), pairs in same_shape.items():
                dtype = DTYPES["bf16" if choose_precision("auto", device).value == "bf16" else "fp32"]
                updates = torch.stack([update for _, update in pairs])
                if self.equal_rows:
                    updates = F.normalize(updates, dim=2)
                updates = updates.to(dtype)
                updates = newton_schulz(updates, group["ns_coefficients"], group["ns_steps"])
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    # an orthogonal update has RMS 1 / sqrt(max(shape)); 0.2 is the usual RMS of AdamW's update
                    p.add_(update, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)
        return loss


class SparseSignSGD(Optimizer):
    """Sign-SGD with decoupled weight decay for a table of which a batch reads a few rows. It keeps no state.

        row = row (1 - lr weight_decay) - lr sign(gradient of the row),  for each row that the batch has read

    As in the authors' code of TRM for the embeddings of puzzle identifiers (arXiv:2510.04871): AdamW's moments of a row
    would decay in the many steps that do not read it. Here a row counts as read if its gradient is not 0 everywhere."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError("lr and weight_decay must be 0 or more: correct them")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update the rows that have a gradient; returns the loss from `closure` if one is given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rows = (p.grad != 0).any(-1).nonzero().squeeze(-1)
                    decayed = p[rows] * (1 - group["lr"] * group["weight_decay"])
                    p[rows] = decayed - group["lr"] * p.grad[rows].sign()
        return loss


def newton_schulz(g: Float[Tensor, "k m n"], coefficients: tuple, steps: int) -> Float[Tensor, "k m n"]:
    """Orthogonalise matrices approximately: move all their singular values s near 1 by the Newton-Schulz iteration.

    Starts from s / |s| and applies s = a s + b s^3 + c s^5 `steps` times. This needs only matrix products, no SVD."""
    a, b, c = coefficients
    x = g.mT if g.shape[1] > g.shape[2] else g  # make it wide: x @ x.mT is then the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[1] > g.shape[2] else x


def learning_rate_factor(
    schedule: Literal["cosine", "linear", "constant"],
    step: int,
    warmup_steps: int,
    progress: float,
    floor: float,
    cooldown_fraction: float = 0.2,
) -> float:
    """Returns the factor on the peak learning rate: a linear warm-up over warmup_steps, times the schedule.

    progress: the fraction of the run that is done. The schedules: cosine is half a cosine wave from 1 down to `floor`.
    linear is 1, then a straight line down to `floor` over the last `cooldown_fraction` of the run (arXiv:2405.18392).
    constant is always 1."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = min(1.0, max(0.0, progress))
    height = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": min(1.0, (1 - progress) / cooldown_fraction),
        "constant": 1.0,
    }[schedule]
    return warm * (floor + (1 - floor) * height)


def set_learning_rates(optimizers: list, factor: float):
    """Set each group's learning rate to `factor` times its peak, which is the entry peak_lr of the group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class EMA:
    """Exponential moving average of a model's parameters, {name: average}.  Tied weights are stored once.

    The decay ramps up as (1 + updates) / (10 + updates), so that the average soon forgets the initial weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module):
        """Move the average towards the model's current weights.  Call it after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [live[name].detach() for name in self.average], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module):
        """Exchange the model's weights with the averaged ones, in place.  A second call restores them."""
        for name, p in model.named_parameters():
            kept = p.clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)


class AdamW(Optimizer):
    """AdamW written out from its equations, one tensor at a time, for reading and experiments.  Training uses torch's.

        g = gradient;  t = 1, 2, ...;  c1 = 1 - beta1^t;  c2 = 1 - beta2^t
        p = p - lr weight_decay p                          decoupled decay, arXiv:1711.05101
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        textbook:   p = p - lr (m / c1) / (sqrt(v / c2) + eps)               arXiv:1412.6980, algorithm 1
        efficient:  p = p - (lr sqrt(c2) / c1) m / (sqrt(v) + eps)           the same, end of section 2

    The two forms differ only in eps: the efficient form equals the textbook form with eps / sqrt(c2), which is larger
    during the first steps. Raises ValueError for a setting out of its range."""

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        form: Literal["textbook", "efficient"] = "textbook",
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError("lr, eps and weight_decay must be 0 or more, betas in [0, 1): correct them")
        if form not in ("textbook", "efficient"):
            raise ValueError(f"form is {form!r}: choose textbook or efficient")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "form": form})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the loss from `closure` if one is given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], **{k: v for k, v in group.items() if k in self.defaults})
        return loss

    @staticmethod
    def _update(p, state, lr, betas, eps, weight_decay, form):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        m, v, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], betas
        c1, c2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        p.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_((1 - beta1) * p.grad)
        v.mul_(beta2).add_((1 - beta2) * p.grad**2)
        if form == "textbook":
            p.sub_(lr * (m / c1) / ((v / c2).sqrt() + eps))
        else:
            p.sub_(lr * c2**0.5 / c1 * m / (v.sqrt() + eps))
