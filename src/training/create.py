"""Builds the model and the trainer of a run from its settings."""

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
from src.training.depths import check_depths
from src.training.train_config import Settings, TrainConfig


def check_model(config: TrainConfig, model: TRMConfig):
    """Raises UserError if the model is not one for text, or cannot be trained with these settings."""
    if config.optimizer_step == "supervision" and model.full_bptt:
        raise UserError("full_bptt needs one update for all supervision steps: set optimizer_step to batch")
    if not model.causal:
        raise UserError("causal false is for puzzles: a language model learns the next token, leave --causal out")


def create_model(config: TRMConfig, tokenizer, seed: int = 0) -> TRMModel:
    """Returns a new model for a tokenizer's vocabulary; the same seed gives the same weights.

    Raises UserError if its parameters do not fit into this machine's memory."""
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id)
    with torch.device("meta"):  # parameters without memory: only their sizes
        size = sum(parameter.nbytes for parameter in TRMModel(config).parameters()) / 2**30
    memory = psutil.virtual_memory().total / 2**30
    if size > memory:
        raise UserError(f"the model needs {size:,.0f} GiB, this machine has {memory:,.0f}: make it smaller")
    torch.manual_seed(seed)
    return TRMModel(config)


def create_trainer(settings: Settings, build_retrieval=None) -> Trainer:
    """Prepare the data, tokenizer, model and trainer, and write config.yaml to the run folder.

    With `resume`, the trainer continues the run in save_dir. build_retrieval: `build_rag` of src/rag, for runs with a
    section `rag`; it is passed in because the core does not import src/rag. Raises UserError for mistakes in settings
    and files."""
    keep_freed_memory()
    with parallel.only_main_speaks():
        return _create_trainer(settings, build_retrieval)


def open_run(settings):
    """Check whether a run with these settings may start or continue in its folder, and lock the folder of an old run.

    Returns (folder, newest checkpoint as (folder, state), lock). The last two are None if no run has started there.
    These three are the last arguments of `begin`."""
    config = settings.train
    folder, newest, lock = Path(config.save_dir), None, None
    run_folder.check_writable(folder)
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    run_folder.check_resume(folder, settings.flat(), config.resume, defaults)
    if (folder / "config.yaml").exists():
        if parallel.is_main():
            lock = run_folder.RunLock(folder)
        newest = run_folder.newest_whole(folder)
    return folder, newest, lock


def begin(trainer: Trainer, settings, corpus: dict, folder: Path, newest, lock) -> Trainer:
    """Write the folder of a new run, or load the newest checkpoint into the trainer of a resumed run.

    corpus: fingerprints of the data, for `run_folder.keep_corpus`. The other arguments come from `open_run`."""
    trainer.lock = lock
    if trainer.is_main and not newest:
        trainer.lock = run_folder.start(folder, settings.flat(), lock)
    changes = run_folder.corpus_changes(folder, corpus) if trainer.is_main and newest else []
    if trainer.agreement.sum(bool(changes))[0]:  # before process 0 writes the new fingerprints
        newest[1]["eval_batches"] = None
    if trainer.is_main:
        run_folder.keep_corpus(folder, corpus)
        if newest:
            run_folder.link_again(folder, *newest)
    if newest:
        trainer.load(*newest)
    return trainer


def _create_trainer(settings, build_retrieval):
    config, data, model_config, runtime = settings
    run = folder, newest, _ = open_run(settings)
    source = None  # the checkpoint that provides the weights and the tokenizer
    if newest:
        source = newest[0]
        model_config = checkpoint.load_config(source)
    elif config.init_from:
        source = checkpoint.resolve(config.init_from)
        named = data.tokenizer not in ("sentencepiece", str(config.init_from))
        own = read_tokenizer(str(source)).fingerprint
        if data.sp_model or (named and (data.tokenizer != "byte" or read_tokenizer("byte").fingerprint != own)):
            raise UserError("--init_from brings its own tokenizer: leave out --tokenizer and --sp_model")
    check_model(config, model_config)
    if not config.curriculum.stages:  # the trainer checks this too, but only after the text is read
        check_depths(config, settings.model)
    if source:
        data = dataclasses.replace(data, tokenizer=str(source), sp_model=None)
    choose_device(runtime.device)  # reports a wrong device now, not after minutes of data preparation
    files = find_text(data)
    retrieval = build_retrieval(data.rag, data.cache_dir) if data.rag.paths else None
    corpus = _look_at_text(folder, files, newest, config.allow_changed_corpus, retrieval)
    tokenizer, train_set, valid_set = prepare_data(data, model_config.vocab_size, model_config.max_seq_len, files=files)
    corpus["tokenizer"] = tokenizer.fingerprint
    if source is None and model_config.vocab_size not in (None, tokenizer.vocab_size):
        print(f"vocab_size is {tokenizer.vocab_size}, that of the tokenizer", file=sys.stderr)
    if data.records and not config.sample_prompt:
        config = dataclasses.replace(config, sample_prompt=valid_set.prompt(0))
    if retrieval is not None:
        train_set = retrieval.wrap(train_set, tokenizer, config.seed)
    if config.allow_changed_corpus and data.streaming and newest:
        for position in newest[1]["loaders"]:
            position["reads"] |= train_set.identity  # so that the stream accepts its position in the changed text
    if config.init_from and not newest:
        if model_config.vocab_size is None:
            model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        model = checkpoint.load_model(source, trains=True, config=model_config)[0]
    else:
        model = create_model(model_config, tokenizer, config.seed)
    first = None
    if newest:  # the curriculum may have changed the checkpoint's config; its stages start from the original one
        ids = {"vocab_size": model_config.vocab_size, "pad_token_id": model_config.pad_token_id}
        first = dataclasses.replace(settings.model, **ids)
    trainer = Trainer(config, model, tokenizer, train_set, valid_set, runtime, data.num_workers, first)
    begin(trainer, settings, corpus, *run)
    trainer.say(f"{describe_model(model)}; {train_set} to train on")
    return trainer


def _look_at_text(folder, files, newest, may_change, retrieval):
    """Returns {part: fingerprints of its files}.  Raises UserError if the text has changed and may_change is false."""
    corpora, valid_files = files
    names = ["train"] if len(corpora) == 1 else [f"train {number}" for number in range(1, len(corpora) + 1)]
    corpus = dict(zip((*names, "valid"), map(fingerprint_files, (*corpora, valid_files))))
    corpus |= {"retrieved": retrieval.fingerprint} if retrieval is not None else {}
    now = corpus | ({"tokenizer": read_tokenizer(str(newest[0])).fingerprint} if newest else {})
    run_folder.check_corpus(folder, now, "text", may_change)
    return corpus
