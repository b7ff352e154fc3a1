"""From settings to a model and a trainer."""

import dataclasses
import sys
from pathlib import Path

import psutil
import torch

from src import checkpoint
from src.data.corpus import fingerprint_files
from src.dataset import find_text, prepare_data
from src.errors import UserError
from src.metrics import describe_model
from src.model import TRMConfig, TRMModel
from src.runtime import choose_device, keep_freed_memory
from src.tokenizer import read_tokenizer
from src.trainer import Trainer
from src.training import parallel, run_folder
from src.training.train_config import Settings


def create_model(config: TRMConfig, tokenizer, seed: int = 0) -> TRMModel:
    """A new model for a tokenizer's vocabulary; the same seed gives the same weights.  UserError where this machine's
    memory cannot hold it."""
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id)
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in TRMModel(config).parameters()) / 2**30
    memory = psutil.virtual_memory().total / 2**30
    if size > memory:
        raise UserError(f"the model needs {size:,.0f} GiB, this machine has {memory:,.0f}: make it smaller")
    torch.manual_seed(seed)
    return TRMModel(config)


def create_trainer(settings: Settings) -> Trainer:
    """Data, tokenizer, model and trainer; writes the run folder's config.yaml before step 0.

    Goes on with the run in save_dir where there is one and `resume` says so. UserError for every fault of the input."""
    keep_freed_memory()
    with parallel.only_main_speaks():
        return _create_trainer(settings)


def _create_trainer(settings):
    config, data, model_config, runtime = settings
    folder, newest, lock = Path(config.save_dir), None, None
    run_folder.check_writable(folder)
    run_folder.check_resume(folder, settings.flat(), config.resume)
    if (folder / "config.yaml").exists():
        lock = parallel.is_main() and run_folder.RunLock(folder)
        newest = run_folder.newest_whole(folder)
    source = newest[0] if newest else checkpoint.resolve(config.init_from) if config.init_from else None
    if newest:
        model_config = checkpoint.load_config(source)
    elif source and (data.sp_model or data.tokenizer not in ("sentencepiece", "byte", str(config.init_from))):
        raise UserError("--init_from brings its own tokenizer: leave out --tokenizer and --sp_model")
    if not model_config.causal:
        raise UserError("causal false is for puzzles: a language model learns the next token, leave --causal out")
    if source:
        data = dataclasses.replace(data, tokenizer=str(source), sp_model=None)
    choose_device(runtime.device)  # a wrong device is told before minutes of data preparation
    files = find_text(data)
    corpus, changes = _look_at_text(folder, files, newest, config.allow_changed_corpus)
    tokenizer, train_set, valid_set = prepare_data(data, model_config.vocab_size, model_config.max_seq_len, files=files)
    corpus["tokenizer"] = tokenizer.fingerprint
    if changes and data.streaming and newest:
        for position in newest[1]["loaders"]:
            position["reads"] |= train_set.identity  # it goes on at the same place in the text as it is now
    if config.init_from and not newest:
        if model_config.vocab_size is None:
            model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        model = checkpoint.load_model(source, trains=True, config=model_config)[0]
    else:
        model = create_model(model_config, tokenizer, config.seed)
    begun = {"vocab_size": model_config.vocab_size, "pad_token_id": model_config.pad_token_id}
    first = dataclasses.replace(settings.model, **begun) if newest else None  # before the curriculum changed it
    trainer = Trainer(config, model, tokenizer, train_set, valid_set, runtime, data.num_workers, first)
    trainer.lock = lock
    if trainer.is_main and not newest:
        trainer.lock = run_folder.start(folder, settings.flat(), lock)
    if trainer.is_main:
        run_folder.keep_corpus(folder, corpus)
    if newest:
        trainer.load(*newest)
    trainer.say(f"{describe_model(model)}; {train_set} to train on")
    return trainer


def _look_at_text(folder, files, newest, may_change):
    """(fingerprints of a run's text by part, what has changed since the run began).  UserError where it may not."""
    corpora, valid_files = files
    names = ["train"] if len(corpora) == 1 else [f"train {number}" for number in range(1, len(corpora) + 1)]
    corpus = dict(zip((*names, "valid"), map(fingerprint_files, (*corpora, valid_files))))
    now = corpus | ({"tokenizer": read_tokenizer(str(newest[0])).fingerprint} if newest else {})
    changes = run_folder.corpus_changes(folder, now)
    if changes and not may_change:
        told = f"the text is not that which the run in {folder} was begun with ({'; '.join(changes)})"
        raise UserError(f"{told}: bring it back, or go on with what is there by --allow_changed_corpus true")
    if changes:
        print(f"the run goes on with changed text: {'; '.join(changes)}", file=sys.stderr)
    return corpus, changes
