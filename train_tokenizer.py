"""Train a tokenizer.json (of the `tokenizers` library) on text: byte-level BPE, or unigram.

    python train_tokenizer.py --input train_texts.txt --model_prefix data/bpe
    python train_tokenizer.py --input wiki.jsonl.gz --model_prefix data/unigram --vocab_size 8000 --model_type unigram
    python train_trm_lm.py --train_paths train_texts.txt --tokenizer data/bpe.json

Writes {model_prefix}.json, which `transformers` and other programs read as well. The same text gives the same file,
byte for byte. The last 1 % of the text, at most 1 MB, is not trained on; bytes per token are measured there and printed
on stderr.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from src.config import parse_flags, run
from src.data.corpus import MAX_DOC_MB
from src.data.tokenizer_training import MAX_BYTES, train_tokenizer
from src.errors import UserError

VOCAB_SIZE = 16000


@dataclass
class TokenizerTrainingConfig:
    """What the vocabulary is made from.

    Args:
        input: text: files, globs, folders of .txt .jsonl (gzipped or not) .parquet .py
        model_prefix: path of the result without its .json
        vocab_size: number of tokens, with special tokens and bytes
        model_type: bpe (of bytes; fast to train) or unigram (of characters, as SentencePiece makes it)
        character_coverage: unigram: share of the text's characters that become tokens, the rest bytes
        max_bytes: train on about this many bytes of text, drawn at random, where there are more
        text_field: name of the text field (jsonl) or column (parquet)
        max_doc_mb: documents of .jsonl and .parquet longer than this (million characters) are skipped
        seed: of that draw
    """

    input: list[str] = field(default_factory=list)
    model_prefix: str = "tokenizer"
    vocab_size: int = VOCAB_SIZE
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    max_bytes: int = MAX_BYTES
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB
    seed: int = 0

    def __post_init__(self):
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"character_coverage is {self.character_coverage}; allowed is 0.9 to 1.0")
        if not os.path.basename(self.model_prefix):
            raise ValueError(f"model_prefix is {self.model_prefix!r}, which names no file: give it a name")


def parse_args(argv=None) -> TokenizerTrainingConfig:
    (config,) = parse_flags(__doc__, TokenizerTrainingConfig, argv=argv)
    if not config.input:
        raise UserError("--input is missing: give text files, globs or folders")
    return config


def main(argv=None):
    config = parse_args(argv)
    train_tokenizer(
        config.input,
        config.vocab_size,
        f"{config.model_prefix}.json",
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        max_bytes=config.max_bytes,
        text_field=config.text_field,
        seed=config.seed,
        max_doc_mb=config.max_doc_mb,
    )


if __name__ == "__main__":
    run(main)
