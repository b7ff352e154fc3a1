"""Train a language model: a recursive one (TRM), a looped transformer, or a plain Llama.

    python train_trm_lm.py                                    # on the Python standard library: no download, no paths
    python train_trm_lm.py --config configs/demo.yaml --max_minutes 3
    python train_trm_lm.py --train_paths wiki/train_*.jsonl.gz --valid_paths wiki/validation_0.jsonl.gz
    python train_trm_lm.py --recursion none --n_layers 6 --norm pre --save_dir runs/llama
    python train_trm_lm.py --config runs/trm/config.yaml --resume

Writes the run folder `save_dir`: config.yaml, metrics.jsonl, TensorBoard events, learning_curve.png, samples.txt, and
checkpoints step_NNNNNNNN/ with the links last and best. Ctrl-C ends a run with a checkpoint; --resume goes on from it.
"""

import sys

from src.config import before_torch, run
from src.training.train_config import Settings, read_settings

__all__ = ["create_model", "create_trainer", "evaluate", "main", "parse_args", "save_checkpoint"]


@before_torch
def parse_args(argv=None) -> Settings:
    return read_settings(argv, __doc__)


from src.checkpoint import save_checkpoint
from src.evaluation.evaluation import evaluate
from src.losses import bits_text
from src.training.create import create_model, create_trainer


def main(argv=None):
    trainer = create_trainer(parse_args(argv))
    figures = trainer.train()
    trainer.accelerator.end_training()
    if figures and trainer.is_main:
        print(
            f"done: step {trainer.step}, validation {figures['valid_loss']:.4f} nats/token"
            f"{bits_text(figures['valid_bits_per_byte'])}; generate with: "
            f"python generate.py {trainer.folder} --prompt '...'",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
