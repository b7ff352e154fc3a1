"""Text classification with a language model of any family: zero-shot by the names of the labels, or fine-tuned.

Data files have one example per line: `label ||| text` (.txt), columns separated by tabs (.tsv), or JSON objects
(.jsonl). They may be gzipped. A header line or the keys of the objects name the columns (TEXT_NAMES, LABEL_NAMES).
Without a header, the label comes first; it may be missing. A label is a name, even if it looks like a number, such as
-1. If a JSON list of names is given, a file may also write a label as the position of its name in that list, from 0. A
text may be empty. Of a text that is longer than the context, the end is kept, because that is where a review gives its
verdict.
"""

import itertools
import json
import re
import unicodedata
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
OTHER_TYPES = {".arrow", ".csv", ".feather", ".json", ".parquet", ".xls", ".xlsx"}
MISSING = {
    ".tsv": "there is no tab between label and text, nor a header that names a column label",
    ".jsonl": "not a JSON object with `label` and `text`",
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


class Example(NamedTuple):
    text: str
    label: int | None  # None if the file has no labels


class Row(NamedTuple):
    number: int  # line number, from 1
    label: str | None
    text: str


def read_label_names(path) -> list[str]:
    """Reads the label names, in the order of their numbers, from a JSON list. Raises UserError for other content."""
    names = read_json(path, "label_names")
    is_list = isinstance(names, list) and all(isinstance(name, str) and _is_label(name) for name in names)
    names = list(map(_as_label, names)) if is_list else []
    if len(set(names)) != len(names) or not 2 <= len(names) <= MOST_CLASSES:
        advice = f'give a JSON list of two or more different names, at most {MOST_CLASSES:,}, such as ["bad", "good"]'
        raise UserError(f"label_names {path}: {advice}")
    return names


def read_examples(path, names: list[str], needs_labels: bool = True, takes_numbers: bool = True) -> list[Example]:
    """Reads all examples of a file. Raises UserError for a label that is not among the names, and for a missing label.

    With needs_labels false, a file in which no line has a label is accepted too. takes_numbers: a label may also be the
    position of a name. That is for names in an order of the user's, not for the sorted ones of `find_label_names`."""
    # if names are numbers themselves, a label is always a name
    are_numbers = any(map(_NUMBER.fullmatch, names))
    numbers = {str(i): i for i in range(len(names))} if takes_numbers and not are_numbers else {}
    index = {None: None} | numbers | {_as_label(name): i for i, name in enumerate(names)}
    rows = _read_rows(path, needs_labels)
    if wrong := next((row for row in rows if row.label not in index), None):
        known = ", ".join(f"{i} {name}" if numbers else name for i, name in enumerate(names))
        where = f"{path}, line {wrong.number}"
        is_unexplained = _NUMBER.fullmatch(wrong.label) and not (takes_numbers or are_numbers)
        advice = "say what the numbers mean with --label_names" if is_unexplained else "correct the label or the names"
        raise UserError(f"{where}: label {wrong.label!r} is not one of {known}: {advice}")
    return [Example(row.text, index[row.label]) for row in rows]


def find_label_names(path) -> list[str]:
    """Collects the label names from a file, numbers first and sorted by value, then words.

    Raises UserError if the labels look like texts, or if there are too many or too few different ones."""
    rows = _read_rows(path)
    labels, texts = [row.label for row in rows], {row.text for row in rows}
    names = set(labels)
    n_long = sum(len(label.split()) > 1 for label in labels)
    # The columns look swapped if the texts are numbers and the labels are not, if most labels have several words and no
    # text has, or if no label occurs twice but the same few texts do.
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
    """Returns how a file writes each label: as a number if the file uses numbers, otherwise as the name."""
    own = {row.label for row in _read_rows(path, needs_labels=False)} - {None, *map(_as_label, names)}
    return [str(i) for i in range(len(names))] if own else names


def write_answers(path, labels: list[str], texts: list[str]):
    """Writes labelled texts in the format of the file's ending. `read_examples` can read the file."""
    kind, rows = Path(path).suffix.lower(), list(zip(labels, texts))
    if kind == ".jsonl":
        lines = [json.dumps({"label": label, "text": text}, ensure_ascii=False) for label, text in rows]
    else:
        separator = "\t" if kind == ".tsv" else " ||| "
        lines = [f"{label}{separator}{' '.join(text.splitlines())}" for label, text in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _read_rows(path, needs_labels=True) -> list[Row]:
    """Reads the non-blank lines of a file as rows."""
    kind = Path(str(path).lower().removesuffix(".gz")).suffix
    if kind in OTHER_TYPES:
        raise UserError(f"{path}: files of labelled texts are .tsv, .jsonl or .txt, not {kind}: convert it")
    lines = []
    for number, line in read_lines(path):
        if line is None or not is_text(line):
            raise UserError(f"{path}, line {number} is {'too long' if line is None else 'not UTF-8'}: convert the file")
        line = line.removeprefix("\ufeff").rstrip("\n")  # a BOM may start any line of files that were joined
        if line.strip():
            lines.append((number, line))
    if kind == ".jsonl":
        rows = [_row_of_json(number, line, f"{path}, line {number}") for number, line in lines]
    else:
        rows = _rows_of_columns(lines, "\t" if kind == ".tsv" else "|||", path)
    if not rows:
        raise UserError(f"{path} has no labelled text: give lines such as `1 ||| a good film`")
    rows = [row._replace(label=row.label and _as_label(row.label)) for row in rows]
    needs_labels = needs_labels or any(row.label for row in rows)
    for number, label, _ in rows:
        if needs_labels and not label:
            missing = MISSING.get(kind, "there is no ` ||| ` between label and text")
            raise UserError(f"{path}, line {number}: {missing}, or the label is empty: add the label")
        if label and not _is_label(label):
            raise UserError(f"{path}, line {number}: {label[:60]!r} cannot be a label: use a short name or a number")
    return [row._replace(label=row.label or None) for row in rows]


def _as_label(text):
    """Returns the form in which labels are compared: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", text.strip())


def _is_label(label):
    """Returns whether a label can be written before a text and read back."""
    is_one_cell = "|||" not in label and "\t" not in label and label.splitlines() == [label]
    return bool(label.strip()) and len(label) <= MOST_LABEL and is_one_cell


def _rows_of_columns(lines, separator, path):
    names = [cell.strip().lower() for cell in lines[0][1].split(separator)] if lines else []
    header = {name: names.index(name) for name in names}
    text, label = _first(header, TEXT_NAMES), _first(header, LABEL_NAMES)
    if separator == "\t" and any(
        name != (bare := name.strip('"')) and bare in (*TEXT_NAMES, *LABEL_NAMES) for name in names
    ):
        raise UserError(f"{path}: its cells are in quotes: write it without quotes, or as .jsonl")
    if text is None or label is None and separator != "\t":  # the first line is not a header
        pairs = ((number, *line.partition(separator)) for number, line in lines)
        rows = [
            Row(number, start.strip() if found else None, (rest if found else start).strip())
            for number, start, found, rest in pairs
        ]
        first = rows[0].label.lower() if len(rows) > 1 and rows[0].label else None
        if first in LABEL_NAMES and all((row.label or "").lower() != first for row in rows[1:]):
            raise UserError(
                f"{path}, line 1 looks like a header, but {rows[0].text!r} is no known name of the text's column: "
                "rename that column to text, or remove the line"
            )
        return rows
    rows, last = [], max(text, -1 if label is None else label)
    for number, line in lines[1:]:
        cells = line.split(separator, len(names) - 1)  # the last column may contain the separator
        if len(cells) <= last:
            raise UserError(f"{path}, line {number} has {len(cells)} columns, the header {len(names)}: fix the line")
        rows.append(Row(number, None if label is None else cells[label].strip(), cells[text].strip()))
    return rows


def _row_of_json(number, line, where):
    record = parse_json(line, where)
    record = {key.lower(): value for key, value in record.items()} if isinstance(record, dict) else {}
    text, label = _first(record, TEXT_NAMES), _first(record, LABEL_NAMES)
    if not isinstance(text, str) or isinstance(label, (list, dict)):
        raise UserError(f"{where}: {MISSING['.jsonl']}: fix the line")
    if isinstance(label, float) and label.is_integer():  # pandas writes 1 as 1.0 if the column has gaps
        label = int(label)
    if isinstance(label, str):
        label = label.strip()
    elif label is not None:
        label = json.dumps(label)
    if not is_text(f"{label}{text}"):
        raise UserError(f"{where} has an escape for half a character, such as {chr(92)}ud800: remove it")
    return Row(number, label, text)


def _first(values, names):
    """Returns the value of the first name that `values` has, or None."""
    return next((values[name] for name in names if name in values), None)


def encode(examples: Iterable[Example], tokenizer, context: int) -> tuple[list[Sample], int]:
    """Returns a Sample for each text, and the number of texts that were cut.

    The only target of a sample is its label, at the last token. Rows start like the training texts
    (`tokenizer.start`) and keep the last tokens that fit the context."""
    samples, cut, examples = [], 0, list(examples)
    longest = context - tokenizer.add_bos
    for example, ids in zip(examples, tokenizer.encode_batch([example.text for example in examples])):
        cut += len(ids) > longest
        ids = torch.tensor(tokenizer.start(ids[max(0, len(ids) - longest) :]))
        targets = torch.full_like(ids, IGNORE)
        targets[-1] = IGNORE if example.label is None else example.label
        samples.append(Sample(ids, targets, None))
    return samples, cut


# ---- the two classifiers --------------------------------------------------------------------------------------------


class LlamaZeroShotClassifier:
    """Scores each label name as the continuation of text + suffix, without any training.

    suffix: added to each text; `{labels}` in it is replaced by the names, joined. All tokens of a name are scored. A
    text that is too long keeps its end."""

    def __init__(self, model, tokenizer, names: list[str], suffix: str = SUFFIX):
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.suffix = suffix.replace("{labels}", " or ".join(names) if len(names) == 2 else ", ".join(names))

    def __call__(
        self, texts: Iterable[str], batch_size: int = 8, rule: ExitRule | None = None, bar=None
    ) -> Float[Tensor, "n c"]:
        """Returns (N, C) log-probabilities in nats, not normalised over the names.

        rule: when a token stops recursing; default: the trained depth. bar counts tokens."""
        pairs = [encode_pair(self.tokenizer, text + self.suffix, name) for text in texts for name in self.names]
        scores = score_continuations(self.model, pairs, None, batch_size, rule, bar)
        return torch.tensor([score.logprob for score in scores]).view(-1, len(self.names))

    def by_depth(self, texts: list[str], batch_size: int = 8, bar=None) -> Float[Tensor, "s n c"]:
        """Returns (S, N, C) log-probabilities at fixed depths of 1, 2, ... recursion steps, up to the trained depth."""
        rules = (ExitRule("fixed", depth) for depth in range(1, max_depth(self.model.config) + 1))
        return torch.stack([self(texts, batch_size, rule, bar) for rule in rules])


class LlamaEmbeddingClassifier(nn.Module):
    """Applies dropout and a linear layer to the hidden state of the last real token: ids (B, T) -> logits (S, B, C).

    There is one answer for each of the S supervision steps. The classifier changes the language model it is given: it
    replaces the head by the identity, so that the model's `logits` are hidden states, and sets its dropout."""

    def __init__(self, model, names: list[str], dropout: float = 0.1):
        super().__init__()
        self.model, self.names, self._head = model, names, [model.head]  # a list hides it from parameters()
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
        """Returns the original head of the language model."""
        return self._head[0]


@torch.inference_mode()
def predict(
    classifier: LlamaEmbeddingClassifier, samples: list[Sample], batch_size: int = 32, precision: str = "fp32", bar=None
) -> Float[Tensor, "s n c"]:
    """Returns (S, N, C) logits of all samples in their order, computed in eval mode in batches of similar length."""
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


# ---- metrics --------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """Quality of predictions. counts[i, j] is the number of texts with label i that were predicted as label j."""

    accuracy: float
    macro_f1: float  # mean of the F1 of the labels that occur
    counts: Int[Tensor, "c c"]
    per_class: list[tuple[float, float, float]]  # precision, recall, F1; NaN if there is nothing to divide by


def labels_of(examples: Iterable[Example]) -> Int[Tensor, "n"]:
    return torch.tensor([example.label for example in examples])


def accuracies(scores: Float[Tensor, "s n c"], examples: Iterable[Example]) -> list[float]:
    """Returns the accuracy after each recursion step."""
    return (scores.argmax(-1) == labels_of(examples)).double().mean(1).tolist()


def report(predicted: Int[Tensor, "n"], labels: Int[Tensor, "n"], n_classes: int) -> Report:
    """Computes accuracy, macro-averaged F1, the confusion matrix, and precision, recall and F1 of each class."""
    counts = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)
    right, n_predicted, n_true = counts.diag().double(), counts.sum(0), counts.sum(1)
    per_class = torch.stack((right / n_predicted, right / n_true, 2 * right / (n_predicted + n_true)), dim=1)
    macro_f1 = per_class[n_true > 0, 2].mean().item()
    return Report((right.sum() / len(labels)).item(), macro_f1, counts, [tuple(row) for row in per_class.tolist()])


MOST_NUMBERS = 20  # with more labels than this, the cells of the picture have no numbers


def draw_confusion(found: Report, names: list[str], path, title: str = "") -> Path:
    """Draws the confusion matrix as a PNG. Rows are the true labels; a cell is shaded by its share of the row."""
    has_numbers = len(names) <= MOST_NUMBERS
    figure, grid = new_figure(1.8 + 0.6 * min(len(names), MOST_NUMBERS))
    axes = figure.add_subplot(grid[:, :])
    shares = found.counts / found.counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in itertools.product(range(len(names) * has_numbers), repeat=2):
        color = "white" if shares[i, j] > 0.5 else INK
        cell = f"{found.counts[i, j].item():,}\n{shares[i, j].item():.0%}"
        axes.text(j, i, cell, fontsize=8, color=color, ha="center", va="center")
    if has_numbers:  # otherwise the ticks are label numbers
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=9, color=GREY)
    axes.set_ylabel("true", fontsize=9, color=GREY)
    add_title(figure, title, f"accuracy {found.accuracy:.3f}, macro F1 {found.macro_f1:.3f}")
    return save_picture(figure, path)
