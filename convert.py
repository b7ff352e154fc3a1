"""Models in and out: Llama weights of other programs become checkpoints, and checkpoints become theirs.

    python convert.py stories260K.bin runs/stories260K --tokenizer tok512.bin     # llama2.c; its .pt as well
    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2                # GGUF, needs the gguf package
    python convert.py ~/models/TinyLlama runs/tinyllama                           # a Llama folder of Hugging Face
    python convert.py runs/mine runs/mine-hf --to hf                              # for transformers: plain models
    python convert.py runs/mine runs/mine.bin --to llama2c                        # for llama2.c's run.c: plain models
    python convert.py runs/mine runs/mine-hub --to hub                            # to upload: every family

The format of SOURCE is recognized by what it holds. A checkpoint goes wherever others go: generate.py, eval_lm.py,
export_onnx.py. Nothing in a source is run. DEST must not exist; its path goes to stdout when it is written.

A converted model begins and ends its texts as at home: with BOS or without, at each of the ends that its files name;
one of llama2.c ends at BOS too. Rows of an embedding that no token has are left out.
  hf       transformers gets our ids, and texts (pipeline) but for characters of which a model writes a part only, and
           ties between equally probable cuts of a unigram tokenizer. Names of special tokens in a text stay text.
           A space that a tokenizer puts before a text stays where a whole text is decoded.
  llama2c  tokens change places, and m.tokenizer.bin lies beside m.bin: run m.bin -z m.tokenizer.bin. run.c puts a
           space before a prompt, cuts it by the scores of pieces alone (a unigram tokenizer, or one with a rule for
           words, may cut it otherwise), and prints no single byte over 127 (characters beyond the vocabulary).
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from src.config import before_torch, parse_flags, run
from src.errors import UserError


@dataclass
class ConvertConfig:
    """What becomes what.

    Args:
        paths: SOURCE and DEST (need no flag name)
        tokenizer: the model's tokenizer, where it is not part of SOURCE: a tokenizer.json, a SentencePiece .model, a
            tokenizer .bin of llama2.c, byte
        to: checkpoint = a folder of this project, hub = the same with a model card, hf = a Llama folder of Hugging
            Face, llama2c = a legacy .bin and its tokenizer
        license: of the model, for the card of hub and hf, such as mit; default: what SOURCE says, if it does
    """

    paths: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    to: Literal["checkpoint", "hub", "hf", "llama2c"] = "checkpoint"
    license: str | None = None


@before_torch
def parse_args(argv=None) -> ConvertConfig:
    (config,) = parse_flags(__doc__, ConvertConfig, argv=argv, positional="paths")
    if len(config.paths) != 2:
        raise UserError(f"{len(config.paths)} paths given: name the model and where it goes, SOURCE DEST")
    return config


from src.interop.formats import check_free, read_source, recognize, write
from src.interop.llama2c import tokenizer_file
from src.metrics import format_params


def main(argv=None):
    config = parse_args(argv)
    path, dest = config.paths
    check_free(dest)
    print(f"{path}: {recognize(path).name}", file=sys.stderr)
    source = read_source(path, config.tokenizer)
    size = format_params(sum(tensor.numel() for tensor in source.weights.values()))
    print(f"{source.config.recursion}, {size} weights, {source.config.vocab_size:,} tokens", file=sys.stderr)
    if config.license is not None:
        source.info["license"] = config.license
    write(source, dest, config.to)
    if config.to == "llama2c":
        print(f"{tokenizer_file(dest)} is its tokenizer, which run.c takes with -z", file=sys.stderr)
    if config.to in ("hub", "hf"):
        print(f"to upload: hf upload NAME/OF_REPOSITORY {dest}", file=sys.stderr)
    print(dest)


if __name__ == "__main__":
    run(main)
