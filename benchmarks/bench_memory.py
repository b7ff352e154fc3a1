"""Memory: the peak of a training step over recursion depth, and of loading a large corpus; a fresh process each.

    python benchmarks/bench_memory.py                          # some minutes, most of them for the corpus
    python benchmarks/bench_memory.py --corpus_mb 0            # without the corpus
    python benchmarks/bench_memory.py --quick                  # tiny sizes: does it run?

Training: peak resident memory (RSS) of three eager steps of the trainer (forward and backward per supervision step,
AdamW), for supervision_steps 1 to 8 and for deep_steps 1 to 4 with grad_deep_steps 1, where it should stay flat, and
for full_bptt, where it should not. `step` is what the steps added to a process that had already loaded everything;
`growth` is that of the peak, `step growth` the stricter one of `step`, both against the first line of their group.

Corpus: a .jsonl.gz of `corpus_mb` MB (10^6 bytes) is made in a temporary folder from the standard library's sources,
again and again, and loaded by `prepare_data`; its peak RSS should stay under 1 GiB. Prints two tables, one JSON line.
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
        d_model: width
        steps: training steps per process
        corpus_mb: size of the compressed corpus in MB; 0 = leave it out
        corpus_tokenizer: byte, or sentencepiece (trained on the spot)
        precision: as in training
        quick: tiny sizes and few settings: does it run?
        child: used by the script itself: the one setting to measure, as JSON
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
    """{what varies: settings of the model}; the first setting of a group is what the others are compared with."""
    supervision, deep, full = ((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)) if not args.quick else ((1, 2), (1, 2), (1,))
    return {
        "supervision_steps": [{"supervision_steps": n, "deep_steps": 2} for n in supervision],
        "deep_steps": [{"supervision_steps": 2, "deep_steps": n, "grad_deep_steps": 1} for n in deep],
        "full_bptt": [{"supervision_steps": n, "deep_steps": 1, "full_bptt": True} for n in full],
    }


# ---- in the fresh process -------------------------------------------------------------------------------------------


def training_peak(args: MemoryBench, settings: dict) -> dict:
    """Bytes: RSS before the first step, and the peak after the last."""
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
    """Peak RSS in bytes after a corpus was prepared and some shuffled batches were drawn from it."""
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


# ---- in the process that was started --------------------------------------------------------------------------------


def in_fresh_process(args: MemoryBench, job: dict) -> dict:
    """What a process of its own measured; its messages go to stderr."""
    flags = ["batch_size", "seq_len", "d_model", "steps", "precision"]
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    command += [word for name in flags for word in (f"--{name}", str(getattr(args, name)))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the process for {job} ended with code {done.returncode}: see its message above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_training(args: MemoryBench) -> list[dict]:
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
    """A .jsonl.gz of about `size` bytes: the standard library's files, one a line, as equal gzip members in a row."""
    from src.data.corpus import stdlib_files

    block, length = [], 0
    for file in sum(stdlib_files(), []):
        block.append(json.dumps({"text": Path(file).read_text(encoding="utf-8")}) + "\n")
        length += len(block[-1])
        if length > 4 * size:  # a small corpus needs no more of it
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
