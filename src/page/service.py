"""What serve.py serves: the model with its engine, facts about both, and the puzzle solver."""

import asyncio
import contextlib
import re
import sys
import time
from pathlib import Path

import torch

from src.checkpoint import least_depth, resolve
from src.data.records import prompt_of
from src.errors import UserError
from src.exits import max_depth
from src.metrics import cache_bytes_per_token, count_parameters, flops_per_token
from src.model import TRMModel
from src.page.answers import deliver
from src.page.config import ServeConfig
from src.page.engine import Engine, Limits, Text
from src.page.errors import ApiError, Busy
from src.page.puzzles import PuzzleSolver
from src.page.schemas import Bounds
from src.quantize import load_for_writing
from src.runtime import GIB, choose_device
from src.training.run_folder import settings_of

SUDOKU = Path("checkpoints/sudoku")
CHARS_PER_TOKEN = 64  # a prompt with more characters per token of context is refused before it is tokenized


class Service:
    def __init__(
        self,
        model,
        tokenizer,
        config: ServeConfig,
        name="model",
        puzzle: PuzzleSolver | None = None,
        example: str | None = None,
        least: int = 1,
    ):
        """example: a prompt like those of training. least: the first recursion step that was trained to answer."""
        self.model, self.tokenizer, self.config, self.name, self.puzzle = model, tokenizer, config, name, puzzle
        self.is_onnx = not isinstance(model, torch.nn.Module)
        self.example, self.least_depth = example, min(least, max_depth(model.config))
        self.created = int(time.time())
        room = config.max_cache_gib * GIB / (self._cache_bytes() * model.config.max_seq_len)  # in rows of full length
        limits = Limits(self._rows(room), config.max_queue, config.prefill_tokens, config.max_seconds, room)
        self.engine = Engine(model, tokenizer, limits, self._post)
        context = model.config.max_seq_len
        depth = max(config.max_depth, max_depth(model.config)) if model.config.recursion != "none" else 1
        self.bounds = Bounds(
            *(tokenizer.vocab_size, context, CHARS_PER_TOKEN * context, config.max_prompts, config.max_n),
            *(config.max_tokens, depth, config.max_steps),
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def _rows(self, room: float) -> int:
        """Returns how many texts can be written at once within the bound of the cache."""
        most, length = int(room), self.model.config.max_seq_len
        if most < 1:
            raise UserError(f"max_cache_gib {self.config.max_cache_gib} holds no text of {length} tokens: raise it")
        if most < self.config.max_rows:
            print(f"max_cache_gib {self.config.max_cache_gib:g} allows {most} texts at once", file=sys.stderr)
        return min(most, self.config.max_rows)

    def _cache_bytes(self) -> int:
        """Returns the bytes of key/value cache per token."""
        weight = next(self.model.parameters(), torch.zeros(0))
        return cache_bytes_per_token(self.model.config, weight.element_size(), max_depth(self.model.config))

    def start(self):
        """Starts the engine. Called in the event loop, which then gets what the engine writes."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def _post(self, out):
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(deliver, out)

    def submit(self, texts: list[Text]):
        """Queues texts, whose number `check_number` has passed. Raises ApiError if there is no room now."""
        most = self.engine.limits.queue
        try:
            self.engine.submit(texts)
        except Busy:
            if self.engine.deadline is not None:
                raise ApiError(503, "the server is shutting down: try another one", None, "shutting_down") from None
            seconds = str(self.engine.retry_after())
            problem = f"all {most} places of the queue are taken: try again in {seconds} s"
            raise ApiError(429, problem, None, "queue_full", {"Retry-After": seconds}) from None

    def check_number(self, texts: int):
        """Raises ApiError if the queue could never hold so many texts."""
        if texts > (most := self.engine.limits.queue):
            raise ApiError(400, f"the request asks for {texts} texts, the queue holds {most}: ask for fewer", "n")

    @property
    def puzzle_steps(self) -> int:
        """The supervision steps of a board whose request does not name them: as in training, within the bound."""
        return min(self.puzzle.steps, self.bounds.steps)

    def check_rule(self, rule, reads_steps: bool):
        """Raises ApiError if the cache has no room for an exit rule, or if an ONNX graph cannot follow it.

        reads_steps: whether the answers of all recursion steps are wanted, which not every graph can return"""
        if self.engine.cost({rule: 1}) > self.engine.limits.cache_rows:
            problem = f"recursion.depth is {rule.max_recursion_depth}, for which max_cache_gib has no room: lower it"
            raise ApiError(400, problem, "recursion", "invalid_value")
        if self.is_onnx:
            try:
                self.model.refuse(rule, reads_steps)
            except UserError as error:
                raise ApiError(400, f"recursion: {error}", "recursion", "unsupported_parameter") from None

    def _puzzle_card(self) -> dict:
        most = self.bounds.steps if self.puzzle.has_steps else 1
        return self.puzzle.card() | {"steps": self.puzzle_steps, "max_steps": most}

    def card(self) -> dict:
        """Returns the facts of GET /v1/model_card."""
        config = self.model.config
        if self.is_onnx:
            with torch.device("meta"):
                parameters = count_parameters(TRMModel(config))["total"]
        else:
            parameters = count_parameters(self.model)["total"]
        adapts = config.recursion != "none" and not self.is_onnx
        return {
            "name": self.name,
            "family": config.recursion,
            "parameters": parameters,
            "flops_per_token": flops_per_token(config).decode,
            "depth": max_depth(config),
            "least_depth": self.least_depth,
            "max_depth": max_depth(config) if self.is_onnx else self.bounds.depth,
            "exits": [exit for exit, has in (("halt", config.halting), ("kl", True)) if has and adapts],
            "context": config.max_seq_len,
            "max_tokens": self.bounds.tokens,
            "example": self.example,
            "start": self.tokenizer.start([self.tokenizer.eos_id])[:-1],
            "vocab_size": self.tokenizer.vocab_size,
            "fim": self.tokenizer.fim is not None,
            "backend": "onnx" if self.is_onnx else "torch",
            "cache_bytes_per_token": self._cache_bytes(),
            "puzzle": None if self.puzzle is None else self._puzzle_card(),
        }


def open_service(config: ServeConfig) -> Service:
    """Loads what a ServeConfig names. Raises UserError if something is missing."""
    puzzle, device = None, choose_device(config.device)
    if config.puzzle != "none" and (config.puzzle is not None or SUDOKU.is_dir()):
        puzzle = PuzzleSolver(config.puzzle or SUDOKU, device)
    if config.onnx is not None:
        from src.onnx.session import load_onnx

        model, tokenizer = load_onnx(config.onnx, "cpu" if config.device == "auto" else config.device)
        if model.device != "cpu":
            raise UserError("an ONNX graph is served on a CPU only: use --device cpu, or serve the checkpoint")
        if not model.facts["cache"]:
            raise UserError(f"{config.onnx} was exported without a key/value cache: export it again with the cache")
        return Service(model, tokenizer, config, config.name or Path(config.onnx).resolve().name, puzzle)
    model, tokenizer = load_for_writing(config.checkpoint, device, config.precision)
    if not model.config.causal:
        raise UserError("this model does not write text: give a language model, and this one as --puzzle")
    path = resolve(config.checkpoint) if config.checkpoint is None else Path(config.checkpoint).resolve()
    example, least = example_prompt(resolve(config.checkpoint)), least_depth(config.checkpoint)
    return Service(model, tokenizer, config, config.name or path.name, puzzle, example, least)


def example_prompt(checkpoint: Path) -> str | None:
    """Returns the prompt of the samples that a run wrote; None outside a run, or if the samples had no prompt.

    A run on records with no `sample_prompt` took its first validation question, which only samples.txt has."""
    run = checkpoint.parent
    settings = settings_of(run)
    if settings.get("sample_prompt") or not settings.get("records"):
        return settings.get("sample_prompt") or None
    samples = run / "samples.txt"
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else ""
    found = re.search("^" + re.escape(prompt_of("@")).replace("@", "(?:.*?)"), text, re.M | re.S)
    return found[0] if found else None
