"""Benchmark a puzzle model: one supervision step of training and of evaluation, against the TRM authors' code.

    python benchmarks/bench_puzzles.py --peer ../TinyRecursiveModels   # a checkout of the authors' repository
    python benchmarks/bench_puzzles.py --mixers mlp --precisions bf16 --rounds 15 --peer ../TinyRecursiveModels
    python benchmarks/bench_puzzles.py                                 # without a peer: compiled against eager
    python benchmarks/bench_puzzles.py --peer ../TinyRecursiveModels --quick   # the mlp mixer in bf16: 4 minutes
    python benchmarks/bench_puzzles.py --peer ../TinyRecursiveModels --peer_compile   # both eager, and both compiled

Both sides have the same weights, the same boards and torch's fused AdamW. A training step is a supervision step forward
and backward, the row's correctness, and the update. An evaluation step is the forward pass, the loss and the row's
correctness. Each step continues from the state of the one before.

Each side runs in a process of its own, because ours changes the allocator of its process (`keep_freed_memory`, as
training does). The processes take turns, one step each. Times are the CPU time of the process on a CPU, so that other
programs on the machine disturb them less, and wall time on a GPU or with more than one thread.

    eager, compiled      our model without and with torch.compile: median seconds of a step
    peer, peer_compiled  the authors' code, the same (with --peer_compile)
    eager over peer      the speed of our eager model relative to theirs: their time over ours, per round, as median
                         (lowest to highest). Above 1, ours is faster. So for the other pairs
    difference           the largest difference of logits after one step, over the largest logit; in bf16 it is rounding

The authors' code needs pydantic and einops (`pip install pydantic einops`). If it cannot be imported, or without
--peer, the comparison is left out with a line on stderr. Prints each row of the table when it is measured, then one
JSON line.
"""

import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import machine, median, print_json
from puzzle_sides import side_of

from src.config import parse_flags, run
from src.interop.trm_official import write_official
from src.model import TRMConfig, TRMModel
from src.runtime import choose_device

TASKS = ("train", "evaluate")
# (ours, theirs); the last two are what --peer and --peer_compile compare in the same form
RATIOS = (("compiled", "eager"), ("compiled", "peer"), ("eager", "peer"), ("compiled", "peer_compiled"))


@dataclass
class PuzzleBench:
    """What to measure.

    Args:
        mixers: attention, mlp
        precisions: fp32, bf16
        tasks: train, evaluate
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
        quick: measure only 3 rounds of the mlp mixer in bf16, with fewer loops (n 2, T 2), in about 4 minutes on two
            busy cores
    """

    mixers: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
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
        for name, known in (("mixers", ("attention", "mlp")), ("precisions", ("fp32", "bf16")), ("tasks", TASKS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} {value}: choose from {', '.join(known)}")
        if min(self.rounds, self.batch_size, self.threads) < 1:
            raise ValueError("rounds, batch_size and threads must be 1 or more")
        if self.peer is not None and not (Path(self.peer) / "models" / "recursive_reasoning" / "trm.py").is_file():
            raise ValueError(f"peer {self.peer} is no checkout of the authors' repository: it has no models/ of theirs")
        if self.quick:
            self.rounds, self.mixers, self.precisions = 3, ["mlp"], ["bf16"]
            self.latent_steps, self.deep_steps = 2, 2


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

    def begin(self, what: str):
        """Let the other process call side.<what>(): `step` returns the seconds, `first_logits` a tensor."""
        self.pipe.send(what)

    def ask(self, what: str):
        """What side.<what>() returns in the other process."""
        self.begin(what)
        return self.answer()

    def answer(self):
        """What the call that `begin` started returns."""
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
    for worker in workers.values():  # at the same time, because compiling takes long
        worker.begin("first_logits")
    logits = {kind: worker.answer() for kind, worker in workers.items()}
    for worker in workers.values():  # one more step to warm up
        worker.ask("step")
    times = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, worker in workers.items():
            times[kind].append(worker.ask("step"))
    for worker in workers.values():
        worker.close()
    base = logits["peer" if args.peer else "eager"]
    worst = max(((tensor - base).abs().max() / base.abs().max()).item() for tensor in logits.values())
    row = {"mixer": mixer, "precision": precision, "task": task, "difference": worst}
    row["seconds"] = {kind: median(found) for kind, found in times.items()}
    pairs = [pair for pair in RATIOS if times.keys() >= set(pair) and ("peer" in pair[1] or not args.peer)]
    return row | {"ratios": {f"{ours} over {theirs}": _spread(times[theirs], times[ours]) for ours, theirs in pairs}}


def _spread(theirs: list[float], ours: list[float]) -> list[float]:
    ratios = sorted(a / b for a, b in zip(theirs, ours))
    return [median(ratios), ratios[0], ratios[-1]]


def show(row: dict, is_first: bool):
    """Print a row of the table as soon as it is known; all rows have the same columns."""
    cells = {"step": f"{row['mixer']} {row['precision']} {row['task']}"}
    cells |= {f"{kind} s": f"{seconds:.4g}" for kind, seconds in row["seconds"].items()}
    cells |= {name: "{:.2f} ({:.2f} to {:.2f})".format(*ratio) for name, ratio in row["ratios"].items()}
    cells |= {"difference": f"{row['difference']:.1e}"}
    widths = [max(len(name), 23 if name == "step" else 20 if " over " in name else 0) for name in cells]
    for line in (cells, cells.values())[0 if is_first else 1 :]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), flush=True)


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
                for task in args.tasks:
                    rows.append(measure(args, mixer, precision, task, folder))
                    show(rows[-1], len(rows) == 1)
    print_json("puzzles", {"machine": machine(choose_device(args.device)), **vars(args), "rows": rows})
    return 0


if __name__ == "__main__":
    run(main)
