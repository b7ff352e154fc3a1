"""Train a Tiny Recursive Model to solve puzzles: Sudoku, mazes, ARC.

    python train_puzzles.py                                     # 4 x 4 Sudoku, generated: needs no data and no flags
    python train_puzzles.py --config configs/sudoku6.yaml       # a recipe
    python train_puzzles.py --puzzle sudoku9 --train_paths sudoku_train.csv.gz --valid_paths sudoku_test.csv.gz
    python train_puzzles.py --puzzle maze9x9 --save_dir runs/maze
    python train_puzzles.py --config runs/puzzles/config.yaml --resume           # continue a run that was stopped

Each training step is one supervision step of every row of the batch, and one update of the weights. A row that halts
takes a new puzzle. Evaluations solve puzzles that are held out by orbit: no symmetry turns one into a training puzzle.

Writes a run folder, `save_dir`: the settings in config.yaml, the log in metrics.jsonl, TensorBoard events,
learning_curve.png, and checkpoints in step_NNNNNNNN/. The links `last` and `best` point to the newest checkpoint and to
the one with the highest exact accuracy. Ctrl-C saves a checkpoint before it ends the run, and --resume continues from
it. Messages go to stderr.
"""

import sys

from src.config import before_torch, run
from src.tasks.puzzle_config import PuzzleSettings, read_settings

__all__ = ["create_puzzle_trainer", "main", "parse_args"]


@before_torch
def parse_args(argv=None) -> PuzzleSettings:
    return read_settings(argv, __doc__)


from src.tasks.puzzle_eval import describe
from src.tasks.puzzle_trainer import create_puzzle_trainer


def main(argv=None):
    trainer = create_puzzle_trainer(parse_args(argv))
    figures = trainer.train()
    trainer.accelerator.end_training()
    if figures and trainer.is_main:
        print(f"done: step {trainer.step}, {describe(figures)}; checkpoint: {trainer.folder}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
