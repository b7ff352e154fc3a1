"""Benchmark memory: the peak of a training step at several recursion depths, and the peak of loading a large corpus.

    python benchmarks/bench_memory.py                          # takes a few minutes, mostly for the corpus
    python benchmarks/bench_memory.py --corpus_mb 0            # without the corpus
    python benchmarks/bench_memory.py --quick                  # tiny sizes, to check that it runs

Each measurement runs in a fresh process. Prints two tables, then one JSON line.

Training: peak resident memory (RSS) of three eager steps of the trainer (forward and backward pass per supervision
step, AdamW). It should stay flat for supervision_steps 1 to 8, and for deep_steps 1 to 4 with grad_deep_steps 1. It
should grow with full_bptt. `step` is the memory that the steps added after everything was loaded. `growth` compares the
peak with the first line of its group. `step growth` compares `step` in the same way; this is stricter, because `step`
leaves out the memory that everything else takes.

Corpus: a .jsonl.gz of `corpus_mb` MB (10^6 bytes) is made in a temporary folder by repeating the source code of the
standard library. `prepare_data` loads it; the peak RSS should stay under 1 GiB.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from common import ROOT, machine, print_json, print_table

from src.config import parse_flags, run
from src.errors import UserError
from src.runtime import GIB, peak_rss_bytes
from src.training.train_config import RuntimeConfig

MIB = 1024**2


@dataclass
class MemoryBench:
    """What to measure.

    Args:
        batch_size: windows per step
        seq_len: tokens per window
        d_model: width of the model
        steps: training steps per process
        corpus_mb: size of the compressed corpus in MB; 0 skips the corpus
        corpus_tokenizer: tokenizer for the corpus: byte, or sentencepiece (trained on the spot)
        precision: precision of training: auto, fp32, bf16 or fp16
        quick: use tiny sizes and few settings, to check that the benchmark runs
        child: internal: the one measurement to do in a child process, as JSON
    """

    batch_size: int = 32
    seq_len: int = 256
    d_model: int = 256
    steps: int = 3
    corpus_mb: float = 200.0
    corpus_tokenizer: str = "byte"
    precision: str = "auto"
    quick: bool = False
    child: str | None = None

    def __post_init__(self):
        if self.quick:
            self.batch_size, self.seq_len, self.d_model, self.corpus_mb = 2, 16, 32, min(0.2, self.corpus_mb)
        if min(self.batch_size, self.seq_len, self.steps) < 1 or self.corpus_mb < 0:
            raise ValueError("batch_size, seq_len and steps must be 1 or more, corpus_mb 0 or more")


def parse_args(argv=None) -> MemoryBench:
    return parse_flags(__doc__, MemoryBench, argv=argv)[0]


def groups(args: MemoryBench) -> dict[str, list[dict]]:
    """Returns {what varies: settings of the model}; the others of a group are compared with its first setting."""
    supervision, deep, full = ((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)) if not args.quick else ((1, 2), (1, 2), (1,))
    return {
        "supervision_steps": [{"supervision_steps": n, "deep_steps": 2} for n in supervision],
        "deep_steps": [{"supervision_steps": 2, "deep_steps": n, "grad_deep_steps": 1} for n in deep],
        "full_bptt": [{"supervision_steps": n, "deep_steps": 1, "full_bptt": True} for n in full],
    }


# ---- in the child process -------------------------------------------------------------------------------------------


def training_peak(args: MemoryBench, settings: dict) -> dict:
    """Run training steps.  Returns RSS in bytes before the first step, and the peak after the last."""
    from src.model import TRMConfig, TRMModel
    from src.trainer import Trainer
    from src.training.train_config import TrainConfig

    config = TRMConfig(vocab_size=256, d_model=args.d_model, max_seq_len=args.seq_len, **settings)
    torch.manual_seed(0)
    runtime = RuntimeConfig(precision=args.precision)
    trainer = Trainer(
        TrainConfig(batch_size=args.batch_size, compile=False), TRMModel(config), None, None, None, runtime
    )
    ids, targets = torch.randint(0, 256, (2, args.batch_size, args.seq_len)).unbind()
    before = psutil.Process().memory_info().rss
    for _ in range(args.steps):
        trainer.train_step({"input_ids": ids, "target_ids": targets})
    return {"before": before, "peak": peak_rss_bytes()}


def corpus_peak(path: str, cache_dir: str, tokenizer: str, seq_len: int) -> dict:
    """Prepare a corpus and load 20 shuffled batches.  Returns peak RSS in bytes, tokens, bytes of text, seconds."""
    from src.dataset import DataConfig, create_dataloader, prepare_data

    start = time.perf_counter()
    data = DataConfig(train_paths=[path], tokenizer=tokenizer, cache_dir=cache_dir)
    _, train_set, _ = prepare_data(data, None, seq_len)
    batches = iter(create_dataloader(train_set, 2, seed=0))
    for _ in range(20):
        next(batches)
    facts = {"peak": peak_rss_bytes(), "tokens": train_set.n_targets, "text_bytes": train_set.store.n_bytes}
    return facts | {"seconds": time.perf_counter() - start}


def measure_here(args: MemoryBench) -> None:
    job = json.loads(args.child)
    print(json.dumps(corpus_peak(**job["corpus"]) if "corpus" in job else training_peak(args, job)))


# ---- in the parent process ------------------------------------------------------------------------------------------


def in_fresh_process(args: MemoryBench, job: dict) -> dict:
    """Do one measurement in a child process and return its figures; its messages go to stderr."""
    flags = ["batch_size", "seq_len", "d_model", "steps", "precision"]
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    command += [word for name in flags for word in (f"--{name}", str(getattr(args, name)))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the process for {job} ended with code {done.returncode}: see its message above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_training(args: MemoryBench) -> list[dict]:
    """Returns a row per setting: memory before, peak, added by the steps, and growth within its group."""
    rows = []
    for varies, settings in groups(args).items():
        first = None
        for setting in settings:
            facts = in_fresh_process(args, setting)
            facts["step"] = facts["peak"] - facts["before"]
            first = first or facts
            growth = {
                f"{prefix}growth_percent": 100 * (facts[name] / max(1, first[name]) - 1)
                for prefix, name in (("", "peak"), ("step_", "step"))
            }
            rows.append({"varies": varies, "settings": setting, **facts, **growth})
    return rows


def write_corpus(path: Path, size: float) -> None:
    """Write a .jsonl.gz of about `size` bytes: one file of the standard library per line, repeated as gzip members."""
    from src.data.corpus import stdlib_files

    block, length = [], 0
    for file in sum(stdlib_files(), []):
        block.append(json.dumps({"text": Path(file).read_text(encoding="utf-8")}) + "\n")
        length += len(block[-1])
        if length > 4 * size:  # enough for a small corpus
            break
    packed = gzip.compress("".join(block).encode(), compresslevel=6, mtime=0)
    with path.open("wb") as out:
        for _ in range(max(1, round(size / len(packed)))):
            out.write(packed)


def measure_corpus(args: MemoryBench) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl.gz"
        write_corpus(path, args.corpus_mb * 1e6)
        job = {"path": str(path), "cache_dir": os.path.join(folder, "cache"), "tokenizer": args.corpus_tokenizer}
        facts = in_fresh_process(args, {"corpus": job | {"seq_len": args.seq_len}})
        return {"file_bytes": path.stat().st_size, "tokenizer": args.corpus_tokenizer, **facts}


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.child:
        return measure_here(args)
    rows = measure_training(args)
    lines = [
        [
            row["varies"],
            " ".join(f"{name}={value}" for name, value in row["settings"].items()),
            *(row[name] / MIB for name in ("peak", "step")),
            f"{row['growth_percent']:+.1f}",
            f"{row['step_growth_percent']:+.1f}",
        ]
        for row in rows
    ]
    print_table(["varies", "settings", "peak MiB", "step MiB", "growth %", "step growth %"], lines)
    corpus = measure_corpus(args) if args.corpus_mb else None
    if corpus:
        line = [
            f"{corpus['file_bytes'] / 1e6:.1f} MB",
            corpus["text_bytes"] / 1e6,
            corpus["seconds"],
            corpus["peak"] / GIB,
        ]
        print()
        print_table(["corpus", "text MB", "seconds", "peak GiB"], [line])
    print_json("memory", {"machine": machine(), "training": rows, "corpus": corpus})


if __name__ == "__main__":
    run(main)
