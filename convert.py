"""Convert models of other programs to checkpoints, and checkpoints to the formats of other programs.

    python convert.py stories260K.bin runs/stories260K --tokenizer tok512.bin     # llama2.c .bin, or its .pt
    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2                # GGUF; needs the gguf package
    python convert.py ~/models/TinyLlama runs/tinyllama                           # a Llama folder of Hugging Face
    python convert.py their_run/step_65104 runs/sudoku                            # weights of the TRM authors' code
    python convert.py runs/mine runs/mine-hf --to hf                              # for transformers: plain family only
    python convert.py runs/mine runs/mine.bin --to llama2c                        # for run.c of llama2.c: plain family
    python convert.py runs/mine runs/mine-hub --to hub                            # for the Hugging Face Hub: any family
    python convert.py runs/sudoku runs/theirs/model.pt --to trm                   # for the TRM authors' code
    python convert.py runs/mine runs/mine-tokenizer --to tokenizer                # for clients of serve.py: any family

The script detects the format of SOURCE from its content. The resulting checkpoint works like any other: with
generate.py, eval_lm.py and export_onnx.py, or, if it solves puzzles, with train_puzzles.py --init_from. No code in
SOURCE is executed. DEST must not exist. After writing DEST, the script prints its path on stdout.

A converted model keeps the start and end tokens of its source: it uses BOS if the source does, and stops at every end
token that the source files name. A llama2.c model also stops at BOS. Embedding rows without a token are dropped.

For single formats, by their names in --to:

  hf       transformers produces the same token ids as this project. A pipeline produces the same text, except when the
           model writes only part of a character, or when a unigram tokenizer has two equally probable segmentations.
           The name of a special token inside a text is encoded as plain text. If the tokenizer adds a space before a
           text, decoding a whole text keeps that space.
  llama2c  The tokens are reordered, and m.tokenizer.bin is written next to m.bin: use `run m.bin -z m.tokenizer.bin`.
           run.c adds a space before a prompt. It segments the prompt by piece scores only, so a unigram tokenizer or
           one that splits words first may give other tokens. It does not print single bytes above 127, which encode
           characters outside the vocabulary.
  trm      As SOURCE: a state dict of torch.save or a .safetensors file, with all_config.yaml in the same folder.
           Without that file, give --n_heads, --deep_steps (H_cycles) and --latent_steps (L_cycles). The authors'
           halting head has two rows, and their settings never use the second. Reading drops it; writing adds it with
           its starting values, weight 0 and bias -5. The all_config.yaml that is written has the settings of the model
           only.
  tokenizer  For a program that tokenizes text itself and asks serve.py for log-probabilities, such as the
           lm-evaluation-harness. What is said about hf holds here, too.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from src.config import before_torch, parse_flags, run
from src.errors import UserError


@dataclass
class ConvertConfig:
    """What to convert, and to which format.

    Args:
        paths: SOURCE and DEST, given without a flag
        tokenizer: the model's tokenizer, if SOURCE does not include it: a tokenizer.json, a SentencePiece .model, a
            llama2.c tokenizer .bin, or byte
        to: checkpoint = a checkpoint folder of this project, hub = the same with a model card, hf = a Hugging Face
            Llama folder, llama2c = a legacy .bin and its tokenizer, trm = a state dict for the TRM authors' code,
            tokenizer = the tokenizer alone, as AutoTokenizer of transformers reads it
        license: license named in the model card of hub and hf, such as mit; default: the license in SOURCE, if any
        n_heads: heads of a model of the TRM authors' code. This flag and the next ones replace the values of the
            all_config.yaml beside SOURCE, or stand in for that file
        deep_steps: T, called H_cycles there
        latent_steps: n, called L_cycles there
        supervision_steps: most supervision steps; default 16
        prefix_tokens: tokens in front of the cells; default 16, or as many as the weights leave for them
        puzzle: kind of the puzzle, such as sudoku9 or maze30x30; default: the one with this vocabulary
    """

    paths: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    to: Literal["checkpoint", "hub", "hf", "llama2c", "trm", "tokenizer"] = "checkpoint"
    license: str | None = None
    n_heads: int | None = None
    deep_steps: int | None = None
    latent_steps: int | None = None
    supervision_steps: int | None = None
    prefix_tokens: int | None = None
    puzzle: str | None = None


@before_torch
def parse_args(argv=None) -> ConvertConfig:
    (config,) = parse_flags(__doc__, ConvertConfig, argv=argv, positional="paths")
    if len(config.paths) != 2:
        raise UserError(f"{len(config.paths)} paths given: give two paths, SOURCE and DEST")
    return config


from src.interop.formats import check_free, read_source, recognize, write
from src.interop.llama2c import tokenizer_file
from src.interop.trm_official import CONFIG, Hints
from src.metrics import format_params
from src.tasks.puzzle_data import PuzzleForm


def main(argv=None):
    config = parse_args(argv)
    path, dest = config.paths
    check_free(dest)
    print(f"{path}: {recognize(path).name}", file=sys.stderr)
    hints = Hints(**{f.name: getattr(config, f.name) for f in fields(Hints)})
    source = read_source(path, config.tokenizer, hints)
    size = format_params(sum(tensor.numel() for tensor in source.weights.values()))
    puzzle = f", {source.tokenizer.kind.name}" if isinstance(source.tokenizer, PuzzleForm) else ""
    print(f"{source.config.recursion}, {size} weights, {source.config.vocab_size:,} tokens{puzzle}", file=sys.stderr)
    if config.license is not None:
        source.info["license"] = config.license
    write(source, dest, config.to)
    if config.to == "llama2c":
        print(f"{tokenizer_file(dest)} is its tokenizer: pass it to run.c with -z", file=sys.stderr)
    if config.to == "trm":
        print(f"{Path(dest).with_name(CONFIG)} has its settings", file=sys.stderr)
    if config.to in ("hub", "hf"):
        print(f"to upload: hf upload NAME/OF_REPOSITORY {dest}", file=sys.stderr)
    print(dest)


if __name__ == "__main__":
    run(main)
