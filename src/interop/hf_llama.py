"""Hugging Face Llama folders: config.json, generation_config.json, safetensors (also sharded), tokenizer files."""

import contextlib
import json
import re
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from src.checkpoint import read_weights, save_tensors
from src.data.tokenizer_json import CONFIG_FILE, SPECIAL, as_list
from src.errors import UserError
from src.files.text import read_object
from src.interop.hf_tokenizer import save_for_transformers
from src.interop.llama import HF, count, from_llama, plain_config, to_llama
from src.model_config import LIMITS, TRMConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS = "config.json", "generation_config.json"
SIZES = {
    **{"vocab_size": "vocab_size", "d_model": "hidden_size", "n_heads": "num_attention_heads"},
    **{"n_layers": "num_hidden_layers", "d_ff": "intermediate_size", "n_kv_heads": "num_key_value_heads"},
    "max_seq_len": "max_position_embeddings",
}
# the only supported values of YaRN's parameters
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None, "mscale": None}


def read_hf(folder) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """Returns (config, weights with this project's names, license) of a Llama folder.

    Raises UserError if the model needs a feature that this project does not have."""
    folder = Path(folder)
    c = _config(read_object(folder / "config.json"), folder / "config.json")
    tensors = {name: t for name, t in _tensors(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    return c, from_llama(c, tensors, HF, folder), _licence(folder)


def _licence(folder) -> dict:
    """Returns {"license": ...} if the model card names one, else {}."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"\ufeff?---\n(.*?\n)---\n", text, re.S)
    with contextlib.suppress(yaml.YAMLError):
        names = yaml.safe_load(found[1]) if found else None
        licence = names.get("license") if isinstance(names, dict) else None
        licence = licence[0] if isinstance(licence, list) and len(licence) == 1 else licence
        if isinstance(licence, str) and licence:
            return {"license": licence}
    return {}


def read_ends(folder, tokenizer) -> dict:
    """Returns the arguments of `tokenizer.set_ends` (BOS and end tokens) for a folder's settings.

    `add_bos_token` decides whether texts begin with BOS. If it is missing, they do if tokenizer.json adds BOS to a
    text. Old folders of this project also lack `add_bos_token`; their texts begin with BOS."""
    files = [Path(folder, name) for name in (CONFIG_FILE, *SETTINGS)]
    names, *settings = (read_object(file) if file.is_file() else {} for file in files)
    ends = [values.get("eos_token_id") for values in settings]
    add_bos = names.get("add_bos_token")
    if isinstance(add_bos, bool):
        if tokenizer.kind == "hf" and tokenizer.puts_bos != add_bos:
            does = f"tokenizer.json adds {'no ' * add_bos}BOS, but add_bos_token is {str(add_bos).lower()}"
            print(f"{folder}: {does}: texts here follow add_bos_token; transformers 5 does not", file=sys.stderr)
    else:
        add_bos = tokenizer.kind != "hf" or tokenizer.puts_bos or names.keys() <= {"tokenizer_class", *SPECIAL}
    return {"add_bos": add_bos, "ends": [i for end in ends for i in as_list(end)]}


def added_tokens(folder) -> dict[int, str]:
    """Returns {id: token} of the tokens that a folder adds outside its tokenizer file."""
    found, path = {}, Path(folder) / "added_tokens.json"
    if path.is_file():
        found |= {id: token for token, id in read_object(path).items()}
    path = Path(folder) / CONFIG_FILE
    decoder = read_object(path).get("added_tokens_decoder") if path.is_file() else None
    for id, token in (decoder or {}).items():
        found[int(id)] = str(token.get("content") if isinstance(token, dict) else token)
    return found


def _config(values: dict, path) -> TRMConfig:
    """Converts a Hugging Face config.json to a TRMConfig. A missing value gets LlamaConfig's default."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path} has model_type {values.get('model_type')}: only llama can be converted")
    try:
        kv_heads = values.get("num_key_value_heads") or values["num_attention_heads"]
        given = {"max_position_embeddings": 2048, **values, "num_key_value_heads": kv_heads}
        sizes = {own: count(given[name], f"{path}: {name}", LIMITS[own]) for own, name in SIZES.items()}
        dim, heads = sizes["d_model"], sizes["n_heads"]
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        scaling = rope.get("rope_type") or rope.get("type") or "default"
        unsupported = {
            "attention_bias": bool(values.get("attention_bias")),
            "mlp_bias": bool(values.get("mlp_bias")),
            f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") not in ("silu", "swish"),
            f"head_dim {values.get('head_dim')}": (values.get("head_dim") or dim // heads) * heads != dim,
            f"rope scaling {scaling}": scaling not in ("default", "linear", "yarn"),
            "YaRN with changed parameters": scaling == "yarn" and any(rope.get(k) not in (None, YARN[k]) for k in YARN),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "quantization_config": bool(values.get("quantization_config")),
        }
        for what, is_so in unsupported.items():
            if is_so:
                raise UserError(f"{path} needs {what}, which this project does not support: it cannot be converted")
        pad = values.get("pad_token_id")  # early folders write -1 for none
        return plain_config(
            path, **sizes, norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings") or False, pad_token_id=pad if pad != -1 else None,
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
            rope_scaling=float(rope["factor"]) if scaling != "default" else None,
            rope_trained_len=rope["original_max_position_embeddings"] if scaling == "yarn" else None,
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}: it is not a complete config.json of a Llama") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} contains a value of the wrong type ({error}): correct it") from None


def _tensors(folder) -> dict[str, Tensor]:
    """Reads the weights of a folder: one safetensors file, or the shards that the index file lists."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{folder} contains no {WEIGHTS}: other weight files could run code; save the model as safetensors"
            )
        return read_weights(folder / WEIGHTS)
    shards, tensors = read_object(folder / INDEX).get("weight_map"), {}
    if not isinstance(shards, dict) or any(not isinstance(n, str) or Path(n).name != n for n in shards.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of files in the same folder: copy the folder again")
    for shard in sorted(set(shards.values())):
        for name, tensor in read_weights(folder / shard).items():
            if shards.get(name) != shard:
                raise UserError(
                    f"{folder / shard} contains {name}, but {INDEX} does not list it there: copy the folder again"
                )
            tensors[name] = tensor
    return tensors


def write_hf(folder, c: TRMConfig, weights: dict[str, Tensor], tokenizer):
    """Writes a plain model (see `src.interop.llama.check_plain`) as a Llama folder for transformers."""
    folder = Path(folder)
    folder.mkdir()
    # parts of a fused weight share its storage, which safetensors refuses: clone them
    tensors = {name: tensor.clone() for name, tensor in to_llama(c, weights, HF).items()}
    save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.end_ids)}
    if c.rope_trained_len is not None and c.rope_scaling * c.rope_trained_len != c.max_seq_len:
        product = f"{c.rope_scaling:g} x {c.rope_trained_len} is not max_seq_len {c.max_seq_len}"
        print(f"{folder.name}: transformers 4 replaces the factor of YaRN, because {product}", file=sys.stderr)
    config = _hf_config(c, weights) | special | {"pad_token_id": c.pad_token_id}
    for name, values in zip(SETTINGS, (config, special | {"pad_token_id": tokenizer.pad_id})):
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    save_for_transformers(tokenizer, folder, c.max_seq_len)
    if weights["embed.weight"].dtype in (torch.bfloat16, torch.float16):
        how = f"computes in {config['torch_dtype']}, as its weights are stored; with dtype=torch.float32"
        print(f"{folder.name}: transformers {how} it writes the text of generate.py", file=sys.stderr)


def _hf_config(c, weights) -> dict:
    """Returns the content of Hugging Face's config.json, without the special token ids."""
    kind = "linear" if c.rope_trained_len is None else "yarn"
    scaling = None if c.rope_scaling is None else {"rope_type": kind, "type": kind, "factor": c.rope_scaling}
    if scaling and kind == "yarn":
        scaling["original_max_position_embeddings"] = c.rope_trained_len
    return {theirs: getattr(c, own) for own, theirs in SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # transformers 4 and 5 both read rope_theta and rope_scaling from here
        "rope_scaling": scaling,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(weights["embed.weight"].dtype).removeprefix("torch."),
    }
