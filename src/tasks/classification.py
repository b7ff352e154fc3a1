"""Text classification by a language model of any family: zero-shot, by the words of its labels, or fine-tuned.

Data: `label ||| text` a line (.txt), label and text with a tab between (.tsv), or objects with `label` and `text`
(.jsonl, .jsonl.gz). A label is one of the names, or its number, from 0. A text may be empty; one that is longer than
the context keeps its end, as a review says there what it thinks.
"""

import gzip
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from src.curves import GREY, INK, add_title, new_figure, save_picture
from src.dataset import Sample, collate_batch
from src.errors import UserError
from src.exits import ExitRule, max_depth
from src.layers import Attention
from src.losses import IGNORE
from src.runtime import autocast
from src.scoring import encode_pair, score_continuations
from src.tasks.config import SUFFIX

# ---- data -----------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    text: str
    label: int


def read_label_names(path) -> list[str]:
    """Names of the labels, in the order of their numbers, from a JSON list.  UserError where it is none."""
    advice = 'give a JSON list of two or more different names, such as ["bad", "good"]'
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"label_names {path}: {getattr(error, 'strerror', None) or 'is no JSON'}; {advice}") from None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
    if not is_list or len(set(names)) != len(names) or len(names) < 2:
        raise UserError(f"label_names {path}: {advice}")
    return names


def read_examples(path, names: list[str]) -> list[Example]:
    """All examples of a file.  UserError for a line without a label, or whose label is none of the names."""
    path, examples = Path(path), []
    index = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for number, (label, text) in _lines(path):
        if str(label) not in index:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise UserError(f"{path}, line {number}: label {label!r} is none of {known}: mend it, or the label names")
        examples.append(Example(text, index[str(label)]))
    if not examples:
        raise UserError(f"{path} holds no labelled text: give lines such as `1 ||| a good film`")
    return examples


def find_label_names(path) -> list[str]:
    """The labels that a file has, sorted, for want of names."""
    found = {str(label) for _, (label, _) in _lines(Path(path))}
    if found and all(label.isdecimal() for label in found):
        return [str(i) for i in range(max(map(int, found)) + 1)]
    return sorted(found)


def _lines(path):
    """(number from 1, (label, text)) of each line that is not blank."""
    name = path.name.removesuffix(".gz")
    split = {".jsonl": _split_json, ".tsv": _split_tabs}.get(Path(name).suffix, _split_bars)
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, split(line.decode("utf-8").rstrip("\r\n"))
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'is cut short'}; correct the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number} is not UTF-8 text: convert the file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def _split_bars(line):
    label, bars, text = line.partition("|||")
    if not bars:
        raise ValueError("there is no ` ||| ` between label and text: add the label")
    return label.strip(), text.strip()


def _split_tabs(line):
    label, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("there is no tab between label and text: add the label")
    return label.strip(), text.strip()


def _split_json(line):
    record = json.loads(line) if line.startswith("{") else None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "label" not in record:
        raise ValueError("this is no JSON object with `label` and `text`: mend it")
    return record["label"], record["text"]


def encode(examples: Iterable[Example], tokenizer, context: int) -> tuple[list[Sample], int]:
    """A Sample of each text, whose one target is the label, at its last token; and how many texts were cut.

    Rows are BOS and the last `context` - 1 tokens."""
    samples, cut = [], 0
    examples = list(examples)
    for example, ids in zip(examples, tokenizer.encode_batch([example.text for example in examples])):
        cut += len(ids) >= context
        ids = torch.tensor([tokenizer.bos_id] + ids[max(0, len(ids) - context + 1) :])
        targets = torch.full_like(ids, IGNORE)
        targets[-1] = example.label
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


def draw_confusion(found: Report, names: list[str], path, title: str = "") -> Path:
    """A picture (PNG) of the confusion matrix: rows are the true labels, shaded by their share of the row."""
    figure, grid = new_figure(1.8 + 0.6 * len(names))
    axes = figure.add_subplot(grid[:, :])
    shares = found.counts / found.counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in itertools.product(range(len(names)), repeat=2):
        color = "white" if shares[i, j] > 0.5 else INK
        cell = f"{found.counts[i, j].item():,}\n{shares[i, j].item():.0%}"
        axes.text(j, i, cell, fontsize=8, color=color, ha="center", va="center")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=9, color=GREY)
    axes.set_ylabel("true", fontsize=9, color=GREY)
    add_title(figure, title, f"accuracy {found.accuracy:.3f}, macro F1 {found.macro_f1:.3f}")
    return save_picture(figure, path)
