"""README.md of a model folder that goes to the Hugging Face Hub: what the model is, its figures, how to run it."""

from pathlib import Path
from string import Template

import torch

from src.metrics import cache_bytes_per_token, count_parameters, effective_depth, flops_per_token, format_params
from src.model import TRMConfig, TRMModel

FAMILY = {
    "none": "A plain transformer.",
    "loop": "A looped transformer: {n_layers} blocks, visited {visits} times per token.",
    "trm": "A Tiny Recursive Model (arXiv:2510.04871): {n_layers} blocks, visited {visits} times per token.",
}
TAG = {"none": "llama", "loop": "looped-transformer", "trm": "tiny-recursive-model"}
NAMES = {  # of figures of config.json, with their units
    "step": "training steps",
    "best_valid_loss": "validation loss in nats per token",
    "source_name": "name of the original",
}


def model_card(name: str, config: TRMConfig, info: dict, to: str) -> str:
    """Markdown with the Hub's metadata in front. `info`: the figures that config.json holds; `to`: hub or hf."""
    from huggingface_hub import ModelCardData  # takes a second, so only where a card is written

    c = config
    metadata = ModelCardData(
        library_name={"hub": "generative-trm", "hf": "transformers"}[to],
        pipeline_tag="text-generation" if c.causal else None,
        tags=["generative-trm", TAG[c.recursion]],
        license=info.get("license"),
        base_model=info.get("base_model"),
    )
    family = FAMILY[c.recursion].format(n_layers=c.n_layers, visits=c.visits_per_step * c.train_steps)
    rows = "".join(f"| {what} | {value} |\n" for what, value in (_figures(c) | _measured(info)).items())
    template = Path(__file__).with_name("templates") / f"{to}.md"
    parts = {"metadata": metadata.to_yaml(), "name": name, "family": family, "rows": rows}
    return Template(template.read_text(encoding="utf-8")).substitute(parts)


def _figures(c) -> dict:
    with torch.device("meta"):
        parameters = count_parameters(TRMModel(c))
    return {
        "parameters": f"{parameters['total']:,}",
        "of which embedding": f"{parameters['embedding']:,}",
        "effective depth in blocks": effective_depth(c).total,
        "place of RMSNorm, positions": f"{c.norm}, {c.positions}",
        "width, query heads, key/value heads": f"{c.d_model}, {c.n_heads}, {c.n_kv_heads}",
        "vocabulary": f"{c.vocab_size:,}",
        "context in tokens": f"{c.max_seq_len:,}",
        "FLOPs per token, decoding at full context": format_params(flops_per_token(c).decode),
        "key/value cache in bytes per token, fp32": f"{cache_bytes_per_token(c, 4):,}",
    }


def _measured(info) -> dict:
    """The plain figures of config.json's info."""
    named = {NAMES.get(name, name.replace("_", " ")): value for name, value in info.items()}
    shown = {name: value for name, value in named.items() if isinstance(value, (int, float, str))}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in shown.items()}
