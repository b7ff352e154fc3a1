"""The training loop: deep supervision, evaluation and checkpoints, in one process or several (accelerate)."""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from src import checkpoint
from src.data.loader import create_train_loader
from src.errors import UserError
from src.evaluation.evaluation import evaluate_rows, sample_text
from src.losses import bits_per_byte, bits_text, count_terms
from src.metrics import describe_model
from src.model import TRMConfig, TRMModel
from src.model_config import loss_weights
from src.optim import EMA, learning_rate_factor, make_optimizers, set_learning_rates
from src.runtime import Interrupt, autocast, choose_compile, compile_parts, mix_seed, seed_device
from src.training import curriculum, depths, parallel, run_folder, run_state
from src.training.monitor import ResourceMonitor, TRMTrainingLogger
from src.training.progress import Clock, Window, progress_bar
from src.training.train_config import TrainConfig


class Trainer:
    """One training run.  `create_trainer` in src/training/create.py makes it from settings; `train` runs it."""

    best_name = "best_valid_loss"  # name of the best `score` in a checkpoint's config.json
    one_at_a_time = False  # whether a step of training is one supervision step

    def __init__(
        self, config: TrainConfig, model: TRMModel, tokenizer, train_set, valid_set, runtime, num_workers=0, first=None
    ):
        """first: the model config at step 0, if the curriculum has changed it since (None: the model's own)."""
        self.config, self.tokenizer, self.train_set, self.valid_set = config, tokenizer, train_set, valid_set
        self.num_workers, self.folder, self.log, self.lock = num_workers, Path(config.save_dir), None, None
        self.accelerator, (self.precision, why_precision) = parallel.start_accelerator(config, runtime, model.config)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.agreement = parallel.Agreement(self.world)
        self._plan(first or model.config)
        flops = self.curriculum.flops(self.one_at_a_time)  # of all stages, so that a resume chooses as the start
        self.compiles, why_compile = choose_compile(config.compile, self.device, flops, config.max_minutes)
        devices = f"{self.world} x {self.device.type}" if self.world > 1 else self.device.type
        mode = "compiled" if self.compiles else "eager"
        self.say(f"{devices}, {self.precision} ({why_precision}); {mode} ({why_compile})")
        self._take_model(model)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.step, self.elapsed, self.grad_norm, self.best, self.best_loss = 0, 0.0, 0.0, math.inf, math.inf
        self.eval_due = False  # whether this step should have been evaluated, but a signal came
        self.recursion_begun = False  # whether recursion_from has passed; a longer max_minutes does not undo it
        self.time_fraction, self.skipped, self.skipped_in_a_row, self.skipped_at = 0.0, 0, 0, -1
        self.stage, self.loader, self.clock = None, None, Clock(self.compiles)
        self.start_window()

    def _plan(self, first: TRMConfig):
        """Build the schedule of stages, and check that each stage can run. Raises UserError if one cannot."""
        c, stages = self.config, self.config.curriculum.stages
        self.curriculum = curriculum.CurriculumScheduler(stages, first, c.batch_size, c.max_steps, self._windows)
        self.curriculum.check(c, self.world)
        if stages and hasattr(self.train_set, "with_seq_len"):  # retrieved code needs room in a window
            self.train_set.with_seq_len(min(stage.seq_len for stage in self.curriculum.stages))

    def _take_model(self, model: TRMModel, states: tuple | list = ()):
        """Move the model to the device, compile it, shard or wrap it, and create its optimizers, with `states`."""
        config = self.config
        self.raw = model.to(self.device)  # without the DDP wrapper: for its config, evaluation and checkpoints
        if self.compiles:
            compile_parts(model, lengths_vary=self.train_set is not None and self.train_set.pads)
        if config.shard:
            parallel.shard(model, self.device, self.world)
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in self._make_optimizers(model)]
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        self.model = model if config.shard else self.accelerator.prepare(model)

    def _make_optimizers(self, model):
        return make_optimizers(model, (c := self.config).optimizer, c.lr, c.weight_decay, (0.9, c.beta2))

    def _windows(self, seq_len: int) -> int:
        """Returns the number of training windows of this length; the curriculum converts epochs to steps with it."""
        if not hasattr(self.train_set, "__len__"):
            raise UserError("a stage in `epochs` needs a tokenized corpus: use `steps`, or set `--streaming false`")
        return len(self.train_set.with_seq_len(seq_len))

    def enter_stage(self, step: int | None = None):
        """Apply the changes of a new stage: width, depth, batches.  step: any step of it; default: the next one."""
        stage = self.curriculum.at(self.step if step is None else step)
        if stage is self.stage:
            return
        self.stage = stage
        if len(self.curriculum.stages) > 1:
            self.say(str(stage))
            torch.compiler.reset()  # torch keeps a limited number of compiled shapes; stages would exceed it
        if (stage.model.d_model, stage.model.d_ff) > (self.raw.config.d_model, self.raw.config.d_ff):
            options = self.ema, self._make_optimizers, mix_seed(self.config.seed, stage.index)
            grown = curriculum.grow_run(self.raw, stage.model, self.optimizers, *options)
            self.accelerator.free_memory()  # otherwise accelerate keeps the old model alive
            self._take_model(*grown)
        curriculum.set_depth(self.raw, stage.model)
        if self.train_set is None:
            return
        before, self.loader = self.loader, self.new_loader(stage)
        if before is not None:  # continue in the data where the previous stage stopped
            self.loader.load_state_dict(before.state_dict())

    def new_loader(self, stage):
        """Returns an iterator over this process's share of the stage's batches.  It can save its position."""
        text, pad_id = self.train_set.with_seq_len(stage.seq_len), self.tokenizer.pad_id
        options = {"rank": self.rank, "world": self.world, "num_workers": self.num_workers, "pad_id": pad_id}
        return create_train_loader(text, stage.batch_size, self.config.seed, **options)

    def say(self, line: str):
        """Print a line on stderr, in the main process only."""
        if self.is_main:
            tqdm.write(line, file=sys.stderr)  # unlike print, this does not break the progress bar

    def train(self) -> dict:
        """Train until the steps or minutes are used up; returns the last evaluation's figures. {} after a signal."""
        self.started = time.monotonic() - self.elapsed  # a resumed run continues its clock
        self.monitor = ResourceMonitor(self.config.monitoring, self.device)
        try:
            if self.is_main:
                self.log = TRMTrainingLogger(self.folder, self.step, self.config.monitoring, self.monitor)
            total = None if self.config.max_minutes else self.curriculum.total_steps
            bar = progress_bar(total=total, initial=self.step, desc="train", unit="step", disable=not self.is_main)
            with Interrupt() as interrupt, bar, logging_redirect_tqdm():
                figures = self._run(interrupt, bar)
        except RuntimeError as error:
            if self.world == 1 or not parallel.is_peer_failure(error):
                raise
            advice = f"see its message, then continue with --resume true --save_dir {self.folder}"
            raise UserError(f"after step {self.step} another process of this run was lost: {advice}") from None
        finally:
            self.monitor.close()
            if self.log is not None:
                self.log.close()
            if self.lock:
                self.lock.release()
        if self.stopped or interrupt.requested:
            self.say(f"stopped by {interrupt.cause} after step {self.step}: {run_folder.CONTINUE}")
            return {}
        return figures

    def _run(self, interrupt, bar) -> dict:
        """Run the loop: a batch, and then what is due after this step (log, evaluation, checkpoint)."""
        config, figures = self.config, {}
        over = self._is_over(interrupt)
        if self.eval_due and not self.stopped:
            figures, improved = self._judge()
            if improved:
                self.save(improved)
            over = self._is_over(interrupt)
        while not over:
            self.enter_stage()
            with self.monitor.batch(), self.clock.compiling(self.stage, self.step, bar, self.say):
                self.train_step(next(self.loader))
            bar.update()
            over = self._is_over(interrupt)
            if self.step % config.log_every == 0 or over:
                self._log_training(bar)
            improved, self.eval_due = False, self.step % config.eval_every == 0 or self.progress() >= 1
            if self.eval_due and not self.stopped:
                figures, improved = self._judge()
                if not over:  # during the evaluation, a signal may have come or the time limit have passed
                    over = self._is_over(interrupt)
            if self.step % config.save_every == 0 or over or improved:
                self.save(improved)
        is_part = 0 < config.eval_batches * config.batch_size < len(self.valid_set)
        lacks = not figures and self.log is not None and self.log.lacks(self.step, "final_valid_loss")  # killed there
        if is_part and not self.stopped and (figures or self.agreement.sum(lacks)[0]):
            self.say(f"the last evaluation, on all validation data: {self.valid_set}")
            figures = self.measure(None)
            if self.log is not None:
                self.log.log(self.step, **{f"final_{name}": value for name, value in figures.items()})
        return figures

    def _judge(self) -> tuple[dict, bool]:
        """Evaluate the weights of this step. Returns the figures, and whether they are the best so far."""
        figures = self.evaluate(self.config.eval_batches or None)  # always the same batches, so losses compare
        found = self.score(figures), figures["valid_loss"]  # of equal scores, the one of lower loss is better
        self.eval_due, improved = False, found < (self.best, self.best_loss)
        if improved:  # never if a loss is NaN
            self.best, self.best_loss = found
        return figures, improved

    def _is_over(self, interrupt) -> bool:
        """Returns whether the run ends here, and notes whether a signal ends it.  All processes get the same answer."""
        passed = 0.0
        if self.is_main and self.config.max_minutes is not None:  # only the main process's clock counts
            passed = (time.monotonic() - self.started) / 60 / self.config.max_minutes
        self.time_fraction, self.stopped = self.agreement.sum(passed, interrupt.requested)
        return bool(self.stopped) or self.progress() >= 1

    def progress(self) -> float:
        """Returns the fraction of the run that is done, by steps or by time, whichever is larger."""
        return max(self.step / self.curriculum.total_steps, self.time_fraction)

    def train_step(self, batch: dict):
        """Train on this process's rows of one batch: forward and backward passes, then the optimizer's update."""
        self.enter_stage()
        self._set_learning_rate()
        seed_device(self.device, mix_seed(self.config.seed, self.step, self.rank))  # so a resume repeats dropout
        self.model.train()
        if not self.recursion_begun and self.progress() >= self.config.recursion_from:
            run_state.begin_recursion(self)
        with self._at(depths.depth_of_step(self.config, self.raw.config, self.step, self.recursion_begun)):
            self.supervise(self.split(batch))
        self.step += 1

    def supervise(self, parts):
        """Run the supervision steps of one batch: forward, backward, and the optimizer's updates.

        Each step back-propagates its own loss immediately and passes a detached carry to the next step. So only one
        step's graph is in memory at a time, however many steps there are. `full_bptt` needs one graph through all
        steps, and a loop or plain transformer has a single step: then one forward call weighs all losses itself."""
        model = self.raw.config
        one_call = model.full_bptt or model.train_steps == 1
        weights = [1.0] if one_call else loss_weights(model, model.train_steps)
        update_each_step = self.config.optimizer_step == "supervision" and not one_call
        last = max(s for s, weight in enumerate(weights) if weight > 0)
        carries, skipped_before = [None] * len(parts), self.skipped
        step_losses = torch.zeros_like(self.window.losses)
        for s, weight in enumerate(weights):
            weight = weight / sum(weights)
            # one update per batch: weights sum to 1; one update per step: their mean is 1, so each has full size
            scale = weight * len(weights) if update_each_step else weight
            updates = weight > 0 and (update_each_step or s == last)
            for i, (part, share) in enumerate(parts):
                # processes exchange gradients once per update, in the backward pass of its last part
                with parallel.gradient_sync(self.accelerator, self.model, updates and i == len(parts) - 1):
                    # a step of weight 0 has no loss, but must still run: the next step starts from its carry
                    with autocast(self.device, self.precision), torch.set_grad_enabled(weight > 0):
                        out = self.model(**part, supervision_steps=None if one_call else 1, carry=carries[i])
                    if weight > 0:
                        # out.loss is the mean over this part's target tokens; `share` is their fraction of the batch's.
                        # DDP and FSDP average gradients over processes; `world` turns that average into the sum.
                        self.accelerator.backward(out.loss * (share * (scale * self.world)))
                carries[i] = out.carry
                step_losses += torch.stack((out.loss, out.ce_loss, out.act_loss)).detach() * (share * weight)
                del out  # free its logits before the next forward pass makes new ones
            if updates:
                self.update_weights()
        self.window.add(step_losses, model.visits_per_step * model.train_steps, self.skipped == skipped_before)

    def split(self, batch):
        """Split the rows into grad_accum parts; returns [(part, its share of all processes' target tokens)].

        A share counts what the loss averages over, tokens or rows, so the gradient is the same for every split."""
        total = self.agreement.sum(count_terms(batch["target_ids"], self.raw.config.loss_mean))[0]
        rows = torch.arange(len(batch["target_ids"])).chunk(self.config.grad_accum)
        parts = [{name: t[index].to(self.device, non_blocking=True) for name, t in batch.items()} for index in rows]
        return [(part, count_terms(part["target_ids"], self.raw.config.loss_mean) / max(1, total)) for part in parts]

    @contextlib.contextmanager
    def _at(self, depth: TRMConfig | None = None):
        """Within this context, the model has the depth of this config; by default, the largest depth trained so far."""
        whole = self.raw.config
        self.raw.config = depth or depths.depth_so_far(self.config, whole, self.recursion_begun)
        try:
            yield
        finally:
            self.raw.config = whole

    def _set_learning_rate(self):
        """Set every group's learning rate for this step: the schedule's factor times the stage's factor."""
        c = self.config
        factor = learning_rate_factor(c.schedule, self.step, c.warmup_steps, self.progress(), c.min_lr_ratio)
        factor *= self.stage.lr_factor
        set_learning_rates(self.optimizers, factor)
        self.lr = c.lr * factor

    def update_weights(self):
        """Clip the gradient and update the weights.  Skips a gradient with NaN or infinity (often a bad batch).

        Raises UserError after max_skipped of these in a row: then it is the run that diverged, not one bad batch."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        self.grad_norm = parallel.gathered(norm).item()
        is_good = math.isfinite(self.grad_norm)
        if is_good or self.accelerator.scaler is not None:  # fp16: the scaler skips by itself, and lowers its scale
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if is_good:
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.raw)
            return
        self.skipped += 1
        if self.skipped_at != self.step:  # a step may have several updates, and its carry makes all of them bad
            self.skipped_in_a_row, self.skipped_at = self.skipped_in_a_row + 1, self.step
        self.say(f"step {self.step + 1}: the gradient is not finite, skipped ({self.skipped} so far)")
        if self.skipped_in_a_row >= self.config.max_skipped:
            wrong = f"step {self.step + 1}: the gradient was not finite {self.skipped_in_a_row} times in a row"
            raise run_folder.diverged(self.folder, wrong)

    def start_window(self):
        """Start new sums for the means in the next line of the log."""
        self.window = Window(self.device)
        self.clock.start(self.step)

    def _log_training(self, bar):
        """Write the means over the steps since the last line to the log and the progress bar."""
        means = self.window.means(self.accelerator)
        self.elapsed = time.monotonic() - self.started
        line = {
            "epoch": self.loader.epoch,
            "tokens": self.curriculum.tokens(self.step),
            **(means | self.more_figures(means)),
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "lr": self.lr,
            "tokens_per_s": self.clock.tokens_per_s(self.curriculum, self.step),
            "elapsed_s": self.elapsed,
        }
        work_left = self.curriculum.work_left(self.config, max(1, self.step), self.one_at_a_time)
        left = self.clock.minutes_left(self.elapsed, work_left, self.config.max_minutes)
        bits, speed = bits_text(line.get("bits_per_byte", math.nan)), f"{line['tokens_per_s']:.0f} tokens/s"
        bar.set_postfix_str(f"loss {line['loss']:.3f}{bits}, {speed}, {left:.1f} min left", refresh=False)
        if self.log is not None:
            self.log.log(self.step, **line)
        self.start_window()

    def more_figures(self, means: dict) -> dict:
        """Returns the figures of the log that depend on the kind of data.  means: mean losses since the last line."""
        bits = bits_per_byte(means["ce_loss"], self.train_set.bytes_per_token)
        return {"bits_per_byte": bits} if self.raw.config.loss_mean == "token" else {}  # not of a mean over rows

    def measure(self, limit: int | None) -> dict:
        """Evaluate the averaged weights (if any) on `limit` validation batches at equal distances; None = all."""
        c, data = self.config, self.valid_set
        rows = len(data) if limit is None else limit * c.batch_size
        size = max(1, c.batch_size // (self.world * c.grad_accum))  # at once, as in training: there is memory for it
        with self.as_judged():
            options = (self.tokenizer.pad_id, self.precision, self.accelerator)
            return evaluate_rows(self.raw, data, rows, size, *options)

    def evaluate(self, limit: int | None) -> dict:
        """Evaluate as `measure` does, and write the figures, a sample text and the learning curve to the run folder."""
        with self.clock.paused():
            figures = self.measure(limit)
            # a sharded model cannot run in one process alone, so all processes generate the sample together
            text = self.report(figures) if self.is_main or self.config.shard else ""
            if self.log is not None:
                self.log.log(self.step, **figures)
                tqdm.write(text, file=sys.stderr)
                self.log.sample(text)
                self.log.draw(f"{self.folder.name}: {describe_model(self.raw)}", force=self.progress() >= 1)
        return figures

    def score(self, figures: dict) -> float:
        """Returns the figure by which the best checkpoint is selected; lower is better."""
        return figures["valid_loss"]

    def report(self, figures: dict) -> str:
        """Returns the text that an evaluation prints and adds to samples.txt.  It starts with `step N:`."""
        loss = f"{figures['valid_loss']:.4f} nats/token{bits_text(figures['valid_bits_per_byte'])}"
        return f"step {self.step}: validation {loss}\n{self.sample()}\n"

    def sample(self) -> str:
        """Returns a text generated with the averaged weights, from the same seed each time."""
        c = self.config
        with self.as_judged():
            return sample_text(self.raw, self.tokenizer, c.sample_prompt, c.sample_tokens, c.seed)

    @contextlib.contextmanager
    def as_judged(self):
        """Within this context, the model has its moving-average weights (if any), and the depth trained so far."""
        parallel.swap_average(self.raw, self.ema)
        try:
            with self._at():
                yield
        finally:
            parallel.swap_average(self.raw, self.ema)

    def save(self, best: bool = False):
        """Write this step's checkpoint and point `last` (and `best`) to it.  All processes must call this."""
        weights, average, state = run_state.collect(self, best)
        problem = None
        if self.is_main:
            try:
                if not all(map(checkpoint.is_sound, weights.values())):
                    raise run_folder.diverged(self.folder, f"step {self.step}: weights are not finite, and not saved")
                parts = (self.raw, self.tokenizer, average, state, run_state.info_of(self), weights)
                with self._at():  # before recursion_from, the checkpoint has the depth that it was trained at
                    run_folder.save(self.folder, f"step_{self.step:08d}", best, self.config.keep_checkpoints, *parts)
            except UserError as error:
                problem = error
        if self.agreement.sum(problem is not None)[0]:  # all processes learn of it, so none waits forever
            raise problem or UserError("process 0 could not write the checkpoint, see its message")

    def load(self, folder: Path, state: dict):
        """Restore a checkpoint, so that training continues exactly where it was written."""
        run_state.restore(self, folder, state)
        self.say(f"resumed {folder} after step {self.step}")
