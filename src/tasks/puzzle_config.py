"""The settings of train_puzzles.py: those of any training run and of any model, with other defaults."""

import functools
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from src.model_config import TRMConfig, model_settings
from src.tasks.puzzle_data import PuzzleConfig
from src.training.train_config import RuntimeConfig, TrainConfig, flat_settings, model_of_source, parse_run_flags


def fixed(value):
    """Returns the field of a setting that has only one value in a run on puzzles, and is therefore not a flag."""
    return field(init=False, default=value)


@dataclass
class PuzzleTrainConfig(TrainConfig):
    save_dir: str = "runs/puzzles"
    batch_size: int = 128
    max_steps: int = 5000
    optimizer: Literal["adamw", "muon", "muoneq"] = "muon"
    optimizer_step: str = fixed("supervision")
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    lr: float = 4e-3
    beta2: float = 0.95
    ema_decay: float = 0.99
    eval_every: int = 500
    eval_batches: int = 8
    save_every: int = 1000
    log_every: int = 50
    sample_prompt: str = fixed("")
    sample_tokens: int = fixed(0)
    shard: bool = fixed(False)
    overfit: int | None = fixed(None)

    def __post_init__(self):
        super().__post_init__()
        for number, stage in enumerate(self.curriculum.stages):
            for name in ("epochs", "seq_len", "batch_size", "dim", "d_ff"):
                if getattr(stage, name) is not None:
                    raise ValueError(f"curriculum.stages[{number}]: a run on puzzles cannot use {name}: leave it out")


@dataclass
class PuzzleModelConfig(TRMConfig):
    vocab_size: int | None = fixed(None)
    d_model: int = 64
    max_seq_len: int = fixed(1)  # this and the vocabulary come from the puzzle
    causal: bool = fixed(False)
    rope_scaling: float | None = fixed(None)
    rope_trained_len: int | None = fixed(None)
    norm_gain: bool = False
    weight_init: Literal["normal", "truncated"] = "truncated"
    positions: Literal["rope", "learned", "none"] = "learned"
    n_layers: int = 1
    latent_steps: int = 2
    deep_steps: int = 1
    supervision_steps: int = 8
    full_bptt: bool = fixed(False)
    token_loss: Literal["softmax", "stablemax"] = "stablemax"
    loss_mean: Literal["token", "row"] = "row"
    act_weight: float = 0.5
    act_target: str = fixed("correct")
    pad_token_id: int | None = fixed(None)


PuzzleTrainConfig.__doc__, PuzzleModelConfig.__doc__ = TrainConfig.__doc__, TRMConfig.__doc__  # what --help shows


class PuzzleSettings(NamedTuple):
    """All settings of a run, one dataclass per topic."""

    train: PuzzleTrainConfig
    puzzle: PuzzleConfig
    model: PuzzleModelConfig
    runtime: RuntimeConfig

    def flat(self) -> dict:
        """Returns all settings that are flags as {flag: value}, the content of config.yaml."""
        return flat_settings(self)


def model_config(settings: PuzzleModelConfig, cells: int, vocab_size: int) -> TRMConfig:
    """Returns the settings of a model for boards of this size. Widths that were not given follow from the size."""
    values = model_settings(settings)
    return TRMConfig(**values | {"max_seq_len": cells, "vocab_size": vocab_size, "pad_token_id": 0})


def read_settings(argv=None, description=None) -> PuzzleSettings:
    """Parse flags; with init_from, model settings that are not given come from the checkpoint."""
    classes = PuzzleSettings.__annotations__.values()
    defaults = functools.partial(model_of_source, model=PuzzleModelConfig)
    return PuzzleSettings(*parse_run_flags(description, classes, argv, defaults))
