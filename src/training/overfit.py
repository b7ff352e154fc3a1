"""The overfit check, --overfit N: can this model, with these settings, learn the first N records by heart?

If it cannot, something is wrong that more data will not cure. The check trains on these records alone, without what
works against learning by heart (weight decay, dropout, averaged weights), until the model answers all of them greedily.
It writes no run folder.
"""

import dataclasses
import itertools
import sys
import time
from typing import NamedTuple

from src.data.records import Record, RecordFields, answer_of, prompt_of, quiet_log
from src.dataset import find_text, first_records
from src.errors import UserError, few
from src.evaluation.scoring import score_samples
from src.language_model import continue_texts
from src.runtime import keep_freed_memory
from src.trainer import Trainer
from src.training.create import check_model, create_model
from src.training.train_config import CurriculumConfig

CHECK_EVERY = 10  # steps
MINUTES = 2.0  # limit if max_minutes is not set
FELL = 0.5  # a loss that stays above this share of its first value does not fall
ROSE = 1.5  # a loss that ends above this times its lowest value jumps up and down
LEARNED = 0.01  # nats per token; with a lower loss, greedy answers differ from the likeliest tokens only by a mistake


class State(NamedTuple):
    """What a check found after some steps."""

    step: int
    seconds: float
    loss: float  # nats per target token
    unlearned: list[Record]  # their answers are not the likeliest tokens yet
    wrong: list[tuple[Record, str]]  # with the text that was generated instead; only if `unlearned` is empty

    @property
    def is_right(self):
        return not (self.unlearned or self.wrong)


def overfit(settings) -> bool:
    """Train on the first records until all answers are right; returns whether they are.

    Prints the progress and one closing sentence on stderr. Raises UserError for settings that do not fit, and if two of
    the records have the same question but different answers."""
    trainer, records = prepare(settings)
    config, start = trainer.config, time.monotonic()
    trainer.enter_stage()
    rows = trainer.train_set
    state = check(trainer, rows, records, 0.0)
    losses = [state.loss]
    while not state.is_right and not (state.wrong and state.loss < LEARNED):
        is_over = trainer.step == config.max_steps or time.monotonic() - start > 60 * config.max_minutes
        if trainer.step > state.step and (is_over or trainer.step % CHECK_EVERY == 0):
            state = check(trainer, rows, records, time.monotonic() - start)
            losses.append(state.loss)
            n_right = len(records) - len(state.unlearned or state.wrong)
            trainer.say(f"step {state.step}: {state.loss:.4f} nats/token, {n_right} of {len(records)} answers right")
        elif is_over:
            break
        else:
            trainer.train_step(next(trainer.loader))
    trainer.say(verdict(trainer.config, len(records), losses, state))
    return state.is_right


def prepare(settings):
    """Returns (trainer for the first records, these Records)."""
    keep_freed_memory()
    config, data, model_config, runtime = settings
    _refuse(settings)
    files = find_text(data)[0][0]
    tokenizer, rows = first_records(data, model_config.vocab_size, model_config.max_seq_len, files, config.overfit)
    if len(rows) < config.overfit:
        print(f"there are only {len(rows)} records that fit", file=sys.stderr)
    records = _records_of(rows, files, data)
    _refuse_contradictions(records)
    changes = {"batch_size": min(config.batch_size, len(rows)), "grad_accum": 1, "curriculum": CurriculumConfig()}
    changes |= {"weight_decay": 0.0, "ema_decay": 0.0, "schedule": "constant", "recursion_from": 0.0}
    changes |= {"warmup_steps": min(config.warmup_steps, CHECK_EVERY), "max_minutes": config.max_minutes or MINUTES}
    changes |= {"compile": bool(config.compile)}  # compiling can take longer than the check
    changes |= {"sample_depth": False, "least_depth": 1}
    plain = dataclasses.replace(model_config, dropout=0.0, visit_dropout=0.0, start_noise=0.0)
    model = create_model(plain, tokenizer, config.seed)
    return Trainer(dataclasses.replace(config, **changes), model, tokenizer, rows, rows, runtime), records


def _refuse(settings):
    if not settings.data.records:
        raise UserError("--overfit needs questions with answers: add --records true")
    check_model(settings.train, settings.model)
    given = {"mixture": settings.data.mixture, "streaming": settings.data.streaming}
    given |= {name: getattr(settings.train, name) for name in ("resume", "init_from", "shard")}
    if names := [f"--{name}" for name, value in given.items() if value]:
        raise UserError(f"--overfit trains a new model on the first records of train_paths: leave out {few(names)}")


def _records_of(rows, files, data):
    """Returns the Records of a dataset's rows, in order."""
    fields, log, numbers = RecordFields(data.question_field, data.answer_field), quiet_log(), set(rows.numbers.tolist())
    log.max_chars = int(data.max_doc_mb * 1e6)
    every = itertools.chain.from_iterable(fields.records(path, log) for path in files)
    return [record for number, record in zip(range(max(numbers) + 1), every) if number in numbers]


def _refuse_contradictions(records):
    first = {}
    for record in records:
        other = first.setdefault(record.question, record)
        if other.answer != record.answer:
            places = f"{other.path}:{other.line} and {record.path}:{record.line}"
            same = "have the same question and different answers, which no model can learn"
            raise UserError(f"{places} {same}: remove one of them")


def check(trainer, rows, records, seconds) -> State:
    """Returns the State of a trainer on the rows of a RecordDataset and their Records.

    Answers are generated only if each of their tokens is the likeliest one. Otherwise a greedy answer is wrong, which
    is cheaper to find out in this way."""
    n_tokens, total, unlearned = 0, 0.0, []
    for number, scores in score_samples(trainer.raw, (rows[i] for i in range(len(rows))), trainer.config.batch_size):
        total -= scores.logprobs.sum().item()
        n_tokens += scores.logprobs.shape[-1]
        if not bool(scores.is_likeliest.all()):
            unlearned.append(number)
    unlearned = [records[number] for number in sorted(unlearned)]
    wrong = [] if unlearned else list(_wrong_answers(trainer, records))
    return State(trainer.step, seconds, total / n_tokens, unlearned, wrong)


def _wrong_answers(trainer, records):
    """Yields (record, generated text) for each record whose greedy answer differs from its own."""
    size, tokenizer = trainer.config.batch_size, trainer.tokenizer
    for start in range(0, len(records), size):
        batch = records[start : start + size]
        most = max(len(tokenizer.encode(answer_of(record.answer))) for record in batch) + 1  # with EOS
        prompts = [prompt_of(record.question) for record in batch]
        steps = list(continue_texts(trainer.raw, tokenizer, prompts, most, temperature=0.0))
        for record, *pieces in zip(batch, *(step.pieces for step in steps)):
            if (text := "".join(pieces)) != answer_of(record.answer):
                yield record, text


def verdict(config, n: int, losses: list[float], last: State) -> str:
    """Returns the closing sentence: the success, or what is most likely wrong.

    n: number of records. losses: those of all checks, nats per token."""
    when = f"after {last.step} steps in {last.seconds:.0f} seconds"
    if last.is_right:
        return f"all {n} answers are right, {when}"
    if last.wrong:
        record, text = last.wrong[0]
        found = f"{record.path}:{record.line}: {text!r} is generated in place of {answer_of(record.answer)!r}"
        wrong = f"each token is learned, but {len(last.wrong)} of {n} answers are wrong ({found}), {when}"
        why = "the tokenizer loses characters, or the prompt or EOS of generation has other tokens than in training"
        return f"{wrong}: most likely {why}"
    lowest = min(losses)
    lr, way = f"most likely the learning rate is wrong (--lr {config.lr:g})", f"{losses[0]:.2f} to {last.loss:.2f}"
    if not lowest < FELL * losses[0]:
        return f"the loss does not fall ({way} nats/token, {when}): {lr}: try {3 * config.lr:g} and {config.lr / 3:g}"
    if not last.loss < ROSE * lowest:
        return (
            f"the loss fell to {lowest:.2f} nats/token and rose to {last.loss:.2f}, {when}: {lr}: try {config.lr / 3:g}"
        )
    record, limit = last.unlearned[0], "max_steps" if last.step == config.max_steps else "max_minutes"
    left = f"{len(last.unlearned)} of {n} answers are not learned yet, such as {record.path}:{record.line}"
    return f"{left}, but the loss falls ({way} nats/token, {when}): most likely it needs more steps (--{limit})"
