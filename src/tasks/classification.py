"""Text classification by a language model of any family: zero-shot, by the words of its labels, or fine-tuned.

Data: `label ||| text` a line (.txt), columns with a tab between (.tsv), or objects (.jsonl); gzipped or not. A header
line, or the keys of objects, name the columns (TEXT_NAMES, LABEL_NAMES); else the label comes first, or is left out.
Labels are the names that a file has, such as -1, 0, 1; with a JSON list of names also their numbers, from 0. A text may
be empty; of one that is longer than the context the end is kept, as a review says there what it thinks.
"""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from src.config import write_text
from src.data.samples import Sample, collate_batch
from src.errors import UserError
from src.evaluation.scoring import encode_pair, score_continuations
from src.exits import ExitRule, max_depth
from src.files.text import is_text, parse_json, read_json, read_lines
from src.layers import Attention
from src.losses import IGNORE
from src.runtime import autocast
from src.tasks.config import SUFFIX
from src.training.curves import GREY, INK, add_title, new_figure, save_picture

# ---- data -----------------------------------------------------------------------------------------------------------


TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "message", "tweet", "body")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "rating", "stars", "topic", "intent")
MOST_CLASSES = 1000
MOST_LABEL = 200  # characters
MISSING = {".tsv": "there is no tab between label and text", ".jsonl": "this is no JSON object with `label` and `text`"}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


class Example(NamedTuple):
    text: str
    label: int | None  # None where a file has texts alone


class Row(NamedTuple):
    number: int  # of the line, from 1
    label: str | None
    text: str


def read_label_names(path) -> list[str]:
    """Names of the labels, in the order of their numbers, from a JSON list.  UserError where it is none."""
    names = read_json(path, "label_names")
    is_list = isinstance(names, list) and all(isinstance(name, str) and _is_label(name) for name in names)
    names = [name.strip() for name in names] if is_list else []
    if len(set(names)) != len(names) or not 2 <= len(names) <= MOST_CLASSES:
        advice = f'give a JSON list of two or more different names, at most {MOST_CLASSES:,}, such as ["bad", "good"]'
        raise UserError(f"label_names {path}: {advice}")
    return names


def read_examples(path, names: list[str], needs_labels: bool = True) -> list[Example]:
    """All examples of a file.  UserError for a line without a label (where not one has any, only if needs_labels), or
    whose label is none of the names."""
    numbers = {} if any(map(_NUMBER.fullmatch, names)) else {str(i): i for i in range(len(names))}
    index = {None: None} | numbers | {name: i for i, name in enumerate(names)}
    rows = _read_rows(path, needs_labels)
    if wrong := next((row for row in rows if row.label not in index), None):
        known = ", ".join(f"{i} {name}" if numbers else name for i, name in enumerate(names))
        raise UserError(f"{path}, line {wrong.number}: label {wrong.label!r} is none of {known}: mend it, or the names")
    return [Example(row.text, index[row.label]) for row in rows]


def find_label_names(path) -> list[str]:
    """The labels that a file has, for want of names: numbers by size, then words.  UserError where they look like
    texts, or are too many or too few to be labels."""
    rows = _read_rows(path)
    labels, texts = [row.label for row in rows], {row.text for row in rows}
    names = set(labels)
    n_long = sum(len(label.split()) > 1 for label in labels)
    is_swapped = (
        (all(map(_NUMBER.fullmatch, texts)) and not all(map(_NUMBER.fullmatch, names)))
        or (2 * n_long > len(rows) and all(len(text.split()) < 2 for text in texts))
        or (len(names) == len(rows) >= max(4, 2 * len(texts)))
    )
    advice = "the label comes first; swap the columns, name them in a header line, or give --label_names"
    if is_swapped or len(names) > MOST_CLASSES or 20 < len(names) > len(rows) / 2:
        counts = f"{len(names):,} different labels in {len(rows):,} lines"
        raise UserError(f"{path}: {counts}, such as {labels[0]!r}: {advice}")
    if len(names) < 2:
        raise UserError(f"{path}: every text has the label {labels[0]!r}: give texts of two labels or more")
    return sorted(names, key=lambda name: (0, float(name), name) if _NUMBER.fullmatch(name) else (1, 0.0, name))


def spelling(path, names: list[str]) -> list[str]:
    """How a file writes each of the names: as its number, where the file has numbers, else as the name itself."""
    own = {row.label for row in _read_rows(path, needs_labels=False)} - {None, *names}
    return [str(i) for i in range(len(names))] if own else names


def write_answers(path, labels: list[str], texts: list[str]):
    """A file of labelled texts in the form that its name says, which `read_examples` reads."""
    kind, rows = Path(path).suffix.lower(), list(zip(labels, texts))
    if kind == ".jsonl":
        lines = [json.dumps({"label": label, "text": text}, ensure_ascii=False) for label, text in rows]
    else:
        bar = "\t" if kind == ".tsv" else " ||| "
        lines = [f"{label}{bar}{' '.join(text.splitlines())}" for label, text in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _read_rows(path, needs_labels=True) -> list[Row]:
    """The rows of a file that are not blank."""
    lines = []
    for number, line in read_lines(path):
        if line is None or not is_text(line):
            raise UserError(f"{path}, line {number} is {'too long' if line is None else 'not UTF-8'}: convert the file")
        if line.strip():
            lines.append((number, line.rstrip("\n")))
    kind = Path(str(path).lower().removesuffix(".gz")).suffix
    if kind == ".jsonl":
        rows = [_row_of_json(number, line, f"{path}, line {number}") for number, line in lines]
    else:
        rows = _rows_of_columns(lines, "\t" if kind == ".tsv" else "|||", path)
    if not rows:
        raise UserError(f"{path} holds no labelled text: give lines such as `1 ||| a good film`")
    needs_labels = needs_labels or any(row.label for row in rows)
    for number, label, _ in rows:
        if needs_labels and not label:
            missing = MISSING.get(kind, "there is no ` ||| ` between label and text")
            raise UserError(f"{path}, line {number}: {missing}, or the label is empty: add the label")
        if label and not _is_label(label):
            raise UserError(f"{path}, line {number}: {label[:60]!r} is no label: give a short name or a number")
    return [row._replace(label=row.label or None) for row in rows]


def _is_label(label):
    """Whether it can be written before a text and read back."""
    return bool(label.strip()) and len(label) <= MOST_LABEL and "|||" not in label and label.splitlines() == [label]


def _rows_of_columns(lines, bar, path):
    names = [cell.strip().lower() for cell in lines[0][1].split(bar)] if lines else []
    header = {name: names.index(name) for name in names}
    text, label = _first(header, TEXT_NAMES), _first(header, LABEL_NAMES)
    if text is None or label is None and bar != "\t":
        pairs = ((number, *line.partition(bar)) for number, line in lines)
        return [
            Row(number, start.strip() if found else None, (rest if found else start).strip())
            for number, start, found, rest in pairs
        ]
    rows, last = [], max(text, -1 if label is None else label)
    for number, line in lines[1:]:
        cells = line.split(bar, len(names) - 1)
        if len(cells) <= last:
            raise UserError(f"{path}, line {number} has {len(cells)} columns, the header {len(names)}: mend the line")
        rows.append(Row(number, None if label is None else cells[label].strip(), cells[text].strip()))
    return rows


def _row_of_json(number, line, where):
    record = parse_json(line, where)
    record = {key.lower(): value for key, value in record.items()} if isinstance(record, dict) else {}
    text, label = _first(record, TEXT_NAMES), _first(record, LABEL_NAMES)
    if not isinstance(text, str) or isinstance(label, (list, dict)):
        raise UserError(f"{where}: {MISSING['.jsonl']}: mend it")
    if isinstance(label, float) and label.is_integer():  # as tables write whole numbers where some are missing
        label = int(label)
    return Row(number, label.strip() if isinstance(label, str) else None if label is None else json.dumps(label), text)


def _first(values, names):
    """The value of the first of the names that there is, or None."""
    return next((values[name] for name in names if name in values), None)


def encode(examples: Iterable[Example], tokenizer, context: int) -> tuple[list[Sample], int]:
    """A Sample of each text, whose one target is the label, at its last token; and how many texts were cut.

    Rows begin as the model's texts do (`tokenizer.start`) and keep the last tokens that fit."""
    samples, cut, examples = [], 0, list(examples)
    for example, ids in zip(examples, tokenizer.encode_batch([example.text for example in examples])):
        room = context - tokenizer.add_bos
        cut += len(ids) > room
        ids = torch.tensor(tokenizer.start(ids[max(0, len(ids) - room) :]))
        targets = torch.full_like(ids, IGNORE)
        targets[-1] = IGNORE if example.label is None else example.label
        samples.append(Sample(ids, targets, None))
    return samples, cut


# ---- the two classifiers --------------------------------------------------------------------------------------------


class LlamaZeroShotClassifier:
    """Texts -> log-probabilities of label names as they would go on after text + suffix, without any training.

    suffix: what follows each text; `{labels}` in it becomes the names, joined. A name of several tokens is scored
    whole; of a text that is too long the end is kept."""

    def __init__(self, model, tokenizer, names: list[str], suffix: str = SUFFIX):
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.suffix = suffix.replace("{labels}", " or ".join(names) if len(names) == 2 else ", ".join(names))

    def __call__(
        self, texts: Iterable[str], batch_size: int = 8, rule: ExitRule | None = None, bar=None
    ) -> Float[Tensor, "n c"]:
        """(N, C) log-probabilities in nats, not normalised over the names.

        rule: when a token stops recursing, default the trained depth; bar counts tokens."""
        pairs = [encode_pair(self.tokenizer, text + self.suffix, name) for text in texts for name in self.names]
        scores = score_continuations(self.model, pairs, None, batch_size, rule, bar)
        return torch.tensor([score.logprob for score in scores]).view(-1, len(self.names))

    def by_depth(self, texts: list[str], batch_size: int = 8, bar=None) -> Float[Tensor, "s n c"]:
        """The same where every token takes 1, 2, ... recursion steps, up to the trained depth."""
        rules = (ExitRule("fixed", depth) for depth in range(1, max_depth(self.model.config) + 1))
        return torch.stack([self(texts, batch_size, rule, bar) for rule in rules])


class LlamaEmbeddingClassifier(nn.Module):
    """ids (B, T) -> logits (S, B, C), one answer per supervision step: dropout and a linear layer on the hidden state
    of the last real token.

    The language model is taken over: its head is put aside, so that its `logits` are the states before it, and its
    blocks drop as much as asked for here."""

    def __init__(self, model, names: list[str], dropout: float = 0.1):
        super().__init__()
        self.model, self.names, self._head = model, names, [model.head]  # in a list: no parameter of this module
        model.head = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if isinstance(module, Attention):
                module.dropout = dropout
        self.classifier = nn.Linear(model.config.d_model, len(names))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "s b c"]:
        states = self.model(input_ids, attention_mask=attention_mask, return_steps=True).logits  # (S, B, T, D)
        last = [-1] * len(input_ids) if attention_mask is None else attention_mask.sum(1) - 1
        states = states[:, torch.arange(len(input_ids)), last].to(self.classifier.weight.dtype)
        return self.classifier(self.dropout(states))

    @property
    def head(self) -> nn.Module:
        """The language model's own, as it was."""
        return self._head[0]


@torch.inference_mode()
def predict(
    classifier: LlamaEmbeddingClassifier, samples: list[Sample], batch_size: int = 32, precision: str = "fp32", bar=None
) -> Float[Tensor, "s n c"]:
    """(S, N, C) logits of all samples, in eval mode and in their order, whatever batches they were in."""
    device, was_training, logits = classifier.classifier.weight.device, classifier.training, {}
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    classifier.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {k: t.to(device) for k, t in collate_batch([samples[i] for i in rows]).items() if k != "target_ids"}
            with autocast(device, precision):
                answer = classifier(**batch).float().cpu()
            logits |= zip(rows, answer.unbind(1))
            if bar is not None:
                bar.update(len(rows))
    finally:
        classifier.train(was_training)
    return torch.stack([logits[i] for i in range(len(samples))], dim=1)


# ---- how good it is -------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """Figures of predictions; counts[i, j] texts of label i were taken for label j."""

    accuracy: float
    macro_f1: float  # mean of the F1 of the labels that occur
    counts: Int[Tensor, "c c"]
    per_class: list[tuple[float, float, float]]  # precision, recall, F1; nan where there is nothing to divide by


def labels_of(examples: Iterable[Example]) -> Int[Tensor, "n"]:
    return torch.tensor([example.label for example in examples])


def accuracies(scores: Float[Tensor, "s n c"], examples: Iterable[Example]) -> list[float]:
    """Share of right answers by recursion step."""
    return (scores.argmax(-1) == labels_of(examples)).double().mean(1).tolist()


def report(predicted: Int[Tensor, "n"], labels: Int[Tensor, "n"], n_classes: int) -> Report:
    """Accuracy, macro-averaged F1, the confusion matrix, and each class by itself."""
    counts = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)
    right, taken, there = counts.diag().double(), counts.sum(0), counts.sum(1)
    per_class = torch.stack((right / taken, right / there, 2 * right / (taken + there)), dim=1)
    macro_f1 = per_class[there > 0, 2].mean().item()
    return Report((right.sum() / len(labels)).item(), macro_f1, counts, [tuple(row) for row in per_class.tolist()])


MOST_NUMBERS = 20  # labels of a picture that has numbers in its cells; more of them are shaded only


def draw_confusion(found: Report, names: list[str], path, title: str = "") -> Path:
    """A picture (PNG) of the confusion matrix: rows are the true labels, shaded by their share of the row."""
    has_numbers = len(names) <= MOST_NUMBERS
    figure, grid = new_figure(1.8 + 0.6 * min(len(names), MOST_NUMBERS))
    axes = figure.add_subplot(grid[:, :])
    shares = found.counts / found.counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in itertools.product(range(len(names) * has_numbers), repeat=2):
        color = "white" if shares[i, j] > 0.5 else INK
        cell = f"{found.counts[i, j].item():,}\n{shares[i, j].item():.0%}"
        axes.text(j, i, cell, fontsize=8, color=color, ha="center", va="center")
    if has_numbers:  # else the axes count the labels
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=9, color=GREY)
    axes.set_ylabel("true", fontsize=9, color=GREY)
    add_title(figure, title, f"accuracy {found.accuracy:.3f}, macro F1 {found.macro_f1:.3f}")
    return save_picture(figure, path)
