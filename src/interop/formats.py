"""Conversion of models between this project's checkpoints and the formats of other programs.

| format     | contents                                                                    | read | written | families |
|------------|-----------------------------------------------------------------------------|------|---------|----------|
| checkpoint | a checkpoint folder of this project                                         | yes  | yes     | all      |
| hub        | the same with a model card, for the Hugging Face Hub                        | yes  | yes     | all      |
| hf         | a Llama folder of Hugging Face (`src/interop/hf_llama.py`)                  | yes  | yes     | plain    |
| llama2c    | llama2.c's legacy .bin and tokenizer, or its .pt (`src/interop/llama2c.py`) | yes  | .bin    | plain    |
| gguf       | a GGUF of Llama architecture (`src/interop/gguf_reader.py`)                 | yes  | no      | plain    |
| trm        | a state dict of the TRM authors' code (`src/interop/trm_official.py`)       | yes  | yes     | trm      |
| tokenizer  | the tokenizer alone, for transformers (`src/interop/hf_tokenizer.py`)       | no   | yes     | all      |

The formats checkpoint, hub and trm also hold models that solve puzzles. Such a model has the form of its puzzle
(`PuzzleForm`) in place of a tokenizer.

No code from a source file is executed: sources are safetensors, plain arrays, or .pt files, which are loaded with
torch.load(weights_only=True).
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from src.checkpoint import (
    CLASSIFIER_FILE,
    check_fit,
    load_config,
    read_info,
    read_weights,
    resolve,
    save_checkpoint,
    weights_file,
)
from src.data.licences import LICENCES
from src.data.tokenizer_json import PUZZLE_FILE
from src.errors import UserError, few
from src.files.text import read_object
from src.interop.gguf_reader import MAGIC, read_gguf, read_gguf_ends, read_gguf_tokenizer
from src.interop.hf_llama import added_tokens, read_ends, read_hf, write_hf
from src.interop.hf_tokenizer import save_for_transformers
from src.interop.llama import check_plain
from src.interop.llama2c import for_run_c, is_bin, read_bin, read_pt, tokenizer_file, write_bin
from src.interop.model_card import model_card
from src.interop.trm_official import CONFIG, NO_HINTS, Hints, holds_official, load_official, write_files
from src.model import TRMConfig, TRMModel
from src.tasks.puzzle_data import PuzzleForm, read_form
from src.tokenizer import read_tokenizer


class Source(NamedTuple):
    """A model that was read from any format and can be written in another."""

    path: Path
    config: TRMConfig
    weights: dict[str, Tensor]  # with this project's names, in the dtype of the source
    tokenizer: Any  # of a puzzle model: its PuzzleForm
    info: dict  # license, training figures and so on, for config.json and the model card
    classifier: dict[str, Tensor] | None = None  # weights of the layer on top, of a fine-tuned classifier


class Format(NamedTuple):
    """The name of a source format and the functions that read it."""

    name: str
    read: Callable | None  # path -> (config, weights, info); None: `load_official` reads all at once
    read_tokenizer: Callable | None  # path -> tokenizer
    # path, tokenizer -> arguments of tokenizer.set_ends; None if read_tokenizer has already set them
    read_ends: Callable | None


def _read_checkpoint(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """Returns (config, weights, info) of a checkpoint or run folder, with the averaged weights if there are any."""
    folder = resolve(path)
    config, path = load_config(folder), weights_file(folder)
    print(f"{folder}: {'EMA' if path.name.startswith('ema') else 'plain'} weights", file=sys.stderr)
    weights = read_weights(path)
    check_fit(config, weights, path)
    return config, weights, read_info(folder)


def _read_tokenizer_beside(path):
    """Reads m.tokenizer.bin beside m.bin or m.pt."""
    if not tokenizer_file(path).is_file():
        raise UserError(f"{path}: a llama2.c model has its tokenizer in a separate file: give it with --tokenizer")
    return read_tokenizer(tokenizer_file(path))


def _tokenizer_of_checkpoint(path):
    """Reads the tokenizer of a checkpoint, or the form of its puzzle."""
    folder = resolve(path)
    return read_form(folder) if (folder / PUZZLE_FILE).is_file() else read_tokenizer(folder)


def _ends_with_bos(path, tokenizer) -> dict:
    return {"ends": [tokenizer.bos_id]}  # run.c stops at BOS


FORMATS = {
    "checkpoint": Format("a checkpoint of this project", _read_checkpoint, _tokenizer_of_checkpoint, None),
    "hf": Format("a Llama folder of Hugging Face", read_hf, read_tokenizer, read_ends),
    "gguf": Format("a GGUF", read_gguf, read_gguf_tokenizer, read_gguf_ends),
    "pt": Format("a .pt checkpoint of llama2.c", read_pt, _read_tokenizer_beside, _ends_with_bos),
    "bin": Format("a legacy .bin of llama2.c", read_bin, _read_tokenizer_beside, _ends_with_bos),
    "trm": Format("a checkpoint of the TRM authors' code", None, None, None),
}
SPARE_ROWS = 128  # with a separate tokenizer file, this many unused embedding rows mean that it is the wrong file


def recognize(path) -> Format:
    """Detects the format of a source from its content. Raises UserError if it is none of FORMATS."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}: correct the path of the model")
    if path.is_dir():
        is_hf = (path / "config.json").is_file() and "model_type" in read_object(path / "config.json")
        return FORMATS["hf" if is_hf else "checkpoint"]
    try:
        with open(path, "rb") as file:
            start = file.read(28)  # the header of a .bin, the longest one
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if holds_official(path, start):
        return FORMATS["trm"]
    for kind, is_it in (("gguf", start[:4] == MAGIC), ("pt", start[:4] == b"PK\x03\x04"), ("bin", is_bin(start))):
        if is_it:
            return FORMATS[kind]
    raise UserError(f"{path} is none of the known formats: {', '.join(format.name for format in FORMATS.values())}")


def read_source(path, tokenizer=None, hints: Hints = NO_HINTS) -> Source:
    """Reads a model of any supported format. Its tokenizer comes from the file `tokenizer`, by default from the source.

    hints: settings that a checkpoint of the TRM authors' code may lack. Raises UserError if a part is missing or
    broken, if the model is of no supported kind, or if the parts do not match."""
    path, source = Path(path), recognize(path)
    is_ours = source is FORMATS["checkpoint"]
    if hints.given() and source is not FORMATS["trm"]:
        flag = next(iter(hints.given()))
        raise UserError(f"--{flag} is for {FORMATS['trm'].name}, and {path} is {source.name}: leave it out")
    if source is FORMATS["trm"]:
        config, weights, own = load_official(path, hints)
        info = {}
    else:
        config, weights, info = source.read(path)
        own = read_tokenizer(tokenizer) if tokenizer is not None else source.read_tokenizer(path)
    if tokenizer is not None and not config.causal:
        raise UserError(f"--tokenizer: {path} is a puzzle model, which has no tokenizer: leave it out")
    if source.read_ends is not None:
        own.set_ends(**source.read_ends(path, own))
    elif tokenizer is not None and is_ours:  # how its texts start and end is known there
        before = source.read_tokenizer(path)
        own.set_ends(before.add_bos, before.end_ids)
        own.suffix_first = before.suffix_first
    spare = config.vocab_size - own.vocab_size
    # a checkpoint of this project never has spare rows, and another file must not leave many
    if spare < 0 or spare and (is_ours or tokenizer is not None and spare >= SPARE_ROWS):
        raise UserError(
            f"{path}: {tokenizer or 'its tokenizer'} has {own.vocab_size} tokens, but the model has "
            f"{config.vocab_size}: give the tokenizer of this model with --tokenizer"
        )
    if spare:
        if source is FORMATS["hf"]:
            _refuse_added(path, config, own.vocab_size)
        config, weights = _without_spare_rows(path, config, weights, own.vocab_size)
    converted = {} if is_ours else {"converted_from": f"{source.name}: {path.name}"}
    has_classifier = is_ours and (resolve(path) / CLASSIFIER_FILE).exists()
    classifier = read_weights(resolve(path) / CLASSIFIER_FILE) if has_classifier else None
    return Source(path, config, weights, own, converted | info, classifier)


def _refuse_added(path, config, tokens):
    """Raises UserError if an embedding row without a token belongs to one that the folder adds elsewhere."""
    added = {id: token for id, token in added_tokens(path).items() if tokens <= id < config.vocab_size}
    added.pop(config.pad_token_id, None)  # it is never written
    if added:
        names = few(added[id] for id in sorted(added))
        advice = "save the tokenizer as one complete tokenizer.json, and remove tokenizer.model"
        raise UserError(f"{path} adds {names} outside its tokenizer file, where they are not read: {advice}")


def _without_spare_rows(path, config, weights, tokens):
    """Drops the embedding rows without a token; they only pad the vocabulary to a round size."""
    print(
        f"{path}: the embedding has {config.vocab_size} rows for {tokens} tokens; unused rows are dropped",
        file=sys.stderr,
    )
    pad = config.pad_token_id if (config.pad_token_id or 0) < tokens else None
    tables = {n: t[:tokens].clone() for n, t in weights.items() if n in ("embed.weight", "head.weight")}
    return replace(config, vocab_size=tokens, pad_token_id=pad), weights | tables


def write(source: Source, dest, to: str = "checkpoint"):
    """Writes a model in the format `to` (see above), or its tokenizer. A failure leaves no file behind.

    Raises UserError if `dest` exists, or if the format cannot represent the model."""
    dest = Path(dest)
    if not dest.name or (to == "trm" and dest.name == CONFIG):
        raise UserError(
            f"DEST {str(dest)!r} is no name for the {'weights' if to == 'trm' else 'model'}: choose another"
        )
    outputs = [dest]
    if to in ("llama2c", "trm"):
        outputs.append(tokenizer_file(dest) if to == "llama2c" else dest.with_name(CONFIG))
    for path in outputs:
        check_free(path)
    if to in ("hf", "llama2c"):
        check_plain(source.config, source.path, to)
    if to == "tokenizer" and isinstance(source.tokenizer, PuzzleForm):
        raise UserError(f"{source.path} is a puzzle model, which has no tokenizer: choose another model")
    beside = None  # a folder whose files are moved to their places when everything is written
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{dest.name[:100]}.", dir=dest.parent))
        _write(source, beside / dest.name, to)
        for path in outputs:
            os.rename(beside / path.name, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {dest}: {getattr(error, 'strerror', None) or error}; choose another DEST"
        ) from None
    except UserError as error:  # name the final path, not the temporary one
        raise UserError(str(error).replace(str(beside / dest.name), str(dest))) from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def check_free(dest):
    """Raises UserError if `dest` already exists."""
    if os.path.lexists(dest):
        raise UserError(f"{dest} exists: choose another DEST, or remove it first")


def _write(source, path, to):
    _, config, weights, tokenizer, info, classifier = source
    if classifier is not None and to not in ("checkpoint", "hub"):
        print(f"{source.path}: the layer that classifies is left out: --to hub keeps it", file=sys.stderr)
    if to == "llama2c":
        config, weights, tokens, differences = for_run_c(config, weights, tokenizer, source.path)
        write_bin(path, config, weights, source.path)
        tokenizer_file(path).write_bytes(tokens)
        for sentence in differences:
            print(sentence, file=sys.stderr)
    elif to == "trm":
        write_files(path, config, weights, source.path)
    elif to == "tokenizer":
        save_for_transformers(tokenizer, path, config.max_seq_len)
    elif to == "hf":
        write_hf(path, config, weights, tokenizer)
    else:
        with torch.device("meta"):
            model = TRMModel(config)
        more = None if classifier is None else {CLASSIFIER_FILE: classifier}
        save_checkpoint(path, model, tokenizer, info=info, weights=weights, more=more)
    if path.is_dir() and (source.path / LICENCES).is_file():
        shutil.copyfile(source.path / LICENCES, path / LICENCES)
    if to in ("hub", "hf"):
        puzzle = tokenizer.kind.name if isinstance(tokenizer, PuzzleForm) else None
        (path / "README.md").write_text(model_card(path.name, config, info, to, puzzle), encoding="utf-8")
