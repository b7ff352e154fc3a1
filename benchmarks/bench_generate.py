"""Generation speed: one row, greedy, fp32, beside transformers with the same weights; the loop; the cache.

    python benchmarks/bench_generate.py
    python benchmarks/bench_generate.py --shapes 6x384 --repeats 9 --threads 1
    python benchmarks/bench_generate.py --quick                # tiny sizes: does it run?

For each shape: new tokens per second, prompt encoding included, of this model's plain family, of transformers'
LlamaForCausalLM.generate (scaled_dot_product_attention, its own cache, greedy, no EOS) with the same weights, and of a
looped model of the same FLOPs (2 layers x 3 visits). Rounds run all three, one after the other; figures are medians.
`same_tokens`: both wrote the same greedy text. Then, for the first shape, cached against uncached decoding: new_tokens
after a prompt of context - new_tokens, so that the text ends at `context` tokens. Prints tables, then one JSON line;
exit code 1 where tokens differ.

Shapes: 6x384 is 6 layers, width 384, 6 heads, a vocabulary of 4,096 (what training on the spot makes);
6x288 has a vocabulary of 32,000 and a hidden width of 768, as the Llama models trained on TinyStories have.
"""

import sys
from dataclasses import dataclass, field

import torch
from common import interleaved, machine, median, print_json, print_table

from src.config import parse_flags, run
from src.decode import store_for_decoding
from src.metrics import count_parameters
from src.model import TRMConfig, TRMModel
from tests.reference import llama_with_weights_of

SHAPES = {
    "6x384": {"vocab_size": 4096, "d_model": 384, "n_heads": 6},
    "6x288": {"vocab_size": 32000, "d_model": 288, "n_heads": 6, "d_ff": 768},
    "tiny": {"vocab_size": 64, "d_model": 32, "n_heads": 2},
}
PLAIN = {"recursion": "none", "n_layers": 6, "norm": "pre"}
LOOP = {"recursion": "loop", "n_layers": 2, "deep_steps": 3, "norm": "pre"}


@dataclass
class GenerateBench:
    """What to measure.

    Args:
        shapes: which of 6x384, 6x288, tiny
        prompt_tokens: length of the prompt
        new_tokens: tokens to generate
        repeats: rounds that are measured, after one that is not
        context: length of the text at the end of the comparison with uncached decoding, in tokens
        uncached_repeats: rounds of that comparison
        max_seq_len: context length of the models
        threads: CPU threads; default as torch chooses
        quick: tiny sizes and few repeats: does it run?
    """

    shapes: list[str] = field(default_factory=lambda: ["6x384", "6x288"])
    prompt_tokens: int = 16
    new_tokens: int = 200
    repeats: int = 5
    context: int = 512
    uncached_repeats: int = 3
    max_seq_len: int = 1024
    threads: int | None = None
    quick: bool = False

    def __post_init__(self):
        for shape in self.shapes:
            if shape not in SHAPES:
                raise ValueError(f"shapes {shape}: choose of {', '.join(SHAPES)}")
        if self.quick:
            self.shapes, self.new_tokens, self.repeats, self.uncached_repeats = ["tiny"], 8, 2, 1
            self.prompt_tokens, self.context, self.max_seq_len = 4, 32, 64
        if min(self.prompt_tokens, self.new_tokens, self.repeats, self.uncached_repeats) < 1:
            raise ValueError("prompt_tokens, new_tokens, repeats and uncached_repeats must be 1 or more")
        if (
            not self.new_tokens < self.context <= self.max_seq_len
            or self.prompt_tokens + self.new_tokens > self.max_seq_len
        ):
            raise ValueError("context must be over new_tokens, and no text longer than max_seq_len")


def parse_args(argv=None) -> GenerateBench:
    return parse_flags(__doc__, GenerateBench, argv=argv)[0]


def make_model(args: GenerateBench, shape: str, family: dict) -> TRMModel:
    torch.manual_seed(0)
    model = TRMModel(TRMConfig(max_seq_len=args.max_seq_len, **SHAPES[shape], **family)).eval()
    return store_for_decoding(model)


def random_prompt(model: TRMModel, length: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


class Greedy:
    """A job that generates greedily and keeps what it wrote."""

    def __init__(self, generate):
        self.generate, self.ids = generate, None

    def __call__(self):
        self.ids = self.generate()


def ours(model: TRMModel, prompt, new_tokens: int, use_cache: bool = True) -> Greedy:
    return Greedy(lambda: model.generate(prompt, new_tokens, temperature=0, use_cache=use_cache))


def transformers_job(model: TRMModel, prompt, new_tokens: int) -> Greedy:
    llama = llama_with_weights_of(model)  # it has no EOS, so it stops at max_new_tokens alone
    assert llama.config._attn_implementation == "sdpa"
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(prompt)

    def generate():
        with torch.inference_mode():
            return llama.generate(prompt, attention_mask=mask, **options)

    return Greedy(generate)


def measure_shape(args: GenerateBench, shape: str) -> dict:
    """Plain, looped and transformers' tokens/s for one shape."""
    plain, loop = make_model(args, shape, PLAIN), make_model(args, shape, LOOP)
    prompt = random_prompt(plain, args.prompt_tokens)
    jobs = {
        "plain": ours(plain, prompt, args.new_tokens),
        "transformers": transformers_job(plain, prompt, args.new_tokens),
        "loop": ours(loop, prompt, args.new_tokens),
    }
    interleaved(jobs, 1)
    times = {name: median(t) for name, t in interleaved(jobs, args.repeats).items()}
    return {
        "shape": shape,
        **SHAPES[shape],
        "parameters": count_parameters(plain)["total"],
        "loop_parameters": count_parameters(loop)["total"],
        **{f"{name}_tokens_per_s": args.new_tokens / elapsed for name, elapsed in times.items()},
        "ratio": times["transformers"] / times["plain"],
        "loop_ratio": times["plain"] / times["loop"],
        "same_tokens": torch.equal(jobs["plain"].ids, jobs["transformers"].ids),
    }


def measure_cache(args: GenerateBench, shape: str) -> dict:
    """Cached against uncached decoding of the plain model of one shape."""
    model = make_model(args, shape, PLAIN)
    prompt = random_prompt(model, args.context - args.new_tokens)
    jobs = {name: ours(model, prompt, args.new_tokens, name == "cached") for name in ("cached", "uncached")}
    jobs["cached"]()
    times = {name: median(t) for name, t in interleaved(jobs, args.uncached_repeats).items()}
    return {
        "shape": shape,
        "prompt_tokens": prompt.shape[1],
        "new_tokens": args.new_tokens,
        **{f"{name}_tokens_per_s": args.new_tokens / elapsed for name, elapsed in times.items()},
        "ratio": times["uncached"] / times["cached"],
        "same_tokens": torch.equal(jobs["cached"].ids, jobs["uncached"].ids),
    }


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [measure_shape(args, shape) for shape in args.shapes]
    columns = "plain_tokens_per_s transformers_tokens_per_s ratio loop_tokens_per_s loop_ratio same_tokens".split()
    print_table(["shape", *columns], [[row["shape"], *(row[c] for c in columns)] for row in rows])
    cache = measure_cache(args, args.shapes[0])
    columns = "prompt_tokens new_tokens cached_tokens_per_s uncached_tokens_per_s ratio same_tokens".split()
    print()
    print_table(["cache", *columns], [[cache["shape"], *(cache[c] for c in columns)]])
    print_json("generate", {"machine": machine(), "precision": "fp32", "rows": rows, "cache": cache})
    differing = [row["shape"] for row in (*rows, cache) if not row["same_tokens"]]
    if differing:
        print(f"warning: greedy tokens differ: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    run(main)
