"""What the fuzzer breaks: for every kind of file that is read, whole ones made on the spot, and what is done with them.

A loader's `make` writes seeds, a folder each; `files` says which of their files are broken, and how; `use` loads what
lies in such a folder and does something cheap with it, which must work as well.
"""

import dataclasses
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

TEXTS = [
    "the cat sat on the mat\n",
    "don't say: I'll be 20!\n",
    "caf\u00e9s \u4eac\u90fd \U0001f600",
    "a b",
    "\n\n  x",
] * 4
TINY = {"vocab_size": 259, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_seq_len": 16}
PLAIN = TINY | {"recursion": "none", "norm": "pre", "n_kv_heads": 1}
MODELS = (
    TINY | {"pad_token_id": 256},
    TINY | {"recursion": "loop", "tie_embeddings": True, "positions": "learned", "injection": "concat", "prelude_layers": 1},
    PLAIN | {"n_layers": 2},
)  # fmt: skip


class Silent(Exception):
    """Something wrong was taken without a word."""


class Loader(NamedTuple):
    make: Callable  # folder: writes seeds into it
    files: dict[str, str]  # name in a seed -> kind of mutation
    use: Callable  # folder of a seed
    names_flags: bool = False  # its faults are told by flag, not by file


# ---- use ------------------------------------------------------------------------------------------------------------


def try_model(model, vocab_size):
    """Write a few tokens: greedily, as generate.py does."""
    from src.sampling import generate_ids

    if model.config.max_seq_len < 3 or not model.config.causal:
        return  # too short for a prompt, or for puzzles
    ids = generate_ids(model, torch.tensor([[1, 2, min(65, vocab_size - 1)]]) % vocab_size, 2, temperature=0)
    with torch.no_grad():
        logits = model(ids[:, : model.config.max_seq_len]).logits
    largest = max((parameter.abs().max() for parameter in model.parameters()), default=0)
    if not logits.isfinite().all() and largest < 1e9:
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
    """A model of another program: read, and used as convert.py's checkpoint would be."""
    from src.checkpoint import load_weights
    from src.interop import read_source
    from src.model import TRMModel

    source = read_source(path, tokenizer)
    model = TRMModel(source.config)
    load_weights(model, source.weights, path)
    try_model(model.eval(), source.tokenizer.vocab_size)
    try_tokenizer(source.tokenizer)
    json.dumps(source.info, allow_nan=False)


def use_tokenizer(path):
    from src.tokenizer import read_tokenizer

    try_tokenizer(read_tokenizer(path))


def use_onnx(folder):
    from src.onnx_session import load_onnx

    model, tokenizer = load_onnx(folder, threads=1)
    try_model(model, tokenizer.vocab_size)


def use_classifier(folder):
    from src.tasks.classification import Example, encode, predict
    from src.tasks.finetune import load_classifier

    classifier, tokenizer = load_classifier(folder)
    samples, _ = encode([Example("a", 0), Example("b c", 1)], tokenizer, classifier.model.config.max_seq_len)
    scores = predict(classifier, samples, 2)
    if scores.shape[-1] != len(classifier.names) or not scores.isfinite().all():
        raise Silent("scores that are not finite, or not one a label")


def use_corpus(path):
    from src.corpus import read_documents

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
    from src.curves import read_series, read_settings

    read_settings(folder)
    read_series(folder, "loss", "lr")


def use_settings(folder):
    """The scripts' own reading of --config."""
    import eval_lm
    import generate
    import train_classifier
    import train_trm_lm

    scripts = {"train": train_trm_lm, "generate": generate, "eval": eval_lm, "classifier": train_classifier}
    (path,) = folder.glob("*.yaml")
    scripts[path.stem].parse_args(["--config", str(path)])


def use_run(folder):
    """A run whose newest checkpoint is broken goes on, from the one before where it must, to its end."""
    import src.monitor
    from src.create import create_trainer
    from src.curves import read_metrics

    src.monitor.plot_learning_curve = lambda *args: None
    trainer = create_trainer(run_settings(folder, max_steps=4, resume=True))
    trainer.train()
    if trainer.step != 4 or [r["step"] for r in read_metrics(folder) if "loss" in r][-1] != 4:
        raise Silent(f"a run that ended at step {trainer.step}")
    if not all(p.isfinite().all() for p in trainer.raw.parameters()):
        raise Silent("weights that are not finite")


def run_settings(folder, **changes):
    from src.create import Settings

    Path("corpus.txt").write_text("".join(TEXTS))  # in the fuzzer's folder, as the cache
    os.utime("corpus.txt", (1, 1))
    values = TINY | {
        "train_paths": ["corpus.txt"],
        "valid_paths": ["corpus.txt"],
        "cache_dir": "cache",
        "tokenizer": "byte",
    }
    values |= {
        "batch_size": 2,
        "save_every": 1,
        "log_every": 1,
        "eval_batches": 1,
        "eval_every": 100,
        "warmup_steps": 1,
    }
    values |= {
        "sample_tokens": 0,
        "compile": False,
        "device": "cpu",
        "precision": "fp32",
        "save_dir": str(folder),
    } | changes
    kinds = Settings.__annotations__.values()
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    return Settings(*(kind(**{n: values[n] for n in own & values.keys()}) for kind, own in zip(kinds, names)))


# ---- seeds ----------------------------------------------------------------------------------------------------------


def lively(settings):
    from src.model import TRMConfig, TRMModel

    torch.manual_seed(0)
    return TRMModel(TRMConfig(**settings)).eval()


def make_checkpoints(folder):
    from src.checkpoint import save_checkpoint
    from src.tokenizer import read_tokenizer

    for number, settings in enumerate(MODELS):
        save_checkpoint(folder / str(number), lively(settings), read_tokenizer("byte"), info={"step": 1})


def make_classifier(folder):
    from src.checkpoint import save_checkpoint
    from src.tasks.classification import LlamaEmbeddingClassifier
    from src.tasks.finetune import CLASSIFIER_FILE
    from src.tokenizer import read_tokenizer

    model = lively(TINY)
    own = LlamaEmbeddingClassifier(model, ["bad", "good"]).classifier.state_dict()
    info = {"labels": ["bad", "good"], "step": 3, "dev_accuracy": 0.5}
    save_checkpoint(folder / "0", lively(TINY), read_tokenizer("byte"), info=info, more={CLASSIFIER_FILE: own})


def sentencepiece(kind="bpe"):
    from src.tokenizer_training import train_sentencepiece

    return train_sentencepiece(TEXTS, None, 290 if kind == "bpe" else 288, kind)


def make_sentencepiece(folder):
    for kind in ("bpe", "unigram"):
        sentencepiece(kind).save(folder / kind)


def make_tokenizer_json(folder):
    from src.tokenizer_training import train_tokenizer

    folder.mkdir(exist_ok=True)
    (folder / "t.txt").write_text("".join(TEXTS))
    for kind, size in (("bpe", 280), ("unigram", 290)):
        train_tokenizer(str(folder / "t.txt"), size, str(folder / kind / "tokenizer.json"), kind).save(folder / kind)
    (folder / "t.txt").unlink()


def make_tokenizer_bin(folder):
    pieces = [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"abcdehtm.",
        " t",
        " th",
        " the",
        "at",
    ]
    data = b"".join(struct.pack("<fi", -i, len(p.encode())) + p.encode() for i, p in enumerate(pieces))
    (folder / "0").mkdir()
    (folder / "0" / "tok.bin").write_bytes(struct.pack("<i", 7) + data)


def make_llama2c_bin(folder):
    from src.checkpoint import own_state
    from src.llama2c import write_bin

    for number, settings in enumerate((PLAIN, PLAIN | {"tie_embeddings": True, "n_layers": 2})):
        (folder / str(number)).mkdir()
        model = lively(settings)
        write_bin(folder / str(number) / "model.bin", model.config, own_state(model), "")


def make_llama2c_pt(folder):
    from src.checkpoint import own_state
    from src.llama import LLAMA2C, to_llama

    model = lively(PLAIN)
    args = {
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "vocab_size": 259,
        "multiple_of": 4,
        "max_seq_len": 16,
    }
    tensors = {name: tensor.clone() for name, tensor in to_llama(model.config, own_state(model), LLAMA2C).items()}
    (folder / "0").mkdir()
    state = {"model": tensors, "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(1.5)}
    torch.save(state, folder / "0" / "model.pt")


def make_hf(folder):
    from src.checkpoint import own_state
    from src.hf_llama import write_hf

    tokenizer = sentencepiece()
    settings = PLAIN | {"vocab_size": tokenizer.vocab_size}
    for name, more in (("plain", {}), ("yarn", {"tie_embeddings": True, "rope_scaling": 2.0, "rope_trained_len": 8})):
        model = lively(settings | more)
        write_hf(folder / name, model.config, own_state(model), tokenizer)


def make_hf_shards(folder):
    from safetensors.torch import load_file, save_file

    make_hf(folder)
    for seed in folder.iterdir():
        tensors = load_file(seed / "model.safetensors")
        names = sorted(tensors)
        shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        for name, own in shards.items():
            save_file({n: tensors[n] for n in own}, seed / name)
        (seed / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {n: name for name, own in shards.items() for n in own}}
        (seed / "model.safetensors.index.json").write_text(json.dumps(index))


def make_gguf(folder):
    import gguf

    from src.checkpoint import own_state
    from src.llama import GGUF, to_llama

    tokenizer = sentencepiece()
    sp, model = tokenizer._sp, lively(PLAIN | {"vocab_size": tokenizer.vocab_size})
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        for i in range(tokenizer.vocab_size)
    ]
    alphabet = [chr(b) for b in range(33, 127)] + [chr(b) for b in range(161, 256)] + [chr(256 + b) for b in range(70)]
    words = (alphabet + [f"<{i}>" for i in range(400)])[: tokenizer.vocab_size]
    tokenizers = {
        "llama": {"tokens": [sp.id_to_piece(i) for i in range(tokenizer.vocab_size)], "token_type": kinds,
                  "scores": [float(sp.get_score(i)) for i in range(tokenizer.vocab_size)], "unknown_token_id": 1},
        "gpt2": {"tokens": words, "token_type": [1] * 280 + [3] * (len(words) - 280), "pre": "gpt-2"},
    }  # fmt: skip
    for kind, own in tokenizers.items():
        (folder / kind).mkdir()
        writer = gguf.GGUFWriter(folder / kind / "model.gguf", "llama")
        fields = {
            "context_length": 16,
            "embedding_length": 16,
            "block_count": 1,
            "feed_forward_length": 16,
            "rope.dimension_count": 8,
        }
        fields |= {
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "rope.freq_base": 1e4,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        fields = {f"llama.{name}": value for name, value in fields.items()} | {"general.name": "Tiny"}
        fields |= {f"tokenizer.ggml.{name}": value for name, value in own.items()}
        fields |= {
            "tokenizer.ggml.model": kind,
            "tokenizer.ggml.bos_token_id": 2 if kind == "llama" else 285,
            "tokenizer.ggml.eos_token_id": 3 if kind == "llama" else 286,
        }
        for name, value in fields.items():
            add = {list: writer.add_array, str: writer.add_string, float: writer.add_float32}
            add.get(type(value), writer.add_uint32)(name, value)
        for name, tensor in to_llama(model.config, own_state(model), GGUF).items():
            writer.add_tensor(name, tensor.detach().numpy())
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()


def make_onnx(folder):
    from src.checkpoint import save_checkpoint
    from src.onnx_export import OnnxExport, export_onnx
    from src.tokenizer import read_tokenizer

    for name, more in (("fused", {"d_model": 32}), ("standard", {"enable_kv_cache": False})):
        settings = {
            key: more.get(key, value) for key, value in (TINY | {"recursion": "none", "pad_token_id": 256}).items()
        }
        save_checkpoint(folder / "checkpoint", lively(settings), read_tokenizer("byte"))
        export_onnx(OnnxExport(str(folder / "checkpoint"), str(folder / name), enable_kv_cache=name == "fused"))
    shutil.rmtree(folder / "checkpoint")


def make_corpus(folder):
    from texts import write

    for suffix in ("jsonl", "jsonl.gz", "txt", "parquet", "py"):
        seed = folder / suffix
        seed.mkdir()
        write(seed / f"a.{'txt' if suffix == 'py' else suffix}", TEXTS[:6])
        if suffix == "py":
            (seed / "a.txt").rename(seed / "a.py")


def make_labels(folder):
    import gzip

    rows = [("bad", "a film"), ("good", "caf\u00e9 "), ("0", "x"), ("bad", "")]
    files = {
        "a.txt": "".join(f"{label} ||| {text}\n" for label, text in rows),
        "a.tsv": "".join(f"{a}\t{b}\n" for a, b in rows),
    }
    files["a.jsonl"] = "".join(json.dumps({"label": a, "text": b}) + "\n" for a, b in rows)
    for name, text in files.items():
        (folder / name).mkdir()
        (folder / name / name).write_text(text)
    (folder / "gz").mkdir()
    (folder / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(files["a.jsonl"].encode()))


def make_label_names(folder):
    (folder / "0").mkdir()
    (folder / "0" / "names.json").write_text('["bad", "good"]')


def make_settings(folder):
    recipe = Path(__file__).resolve().parent.parent / "configs" / "adaptive.yaml"
    files = {"train": recipe.read_text(), "generate": "prompt: [a, b]\nmax_new_tokens: 5\ntop_p: 0.9\nexit: halt\n"}
    files["eval"] = "checkpoint: x\npaths: [a.txt]\nmax_docs: 3\nbatch_size: 2\n"
    files["classifier"] = "option: finetune\ntrain: a.txt\nlr: 1e-3\nepochs: 2\ntune: head\n"
    for name, text in files.items():
        (folder / name).mkdir()
        (folder / name / f"{name}.yaml").write_text(text)


def make_metrics(folder):
    seed = folder / "0"
    seed.mkdir()
    records = ({"step": i, "loss": 3.0 - i / 10, "lr": 1e-3, "tokens": 100 * i} for i in range(1, 8))
    (seed / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (seed / "config.yaml").write_text("lr: 0.001\nmonitoring:\n  wandb: false\n")


def make_run(folder):
    import src.monitor
    from src.create import create_trainer

    src.monitor.plot_learning_curve = lambda *args: None
    trainer = create_trainer(run_settings(folder / "0", max_steps=4, keep_checkpoints=3))
    step = trainer.train_step

    def stopping(batch):
        step(batch)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)

    trainer.train_step = stopping
    trainer.train()


LOADERS = {
    "config": Loader(make_checkpoints, {"config.json": "json"}, use_checkpoint),
    "weights": Loader(make_checkpoints, {"model.safetensors": "safetensors"}, use_checkpoint),
    "classifier": Loader(make_classifier, {"classifier.safetensors": "safetensors", "config.json": "json"}, use_classifier),
    "run state": Loader(make_run, {"step_00000002/state/training.pt": "pt", "step_00000002/ema.safetensors": "safetensors",
                                   "step_00000002/config.json": "json"}, use_run),
    "sentencepiece": Loader(make_sentencepiece, {"tokenizer.model": "sentencepiece"}, lambda f: use_tokenizer(f / "tokenizer.model")),
    "tokenizer.json": Loader(make_tokenizer_json, {"tokenizer.json": "json", "tokenizer_config.json": "json"}, use_tokenizer),
    "tokenizer.bin": Loader(make_tokenizer_bin, {"tok.bin": "bytes"}, lambda f: use_tokenizer(f / "tok.bin")),
    "llama2c .bin": Loader(make_llama2c_bin, {"model.bin": "bin"}, lambda f: use_source(f / "model.bin", "byte")),
    "llama2c .pt": Loader(make_llama2c_pt, {"model.pt": "pt"}, lambda f: use_source(f / "model.pt", "byte")),
    "hf": Loader(make_hf, {"config.json": "json", "model.safetensors": "safetensors"}, use_source),
    "hf shards": Loader(make_hf_shards, {"model.safetensors.index.json": "json", "a.safetensors": "safetensors"}, use_source),
    "gguf": Loader(make_gguf, {"model.gguf": "gguf"}, lambda f: use_source(f / "model.gguf")),
    "onnx": Loader(make_onnx, {"onnx.json": "json", "config.json": "json", "model.onnx": "onnx"}, use_onnx),
    "corpus": Loader(make_corpus, {"a.jsonl": "lines", "a.jsonl.gz": "gzip", "a.txt": "lines", "a.py": "lines",
                                   "a.parquet": "parquet"}, lambda f: use_corpus(next(f.glob("a.*")))),
    "labels": Loader(make_labels, {"a.txt": "lines", "a.tsv": "lines", "a.jsonl": "lines", "a.jsonl.gz": "gzip"},
                     lambda f: use_labels(next(f.glob("a.*")))),
    "label names": Loader(make_label_names, {"names.json": "json"}, lambda f: use_label_names(f / "names.json")),
    "settings": Loader(make_settings, {f"{n}.yaml": "yaml" for n in ("train", "generate", "eval", "classifier")}, use_settings, True),
    "metrics": Loader(make_metrics, {"metrics.jsonl": "lines", "config.yaml": "yaml"}, use_metrics),
}  # fmt: skip
