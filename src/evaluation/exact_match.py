"""Exact match: a model answers the questions of records, and its answers are compared with theirs, as strings.

A model continues `Input: <question> \\n Output:` until EOS, greedily, once for each number of recursion steps. An
answer is right if `final_answer` of its text equals that of the record: for GSM8K, what follows the last ####. Answers
are never evaluated in any other way.

best of N: N answers are sampled at temperature 1, and the one with the highest log-probability under the model counts.
A record that does not fit the context together with its answer is skipped and counted.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from src.data.records import Record, answer_of, as_text, final_answer, prompt_of
from src.errors import UserError
from src.evaluation.answer_config import AnswerConfig
from src.evaluation.scoring import score_continuations
from src.exits import ExitRule
from src.runtime import mix_seed, share_cores
from src.sampling import generate, left_padded
from src.training.curves import GREY, INK, add_title, new_figure, save_picture, style_axes

ROWS = 256  # answers generated at once
MOST_LEVELS = 16  # more values of a numeric difficulty are grouped in ranges with equal numbers of questions
SHOWN = 8  # depths in a table


class Question(NamedTuple):
    """A record in the form in which a model sees it."""

    record: Record
    prompt: list[int]
    n_answer: int  # tokens of the record's answer, without EOS
    expected: str
    level: int | float | str  # difficulty


class Answers(NamedTuple):
    """The answers to N questions at each of S depths."""

    questions: list[Question]
    depths: list[int]  # recursion steps
    greedy: list[list[str]]  # (S, N)
    best: list[list[str]] | None  # (S, N) the likeliest of several samples

    def is_right(self, texts: list[list[str]]) -> Bool[np.ndarray, "s n"]:
        """Returns whether each answer is right. texts: `greedy` or `best`."""
        expected = [question.expected for question in self.questions]
        return np.array([[final_answer(text) == right for text, right in zip(row, expected)] for row in texts])


def read_questions(
    records: Iterable[Record], tokenizer, context: int, difficulty_field: str | None = None, most: int | None = None
) -> tuple[list[Question], int]:
    """Returns (the questions of at most `most` records, number of records skipped because they exceed the context).

    difficulty_field: field of the records with their difficulty. Default: `difficulty` where a record has it, else the
    number of digits of the longest number in the question. Raises UserError if no record is left, or if a record lacks
    the difficulty_field."""
    questions, skipped = [], 0
    for record in records:
        prompt = tokenizer.encode(prompt_of(record.question), bos=True)
        n_answer = len(tokenizer.encode(answer_of(record.answer)))
        level = difficulty_of(record, difficulty_field)
        if len(prompt) + n_answer > context:
            skipped += 1
            continue
        questions.append(Question(record, prompt, n_answer, final_answer(record.answer), level))
        if len(questions) == most:
            break
    if not questions:
        longer = f"all {skipped} records are longer than the model's context of {context} tokens"
        raise UserError(f"no question to answer: {longer}; use shorter ones, or a model with a larger max_seq_len")
    return questions, skipped


def difficulty_of(record: Record, field: str | None = None) -> int | float | str:
    """Returns the difficulty of a record; see `read_questions`."""
    if field is not None and field not in record.extra:
        has = ", ".join(record.extra) or "none"
        raise UserError(f"{record.path}, record {record.line} has no field {field!r}; further fields: {has}")
    value = record.extra.get("difficulty" if field is None else field)
    if value is None or value != value:  # NaN: an empty cell of a table
        numbers = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", record.question))
        return max((len(number.lstrip("0")) or 1 for number in numbers), default=0)
    is_number = type(value) in (int, float) and abs(value) < float("inf")
    return value if is_number else str(value)


def answer_all(
    model,
    tokenizer,
    questions: list[Question],
    depths: list[int],
    max_new_tokens: int | None = None,
    best_of: int = 0,
    rows: int = ROWS,
    seed: int = 0,
    bar: tqdm | None = None,
) -> Answers:
    """Answers all questions at each depth, `rows` answers at a time.

    max_new_tokens: most tokens of an answer with EOS; default one more than the longest expected answer has. best_of:
    samples of which the likeliest counts; 0 = greedy answers only. bar counts answers."""
    limit = max_new_tokens or 1 + max(question.n_answer for question in questions)
    greedy, best = [], [] if best_of else None
    for depth in depths:
        writer = _Writer(model, tokenizer, ExitRule(max_recursion_depth=depth), limit, rows, bar)
        greedy.append(_in_order(questions, writer.greedy(questions)))
        if best_of:
            best.append(_in_order(questions, writer.likeliest(questions, best_of, seed)))
    return Answers(questions, depths, greedy, best)


def _in_order(questions, answers):
    texts = dict(answers)
    return [texts[number] for number in range(len(questions))]


class Found(NamedTuple):
    """What `measure` found."""

    figures: dict  # see `figures_of`
    wrong: list[dict]  # see `wrong_answers`
    skipped: int  # records that exceed the context


def measure(
    model, tokenizer, records: Iterable[Record], config: AnswerConfig, depth: int, most: int | None, rows: int | None
) -> Found:
    """Answers the questions of at most `most` records after 1, 2, ..., `depth` recursion steps, `rows` at a time.

    Raises UserError as `read_questions` does."""
    context, best_of = model.config.max_seq_len, config.best_of or 0
    questions, skipped = read_questions(records, tokenizer, context, config.difficulty_field, most)
    depths = list(range(1, depth + 1))
    with tqdm(total=len(questions) * depth * (1 + best_of), unit="answer") as bar:
        options = {"rows": rows or ROWS, "bar": bar}
        answers = answer_all(model, tokenizer, questions, depths, config.max_new_tokens, best_of, **options)
    return Found(figures_of(answers), list(wrong_answers(answers)), skipped)


class _Writer(NamedTuple):
    """How answers are generated. Both methods yield (number of the question, text of the answer)."""

    model: torch.nn.Module
    tokenizer: object
    rule: ExitRule
    limit: int  # tokens of an answer with EOS
    rows: int
    bar: tqdm | None

    def greedy(self, questions) -> Iterator[tuple[int, str]]:
        for numbers in _batches(questions, self.rows):
            for number, ids in zip(numbers, self._write([questions[n].prompt for n in numbers])):
                yield number, self.tokenizer.decode(ids)

    def likeliest(self, questions, n_samples, seed) -> Iterator[tuple[int, str]]:
        for batch, numbers in enumerate(_batches(questions, max(1, self.rows // n_samples))):
            prompts = [questions[number].prompt for number in numbers for _ in range(n_samples)]
            written = self._write(prompts, temperature=1.0, seed=mix_seed(seed, batch))
            pairs = sorted({(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, written)})
            ended = [(list(prompt), [*ids, self.tokenizer.eos_id]) for prompt, ids in pairs]
            scores = score_continuations(self.model, ended, batch_size=self.rows, rule=self.rule)
            score_of = {pair: score.logprob for pair, score in zip(pairs, scores)}
            for row, number in enumerate(numbers):
                samples = [tuple(ids) for ids in written[row * n_samples : (row + 1) * n_samples]]
                prompt = tuple(questions[number].prompt)
                yield number, self.tokenizer.decode(max(samples, key=lambda ids, p=prompt: score_of[p, ids]))

    def _write(self, prompts: list[list[int]], temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        """Returns the ids of one answer to each prompt, up to but without EOS."""
        ids, mask = left_padded(prompts, self.tokenizer.pad_id, self.model.embed.weight.device)
        options = {"temperature": temperature, "seed": seed, "eos_id": self.tokenizer.end_ids, "exit": self.rule}
        steps = generate(self.model, ids, self.limit, attention_mask=mask, **options)
        made = torch.stack(list(share_cores(steps)), dim=1).tolist()
        if self.bar is not None:
            self.bar.update(len(prompts))
        ends = set(self.tokenizer.end_ids)
        return [row[: next((i for i, index in enumerate(row) if index in ends), len(row))] for row in made]


def _batches(questions, rows) -> Iterator[list[int]]:
    """Yields the numbers of questions in batches of similar length: little padding, and answers end together."""
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), questions[i].n_answer))
    return (order[start : start + rows] for start in range(0, len(order), rows))


# ---- figures --------------------------------------------------------------------------------------------------------


def by_level(questions: list[Question]) -> dict[str, Bool[np.ndarray, "n"]]:
    """Returns {difficulty: which questions have it}, easiest first."""
    levels = [question.level for question in questions]
    is_number = all(not isinstance(level, str) for level in levels)
    values = sorted(set(levels)) if is_number else sorted({str(level) for level in levels})
    levels = np.array(levels if is_number else [str(level) for level in levels])
    if not is_number or len(values) <= MOST_LEVELS:
        return {as_text(value) if is_number else value: levels == value for value in values}
    starts = sorted({part[0] for part in np.array_split(np.sort(levels), MOST_LEVELS)})
    groups = np.searchsorted(starts, levels, side="right") - 1
    members = [groups == i for i in range(len(starts))]
    ends = [(levels[is_in].min().item(), levels[is_in].max().item()) for is_in in members]
    return {f"{as_text(low)} to {as_text(high)}": is_in for (low, high), is_in in zip(ends, members)}


def figures_of(answers: Answers) -> dict:
    """Returns the figures for the JSON file: exact match at each depth, of all questions and of each difficulty."""
    right = answers.is_right(answers.greedy)
    figures = {"records": len(answers.questions), "depths": answers.depths, "exact": right.mean(1).tolist()}
    if answers.best is not None:
        figures["exact_best"] = answers.is_right(answers.best).mean(1).tolist()
    figures["by_difficulty"] = {
        level: {"records": int(is_in.sum()), "exact": right[:, is_in].mean(1).tolist()}
        for level, is_in in by_level(answers.questions).items()
    }
    return figures


def tables(figures: dict, best_of: int | None = None) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yields (names of the columns, rows) of two tables: by depth, and by difficulty and depth."""
    columns = [figures["exact"]] + ([figures["exact_best"]] if best_of else [])
    rows = [[str(depth), *(f"{share:.2%}" for share in row)] for depth, *row in zip(figures["depths"], *columns)]
    yield ["depth", "exact", *([f"best of {best_of}"] if best_of else [])], rows
    shown = sorted({round(i) for i in np.linspace(0, len(figures["depths"]) - 1, SHOWN)})
    levels = figures["by_difficulty"].items()
    rows = [[level, f"{f['records']:,}", *(f"{f['exact'][i]:.2%}" for i in shown)] for level, f in levels]
    yield ["difficulty", "records", *(f"depth {figures['depths'][i]}" for i in shown)], rows


def wrong_answers(answers: Answers) -> Iterator[dict]:
    """Yields each wrong greedy answer with its question, the expected answer and the depth; the last depth first."""
    for depth, texts, right in zip(answers.depths[::-1], answers.greedy[::-1], answers.is_right(answers.greedy)[::-1]):
        for question, text, is_right in zip(answers.questions, texts, right):
            if not is_right:
                record, got = question.record, final_answer(text)
                place = {"path": record.path, "line": record.line}
                yield {"question": record.question, "expected": question.expected, "got": got, "depth": depth} | place


def draw_exact_match(figures: dict, path: str, title: str = "", remark: str = ""):
    """Draws exact match as a heat map over difficulty and depth, as a PNG."""
    levels, depths = figures["by_difficulty"], figures["depths"]
    share = np.array([values["exact"] for values in levels.values()]).T  # (depths, levels)
    figure, grid = new_figure(min(9.0, 2.2 + 0.42 * len(depths)))
    axes = figure.add_subplot(grid[:, :])
    style_axes(axes, "share of right answers")
    axes.grid(visible=False)
    image = axes.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xticks(range(len(levels)), list(levels), rotation=30 if max(map(len, levels)) > 6 else 0)
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("difficulty", fontsize=9, color=GREY)
    axes.set_ylabel("recursion steps", fontsize=9, color=GREY)
    if len(levels) <= 20:
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value < 0.6 else INK
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=8, colors=GREY)
    add_title(figure, title, remark)
    return save_picture(figure, path)
