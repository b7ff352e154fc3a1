"""Benchmark a puzzle model: one supervision step of training and of evaluation, against the TRM authors' code.

    python benchmarks/bench_puzzles.py --peer ../TinyRecursiveModels   # a checkout of the authors' repository
    python benchmarks/bench_puzzles.py --mixers mlp --precisions bf16 --rounds 15 --peer ../TinyRecursiveModels
    python benchmarks/bench_puzzles.py                                 # without a peer: compiled against eager
    python benchmarks/bench_puzzles.py --quick                         # tiny sizes, to check that it runs

Both sides have the same weights, the same boards and torch's fused AdamW. A training step is a supervision step forward
and backward, the row's correctness, and the update. An evaluation step is the forward pass, the loss and the row's
correctness. Each step continues from the state of the one before.

Each side runs in a process of its own, because ours changes the allocator of its process (`keep_freed_memory`, as
training does). The processes take turns, one step each. Times are the CPU time of the process on a CPU, so that other
programs on the machine disturb them less, and wall time on a GPU or with more than one thread.

    eager, compiled    our model without and with torch.compile
    peer               the authors' code, eager; --peer_compile adds `peer_compiled`, with torch.compile on all of it
    ratio              the peer's time over ours, per round: median, then lowest and highest
    difference         of the logits after one step, the largest, relative to the largest logit; in bf16 it is rounding

The authors' code needs pydantic and einops (`pip install pydantic einops`). If it cannot be imported, or without
--peer, the comparison is left out with a line on stderr. Prints a table, then one JSON line.
"""

import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import machine, median, print_json, print_table
from puzzle_sides import side_of

from src.config import parse_flags, run
from src.interop.trm_official import write_official
from src.model import TRMConfig, TRMModel
from src.runtime import choose_device

TASKS = ("train", "evaluate")


@dataclass
class PuzzleBench:
    """What to measure.

    Args:
        mixers: attention, mlp
        precisions: fp32, bf16
        peer: a checkout of github.com/SamsungSAILMontreal/TinyRecursiveModels to compare with
        peer_compile: also measure the authors' code under torch.compile, which takes minutes to compile
        compile: also measure our compiled model
        rounds: measured steps of each side
        batch_size: boards per step
        cells: cells per board
        d_model: width of the model
        n_heads: number of attention heads
        n_layers: blocks of the network
        latent_steps: n of the paper
        deep_steps: T of the paper
        device: auto, cpu, cuda
        threads: number of CPU threads of each process
        quick: use tiny sizes and few steps, to check that the benchmark runs
    """

    mixers: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    peer: str | None = None
    peer_compile: bool = False
    compile: bool = True
    rounds: int = 9
    batch_size: int = 64
    cells: int = 81
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 2
    latent_steps: int = 6
    deep_steps: int = 3
    device: str = "auto"
    threads: int = 1
    quick: bool = False

    def __post_init__(self):
        for name, known in (("mixers", ("attention", "mlp")), ("precisions", ("fp32", "bf16"))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} {value}: choose from {', '.join(known)}")
        if min(self.rounds, self.batch_size, self.threads) < 1:
            raise ValueError("rounds, batch_size and threads must be 1 or more")
        if self.peer is not None and not (Path(self.peer) / "models" / "recursive_reasoning" / "trm.py").is_file():
            raise ValueError(f"peer {self.peer} is no checkout of the authors' repository: it has no models/ of theirs")
        if self.quick:
            self.rounds, self.batch_size, self.cells, self.d_model, self.n_heads = 2, 2, 9, 32, 2
            self.latent_steps, self.deep_steps, self.compile = 2, 2, False
            self.mixers, self.precisions = ["mlp"], ["fp32"]


def model_config(args: PuzzleBench, mixer: str) -> TRMConfig:
    """The authors' model of this size: hidden widths are 8/3 of the input's, rounded up to 256."""
    return TRMConfig(
        vocab_size=11, d_model=args.d_model, n_heads=args.n_heads, n_layers=args.n_layers, max_seq_len=args.cells,
        d_ff=_hidden(args.d_model), causal=False, norm="post", norm_gain=False, mixer=mixer,
        positions="rope" if mixer == "attention" else "none", embed_scale=args.d_model**0.5, recursion="trm",
        latent_steps=args.latent_steps, deep_steps=args.deep_steps, supervision_steps=16, weight_init="truncated",
        token_loss="stablemax", loss_mean="row", act_weight=0.5,
        **({"mixer_ff": _hidden(args.cells)} if mixer == "mlp" else {}),
    )  # fmt: skip


def _hidden(size: int) -> int:
    return -(-round(size * 8 / 3) // 256) * 256


class Worker:
    """A process with one side, which steps when it is told to."""

    def __init__(self, **job):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, job), daemon=True)
        self.process.start()
        end.close()

    def ask(self, what: str):
        """What side.<what>() returns in the other process: `step` the seconds, `first_logits` a tensor."""
        self.pipe.send(what)
        return self.pipe.recv()

    def close(self):
        self.pipe.close()
        self.process.join()


def _serve(pipe, job):
    side = side_of(**job)
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(side, what)())


def measure(args: PuzzleBench, mixer: str, precision: str, task: str, folder: str) -> dict:
    """One row: medians of each side, and the ratios of the peer's time over ours."""
    torch.manual_seed(0)
    model = TRMModel(model_config(args, mixer))
    path = Path(folder) / f"{mixer}.pt"
    theirs, settings = write_official(model.config, model.state_dict(), "bench_puzzles")
    torch.save({"ours": model.state_dict(), "theirs": theirs}, path)
    shared = {"path": str(path), "precision": precision, "task": task, "device": str(choose_device(args.device))}
    shared |= {"batch_size": args.batch_size, "threads": args.threads}
    kinds = ["eager"] + ["compiled"] * args.compile + ["peer"] * bool(args.peer)
    kinds += ["peer_compiled"] * bool(args.peer and args.peer_compile)
    config = {"eager": model.config.to_dict(), "peer": settings["arch"] | {"seq_len": args.cells}}
    workers = {
        kind: Worker(**shared, kind=kind, peer=args.peer, config=config["peer" if "peer" in kind else "eager"])
        for kind in kinds
    }
    logits = {kind: worker.ask("first_logits") for kind, worker in workers.items()}
    for worker in workers.values():  # one more step to warm up
        worker.ask("step")
    times = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, worker in workers.items():
            times[kind].append(worker.ask("step"))
    for worker in workers.values():
        worker.close()
    row = {"mixer": mixer, "precision": precision, "task": task, "seconds": {k: median(t) for k, t in times.items()}}
    other, against = "peer" if args.peer else "eager", logits["peer" if args.peer else "eager"]
    row["ratios"] = {
        f"{kind} over {base}": _spread(times[base], times[kind])
        for base in dict.fromkeys(["peer" if args.peer else "eager", *(k for k in kinds if k == "peer_compiled")])
        for kind in kinds
        if kind != base and "peer" not in kind
    }
    worst = max(((tensor - against).abs().max() / against.abs().max()).item() for tensor in logits.values())
    return row | {"difference": worst, "compared_with": other}


def _spread(theirs: list[float], ours: list[float]) -> list[float]:
    ratios = sorted(a / b for a, b in zip(theirs, ours))
    return [median(ratios), ratios[0], ratios[-1]]


def usable_peer(path: str | None) -> str | None:
    """The path, if the authors' code there can be imported; else None, and a line on stderr."""
    if path is None:
        print("no --peer: our compiled model is compared with our eager model only", file=sys.stderr)
        return None
    from puzzle_sides import import_peer

    try:
        import_peer(path)
    except ImportError as error:
        print(f"the peer is skipped: {error}; pip install pydantic einops", file=sys.stderr)
        return None
    return str(Path(path).resolve())


def main(argv=None) -> int:
    (args,) = parse_flags(__doc__, PuzzleBench, argv=argv)
    torch.set_num_threads(args.threads)
    args.peer, rows = usable_peer(args.peer), []
    with tempfile.TemporaryDirectory() as folder:
        for mixer in args.mixers:
            for precision in args.precisions:
                rows += [measure(args, mixer, precision, task, folder) for task in TASKS]
    lines = [
        [f"{row['mixer']} {row['precision']} {row['task']}", what, *ratio, row["difference"]]
        for row in rows
        for what, ratio in row["ratios"].items()
    ]
    print_table(["step", "speed of", "ratio", "lowest", "highest", "difference"], lines)
    print_json("puzzles", {"machine": machine(choose_device(args.device)), **vars(args), "rows": rows})
    return 0


if __name__ == "__main__":
    run(main)
