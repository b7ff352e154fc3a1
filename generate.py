"""Generate text with a trained model.

    python generate.py --prompt "def main("                       # with the released checkpoint
    python generate.py runs/trm --prompt "Once upon a time" --temperature 0.7 --top_k 40 --seed 1
    python generate.py runs/trm --prompt_file prompts.txt --num_samples 3 > runs/texts.txt
    python generate.py runs/code --prompt "def add(a, b):" --suffix "    return c"     # write what is between the two
    python generate.py runs/trm --interactive                     # continue each line that you type
    python generate.py runs/trm --prompt "def " --exit halt --max_recursion_depth 8    # tokens may stop recursing early
    python generate.py runs/trm --prompt "def " --trace runs/out.png   # draw the prediction after each recursion step
    python generate.py --prompt "def main(" --rag my_project       # with code retrieved from other files
    python generate.py --onnx onnx/trm --prompt "def "             # run an export of export_onnx.py with ONNX Runtime

stdout gets only the text: a single text as it is generated, several texts at the end with a blank line between them.
Messages and speed go to stderr.
"""

import copy
import io
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from src.config import before_torch, check_distinct, parse_flags, run
from src.errors import UserError
from src.files.text import is_text, read_text
from src.model_config import ExitRule

__all__ = ["main", "parse_args"]

ROWS = 16  # texts in one batch; more prompts are generated in several batches


@dataclass
class GenerateConfig:
    """What to generate, and how to choose the next token.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is used
        onnx: folder written by export_onnx.py, to run with ONNX Runtime instead of a checkpoint
        prompt: one or more texts to continue; an empty prompt starts from BOS
        prompt_file: text file with one prompt per line
        suffix: text that follows: write what belongs between the prompt and this text. The model must have been trained
            with --fim_rate. All three are printed
        suffix_file: file that holds the suffix
        middle_only: with a suffix, print only the text between the prompt and the suffix
        interactive: read prompts from the terminal, one per line, until end of file (Ctrl-D)
        num_samples: texts to generate for each prompt
        max_new_tokens: most tokens to add to a prompt; a text ends earlier at EOS
        temperature: randomness of the choice; 0 always takes the most probable token, higher values vary more
        top_k: choose only among the k most probable tokens
        top_p: choose only among the most probable tokens that together have this probability
        seed: random seed; the same seed gives the same text. If not given, every run differs
        trace: show how the prediction of each token in the first text changes over the recursion steps. Without a value
            it prints a table on stderr. With a file name (.png, .pdf, .svg) it draws a picture, and writes the data to
            a .json beside it
        rag: files and folders to retrieve code from, which the model reads before each prompt; stderr says what was
            retrieved
        rag_tokens: most tokens of retrieved code; by default, half of the model's context
        rag_top_k: chunks to retrieve for each prompt, as long as they fit
        rag_method: how code is compared with the prompt: tfidf, bm25 (pip install bm25s), checkpoint (this model's
            states), or sentence (a sentence-embedding model)
        no_cache: compute the whole text again for each new token, without the key/value cache; slow, for comparison
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of weights and arithmetic; int8 stores the weights in 8 bits and runs on a CPU only
    """

    checkpoint: str | None = None
    onnx: str | None = None
    prompt: list[str] = field(default_factory=list)
    prompt_file: str | None = None
    suffix: str | None = None
    suffix_file: str | None = None
    middle_only: bool = False
    interactive: bool = False
    num_samples: int = 1
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int | None = None
    trace: bool | str = False
    rag: list[str] = field(default_factory=list)
    rag_tokens: int | None = None
    rag_top_k: int = 1
    rag_method: Literal["tfidf", "bm25", "checkpoint", "sentence"] = "tfidf"
    no_cache: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "fp32"

    def __post_init__(self):
        if not 1 <= self.num_samples <= 2**20:
            raise ValueError(f"num_samples is {self.num_samples}: set it from 1 to {2**20:,}")
        if self.onnx is not None and (self.checkpoint is not None or self.precision != "fp32"):
            raise ValueError("--onnx has its own weights and precision: leave out checkpoint and --precision")
        if self.interactive and (self.prompt or self.prompt_file is not None):
            raise ValueError("--interactive reads prompts from the terminal: leave out --prompt and --prompt_file")
        given = (self.suffix is not None) + (self.suffix_file is not None)
        if given == 2:
            raise ValueError("--suffix and --suffix_file both give the suffix: leave out one of the two")
        if given and self.interactive:
            raise ValueError("--interactive continues what is typed: leave out the suffix")
        if self.middle_only and not given:
            raise ValueError("--middle_only needs a suffix: set --suffix or --suffix_file")
        if self.trace and self.max_new_tokens == 0:
            raise ValueError("--trace shows how tokens are chosen: set max_new_tokens to 1 or more")
        if not 1 <= self.rag_top_k <= 10_000 or (self.rag_tokens is not None and self.rag_tokens < 1):
            raise ValueError("rag_tokens and rag_top_k must be 1 or more, and rag_top_k 10,000 or less")
        if self.rag and self.onnx is not None and self.rag_method == "checkpoint":
            raise ValueError("rag_method checkpoint needs a checkpoint, and --onnx has none: choose tfidf")

    def prompts(self) -> list[str]:
        """Returns the prompts of --prompt and --prompt_file, or one empty prompt if there are none."""
        prompts = list(self.prompt)
        if self.prompt_file is not None:
            text = read_text(self.prompt_file, "--prompt_file")
            if not text:
                raise UserError(f"--prompt_file {self.prompt_file} is empty: write one prompt per line")
            prompts += text.removesuffix("\n").split("\n")
        return prompts or [""]

    def read_suffix(self):
        """Puts the content of --suffix_file into `suffix`."""
        if self.suffix_file is not None:
            self.suffix = read_text(self.suffix_file, "--suffix_file")


@before_torch
def parse_args(argv=None) -> tuple[GenerateConfig, ExitRule]:
    return tuple(parse_flags(__doc__, GenerateConfig, ExitRule, argv=argv, positional="checkpoint"))


import torch

from src.evaluation.trace import Trace, check_path, print_table, write_json
from src.evaluation.trace_picture import draw_trace
from src.exits import max_depth, visits_per_recursion_step
from src.language_model import continue_texts
from src.quantize import load_for_writing
from src.runtime import choose_device, mix_seed


def write_texts(model, tokenizer, prompts, config: GenerateConfig, rule: ExitRule, context=None):
    """Continue all prompts as one batch.  Prints a single text while it is generated, several texts at the end.

    context: a PromptContext, whose code the model reads before each prompt; it is not printed."""
    inputs = [context.with_code(prompt) for prompt in prompts] if context else prompts
    texts, streams = [""] * len(prompts) if config.middle_only else list(prompts), len(prompts) == 1
    made = shown = 0  # tokens generated, characters printed
    options = {k: getattr(config, k) for k in ("temperature", "top_k", "top_p", "seed", "suffix")}
    if rule != ExitRule():
        options |= {"exit": rule, "depths": []}
    ends = None if config.suffix is None or tokenizer.fim is None else tokenizer.infill_ends
    trace = Trace(tokenizer, limit=max_depth(model.config, rule), ends=ends) if config.trace else None
    options |= {"use_cache": not config.no_cache, "thoughts": trace}
    start = time.perf_counter()
    try:
        for pieces, tokens in continue_texts(model, tokenizer, inputs, config.max_new_tokens, **options):
            texts = [text + piece for text, piece in zip(texts, pieces)]
            made += tokens
            if streams:  # the first piece also prints the prompt: a prompt that is rejected is never printed
                print(texts[0][shown:], end="", flush=True)
                shown = len(texts[0])
    except ValueError as error:
        raise UserError(error) from None
    seconds = time.perf_counter() - start
    after = "" if config.middle_only else config.suffix or ""
    print(after if streams else "\n\n".join(text + after for text in texts), flush=True)
    speed = f"{made} tokens in {seconds:.2f} s: {made / max(seconds, 1e-9):.1f} tokens/s"
    if "depths" in options and made:
        steps = torch.stack(options["depths"]).double()
        mean = (steps.sum() / steps.count_nonzero()).item()  # without rows that had ended
        visits = mean * visits_per_recursion_step(model.config)
        speed += f"; {mean:.2f} of {max_depth(model.config, rule)} recursion steps, {visits:.1f} visits per token"
    print(speed, file=sys.stderr)
    if trace:
        show(trace, config.trace, prompts[0])


def check_lengths(model, tokenizer, prompts, suffix):
    """Raises UserError if one of several prompts does not fit into the context, before any of them is continued."""
    for number, prompt in enumerate(prompts if len(prompts) > 1 else (), 1):
        whole = tokenizer.infill(prompt, suffix) if suffix and tokenizer.fim else tokenizer.encode(prompt, bos=True)
        if len(whole) > (most := model.config.max_seq_len):
            raise UserError(f"prompt {number} has {len(whole)} tokens, the context holds {most}: shorten it")


def write_batches(model, tokenizer, prompts, config: GenerateConfig, rule: ExitRule, context=None):
    """Continue the prompts, ROWS at once.  The arguments are those of `write_texts`."""
    for start in range(0, len(prompts), ROWS):
        own = copy.copy(config)
        if start:  # later batches look like one batch: a blank line between texts, and other random numbers
            print()
            own.trace, own.seed = False, None if config.seed is None else mix_seed(config.seed, start)
        write_texts(model, tokenizer, prompts[start : start + ROWS], own, rule, context)


def show(trace: Trace, where: bool | str, prompt: str):
    """Print the trace as a table on stderr, or draw it in the file `where` with its data in a .json beside it."""
    if where is True:
        return print_table(trace, sys.stderr)
    data = Path(where).with_suffix(".json")
    write_json(trace, data, prompt)
    draw_trace(trace, where, prompt)
    print(f"trace: {where} and {data}", file=sys.stderr)


def converse(model, tokenizer, config, rule, context=None):
    """Continue each line that is typed, until end of file."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # invalid UTF-8 is then an error of one line, not of the program
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        try:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            prompt = input().removeprefix("\ufeff")  # PowerShell puts a BOM at the start of a pipe
        except EOFError:
            return
        try:
            if not is_text(prompt):
                raise UserError("the prompt is not UTF-8 text: type it again")
            write_batches(model, tokenizer, [prompt] * config.num_samples, config, rule, context)
        except UserError as error:  # report it and wait for the next prompt
            print(f"error: {error}", file=sys.stderr)


def load(config):
    """Returns (model, tokenizer); with --onnx the model is an ONNX session with the same interface."""
    if config.onnx is not None:
        from src.onnx.session import load_onnx

        return load_onnx(config.onnx, config.device)
    if config.checkpoint is not None and not Path(config.checkpoint).exists():
        raise UserError(
            f"no checkpoint folder at {config.checkpoint}: train one with train_trm_lm.py, correct the path, "
            f"or did you mean --prompt {shlex.quote(config.checkpoint)}?"
        )
    return load_for_writing(config.checkpoint, choose_device(config.device), config.precision)


def read_context(config, model, tokenizer):
    """Returns the PromptContext of --rag."""
    from src.rag.prompts import PromptContext

    options = {"tokens": config.rag_tokens, "top_k": config.rag_top_k, "method": config.rag_method}
    options |= {"checkpoint": config.checkpoint, "suffix": config.suffix}
    return PromptContext(config.rag, tokenizer, model.config.max_seq_len, **options)


def main(argv=None):
    config, rule = parse_args(argv)
    if isinstance(config.trace, str):
        check_path(config.trace)
        check_distinct([Path(config.trace).with_suffix(".json")], [config.prompt_file, config.suffix_file])
    config.read_suffix()
    prompts = config.prompts()
    model, tokenizer = load(config)
    check_lengths(model, tokenizer, prompts, config.suffix)
    context = read_context(config, model, tokenizer) if config.rag else None
    if config.interactive:
        converse(model, tokenizer, config, rule, context)
    else:
        copies = [prompt for prompt in prompts for _ in range(config.num_samples)]
        write_batches(model, tokenizer, copies, config, rule, context)


if __name__ == "__main__":
    run(main)
