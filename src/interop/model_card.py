"""Writes README.md for a model folder on the Hugging Face Hub: a description, a table of figures, how to run it."""

from pathlib import Path
from string import Template

import torch

from src.interop.llama import is_plain
from src.metrics import cache_bytes_per_token, count_parameters, effective_depth, flops_per_token, format_params
from src.model import TRMConfig, TRMModel

FAMILY = {
    "none": "A plain transformer.",
    "loop": "A looped transformer: {n_layers} blocks, visited {visits} times per token.",
    "trm": "A Tiny Recursive Model (arXiv:2510.04871): {n_layers} blocks, visited {visits} times per token.",
}
TAG = {"none": "transformer", "loop": "looped-transformer", "trm": "tiny-recursive-model"}
NAMES = {  # row titles, with units, for the entries of info in config.json
    "step": "training steps",
    "best_valid_loss": "validation loss in nats per token",
    "source_name": "name of the original",
}


def model_card(name: str, config: TRMConfig, info: dict, to: str, puzzle: str | None = None) -> str:
    """Returns the model card: the Hub's metadata, then Markdown. `info` is that of config.json; `to` is hub or hf.

    puzzle: the kind of puzzle that the model solves; None for a language model."""
    from huggingface_hub import ModelCardData  # imported here because it takes a second

    c = config
    metadata = ModelCardData(
        library_name={"hub": "generative-trm", "hf": "transformers"}[to],
        pipeline_tag="text-generation" if c.causal else None,
        tags=["generative-trm", "llama" if is_plain(c) else TAG[c.recursion]],
        license=info.get("license"),
        base_model=info.get("base_model"),
    )
    family = FAMILY[c.recursion].format(n_layers=c.n_layers, visits=c.visits_per_step * c.train_steps)
    rows = "".join(f"| {what} | {value} |\n" for what, value in (_figures(c) | _measured(info)).items())
    template = Path(__file__).with_name("templates") / f"{'puzzle' if puzzle else to}.md"
    parts = {"metadata": metadata.to_yaml(), "name": name, "family": family, "rows": rows, "puzzle": puzzle}
    return Template(template.read_text(encoding="utf-8")).substitute(parts)


def _figures(c) -> dict:
    """Returns the rows that follow from the settings of the model."""
    with torch.device("meta"):
        parameters = count_parameters(TRMModel(c))
    rows = {
        "parameters": f"{parameters['total']:,}",
        "of which embedding": f"{parameters['embedding']:,}",
        "effective depth in blocks": effective_depth(c).total,
        "placement of RMSNorm, positions": f"{c.norm}, {c.positions}",
        "model width, query heads, key/value heads": f"{c.d_model}, {c.n_heads}, {c.n_kv_heads}",
        "vocabulary": f"{c.vocab_size:,}",
    }
    if not c.causal:
        flops = format_params(flops_per_token(c).decode * c.max_seq_len)
        return rows | {"cells of a puzzle": f"{c.max_seq_len:,}", "FLOPs of a solution": flops}
    return rows | {
        "context in tokens": f"{c.max_seq_len:,}",
        "FLOPs per token, decoding at full context": format_params(flops_per_token(c).decode),
        "key/value cache in bytes per token, fp32": f"{cache_bytes_per_token(c, 4):,}",
    }


def _measured(info) -> dict:
    """Returns the rows for the numbers and texts in config.json's info; nested values are skipped."""
    named = {NAMES.get(name, name.replace("_", " ")): value for name, value in info.items()}
    shown = {name: value for name, value in named.items() if isinstance(value, (int, float, str))}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in shown.items()}
