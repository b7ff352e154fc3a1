"""The training loop: deep supervision, evaluation, checkpoints, on one device or many (accelerate)."""

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from src import checkpoint, parallel, run_folder
from src.config import UserError
from src.dataset import create_dataloader
from src.evaluation import evaluate
from src.loader import create_train_loader
from src.losses import IGNORE, bits_per_byte, step_weights
from src.metrics import RunLog as TRMTrainingLogger
from src.metrics import describe_model, plot_learning_curve
from src.model import TRMModel
from src.optim import EMA, learning_rate_factor, make_optimizers
from src.runtime import Interrupt, autocast, choose_compile, choose_device, choose_precision, mix_seed
from src.sampling import generate
from src.tokenizer import StreamDecoder
from src.train_config import TrainConfig


class Trainer:
    """One run: `create_trainer(...)` of src/create.py builds it from settings, `train()` runs it."""

    def __init__(self, config: TrainConfig, model: TRMModel, tokenizer, train_set, valid_set, runtime, num_workers=0):
        self.config, self.tokenizer, self.train_set, self.valid_set = config, tokenizer, train_set, valid_set
        self._start_processes(runtime)
        self.raw = model.to(self.device)
        compiles, why = choose_compile(config.compile, self.device)
        if compiles:
            model.compile_parts()
        self.say(f"{self.device.type}, {self.precision}; {'compiled' if compiles else 'eager'} ({why})")
        if config.shard:
            parallel.shard(model, self.device, self.world)
        optimizers = make_optimizers(model, config.optimizer, config.lr, config.weight_decay, (0.9, config.beta2))
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]
        self.model = model if config.shard else self.accelerator.prepare(model)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.num_workers, self.folder, self.log, self.lock = num_workers, Path(config.save_dir), None, None
        self.loader = None if train_set is None else self._train_loader()
        self.step, self.elapsed, self.best, self.grad_norm = 0, 0.0, math.inf, 0.0
        self.time_fraction, self.skipped, self.skipped_in_a_row = 0.0, 0, 0
        self._start_window()

    def _start_processes(self, runtime):
        """This process's device and precision, and its place among the processes that accelerate started."""
        config, device = self.config, choose_device(runtime.device)
        if device.index:
            raise UserError(
                f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
            )
        self.precision, _ = choose_precision(runtime.precision, device)
        if self.precision == "fp16" and config.optimizer == "muon":
            raise UserError(
                "--optimizer muon has no loss scaling for fp16: choose --precision fp32 or --optimizer adamw"
            )
        # accelerate brings the loss scaler that fp16 needs; bf16 autocast is entered around the forward pass alone
        mixed = "fp16" if self.precision == "fp16" else "no"
        # the halting head has no part in the first step's update where its target is read off at the next
        unused = config.optimizer_step == "supervision"
        ddp = DistributedDataParallelKwargs(find_unused_parameters=unused)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, kwargs_handlers=[ddp])
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.agreement = parallel.Agreement(self.world)
        if config.batch_size % (config.grad_accum * self.world):
            raise UserError(
                f"batch_size {config.batch_size} does not divide into grad_accum {config.grad_accum} x {self.world} "
                "processes: make it a multiple of both"
            )
        if config.shard and self.world == 1:
            raise UserError("--shard spreads over processes and there is one: use accelerate launch --num_processes 2")

    def say(self, line: str):
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def train(self) -> dict:
        """Run to the end (steps, minutes or a signal); returns the figures of the last evaluation."""
        self.started = time.monotonic() - self.elapsed
        if self.is_main:
            self.log = TRMTrainingLogger(self.folder, resume_step=self.step)
        try:
            with Interrupt() as interrupt, self._bar() as bar:
                figures = self._run(interrupt, bar)
        except RuntimeError as error:
            if self.world == 1 or not parallel.is_peer_failure(error):
                raise
            raise UserError(
                f"after step {self.step} another process of this run was lost: see its own message; go on from the "
                f"last checkpoint with --resume true --save_dir {self.folder}"
            ) from None
        finally:
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
        return max(self.step / self.config.max_steps, self.time_fraction)

    def _train_loader(self):
        options = {"rank": self.rank, "world": self.world, "num_workers": self.num_workers}
        seed, pad_id = self.config.seed, self.tokenizer.pad_id
        return create_train_loader(self.train_set, self.config.batch_size, seed, **options, pad_id=pad_id)

    def judge(self) -> tuple[dict, bool]:
        """An evaluation on the same batches each time, and whether it is the best so far."""
        figures = self.evaluate(self.config.eval_batches or None)
        improved = figures["valid_loss"] < self.best
        self.best = min(self.best, figures["valid_loss"])
        return figures, improved

    def train_step(self, batch: dict):
        """One batch, this process's rows of it: supervision steps forward and backward, and the optimizers' steps."""
        self._set_learning_rate()
        torch.manual_seed(mix_seed(self.config.seed, self.step, self.rank))  # dropout depends on nothing else
        self.model.train()
        with self._depth_of_step():
            self._supervise(self._split(batch))
            self.window_visits += self.raw.config.visits_per_step * self.raw.config.train_steps
        self.step += 1
        self.window_steps += 1

    def _supervise(self, parts):
        config, model = self.config, self.raw.config
        at_once = model.full_bptt or model.train_steps == 1
        weights = [1.0] if at_once else step_weights(model.supervision_weights, model.train_steps)
        each = config.optimizer_step == "supervision" and not at_once
        carries, step_losses = [None] * len(parts), torch.zeros_like(self.window_losses)
        for s, weight in enumerate(weights):
            weight = weight / sum(weights)
            updates = weight > 0 and (each or s == len(weights) - 1)
            for i, (part, share) in enumerate(parts):
                with parallel.gradient_sync(self.accelerator, self.model, updates and i == len(parts) - 1):
                    with autocast(self.device, self.precision), torch.set_grad_enabled(weight > 0):
                        out = self.model(**part, supervision_steps=None if at_once else 1, carry=carries[i])
                    if weight > 0:
                        # DDP and FSDP average gradients over the processes: times world, the shares add up
                        scale = weight * (len(weights) if each else 1) * self.world
                        self.accelerator.backward(out.loss * (share * scale))
                carries[i], losses = out.carry, torch.stack((out.loss, out.ce_loss, out.act_loss)).detach()
                step_losses += losses * (share * weight)
                del out  # its logits, before the next step makes its own
            if updates:
                self._update_weights()
        self.window_losses += step_losses

    def _split(self, batch):
        """The rows in grad_accum parts, each with its share of the target tokens of all processes."""
        total = self.agreement.sum((batch["target_ids"] != IGNORE).sum().item())[0]
        rows = torch.arange(len(batch["target_ids"])).chunk(self.config.grad_accum)
        parts = [{name: t[index].to(self.device, non_blocking=True) for name, t in batch.items()} for index in rows]
        return [(part, (part["target_ids"] != IGNORE).sum().item() / max(1, total)) for part in parts]

    @contextlib.contextmanager
    def _depth_of_step(self):
        """Inside, the model recurses as deeply as this step is to: see sample_depth and recursion_from."""
        whole, deep = self.raw.config, None
        if self.progress() < self.config.recursion_from:
            deep, supervision = 1, 1
        elif self.config.sample_depth:
            deep, supervision = 1 + mix_seed(self.config.seed, self.step, 1) % whole.deep_steps, whole.supervision_steps
        if deep is not None:
            cut = min(whole.grad_deep_steps, deep)
            depth = {"deep_steps": deep, "supervision_steps": supervision, "grad_deep_steps": cut}
            self.raw.config = dataclasses.replace(whole, **depth)
        try:
            yield
        finally:
            self.raw.config = whole

    def _set_learning_rate(self):
        c = self.config
        factor = learning_rate_factor(c.schedule, self.step, c.warmup_steps, self.progress(), c.min_lr_ratio)
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
            last = self.folder / "last"
            raise UserError(
                f"step {self.step + 1}: the gradient was not finite {self.skipped_in_a_row} times in a row; the last "
                f"good checkpoint is {last.resolve() if last.exists() else 'none yet'}; try a smaller --lr, more "
                "--warmup_steps, or --precision fp32"
            )

    def _bar(self):
        total = None if self.config.max_minutes else self.config.max_steps
        every = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
        return tqdm(
            total=total, initial=self.step, desc="train", unit="step", disable=not self.is_main, mininterval=every
        )

    def _start_window(self):
        self.window_losses, self.window_steps = torch.zeros(3, device=self.device), 0
        self.window_visits, self.window_start = 0, time.monotonic()

    def _log_training(self, bar):
        steps = max(1, self.window_steps)
        loss, ce, act = (self.accelerator.reduce(self.window_losses) / steps).tolist()
        seconds = time.monotonic() - self.window_start
        tokens = self.config.batch_size * self.train_set.seq_len
        self.elapsed = time.monotonic() - self.started
        line = {
            "epoch": self.loader.epoch,
            "tokens": self.step * tokens,
            "loss": loss,
            "ce_loss": ce,
            "act_loss": act,
            "bits_per_byte": bits_per_byte(ce, self.train_set.bytes_per_token),
            "recursion_depth": self.window_visits / steps,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "lr": self.lr,
            "tokens_per_s": self.window_steps * tokens / seconds,
            "elapsed_s": self.elapsed,
        }
        left = self.elapsed * (1 / max(self.progress(), 1e-9) - 1) / 60
        speed = f"{line['tokens_per_s']:.0f} tokens/s, {left:.1f} min left"
        bar.set_postfix_str(f"loss {loss:.3f}, {line['bits_per_byte']:.3f} bits/byte, {speed}", refresh=False)
        if self.log is not None:
            self.log.log(self.step, **line)
        self._start_window()

    def measure(self, limit: int | None) -> dict:
        """Figures of the (averaged) weights on `limit` validation batches (None: all)."""
        data, pad_id = self.valid_set, self.tokenizer.pad_id
        batches = create_dataloader(data, self.config.batch_size, shuffle=False, pad_id=pad_id)
        with self.averaged_weights():
            return evaluate(self.raw, batches, data.bytes_per_token, self.precision, limit, self.accelerator)

    def evaluate(self, limit: int | None) -> dict:
        """`measure`, written to the log with a sample and the learning curve."""
        started, figures = time.monotonic(), self.measure(limit)
        with self.averaged_weights():
            sample = self.sample() if self.is_main or self.config.shard else ""
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
        name, problem = f"step_{self.step:08d}", None
        weights = parallel.gathered(checkpoint.own_state(self.raw))
        average = weights | parallel.gathered(self.ema.average) if self.ema is not None else None
        state = {
            "step": self.step,
            "elapsed": time.monotonic() - self.started,
            "best": self.best,
            "skipped": self.skipped,
            "optimizers": parallel.gathered([optimizer.state_dict() for optimizer in self.optimizers]),
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "loaders": self.agreement.gather(self.loader.state_dict()),
            "window": {
                "losses": self.accelerator.reduce(self.window_losses),
                "steps": self.window_steps,
                "visits": self.window_visits,
                "seconds": time.monotonic() - self.window_start,
            },
        }
        info = {"step": self.step, "best_valid_loss": self.best if math.isfinite(self.best) else None}
        if self.is_main:
            try:
                checkpoint.save_checkpoint(self.folder / name, self.raw, self.tokenizer, average, state, info, weights)
                run_folder.publish(self.folder, name, best, self.config.keep_checkpoints)
            except UserError as error:
                problem = error
        if self.agreement.sum(problem is not None)[0]:
            raise problem or UserError("process 0 could not write the checkpoint, see its message")

    def load(self, folder, state: dict):
        """Take weights, optimizer, average and counters from a checkpoint, to go on exactly where it was written."""
        weights = folder / "model.safetensors"
        checkpoint.load_weights(self.raw, checkpoint.read_weights(weights), weights)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parallel.load_optimizer(optimizer, saved)
        if self.ema is not None:
            average = checkpoint.read_weights(folder / "ema.safetensors")
            for name, tensor in self.ema.average.items():
                tensor.copy_(parallel.placed_like(average[name], tensor))
            self.ema.updates = state["ema_updates"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.elapsed, self.best, self.skipped = (state[k] for k in ("step", "elapsed", "best", "skipped"))
        self.loader.load_state_dict(state["loaders"][min(self.rank, len(state["loaders"]) - 1)])
        if self.is_main:
            self.window_losses.copy_(state["window"]["losses"])  # their sum over the processes
        self.window_steps, self.window_visits = state["window"]["steps"], state["window"]["visits"]
        self.window_start = time.monotonic() - state["window"]["seconds"]
        self.say(f"resumed {folder} after step {self.step}")
