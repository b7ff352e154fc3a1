"""Checkpoints of the TRM authors' code (github.com/SamsungSAILMontreal/TinyRecursiveModels), read and written.

Their checkpoint is a state dict, written by torch.save; `all_config.yaml` beside it holds the settings. Most settings
follow from the weights: the sizes, the mixer and the prefix. The numbers of heads, cycles and steps come from the YAML.

Their model is ours with norm post without gain, injection sum, the stablemax loss averaged over rows, and a halting
head that reads position 0. Their files store two things in another form:
- q_head has two rows (halt, continue). The settings that they publish use only the first, so only the first is kept.
- They multiply the sum of embedding and learned positions by sqrt(1/2), and then by sqrt(D).
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import check_tensors
from src.config import build
from src.errors import UserError
from src.files.plain_yaml import read_yaml
from src.model import TRMConfig

CONFIG = "all_config.yaml"
CELLS = {11: 81, 6: 900, 12: 900}  # vocabulary -> cells, of Sudoku, mazes and ARC
NAMES = {
    "embed_tokens.embedding_weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "puzzle_emb.weights": "puzzle_embed.weight",
    "embed_pos.embedding_weight": "pos_embed.weight",
    "q_head.weight": "q_head.weight",
    "q_head.bias": "q_head.bias",
    "H_init": "y_init",
    "L_init": "z_init",
}
PARTS = {
    "self_attn.qkv_proj": "attn.qkv",
    "self_attn.o_proj": "attn.out",
    "mlp_t.gate_up_proj": "attn.mlp.gate_up",
    "mlp_t.down_proj": "attn.mlp.down",
    "mlp.gate_up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}
BLOCK = re.compile(r"L_level\.layers\.(\d+)\.(\w+\.\w+)\.weight")


def strip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that torch.compile and wrappers put before names (`_orig_mod.`, `model.inner.`)."""
    return {re.sub(r"^(?:_orig_mod\.|module\.|model\.|inner\.)+", "", name): value for name, value in tensors.items()}


def is_official(names) -> bool:
    """Whether these are names of weights of the authors' model."""
    return any(re.search(r"(^|\.)H_init$", str(name)) for name in names)


def read_official(tensors: dict[str, Tensor], path, settings: dict | None = None) -> tuple[TRMConfig, dict]:
    """Returns (config, weights under this model's names) of the authors' state dict.

    settings: the content of their all_config.yaml, by default of the one beside `path`.
    Raises UserError if a weight is missing, unknown or of another shape, or if the settings are not those of TRM."""
    tensors = strip_names(check_tensors(tensors, path))
    settings = _settings_beside(path) if settings is None else settings
    config = _config(tensors, settings, path)
    weights = {_our_name(name, path): tensor for name, tensor in tensors.items()}
    for name in ("q_head.weight", "q_head.bias"):
        weights[name] = weights[name][:1]
    if "pos_embed.weight" in weights:
        weights["pos_embed.weight"] = weights["pos_embed.weight"] * config.embed_scale
    return config, weights


def write_official(config: TRMConfig, weights: dict[str, Tensor], where) -> tuple[dict[str, Tensor], dict]:
    """Returns (state dict under the authors' names, their settings) of a model of this project.

    Raises UserError if the authors' code lacks something that the model needs: see `_unlike`."""
    if reason := _unlike(config):
        raise UserError(f"{where}: the authors' code has no {reason}: keep the model as a checkpoint")
    theirs = {}
    names = {ours: name for name, ours in NAMES.items()}
    parts = {ours: part for part, ours in PARTS.items()}
    for name, tensor in weights.items():
        if block := re.fullmatch(r"net\.blocks\.(\d+)\.(.+)\.weight", name):
            part = block[2]
            if part.endswith("norm"):
                if not bool((tensor == 1).all()):
                    raise UserError(f"{where}: {name} is not 1, and the authors' norms have no gain")
                continue
            theirs[f"model.inner.L_level.layers.{block[1]}.{parts[part]}.weight"] = tensor
        else:
            theirs[f"model.inner.{names[name]}"] = tensor
    q_weight, q_bias = theirs["model.inner.q_head.weight"], theirs["model.inner.q_head.bias"]
    theirs["model.inner.q_head.weight"] = torch.cat((q_weight, torch.zeros_like(q_weight)))
    theirs["model.inner.q_head.bias"] = torch.cat((q_bias, torch.full_like(q_bias, -5.0)))  # its starting value
    if config.positions == "learned":
        name = "model.inner.embed_pos.embedding_weight"
        theirs[name] = theirs[name] / config.embed_scale
        # their embedding has the factor sqrt(1/2) beside sqrt(D)
        embed = "model.inner.embed_tokens.embedding_weight"
        theirs[embed] = theirs[embed] * (config.embed_scale / math.sqrt(config.d_model / 2))
    return theirs, {"arch": _their_settings(config)}


def _settings_beside(path) -> dict:
    file = Path(path).with_name(CONFIG)
    if not file.is_file():
        raise UserError(f"{path}: there is no {CONFIG} with the numbers of heads and cycles beside it: copy it there")
    return read_yaml(file)


def _config(tensors, settings, path) -> TRMConfig:
    arch = settings.get("arch", settings)
    try:
        vocab_size, dim = tensors["embed_tokens.embedding_weight"].shape
        layers = 1 + max(int(found[1]) for found in map(BLOCK.fullmatch, tensors) if found)
        d_ff = tensors["L_level.layers.0.mlp.down_proj.weight"].shape[1]
        heads, cycles, latent = int(arch["num_heads"]), int(arch["H_cycles"]), int(arch["L_cycles"])
    except (KeyError, ValueError, TypeError) as error:
        wrong = f"{path} is not a TRM of the authors' code, or its {CONFIG} belongs to another run"
        raise UserError(f"{wrong}: {error} is missing") from None
    mixer = tensors.get("L_level.layers.0.mlp_t.down_proj.weight")
    puzzles = tensors.get("puzzle_emb.weights")
    prefix = 0
    if puzzles is not None:
        prefix = int(arch.get("puzzle_emb_len") or -(-puzzles.shape[1] // dim))
    cells = len(mixer) - prefix if mixer is not None else int(settings.get("seq_len") or CELLS.get(vocab_size, 900))
    is_learned = "embed_pos.embedding_weight" in tensors
    values = {
        **{"vocab_size": vocab_size, "d_model": dim, "n_heads": heads, "n_layers": layers, "d_ff": d_ff},
        **{"max_seq_len": cells, "causal": False, "norm": "post", "norm_gain": False, "weight_init": "truncated"},
        **{"recursion": "trm", "latent_steps": latent, "deep_steps": cycles, "prefix_tokens": prefix},
        "supervision_steps": int(arch.get("halt_max_steps", 16)),
        "positions": "learned" if is_learned else "none" if mixer is not None else "rope",
        "embed_scale": math.sqrt(dim / 2 if is_learned else dim),
        "token_loss": "softmax" if _loss(arch) == "softmax_cross_entropy" else "stablemax",
        **{"loss_mean": "row", "act_weight": 0.5, "act_threshold": 0.5, "act_target": "correct"},
    }
    if mixer is not None:
        values |= {"mixer": "mlp", "mixer_ff": mixer.shape[1]}
    if puzzles is not None:
        values |= {"puzzle_ids": len(puzzles), "puzzle_dim": puzzles.shape[1]}
    return build(TRMConfig, values, where=f"{path}: ")


def _loss(arch):
    loss = arch.get("loss")
    return loss.get("loss_type") if isinstance(loss, dict) else None


def _our_name(name, path) -> str:
    if name in NAMES:
        return NAMES[name]
    block = BLOCK.fullmatch(name)
    if block is None or block[2] not in PARTS:
        raise UserError(f"{path}: {name} is not a weight of TRM: give a checkpoint of the authors' TRM")
    return f"net.blocks.{block[1]}.{PARTS[block[2]]}.weight"


def _unlike(c: TRMConfig) -> str | None:
    """Returns a name for something that this model has and the authors' code lacks, or None."""
    unlike = {
        "recursion other than trm": c.recursion != "trm",
        "causal model": c.causal,
        "norm other than post": c.norm != "post",
        "injection other than sum": c.injection != "sum",
        "gate": c.gate,
        "prelude or coda": c.prelude_layers + c.coda_layers > 0,
        "grouped key/value heads": c.n_kv_heads != c.n_heads,
        "qk_norm": c.qk_norm,
        "tied head": c.tie_embeddings,
        "model without halting head": not c.halting,
        "prefix without puzzle_ids": c.prefix_tokens > 0 and c.puzzle_ids == 0,
        "rope_scaling": c.rope_scaling is not None,
        f"embed_scale {c.embed_scale}": c.positions != "learned" and not math.isclose(c.embed_scale**2, c.d_model),
    }
    return next((what for what, is_so in unlike.items() if is_so), None)


def _their_settings(c: TRMConfig) -> dict:
    return {
        "hidden_size": c.d_model,
        "num_heads": c.n_heads,
        "H_cycles": c.deep_steps,
        "L_cycles": c.latent_steps,
        "H_layers": 0,
        "L_layers": c.n_layers,
        "halt_max_steps": c.supervision_steps,
        "puzzle_emb_ndim": c.puzzle_dim if c.puzzle_ids else 0,
        "puzzle_emb_len": c.prefix_tokens,
        "mlp_t": c.mixer == "mlp",
        "pos_encodings": "learned" if c.positions == "learned" else "rope",
        "loss": {"loss_type": f"{c.token_loss}_cross_entropy"},
        "no_ACT_continue": True,
    }
