"""Models in and out: Llama weights of other programs become checkpoints, and checkpoints become theirs.

    python convert.py stories260K.bin runs/stories260K --tokenizer tok512.bin     # llama2.c; its .pt as well
    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2                # GGUF, needs the gguf package
    python convert.py ~/models/TinyLlama runs/tinyllama                           # a Llama folder of Hugging Face
    python convert.py runs/mine runs/mine-hf --to hf                              # for transformers: plain models
    python convert.py runs/mine runs/mine.bin --to llama2c                        # for llama2.c's run.c: plain models
    python convert.py runs/mine runs/mine-hub --to hub                            # to upload: every family

The format of SOURCE is recognized by what it holds. A checkpoint goes wherever others go: generate.py, eval_lm.py,
export_onnx.py. Nothing in a source is run. DEST must not exist; its path goes to stdout when it is written.
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
            Face, llama2c = a legacy .bin
    """

    paths: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    to: Literal["checkpoint", "hub", "hf", "llama2c"] = "checkpoint"


@before_torch
def parse_args(argv=None) -> ConvertConfig:
    (config,) = parse_flags(__doc__, ConvertConfig, argv=argv, positional="paths")
    if len(config.paths) != 2:
        raise UserError(f"{len(config.paths)} paths given: name the model and where it goes, SOURCE DEST")
    return config


from src.interop import check_free, read_source, recognize, write
from src.metrics import format_params


def main(argv=None):
    config = parse_args(argv)
    path, dest = config.paths
    check_free(dest)
    print(f"{path}: {recognize(path).name}", file=sys.stderr)
    source = read_source(path, config.tokenizer)
    size = format_params(sum(tensor.numel() for tensor in source.weights.values()))
    print(f"{source.config.recursion}, {size} weights, {source.config.vocab_size:,} tokens", file=sys.stderr)
    write(source, dest, config.to)
    if config.to == "llama2c":
        print("a .bin holds no tokenizer: run.c takes one with -z", file=sys.stderr)
    if config.to in ("hub", "hf"):
        print(f"to upload: hf upload NAME/OF_REPOSITORY {dest}", file=sys.stderr)
    print(dest)


if __name__ == "__main__":
    run(main)
