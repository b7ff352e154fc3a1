"""Train a tokenizer.json on your text (the format of Hugging Face's `tokenizers`): byte-level BPE or unigram.

    python train_tokenizer.py --input train_texts.txt --model_prefix data/bpe
    python train_tokenizer.py --input wiki.jsonl.gz --model_prefix data/unigram --vocab_size 8000 --model_type unigram
    python train_tokenizer.py --input site-packages --model_prefix data/code --fim true   # for fill-in-the-middle
    python train_tokenizer.py --input gsm8k/train.jsonl --records --model_prefix data/maths --vocab_size 1000
    python train_trm_lm.py --train_paths train_texts.txt --tokenizer data/bpe.json     # train a model with it

Writes {model_prefix}.json, which `transformers` and other programs can also read. The same text always gives the same
file, byte for byte. The last 1 % of the text (at most 1 MB) is held back from training. The mean number of bytes per
token is measured on it and printed on stderr: more bytes per token mean shorter sequences.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from src.config import check_distinct, parse_flags, run
from src.data.corpus import MAX_DOC_MB, find_files, suffixes_of
from src.data.records import RecordsConfig
from src.data.tokenizer_training import MAX_BYTES, train_tokenizer
from src.errors import UserError

VOCAB_SIZE = 16000
MOST_VOCAB = 2**24  # the library sets memory aside for each token, and aborts if it gets none


@dataclass
class TokenizerTrainingConfig:
    """The text, and the kind of tokenizer.

    Args:
        input: text to train on: files, globs or folders (data/README.md lists the formats)
        model_prefix: path of the output file without the suffix .json
        vocab_size: number of tokens, including special tokens and bytes
        model_type: algorithm: bpe merges bytes (faster to train); unigram works on characters, like SentencePiece
        character_coverage: share of the characters in the text that get a token of their own, from 0.9 to 1; rarer
            characters are written as bytes. Used by unigram only
        split_digits: make each digit a token of its own; if false, frequent numbers can be one token
        max_bytes: train on about this many bytes of text, chosen at random if there are more
        text_field: name of the JSON field or parquet column that holds the text
        max_doc_mb: skip .jsonl and .parquet documents longer than this many million characters
        fim: add the sentinels of fill-in-the-middle, which `train_trm_lm.py --fim_rate` needs
        seed: random seed for choosing the text
    """

    input: list[str] = field(default_factory=list)
    model_prefix: str = "tokenizer"
    vocab_size: int = VOCAB_SIZE
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    split_digits: bool = True
    max_bytes: int = MAX_BYTES
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB
    fim: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "max_bytes"):
            if not 1 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if self.vocab_size > MOST_VOCAB:
            raise ValueError(f"vocab_size is {self.vocab_size}: set it to at most {MOST_VOCAB}")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"character_coverage is {self.character_coverage}: set it from 0.9 to 1.0")
        if not os.path.basename(self.model_prefix):
            raise ValueError(f"model_prefix is {self.model_prefix!r}, which has no file name: add one")


def parse_args(argv=None):
    config, records = parse_flags(__doc__, TokenizerTrainingConfig, RecordsConfig, argv=argv)
    if not config.input:
        raise UserError("--input is missing: give text files, globs or folders")
    return config, records.in_place_of(config.text_field)


def main(argv=None):
    config, text_field = parse_args(argv)
    output = f"{config.model_prefix}.json"
    check_distinct([output], find_files(config.input, suffixes_of(text_field)))
    train_tokenizer(
        config.input,
        config.vocab_size,
        output,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        max_bytes=config.max_bytes,
        text_field=text_field,
        split_digits=config.split_digits,
        seed=config.seed,
        max_doc_mb=config.max_doc_mb,
        fim=config.fim,
    )


if __name__ == "__main__":
    run(main)
