"""The settings of a training run, a dataclass per concern, which scripts read before they import torch."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from src.config import parse_flags
from src.data.corpus import MAX_DOC_MB
from src.files.text import is_text
from src.model_config import TRMConfig, model_settings

MOST_ROWS = 2**20  # of a batch: a mistyped size would fill the memory before the first step


@dataclass
class RuntimeConfig:
    """Where the tensors live and how they are multiplied.

    Args:
        device: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: fp32, bf16, fp16, or auto = bf16 where it is hardware, fp16 on older GPUs, else fp32
    """

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass
class DataConfig:
    """What is read, and how it becomes windows of tokens.

    Args:
        train_paths: files, globs, folders of .jsonl .txt (gzipped or not) .parquet .py; none = this Python's standard
            library
        valid_paths: validation text, likewise; none = a part of the training text that is held back
        text_field: name of the text field (jsonl) or column (parquet)
        tokenizer: sentencepiece, byte, or the path of a tokenizer.json, a .model, a .bin or a checkpoint folder
        sp_model: SentencePiece .model file (from train_spm.py); none = one is trained on the spot
        document_mask: keep attention inside documents
        packing: cut the joined documents into full windows; false = one document per row, padded
        strict: a bad line of a data file is an error, not skipped
        max_doc_mb: documents of .jsonl and .parquet longer than this (million characters) are skipped
        mixture: weights of the train_paths, one each: their shares of the windows; none = by size, as one corpus
        streaming: read and tokenize the training files while training, instead of once before it
        shuffle_buffer: windows that streaming shuffles at a time, per loading process and corpus
        num_workers: processes that load batches; 0 = the training process itself
        num_proc: processes that tokenize before training
        cache_dir: folder for tokenized text; none = $HF_DATASETS_CACHE or ~/.cache/generative-trm
    """

    train_paths: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    tokenizer: str = "sentencepiece"
    sp_model: str | None = None
    document_mask: bool = False
    packing: bool = True
    strict: bool = False
    max_doc_mb: float = MAX_DOC_MB
    mixture: list[float] = field(default_factory=list)
    streaming: bool = False
    shuffle_buffer: int = 2048
    num_workers: int = 0
    num_proc: int = 1
    cache_dir: str | None = None

    def __post_init__(self):
        if self.sp_model is not None and self.tokenizer != "sentencepiece":
            raise ValueError(f"sp_model is for tokenizer sentencepiece, not {self.tokenizer}: leave out one of the two")
        if self.num_workers < 0 or self.num_proc < 1:
            raise ValueError("num_workers must be 0 or more, num_proc 1 or more")
        if self.shuffle_buffer < 1:
            raise ValueError("shuffle_buffer must be 1 or more; 1 does not shuffle")
        if not self.packing and (self.document_mask or self.streaming):
            name = "document_mask" if self.document_mask else "streaming"
            raise ValueError(f"{name} needs packing: with packing false a row holds one document")
        if self.mixture and len(self.mixture) != len(self.train_paths):
            sizes = f"{len(self.mixture)} weights for {len(self.train_paths)} train_paths"
            raise ValueError(f"mixture has {sizes}: give one each")
        if not (all(weight > 0 for weight in self.mixture) and sum(self.mixture) < math.inf):
            raise ValueError("mixture: every weight must be a number over 0; leave out a path that is not wanted")


@dataclass
class CurriculumStage:
    """What a stage changes; a setting that is left out stays as it was in the stage before.

    Args:
        steps: its optimizer steps; or else epochs
        epochs: its passes over the training windows, such as 0.5; or else steps
        seq_len: tokens of a window, up to max_seq_len
        batch_size: windows per optimizer step
        latent_steps: n of the recursion
        deep_steps: T of the recursion
        supervision_steps: N_sup of the recursion
        dim: d_model, which may grow: heads of the same size are added
        d_ff: hidden width of SwiGLU; by default it grows with dim, rounded up to 64
        lr_factor: factor of the learning rate
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
            raise ValueError("a stage lasts either steps or epochs: give one of them")
        if (self.batch_size or 1) > MOST_ROWS:
            raise ValueError(f"batch_size is {self.batch_size}: set it to {MOST_ROWS:,} or less")
        for name, value in vars(self).items():
            least = "over 0" if name in ("epochs", "lr_factor") else "to 1 or more"
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: set it {least}, or leave it out")


@dataclass
class CurriculumConfig:
    """The section `curriculum` of the settings.

    Args:
        stages: stages of the run, in their order; none = one stage of max_steps
    """

    stages: list[CurriculumStage] = field(default_factory=list)


@dataclass
class MonitoringConfig:
    """Where a run's figures go, and when it warns about its machine: section `monitoring` of the YAML.

    Args:
        cpu_warning_threshold: per cent of all cores; at 100, never: training on a CPU keeps all of them busy
        memory_warning_threshold: per cent of the machine's memory
        gpu_memory_warning_threshold: per cent of the GPU's memory that this process holds
        slow_batch_threshold: how many times the median of the last 50 batches a batch may take (told from 1 s up)
        tensorboard: write TensorBoard events
        wandb_project: log to this Weights & Biases project (pip install wandb; WANDB_MODE=offline needs no network)
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
    """The run.

    Args:
        save_dir: run folder: config, metrics.jsonl, learning_curve.png, samples.txt, checkpoints
        batch_size: windows per optimizer step, over all devices
        grad_accum: parts that a batch is split into, to save memory; the result is the same
        max_steps: optimizer steps (batches)
        max_minutes: end after this time; the learning rate then follows whichever of steps and time is further
        optimizer: adamw, or muon for the matrices inside blocks and adamw for the rest
        optimizer_step: one optimizer step per batch, or per supervision step as in the TRM paper
        schedule: learning rate after warm-up: cosine, linear = constant with a linear cooldown at the end, constant
        sample_depth: each step draws its deep_steps between 1 and the model's
        recursion_from: part of the run, 0 to 1, after which the recursion begins; before it, one cycle and one
            supervision step
        lr: peak learning rate
        min_lr_ratio: learning rate at the end, as a fraction of lr
        warmup_steps: steps of linear warm-up
        weight_decay: decoupled weight decay of matrices
        beta2: AdamW's decay of the second moment
        grad_clip: largest norm of the gradient; 0 = no clipping
        max_skipped: end the run after so many steps in a row whose gradient is not finite, which are skipped
        ema_decay: decay of the moving average of weights, with which the model is judged and shipped; 0 = off
        eval_every: steps between evaluations
        eval_batches: validation batches of an evaluation; 0 = all; a run ends with an evaluation on all
        save_every: steps between checkpoints
        log_every: steps between lines of metrics.jsonl
        keep_checkpoints: newest checkpoints that are kept, besides the best
        sample_prompt: start of the sample text at each evaluation; empty = from BOS
        sample_tokens: its length in tokens; 0 = no sample
        compile: torch.compile; by default where a compiler is present and the run takes over about two minutes
        shard: spread parameters, gradients, optimizer state over the processes (FSDP); else each has all of them (DDP)
        curriculum: stages of the run, in the --config file
        monitoring: where figures go and when the run warns about its machine
        seed: seed of weights, order of examples and dropout
        resume: go on from the newest checkpoint of save_dir, or with --config FOLDER/config.yaml of that run folder
        allow_changed_corpus: go on although the text, or the tokenizer, is not the one that the run was begun with
        init_from: checkpoint folder that the run starts from: its weights and tokenizer, and its model settings where
            none are given (recursion steps, context length, losses may change, shapes may not)
    """

    save_dir: str = "runs/trm"
    batch_size: int = 32
    grad_accum: int = 1
    max_steps: int = 2000
    max_minutes: float | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_step: Literal["batch", "supervision"] = "batch"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    sample_depth: bool = False
    recursion_from: float = 0.0
    lr: float = 1e-3
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
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    seed: int = 0
    resume: bool = False
    allow_changed_corpus: bool = False
    init_from: str | None = None

    def __post_init__(self):
        positive = "batch_size grad_accum max_steps eval_every save_every log_every keep_checkpoints max_skipped"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.batch_size > MOST_ROWS:
            raise ValueError(f"batch_size is {self.batch_size}: set it to {MOST_ROWS:,} or less")
        if not self.save_dir:
            raise ValueError("save_dir is empty: name a folder")
        if self.batch_size % self.grad_accum:
            raise ValueError(f"batch_size {self.batch_size} does not divide into grad_accum {self.grad_accum} parts")
        if not (self.lr > 0 and 0 <= self.ema_decay < 1 and 0 < self.beta2 < 1 and 0 <= self.min_lr_ratio <= 1):
            raise ValueError("lr must be over 0; ema_decay, beta2 and min_lr_ratio between 0 and 1: correct them")
        for name in ("eval_batches", "warmup_steps", "weight_decay", "grad_clip", "sample_tokens", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 0 or more")
        if not 0 <= self.recursion_from < 1:
            raise ValueError(f"recursion_from is {self.recursion_from}: set it between 0 and 1")
        if self.shard and self.optimizer == "muon":
            raise ValueError("optimizer muon needs whole matrices, and shard spreads them: choose one of the two")
        if not is_text(self.sample_prompt):
            raise ValueError("sample_prompt is not valid UTF-8 text: correct it")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}: set it over 0, or leave it out")


class Settings(NamedTuple):
    """All settings of a run, a dataclass per concern."""

    train: TrainConfig
    data: DataConfig
    model: TRMConfig
    runtime: RuntimeConfig

    def flat(self) -> dict:
        """{flag: value} of all, as config.yaml has them."""
        parts = (self.train, self.data, self.runtime)
        flat = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
        return flat | model_settings(self.model)


def read_settings(argv=None, description=None) -> Settings:
    """Settings from flags, such as ["--config", "configs/small.yaml", "--lr", "3e-3"]; None = the command line's.

    With init_from the model's settings that are not given are those of the checkpoint. A run that goes on by the
    config.yaml in its folder goes on in that folder, wherever it was moved, unless save_dir is a flag."""
    argv, classes = list(sys.argv[1:] if argv is None else argv), Settings.__annotations__.values()
    folder = _home(argv)
    if folder is not None:
        train = parse_flags(description, *classes, argv=argv)[0]
        if train.resume and Path(train.save_dir).resolve() != folder.resolve():
            print(f"the config.yaml lies in {folder}: the run goes on there, not in {train.save_dir}", file=sys.stderr)
            argv += ["--save_dir", str(folder)]
    return Settings(*parse_flags(description, *classes, argv=argv, defaults=_model_of_source))


def _home(argv) -> Path | None:
    """The run folder that the --config file lies in; None where it lies in none, or save_dir is a flag as well."""
    words = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if "--save_dir" in words or "--config" not in words[:-1]:
        return None
    path = Path(words[len(words) - words[::-1].index("--config")])
    is_run = path.name == "config.yaml" and any(path.with_name(name).exists() for name in (".lock", "last"))
    return path.parent if is_run else None


def _model_of_source(parsed) -> dict:
    """The model's settings of the checkpoint that a run starts from, or of the run itself once it has begun."""
    if parsed.init_from is None:
        return {}
    from src import checkpoint  # here, as they import torch
    from src.training import run_folder

    begun = run_folder.settings_of(Path(parsed.save_dir))
    if begun:
        return {field.name: begun[field.name] for field in dataclasses.fields(TRMConfig) if field.name in begun}
    source = checkpoint.load_config(parsed.init_from)
    follows = model_settings(source)["grad_deep_steps"]  # sizes stay as the weights have them
    return source.to_dict() | {"grad_deep_steps": follows}
