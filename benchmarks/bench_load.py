"""Benchmark generate.py on an idle machine and while other processes keep every core busy.

    python benchmarks/bench_load.py
    python benchmarks/bench_load.py --repeats 9 --precision int8
    python benchmarks/bench_load.py --quick                    # one short round, to check that it runs

Each round starts generate.py in its own process, first alone and then beside one endless loop per core. It runs the
released checkpoint, and a plain model with random weights (6 layers, width 384). Figures are the best of all rounds, in
tokens/s without the start-up time. `ratio` is the speed alone over the speed on the busy machine. Prints a table, then
one JSON line, whose `machine` names the number of threads that is used when alone. The exit code is 1 if a ratio is
above 3.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
from common import ROOT, machine, print_json, print_table

from src.checkpoint import save_checkpoint
from src.config import parse_flags, run
from src.model import TRMModel
from src.model_config import TRMConfig
from src.tokenizer import read_tokenizer

LIMIT = 3  # largest acceptable ratio


@dataclass
class LoadBench:
    """What to measure.

    Args:
        new_tokens: tokens to generate per run
        repeats: number of rounds
        precision: --precision of generate.py
        quick: run one short round and accept any ratio, to check that the benchmark runs
    """

    new_tokens: int = 300
    repeats: int = 5
    precision: str = "fp32"
    quick: bool = False

    def __post_init__(self):
        if self.quick:
            self.new_tokens, self.repeats = 8, 1


def speed(folder, args: LoadBench) -> float:
    """Run generate.py once and return the tokens/s that it prints on stderr."""
    words = (
        f"--prompt def --seed 1 --device cpu --max_new_tokens {args.new_tokens} --precision {args.precision}".split()
    )
    done = subprocess.run(
        [sys.executable, "generate.py", str(folder), *words], cwd=ROOT, capture_output=True, check=True
    )
    return float(re.search(rb"([0-9.]+) tokens/s", done.stderr)[1])


def busy_speed(folder, args: LoadBench) -> float:
    """Returns the same while one endless loop per core is running."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        return speed(folder, args)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(argv=None) -> int:
    args = parse_flags(__doc__, LoadBench, argv=argv)[0]
    tokenizer, rows = read_tokenizer("byte"), []
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 384, "n_heads": 6, "n_layers": 6, "max_seq_len": 512}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(f"{folder}/model", TRMModel(TRMConfig(recursion="none", norm="pre", **sizes)), tokenizer)
        for name, path in {"released": ROOT / "checkpoints" / "python", "6x384": f"{folder}/model"}.items():
            pairs = [(speed(path, args), busy_speed(path, args)) for _ in range(args.repeats)]
            alone, busy = (max(speeds) for speeds in zip(*pairs))
            rows.append({"model": name, "alone_tokens_per_s": alone, "busy_tokens_per_s": busy, "ratio": alone / busy})
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print_json("load", {"machine": machine(), "precision": args.precision, "rows": rows})
    return int(not args.quick and any(row["ratio"] > LIMIT for row in rows))


if __name__ == "__main__":
    run(main)
