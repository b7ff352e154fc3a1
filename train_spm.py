"""Train a SentencePiece tokenizer on your text.

    python train_spm.py --input train_texts.txt --model_prefix data/spm
    python train_spm.py --input wiki.jsonl.gz --model_prefix data/spm --vocab_size 8000 --model_type unigram
    python train_spm.py --input novel.txt --model_prefix data/char --model_type char --byte_fallback false
    python train_spm.py --input gsm8k/train.jsonl --records --model_prefix data/maths --vocab_size 1000
    python train_trm_lm.py --train_paths train_texts.txt --sp_model data/spm.model     # train a model with it

Writes {model_prefix}.model and {model_prefix}.vocab. The same text always gives the same files, byte for byte. The
last 1 % of the text (at most 1 MB) is held back from training. The mean number of bytes per token is measured on it and
printed on stderr: more bytes per token mean shorter sequences.
"""

import os
import sys
from dataclasses import dataclass, field

from src.config import check_distinct, parse_flags, run
from src.data.corpus import MAX_DOC_MB, find_files, suffixes_of
from src.data.records import RecordsConfig
from src.data.tokenizer_training import hold_back, report_bytes_per_token, train_sentencepiece
from src.errors import UserError

VOCAB_SIZE = 16000


@dataclass
class SPMConfig:
    """The text, and the kind of tokenizer.

    Args:
        input: text to train on: files, globs or folders (data/README.md lists the formats)
        model_prefix: path of the output files without the suffixes .model and .vocab
        vocab_size: number of pieces, including special tokens and byte pieces
        model_type: algorithm: bpe (faster to train), unigram, or char (each piece is one character; vocab_size is the
            most pieces there may be)
        character_coverage: share of the characters in the text that get a piece of their own, from 0.9 to 1; rarer
            characters are written as bytes. 0.9995 suits Japanese
        byte_fallback: write rare characters as bytes; if false, they become an unknown token and are lost
        split_by_unicode_script: keep scripts, and letters and punctuation, in separate pieces; pieces are then shorter
            and closer to words
        split_digits: make each digit a piece of its own; if false, frequent numbers can be one piece
        max_sentences: train on at most this many lines, chosen at random if there are more
        text_field: name of the JSON field or parquet column that holds the text
        max_doc_mb: skip .jsonl and .parquet documents longer than this many million characters
        fim: add the sentinels of fill-in-the-middle, which `train_trm_lm.py --fim_rate` needs
        seed: random seed for choosing the lines
    """

    input: list[str] = field(default_factory=list)
    model_prefix: str = "spm"
    vocab_size: int = VOCAB_SIZE
    model_type: str = "bpe"
    character_coverage: float = 0.9995
    byte_fallback: bool = True
    split_by_unicode_script: bool = False
    split_digits: bool = True
    max_sentences: int = 2_000_000
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB
    fim: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.model_type not in ("bpe", "unigram", "char"):
            raise ValueError(f"model_type is {self.model_type!r}: set it to bpe, unigram or char")
        for name, least in (("vocab_size", 1), ("max_sentences", 101)):  # SentencePiece takes no fewer lines
            if not least <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to {least} or more, up to {2**31 - 1}")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"character_coverage is {self.character_coverage}: set it from 0.9 to 1.0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: set it from 0 to {2**32 - 1}")
        if not os.path.basename(self.model_prefix):
            raise ValueError(f"model_prefix is {self.model_prefix!r}, which has no file name: add one")


def parse_args(argv=None):
    config, records = parse_flags(__doc__, SPMConfig, RecordsConfig, argv=argv)
    if not config.input:
        raise UserError("--input is missing: give text files, globs or folders")
    return config, records.in_place_of(config.text_field)


def main(argv=None):
    config, text_field = parse_args(argv)
    outputs = [f"{config.model_prefix}.model", f"{config.model_prefix}.vocab"]
    check_distinct(outputs, find_files(config.input, suffixes_of(text_field)))
    texts, tail = hold_back(config.input, text_field, config.max_doc_mb)
    tokenizer = train_sentencepiece(
        texts,
        config.model_prefix,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        byte_fallback=config.byte_fallback,
        split_by_unicode_script=config.split_by_unicode_script,
        split_digits=config.split_digits,
        max_sentences=config.max_sentences,
        seed=config.seed,
        verbose=True,
        fim=config.fim,
    )
    print(f"wrote {config.model_prefix}.model and .vocab: {tokenizer.vocab_size} pieces", file=sys.stderr)
    report_bytes_per_token(tokenizer, tail)


if __name__ == "__main__":
    run(main)
