"""Exit rules of experiments/depth.py: what a loop answers, and after how many visits, when each of them stops it."""

from typing import NamedTuple

import numpy as np
import torch

from src.losses import IGNORE, kl_divergence
from src.model import TRMModel
from src.model_config import ExitRule

KL_THRESHOLDS = (1e-3, 1e-4)
SHUFFLE_SEED = 10**6


def right_answers(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether each answer is right; true for tokens without one."""
    return (answers == targets) | (targets == IGNORE)


def exact(is_right: np.ndarray) -> float:
    """Share of rows (N, L) with every answer right."""
    return float(is_right.all(-1).mean())


class Run(NamedTuple):
    """What the loop did with N rows."""

    has_answer: np.ndarray  # (N, L)
    is_right: np.ndarray  # (visits, N, L): after each visit, if all tokens run on
    adaptive: dict[str, tuple[np.ndarray, np.ndarray]]  # {rule: (whether answers are right, depths of tokens)}, (N, L)
    by_row: bool = False  # whether all tokens of a row stop together

    @classmethod
    def of(cls, model: TRMModel, ids: torch.Tensor, targets: np.ndarray, most: int, patience: int) -> "Run":
        """Runs the model for `most` visits without an exit rule, and with each rule."""
        with torch.no_grad():
            every = model(ids, exit=ExitRule(max_recursion_depth=most), return_steps=True)
        is_right = right_answers(every.logits.argmax(-1).numpy(), targets)
        if model.config.causal:
            return cls(targets != IGNORE, is_right, stop_tokens(model, ids, targets, most, patience))
        return cls(targets != IGNORE, is_right, stop_rows(every.logits, targets, patience), by_row=True)

    @classmethod
    def join(cls, runs: list["Run"]) -> "Run":
        """The rows of several runs together."""
        adaptive = {
            name: tuple(np.concatenate([run.adaptive[name][i] for run in runs]) for i in (0, 1))
            for name in runs[0].adaptive
        }
        is_right = np.concatenate([run.is_right for run in runs], axis=1)
        return cls(np.concatenate([run.has_answer for run in runs]), is_right, adaptive, runs[0].by_row)

    def figures(self, main_rule: str) -> dict:
        """Exact rows after each visit (all tokens run on), and exact rows and mean visits per answer of each rule.

        `fixed` and `random` get the mean visits of main_rule, one of the adaptive rules."""
        most, answers = len(self.is_right), self.has_answer
        by_visit = [exact(right) for right in self.is_right]
        rules = {"full": {"exact": by_visit[-1], "visits": float(most)}}
        for name, (right, depths) in self.adaptive.items():
            rules[name] = {"exact": exact(right), "visits": float(depths[answers].mean())}
        fixed = min(most, int(np.ceil(rules[main_rule]["visits"])))
        rules["fixed"] = {"exact": by_visit[fixed - 1], "visits": float(fixed)}
        shuffled, rng = self.adaptive[main_rule][1].copy(), np.random.default_rng(SHUFFLE_SEED)
        if self.by_row:
            shuffled = rng.permutation(shuffled)
        else:
            shuffled[answers] = rng.permutation(shuffled[answers])
        # number of last visits in which the answer stays right, counted backwards from the end
        stays_right = np.cumprod(self.is_right[::-1], axis=0).sum(0)
        for name, depths in (("random", shuffled), ("oracle", np.clip(most - stays_right + 1, 1, most))):
            right = np.take_along_axis(self.is_right, depths[None] - 1, axis=0)[0]
            rules[name] = {"exact": exact(right), "visits": float(depths[answers].mean())}
        enough = next(visit for visit, share in enumerate(by_visit, start=1) if share >= 0.99 * by_visit[-1])
        return {"exact": by_visit[-1], "by_visit": by_visit, "enough_visits": enough, "rules": rules}


def stop_tokens(model: TRMModel, ids: torch.Tensor, targets: np.ndarray, most: int, patience: int) -> dict:
    """Runs a causal model with the rules that stop each token by itself.  Returns `adaptive` of a Run."""
    rules = {"halt": ExitRule("halt", most, patience=patience)}
    for threshold in KL_THRESHOLDS:
        rules[f"kl {threshold:g}"] = ExitRule("kl", most, kl_threshold=threshold, patience=patience)
    adaptive = {}
    with torch.no_grad():
        for name, rule in rules.items():
            out = model(ids, exit=rule)
            adaptive[name] = right_answers(out.logits.argmax(-1).numpy(), targets), out.carry.steps.numpy()
    return adaptive


def stop_rows(logits: torch.Tensor, targets: np.ndarray, patience: int) -> dict:
    """Rules for a model in which all tokens see each other, so that a row stops as a whole.  Returns `adaptive`.

    logits: (visits, N, L, V) without a rule. A row stops after `patience` visits in a row in which no token's
    distribution changed by more than the threshold. Rows do not see each other, so their answers are in logits."""
    adaptive, answers, most = {}, logits.argmax(-1).numpy(), len(logits)
    changes = torch.stack([kl_divergence(new, old).amax(-1) for old, new in zip(logits, logits[1:])]).numpy()
    for threshold in KL_THRESHOLDS:
        calm, depths = np.zeros(len(targets), dtype=np.int64), np.full(len(targets), most)
        for visit, change in enumerate(changes, start=2):
            calm = np.where(change < threshold, calm + 1, 0)
            depths = np.where((depths == most) & (calm == patience), visit, depths)
        at_exit = np.take_along_axis(answers, depths[None, :, None] - 1, axis=0)[0]
        adaptive[f"kl {threshold:g}"] = right_answers(at_exit, targets), np.tile(depths[:, None], targets.shape[1])
    return adaptive
