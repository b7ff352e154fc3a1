"""Checkpoint folders: model.safetensors, config.json, the tokenizer's files, ema.safetensors, and state/ for resuming.

A checkpoint is written completely or not at all (`src.files.folders`), so a crash leaves the previous one intact.
Loading never runs code from a file. `src.training.run_folder` manages the checkpoints of a run.
"""

import hashlib
import json
import os
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from src.config import build
from src.data.tokenizer_json import NAMES_FILE, PUZZLE_FILE, TOKENIZER_FILES
from src.decode import store_for_decoding
from src.errors import UserError
from src.files.folders import replacing
from src.files.text import read_object
from src.language_model import LanguageModel
from src.model import TRMConfig, TRMModel
from src.tokenizer import read_tokenizer
from src.training.parallel import placed_like

# Format of config.json. Older ones: none (the loop had a single loss, at its last visit) and 2 (mixer mlp had the
# hidden width d_ff, and its post-norm was over the channels).
FORMAT = 3
# names of everything in a checkpoint folder; other files in the folder belong to the user
CLASSIFIER_FILE = "classifier.safetensors"  # the layer that classifies, beside a fine-tuned language model
FILES = {"model.safetensors", "ema.safetensors", CLASSIFIER_FILE, "config.json", "state"}
FILES |= {*TOKENIZER_FILES, PUZZLE_FILE, NAMES_FILE}
DIGESTS = "state/digests.json"  # digests of the files as written; checked before a run resumes
LARGEST = 1e6  # limit for a weight, far above any trained one; products of larger weights overflow in fp32
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RELEASED = Path(__file__).resolve().parent.parent / "checkpoints" / "python"


def save_checkpoint(folder, model: TRMModel, tokenizer, ema=None, state=None, info=None, weights=None, more=None):
    """Writes a checkpoint folder, completely or not at all. Raises UserError if it cannot be written.

    tokenizer: writes its files by `save(folder)`; a puzzle's board (src/tasks/puzzle_data.py) takes its place.
    ema: averaged weights, under the names of the model's weights.
    state: what resuming needs, such as the optimizer's state (tensors, numbers, strings, containers).
    info: figures to store in config.json next to the model's settings.
    weights: for a sharded model, its gathered `own_state`; default: that of `model`.
    more: further .safetensors files, as {file name: tensors}."""
    try:
        with replacing(folder, FILES.__contains__) as new:
            save_tensors(own_state(model) if weights is None else weights, new / "model.safetensors")
            for name, tensors in ((more or {}) | ({} if ema is None else {"ema.safetensors": ema})).items():
                save_tensors(tensors, new / name)
            tokenizer.save(new)
            config = {"format": FORMAT, "model": model.config.to_dict(), "info": info or {}}
            (new / "config.json").write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            if state is not None:
                (new / "state").mkdir()
                torch.save(state, new / "state" / "training.pt")
                (new / DIGESTS).write_text(json.dumps(_digests(new)) + "\n", encoding="utf-8")
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # a full disk raises any of these
        raise UserError(
            f"cannot write the checkpoint {folder}: {getattr(error, 'strerror', None) or error}; "
            "free some disk space, or choose another save_dir; earlier checkpoints are intact"
        ) from None


def own_state(model: torch.nn.Module) -> dict:
    """Returns a model's state dict, with tied weights only under their first name."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def save_tensors(tensors: dict, path: Path, **options):
    """Writes a .safetensors file with the permissions of the umask; save_file alone lets only the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, **options)
    path.chmod(mode)


def follow(link: Path) -> Path:
    """Returns the path of the checkpoint that run_folder/last or run_folder/best stands for.

    On systems without symbolic links, these are small files that name a checkpoint. Any other path is returned
    unchanged."""
    name = link.read_bytes()[:100].decode(errors="replace").strip() if link.is_file() else ""
    return link.with_name(name) if re.fullmatch(r"step_\d+", name) else link


def resolve(folder=None) -> Path:
    """Returns the checkpoint folder for a path: the path itself, or, for a run folder, its `best`, else its `last`.

    Without a path, returns the released checkpoint. Raises UserError if there is no checkpoint."""
    folder = follow(Path(folder)) if folder is not None else RELEASED
    if not folder.is_dir():
        raise UserError(f"no checkpoint folder at {folder}: train one with train_trm_lm.py, or correct the path")
    for candidate in (folder, follow(folder / "best"), follow(folder / "last")):
        if (candidate / "config.json").is_file():
            return candidate
    reason = "is neither a checkpoint (no config.json) nor a run folder (no best or last)"
    raise UserError(f"{folder} {reason}: correct the path")


def weights_file(folder: Path) -> Path:
    """Returns the file of a checkpoint's weights: the averaged ones, if there are any."""
    averaged = folder / "ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


def load_config(folder) -> TRMConfig:
    """Reads the TRMConfig of a checkpoint folder. Raises UserError if config.json is missing or broken."""
    path = resolve(folder) / "config.json"
    config = read_object(path)
    values = _part(config.get("model"), path)
    if config.get("format", 1) not in range(1, FORMAT + 1):
        advice = f"this version reads 1 to {FORMAT}: update this project, or copy the folder again"
        raise UserError(f"{path} has format {config['format']!r}, but {advice}")
    if "format" not in config and values.get("recursion") == "loop":
        values["supervision_weights"] = None  # was ignored: the loop had a loss at its last visit only
    if config.get("format", 1) in (1, 2) and values.get("mixer") == "mlp":
        if values.get("norm") == "post":
            raise UserError(f"{path}: mixer mlp with norm post now normalises over the sequence: train the model again")
        values["mixer_ff"] = values.get("d_ff")
    return build(TRMConfig, values, where=f"{path}: ")


def least_depth(folder) -> int:
    """Returns the first recursion step after which a checkpoint was trained to answer; 1 if it does not say."""
    least = read_info(folder).get("least_depth")
    return least if isinstance(least, int) and least > 0 else 1


def read_info(folder) -> dict:
    """Reads the figures that config.json stores next to the model's settings; {} if there are none."""
    path = resolve(folder) / "config.json"
    return _part(read_object(path).get("info") or {}, path)


def _part(values, path):
    if not isinstance(values, dict):
        raise UserError(f"{path} is broken: `model` and `info` should be JSON objects; copy the folder again")
    return values


def read_weights(path) -> dict:
    """Reads a .safetensors file. Raises UserError if it is missing or broken, or if `check_tensors` rejects it."""
    try:
        return check_tensors(load_file(path), path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that this torch lacks
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is broken or cut short ({error})"
        raise UserError(f"{path} {reason}: copy the checkpoint folder again") from None


def is_sound(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a weight are finite and of a usable size.  Takes no memory, unlike `isfinite`."""
    return not tensor.numel() or all(end.abs() < LARGEST for end in tensor.detach().aminmax())


def check_tensors(tensors: dict, path) -> dict:
    """Returns the tensors unchanged. Raises UserError unless all are dense, floating-point, complete and finite."""
    for name, tensor in tensors.items():
        wrong = None
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            wrong = "is not a dense tensor"
        elif tensor.dtype not in FLOATS:
            wrong = f"has dtype {tensor.dtype} (quantized, or not a weight): give the floating-point weights"
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            wrong = f"stores fewer numbers than its shape {list(tensor.shape)} needs"
        elif not is_sound(tensor):
            wrong = "holds NaN, infinity or a number above 1e6: the file is broken, or its training run had diverged"
        if wrong:
            raise UserError(f"{path}: {name} {wrong}")
    return tensors


def check_size(config: TRMConfig, weights: dict, path):
    """Raises UserError if weights clearly do not fit a config, before memory for the model is allocated.

    Compares only the number of layers and the largest matrices. `check_fit` compares all names and shapes, but takes a
    second, because it has to import what the meta device needs."""
    for name in ("n_layers", "prelude_layers", "coda_layers"):
        if getattr(config, name) > len(weights):
            count = f"has {len(weights)} tensors, too few for {name} {getattr(config, name)} in its config.json"
            raise UserError(f"{path} {count}: they belong to different models")
    D, length = config.d_model, config.positions_per_row
    shapes = {"embed.weight": (config.vocab_size, D), "net.blocks.0.mlp.down.weight": (D, config.d_ff)}
    if config.positions == "learned":
        shapes["pos_embed.weight"] = (length, D)
    if config.mixer == "mlp":
        shapes["net.blocks.0.attn.mlp.down.weight"] = (length, config.mixer_ff)
    if config.prefix_tokens:
        shapes["puzzle_embed.weight"] = (max(1, config.puzzle_ids), config.puzzle_dim)
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            raise _no_fit(path, name)


def check_fit(config: TRMConfig, weights: dict, path):
    """Raises UserError if names or shapes of weights differ from those of a model with this config."""
    check_size(config, weights, path)
    with torch.device("meta"):
        load_weights(TRMModel(config), weights, path)


def _no_fit(path, name):
    return UserError(f"{path} does not fit its config.json (first difference: {name}): they belong to different models")


def load_weights(model: torch.nn.Module, weights: dict, path):
    """Copies tensors of any floating-point dtype into a model. Raises UserError if names or shapes differ."""
    own = own_state(model)
    wrong = sorted(set(own) ^ set(weights)) or [n for n in own if own[n].shape != weights[n].shape]
    if wrong:
        raise _no_fit(path, wrong[0])
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(placed_like(tensor, own[name]))


def load_model(folder=None, device="cpu", dtype=torch.float32, ema=True, trains=False, config=None) -> LanguageModel:
    """Returns the LanguageModel (model in eval mode, tokenizer) of a checkpoint or run folder; default: the released.

    ema: use the averaged (EMA) weights if there are any; a line on stderr says which weights were loaded.
    trains: the model will be trained. Otherwise its weights are laid out for fast decoding if the device is a CPU.
    config: replaces the folder's config, for example to run more recursion steps. Raises UserError if it would change
        the shapes of the weights."""
    folder = resolve(folder)
    tokenizer, own = read_tokenizer(str(folder)), load_config(folder)
    if tokenizer.vocab_size != own.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {own.vocab_size}: "
            "they belong to different models; copy the folder again"
        )
    model = load_network(folder, device, dtype, ema, config)
    decodes = torch.device(device).type == "cpu" and not trains
    return LanguageModel(store_for_decoding(model) if decodes else model, tokenizer)


def load_network(folder, device="cpu", dtype=torch.float32, ema=True, config=None) -> TRMModel:
    """Loads a model in eval mode, without a tokenizer; see `load_model` for the arguments."""
    folder = resolve(folder)
    own, path = load_config(folder), weights_file(folder) if ema else folder / "model.safetensors"
    weights = read_weights(path)
    check_size(own, weights, path)
    if config is not None and not _fits(config, weights, path):
        changed = [name for name, value in vars(config).items() if not _fits(own, weights, path, **{name: value})]
        raise UserError(
            f"{path} does not fit a model with another {', '.join(changed)}: "
            "change only settings that leave the shapes of the weights as they are"
        )
    model = TRMModel(own if config is None else config)
    load_weights(model, weights, path)
    print(f"{folder}: {'EMA' if path.name.startswith('ema') else 'plain'} weights", file=sys.stderr)
    return model.to(device=device, dtype=dtype).eval()


def _fits(config, weights, path, **changes) -> bool:
    try:
        check_fit(replace(config, **changes), weights, path)
    except (UserError, ValueError):
        return False
    return True


def load_pt(path, mmap=False):
    """Reads a .pt file without running code from it. A broken file may raise almost any Exception: catch them all."""
    with zipfile.ZipFile(path) as archive:
        # torch.save does not compress, so a larger content is a manipulated file that could fill the memory
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts are compressed, or overlap")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_state(folder) -> dict:
    """Reads the state that training needs, besides the weights, to resume from a checkpoint.

    Raises UserError if this or another file of the checkpoint is missing or differs from what was written."""
    folder = Path(folder)
    path = folder / "state" / "training.pt"
    advice = "this checkpoint cannot be resumed; use --init_from to start from its weights"
    if (folder / DIGESTS).exists():
        now = _digests(folder)
        for name, digest in read_object(folder / DIGESTS).items():
            if now.get(name) != digest:
                wrong = "is broken: it differs from what was written" if name in now else "is missing"
                raise UserError(f"{folder / name} {wrong}: {advice}")
    elif path.exists():
        print(f"{folder} has no {DIGESTS} (older version): its files are used unchecked", file=sys.stderr)
    try:
        return load_pt(path)
    except Exception as error:  # torch.load raises many kinds; all mean the same to the user
        reason = "is missing" if not path.exists() else f"is broken ({type(error).__name__})"
        raise UserError(f"{path} {reason}: {advice}") from None


def _digests(folder: Path) -> dict:
    """Returns {file name: BLAKE2b digest} for the files of a checkpoint."""
    found = {}
    for name in sorted(FILES - {"state"} | {"state/training.pt"}):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found
