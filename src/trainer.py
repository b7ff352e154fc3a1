"""The training loop: deep supervision, evaluation, checkpoints, on one device or many (accelerate)."""

import contextlib
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from src.data.loader import create_train_loader
from src.dataset import create_dataloader
from src.errors import UserError
from src.evaluation.evaluation import evaluate, sample_text
from src.losses import IGNORE, bits_per_byte, bits_text
from src.metrics import describe_model, flops_per_token
from src.model import TRMConfig, TRMModel
from src.model_config import loss_weights
from src.optim import EMA, learning_rate_factor, make_optimizers
from src.runtime import Interrupt, autocast, choose_compile, choose_device, choose_precision, compile_parts, mix_seed
from src.training import curriculum, parallel, run_folder, run_state
from src.training.monitor import ResourceMonitor, TRMTrainingLogger
from src.training.progress import Clock, Window, progress_bar
from src.training.train_config import TrainConfig


class Trainer:
    """One run: `create_trainer(...)` of src/training/create.py builds it from settings, `train()` runs it."""

    def __init__(
        self, config: TrainConfig, model: TRMModel, tokenizer, train_set, valid_set, runtime, num_workers=0, first=None
    ):
        """first: the config of the model that the run began with, where the curriculum has changed it since."""
        self.config, self.tokenizer, self.train_set, self.valid_set = config, tokenizer, train_set, valid_set
        self.num_workers, self.folder, self.log, self.lock = num_workers, Path(config.save_dir), None, None
        precision = self._start_processes(runtime)
        self._plan(first or model.config)
        flops = self.curriculum.tokens(self.curriculum.total_steps) * flops_per_token(model.config).train
        self.compiles, why = choose_compile(config.compile, self.device, flops, config.max_minutes)
        devices = f"{self.world} x {self.device.type}" if self.world > 1 else self.device.type
        self.say(f"{devices}, {precision}; {'compiled' if self.compiles else 'eager'} ({why})")
        self._take_model(model)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.step, self.elapsed, self.best, self.grad_norm = 0, 0.0, math.inf, 0.0
        self.time_fraction, self.skipped, self.skipped_in_a_row = 0.0, 0, 0
        self.stage, self.loader, self.clock = None, None, Clock(self.compiles)
        self.start_window()

    def _plan(self, first: TRMConfig):
        """The stages of the run."""
        c = self.config
        self.first = first
        self.curriculum = curriculum.CurriculumScheduler(
            c.curriculum.stages, first, c.batch_size, c.max_steps, self._windows
        )
        for stage in self.curriculum.stages:
            if stage.batch_size % (c.grad_accum * self.world):
                raise UserError(
                    f"batch_size {stage.batch_size} does not divide into grad_accum {c.grad_accum} x {self.world} "
                    "processes: make it a multiple of both"
                )

    def _take_model(self, model: TRMModel):
        """The model on its device, compiled, sharded or wrapped, with its optimizers."""
        config, self.raw = self.config, model.to(self.device)
        if self.compiles:
            compile_parts(model)
        if config.shard:
            parallel.shard(model, self.device, self.world)
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in self._make_optimizers(model)]
        self.model = model if config.shard else self.accelerator.prepare(model)

    def _make_optimizers(self, model):
        c = self.config
        return make_optimizers(model, c.optimizer, c.lr, c.weight_decay, (0.9, c.beta2))

    def _windows(self, seq_len: int) -> int:
        if not hasattr(self.train_set, "__len__"):
            raise UserError("a stage in `epochs` needs a tokenized corpus: use `steps`, or set `--streaming false`")
        return len(self.train_set.with_seq_len(seq_len))

    def enter_stage(self):
        """What the curriculum changes at this step: width, depth, and the batches."""
        stage = self.curriculum.at(self.step)
        if stage is self.stage:
            return
        self.stage, wide = stage, stage.model
        if len(self.curriculum.stages) > 1:
            self.say(str(stage))
            torch.compiler.reset()  # of each function torch keeps graphs of a few shapes only
        if (wide.d_model, wide.d_ff) > (self.raw.config.d_model, self.raw.config.d_ff):
            self._grow(wide)
        curriculum.set_depth(self.raw, wide)
        if self.train_set is None:
            return
        position = None if self.loader is None else self.loader.state_dict()
        text = self.train_set.with_seq_len(stage.seq_len)
        place = {"rank": self.rank, "world": self.world, "num_workers": self.num_workers}
        seed, pad_id = self.config.seed, self.tokenizer.pad_id
        self.loader = create_train_loader(text, stage.batch_size, seed, pad_id=pad_id, **place)
        if position is not None:
            self.loader.load_state_dict(position)

    def _grow(self, wide: TRMConfig):
        if self.world > 1:
            raise UserError("dim of a stage grows in one process only: leave it out, or start one process")
        old, optimizers = self.raw, [optimizer.optimizer for optimizer in self.optimizers]
        new = curriculum.grow_width(old, wide.d_model, wide.d_ff, mix_seed(self.config.seed, self.stage.index)).to(
            self.device
        )
        states = [o.state_dict() for o in curriculum.grow_optimizers(old, new, optimizers, self._make_optimizers)]
        if self.ema is not None:
            self.ema.average = curriculum.grow_average(self.ema.average, old, new)
        self.accelerator.free_memory()  # else accelerate keeps the old model
        self._take_model(new)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def _start_processes(self, runtime):
        """This process's device and its place among the processes of the run; returns the precision and why."""
        config, device = self.config, choose_device(runtime.device)
        if device.index:
            visible = f"CUDA_VISIBLE_DEVICES={device.index}"
            raise UserError(f"--device {device}: choose the GPU with {visible} and --device cuda")
        self.precision, why = choose_precision(runtime.precision, device)
        if self.precision == "fp16" and config.optimizer == "muon":
            raise UserError("--optimizer muon has no loss scaling for fp16: choose --precision fp32, or adamw")
        # accelerate brings the loss scaler that fp16 needs; bf16 autocast is entered around the forward pass alone
        mixed = "fp16" if self.precision == "fp16" else "no"
        # the halting head has no part in the first step's update where its target is read off at the next
        unused = config.optimizer_step == "supervision"
        ddp = DistributedDataParallelKwargs(find_unused_parameters=unused)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, kwargs_handlers=[ddp])
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.agreement = parallel.Agreement(self.world)
        if config.shard and self.world == 1:
            raise UserError("--shard spreads over processes and there is one: start several, see docs/training.md")
        return f"{self.precision} ({why})"

    def say(self, line: str):
        if self.is_main:
            tqdm.write(line, file=sys.stderr)  # above the bar, where there is one

    def train(self) -> dict:
        """Run to the end (steps, minutes or a signal); returns the figures of the last evaluation."""
        self.started, monitoring = time.monotonic() - self.elapsed, self.config.monitoring
        self.monitor = ResourceMonitor(monitoring, self.device)
        try:
            if self.is_main:
                self.log = TRMTrainingLogger(self.folder, self.step, monitoring, self.monitor)
            total = None if self.config.max_minutes else self.curriculum.total_steps
            options = {"total": total, "initial": self.step, "desc": "train", "unit": "step"}
            bar = progress_bar(**options, disable=not self.is_main)
            with Interrupt() as interrupt, bar, logging_redirect_tqdm():
                figures = self._run(interrupt, bar)
        except RuntimeError as error:
            if self.world == 1 or not parallel.is_peer_failure(error):
                raise
            raise UserError(
                f"after step {self.step} another process of this run was lost: see its own message; go on from the "
                f"last checkpoint with --resume true --save_dir {self.folder}"
            ) from None
        finally:
            self.monitor.close()
            if self.log is not None:
                self.log.close()
            if self.lock:
                self.lock.release()
        if interrupt.requested:
            self.say(f"stopped by {interrupt.signal_name} after step {self.step}: go on with --resume true")
        return figures

    def _run(self, interrupt, bar) -> dict:
        config, figures = self.config, {}
        over, stopped = self._is_over(interrupt)
        while not over:
            self.enter_stage()
            with self.monitor.batch(), self.clock.compiling(self.stage, self.step, bar, self.say):
                self.train_step(next(self.loader))
            bar.update()
            over, stopped = self._is_over(interrupt)
            if self.step % config.log_every == 0 or over:
                self._log_training(bar)
            improved = False
            if (self.step % config.eval_every == 0 or over) and not stopped:
                figures, improved = self.judge()
                over, stopped = self._is_over(interrupt) if not over else (over, stopped)  # it came in between
            if self.step % config.save_every == 0 or over or improved:
                self.save(improved)
        is_part = 0 < config.eval_batches * config.batch_size < len(self.valid_set)
        if is_part and figures and not stopped:  # told at the end: all validation text
            self.say(f"the last evaluation, on all validation text: {self.valid_set}")
            figures = self.measure(None)
            if self.log is not None:
                self.log.log(self.step, **{f"final_{name}": value for name, value in figures.items()})
        return figures

    def _is_over(self, interrupt) -> tuple[bool, bool]:
        """Whether the run ends here, and whether a signal ended it: the same answer in every process."""
        minutes = self.config.max_minutes
        passed = 0.0 if minutes is None or not self.is_main else (time.monotonic() - self.started) / 60 / minutes
        self.time_fraction, stopped = self.agreement.sum(passed, interrupt.requested)
        return bool(stopped) or self.progress() >= 1, bool(stopped)

    def progress(self) -> float:
        """How much of the run is done, by steps or by time, whichever is further: 0 to 1."""
        return max(self.step / self.curriculum.total_steps, self.time_fraction)

    def judge(self) -> tuple[dict, bool]:
        """An evaluation on the same batches each time, and whether it is the best so far."""
        figures = self.evaluate(self.config.eval_batches or None)
        improved = figures["valid_loss"] < self.best
        self.best = min(self.best, figures["valid_loss"])
        return figures, improved

    def train_step(self, batch: dict):
        """One batch, this process's rows of it: supervision steps forward and backward, and the optimizers' steps."""
        self.enter_stage()
        self._set_learning_rate()
        torch.manual_seed(mix_seed(self.config.seed, self.step, self.rank))  # dropout depends on nothing else
        self.model.train()
        with self._depth_of_step():
            self._supervise(self._split(batch))
            self.window.count(self.raw.config.visits_per_step * self.raw.config.train_steps)
        self.step += 1

    def _supervise(self, parts):
        """Each supervision step back-propagates at once and hands a detached carry on: memory does not grow with them.

        full_bptt needs all of them in one graph. The loop has one step, in which forward weighs the visits' losses."""
        config, model = self.config, self.raw.config
        at_once = model.full_bptt or model.train_steps == 1
        weights = [1.0] if at_once else loss_weights(model, model.train_steps)
        each = config.optimizer_step == "supervision" and not at_once
        carries = [None] * len(parts)
        step_losses = torch.zeros_like(self.window.losses)
        skipped_before = self.skipped
        for s, weight in enumerate(weights):
            weight = weight / sum(weights)
            updates = weight > 0 and (each or s == len(weights) - 1)
            for i, (part, share) in enumerate(parts):
                # gradients are exchanged once per update, with its last part; a step of weight 0 only moves the carry
                with parallel.gradient_sync(self.accelerator, self.model, updates and i == len(parts) - 1):
                    with autocast(self.device, self.precision), torch.set_grad_enabled(weight > 0):
                        out = self.model(**part, supervision_steps=None if at_once else 1, carry=carries[i])
                    if weight > 0:
                        # DDP and FSDP average gradients over the processes: times world, the shares add up
                        scale = weight * (len(weights) if each else 1) * self.world
                        self.accelerator.backward(out.loss * (share * scale))
                carries[i] = out.carry
                step_losses += torch.stack((out.loss, out.ce_loss, out.act_loss)).detach() * (share * weight)
                del out  # its logits, before the next step makes its own
            if updates:
                self._update_weights()
        if self.skipped == skipped_before:  # else the losses may be NaN, and would spoil the mean
            self.window.losses += step_losses
            self.window.good += 1

    def _split(self, batch):
        """The rows in grad_accum parts, each with its share of the target tokens of all processes."""
        total = self.agreement.sum((batch["target_ids"] != IGNORE).sum().item())[0]
        rows = torch.arange(len(batch["target_ids"])).chunk(self.config.grad_accum)
        parts = [{name: t[index].to(self.device, non_blocking=True) for name, t in batch.items()} for index in rows]
        return [(part, (part["target_ids"] != IGNORE).sum().item() / max(1, total)) for part in parts]

    @contextlib.contextmanager
    def _depth_of_step(self):
        """Inside, the model recurses as deeply as this step is to."""
        whole = self.raw.config
        self.raw.config = curriculum.depth_of_step(self.config, whole, self.step, self.progress())
        try:
            yield
        finally:
            self.raw.config = whole

    def _set_learning_rate(self):
        c = self.config
        factor = learning_rate_factor(c.schedule, self.step, c.warmup_steps, self.progress(), c.min_lr_ratio)
        factor *= self.stage.lr_factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        self.lr = c.lr * factor

    def _update_weights(self):
        """The optimizers' step; skipped where the gradient is not finite, and too many of these end the run."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        self.grad_norm = parallel.gathered(norm).item()
        is_good = math.isfinite(self.grad_norm)
        if is_good or self.accelerator.scaler is not None:  # the scaler skips by itself, and lowers its scale
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if is_good and self.ema is not None:
            self.ema.update(self.raw)
        self.skipped += not is_good
        self.skipped_in_a_row = 0 if is_good else self.skipped_in_a_row + 1
        if not is_good:
            self.say(f"step {self.step + 1}: the gradient is not finite, skipped ({self.skipped} so far)")
        if self.skipped_in_a_row >= self.config.max_skipped:
            wrong = f"step {self.step + 1}: the gradient was not finite {self.skipped_in_a_row} times in a row"
            raise run_folder.diverged(self.folder, wrong)

    def start_window(self):
        """The next line of the log is about the steps from here on."""
        self.window = Window(self.device)
        self.clock.start(self.step)

    def _log_training(self, bar):
        means = self.window.means(self.accelerator)
        self.elapsed = time.monotonic() - self.started
        line = {
            "epoch": self.loader.epoch,
            "tokens": self.curriculum.tokens(self.step),
            **means,
            "bits_per_byte": bits_per_byte(means["ce_loss"], self.train_set.bytes_per_token),
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "lr": self.lr,
            "tokens_per_s": self.clock.tokens_per_s(self.curriculum, self.step),
            "elapsed_s": self.elapsed,
        }
        steps_left = self.curriculum.total_steps / max(1, self.step) - 1
        left = self.clock.minutes_left(self.elapsed, steps_left, self.config.max_minutes)
        speed = f"{line['tokens_per_s']:.0f} tokens/s, {left:.1f} min left"
        bar.set_postfix_str(f"loss {line['loss']:.3f}{bits_text(line['bits_per_byte'])}, {speed}", refresh=False)
        if self.log is not None:
            self.log.log(self.step, **line)
        self.start_window()

    def measure(self, limit: int | None) -> dict:
        """Figures of the (averaged) weights on `limit` validation batches (None: all)."""
        data, pad_id = self.valid_set, self.tokenizer.pad_id
        batches = create_dataloader(data, self.config.batch_size, shuffle=False, pad_id=pad_id)
        total = min(-(-len(data) // self.config.batch_size), limit or len(data))
        options = {"total": total, "desc": "evaluate", "unit": "batch", "delay": 2, "leave": False}  # delay: seconds
        batches = progress_bar(itertools.islice(batches, limit), **options, disable=not self.is_main)
        with self.averaged_weights():
            return evaluate(self.raw, batches, data.bytes_per_token, self.precision, None, self.accelerator)

    def evaluate(self, limit: int | None) -> dict:
        """`measure`, written to the log with a sample and the learning curve."""
        with self.clock.paused():
            figures = self.measure(limit)
            sample = self.sample() if self.is_main or self.config.shard else ""
            if self.log is not None:
                self.log.log(self.step, **figures)
                loss, bits = figures["valid_loss"], bits_text(figures["valid_bits_per_byte"])
                text = f"step {self.step}: validation {loss:.4f} nats/token{bits}\n{sample}\n"
                tqdm.write(text, file=sys.stderr)
                self.log.sample(text)
                self.log.draw(f"{self.folder.name}: {describe_model(self.raw)}", force=self.progress() >= 1)
        return figures

    def sample(self) -> str:
        """A text by the averaged weights, the same random numbers each time."""
        c = self.config
        with self.averaged_weights():
            return sample_text(self.raw, self.tokenizer, c.sample_prompt, c.sample_tokens, c.seed)

    @contextlib.contextmanager
    def averaged_weights(self):
        """Inside, the model has its moving-average weights."""
        self._swap_weights()
        try:
            yield
        finally:
            self._swap_weights()

    def _swap_weights(self):
        parallel.reshard(self.raw)
        if self.ema is not None:
            self.ema.swap(self.raw)

    def save(self, best: bool = False):
        """Write the checkpoint of this step; `last`, and `best` if it is, lead to it.  All processes take part."""
        weights, average, state = run_state.collect(self)
        info = {"step": self.step, "best_valid_loss": self.best if math.isfinite(self.best) else None}
        parts, problem = (self.raw, self.tokenizer, average, state, info, weights), None
        if self.is_main:
            try:
                if not all(extreme.isfinite() for tensor in weights.values() for extreme in tensor.aminmax()):
                    raise run_folder.diverged(self.folder, f"step {self.step}: weights are not finite, and not saved")
                run_folder.save(self.folder, f"step_{self.step:08d}", best, self.config.keep_checkpoints, *parts)
            except UserError as error:
                problem = error
        if self.agreement.sum(problem is not None)[0]:
            raise problem or UserError("process 0 could not write the checkpoint, see its message")

    def load(self, folder: Path, state: dict):
        """Go on exactly where a checkpoint was written."""
        run_state.restore(self, folder, state)
        self.say(f"resumed {folder} after step {self.step}")
