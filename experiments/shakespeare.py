"""Compare recursive models with plain transformers and published figures on tinyshakespeare, one token per character.

    python experiments/shakespeare.py --recipe prototypes --seeds 0 1
    python experiments/shakespeare.py --recipe anchor_trm anchor_loop anchor_plain --seeds 0 1
    python experiments/shakespeare.py --recipe anchor_trm --lr 2e-3 --optimizer muon --d_model 160   # override
    python experiments/shakespeare.py --recipe choices --seeds 0 1 2 --threads 1
    python experiments/shakespeare.py --table                  # mean and spread of all runs so far

The split is the usual one: the first 90 % of the text for training, the last 10 % for validation. The vocabulary is its
65 characters. Each step trains on random windows, as in nanoGPT, by `Trainer.train_step`. At the end, the whole
validation text is scored in non-overlapping windows, in nats per character: once with the last weights and once with
their moving average. Each run appends one JSON line to the file `output` when it is done. Then a table with a row per
recipe is printed. The settings of the model and the main settings of training are flags that override the recipe's own.

There are three groups of recipes. `prototypes` (width 256, 1,500 steps of 32 x 128 tokens) repeats the figures of a
prototype of this design. `anchor` has the budget of nanoGPT's CPU example: 2,000 steps of 12 x 64 tokens and at most
0.8 M parameters, with which nanoGPT reaches 1.88 (README of github.com/karpathy/nanoGPT). `choices` changes one
training setting at a time, in 600 steps of 12 x 64 tokens.
"""

import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments import records  # noqa: E402
from src.config import build, parse_flags, run  # noqa: E402
from src.errors import UserError
from src.evaluation.evaluation import evaluate  # noqa: E402
from src.losses import IGNORE  # noqa: E402
from src.metrics import count_parameters, flops_per_token  # noqa: E402
from src.model import TRMConfig, TRMModel  # noqa: E402
from src.runtime import keep_freed_memory  # noqa: E402
from src.trainer import Trainer  # noqa: E402
from src.training.train_config import RuntimeConfig, TrainConfig  # noqa: E402

PROTOTYPE = {
    **{"d_model": 256, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "batch_size": 32, "max_steps": 1500},
    **{"lr": 1e-3, "min_lr_ratio": 0.1, "warmup_steps": 100, "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0},
    "ema_decay": 0.995,
}
ANCHOR = PROTOTYPE | {
    **{"d_model": 128, "n_layers": 3, "max_seq_len": 64, "batch_size": 12, "max_steps": 2000},
    **{"optimizer": "muon", "lr": 3e-3, "ema_decay": 0.99},
}
TRM = {"recursion": "trm", "latent_steps": 2, "deep_steps": 1, "supervision_steps": 1}
CHOICES = ANCHOR | TRM | {"supervision_steps": 2, "max_steps": 600}
DEEPER = CHOICES | {"supervision_steps": 1, "deep_steps": 2}
# {name: (settings of TRMConfig and TrainConfig, nats per character to compare with)}
RECIPES = {
    "plain_2": (PROTOTYPE | {"recursion": "none", "norm": "pre"}, 1.570),
    "plain_6": (PROTOTYPE | {"recursion": "none", "norm": "pre", "n_layers": 6}, 1.514),
    "plain_6_post": (PROTOTYPE | {"recursion": "none", "norm": "post", "n_layers": 6}, 1.517),
    "loop_2x3": (PROTOTYPE | {"recursion": "loop", "deep_steps": 3}, 1.519),
    "trm_211": (PROTOTYPE | TRM, 1.502),
    "trm_212": (PROTOTYPE | TRM | {"supervision_steps": 2}, 1.545),
    "anchor_plain": (ANCHOR | {"recursion": "none", "norm": "pre"}, 1.88),
    "anchor_loop": (ANCHOR | {"recursion": "loop", "deep_steps": 3, "norm": "pre"}, 1.88),
    "anchor_trm": (ANCHOR | TRM, 1.88),
    "choice_muon": (CHOICES, None),
    "choice_adamw": (CHOICES | {"optimizer": "adamw", "lr": 1e-3}, None),  # best of 5e-4, 1e-3, 2e-3, 3e-3
    "choice_step_per_supervision": (CHOICES | {"optimizer_step": "supervision"}, None),
    "choice_last_gradient": (DEEPER | {"grad_deep_steps": 1}, None),
    "choice_full_gradient": (DEEPER | {"full_bptt": True}, None),
}
GROUPS = {
    "prototypes": [name for name in RECIPES if name.startswith(("plain", "loop", "trm"))],
    "anchor": [name for name in RECIPES if name.startswith("anchor")],
    "choices": [name for name in RECIPES if name.startswith("choice")],
}


@dataclass
class ShakespeareConfig:
    """What to run.

    Args:
        recipe: names of recipes, or of the groups prototypes, anchor and choices
        seeds: seeds of weights, windows and dropout; each seed is one run
        path: path of tinyshakespeare's input.txt
        output: file to which each run appends one JSON line
        table: only print the table of `output`, without new runs
        threads: number of CPU threads; torch chooses if not given
    """

    recipe: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    path: str = "data/tinyshakespeare/input.txt"
    output: str = "runs/shakespeare.jsonl"
    table: bool = False
    threads: int | None = None

    def __post_init__(self):
        self.recipe = [name for given in self.recipe for name in GROUPS.get(given, [given])]
        for name in self.recipe:
            if name not in RECIPES:
                raise ValueError(f"recipe {name}: choose from {', '.join((*GROUPS, *RECIPES))}")
        if not (self.recipe or self.table):
            raise ValueError(f"recipe is missing: choose from {', '.join((*GROUPS, *RECIPES))}, or give --table")


MODEL = {f.name: f for f in dataclasses.fields(TRMConfig) if f.name not in ("vocab_size", "pad_token_id")}
TRAIN = {f.name: f for f in dataclasses.fields(TrainConfig)}
TRAIN = {name: TRAIN[name] for name in PROTOTYPE.keys() & TRAIN.keys() | {"optimizer", "optimizer_step", "compile"}}
Overrides = records.overrides(
    "Settings that override the recipe's own.", (*TRAIN.values(), *MODEL.values()), TrainConfig, TRMConfig
)


def parse_args(argv=None) -> tuple[ShakespeareConfig, dict, RuntimeConfig]:
    """Returns the script's settings, {name: value} that override a recipe's settings, and device and precision."""
    config, changes, runtime = parse_flags(__doc__, ShakespeareConfig, Overrides, RuntimeConfig, argv=argv)
    return config, records.given(changes), runtime


def load_text(path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns (training ids, validation ids, characters): 90 % and 10 % of a text, one id per character."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--path {path}: {error.strerror}; tinyshakespeare's input.txt is in github.com/karpathy/char-rnn, "
            "folder data/tinyshakespeare"
        ) from None
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    ids = np.array([number[character] for character in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], characters


def random_batch(ids: np.ndarray, rows: int, length: int, generator: np.random.Generator) -> dict:
    """Draw windows from random places in the text: {input_ids, target_ids}, each (rows, length)."""
    starts = generator.integers(0, len(ids) - length, rows)
    windows = torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]))
    return {"input_ids": windows[:, :-1].contiguous(), "target_ids": windows[:, 1:].contiguous()}


def validation_batches(ids: np.ndarray, length: int, rows: int = 64):
    """Yields batches of non-overlapping windows over the whole text; each character but the first is a target once."""
    ids = torch.from_numpy(ids)
    padding = -(len(ids) - 1) % length
    inputs = torch.nn.functional.pad(ids[:-1], (0, padding)).view(-1, length)
    targets = torch.nn.functional.pad(ids[1:], (0, padding), value=IGNORE).view(-1, length)
    for first in range(0, len(inputs), rows):
        yield {"input_ids": inputs[first : first + rows], "target_ids": targets[first : first + rows]}


def train(name: str, seed: int, changes: dict, texts: tuple, runtime: RuntimeConfig) -> dict:
    """Do one run of a recipe and return its record, which is one line of `output`."""
    settings, published = RECIPES[name]
    settings = settings | changes
    train_ids, valid_ids, characters = texts
    own = {key: settings[key] for key in settings.keys() & MODEL.keys()}
    config = build(TRMConfig, own | {"vocab_size": len(characters)})
    training = build(TrainConfig, {key: settings[key] for key in settings.keys() & TRAIN.keys()} | {"seed": seed})
    if min(len(train_ids), len(valid_ids)) < config.max_seq_len + 2:
        raise UserError(f"the text has {len(valid_ids)} validation characters: give more, or a smaller max_seq_len")
    torch._dynamo.reset()  # drop the compiled graphs of the previous run
    torch.manual_seed(seed)
    trainer = Trainer(training, TRMModel(config), None, None, None, runtime)
    parameters = count_parameters(trainer.raw)["total"]
    trainer.say(f"{name}, seed {seed}: {parameters:,} parameters")
    generator, start = np.random.default_rng(seed), time.monotonic()
    for step in range(1, training.max_steps + 1):
        trainer.train_step(random_batch(train_ids, training.batch_size, config.max_seq_len, generator))
        if step % 250 == 0:
            loss = trainer.window.means(trainer.accelerator)["ce_loss"]
            trainer.say(f"  step {step}: training {loss:.4f}, {time.monotonic() - start:.0f} s")
            trainer.start_window()
    minutes = (time.monotonic() - start) / 60
    figures = {
        "valid_loss": valid_loss(trainer, valid_ids),
        "valid_loss_ema": average_valid_loss(trainer, valid_ids),
    }
    trainer.say(f"  validation {figures}, {minutes:.1f} min")
    return {
        **{"recipe": name, "changes": changes, "seed": seed, "steps": training.max_steps, "parameters": parameters},
        **{"published": published, **figures, "minutes": round(minutes, 2)},
        "train_flops_per_token": flops_per_token(config).train,
        **{"precision": trainer.precision, "threads": torch.get_num_threads(), "settings": settings},
    }


def valid_loss(trainer: Trainer, ids: np.ndarray) -> float:
    """Returns nats per character of the whole text in fp32, for the answer after all supervision steps."""
    batches = validation_batches(ids, trainer.raw.config.max_seq_len)
    return evaluate(trainer.raw, batches, bytes_per_token=1.0)["valid_loss"]


def average_valid_loss(trainer: Trainer, ids: np.ndarray) -> float | None:
    """Returns the same as `valid_loss` for the moving average of the weights, or None if the run keeps no average."""
    if trainer.ema is None:
        return None
    with trainer.averaged_weights():
        return valid_loss(trainer, ids)


def print_table(path) -> None:
    """Print a row per recipe: runs, parameters, mean and spread of the losses, the figure to compare with, minutes.

    If a seed was run more than once with the same settings, its last run counts."""
    runs = {name: seeds for (name,), seeds in records.by_seed(path, name="recipe").items()}
    width = max(map(len, runs), default=6)
    print(f"{'recipe':{width}}  runs  parameters  nats/char  spread  EMA     spread  compare  minutes")
    for name, seeds in runs.items():
        columns = [spread([r[key] for r in seeds]) for key in ("valid_loss", "valid_loss_ema")]
        minutes = statistics.mean(r["minutes"] for r in seeds)
        print(
            f"{name:{width}}  {len(seeds):4}  {seeds[0]['parameters']:10,}  {columns[0]:17}  {columns[1]:14}  "
            f"{seeds[0]['published'] or math.nan:7.3f}  {minutes:7.1f}"
        )


def spread(values: list) -> str:
    """Format the mean of the values and their spread, which is the largest minus the smallest."""
    if None in values:
        return "-"
    return f"{statistics.mean(values):.4f}  {max(values) - min(values):.4f}"


def main(argv=None) -> None:
    config, changes, runtime = parse_args(argv)
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    texts = load_text(config.path) if config.recipe else None
    for name in config.recipe:
        for seed in config.seeds:
            records.keep(config.output, train(name, seed, changes, texts, runtime))
    print_table(config.output)


if __name__ == "__main__":
    run(main)
