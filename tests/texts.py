"""Small data files and helpers for tests of the data modules."""

import gzip
import io
import itertools
import json

import sentencepiece as spm
import torch

from src.data.readers import SEPARATOR
from src.data.token_store import tokenize_corpus
from src.tokenizer import ByteLevelTokenizer, TokenizerWrapper

BYTE = ByteLevelTokenizer()


def write(path, texts, field="text"):
    """Writes documents to a file in the format of its suffix; returns the path as a string."""
    name = str(path)
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({field: texts, "n": list(range(len(texts)))}), path)
    elif name.endswith(".txt"):
        path.write_bytes("".join(f"{text}\n{SEPARATOR}\n" for text in texts).encode())
    else:
        lines = "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return name


def write_records(path, rows):
    """Writes records (dicts) to a Path in the format of its suffix; returns the path as a string."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def usual_spm(folder):
    """A SentencePiece model of English with default settings. It loses line breaks, full-width letters and Japanese."""
    lines = iter(["the cat sat on the mat and the dog ate the full hat"] * 50)
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "usual"), **options)
    return TokenizerWrapper(str(folder / "usual.model"))


def store_of(tmp_path, texts, **options):
    """The TokenStore of documents, with one token per byte."""
    tmp_path.mkdir(exist_ok=True)
    path = write(tmp_path / "docs.jsonl", texts)
    return tokenize_corpus([path], BYTE, cache_dir=str(tmp_path / "cache"), **options)


def tokens_of(texts):
    return [i for text in texts for i in [*text.encode(), BYTE.eos_id]]


# each document below is one window, so that a batch shows which documents it has


def shards_of(tmp_path, n_shards, n_documents, letter="d"):
    """Writes files of every format. Each document has 7 characters: with EOS, one window of 8 tokens."""
    kinds = itertools.cycle((".jsonl.gz", ".parquet", ".txt", ".jsonl"))
    names = (tmp_path / f"{letter}{shard}{kind}" for shard, kind in zip(range(n_shards), kinds))
    numbers = itertools.count()
    return [write(path, [f"{letter}{next(numbers):06d}" for _ in range(n_documents)]) for path in names]


def documents(batch):
    """The document of each row."""
    return [bytes(row[:7]).decode() for row in batch["input_ids"].tolist()]


def take(loader, n):
    """The documents of the next n batches, one list per batch."""
    return [documents(next(loader)) for _ in range(n)]


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


def saved(state):
    """A state after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def install(folder, **licences):
    """Writes packages of one file, with the metadata that installers write.  licences: {name: line of METADATA}."""
    for name, licence in licences.items():
        (folder / name).mkdir()
        (folder / name / "a.py").write_text("x = 1\n" * 40 + name)
        info = folder / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\n{licence}\n")
        (info / "RECORD").write_text(f"{name}/a.py,,\n")
