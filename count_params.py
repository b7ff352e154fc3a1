"""Count a model's parameters, effective depth, FLOPs per token and key/value-cache bytes, without creating its weights.

    python count_params.py runs/demo                          # a trained model: a checkpoint folder or a run folder
    python count_params.py --config configs/ja_wiki.yaml      # the model of a training recipe
    python count_params.py --recursion none --n_layers 12 --d_model 768 --n_heads 12 --vocab_size 50257
    python count_params.py runs/demo --json                   # print one JSON object

Without a checkpoint and --config, it counts the TRM that the defaults of the flags describe, not the model of
configs/default.yaml. Reads only the checkpoint's config.json or the recipe. It prints to stdout and writes no files.
src/metrics.py explains how FLOPs are counted.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from src.config import before_torch, flag_value, parse_flags, run
from src.errors import UserError
from src.files.plain_yaml import read_yaml
from src.model_config import TRMConfig
from src.training.train_config import DataConfig, RuntimeConfig, TrainConfig

DEFAULT_VOCAB = 16000  # the default of train_spm.py
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass
class CountConfig:
    """What to count.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is counted); the flag name may be left
            out. Without it, the model of the flags below and of --config is counted
        json: print one JSON object instead of text
    """

    checkpoint: list[str] = field(default_factory=list)
    json: bool = False


def _recipe_of(argv) -> dict | None:
    """Returns the content of the --config file, {} if there is no such file, or None without the flag."""
    path = flag_value(argv, "config")
    if path is None:
        return None
    return read_yaml(path) if Path(path).is_file() else {}


def _count_of_puzzles(argv) -> tuple[CountConfig, TRMConfig, None]:
    """Returns the same as `parse_args` for a recipe of train_puzzles.py."""
    from src.tasks.puzzle_config import PuzzleSettings, model_config  # imports torch
    from src.tasks.puzzle_folder import kind_named

    args, *parts = parse_flags(
        __doc__, CountConfig, *PuzzleSettings.__annotations__.values(), argv=argv, positional="checkpoint"
    )
    if args.checkpoint:
        raise UserError(f"{args.checkpoint[0]} has its own model settings: leave out --config and the model flags")
    settings = PuzzleSettings(*parts)
    kind = kind_named(settings.puzzle.puzzle)
    return args, model_config(settings.model, kind.cells, kind.vocab_size), None


def _vocab_of(data: DataConfig | None) -> tuple[int | None, str]:
    """Returns the number of tokens of a recipe's tokenizer, and how it is known.  data: None = no recipe.

    The number is None for a tokenizer that the run trains, or whose file is missing."""
    if data is None:
        return None, ""
    name = data.sp_model or data.tokenizer
    if name != "byte" and not Path(name).exists():
        return None, ""
    from src.tokenizer import ByteLevelTokenizer, read_tokenizer

    names = {"fill_in_the_middle": True} if data.fim_rate else None
    tokenizer = ByteLevelTokenizer(names) if name == "byte" else read_tokenizer(name)
    return tokenizer.vocab_size, f"the tokenizer {name} has"


def _usual_vocab(data: DataConfig | None) -> tuple[int, str]:
    """Returns the number of tokens where neither the settings nor a tokenizer say it, and how it is known."""
    if data is not None and data.tokenizer == "sentencepiece" and data.sp_model is None:
        from src.data.token_store import ON_THE_SPOT_VOCAB

        return ON_THE_SPOT_VOCAB, "the run trains a tokenizer of"
    return DEFAULT_VOCAB, "assuming"


@before_torch
def parse_args(argv=None) -> tuple[CountConfig, TRMConfig, TrainConfig | None]:
    """Returns the script's own settings, the model to count, and the training of its recipe, if there is one.

    Raises UserError if both a checkpoint and model settings are given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    classes = [CountConfig, TRMConfig]
    if (recipe := _recipe_of(argv)) is not None and "puzzle" in recipe:
        return _count_of_puzzles(argv)
    if recipe is not None:  # it also has settings of data and training
        classes += [DataConfig, TrainConfig, RuntimeConfig]
    args, config, *others = parse_flags(__doc__, *classes, argv=argv, positional="checkpoint")
    if len(args.checkpoint) > 1:
        raise UserError(f"{len(args.checkpoint)} checkpoints ({', '.join(args.checkpoint)}): count them one at a time")
    if args.checkpoint and config != TRMConfig():
        raise UserError(f"{args.checkpoint[0]} has its own model settings: leave out --config and the model flags")
    if args.checkpoint:
        from src.checkpoint import load_config  # imports torch, so it is not at the top

        config = load_config(args.checkpoint[0])
    data = others[0] if others else None
    size, why = _vocab_of(data)
    if config.vocab_size is None:
        size, why = (size, why) if size else _usual_vocab(data)
        print(f"vocab_size is not given: {why} {size:,} tokens", file=sys.stderr)
    elif size not in (None, config.vocab_size):
        print(f"vocab_size is {size:,}, that of the tokenizer", file=sys.stderr)
    return args, replace(config, vocab_size=size or config.vocab_size), others[1] if others else None


import torch

from src.metrics import cache_bytes_per_token, count_parameters, effective_depth, flops_per_token, format_params
from src.model import TRMModel
from src.training.depths import mean_flops


def count(config: TRMConfig, train: TrainConfig | None = None) -> dict:
    """Returns all figures of a model; its keys are those of --json.

    train: adds the mean training FLOPs of a run whose depth depends on the step."""
    with torch.device("meta"):  # tensors without storage: even the largest model takes no memory or time
        model = TRMModel(config)
    depth, flops = effective_depth(config), flops_per_token(config)
    cache = {name: cache_bytes_per_token(config, size) for name, size in DTYPE_BYTES.items()}
    return {
        "model": config.to_dict(),
        "parameters": count_parameters(model),
        "visits_per_step": config.visits_per_step,
        "visits_per_token": config.visits_per_step * config.train_steps,
        "effective_depth_per_step": depth.per_step,
        "effective_depth": depth.total,
        "train_flops_per_token": {"matmul": flops.train_matmul, "attention": flops.train_attention, "sum": flops.train},
        "decode_flops_per_token": {
            "matmul": flops.decode_matmul,
            "attention": flops.decode_attention,
            "sum": flops.decode,
        },
        "mean_train_flops_per_token": None if train is None else mean_flops(train, config),
        "cache_bytes_per_token": cache,
        "cache_bytes_full_context": {name: size * config.max_seq_len for name, size in cache.items()},
    }


def show(config: TRMConfig, facts: dict) -> None:
    """Print the figures as text."""
    c, n = config, facts["parameters"]
    family = {
        "none": "plain transformer",
        "loop": f"looped transformer, deep_steps {c.deep_steps}",
        "trm": f"TRM (latent, deep, supervision steps {c.latent_steps}, {c.deep_steps}, {c.supervision_steps})",
    }
    print(f"{family[c.recursion]}, d_model {c.d_model}, n_layers {c.n_layers}, vocabulary {c.vocab_size:,}")
    print("\nparameters")
    for name in ("total", "trainable", "embedding", "recursive_core"):
        print(f"  {name:16}{n[name]:>16,}  {format_params(n[name])}")
    print("  of which")
    for name, size in n["per_module"].items():
        if size:
            print(f"    {name:14}{size:>16,}  {format_params(size)}")
    steps = f" ({c.train_steps} supervision steps of {facts['visits_per_step']})" if c.train_steps > 1 else ""
    print(f"\nvisits per token    {facts['visits_per_token']}{steps}")
    print(f"effective depth     {facts['effective_depth']} blocks")
    print(f"\nFLOPs per token, context {c.max_seq_len}   matmul + attention")
    for name in ("train", "decode"):
        flops = facts[f"{name}_flops_per_token"]
        parts = f"{format_params(flops['matmul'])} + {format_params(flops['attention'])}"
        print(f"  {name:16}{parts:>20} = {format_params(flops['sum'])}")
    if (mean := facts["mean_train_flops_per_token"]) not in (None, facts["train_flops_per_token"]["sum"]):
        print(f"  {'train, mean':16}{format_params(mean):>20}, because the depth of a step depends on the recipe")
    print("\nkey/value cache")
    for name, size in facts["cache_bytes_per_token"].items():
        full = facts["cache_bytes_full_context"][name] / 1024**2
        print(f"  {name:8}{size:>12,} bytes per token, {full:,.2f} MiB for {c.max_seq_len:,} tokens")


def main(argv=None) -> None:
    args, config, train = parse_args(argv)
    facts = count(config, train)
    print(json.dumps(facts, indent=2)) if args.json else show(config, facts)


if __name__ == "__main__":
    run(main)
