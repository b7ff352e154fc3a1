"""Several training runs, one after the other, in the processes of torchrun: python -m torch.distributed.run ... SPEC.

SPEC is a JSON file of [{"settings": {...}, "stop": {"rank": r, "step": s, "signal": name}}, ...]. With "stop", rank r
sends the signal to itself at step s. Each rank writes a file SPEC.rank, which has for each run whether the parameters
are sharded, how many numbers this rank holds, and the step at which the run ended."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch.distributed.tensor import DTensor
from trainers import during, puzzle_settings, trainer_of

from src.tasks.puzzle_trainer import create_puzzle_trainer
from src.training import monitor


def main(spec):
    found = []
    monitor.plot_learning_curve = lambda *args: None  # takes longer than a tiny run
    for run in json.loads(Path(spec).read_text()):
        values, stop = run["settings"], run.get("stop", {})
        trainer = create_puzzle_trainer(puzzle_settings(values)) if "n_puzzles" in values else trainer_of(values)
        if stop.get("rank") == trainer.rank:
            number = getattr(signal, stop["signal"])
            during(trainer, stop["step"], lambda number=number: os.kill(os.getpid(), number))
        parameters = list(trainer.raw.parameters())
        figures = trainer.train()
        found.append(
            {
                "figures": bool(figures),
                "sharded": all(isinstance(p, DTensor) for p in parameters),
                "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters),
                "whole": sum(p.numel() for p in parameters),
                "step": trainer.step,
            }
        )
    Path(f"{spec}.{trainer.rank}").write_text(json.dumps(found))
    trainer.accelerator.end_training()  # a process that exits while another still talks to it would make that one abort


if __name__ == "__main__":
    from src.config import run

    run(lambda: main(sys.argv[1]))
