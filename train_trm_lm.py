"""Train a language model: a Tiny Recursive Model (TRM), a looped transformer, or a plain transformer (Llama).

    python train_trm_lm.py                                    # on Python's standard library: needs no data and no flags
    python train_trm_lm.py --config configs/demo.yaml --max_minutes 10           # a recipe, with one setting changed
    python train_trm_lm.py --train_paths wiki/train_*.jsonl.gz --valid_paths wiki/validation_0.jsonl.gz
    python train_trm_lm.py --recursion none --n_layers 6 --save_dir runs/llama                 # a plain transformer
    python train_trm_lm.py --config runs/trm/config.yaml --resume                # continue a run that was stopped
    python train_trm_lm.py --records true --train_paths gsm8k/train.jsonl        # questions with answers
    python train_trm_lm.py --records true --train_paths gsm8k/train.jsonl --overfit 10     # can it learn ten by heart?

Without --config and --init_from, the settings are those of configs/default.yaml, which are also the defaults below. A
setting that a --config file leaves out has the default of the code; --config FILE --help shows it. To change only some
settings of the default recipe: --config configs/default.yaml --config FILE.

Writes a run folder, `save_dir`: the settings in config.yaml, the log in metrics.jsonl, TensorBoard events,
learning_curve.png, sample texts in samples.txt, and checkpoints in step_NNNNNNNN/. The links `last` and `best` point to
the newest checkpoint and to the one with the lowest validation loss (with recursion_from: since the full recursion
began). Ctrl-C saves a checkpoint before it ends the run, and --resume continues from it. Messages go to stderr.
"""

import os
import sys
from pathlib import Path

from src.config import before_torch, flag_value, run
from src.errors import UserError
from src.training.train_config import Settings, read_settings

__all__ = ["create_model", "create_trainer", "evaluate", "main", "parse_args", "save_checkpoint"]

RECIPE = Path(__file__).resolve().parent / "configs" / "default.yaml"


@before_torch
def parse_args(argv=None) -> Settings:
    argv = list(sys.argv[1:] if argv is None else argv)
    if flag_value(argv, "config") is None and flag_value(argv, "init_from") in (None, "", "null"):
        argv = ["--config", os.path.relpath(RECIPE), *argv]
    settings = read_settings(argv, __doc__)
    if settings.model.token_loss != "softmax":
        raise UserError("token_loss stablemax is for puzzles: text is evaluated with softmax, leave --token_loss out")
    return settings


from src.checkpoint import save_checkpoint
from src.evaluation.evaluation import evaluate
from src.losses import bits_text
from src.rag.pipeline import build_rag
from src.training.create import create_model, create_trainer
from src.training.depths import puts_off
from src.training.overfit import overfit


def main(argv=None):
    settings = parse_args(argv)
    if settings.train.overfit is not None:
        return int(not overfit(settings))
    trainer = create_trainer(settings, build_rag)
    figures = trainer.train()
    trainer.accelerator.end_training()
    if trainer.is_main and puts_off(settings.train, trainer.raw.config) and not trainer.recursion_begun:
        share = f"{settings.train.recursion_from:.0%} of the run"
        print(f"the full recursion has not begun: it begins after {share}", file=sys.stderr)
    if figures and trainer.is_main:
        print(
            f"done: step {trainer.step}, validation {figures['valid_loss']:.4f} nats/token"
            f"{bits_text(figures['valid_bits_per_byte'])}; generate with: "
            f"python generate.py {trainer.folder} --prompt '...'",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    run(main)
