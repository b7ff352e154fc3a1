"""The settings of a training run."""

from dataclasses import dataclass, field
from typing import Literal

from src.config import is_utf8
from src.curriculum import CurriculumConfig
from src.monitor import MonitoringConfig


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
        compile: torch.compile; by default where a compiler is present
        shard: spread parameters, gradients, optimizer state over the processes (FSDP); else each has all of them (DDP)
        curriculum: stages of the run, in the --config file
        monitoring: where figures go and when the run warns about its machine
        seed: seed of weights, order of examples and dropout
        resume: go on from the newest checkpoint of save_dir
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
    init_from: str | None = None

    def __post_init__(self):
        positive = "batch_size grad_accum max_steps eval_every save_every log_every keep_checkpoints max_skipped"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
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
        if not is_utf8(self.sample_prompt):
            raise ValueError("sample_prompt is not valid UTF-8 text: correct it")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}: set it over 0, or leave it out")
