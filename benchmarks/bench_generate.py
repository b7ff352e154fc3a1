"""Benchmark generation: plain and looped models in every precision, against transformers with the same weights.

    python benchmarks/bench_generate.py --threads 1
    python benchmarks/bench_generate.py --shapes 6x384 --batch_sizes 1 --paths fp32 int8 --repeats 9
    python benchmarks/bench_generate.py --quick                # tiny sizes, to check that it runs

For each shape and batch size it generates greedily and measures new tokens per second over all rows, with the time for
the prompt included. It compares three models: the plain family, transformers' LlamaForCausalLM.generate in fp32 (scaled
dot-product attention, its own cache, no EOS), and a looped model with the same FLOPs as the plain one (a third of the
layers applied three times, or a quarter applied four times). Prompts in a batch have different lengths and are padded
on the left. Each round runs all models, one after the other; figures are medians.

Our models run in several paths. fp32, bf16 (weights and arithmetic) and int8 (weights only, src/quantize.py) use torch;
onnx_fp32 and onnx_int8 run what export_onnx.py makes. A path whose package is missing is skipped with a line on stderr.

    ratio         speed of the plain model over transformers
    loop_ratio    speed of the looped model over the plain model
    same_tokens   in fp32 paths: whether both models wrote the same text as transformers and as the fp32 path; texts
                  may differ from a token on whose two best choices are equal up to rounding; if false, the exit code
                  is 1

Then it compares decoding with and without the cache. For the first shape, it generates new_tokens tokens after a prompt
of context - new_tokens tokens. Prints tables, then one JSON line.

Shapes are layers x width. 6x384 has a vocabulary of 4,096 (like a tokenizer trained on the spot), the others 32,000.
6x288 has the hidden width of the Llama models that are trained on TinyStories.
"""

import sys
import tempfile
from dataclasses import dataclass, field

import torch
from common import interleaved, machine, median, print_json, print_table
from generate_peers import EXACT, ONNX, TORCH, Greedy, available, in_precision, ours, transformers_job

from src.config import parse_flags, run
from src.metrics import count_parameters
from src.model import TRMConfig, TRMModel

SHAPES = {
    "6x384": {"vocab_size": 4096, "d_model": 384, "n_heads": 6},
    "6x288": {"vocab_size": 32000, "d_model": 288, "n_heads": 6, "d_ff": 768},
    "8x512": {"vocab_size": 32000, "d_model": 512, "n_heads": 8},
    "tiny": {"vocab_size": 64, "d_model": 32, "n_heads": 2},
}
PLAIN = {"recursion": "none", "n_layers": 6, "norm": "pre"}
LOOP = {"recursion": "loop", "n_layers": 2, "deep_steps": 3, "norm": "pre"}
DEEPER = {"8x512": ({"n_layers": 8}, {"deep_steps": 4})}
TIE = 1e-4  # logits this close count as equal, because the paths add numbers in different orders


@dataclass
class GenerateBench:
    """What to measure.

    Args:
        shapes: model shapes to measure, from 6x384, 6x288, 8x512 and tiny
        batch_sizes: numbers of texts generated at once; if not given, 1 and 16
        paths: precisions to measure, from fp32, bf16, int8, onnx_fp32 and onnx_int8; if not given, all
        prompt_tokens: length of the longest prompt in tokens
        new_tokens: tokens to generate
        repeats: measured rounds, after one warm-up round
        context: final length of the text, in tokens, when decoding with and without the cache is compared
        uncached_repeats: rounds of that comparison; 0 skips it
        max_seq_len: context length of the models
        threads: number of CPU threads; torch chooses if not given
        quick: use tiny sizes, few repeats, and only fp32 unless --paths are given, to check that the benchmark runs
    """

    shapes: list[str] = field(default_factory=lambda: ["6x384", "6x288", "8x512"])
    batch_sizes: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    prompt_tokens: int = 16
    new_tokens: int = 128
    repeats: int = 5
    context: int = 512
    uncached_repeats: int = 3
    max_seq_len: int = 1024
    threads: int | None = None
    quick: bool = False

    def __post_init__(self):
        self.batch_sizes = self.batch_sizes or ([1] if self.quick else [1, 16])
        self.paths = self.paths or (["fp32"] if self.quick else [*TORCH, *ONNX])
        for name, values, known in (("shapes", self.shapes, SHAPES), ("paths", self.paths, TORCH + ONNX)):
            for value in values:
                if value not in known:
                    raise ValueError(f"{name} {value}: choose from {', '.join(known)}")
        if self.quick:
            self.shapes, self.new_tokens, self.repeats, self.uncached_repeats = ["tiny"], 8, 2, 1
            self.prompt_tokens, self.context, self.max_seq_len = 4, 32, 64
        if min(self.prompt_tokens, self.new_tokens, self.repeats, *self.batch_sizes) < 1 or self.uncached_repeats < 0:
            raise ValueError("prompt_tokens, new_tokens, repeats and batch_sizes must be 1 or more")
        longest = self.prompt_tokens + self.new_tokens
        if not self.new_tokens < self.context <= self.max_seq_len or longest > self.max_seq_len:
            raise ValueError("context must be above new_tokens, and no text may be longer than max_seq_len")


def parse_args(argv=None) -> GenerateBench:
    return parse_flags(__doc__, GenerateBench, argv=argv)[0]


def families(shape: str) -> dict[str, dict]:
    """Returns the settings of the plain model and of a looped model with the same FLOPs."""
    plain, loop = DEEPER.get(shape, ({}, {}))
    return {"plain": PLAIN | plain, "loop": LOOP | loop}


def make_model(args: GenerateBench, shape: str, family: dict) -> TRMModel:
    torch.manual_seed(0)
    return TRMModel(TRMConfig(max_seq_len=args.max_seq_len, **SHAPES[shape], **family)).eval()


def random_prompts(vocab_size: int, rows: int, length: int):
    """Returns ids (B, T) and a mask (B, T): prompts get shorter row by row, down to half the length.

    The mask is None for one row."""
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(rows) * length // (2 * rows)
    return ids, (torch.arange(length) >= padding[:, None]).long() if rows > 1 else None


def measure_shape(args: GenerateBench, shape: str) -> list[dict]:
    """Returns a row per batch size and path."""
    models = {name: make_model(args, shape, family) for name, family in families(shape).items()}
    runs, rows = {}, []
    for path in available(args.paths):
        for name, model in models.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[path, name] = in_precision(model.config, model.state_dict(), path, folder)
    for batch_size in args.batch_sizes:
        prompt, mask = random_prompts(models["plain"].config.vocab_size, batch_size, args.prompt_tokens)
        jobs = {key: ours(model, prompt, args.new_tokens, mask) for key, model in runs.items()}
        if available(["transformers"]):
            jobs["transformers", "plain"] = transformers_job(models["plain"], prompt, args.new_tokens, mask)
        interleaved(jobs, 1)
        times = {key: median(t) for key, t in interleaved(jobs, args.repeats).items()}
        speed = {key: batch_size * args.new_tokens / elapsed for key, elapsed in times.items()}
        theirs = speed.get(("transformers", "plain"))
        for path in dict.fromkeys(path for path, _ in runs):
            ratios = speed[path, "plain"] / theirs if theirs else None, speed[path, "loop"] / speed[path, "plain"]
            row = {"shape": shape, "batch": batch_size, "path": path}
            row |= {"parameters": {name: count_parameters(model)["total"] for name, model in models.items()}}
            row |= {f"{name}_tokens_per_s": speed[path, name] for name in models}
            row |= {"transformers_tokens_per_s": theirs, "ratio": ratios[0], "loop_ratio": ratios[1]}
            rows.append(row | {"same_tokens": _same_tokens(jobs, models, path, mask) if path in EXACT else None})
    return rows


def _same_tokens(jobs: dict[tuple, Greedy], models, path, mask) -> bool:
    """Returns whether both models wrote the same text in this path as transformers did, and as in the fp32 path."""
    others = ("transformers", "plain"), ("fp32", "plain"), ("fp32", "loop")
    pairs = [((path, name), (other, name)) for other, name in others if (other, name) in jobs]
    return all(same_greedy(models[a[1]], jobs[a].ids, jobs[b].ids, mask) for a, b in pairs)


@torch.no_grad()
def same_greedy(model: TRMModel, ids, others, mask=None) -> bool:
    """Returns whether two batches of greedy texts (B, T) agree.

    Two texts may differ from a token on if both choices for that token have equal logits up to rounding."""
    start = torch.zeros(len(ids), dtype=torch.long) if mask is None else (mask == 0).sum(1)
    for row, other, first in zip(ids, others, start.tolist()):
        differ = (row != other).nonzero()
        if len(differ):
            t = differ[0].item()
            logits = model(row[None, first:t]).logits[0, -1] if t > first else torch.tensor([0.0, 1.0])
            if t <= first or abs(logits[int(row[t])] - logits[int(other[t])]) > TIE:
                return False
    return True


def measure_cache(args: GenerateBench, shape: str) -> dict:
    """Returns the speed of the plain model with and without the cache, for one shape."""
    model = make_model(args, shape, families(shape)["plain"])
    fast = in_precision(model.config, model.state_dict(), "fp32", "")
    prompt, _ = random_prompts(model.config.vocab_size, 1, args.context - args.new_tokens)
    jobs = {name: ours(fast, prompt, args.new_tokens, use_cache=name == "cached") for name in ("cached", "uncached")}
    jobs["cached"]()
    times = {name: median(t) for name, t in interleaved(jobs, args.uncached_repeats).items()}
    return {
        "shape": shape,
        "prompt_tokens": prompt.shape[1],
        "new_tokens": args.new_tokens,
        **{f"{name}_tokens_per_s": args.new_tokens / elapsed for name, elapsed in times.items()},
        "ratio": times["uncached"] / times["cached"],
        "same_tokens": same_greedy(model, jobs["cached"].ids, jobs["uncached"].ids),
    }


def print_rows(rows, first, columns):
    print_table([*first, *columns], [["-" if row[c] is None else row[c] for c in (*first, *columns)] for row in rows])


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        rows += measure_shape(args, shape)
    columns = "plain_tokens_per_s transformers_tokens_per_s ratio loop_tokens_per_s loop_ratio same_tokens".split()
    print_rows(rows, ("shape", "batch", "path"), columns)
    cache = measure_cache(args, args.shapes[0]) if args.uncached_repeats else None
    if cache:
        columns = "prompt_tokens new_tokens cached_tokens_per_s uncached_tokens_per_s ratio same_tokens".split()
        print("\nwith and without the key/value cache\n")
        print_rows([cache], ("shape",), columns)
    print_json("generate", {"machine": machine(), "rows": rows, "cache": cache})
    wrong = [f"{row['shape']} {row['path']}" for row in rows if row["same_tokens"] is False]
    wrong += ["cache"] * (cache is not None and not cache["same_tokens"])
    if wrong:
        print(f"warning: greedy tokens differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
