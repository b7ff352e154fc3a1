"""Checkpoints of the TRM authors' code (github.com/SamsungSAILMontreal/TinyRecursiveModels), read and written.

Their checkpoint is a state dict, written by torch.save; `all_config.yaml` beside it holds the settings. Most settings
follow from the weights: the sizes, the mixer and the prefix. The numbers of heads, cycles and steps come from the YAML,
or from `Hints`. Neither names the puzzle: its kind follows from the vocabulary and the number of cells.

Their model is ours with norm post without gain, injection sum, the stablemax loss averaged over rows, and a halting
head that reads position 0. Their files store two things in another form:
- q_head has two rows (halt, continue). The settings that they publish use only the first, so only the first is kept.
- They multiply the sum of embedding and learned positions by sqrt(1/2), and then by sqrt(D).
"""

import json
import math
import pickle
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import check_tensors, load_pt, own_state, read_weights
from src.config import build
from src.errors import UserError
from src.files.plain_yaml import dump_yaml, read_yaml
from src.model import TRMConfig, TRMModel
from src.tasks.puzzle_data import PuzzleForm
from src.tasks.puzzle_folder import kind_named, kind_of_size

CONFIG = "all_config.yaml"
CELLS = {11: 81, 6: 900, 12: 900}  # vocabulary -> cells, of Sudoku, mazes and ARC
PREFIX = 16  # tokens of their shipped settings
WIDTHS = 256  # their hidden widths are multiples of it
MOST_NAMES = 2**24  # bytes of a file that are searched for names of weights
NESTS = ("ema", "model", "state_dict")  # keys under which other code stores a state dict
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
PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.|model\.|inner\.)+")
TABLES = ("puzzle_emb.weights", "embed_pos.embedding_weight")  # that a model may lack
BLOCK = re.compile(r"L_level\.layers\.(\d{1,6})\.(\w+\.\w+)\.weight")


@dataclass(frozen=True)
class Hints:
    """Settings that the weights do not tell. Those that are given replace the values of all_config.yaml."""

    n_heads: int | None = None
    deep_steps: int | None = None
    latent_steps: int | None = None
    supervision_steps: int | None = None
    prefix_tokens: int | None = None
    puzzle: str | None = None  # kind of the puzzle, such as sudoku9

    def given(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}


NO_HINTS = Hints()


# ---- files ----------------------------------------------------------------------------------------------------------


def holds_official(path, start: bytes) -> bool:
    """Whether a file, which starts with these bytes, holds weights under the names of the authors' model.

    Looks at names only; nothing is unpickled."""
    try:
        if start[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        with archive.open(name) as file:
                            return b"H_init" in file.read(MOST_NAMES)
            return False
        if start[8:9] != b"{":
            return False
        with open(path, "rb") as file:
            header = file.read(8 + min(MOST_NAMES, int.from_bytes(start[:8], "little")))
        return is_official(json.loads(header[8:]))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, RecursionError):
        return False  # a broken file; the reader of another format reports it


def load_official(path, hints: Hints = NO_HINTS) -> tuple[TRMConfig, dict[str, Tensor], PuzzleForm]:
    """(config, weights under this model's names, form of the puzzle) of a .pt or .safetensors file of their weights.

    No code in the file is executed. Raises UserError if the file is broken, if settings or weights are missing or do
    not fit each other, or if no puzzle has this vocabulary."""
    tensors = strip_names(_load(path))
    settings = _settings_of(path, hints)
    kind = kind_named(hints.puzzle) if hints.puzzle else None
    if kind is not None:
        settings["seq_len"] = kind.cells
    config, weights = read_official(tensors, path, settings)
    kind = kind or kind_of_size(config.max_seq_len, config.vocab_size)
    if kind is None or (kind.cells, kind.vocab_size) != (config.max_seq_len, config.vocab_size):
        size = f"{config.max_seq_len} cells and {config.vocab_size} tokens"
        if kind is None:
            raise UserError(f"{path}: no known puzzle has {size}: name it with --puzzle")
        needed = f"{kind.name} has {kind.cells} cells and {kind.vocab_size} tokens"
        raise UserError(f"{path} is a model for {size}, but {needed}: correct --puzzle")
    return config, weights, PuzzleForm(kind)


def _load(path) -> dict:
    if zipfile.is_zipfile(path):
        try:
            saved = load_pt(path, mmap=True)
        except Exception as error:  # torch.load raises many types
            has_code = isinstance(error, pickle.UnpicklingError)
            reason = "it contains more than tensors and numbers" if has_code else repr(error)
            raise UserError(f"{path} is no checkpoint of the TRM authors' code, or broken ({reason})") from None
    else:
        saved = read_weights(path)
    nested = (saved.get(key) for key in NESTS) if isinstance(saved, dict) else ()
    for tensors in (saved, *nested):
        if isinstance(tensors, dict) and is_official(tensors):
            return {str(name): tensor for name, tensor in tensors.items()}
    raise UserError(f"{path} holds no state dict, alone or under {', '.join(NESTS)}: save the state dict alone")


def write_files(path, config: TRMConfig, weights: dict[str, Tensor], where):
    """Write a state dict under the authors' names, and its settings as all_config.yaml in the same folder.

    Raises UserError, which starts with `where`, if their code cannot hold the model."""
    theirs, settings = write_official(config, weights, where)
    try:
        torch.save(theirs, path)
    except RuntimeError as error:  # a full disk is not always an OSError
        raise UserError(f"cannot write {path}: {error}".splitlines()[0]) from None
    Path(path).with_name(CONFIG).write_text(dump_yaml(settings), encoding="utf-8")


def _settings_of(path, hints: Hints) -> dict:
    """Their settings: those of the YAML beside the weights, if there is one, with the hints in place."""
    file, names = Path(path).with_name(CONFIG), ("n_heads", "deep_steps", "latent_steps")
    if not file.is_file() and None in (getattr(hints, name) for name in names):
        flags = ", ".join(f"--{name}" for name in names)
        raise UserError(f"{path}: there is no {CONFIG} beside it: copy it from the run, or give {flags}")
    settings = read_yaml(file) if file.is_file() else {}
    arch = settings.get("arch", settings)
    if not isinstance(arch, dict):
        raise UserError(f"{file}: arch is {arch!r}, not a map of settings: copy it again")
    theirs = {"n_heads": "num_heads", "deep_steps": "H_cycles", "latent_steps": "L_cycles"}
    theirs |= {"supervision_steps": "halt_max_steps", "prefix_tokens": "puzzle_emb_len"}
    told = {theirs[name]: value for name, value in hints.given().items() if name in theirs}
    data = {name: settings[name] for name in ("seq_len", "num_puzzle_identifiers") if name in settings}
    return {"arch": arch | told} | data


# ---- weights and settings -------------------------------------------------------------------------------------------


def strip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that torch.compile and wrappers put before names (`_orig_mod.`, `model.inner.`)."""
    return {PREFIXES.sub("", name): value for name, value in tensors.items()}


def is_official(names) -> bool:
    """Whether these are names of weights of the authors' model."""
    return any(re.search(r"(^|\.)H_init$", str(name)) for name in names)


def read_official(tensors: dict[str, Tensor], path, settings: dict | None = None) -> tuple[TRMConfig, dict]:
    """Returns (config, weights under this model's names) of the authors' state dict.

    settings: the content of their all_config.yaml, by default of the one beside `path`.
    Raises UserError if a weight is missing, unknown or of another shape, or if the settings are not those of TRM."""
    tensors = strip_names(check_tensors(tensors, path))
    settings = _settings_of(path, NO_HINTS) if settings is None else settings
    config = _config(tensors, settings, path)
    weights = {_our_name(name, path): tensor for name, tensor in tensors.items()}
    for name, shape in (("q_head.weight", (2, config.d_model)), ("q_head.bias", (2,))):
        if name in weights:
            if weights[name].shape != shape:
                sizes = f"shape {list(weights[name].shape)}, not {list(shape)}"
                raise UserError(f"{path}: {name} has {sizes}: copy it again")
            weights[name] = weights[name][:1]
    _check_shapes(config, weights, path)
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
        elif name in names:
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
    data = {"seq_len": config.max_seq_len, "vocab_size": config.vocab_size}
    data["num_puzzle_identifiers"] = max(1, config.puzzle_ids)
    return theirs, {"arch": _their_settings(config)} | data


def _config(tensors, settings, path) -> TRMConfig:
    arch = settings.get("arch", settings)
    layers = {int(found[1]) for found in map(BLOCK.fullmatch, tensors) if found}
    tables = ["embed_tokens.embedding_weight", "L_level.layers.0.mlp.down_proj.weight"]
    tables += [name for name in ("L_level.layers.0.mlp_t.down_proj.weight", *TABLES) if name in tensors]
    for name in tables:
        if name not in tensors or tensors[name].ndim != 2 or not tensors[name].numel():
            raise UserError(f"{path} is no TRM of the authors' code: {name!r} is missing, or no matrix")
    (vocab_size, dim), (_, d_ff) = (tensors[name].shape for name in tables[:2])
    _check_told(tensors, settings, path)
    if arch.get("no_ACT_continue") is False:
        print(f"{path}: the second output of the halting head, which its settings use, is dropped", file=sys.stderr)
    heads, cycles, latent = (_whole(arch, name, path) for name in ("num_heads", "H_cycles", "L_cycles"))
    mixer, puzzles = tensors.get("L_level.layers.0.mlp_t.down_proj.weight"), tensors.get("puzzle_emb.weights")
    learned = tensors.get("embed_pos.embedding_weight")
    is_rotary = mixer is None and arch.get("pos_encodings", "rope") == "rope"
    fills = 0 if puzzles is None else -(-puzzles.shape[1] // dim)  # tokens that a puzzle's embedding fills
    cells, prefix = _lengths(arch, settings, vocab_size, fills, mixer if learned is None else learned, path)
    values = {
        **{"vocab_size": vocab_size, "d_model": dim, "n_heads": heads, "n_layers": max(len(layers), 1), "d_ff": d_ff},
        **{"max_seq_len": cells, "causal": False, "norm": "post", "norm_gain": False, "weight_init": "truncated"},
        **{"recursion": "trm", "latent_steps": latent, "deep_steps": cycles, "prefix_tokens": prefix},
        "supervision_steps": _whole(arch, "halt_max_steps", path, 16),
        "positions": "learned" if learned is not None else "rope" if is_rotary else "none",
        "embed_scale": math.sqrt(dim / 2 if learned is not None else dim),
        "norm_eps": arch.get("rms_norm_eps", 1e-5),
        "rope_theta": arch.get("rope_theta", 10000.0),
        "token_loss": "softmax" if _loss(arch) == "softmax_cross_entropy" else "stablemax",
        **{"loss_mean": "row", "act_weight": 0.5, "act_threshold": 0.5, "act_target": "correct", "pad_token_id": 0},
    }
    if mixer is not None:
        values |= {"mixer": "mlp", "mixer_ff": mixer.shape[1]}
    if puzzles is not None:
        values |= {"puzzle_ids": len(puzzles), "puzzle_dim": puzzles.shape[1]}
    return build(TRMConfig, values, where=f"{path}: ")


def _check_told(tensors, settings, path):
    """Raises UserError if settings that the weights tell too say something else, as after a weight was lost."""
    arch, found = settings.get("arch", settings), {}
    found["hidden_size"] = tensors["embed_tokens.embedding_weight"].shape[1]
    found["mlp_t"] = "L_level.layers.0.mlp_t.down_proj.weight" in tensors
    if arch.get("pos_encodings") in ("rope", "learned"):
        found["pos_encodings"] = "learned" if "embed_pos.embedding_weight" in tensors else "rope"
    puzzles = tensors.get("puzzle_emb.weights")
    found["puzzle_emb_ndim"] = 0 if puzzles is None else puzzles.shape[1]
    for name, value in found.items():
        if arch.get(name, value) != value:
            told = f"{name} is {arch[name]!r} in {CONFIG}, but the weights have {value!r}"
            raise UserError(f"{path}: {told}: copy both again")
    ids = settings.get("num_puzzle_identifiers", 0 if puzzles is None else len(puzzles))
    if puzzles is not None and ids != len(puzzles):
        raise UserError(f"{path}: {CONFIG} has {ids!r} puzzle identifiers, the weights {len(puzzles)}: copy both again")


def _whole(arch, name, path, default=None, least=1) -> int:
    """A number of their settings. Raises UserError if it is missing without a default, or is no whole number."""
    value = arch.get(name, default)
    if type(value) is not int or not least <= value <= 10_000:
        wrong = "is missing" if value is None else f"is {value!r}, not a whole number from {least} to 10,000"
        raise UserError(f"{path}: {name!r} {wrong}: it should be in the {CONFIG} of the run")
    return value


def _lengths(arch, settings, vocab_size, fills, table, path) -> tuple[int, int]:
    """(cells, prefix tokens).  table: a weight with one row per position, of the mixer or the learned positions."""
    cells, prefix = settings.get("seq_len") or CELLS.get(vocab_size), 0
    if fills:
        prefix = PREFIX
        if "puzzle_emb_len" in arch:
            prefix = _whole(arch, "puzzle_emb_len", path, least=0) or fills
        elif table is not None and cells:
            prefix = len(table) - cells
    if table is not None:
        cells = len(table) - prefix
    if cells is None:
        raise UserError(f"{path}: no known puzzle has {vocab_size} tokens: name it with --puzzle")
    if type(cells) is not int or cells < 1:
        raise UserError(f"{path}: {prefix} prefix tokens leave no cells: correct --prefix_tokens or --puzzle")
    return cells, prefix


def _check_shapes(config, weights, path):
    """Raises UserError unless the weights are those of a model with this config."""
    if config.n_layers > len(weights):
        raise UserError(f"{path}: weights of layers are missing: copy it again")
    with torch.device("meta"):
        own = own_state(TRMModel(config))
    names = {ours: theirs for theirs, ours in NAMES.items()}
    for name in sorted(own.keys() ^ weights.keys()):
        where = "is missing" if name in own else "has no place in this model"
        raise UserError(f"{path}: {names.get(name, name)} {where}: copy it again")
    for name, tensor in own.items():
        if weights[name].shape != (shape := tensor.shape):
            found = f"has shape {list(weights[name].shape)}, but the settings require {list(shape)}"
            raise UserError(f"{path}: {names.get(name, name)} {found}: correct {CONFIG}, or the flags")


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
        "attention_gate": c.attention_gate,
        "attention_window": c.attention_window is not None,
        "tied head": c.tie_embeddings,
        "model without halting head": not c.halting,
        "prefix without puzzle_ids": c.prefix_tokens > 0 and c.puzzle_ids == 0,
        "rope_scaling": c.rope_scaling is not None,
        f"embed_scale {c.embed_scale}": c.positions != "learned" and not math.isclose(c.embed_scale**2, c.d_model),
        f"hidden width {c.d_ff}": _expansion(c) is None,
    }
    return next((what for what, is_so in unlike.items() if is_so), None)


def _expansion(c: TRMConfig) -> float | None:
    """Their setting from which the hidden widths of SwiGLU and of the mlp mixer follow; None if there is no such."""
    widths = {c.d_model: c.d_ff} | ({c.positions_per_row: c.mixer_ff} if c.mixer == "mlp" else {})
    for expansion in (4, *(1.5 * width / size for size, width in widths.items())):
        if all(-(-round(expansion * size * 2 / 3) // WIDTHS) * WIDTHS == width for size, width in widths.items()):
            return expansion
    return None


def _their_settings(c: TRMConfig) -> dict:
    return {
        "hidden_size": c.d_model,
        "num_heads": c.n_heads,
        "expansion": _expansion(c),
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "H_cycles": c.deep_steps,
        "L_cycles": c.latent_steps,
        "H_layers": 0,
        "L_layers": c.n_layers,
        "halt_max_steps": c.supervision_steps,
        "puzzle_emb_ndim": c.puzzle_dim if c.puzzle_ids else 0,
        "puzzle_emb_len": c.prefix_tokens,
        "mlp_t": c.mixer == "mlp",
        "pos_encodings": "rope" if c.mixer == "mlp" and c.positions == "none" else c.positions,
        "loss": {"loss_type": f"{c.token_loss}_cross_entropy"},
        "no_ACT_continue": True,
    }
