"""Evaluation of a puzzle model: exact, cell and halting accuracy after each supervision step, and by difficulty."""

from typing import NamedTuple

import numpy as np
import torch

from src.model import Carry, TRMModel
from src.runtime import autocast
from src.tasks.puzzle_data import difficulty_bins
from src.tasks.puzzle_rows import targets_of
from src.tasks.puzzles import Grids


class Answers(NamedTuple):
    """What a model answered to N puzzles after each of S steps."""

    rows: np.ndarray  # (N,) row numbers of the puzzles
    is_exact: np.ndarray  # (S, N) whether all target cells are right
    cells: np.ndarray  # (S, N) fraction of the target cells that are right
    halts: np.ndarray | None  # (S, N) whether the halting head calls the answer right; None without a head
    loss: np.ndarray  # (N,) loss after the last step, in nats per cell; the mean over its batch


@torch.no_grad()
def answer(model: TRMModel, grids: Grids, rows: np.ndarray, steps: int | None, precision: str, batch_size) -> Answers:
    """Solves the puzzles with these row numbers.  steps: supervision steps; default those of the model."""
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    parts = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = [torch.from_numpy(array[part].astype(np.int64)).to(device) for array in grids[:3]]
        # a compiled model has one shape; compiling it again for the last, smaller batch would take longer than it saves
        stance = "default" if len(part) == batch_size else "force_eager"
        with torch.compiler.set_stance(stance), autocast(device, precision):
            parts.append((part, *_solve(model, *batch, steps)))
    model.train(was_training)
    rows, is_exact, cells, halts, loss = zip(*parts, strict=True)
    halts = None if halts[0] is None else np.concatenate(halts, 1)
    is_exact, cells = np.concatenate(is_exact, 1), np.concatenate(cells, 1)
    return Answers(np.concatenate(rows), is_exact, cells, halts, np.concatenate(loss))


def _solve(model, inputs, labels, puzzle_ids, steps):
    targets, found = targets_of(labels), []
    is_trm = model.config.recursion == "trm"
    carry, puzzle_ids = None, puzzle_ids if model.config.prefix_tokens else None
    for _ in range((steps or model.config.train_steps) if is_trm else 1):  # one by one, to keep memory small
        out = model(inputs, targets, supervision_steps=1, carry=carry, return_steps=True, puzzle_ids=puzzle_ids)
        carry = Carry(out.carry.y, out.carry.z, 0) if is_trm else None
        is_right = (out.logits.argmax(-1) == labels) | (labels == 0)
        found.append(((~is_right).sum(-1), None if out.halt_logits is None else out.halt_logits > 0))
    # only now to the CPU: a GPU then gets all steps without waiting
    n_wrong = torch.cat([n_wrong for n_wrong, _ in found]).cpu().numpy()
    halts = None if found[0][1] is None else torch.cat([halts for _, halts in found]).cpu().numpy()
    n_cells = np.maximum(1, (labels != 0).sum(-1).cpu().numpy())
    return n_wrong == 0, 1 - n_wrong / n_cells, halts, np.full(len(inputs), out.ce_loss.item())


def figures_of(grids: Grids, answers: list[Answers]) -> dict:
    """Figures for metrics.jsonl from the answers of all processes.

    valid_loss, valid_exact_accuracy, valid_cell_accuracy and valid_halt_accuracy are those after the last step;
    valid_exact_step_N and the like those after step N; valid_exact_clues_6 and the like are exact accuracy after the
    last step among the puzzles of a difficulty."""
    is_exact, cells = (np.concatenate([getattr(a, name) for a in answers], 1) for name in ("is_exact", "cells"))
    rows, loss = (np.concatenate([getattr(a, name) for a in answers]) for name in ("rows", "loss"))
    by_step = {"exact": is_exact.mean(1), "cell": cells.mean(1)}
    if answers[0].halts is not None:
        by_step["halt"] = (np.concatenate([a.halts for a in answers], 1) == is_exact).mean(1)
    figures = {"valid_loss": loss.mean()} | {f"valid_{name}_accuracy": values[-1] for name, values in by_step.items()}
    for name, values in by_step.items():
        figures |= {f"valid_{name}_step_{step}": value for step, value in enumerate(values, start=1)}
    for name, is_in in difficulty_bins(grids.difficulty).items():
        if is_in[rows].any():
            figures[f"valid_exact_{name}"] = is_exact[-1][is_in[rows]].mean()
    return {name: float(value) for name, value in figures.items()}


def describe(figures: dict) -> str:
    """One line of an evaluation: accuracies after the last step, and exact accuracy after each step."""
    by_step = [figures[name] for name in figures if name.startswith("valid_exact_step_")]
    line = f"exact {figures['valid_exact_accuracy']:.4f}, cells {figures['valid_cell_accuracy']:.4f}"
    if "valid_halt_accuracy" in figures:
        line += f", halting {figures['valid_halt_accuracy']:.4f}"
    steps = [step for step in range(1, len(by_step) + 1) if step & (step - 1) == 0 or step == len(by_step)]
    return f"{line}; exact by step: " + ", ".join(f"{step}: {by_step[step - 1]:.3f}" for step in steps)
