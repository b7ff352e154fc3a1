"""The training loop: deep supervision, evaluation, checkpoints, on one device or many (accelerate)."""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from src import checkpoint
from src.config import UserError
from src.dataset import DataConfig, create_dataloader, prepare_data
from src.evaluation import evaluate
from src.losses import IGNORE, bits_per_byte, step_weights
from src.metrics import RunLog, describe_model, plot_learning_curve
from src.model import TRMConfig, TRMModel
from src.optim import EMA, cosine_schedule, make_optimizers
from src.runtime import (
    Interrupt,
    RuntimeConfig,
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
    keep_freed_memory,
    mix_seed,
)
from src.sampling import generate
from src.tokenizer import StreamDecoder


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
        lr: peak learning rate
        min_lr_ratio: learning rate at the end, as a fraction of lr
        warmup_steps: steps of linear warm-up
        weight_decay: decoupled weight decay of matrices
        beta2: AdamW's decay of the second moment
        grad_clip: largest norm of the gradient; 0 = no clipping
        ema_decay: decay of the moving average of weights, with which the model is judged and shipped; 0 = off
        eval_every: steps between evaluations
        eval_batches: validation batches of an evaluation; 0 = all; a run ends with an evaluation on all
        save_every: steps between checkpoints
        log_every: steps between lines of metrics.jsonl
        keep_checkpoints: newest checkpoints that are kept, besides the best
        sample_prompt: start of the sample text at each evaluation; empty = from BOS
        sample_tokens: its length in tokens; 0 = no sample
        compile: torch.compile; by default where a compiler is present
        seed: seed of weights, order of examples and dropout
        resume: go on from the newest checkpoint of save_dir
        init_from: checkpoint folder that the run starts from: weights, model settings and tokenizer are its own
    """

    save_dir: str = "runs/trm"
    batch_size: int = 32
    grad_accum: int = 1
    max_steps: int = 2000
    max_minutes: float | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_step: Literal["batch", "supervision"] = "batch"
    lr: float = 1e-3
    min_lr_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    eval_every: int = 200
    eval_batches: int = 20
    save_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    sample_prompt: str = ""
    sample_tokens: int = 120
    compile: bool | None = None
    seed: int = 0
    resume: bool = False
    init_from: str | None = None

    def __post_init__(self):
        for name in "batch_size grad_accum max_steps eval_every save_every log_every keep_checkpoints".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.batch_size % self.grad_accum:
            raise ValueError(f"batch_size {self.batch_size} does not divide into grad_accum {self.grad_accum} parts")
        if not (self.lr > 0 and 0 <= self.ema_decay < 1 and 0 < self.beta2 < 1 and 0 <= self.min_lr_ratio <= 1):
            raise ValueError("lr must be over 0; ema_decay, beta2 and min_lr_ratio between 0 and 1: correct them")
        for name in ("eval_batches", "warmup_steps", "weight_decay", "grad_clip", "sample_tokens", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 0 or more")
        if any("\ud800" <= character <= "\udfff" for character in self.sample_prompt):
            raise ValueError("sample_prompt is not valid UTF-8 text: correct it")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}: set it over 0, or leave it out")


class Trainer:
    """One run: `create_trainer(...)` builds it from settings, `train()` runs it."""

    def __init__(self, config: TrainConfig, model: TRMModel, tokenizer, train_set, valid_set, runtime, num_workers=0):
        self.config, self.tokenizer, self.train_set, self.valid_set = config, tokenizer, train_set, valid_set
        self.num_workers = num_workers
        device = choose_device(runtime.device)
        if device.index:
            raise UserError(
                f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
            )
        self.precision, why = choose_precision(runtime.precision, device)
        if self.precision == "fp16" and config.optimizer == "muon":
            raise UserError(
                "--optimizer muon has no loss scaling for fp16: choose --precision fp32 or --optimizer adamw"
            )
        # accelerate brings the loss scaler that fp16 needs; bf16 autocast is entered around the forward pass alone
        mixed = "fp16" if self.precision == "fp16" else "no"
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if config.batch_size % (config.grad_accum * self.world):
            raise UserError(
                f"batch_size {config.batch_size} does not divide into grad_accum {config.grad_accum} x {self.world} "
                "processes: make it a multiple of both"
            )
        self.raw = model.to(self.device)
        compiles, why_compile = choose_compile(config.compile, self.device)
        if compiles:
            model.compile_parts()
        self.say(f"{self.device}, {self.precision} ({why}); {'compiled' if compiles else 'eager'} ({why_compile})")
        optimizers = make_optimizers(model, config.optimizer, config.lr, config.weight_decay, (0.9, config.beta2))
        self.model, *self.optimizers = self.accelerator.prepare(self.raw, *optimizers)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.folder, self.log = Path(config.save_dir), None
        self.step, self.elapsed, self.best, self.grad_norm = 0, 0.0, math.inf, 0.0
        self._start_window()

    def say(self, line: str):
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def train(self) -> dict:
        """Run to the end (steps, minutes or a signal); returns the figures of the last evaluation."""
        config, figures, self.started = self.config, {}, time.monotonic() - self.elapsed
        self.log = RunLog(self.folder, resume_step=self.step) if self.is_main else None
        start = self.step * config.batch_size
        batches = iter(self._loader(self.train_set, seed=config.seed, start=start, num_workers=self.num_workers))
        with Interrupt() as interrupt, self._bar() as bar:
            over = self.progress() >= 1
            while not over:
                self.train_step(next(batches))
                bar.update()
                over = self.progress() >= 1 or interrupt.requested
                if self.step % config.log_every == 0 or over:
                    self._log_training(bar)
                improved = False
                if (self.step % config.eval_every == 0 or over) and not interrupt.requested:
                    figures, improved = self.judge()
                over = over or interrupt.requested  # a signal that came in between; time is looked at after a step
                if self.step % config.save_every == 0 or over or improved:
                    self.save(improved)
            is_part = 0 < config.eval_batches * config.batch_size < len(self.valid_set)
            if is_part and figures and not interrupt.requested:  # told at the end: all validation text
                figures = self.measure(None)
                if self.log is not None:
                    self.log.log(self.step, **{f"final_{name}": value for name, value in figures.items()})
        self._close(interrupt)
        return figures

    def judge(self) -> tuple[dict, bool]:
        """An evaluation on the same batches each time, and whether it is the best so far."""
        figures = self.evaluate(self.config.eval_batches or None)
        improved = figures["valid_loss"] < self.best
        self.best = min(self.best, figures["valid_loss"])
        return figures, improved

    def _loader(self, dataset, **options):
        return create_dataloader(dataset, self.config.batch_size, pad_id=self.tokenizer.pad_id, **options)

    def progress(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further: 0 to 1."""
        by_steps, minutes = self.step / self.config.max_steps, self.config.max_minutes
        return by_steps if minutes is None else max(by_steps, (time.monotonic() - self.started) / 60 / minutes)

    def train_step(self, batch: dict):
        """One batch: supervision steps forward and backward, and the optimizer's step or steps."""
        config, model = self.config, self.raw.config
        self._set_learning_rate()
        torch.manual_seed(mix_seed(config.seed, self.step, self.rank))  # dropout depends on nothing else
        self.model.train()
        parts = self._split(batch)
        at_once = model.full_bptt or model.train_steps == 1
        weights = [1.0] if at_once else step_weights(model.supervision_weights, model.train_steps)
        each = config.optimizer_step == "supervision" and not at_once
        carries = [None] * len(parts)
        for s, weight in enumerate(weights):
            weight = weight / sum(weights)
            updates = weight > 0 and (each or s == len(weights) - 1)
            for i, (part, share) in enumerate(parts):
                syncs = updates and i == len(parts) - 1
                with contextlib.nullcontext() if syncs else self.accelerator.no_sync(self.model):
                    with autocast(self.device, self.precision), torch.set_grad_enabled(weight > 0):
                        out = self.model(**part, supervision_steps=None if at_once else 1, carry=carries[i])
                    if weight > 0:
                        scale = weight * (len(weights) if each else 1) * self.world
                        self.accelerator.backward(out.loss * (share * scale))
                carries[i], losses = out.carry, torch.stack((out.loss, out.ce_loss, out.act_loss)).detach()
                self.window_losses += losses * (share * weight)
                del out  # its logits, before the next step makes its own
            if updates:
                self._update_weights()
        self.step += 1
        self.window_steps += 1

    def _split(self, batch):
        """This process's rows of a global batch in grad_accum parts, each with its share of all target tokens."""
        total = max(1, (batch["target_ids"] != IGNORE).sum().item())
        rows = torch.arange(self.rank, self.config.batch_size, self.world).chunk(self.config.grad_accum)
        parts = [{name: t[index].to(self.device, non_blocking=True) for name, t in batch.items()} for index in rows]
        return [(part, (part["target_ids"] != IGNORE).sum().item() / total) for part in parts]

    def _set_learning_rate(self):
        factor = cosine_schedule(self.step, self.config.warmup_steps, self.progress(), self.config.min_lr_ratio)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        self.lr = self.config.lr * factor

    def _update_weights(self):
        self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.raw)

    def _bar(self):
        total = None if self.config.max_minutes else self.config.max_steps
        every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
        return tqdm(
            total=total, initial=self.step, desc="train", unit="step", disable=not self.is_main, mininterval=every
        )

    def _start_window(self):
        self.window_losses, self.window_steps = torch.zeros(3, device=self.device), 0
        self.window_start = time.monotonic()

    def _log_training(self, bar):
        loss, ce, act = (self.accelerator.reduce(self.window_losses) / max(1, self.window_steps)).tolist()
        seconds = time.monotonic() - self.window_start
        tokens = self.config.batch_size * self.train_set.seq_len
        self.elapsed = time.monotonic() - self.started
        line = {
            "loss": loss,
            "ce_loss": ce,
            "act_loss": act,
            "bits_per_byte": bits_per_byte(ce, self.train_set.bytes_per_token),
            "lr": self.lr,
            "grad_norm": float(self.grad_norm),
            "tokens": self.step * tokens,
            "tokens_per_s": self.window_steps * tokens / seconds,
            "elapsed_s": self.elapsed,
        }
        left = self.elapsed * (1 / max(self.progress(), 1e-9) - 1) / 60
        speed = f"{line['tokens_per_s']:.0f} tokens/s, {left:.1f} min left"
        bar.set_postfix_str(f"loss {loss:.3f}, {line['bits_per_byte']:.3f} bits/byte, {speed}")
        if self.log is not None:
            self.log.log(self.step, **line)
        self._start_window()

    def measure(self, limit: int | None) -> dict:
        """Figures of the (averaged) weights on `limit` validation batches (None: all)."""
        data, batches = self.valid_set, self._loader(self.valid_set, shuffle=False)
        with self.averaged_weights():
            return evaluate(self.raw, batches, data.bytes_per_token, self.precision, limit, self.accelerator)

    def evaluate(self, limit: int | None) -> dict:
        """`measure`, written to the log with a sample and the learning curve."""
        started, figures = time.monotonic(), self.measure(limit)
        with self.averaged_weights():
            sample = self.sample() if self.is_main else ""
        self.window_start += time.monotonic() - started  # its time is none of the training's
        if self.log is not None:
            self.log.log(self.step, **figures)
            loss, bits = figures["valid_loss"], figures["valid_bits_per_byte"]
            text = f"step {self.step}: validation {loss:.4f} nats/token, {bits:.4f} bits/byte\n{sample}\n"
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"=== {text}\n")
            plot_learning_curve(self.folder, f"{self.folder.name}: {describe_model(self.raw)}")
            tqdm.write(text, file=sys.stderr)
        return figures

    def sample(self) -> str:
        """A text by the current weights, the same random numbers each time."""
        ids = self.tokenizer.encode(self.config.sample_prompt, bos=True)[: self.raw.config.max_seq_len]
        decoder, text = StreamDecoder(self.tokenizer), self.config.sample_prompt
        options = {"temperature": 0.8, "top_p": 0.95, "seed": self.config.seed, "eos_id": self.tokenizer.eos_id}
        with torch.compiler.set_stance("force_eager"):
            prompt = torch.tensor([ids], device=self.device)
            for token in generate(self.raw, prompt, self.config.sample_tokens, **options):
                if token.item() != self.tokenizer.eos_id:
                    text += decoder.push(token.item())
        return text + decoder.flush()

    @contextlib.contextmanager
    def averaged_weights(self):
        """Inside, the model has its moving-average weights."""
        if self.ema is not None:
            self.ema.swap(self.raw)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.swap(self.raw)

    def save(self, best: bool = False):
        """Write the checkpoint of this step; `last`, and `best` if it is, lead to it."""
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            return
        name = f"step_{self.step:08d}"
        state = {
            "step": self.step,
            "elapsed": time.monotonic() - self.started,
            "best": self.best,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        average = self.ema.average if self.ema is not None else None
        info = {"step": self.step, "best_valid_loss": self.best if math.isfinite(self.best) else None}
        checkpoint.save_checkpoint(self.folder / name, self.raw, self.tokenizer, average, state, info)
        for link in ("best", "last") if best else ("last",):
            checkpoint.point(self.folder / link, name)
        checkpoint.prune(self.folder, self.config.keep_checkpoints)

    def load(self, folder):
        """Take weights, optimizer, average and counters from a checkpoint, to go on exactly where it was written."""
        state = checkpoint.load_state(folder)
        weights = folder / "model.safetensors"
        checkpoint.load_weights(self.raw, checkpoint.read_weights(weights), weights)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.ema is not None:
            average = checkpoint.read_weights(folder / "ema.safetensors")
            self.ema.average = {name: average[name].to(self.device) for name in self.ema.average}
            self.ema.updates = state["ema_updates"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.elapsed, self.best = state["step"], state["elapsed"], state["best"]
        self.say(f"resumed {folder} after step {self.step}")

    def _close(self, interrupt):
        if self.log is not None:
            self.log.close()
        if interrupt.requested:
            self.say(f"stopped by {interrupt.signal_name} after step {self.step}: go on with --resume true")
        self.accelerator.end_training()


def create_trainer(config: TrainConfig, data: DataConfig, model_config: TRMConfig, runtime: RuntimeConfig) -> Trainer:
    """Data, tokenizer, model and trainer from settings; writes the run folder's config.yaml before step 0."""
    keep_freed_memory()
    folder, newest = Path(config.save_dir), None
    checkpoint.check_writable(folder)
    settings = {name: value for part in (config, data, runtime) for name, value in asdict(part).items()}
    settings |= {} if config.init_from else checkpoint.model_settings(model_config)
    if (folder / "config.yaml").exists():
        newest = checkpoint.check_resume(folder, settings, config.resume)
    source = newest or (checkpoint.resolve(config.init_from) if config.init_from else None)
    if source:
        model_config = checkpoint.load_config(source)
        settings |= checkpoint.model_settings(model_config)
        data = dataclasses.replace(data, tokenizer=str(source), sp_model=None)
    choose_device(runtime.device)  # a wrong device is told before minutes of data preparation
    tokenizer, train_set, valid_set = prepare_data(data, model_config.vocab_size, model_config.max_seq_len)
    if not source:
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id)
    torch.manual_seed(config.seed)
    model = checkpoint.load_model(source, trains=True)[0] if source and not newest else TRMModel(model_config)
    trainer = Trainer(config, model, tokenizer, train_set, valid_set, runtime, data.num_workers)
    if newest:
        trainer.load(newest)
    elif trainer.is_main:
        checkpoint.start_run_folder(folder, settings)
    trainer.say(f"{describe_model(model)}; {len(train_set)} training windows of {model_config.max_seq_len} tokens")
    return trainer
