"""Makes valid files for the fuzzer. Each function writes seeds into a folder, one subfolder per seed."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import torch
from fuzz_formats import write_gguf

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
    TINY
    | {"recursion": "loop", "tie_embeddings": True, "positions": "learned", "injection": "concat", "prelude_layers": 1},
    PLAIN | {"n_layers": 2},
)


def run_settings(folder, **changes):
    from src.training.create import Settings

    Path("corpus.txt").write_text("".join(TEXTS))  # in the fuzzer's working folder, like the cache
    os.utime("corpus.txt", (1, 1))
    values = TINY | {"latent_steps": 1, "deep_steps": 1, "supervision_steps": 1}
    values |= {
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
    from src.data.tokenizer_training import train_sentencepiece

    return train_sentencepiece(TEXTS, None, 290 if kind == "bpe" else 288, kind)


def make_sentencepiece(folder):
    for kind in ("bpe", "unigram"):
        sentencepiece(kind).save(folder / kind)


def make_tokenizer_json(folder):
    from src.data.tokenizer_training import train_tokenizer

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
    from src.interop.llama2c import write_bin

    for number, settings in enumerate((PLAIN, PLAIN | {"tie_embeddings": True, "n_layers": 2})):
        (folder / str(number)).mkdir()
        model = lively(settings)
        write_bin(folder / str(number) / "model.bin", model.config, own_state(model), "")


def make_llama2c_pt(folder):
    from src.checkpoint import own_state
    from src.interop.llama import LLAMA2C, to_llama

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


def make_trm_authors(folder):
    """Weights of the TRM authors' code, as .pt and as .safetensors, for several puzzles."""
    from safetensors.torch import save_file

    from src.checkpoint import own_state
    from src.interop.trm_official import write_files

    base = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 256, "causal": False, "norm_gain": False}
    base |= {"vocab_size": 6, "max_seq_len": 16, "latent_steps": 1, "deep_steps": 1, "embed_scale": 4.0}
    mixing = {"mixer": "mlp", "mixer_ff": 256, "positions": "none", "prefix_tokens": 2, "puzzle_ids": 3}
    learned = {"vocab_size": 11, "max_seq_len": 81, "positions": "learned", "embed_scale": 8**0.5}
    for number, settings in enumerate((base, base | mixing, base | learned)):
        seed = folder / str(number)
        seed.mkdir()
        model = lively(settings)
        write_files(seed / "model.pt", model.config, own_state(model), "")
        save_file(torch.load(seed / "model.pt", weights_only=True), seed / "model.safetensors")


def make_hf(folder):
    from src.checkpoint import own_state
    from src.interop.hf_llama import write_hf

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
    from src.interop.llama import GGUF, to_llama

    tokenizer = sentencepiece()
    sp, model = tokenizer._sp, lively(PLAIN | {"vocab_size": tokenizer.vocab_size})
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        for i in range(tokenizer.vocab_size)
    ]
    alphabet = [chr(b) for b in range(33, 127)] + [chr(b) for b in range(161, 256)] + [chr(256 + b) for b in range(70)]
    words = (alphabet + [f"<{i}>" for i in range(400)])[: tokenizer.vocab_size]
    tokenizers = {
        "llama": {
            "tokens": [sp.id_to_piece(i) for i in range(tokenizer.vocab_size)],
            "token_type": kinds,
            "scores": [float(sp.get_score(i)) for i in range(tokenizer.vocab_size)],
            "unknown_token_id": 1,
        },
        "gpt2": {"tokens": words, "token_type": [1] * 280 + [3] * (len(words) - 280), "pre": "gpt-2"},
    }
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
        write_gguf(writer)


def make_onnx(folder):
    from src.checkpoint import save_checkpoint
    from src.onnx.export import OnnxExport, export_onnx
    from src.tokenizer import read_tokenizer

    model = lively(TINY | {"d_model": 32, "recursion": "none", "pad_token_id": 256})
    save_checkpoint(folder / "checkpoint", model, read_tokenizer("byte"))
    export_onnx(OnnxExport(str(folder / "checkpoint"), str(folder / "0")))
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
    recipe = Path(__file__).resolve().parents[2] / "configs" / "adaptive.yaml"
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
    import src.training.monitor
    from src.training.create import create_trainer

    src.training.monitor.plot_learning_curve = lambda *args: None
    trainer = create_trainer(run_settings(folder / "0", max_steps=3, keep_checkpoints=3))
    step = trainer.train_step

    def stopping(batch):
        step(batch)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)

    trainer.train_step = stopping
    trainer.train()
