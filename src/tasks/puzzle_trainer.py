"""Trains a model on puzzles, as the authors' code of TRM does (arXiv:2510.04871, section 4).

Each training step is one supervision step of every row of the batch, followed by one update of the weights. Rows that
have halted take new puzzles. All else (schedule, log, checkpoints, guards, averaged weights) is that of
`src.trainer.Trainer`. The rows take the place of its data loader, so their state is saved like a loader's position.
"""

import numpy as np
import torch

from src import checkpoint
from src.errors import UserError
from src.losses import IGNORE
from src.metrics import describe_model
from src.model import Carry, TRMConfig
from src.optim import make_optimizers
from src.runtime import autocast, choose_device, keep_freed_memory
from src.tasks import puzzle_eval
from src.tasks.puzzle_config import PuzzleSettings, model_config
from src.tasks.puzzle_data import HeldOut, PuzzleConfig, PuzzleData, PuzzleDraws, PuzzleForm, fingerprint, load_puzzles
from src.tasks.puzzle_rows import PuzzleRows
from src.trainer import Trainer
from src.training import parallel, run_folder
from src.training.create import begin, create_model, open_run


class PuzzleTrainer(Trainer):
    """One training run on puzzles.  `create_puzzle_trainer` builds it from settings; `train()` runs it."""

    best_name = "best_valid_error"  # share of the held-out puzzles that are not right as a whole
    one_at_a_time = True

    def __init__(self, config, puzzle: PuzzleConfig, model, data: PuzzleData, runtime, first: TRMConfig | None = None):
        self.puzzle = puzzle
        draws = PuzzleDraws(data.kind, data.train, config.seed, puzzle.augment)
        form = PuzzleForm(data.kind, data.names)
        super().__init__(config, model, form, draws, HeldOut(data.valid), runtime, first=first)

    def _make_optimizers(self, model):
        c, puzzle = self.config, None
        if model.config.puzzle_ids:
            lr, decay = self.puzzle.puzzle_lr, self.puzzle.puzzle_weight_decay
            puzzle = c.lr if lr is None else lr, c.weight_decay if decay is None else decay
        return make_optimizers(model, c.optimizer, c.lr, c.weight_decay, (0.9, c.beta2), puzzle)

    def new_loader(self, stage):
        rows = stage.batch_size // self.world
        return PuzzleRows(self.train_set, rows, self.raw, self.puzzle.explore, self.rank, self.world)

    def supervise(self, parts):
        """Run one supervision step of every row, update the weights, and let the rows halt or continue."""
        model, losses, skipped_before = self.raw.config, torch.zeros_like(self.window.losses), self.skipped
        found = []
        for number, (part, share) in enumerate(parts):
            y, z = part.pop("y", None), part.pop("z", None)
            targets, puzzle_ids = part["target_ids"], part.pop("puzzle_ids")
            part |= {"puzzle_ids": puzzle_ids} if model.prefix_tokens else {}
            carry = None if y is None else Carry(y, z, 0)
            with parallel.gradient_sync(self.accelerator, self.model, number == len(parts) - 1):
                with autocast(self.device, self.precision):
                    out = self.model(**part, supervision_steps=1, carry=carry)
                self.accelerator.backward(out.loss * (share * self.world))  # DDP averages over processes
            losses += torch.stack((out.loss, out.ce_loss, out.act_loss)).detach() * share
            is_right = ((out.logits.detach().argmax(-1) == targets) | (targets == IGNORE)).all(-1)
            halts = torch.zeros_like(is_right) if out.halt_logits is None else out.halt_logits.detach() > 0
            found.append((out.carry.y, out.carry.z, halts, is_right))
            del out  # free its graph before the next part makes another
        self.update_weights()
        self.window.add(losses, model.visits_per_step, self.skipped == skipped_before)
        y, z, halts, is_right = (None if each[0] is None else torch.cat(each) for each in zip(*found, strict=True))
        self.loader.advance(y, z, halts, is_right)

    def more_figures(self, means: dict) -> dict:
        """Among the rows that halted since the last line: the share that was right, and the mean supervision steps."""
        finished, right, steps = self.agreement.sum(*self.loader.take_counts())
        if not finished:
            return {}
        return {"exact_accuracy": right / finished, "steps_per_puzzle": steps / finished}

    def measure(self, limit: int | None) -> dict:
        """Evaluate the averaged weights (if any) on `limit` batches of held-out puzzles; None = all of them."""
        grids, size = self.valid_set.grids, self.config.batch_size
        known = np.flatnonzero(grids.labels.any(1))  # the answers of some test pairs of ARC are secret
        n = min(len(known), (limit or len(known)) * size)
        # the held-out puzzles may be in an order of their own, so a part is drawn, always the same
        chosen = known[np.sort(np.random.default_rng(self.puzzle.data_seed).permutation(len(known))[:n])]
        with self.as_judged():
            steps, mine = self.puzzle.eval_steps, chosen[self.rank :: self.world]
            rows = size // (self.world * self.config.grad_accum)  # as in training: a compiled model has this shape
            answers = puzzle_eval.answer(self.raw, grids, mine, steps, self.precision, rows) if len(mine) else None
        return puzzle_eval.figures_of(grids, [each for each in self.agreement.gather(answers) if each is not None])

    def score(self, figures: dict) -> float:
        return 1 - figures["valid_exact_accuracy"]

    def report(self, figures: dict) -> str:
        return f"step {self.step}: {puzzle_eval.describe(figures)}"


def create_puzzle_trainer(settings: PuzzleSettings) -> PuzzleTrainer:
    """Prepare the puzzles, model and trainer, and write config.yaml to the run folder.

    With `resume`, the trainer continues the run in save_dir. Raises UserError for mistakes in settings and files."""
    keep_freed_memory()
    with parallel.only_main_speaks():
        return _create(settings)


def _create(settings):
    config, puzzle, wanted, runtime = settings
    run = folder, newest, _ = open_run(settings)
    choose_device(runtime.device)  # reports a wrong device now, not after minutes of data preparation
    data = load_puzzles(puzzle)
    if not data.valid.labels.any():
        raise UserError("no held-out puzzle has a known answer, so nothing can be measured: give others as valid_paths")
    corpus = fingerprint(data)
    run_folder.check_corpus(folder, corpus, "puzzles", config.allow_changed_corpus)
    own = _config_for(wanted, data, puzzle)
    model = _model(config, own, data, newest)
    trainer = PuzzleTrainer(config, puzzle, model, data, runtime, own)
    begin(trainer, settings, corpus, *run)
    sizes = f"{data.train.n_rows:,} puzzles to train on, {data.valid.n_rows:,} held out"
    trainer.say(f"{data.kind.name}: {describe_model(model)}; {sizes}")
    return trainer


def _config_for(wanted, data, puzzle) -> TRMConfig:
    """The model's settings for these puzzles.  Raises UserError if they do not fit."""
    try:
        config = model_config(wanted, data.kind.cells, data.kind.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    highest = max(grids.puzzle_ids.max(initial=0) for grids in (data.train, data.valid))
    if config.puzzle_ids and highest >= config.puzzle_ids:
        raise UserError(f"the puzzles have identifiers up to {highest}: set puzzle_ids to {highest + 1} or more")
    if puzzle.eval_steps and config.recursion != "trm":
        raise UserError(f"eval_steps is for recursion trm, not {config.recursion}: leave it out")
    return config


def _model(config, own, data, newest):
    """The model to start from: that of the checkpoint to resume or to start from, or a new one."""
    if newest:
        return checkpoint.load_network(newest[0], ema=False)
    if not config.init_from:
        return create_model(own, PuzzleForm(data.kind), config.seed)
    source = checkpoint.resolve(config.init_from)
    found = checkpoint.load_config(source)
    if (found.max_seq_len, found.vocab_size) != (own.max_seq_len, own.vocab_size):
        size = f"{found.max_seq_len} cells and {found.vocab_size} tokens"
        raise UserError(f"--init_from {source} is a model for {size}, not for {data.kind.name}: choose another")
    return checkpoint.load_network(source, config=own)
