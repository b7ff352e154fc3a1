"""Checkpoint folders: model.safetensors, config.json, the tokenizer's files, ema.safetensors, state/ for resuming.

A checkpoint is written whole or not at all (`src.files.folders`): a crash at any moment leaves the previous one whole.
Loading never unpickles code. `src.training.run_folder` keeps those of a run.
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
from src.data.tokenizer_json import TOKENIZER_FILES
from src.decode import store_for_decoding
from src.errors import UserError
from src.files.folders import replacing
from src.files.text import read_object
from src.language_model import LanguageModel
from src.model import TRMConfig, TRMModel
from src.tokenizer import read_tokenizer
from src.training.parallel import placed_like

FORMAT = 2  # of config.json; checkpoints from before the loop could have a loss at each visit have none
# all that a checkpoint consists of
FILES = {*("model.safetensors", "ema.safetensors", "classifier.safetensors", "config.json", "state"), *TOKENIZER_FILES}
DIGESTS = "state/digests.json"  # of the files as they were written, which a run looks at before it goes on from them
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RELEASED = Path(__file__).resolve().parent.parent / "checkpoints" / "stdlib"


def save_checkpoint(folder, model: TRMModel, tokenizer, ema=None, state=None, info=None, weights=None, more=None):
    """Write a checkpoint folder, whole or not at all.  UserError where it cannot be written.

    ema: averaged weights under the model's own names; state: optimizer and counters for resuming (tensors, numbers,
    strings, containers); info: figures that go into config.json beside the model's fields; weights: the model's whole
    tensors where it holds only a part of them (`own_state`, gathered); more: {name of another .safetensors file:
    tensors}."""
    try:
        with replacing(folder, FILES.__contains__) as beside:
            save_tensors(own_state(model) if weights is None else weights, beside / "model.safetensors")
            for name, tensors in ((more or {}) | ({} if ema is None else {"ema.safetensors": ema})).items():
                save_tensors(tensors, beside / name)
            tokenizer.save(beside)
            config = {"format": FORMAT, "model": model.config.to_dict(), "info": info or {}}
            (beside / "config.json").write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            if state is not None:
                (beside / "state").mkdir()
                torch.save(state, beside / "state" / "training.pt")
                (beside / DIGESTS).write_text(json.dumps(_digests(beside)) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of these, by who writes
        raise UserError(
            f"cannot write the checkpoint {folder}: {getattr(error, 'strerror', None) or error}; "
            "make room, or choose another save_dir; the checkpoints before it are whole"
        ) from None


def own_state(model: torch.nn.Module) -> dict:
    """A model's state dict without the second name of tied weights."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def save_tensors(tensors: dict, path: Path, **options):
    """Write a .safetensors file, which others may read as far as the umask says: by itself it is the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, **options)
    path.chmod(mode)


def follow(link: Path) -> Path:
    """Where run_folder/last or best leads: the path itself, or the checkpoint that it names where it is a small file,
    as on systems without links."""
    name = link.read_bytes()[:100].decode(errors="replace").strip() if link.is_file() else ""
    return link.with_name(name) if re.fullmatch(r"step_\d+", name) else link


def resolve(folder=None) -> Path:
    """The checkpoint folder meant by a path: itself, or a run folder's best, else last; default: the released one."""
    folder = follow(Path(folder)) if folder is not None else RELEASED
    if not folder.is_dir():
        raise UserError(f"no checkpoint folder at {folder}: train one with train_trm_lm.py, or correct the path")
    for candidate in (folder, follow(folder / "best"), follow(folder / "last")):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{folder} is no checkpoint (no config.json) and no run folder (no best or last): correct the path")


def load_config(folder) -> TRMConfig:
    """The TRMConfig of a checkpoint folder.  UserError where config.json is missing or broken."""
    path = resolve(folder) / "config.json"
    config = read_object(path)
    values = _part(config.get("model"), path)
    if "format" not in config and values.get("recursion") == "loop":
        values["supervision_weights"] = None  # it had no meaning: the loop was trained by its last visit alone
    return build(TRMConfig, values, where=f"{path}: ")


def read_info(folder) -> dict:
    """The figures beside the model's settings in a checkpoint folder's config.json: {} where there are none."""
    path = resolve(folder) / "config.json"
    return _part(read_object(path).get("info") or {}, path)


def _part(values, path):
    if not isinstance(values, dict):
        raise UserError(f"{path} is broken: it should hold the settings of a model, and info; copy the folder again")
    return values


def read_weights(path) -> dict:
    """Tensors of a .safetensors file.  UserError where it is missing or cut short, and as `check_tensors`."""
    try:
        return check_tensors(load_file(path), path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that this torch has not
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is broken or cut short ({error})"
        raise UserError(f"{path} {reason}: copy the checkpoint folder again") from None


def check_tensors(tensors: dict, path) -> dict:
    """The tensors, as they are.  UserError for one that is not whole in memory, of floating point, and finite."""
    for name, tensor in tensors.items():
        wrong = None
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            wrong = "is no tensor of numbers"
        elif tensor.dtype not in FLOATS:
            wrong = f"is of {tensor.dtype}, quantized or no weight: give the floating-point weights"
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            wrong = f"repeats numbers instead of having all of {list(tensor.shape)}"
        elif tensor.numel() and not all(end.isfinite() for end in tensor.detach().aminmax()):
            wrong = "holds NaN or infinity: the run that wrote it had diverged, or it is broken"
        if wrong:
            raise UserError(f"{path}: {name} {wrong}")
    return tensors


def check_size(config: TRMConfig, weights: dict, path):
    """UserError where weights are far from those of a model of these settings, before anything of its size is made.

    Looks at the number of layers and the largest matrices alone: `check_fit` takes torch a second of imports."""
    for name in ("n_layers", "prelude_layers", "coda_layers"):
        if getattr(config, name) > len(weights):
            more = f"has {len(weights)} tensors, too few for {name} {getattr(config, name)} in its config.json"
            raise UserError(f"{path} {more}: they are of different models")
    D, length = config.d_model, config.max_seq_len
    shapes = {"embed.weight": (config.vocab_size, D), "net.blocks.0.mlp.down.weight": (D, config.d_ff)}
    if config.positions == "learned":
        shapes["pos_embed.weight"] = (length, D)
    if config.mixer == "mlp":
        shapes["net.blocks.0.attn.mlp.down.weight"] = (length, config.d_ff)
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            raise _no_fit(path, name)


def check_fit(config: TRMConfig, weights: dict, path):
    """UserError where weights are not those of a model of these settings."""
    check_size(config, weights, path)
    with torch.device("meta"):
        load_weights(TRMModel(config), weights, path)


def _no_fit(path, name):
    return UserError(f"{path} does not fit its config.json (first difference: {name}): they are of different models")


def load_weights(model: torch.nn.Module, weights: dict, path):
    """Copy tensors into a model, whatever their dtype.  UserError where names or shapes do not match."""
    own = own_state(model)
    wrong = sorted(set(own) ^ set(weights)) or [n for n in own if own[n].shape != weights[n].shape]
    if wrong:
        raise _no_fit(path, wrong[0])
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(placed_like(tensor, own[name]))


def load_model(folder=None, device="cpu", dtype=torch.float32, ema=True, trains=False, config=None) -> LanguageModel:
    """(model in eval mode, tokenizer) of a checkpoint or run folder; default: the released one.

    Averaged (EMA) weights are used where they exist, and a line on stderr says which weights these are. On a CPU the
    weights are stored for fast decoding, unless the model `trains` on. `config` replaces the folder's own, such as by
    one of more recursion steps; UserError where the weights are of another shape."""
    folder = resolve(folder)
    own = load_config(folder)
    tokenizer = read_tokenizer(str(folder))
    if tokenizer.vocab_size != own.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {own.vocab_size}: "
            "they are of different models; copy the folder again"
        )
    path = folder / "ema.safetensors"
    path = path if ema and path.exists() else folder / "model.safetensors"
    weights = read_weights(path)
    check_size(own, weights, path)
    if config is not None and not _fits(config, weights, path):
        changed = [name for name, value in vars(config).items() if not _fits(own, weights, path, **{name: value})]
        raise UserError(
            f"{path} does not fit a model of other {', '.join(changed)}: change only what leaves weights as they are"
        )
    model = TRMModel(own if config is None else config)
    load_weights(model, weights, path)
    print(f"{folder}: {'EMA' if path.name.startswith('ema') else 'plain'} weights", file=sys.stderr)
    model = model.to(device=device, dtype=dtype).eval()
    decodes = torch.device(device).type == "cpu" and not trains
    return LanguageModel(store_for_decoding(model) if decodes else model, tokenizer)


def _fits(config, weights, path, **changes) -> bool:
    try:
        check_fit(replace(config, **changes), weights, path)
    except (UserError, ValueError):
        return False
    return True


def load_pt(path, mmap=False):
    """What a .pt file holds, of which nothing is run.  By what is wrong with it any Exception, of many kinds."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its parts are compressed, or overlap")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_state(folder) -> dict:
    """What a checkpoint needs besides weights to go on training.

    UserError where it, or another file of the checkpoint, is missing, or is not as it was written."""
    folder = Path(folder)
    path = folder / "state" / "training.pt"
    advice = "this checkpoint cannot be resumed; use --init_from to start from its weights"
    if (folder / DIGESTS).exists():
        now = _digests(folder)
        for name, digest in read_object(folder / DIGESTS).items():
            if now.get(name) != digest:
                wrong = "is broken: it is not as it was written" if name in now else "is missing"
                raise UserError(f"{folder / name} {wrong}: {advice}")
    elif path.exists():
        print(f"{folder} is of a version that kept no {DIGESTS}: it is taken as it is", file=sys.stderr)
    try:
        return load_pt(path)
    except Exception as error:  # torch.load raises many kinds, all of them mean the same to the user
        reason = "is missing" if not path.exists() else f"is broken ({type(error).__name__})"
        raise UserError(f"{path} {reason}: {advice}") from None


def _digests(folder: Path) -> dict:
    """{name of a file of a checkpoint: BLAKE2b of its content}."""
    found = {}
    for name in sorted(FILES - {"state"} | {"state/training.pt"}):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found
