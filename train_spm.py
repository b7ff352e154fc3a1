"""Train a SentencePiece tokenizer on text.

    python train_spm.py --input train_texts.txt --model_prefix data/spm
    python train_spm.py --input wiki.jsonl.gz --model_prefix data/spm --vocab_size 8000 --model_type unigram

Writes {model_prefix}.model and {model_prefix}.vocab. The same text gives the same files, byte for byte. The last 1 % of
the text, at most 1 MB, is not trained on; bytes per token are measured there and printed on stderr.
"""

import os
import sys
from dataclasses import dataclass, field

from src.config import parse_flags, run
from src.data.corpus import MAX_DOC_MB
from src.data.tokenizer_training import hold_back, report_bytes_per_token, train_sentencepiece
from src.errors import UserError

VOCAB_SIZE = 16000


@dataclass
class SPMConfig:
    """What the vocabulary is made from.

    Args:
        input: text: files, globs, folders of .txt .jsonl (gzipped or not) .parquet .py
        model_prefix: path of the result without its .model and .vocab
        vocab_size: number of pieces, with special tokens and bytes
        model_type: bpe (fast to train) or unigram
        character_coverage: share of the text's characters that become pieces, the rest bytes; 0.9995 suits Japanese
        byte_fallback: rare characters become bytes instead of an unknown token
        split_by_unicode_script: no piece mixes scripts, or letters and punctuation (shorter pieces, closer to words)
        max_sentences: train on this many lines, drawn at random, where there are more
        text_field: name of the text field (jsonl) or column (parquet)
        max_doc_mb: documents of .jsonl and .parquet longer than this (million characters) are skipped
        seed: of that draw
    """

    input: list[str] = field(default_factory=list)
    model_prefix: str = "spm"
    vocab_size: int = VOCAB_SIZE
    model_type: str = "bpe"
    character_coverage: float = 0.9995
    byte_fallback: bool = True
    split_by_unicode_script: bool = False
    max_sentences: int = 2_000_000
    text_field: str = "text"
    max_doc_mb: float = MAX_DOC_MB
    seed: int = 0

    def __post_init__(self):
        if self.model_type not in ("bpe", "unigram"):
            raise ValueError(f"model_type is {self.model_type!r}; allowed are bpe and unigram")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"character_coverage is {self.character_coverage}; allowed is 0.9 to 1.0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; allowed is 0 to {2**32 - 1}")
        if not os.path.basename(self.model_prefix):
            raise ValueError(f"model_prefix is {self.model_prefix!r}, which names no file: give it a name")


def parse_args(argv=None):
    """Flags -> SPMConfig."""
    (config,) = parse_flags(__doc__, SPMConfig, argv=argv)
    if not config.input:
        raise UserError("--input is missing: give text files, globs or folders")
    return config


def main(argv=None):
    """Train, write the two files, measure."""
    config = parse_args(argv)
    texts, tail = hold_back(config.input, config.text_field, config.max_doc_mb)
    tokenizer = train_sentencepiece(
        texts,
        config.model_prefix,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
        byte_fallback=config.byte_fallback,
        split_by_unicode_script=config.split_by_unicode_script,
        max_sentences=config.max_sentences,
        seed=config.seed,
        verbose=True,
    )
    print(f"wrote {config.model_prefix}.model and .vocab: {tokenizer.vocab_size} pieces", file=sys.stderr)
    report_bytes_per_token(tokenizer, tail)


if __name__ == "__main__":
    run(main)
