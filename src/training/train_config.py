"""The settings of a training run, one dataclass per topic.  Scripts read them before they import torch."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from src.config import flag_value, parse_flags
from src.data.corpus import MAX_DOC_MB
from src.files.text import is_text
from src.model_config import TRMConfig, model_settings
from src.training.rag_config import RagConfig

MOST_ROWS = 2**20  # rows in a batch; a mistyped batch_size over this is refused before it fills the memory


@dataclass
class RuntimeConfig:
    """The device to run on and the precision of matrix products.

    Args:
        device: auto (CUDA if present, else MPS, else CPU), cpu, cuda, cuda:N or mps; training refuses cuda:N, so set
            CUDA_VISIBLE_DEVICES to choose its GPU
        precision: precision of matrix products; weights stay fp32. auto = bf16 if the hardware supports it, fp16 on
            older GPUs, else fp32; training with muon or muoneq takes fp32 in place of fp16
    """

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass
class DataConfig:
    """The text to train on, and how it becomes windows of tokens.

    Args:
        train_paths: training text: files, globs, folders, or words: stdlib, site-packages, site-packages/NAME,
            permissive-packages (see data/README.md). By default stdlib, with stdlib-valid as valid_paths
        valid_paths: validation text, given like train_paths; by default, a part of the training text is held back
        text_field: name of the text field in .jsonl files, or of the text column in .parquet files
        records: train on questions with answers, one per row; the loss covers the answers only. In a mixture, paths
            without such records are plain text
        question_field: with records, name of the field or column with the question; by default question (GSM8K,
            reasoning-gym), or Body and Question (SVAMP)
        answer_field: with records, name of the field or column with the answer; by default answer or Answer
        tokenizer: sentencepiece, byte (one token per byte), or the path of a tokenizer.json, .model or .bin file or of
            a checkpoint folder
        sp_model: SentencePiece .model file, made by train_spm.py; by default, one is trained on the training text
        document_mask: let a token attend only to tokens of its own document; by default, to all of its window
        packing: join the documents and cut them into full windows, without padding; false = one document per row, cut
            at max_seq_len and padded
        shift_windows: cut the text into windows at other places in each epoch; by default, only their order changes
        strict: stop with an error at a bad line in a data file; by default, it is reported and skipped
        max_doc_mb: skip documents in .jsonl and .parquet files that are longer than this, in million characters
        mixture: sampling weight of each of the train_paths; `--mixture 3 1` takes three windows of the first for one of
            the second; by default, all files are one corpus
        fim_rate: fill-in-the-middle: probability that a training document, or its part in a window, is rearranged so
            that the model learns to write what is between a prefix and a suffix. Records and validation text stay as
            they are. Needs sentinels (`train_tokenizer.py --fim true`); `byte` and one that the run trains have them
        fim_order: psm = prefix, suffix, middle; spm = suffix, prefix, middle; default: as the tokenizer had, or psm
        streaming: read and tokenize the files during training instead of before it; use it for text that is too large
            to tokenize first
        shuffle_buffer: with streaming, number of windows that each loading process shuffles together, per corpus; 1 =
            no shuffling
        num_workers: processes that load batches; 0 = the training process itself; raise it if the GPU waits for data
        num_proc: processes that tokenize the text before training, up to the number of cores
        cache_dir: folder for tokenized text; by default $HF_DATASETS_CACHE if set, else ~/.cache/generative-trm
        rag: Code retrieved from other files at the start of each window, as a section `rag` of the --config file
    """

    train_paths: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    records: bool = False
    question_field: str | None = None
    answer_field: str | None = None
    tokenizer: str = "sentencepiece"
    sp_model: str | None = None
    document_mask: bool = False
    packing: bool = True
    shift_windows: bool = False
    strict: bool = False
    max_doc_mb: float = MAX_DOC_MB
    mixture: list[float] = field(default_factory=list)
    fim_rate: float = 0.0
    fim_order: Literal["psm", "spm"] | None = None
    streaming: bool = False
    shuffle_buffer: int = 2048
    num_workers: int = 0
    num_proc: int = 1
    cache_dir: str | None = None
    rag: RagConfig = field(default_factory=RagConfig)

    def __post_init__(self):
        if self.sp_model is not None and self.tokenizer != "sentencepiece":
            raise ValueError(f"sp_model needs tokenizer sentencepiece, not {self.tokenizer}: leave out one of the two")
        self._check_records()
        if self.num_workers < 0 or self.num_proc < 1 or self.shuffle_buffer < 1:
            raise ValueError("num_workers must be 0 or more, num_proc and shuffle_buffer 1 or more: correct them")
        for name in ("document_mask", "streaming", "shift_windows"):
            if getattr(self, name) and not self.packing:
                raise ValueError(f"{name} needs packing true: with packing false each row holds one document")
        if self.shift_windows and (self.mixture or self.records or self.streaming or self.fim_rate or self.rag.paths):
            raise ValueError("shift_windows is for one text, not for records, streaming, fim_rate, rag: leave it out")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate is {self.fim_rate}: set it from 0 to 1")
        if self.fim_rate and self.rag.paths:
            raise ValueError("fim_rate and the section rag each change the windows: leave out one of the two")
        if self.fim_order and not self.fim_rate:
            raise ValueError(f"fim_order {self.fim_order} needs a fim_rate over 0: set it, or leave out fim_order")
        if self.mixture and len(self.mixture) != len(self.train_paths):
            sizes = f"{len(self.mixture)} weights for {len(self.train_paths)} train_paths"
            raise ValueError(f"mixture has {sizes}: give one weight per path")
        if not (all(weight > 0 for weight in self.mixture) and sum(self.mixture) < math.inf):
            raise ValueError("mixture: every weight must be a number over 0; leave a path out to exclude it")

    def _check_records(self):
        if not self.records:
            for name in ("question_field", "answer_field"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs records true: add --records true, or leave it out")
            return
        if not self.train_paths:
            raise ValueError("records needs train_paths: name files with questions and answers")
        for name, default in (("text_field", "text"), ("document_mask", False), ("packing", True), ("fim_rate", 0)):
            if getattr(self, name) != default and not self.mixture:
                raise ValueError(f"{name} is for plain text, but records true reads questions: leave it out")


@dataclass
class CurriculumStage:
    """What one stage changes.  A setting that is left out keeps its value from the stage before.

    Args:
        steps: length of the stage in steps (see max_steps); give either steps or epochs
        epochs: length of the stage in passes over the training windows, such as 0.5; give either steps or epochs
        seq_len: tokens per window, at most max_seq_len
        batch_size: windows per step
        latent_steps: n, updates of z before each update of y (trm)
        deep_steps: T, cycles per supervision step (trm), or visits (loop)
        supervision_steps: N_sup, number of supervision steps (trm)
        dim: new d_model, which can only grow; heads of the same size are added
        d_ff: new hidden width of SwiGLU; by default it grows in proportion to dim, rounded up to a multiple of 64
        lr_factor: factor on the learning rate of the schedule
    """

    steps: int | None = None
    epochs: float | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    latent_steps: int | None = None
    deep_steps: int | None = None
    supervision_steps: int | None = None
    dim: int | None = None
    d_ff: int | None = None
    lr_factor: float | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a stage needs its length: give either steps or epochs")
        if (self.batch_size or 1) > MOST_ROWS:
            raise ValueError(f"batch_size is {self.batch_size}: set it to {MOST_ROWS:,} or less")
        for name, value in vars(self).items():
            allowed = "over 0" if name in ("epochs", "lr_factor") else "to 1 or more"
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: set it {allowed}, or leave it out")


@dataclass
class CurriculumConfig:
    """The section `curriculum` of a --config file: a run in stages.

    Args:
        stages: list of stages, which follow each other; docs/training.md shows an example. By default, the run is one
            stage of max_steps
    """

    stages: list[CurriculumStage] = field(default_factory=list)


@dataclass
class MonitoringConfig:
    """The section `monitoring` of a --config file: where metrics are logged, and when the run warns about its machine.

    Args:
        cpu_warning_threshold: warn above this CPU use, in per cent of all cores; the default of 100 never warns, as
            training on a CPU keeps all cores busy
        memory_warning_threshold: warn if more than this of the machine's memory is in use, in per cent
        gpu_memory_warning_threshold: warn if this process holds more than this of the GPU's memory, in per cent
        slow_batch_threshold: warn about a batch that takes this many times the median of the last 50, and over 1 s
        tensorboard: write TensorBoard events to the run folder
        wandb_project: also log to this Weights & Biases project (pip install wandb; set WANDB_MODE=offline to run
            without a network)
    """

    cpu_warning_threshold: float = 100.0
    memory_warning_threshold: float = 90.0
    gpu_memory_warning_threshold: float = 95.0
    slow_batch_threshold: float = 4.0
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith("threshold") and not value >= 0:
                raise ValueError(f"{name} is {value}: set it to 0 or more")


@dataclass
class TrainConfig:
    """The training run.

    Args:
        save_dir: run folder, for config.yaml, metrics.jsonl, learning_curve.png, samples of text and checkpoints
        batch_size: rows per batch (windows of text, or puzzles), over all processes together
        grad_accum: compute the rows of each process in this many parts, one after the other; raise it if memory runs
            out; the gradient stays the same
        max_steps: length of the run in steps. A step trains on one batch of text, or runs one supervision step of all
            puzzles in the batch. The stages of a curriculum replace max_steps
        max_minutes: also stop after this many minutes; the learning rate then follows steps or time, whichever is
            further along; default no limit
        optimizer: adamw, muon (for the matrices inside blocks; AdamW for the rest), or muoneq (muon with equal rows)
        optimizer_step: update the weights once per batch, or after each supervision step as in the TRM paper
        schedule: learning rate after the warm-up: cosine (decays along a cosine), linear (stays constant, then decays
            linearly over the last fifth of the run) or constant
        sample_depth: draw deep_steps at random for each batch, from least_depth to the model's value, so that a loop
            learns to answer at each of these depths; of a TRM for text with full_bptt, draw supervision_steps instead
        least_depth: smallest number that sample_depth draws
        recursion_from: fraction of the run, from 0 to under 1, after which the full recursion starts; before that,
            training, evaluations and checkpoints have one cycle (deep_steps 1) and one supervision step: less work
        lr: peak learning rate; lower it if the loss diverges; default for text 0.001 with adamw, 0.012 with muon
        min_lr_ratio: final learning rate of the cosine and linear schedules, as a fraction of lr
        warmup_steps: steps in which the learning rate rises linearly from 0 to lr; raise it if the loss diverges early
        weight_decay: decoupled weight decay of matrices; biases, gains and embeddings have none
        beta2: AdamW's decay rate of the second moment
        grad_clip: largest norm of the gradient; a larger gradient is scaled down to it; 0 = no clipping
        max_skipped: steps whose gradient is not finite are skipped; stop the run after this many of them in a row
        ema_decay: decay of the moving average of the weights, which evaluations and generation use; lower it for runs
            of a few hundred steps; 0 = no average
        eval_every: steps between evaluations
        eval_batches: validation batches per evaluation, from all parts of the validation data; 0 = all of it; after
            the last step, all of it is evaluated once
        save_every: steps between checkpoints
        log_every: steps between lines of metrics.jsonl
        keep_checkpoints: number of newest checkpoints to keep; the best one is always kept as well
        sample_prompt: start of the sample text that each evaluation generates; empty = only the BOS token, or, with
            records, the first validation question
        sample_tokens: length of the sample text in tokens; 0 = no sample
        compile: use torch.compile; by default, it is used if it works here and the run is estimated to last over two
            minutes
        shard: shard parameters, gradients and optimizer state over the processes (FSDP); by default each process holds
            all of them (DDP)
        overfit: check only: learn this many records by heart, the first ones, until the model answers all of them, or
            say what is most likely wrong; needs records, writes nothing, and ends after 2 minutes if max_minutes is not
            set
        curriculum: A curriculum: stages of the run, given as a section `curriculum` of the --config file
        monitoring: Logging, and warnings about the machine, also as a section `monitoring` of the --config file
        seed: seed of the initial weights, the order of examples and dropout
        resume: continue the run in save_dir from its newest checkpoint. With --config FOLDER/config.yaml, continue the
            run in FOLDER
        allow_changed_corpus: resume even if the text or the tokenizer has changed since the run started
        init_from: start a new run from the weights, tokenizer and model settings of this checkpoint folder; model flags
            override its settings as long as the weights keep their shapes, for example for more recursion steps
    """

    save_dir: str = "runs/trm"
    batch_size: int = 32
    grad_accum: int = 1
    max_steps: int = 2000
    max_minutes: float | None = None
    optimizer: Literal["adamw", "muon", "muoneq"] = "adamw"
    optimizer_step: Literal["batch", "supervision"] = "batch"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    sample_depth: bool = False
    least_depth: int = 1
    recursion_from: float = 0.0
    lr: float | None = None
    min_lr_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    grad_clip: float = 1.0
    max_skipped: int = 10
    ema_decay: float = 0.999
    eval_every: int = 200
    eval_batches: int = 20
    save_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    sample_prompt: str = ""
    sample_tokens: int = 120
    compile: bool | None = None
    shard: bool = False
    overfit: int | None = None
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    seed: int = 0
    resume: bool = False
    allow_changed_corpus: bool = False
    init_from: str | None = None

    def __post_init__(self):
        self.lr = {"adamw": 0.001}.get(self.optimizer, 0.012) if self.lr is None else self.lr
        positive = "batch_size grad_accum max_steps eval_every save_every log_every keep_checkpoints max_skipped"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.batch_size > MOST_ROWS:
            raise ValueError(f"batch_size is {self.batch_size}: set it to {MOST_ROWS:,} or less")
        if not self.save_dir:
            raise ValueError("save_dir is empty: name a folder")
        if self.batch_size % self.grad_accum:
            parts = f"grad_accum {self.grad_accum} parts"
            raise ValueError(f"batch_size {self.batch_size} does not divide into {parts}: make it a multiple")
        if not (self.lr > 0 and 0 <= self.ema_decay < 1 and 0 < self.beta2 < 1 and 0 <= self.min_lr_ratio <= 1):
            raise ValueError("lr must be over 0; ema_decay, beta2 and min_lr_ratio between 0 and 1: correct them")
        for name in ("eval_batches", "warmup_steps", "weight_decay", "grad_clip", "sample_tokens", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 0 or more")
        if not 0 <= self.recursion_from < 1:
            raise ValueError(f"recursion_from is {self.recursion_from}: set it from 0 to under 1")
        if self.least_depth != 1 and not (self.sample_depth and self.least_depth > 1):
            raise ValueError(f"least_depth is {self.least_depth}: set it to 1, or to more with sample_depth")
        if self.shard and self.optimizer != "adamw":
            raise ValueError(f"optimizer {self.optimizer} needs whole matrices, but shard splits them: choose adamw")
        if not is_text(self.sample_prompt):
            raise ValueError("sample_prompt is not valid UTF-8 text: correct it")
        for name, least in (("overfit", "1 or more"), ("max_minutes", "over 0")):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}: set it to {least}, or leave it out")


class Settings(NamedTuple):
    """All settings of a run, one dataclass per topic."""

    train: TrainConfig
    data: DataConfig
    model: TRMConfig
    runtime: RuntimeConfig

    def flat(self) -> dict:
        """Returns all settings as {flag: value}, the content of config.yaml."""
        return flat_settings(self)


def flat_settings(parts) -> dict:
    """Returns {flag: value} for the settings of a run, which are one dataclass per topic; the model's come last."""
    flat = {}
    for part in sorted(parts, key=lambda part: isinstance(part, TRMConfig)):
        values = model_settings(part) if isinstance(part, TRMConfig) else dataclasses.asdict(part)
        flat |= {f.name: values[f.name] for f in dataclasses.fields(part) if f.init}
    return flat


def read_settings(argv=None, description=None) -> Settings:
    """Parse flags such as ["--config", "configs/small.yaml", "--lr", "3e-3"]; None = those of the command line.

    With init_from, model settings that are not given come from the checkpoint."""
    return Settings(*parse_run_flags(description, Settings.__annotations__.values(), argv, model_of_source))


def parse_run_flags(description, classes, argv=None, defaults=None) -> tuple:
    """Parse flags as `parse_flags` does; the first of `classes` must have the settings save_dir and resume.

    With --resume and the config.yaml of a run folder, save_dir becomes that folder, which may have been moved, unless
    save_dir is given as a flag."""
    argv = list(sys.argv[1:] if argv is None else argv)
    folder = _run_folder_of_config(argv)
    if folder is not None:
        train = parse_flags(description, *classes, argv=argv)[0]
        if train.resume and Path(train.save_dir).resolve() != folder.resolve():
            print(f"resuming in {folder}, the folder of this config.yaml, not in {train.save_dir}", file=sys.stderr)
            argv += ["--save_dir", str(folder)]
    return parse_flags(description, *classes, argv=argv, defaults=defaults)


def _run_folder_of_config(argv) -> Path | None:
    """Returns the run folder that the --config file is in, if any, and None if save_dir is given as a flag."""
    config = flag_value(argv, "config")
    if config is None or flag_value(argv, "save_dir") is not None:
        return None
    path = Path(config)
    is_run = path.name == "config.yaml" and any(path.with_name(name).exists() for name in (".lock", "last"))
    return path.parent if is_run else None


def model_of_source(parsed, model=TRMConfig) -> dict:
    """Returns the model's defaults with init_from: those of the run if it has started, else the checkpoint's."""
    if not parsed.init_from:
        return {}
    from src import checkpoint  # imported late, because they import torch
    from src.training import run_folder

    if not (values := run_folder.settings_of(Path(parsed.save_dir))):
        source = checkpoint.load_config(parsed.init_from)
        # to_dict has a number even if grad_deep_steps was not set; then it must be None, to follow a new deep_steps
        values = source.to_dict() | {"grad_deep_steps": model_settings(source)["grad_deep_steps"]}
    return {f.name: values[f.name] for f in dataclasses.fields(model) if f.init and f.name in values}
