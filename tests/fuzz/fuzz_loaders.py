"""The fuzzer's loaders: how to make valid files of each kind, and how to load and use them.

A seed is a folder with valid files. `make` of a loader writes the seeds, `files` says which of their files to break and
how, and `use` loads a folder and runs something cheap with the result, which must work as well.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import fuzz_seeds as seeds
import torch
from fuzz_seeds import TEXTS, run_settings


class Silent(Exception):
    """Wrong data was accepted without an error."""


class Loader(NamedTuple):
    make: Callable  # make(folder) writes seeds into it
    files: dict[str, str]  # name in a seed -> kind of mutation
    use: Callable  # use(folder of a seed)
    names_flags: bool = False  # its messages name a flag rather than the file


# ---- use ------------------------------------------------------------------------------------------------------------


def try_model(model, vocab_size):
    """Generates a few tokens, greedily, as generate.py does."""
    from src.sampling import generate_ids

    if model.config.max_seq_len < 3 or not model.config.causal:
        return  # too short for a prompt, or not a language model
    ids = generate_ids(model, torch.tensor([[1, 2, min(65, vocab_size - 1)]]) % vocab_size, 2, temperature=0)
    with torch.no_grad():
        logits = model(ids[:, : model.config.max_seq_len]).logits
    if not logits.isfinite().all():
        raise Silent("logits that are not finite")


def try_tokenizer(tokenizer):
    for text in TEXTS[:5] + [""]:
        ids = tokenizer.encode(text, bos=True, eos=True)
        if not all(0 <= i < tokenizer.vocab_size for i in ids):
            raise Silent(f"ids outside the vocabulary of {tokenizer.vocab_size}")
        tokenizer.decode(ids)
    ends = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id
    tokenizer.decode([*range(min(tokenizer.vocab_size, 300)), *ends])


def use_checkpoint(folder):
    from src.checkpoint import load_model

    model, tokenizer = load_model(folder)
    try_model(model, tokenizer.vocab_size)


def use_source(path, tokenizer=None):
    """Reads a model of another program, and uses it like a checkpoint from convert.py."""
    from src.checkpoint import load_weights
    from src.interop.formats import read_source
    from src.model import TRMModel

    source = read_source(path, tokenizer)
    model = TRMModel(source.config)
    load_weights(model, source.weights, path)
    if source.config.causal:
        try_model(model.eval(), source.tokenizer.vocab_size)
        try_tokenizer(source.tokenizer)
    elif source.config.max_seq_len <= 1000:  # all_config.yaml may name a maze too large for this machine
        with torch.no_grad():
            model.eval()(torch.ones(1, source.config.max_seq_len, dtype=torch.int64), supervision_steps=1)
    json.dumps(source.info, allow_nan=False)


def use_tokenizer(path):
    from src.tokenizer import read_tokenizer

    try_tokenizer(read_tokenizer(path))


def use_onnx(folder):
    from src.onnx.session import load_onnx

    model, tokenizer = load_onnx(folder, threads=1)
    try_model(model, tokenizer.vocab_size)


def use_classifier(folder):
    from src.tasks.classification import Example, encode, predict
    from src.tasks.finetune import load_classifier

    classifier, tokenizer = load_classifier(folder)
    samples, _ = encode([Example("a", 0), Example("b c", 1)], tokenizer, classifier.model.config.max_seq_len)
    scores = predict(classifier, samples, 2)
    if scores.shape[-1] != len(classifier.names) or not scores.isfinite().all():
        raise Silent("scores that are not finite, or not one per label")


def use_corpus(path):
    from src.data.corpus import read_documents

    for text in read_documents([path]):
        text.encode()


def use_labels(path):
    from src.tasks.classification import find_label_names, read_examples

    names = find_label_names(path)
    if len(names) > 1000:
        raise Silent(f"{len(names)} labels")
    read_examples(path, names)


def use_label_names(path):
    from src.tasks.classification import read_label_names

    read_label_names(path)


def use_metrics(folder):
    from src.training.curves import read_series, read_settings

    read_settings(folder)
    read_series(folder, "loss", "lr")


def use_settings(folder):
    """Parses --config as the scripts do."""
    import eval_lm
    import generate
    import train_classifier
    import train_trm_lm

    scripts = {"train": train_trm_lm, "generate": generate, "eval": eval_lm, "classifier": train_classifier}
    (path,) = folder.glob("*.yaml")
    scripts[path.stem].parse_args(["--config", str(path)])


def use_run(folder):
    """Resumes a run whose newest checkpoint is broken, if need be from the one before, and finishes it."""
    import src.training.monitor
    from src.training.create import create_trainer
    from src.training.curves import read_series

    src.training.monitor.plot_learning_curve = lambda *args: None
    trainer = create_trainer(run_settings(folder, max_steps=3, resume=True))
    trainer.train()
    if trainer.step != 3 or read_series(folder, "loss")["loss"][-1, 0] != 3:
        raise Silent(f"a run that ended at step {trainer.step}")
    if not all(p.isfinite().all() for p in trainer.raw.parameters()):
        raise Silent("weights that are not finite")


LOADERS = {
    "config": Loader(seeds.make_checkpoints, {"config.json": "json"}, use_checkpoint),
    "weights": Loader(seeds.make_checkpoints, {"model.safetensors": "safetensors"}, use_checkpoint),
    "classifier": Loader(
        seeds.make_classifier, {"classifier.safetensors": "safetensors", "config.json": "json"}, use_classifier
    ),
    "run state": Loader(
        seeds.make_run,
        {
            "step_00000002/state/training.pt": "pt",
            "step_00000002/ema.safetensors": "safetensors",
            "step_00000002/config.json": "json",
        },
        use_run,
        True,
    ),
    "sentencepiece": Loader(
        seeds.make_sentencepiece, {"tokenizer.model": "sentencepiece"}, lambda f: use_tokenizer(f / "tokenizer.model")
    ),
    "tokenizer.json": Loader(
        seeds.make_tokenizer_json, {"tokenizer.json": "json", "tokenizer_config.json": "json"}, use_tokenizer
    ),
    "tokenizer.bin": Loader(seeds.make_tokenizer_bin, {"tok.bin": "bytes"}, lambda f: use_tokenizer(f / "tok.bin")),
    "llama2c .bin": Loader(seeds.make_llama2c_bin, {"model.bin": "bin"}, lambda f: use_source(f / "model.bin", "byte")),
    "llama2c .pt": Loader(seeds.make_llama2c_pt, {"model.pt": "pt"}, lambda f: use_source(f / "model.pt", "byte")),
    "trm authors .pt": Loader(
        seeds.make_trm_authors, {"model.pt": "pt", "all_config.yaml": "yaml"}, lambda f: use_source(f / "model.pt")
    ),
    "trm authors safetensors": Loader(
        seeds.make_trm_authors,
        {"model.safetensors": "safetensors", "all_config.yaml": "yaml"},
        lambda f: use_source(f / "model.safetensors"),
    ),
    "hf": Loader(seeds.make_hf, {"config.json": "json", "model.safetensors": "safetensors"}, use_source),
    "hf shards": Loader(
        seeds.make_hf_shards, {"model.safetensors.index.json": "json", "a.safetensors": "safetensors"}, use_source
    ),
    "gguf": Loader(seeds.make_gguf, {"model.gguf": "gguf"}, lambda f: use_source(f / "model.gguf")),
    "onnx": Loader(seeds.make_onnx, {"onnx.json": "json", "config.json": "json", "model.onnx": "onnx"}, use_onnx),
    "corpus": Loader(
        seeds.make_corpus,
        {"a.jsonl": "lines", "a.jsonl.gz": "gzip", "a.txt": "lines", "a.py": "lines", "a.parquet": "parquet"},
        lambda f: use_corpus(next(f.glob("a.*"))),
    ),
    "labels": Loader(
        seeds.make_labels,
        {"a.txt": "lines", "a.tsv": "lines", "a.jsonl": "lines", "a.jsonl.gz": "gzip"},
        lambda f: use_labels(next(f.glob("a.*"))),
    ),
    "label names": Loader(seeds.make_label_names, {"names.json": "json"}, lambda f: use_label_names(f / "names.json")),
    "settings": Loader(
        seeds.make_settings,
        {f"{n}.yaml": "yaml" for n in ("train", "generate", "eval", "classifier")},
        use_settings,
        True,
    ),
    "metrics": Loader(seeds.make_metrics, {"metrics.jsonl": "lines", "config.yaml": "yaml"}, use_metrics),
}
