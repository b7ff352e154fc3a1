"""Benchmark the overhead of the training engine: its loop against a bare loop that does the same steps.

    python benchmarks/bench_engine.py
    python benchmarks/bench_engine.py --d_model 384 --batch_size 32 --rounds 3
    python benchmarks/bench_engine.py --quick                  # tiny sizes, to check that it runs

The bare loop loads a batch, runs the model forward and backward, clips the gradient and updates with AdamW. The engine
is `Trainer.train` with everything it does: the moving average, the checks for non-finite values, metrics.jsonl and
TensorBoard every 10 steps, the monitor, a checkpoint every `save_every` steps, and the progress bar. Both use equal
models and windows of the standard library. Their rounds alternate, and each round of the engine continues the training
of the round before. Evaluations are left out, because a bare loop would have to do them too. Prints the median
milliseconds per step of each loop, then one JSON line.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import interleaved, machine, median, print_json, print_table

from src.config import parse_flags, run
from src.dataset import DataConfig
from src.model import TRMConfig
from src.optim import make_optimizers
from src.runtime import autocast
from src.training.create import create_trainer
from src.training.train_config import RuntimeConfig, Settings, TrainConfig


@dataclass
class EngineBench:
    """What to measure.

    Args:
        rounds: measured rounds, after one warm-up round
        steps: training steps per round
        save_every: steps between checkpoints
        batch_size: windows per step
        seq_len: tokens per window
        d_model: width of the model
        num_workers: loading processes of each loop
        threads: number of CPU threads; torch chooses if not given
        compile: use torch.compile; if not given, decided as in training
        quick: use tiny sizes and few steps, to check that the benchmark runs
    """

    rounds: int = 3
    steps: int = 200
    save_every: int = 200
    batch_size: int = 16
    seq_len: int = 256
    d_model: int = 256
    num_workers: int = 0
    threads: int | None = None
    compile: bool | None = None
    quick: bool = False

    def __post_init__(self):
        if self.quick:
            self.rounds, self.steps, self.save_every, self.batch_size, self.seq_len = 1, 4, 2, 2, 16
            self.d_model, self.compile = 32, False
        if min(self.rounds, self.steps, self.save_every, self.batch_size) < 1:
            raise ValueError("rounds, steps, save_every and batch_size must be 1 or more")


def make_trainer(args: EngineBench, folder: Path):
    """Returns a trainer whose evaluation is switched off."""
    train = TrainConfig(
        save_dir=str(folder), batch_size=args.batch_size, max_steps=args.steps, save_every=args.save_every,
        sample_tokens=0, compile=args.compile, warmup_steps=1, eval_batches=0,
    )  # fmt: skip
    model = TRMConfig(d_model=args.d_model, max_seq_len=args.seq_len, deep_steps=1, supervision_steps=1)
    data = DataConfig(tokenizer="byte", num_workers=args.num_workers)
    trainer = create_trainer(Settings(train=train, data=data, model=model, runtime=RuntimeConfig()))
    trainer.evaluate = lambda limit: {"valid_loss": float("inf")}
    return trainer


class Bare:
    """The bare loop, which does the same steps as the engine with the model, precision and loader of a trainer."""

    def __init__(self, trainer):
        self.trainer, config = trainer, trainer.config
        betas = (0.9, config.beta2)
        (self.optimizer,) = make_optimizers(trainer.raw, config.optimizer, config.lr, config.weight_decay, betas)

    def __call__(self):
        trainer, model = self.trainer, self.trainer.raw
        trainer.enter_stage()
        model.train()
        for _ in range(trainer.config.max_steps):
            batch = {name: t.to(trainer.device) for name, t in next(trainer.loader).items()}
            with autocast(trainer.device, trainer.precision):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


def engine(trainer, steps: int):
    """Train `steps` more steps with the engine."""
    trainer.curriculum.total_steps = trainer.step + steps
    trainer.train()


def main(argv=None) -> int:
    (args,) = parse_flags(__doc__, EngineBench, argv=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        whole = make_trainer(args, Path(folder) / "engine")
        jobs = {"bare": Bare(make_trainer(args, Path(folder) / "bare")), "engine": lambda: engine(whole, args.steps)}
        interleaved(jobs, 1)
        times = {name: median(t) / args.steps for name, t in interleaved(jobs, args.rounds).items()}
    overhead = times["engine"] / times["bare"] - 1
    print_table(["loop", "ms per step"], [[name, 1000 * elapsed] for name, elapsed in times.items()])
    print(f"the engine costs {100 * overhead:.1f} % of the bare loop's time")
    settings = {name: value for name, value in vars(args).items() if name != "quick"}
    print_json("engine", {"machine": machine(), **settings, "seconds_per_step": times, "overhead": overhead})
    return 0


if __name__ == "__main__":
    run(main)
