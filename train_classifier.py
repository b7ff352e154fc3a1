"""Classify text with a language model of any family, plain or recursive: zero-shot with a prompt, or fine-tuned.

    python train_classifier.py runs/trm --option prompt --label_names names.json --dev dev.txt     # without training
    python train_classifier.py runs/trm --option finetune --train train.txt --dev dev.txt --label_names names.json
    python train_classifier.py runs/trm --option finetune --train train.tsv --dev dev.tsv --tune lora --lr 1e-3
    python train_classifier.py runs/classifier --option predict --test new.txt --test_out runs/answers.txt
    python train_classifier.py runs/trm --option generate --prompt "I saw this movie and"

A data file has one example per line: `label ||| text` in .txt, a label and a text column in .tsv (in this order, or in
any order with a header that names them), or the fields `label` and `text` in .jsonl. A label is a name from
--label_names or its number, counted from 0; without --label_names it is any string. Texts to predict need no labels.
Answers are written with the same labels, in the order of the texts. Results go to stdout, messages to stderr.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src.config import before_torch, check_distinct, parse_flags, run, write_text
from src.errors import UserError
from src.tasks.config import SUFFIX, FinetuneConfig


@dataclass
class ClassifierConfig:
    """What to do, with which model and which texts.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is used
        option: prompt classifies zero-shot, finetune trains a classifier, predict uses a classifier that finetune
            trained, generate continues a prompt
        train: file of labelled texts to train on
        dev: file of labelled texts to measure accuracy on; with finetune they also select the best epoch
        test: file of texts to classify at the end; accuracy is printed if they have labels
        label_names: JSON file with the list of label names; if not given, finetune uses the labels in --train. With
            predict it says which label each number in the files means
        dev_out: file (.txt, .tsv, .jsonl) for the answers on --dev; by default, finetune writes save_dir/dev_out.txt
        test_out: file (.txt, .tsv, .jsonl) for the answers on --test; by default, finetune writes save_dir/test_out.txt
        suffix: text that follows each example in a zero-shot prompt; {labels} is replaced by the label names
        prompt: text that --option generate continues
        max_new_tokens: most tokens that --option generate adds
        generated_sentence_low_temp_out: file for the text that --option generate writes at temperature 0
        generated_sentence_high_temp_out: file for the text that --option generate writes at temperature 1
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of the arithmetic, in training and in prediction
    """

    checkpoint: str | None = None
    option: Literal["generate", "prompt", "finetune", "predict"] = "prompt"
    train: str | None = None
    dev: str | None = None
    test: str | None = None
    label_names: str | None = None
    dev_out: str | None = None
    test_out: str | None = None
    suffix: str = SUFFIX
    prompt: str = "I have wanted to see this thriller for a while, and it didn't disappoint. Keanu Reeves, playing"
    max_new_tokens: int = 75
    generated_sentence_low_temp_out: str | None = None
    generated_sentence_high_temp_out: str | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    def __post_init__(self):
        needs = {"prompt": ("label_names",), "finetune": ("train",)}.get(self.option, ())
        for name in needs:
            if getattr(self, name) is None:
                raise ValueError(f"option {self.option} needs --{name}")
        if self.option in ("prompt", "predict") and not (self.dev or self.test):
            raise ValueError(f"option {self.option} needs texts: give --dev or --test")
        names = ("dev_out", "test_out", "generated_sentence_low_temp_out", "generated_sentence_high_temp_out")
        check_distinct((getattr(self, n) for n in names), (self.train, self.dev, self.test, self.label_names))
        for name in names:
            path = getattr(self, name)
            if path is not None and path.lower().endswith(".gz"):
                raise ValueError(f"{name} is {path}, but the file is not compressed: leave out .gz")
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{name} {path}: its folder does not exist: create it first")


@before_torch
def parse_args(argv=None) -> tuple[ClassifierConfig, FinetuneConfig]:
    return tuple(parse_flags(__doc__, ClassifierConfig, FinetuneConfig, argv=argv, positional="checkpoint"))


import torch
from tqdm import tqdm

from src.checkpoint import load_model, read_info, resolve
from src.runtime import DTYPES, choose_device, choose_precision
from src.sampling import generate_ids
from src.tasks import classification as task
from src.tasks.finetune import finetune, load_classifier


def write_sentences(config, device, precision):
    """Continue the prompt at temperatures 0 and 1.  Prints both texts, and writes them to the files that are given."""
    model, tokenizer = load_model(config.checkpoint, device, DTYPES[precision])
    ids = torch.tensor([tokenizer.encode(config.prompt, bos=True)], device=device)
    outs = (config.generated_sentence_low_temp_out, config.generated_sentence_high_temp_out)
    for temperature, path in enumerate(outs):
        options = {"temperature": float(temperature), "seed": 0, "eos_id": tokenizer.end_ids}
        try:
            row = generate_ids(model, ids, config.max_new_tokens, **options)[0, ids.shape[1] :].tolist()
        except ValueError as error:
            raise UserError(error) from None
        row = list(itertools.takewhile(lambda index: index not in tokenizer.end_ids, row))
        text = tokenizer.decode(ids[0].tolist() + row)
        print(f"temperature {temperature}: {text}\n")
        if path is not None:
            write_text(path, text + "\n")


def read_examples(config, names, ordered, *parts) -> dict:
    """Returns {part: its examples} for those of the parts train, dev and test that have a file.

    ordered: a label may also be the position of a name."""
    paths = {part: getattr(config, part) for part in parts}
    labelled = ("train", "dev") if config.option == "finetune" else ()
    return {part: task.read_examples(path, names, part in labelled, ordered) for part, path in paths.items() if path}


def names_of(config, classifier) -> tuple[list[str], bool]:
    """Returns a classifier's label names, and whether they are in the order of the numbers that may stand for them.

    That is the order of --label_names, now or when it was trained. Names that were found in a file have no order."""
    if config.label_names is None:
        return classifier.names, read_info(resolve(config.checkpoint)).get("labels_are_numbered") is True
    names = task.read_label_names(config.label_names)
    if sorted(names) != sorted(classifier.names):
        known = ", ".join(classifier.names)
        raise UserError(f"--label_names {config.label_names}: the classifier knows other labels: {known}")
    return names, True


def zero_shot(config, device, precision):
    """Returns (examples by part, label names, score) for a zero-shot classifier.

    score(examples) returns scores (S, N, C): recursion steps, examples, labels."""
    names = task.read_label_names(config.label_names)
    model = load_model(config.checkpoint, device, DTYPES[precision])
    classifier = task.LlamaZeroShotClassifier(*model, names, config.suffix)

    def score(examples):
        with tqdm(unit="token", unit_scale=True) as bar:
            return classifier.by_depth([example.text for example in examples], bar=bar)

    return read_examples(config, names, True, "dev", "test"), names, score


def tuned(config, tuning, device, precision):
    """Returns the same as `zero_shot` for a fine-tuned classifier, which --option finetune trains first.

    Returns None if the training was interrupted."""
    if config.option == "finetune":
        ordered = config.label_names is not None
        names = task.read_label_names(config.label_names) if ordered else task.find_label_names(config.train)
        # all files are read now, so that mistakes in them show before the training
        examples = read_examples(config, names, ordered, "train", "dev", "test")
        train, dev = examples["train"], examples.get("dev", [])
        made = finetune(tuning, config.checkpoint, train, dev, names, device, precision, ordered)
        if made is None:
            return None
        classifier, tokenizer = made
    else:
        classifier, tokenizer = load_classifier(config.checkpoint, device)
        names, ordered = names_of(config, classifier)
        examples = read_examples(config, names, ordered, "dev", "test")
    columns = [classifier.names.index(name) for name in names]

    def score(examples):
        samples, _ = task.encode(examples, tokenizer, classifier.model.config.max_seq_len)
        with tqdm(total=len(samples), unit="text") as bar:
            return task.predict(classifier, samples, tuning.batch_size, precision, bar)[..., columns]

    return examples, names, score


def judge(part, examples, scores, names, out, spelt):
    """Write the answers of the last recursion step to the file `out`, and print how good they are.

    spelt: the labels as the data file writes them. Returns the report, or None if the texts have no labels."""
    answers, texts = scores.argmax(-1), [example.text for example in examples]
    written = [spelt[answer] for answer in answers[-1].tolist()]
    if out is not None:
        task.write_answers(out, written, texts)
    if examples[0].label is None:
        if out is None:
            print("".join(f"{label} ||| {' '.join(text.split())}\n" for label, text in zip(written, texts)), end="")
        print(f"{part}: {len(examples):,} texts without labels", file=sys.stderr)
        return None
    labels = task.labels_of(examples)
    found = task.report(answers[-1], labels, len(names))
    print(f"{part}: {len(examples):,} texts, accuracy {found.accuracy:.4f}, macro F1 {found.macro_f1:.4f}")
    if len(labels.unique()) == 1:
        print("all these texts have the same label: if it is a placeholder, the figures mean nothing")
    if len(answers) > 1:
        by_step = (f"{accuracy:.4f}" for accuracy in task.accuracies(scores, examples))
        print("accuracy by recursion step: " + ", ".join(by_step))
    width = max(len("label"), *map(len, names))
    print(f"{'label':>{width}}  precision  recall      F1  texts  answers")
    for i, (name, figures) in enumerate(zip(names, found.per_class)):
        cells = "  ".join(f"{figure:{size}.3f}" for figure, size in zip(figures, (9, 6, 6)))
        print(f"{name:>{width}}  {cells}  {found.counts[i].sum():5}  {found.counts[:, i].sum():7}")
    print()
    return found


def main(argv=None):
    config, tuning = parse_args(argv)
    device = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device)
    if precision == "fp16":  # what auto chooses on older GPUs
        print("fp32: this script has no loss scaling, which training in fp16 needs", file=sys.stderr)
        precision = "fp32"
    if config.option == "generate":
        return write_sentences(config, device, precision)
    folder = Path(tuning.save_dir) if config.option == "finetune" else None
    if config.option == "prompt":
        made = zero_shot(config, device, precision)
    else:
        made = tuned(config, tuning, device, precision)
    if made is None:
        return
    examples, names, score = made
    for part, out in (("dev", config.dev_out), ("test", config.test_out)):
        if part in examples:
            out = folder / f"{part}_out.txt" if out is None and folder else out
            spelt = task.spelling(getattr(config, part), names)
            found = judge(part, examples[part], score(examples[part]), names, out, spelt)
            if folder and found:
                title = f"{folder.name}: {part}, {len(examples[part]):,} texts"
                task.draw_confusion(found, names, folder / f"{part}_confusion.png", title)


if __name__ == "__main__":
    run(main)
