"""Benchmark training: the speed of the model as a fraction of the machine's matrix-product speed.

    python benchmarks/bench_train.py                           # plain, looped and TRM; takes minutes
    python benchmarks/bench_train.py --families trm --steps 20
    python benchmarks/bench_train.py --families trm --profile  # the time of one step by kind of operation
    python benchmarks/bench_train.py --recipe configs/demo.yaml --steps 30    # a recipe beside a plain transformer
    python benchmarks/bench_train.py --quick                   # tiny sizes, to check that it runs

Prints tokens/s, the model's GFLOP/s, the GFLOP/s of 2048 x 2048 x 2048 matrix products in the same process and
precision, and their ratio; then one JSON line. A step is a step of the trainer (`Trainer.train_step`: one backward pass
per supervision step, clipping, AdamW, moving average). Matrix products and training steps alternate, so that a machine
that slows down for a while slows both. Figures are medians over the rounds; `best` compares the fastest step with the
fastest products.

FLOPs are counted by `metrics.flops_per_token`. A weight counts 6 for each visit with gradient and 2 for each visit
without, the head included; recomputation does not count. Attention costs 4*T*D forward and 8*T*D backward per token and
layer visit. This counts all T x T scores, although a causal model needs only half of them.

    ratio             model over matrix products, without the FLOPs of attention
    ratio_attention   the same, with the FLOPs of attention
    shapes            the speed of the model's own matrix products, which limits the speed of the model. They are the
                      products of a block's linear layers at batch x length rows: for the forward pass, the gradient
                      of the input, and the gradient of the weights. Each kind counts as often as the family needs it

With --recipe, the model of a config at its full depth alternates with a plain transformer of equal FLOPs per token,
which has the same settings and more layers. `paired` is the tokens/s of the recipe divided by those of the plain model
in the same round: the median over the rounds, and the first and the ninth decile.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from common import interleaved, machine, median, print_json, print_table, seconds

from src.config import build, parse_flags, run
from src.data.token_store import ON_THE_SPOT_VOCAB
from src.errors import UserError
from src.metrics import count_parameters, flops_per_token
from src.model import TRMConfig, TRMModel
from src.runtime import DTYPES, keep_freed_memory  # noqa: E402
from src.trainer import Trainer
from src.training.train_config import RuntimeConfig, TrainConfig, read_settings  # noqa: E402

FAMILIES = {
    "none": {"recursion": "none", "n_layers": 6, "norm": "pre"},
    "loop": {"recursion": "loop", "n_layers": 2, "deep_steps": 3},
    "trm": {"recursion": "trm", "n_layers": 2, "latent_steps": 2, "deep_steps": 2, "supervision_steps": 2},
}


@dataclass
class TrainBench:
    """What to measure.

    Args:
        families: families to measure: none (6 layers), loop (2 layers applied 3 times), trm (2 layers; 2 latent, deep
            and supervision steps each)
        steps: measured rounds; each has a burst of matrix products and one training step
        warmup: training steps before the measurement; the first one compiles the model
        batch_size: windows per step
        seq_len: tokens per window
        d_model: width of the model
        n_heads: number of attention heads
        vocab_size: number of tokens in the vocabulary
        dropout: probability of dropout; it adds no FLOPs, so its cost shows in the ratios
        matmul_size: n of the n x n x n matrix products
        compile: use torch.compile; if not given, decided as in training
        recipe: instead of families, measure the model of this config file of train_trm_lm.py beside a plain
            transformer; --batch_size, --seq_len, --d_model, --n_heads, --vocab_size, --dropout and --quick then have no
            effect. Without a vocab_size, it has 4,096 tokens
        profile: instead of measuring speed, profile one step on the CPU and group its time by kind of operation
        quick: use tiny sizes and few steps, to check that the benchmark runs
    """

    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    steps: int = 8
    warmup: int = 3
    batch_size: int = 64
    seq_len: int = 256
    d_model: int = 384
    n_heads: int = 6
    vocab_size: int = 65
    dropout: float = 0.0
    matmul_size: int = 2048
    compile: bool | None = None
    recipe: str | None = None
    profile: bool = False
    quick: bool = False

    def __post_init__(self):
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"families {family}: choose from {', '.join(FAMILIES)}")
        if self.recipe and (self.profile or self.families != list(FAMILIES)):
            raise ValueError("recipe does not go with families and profile: leave them out")
        if min(self.steps, self.warmup, self.batch_size) < 1:
            raise ValueError("steps, warmup and batch_size must be 1 or more")
        if self.quick:
            self.steps, self.warmup, self.batch_size, self.seq_len = 2, 1, 2, 16
            self.d_model, self.n_heads, self.matmul_size = 32, 2, 128


def parse_args(argv=None) -> tuple[TrainBench, RuntimeConfig]:
    return parse_flags(__doc__, TrainBench, RuntimeConfig, argv=argv)


def model_config(args: TrainBench, family: str) -> TRMConfig:
    sizes = {"vocab_size": args.vocab_size, "d_model": args.d_model, "n_heads": args.n_heads, "dropout": args.dropout}
    return build(TRMConfig, {**sizes, "max_seq_len": args.seq_len, **FAMILIES[family]})


def training_step(train: TrainConfig, config: TRMConfig, runtime: RuntimeConfig, warmup: int):
    """Returns (trainer, a function that does one training step), after the warm-up steps."""
    torch.manual_seed(0)
    trainer = Trainer(train, TRMModel(config), None, None, None, runtime)
    ids = torch.randint(0, config.vocab_size, (train.batch_size, config.max_seq_len + 1))
    batch = {"input_ids": ids[:, :-1].contiguous(), "target_ids": ids[:, 1:].contiguous()}
    for _ in range(warmup):
        trainer.train_step(batch)
    return trainer, lambda: trainer.train_step(batch)


def family_step(args: TrainBench, family: str, runtime: RuntimeConfig):
    """Returns what `training_step` does, and the settings of the model.  Drops compiled graphs of other families."""
    torch._dynamo.reset()
    train = TrainConfig(batch_size=args.batch_size, compile=args.compile, max_steps=10**6)
    config = model_config(args, family)
    return *training_step(train, config, runtime, args.warmup), config


class Burst:
    """A job that multiplies n x n matrices for about 0.2 s or more. `flops` is the work of one call."""

    def __init__(self, size: int, dtype, device):
        self.a, self.b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.repeats = 1
        self()
        while seconds(self, device) < 0.2 and self.repeats < 1000:
            self.repeats *= 2
        self.flops = 2 * size**3 * self.repeats

    def __call__(self):
        for _ in range(self.repeats):
            self.a @ self.b


class BlockProducts:
    """The matrix products of one TinyBlock's four linear layers for `rows` tokens.

    `jobs` has one function per kind: forward, grad_input (x = y w) and grad_weight (w = y^T x)."""

    def __init__(self, config: TRMConfig, rows: int, dtype, device):
        def empty(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        block = TRMModel(config).net.blocks[0]
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        self.shapes = [
            (empty(rows, m.in_features), empty(m.out_features, m.in_features), empty(rows, m.out_features))
            for m in linears
        ]
        self.flops = sum(2 * rows * m.in_features * m.out_features for m in linears)  # per kind
        self.jobs = {kind: getattr(self, kind) for kind in ("forward", "grad_input", "grad_weight")}

    def forward(self):
        for x, w, y in self.shapes:
            torch.mm(x, w.t(), out=y)

    def grad_input(self):
        for x, w, y in self.shapes:
            torch.mm(y, w, out=x)

    def grad_weight(self):
        for x, w, y in self.shapes:
            torch.mm(y.t(), x, out=w)

    def ceiling(self, times: dict, forwards: float) -> float:
        """Returns the FLOP/s of a mix of products.

        The mix has `forwards` forward products for one product of each gradient. `times` has the seconds of each
        kind."""
        elapsed = forwards * times["forward"] + times["grad_input"] + times["grad_weight"]
        return (forwards + 2) * self.flops / elapsed


def forwards_per_backward(config: TRMConfig) -> float:
    """Returns how many visits of the network there are for each visit that carries gradient."""
    return 1.0 if config.recursion == "none" else config.deep_steps / config.grad_deep_steps


def measure(args: TrainBench, family: str, runtime: RuntimeConfig) -> dict:
    """Returns the figures of one family."""
    start = time.perf_counter()
    trainer, step, config = family_step(args, family, runtime)
    warmup, device, dtype = time.perf_counter() - start, trainer.device, DTYPES[trainer.precision]
    burst = Burst(args.matmul_size, dtype, device)
    products = BlockProducts(config, args.batch_size * args.seq_len, dtype, device)
    for job in products.jobs.values():
        job()
    times = interleaved({"matmul": burst, "step": step, **products.jobs}, args.steps, device)
    mid, low = ({name: pick(t) for name, t in times.items()} for pick in (median, min))
    tokens, flops = args.batch_size * args.seq_len, flops_per_token(config)
    matmul, best_matmul = burst.flops / mid["matmul"], burst.flops / low["matmul"]
    model, model_attention = (n * tokens / mid["step"] for n in (flops.train_matmul, flops.train))
    shapes = products.ceiling(mid, forwards_per_backward(config))
    return {
        "family": family,
        "parameters": count_parameters(trainer.raw)["total"],
        "precision": trainer.precision,
        "step_s": mid["step"],
        "tokens_per_s": tokens / mid["step"],
        "model_gflops": model / 1e9,
        "model_gflops_attention": model_attention / 1e9,
        "matmul_gflops": matmul / 1e9,
        "shapes_gflops": shapes / 1e9,
        "shapes_gflops_by_kind": {kind: products.flops / mid[kind] / 1e9 for kind in products.jobs},
        "ratio": model / matmul,
        "ratio_attention": model_attention / matmul,
        "ratio_shapes": model / shapes,
        "best": {
            "tokens_per_s": tokens / low["step"],
            "matmul_gflops": best_matmul / 1e9,
            "ratio": flops.train_matmul * tokens / low["step"] / best_matmul,
        },
        "warmup_s": warmup,
    }


def compare(args: TrainBench, runtime: RuntimeConfig) -> dict:
    """Returns the speed of a recipe's model and of a plain transformer of equal FLOPs, whose steps alternate."""
    train, _, model, _ = read_settings(["--config", args.recipe])
    train = replace(train, compile=args.compile, max_steps=10**6, max_minutes=None)
    train = replace(train, recursion_from=0.0, sample_depth=False, least_depth=1)  # the full depth at each step
    if model.recursion == "none":
        raise UserError(f"{args.recipe} has no recursion to compare with plain layers: choose another recipe")
    model = replace(model, vocab_size=model.vocab_size or ON_THE_SPOT_VOCAB)
    models = {"recipe": model, "plain": plain_of_equal_flops(model)}
    made = {name: training_step(train, config, runtime, args.warmup) for name, config in models.items()}
    trainer = made["recipe"][0]
    times = interleaved({name: step for name, (_, step) in made.items()}, args.steps, trainer.device)
    tokens = train.batch_size * model.max_seq_len
    paired = np.array(times["plain"]) / np.array(times["recipe"])
    return {
        "recipe": args.recipe,
        "precision": trainer.precision,
        "tokens_per_s": {name: tokens / median(each) for name, each in times.items()},
        "mflops_per_token": {name: flops_per_token(config).train / 1e6 for name, config in models.items()},
        "paired": {name: float(np.quantile(paired, q)) for name, q in [("median", 0.5), ("low", 0.1), ("high", 0.9)]},
    }


def plain_of_equal_flops(model: TRMConfig) -> TRMConfig:
    """Returns a plain transformer whose training costs as many FLOPs per token, as nearly as its layers allow."""
    layers = range(1, model.n_layers * model.visits_per_step * model.train_steps + 1)
    plains = [replace(model, recursion="none", halting=False, n_layers=n) for n in layers]
    return min(plains, key=lambda plain: abs(flops_per_token(plain).train - flops_per_token(model).train))


KINDS = (  # (kind, parts of the names of its operations); the first match counts
    ("compiled elementwise kernels", ("cpp_fused",)),  # first, because its name lists all operations that it fuses
    ("attention backward products", ("flash_attention_for_cpu_backward", "aten::bmm", "aten::baddbmm")),
    ("attention forward", ("flash_attention_for_cpu",)),
    ("products of linear layers", ("aten::mm", "aten::addmm", "mkldnn::_linear", "aten::linear", "aten::matmul")),
    ("optimizer, clipping, average", ("_fused_adamw", "_foreach", "Optimizer", "linalg_vector_norm")),
    ("eager elementwise and copies", ("aten::",)),
)


def kind_of(name: str) -> str:
    """Returns the kind of an operation, given its name in the profiler's table."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "Python, dispatch and the rest")


def profile(args: TrainBench, family: str, runtime: RuntimeConfig) -> dict:
    """Profile one training step.  Returns {kind of operation: ms}, the largest first."""
    import torch._inductor.config
    from torch.profiler import ProfilerActivity

    torch._inductor.config.cpp.enable_kernel_profile = True  # otherwise compiled kernels have no names
    trainer, step, _ = family_step(args, family, runtime)
    if trainer.device.type != "cpu":
        raise UserError("--profile measures CPU time: add --device cpu")
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    kinds = {}
    for event in record.key_averages():
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0) + event.self_cpu_time_total / 1000
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def show_profile(family: str, kinds: dict) -> None:
    total = sum(kinds.values())
    print_table([family, "ms", "%"], [[kind, ms, 100 * ms / total] for kind, ms in kinds.items()])
    print()


def main(argv=None) -> None:
    args, runtime = parse_args(argv)
    keep_freed_memory()
    if args.profile:
        profiles = {family: profile(args, family, runtime) for family in args.families}
        for family, kinds in profiles.items():
            show_profile(family, kinds)
        print_json("train_profile", {"machine": machine(), "ms": profiles})
        return
    if args.recipe:
        found = compare(args, runtime)
        for name, speed in found["tokens_per_s"].items():
            print(f"{name}: {speed:,.0f} tokens/s, {found['mflops_per_token'][name]:.1f} MFLOPs per token")
        paired = found["paired"]
        print(f"paired: {paired['median']:.3f} ({paired['low']:.3f} to {paired['high']:.3f})")
        print_json("train_recipe", {"machine": machine(), **found})
        return
    rows = [measure(args, family, runtime) for family in args.families]
    columns = "tokens_per_s model_gflops matmul_gflops ratio ratio_attention shapes_gflops ratio_shapes".split()
    print_table(
        ["family", *columns, "best ratio"], [[r["family"], *(r[c] for c in columns), r["best"]["ratio"]] for r in rows]
    )
    sizes = {
        name: getattr(args, name) for name in ("batch_size", "seq_len", "d_model", "n_heads", "vocab_size", "steps")
    }
    print_json("train", {"machine": machine(), **sizes, "rows": rows})


if __name__ == "__main__":
    run(main)
