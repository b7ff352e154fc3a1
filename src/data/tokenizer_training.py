"""Trains tokenizers: `train_sentencepiece` a SentencePiece model, and `train_tokenizer` a tokenizer.json.

Both read the text as a stream, in flat memory. The same text gives the same file, byte for byte.
"""

import heapq
import io
import itertools
import operator
import os
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import sentencepiece as spm

from src.data.corpus import MAX_DOC_MB, read_documents, read_pieces
from src.data.tokenizer_json import FIM_NAMES
from src.errors import UserError
from src.files.folders import replacing_file
from src.tokenizer import JSON_FILE, MODEL_FILE, SPACE, HFTokenizer, TokenizerWrapper

SAMPLE_CHARS = 4_000_000  # size of the text sample that `frequent_line_breaks` counts
MAX_BREAKS = 16  # more line-break pieces do not make tokenized source code shorter
LINE_CHARS = 4096  # longer lines are cut, because SentencePiece ignores them
MAX_BYTES = 10_000_000  # BPE needs 80 bytes of memory per byte of a text without spaces
HELD_BACK_BYTES = 1_000_000
HELD_BACK_SHARE = 0.01
SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>"]  # ids 0, 1, 2, 3; the same in SentencePiece models
_LINE_BREAKS = re.compile(r"\n+(?: +|\t+)?")


def train_tokenizer(
    data_path,
    vocab_size,
    save_path,
    model_type="bpe",
    character_coverage=0.9995,
    max_bytes=MAX_BYTES,
    text_field="text",
    seed=0,
    max_doc_mb=MAX_DOC_MB,
    split_digits=True,
    fim=False,
):
    """Trains a tokenizer.json on files, globs and folders (str or list), writes it, and returns it as an HFTokenizer.

    bpe is byte-level BPE (arXiv:1508.07909, on bytes as in GPT-2). unigram (arXiv:1804.10959) is trained by
    SentencePiece; characters beyond character_coverage become bytes. Both are lossless. With split_digits, each digit
    is one token. pad, unk, BOS and EOS have ids 0, 1, 2, 3; with fim, the sentinels of fill-in-the-middle follow.
    text_field is that of `read_pieces`. save_path is a .json file, or a folder for tokenizer.json. Of a longer text, a
    random sample of about `max_bytes` is used. Prints the bytes per token of held-back text on stderr. Raises UserError
    if vocab_size is too large or too small for the text.
    """
    from tokenizers.processors import TemplateProcessing  # imported here, because SentencePiece does not need it

    texts, tail = hold_back(data_path, text_field, max_doc_mb)
    texts = _drawn(texts, max_bytes, seed)
    if model_type == "bpe":
        tok = _byte_level_bpe(texts, vocab_size, split_digits, fim)
    else:
        tok = _unigram(texts, vocab_size, character_coverage, split_digits, fim)
    tok.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    data = tok.to_str(pretty=True).encode()
    path = Path(save_path) if str(save_path).endswith(".json") else Path(save_path, JSON_FILE)
    _write(path, data)
    tokenizer = HFTokenizer(data, {})
    print(f"wrote {path}: {tokenizer.vocab_size} tokens", file=sys.stderr)
    report_bytes_per_token(tokenizer, tail)
    return tokenizer


def _byte_level_bpe(texts, vocab_size, split_digits, fim):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if split_digits else words
    tok.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": words.alphabet(), "show_progress": False}
    options["special_tokens"] = [*SPECIAL_TOKENS, *(FIM_NAMES[0] if fim else ())]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    size = tok.get_vocab_size()
    if size < vocab_size:
        raise UserError(_too_large(vocab_size, size))
    if size > vocab_size:
        raise UserError(f"vocab_size {vocab_size} is too small: special tokens and bytes alone need {size}; raise it")
    return tok


def _unigram(texts, vocab_size, character_coverage, split_digits, fim):
    """Returns a Tokenizer with SentencePiece's pieces and scores: the unigram trainer of `tokenizers` is not
    deterministic."""
    from tokenizers import Tokenizer, decoders, models

    options = {"character_coverage": character_coverage, "split_digits": split_digits, "fim": fim}
    sp = train_sentencepiece(texts, None, vocab_size, "unigram", **options).processor
    pieces = [(sp.id_to_piece(i).replace(SPACE, " "), sp.get_score(i)) for i in range(vocab_size)]
    tok = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens([*SPECIAL_TOKENS, *(FIM_NAMES[0] if fim else ())])
    return tok


def _drawn(texts, max_bytes, seed):
    """Returns the texts as a list, or a random sample of about max_bytes of them. Only the sample is in memory."""
    rng = random.Random(seed)
    kept, total = [], 0  # heap of (random key, number, text), from which the lowest keys are dropped; its size in bytes
    for number, text in enumerate(texts):
        heapq.heappush(kept, (rng.random(), number, text))
        total += len(text.encode())
        while total > max_bytes and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [text for _, _, text in sorted(kept, key=operator.itemgetter(1))]


def train_sentencepiece(
    texts,
    model_prefix=None,
    vocab_size=16000,
    model_type="bpe",
    character_coverage=0.9995,
    byte_fallback=True,
    split_by_unicode_script=False,
    max_sentences=2_000_000,
    seed=0,
    verbose=False,
    split_digits=True,
    fim=False,
):
    """Trains SentencePiece on documents (an iterable of str, or the path of a text file); returns a TokenizerWrapper.

    The settings make it lossless: no normalization, spaces are kept, rare characters become bytes. A line break is one
    piece, and so are frequent combinations of line breaks and indentation. With model_type char, each piece is one
    character, and vocab_size is the most that there may be. pad, unk, BOS and EOS have ids 0, 1, 2, 3;
    with fim, the sentinels of fill-in-the-middle follow. The same text gives the same model, byte for byte. Writes
    {model_prefix}.model and .vocab unless model_prefix is None. Of longer texts, a random sample of `max_sentences`
    lines is used. verbose prints the equivalent spm_train command on stderr. Raises UserError if vocab_size is too
    large or too small for the text.
    """
    if isinstance(texts, (str, os.PathLike)):
        texts = read_documents([os.fspath(texts)])
    head, texts = _peek(iter(texts), SAMPLE_CHARS)
    flags = spm_flags(vocab_size, model_type, character_coverage, byte_fallback, split_by_unicode_script, max_sentences)
    flags["split_digits"] = split_digits
    breaks = ["\n"] if model_type == "char" else frequent_line_breaks(head)
    flags["user_defined_symbols"] = [s.replace(" ", SPACE) for s in breaks]
    if fim:
        flags["control_symbols"] = list(FIM_NAMES[0])
    if verbose:
        shown = {name: ",".join(value) if isinstance(value, list) else value for name, value in flags.items()}
        shown = {"model_prefix": model_prefix, **shown}
        print("spm_train", *(f"--{k}={shlex.quote(str(v))}" for k, v in shown.items()), file=sys.stderr)
    model, lines = io.BytesIO(), _drawn_lines(texts, max_sentences, seed)
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **flags)
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    tokenizer = TokenizerWrapper(model.getvalue())
    if model_prefix is not None:
        _write_model(tokenizer, model_prefix)
    return tokenizer


def spm_flags(vocab_size, model_type, character_coverage, byte_fallback, split_by_unicode_script, max_sentences):
    """Returns SentencePiece's settings {name: value}. num_threads is fixed because it changes rounding in sums."""
    return {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "hard_vocab_limit": model_type != "char",  # a text has as many characters as it has
        "character_coverage": character_coverage,
        "byte_fallback": byte_fallback,
        "split_by_unicode_script": split_by_unicode_script,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": 4 * LINE_CHARS + 1,  # in bytes; a character has at most 4
        "num_threads": 2,
        "input_sentence_size": max_sentences,
        "shuffle_input_sentence": True,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
    }


def hold_back(paths, text_field="text", max_doc_mb=MAX_DOC_MB):
    """Returns (iterator over the texts to train on, list of the rest). The list is filled when the iterator ends.

    The rest is the last 1 % of the text, at most 1 MB."""
    tail = []
    pieces = read_pieces(paths, text_field, report=False, max_doc_mb=max_doc_mb)
    total = sum(len(text.encode()) for text, _ in pieces)
    n_train = total - min(HELD_BACK_BYTES, int(total * HELD_BACK_SHARE))
    return before_tail(read_pieces(paths, text_field, max_doc_mb=max_doc_mb), n_train, tail), tail


def before_tail(pieces, n_bytes, tail):
    """Yields the text of the first n_bytes of a stream of pieces, and appends the rest to the list `tail`."""
    left = n_bytes
    for text, _ in pieces:
        head = text.encode()[:left].decode(errors="ignore") if left else ""
        if len(head) < len(text):
            head = head[: head.rfind("\n") + 1] or head  # cut after a line break if there is one
            left = 0
            tail.append(text[len(head) :])
        left -= len(head.encode()) if left else 0
        if head:
            yield head


def report_bytes_per_token(tokenizer, texts):
    """Prints the average number of bytes per token on stderr."""
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_tokens:
        print(f"held-back text: {n_bytes} bytes, {n_bytes / n_tokens:.3f} bytes per token", file=sys.stderr)


def frequent_line_breaks(texts):
    """Returns "\\n", then, sorted, the frequent combinations of line breaks and the indentation that follows them."""
    counts, chars = Counter(), 0
    for text in texts:
        counts.update(_LINE_BREAKS.findall(text))
        chars += len(text)
    frequent = [s for s, n in counts.most_common(MAX_BREAKS) if s != "\n" and n * 20_000 >= chars and len(s) <= 32]
    return ["\n", *sorted(frequent)]


def _peek(texts, n_chars):
    """Returns (list of the first texts, about n_chars in total; iterator over all texts)."""
    head, size = [], 0
    for text in texts:
        head.append(text)
        size += len(text)
        if size >= n_chars:
            break
    return head, itertools.chain(head, texts)


def _lines(texts):
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]


def _drawn_lines(texts, most, seed):
    """Returns all lines, or `most` of them if there are more, chosen at random.

    SentencePiece chooses in the same way (a reservoir sample), but always with the same seed."""
    kept, draw = [], random.Random(seed)
    for number, line in enumerate(_lines(texts)):
        if number < most:
            kept.append(line)
        elif (place := draw.randrange(number + 1)) < most:
            kept[place] = line
    return kept


def _explain(message, vocab_size):
    """Turns SentencePiece's error message into one sentence that names a valid size."""
    if largest := re.search(r"size too high.*value <= (\d+)", message):
        return _too_large(vocab_size, largest[1])
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: the special tokens, bytes and characters of this text alone need "
            f"{smallest[1]}; raise it, or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return "no text to train a SentencePiece model on: use files that are not empty"
    return f"SentencePiece failed: {message}"


def _too_large(vocab_size, largest):
    return f"vocab_size {vocab_size} is too large for this text: the largest possible is {largest}"


def _write_model(tokenizer, model_prefix):
    """Writes {prefix}.model and {prefix}.vocab (lines of piece, tab, score; line breaks and tabs as \\n and \\t)."""
    sp = tokenizer.processor
    pieces = (sp.id_to_piece(i).replace("\n", "\\n").replace("\t", "\\t") for i in range(tokenizer.vocab_size))
    vocab = "".join(f"{piece}\t{sp.get_score(i):g}\n" for i, piece in enumerate(pieces))
    for suffix, data in ((".vocab", vocab.encode()), (".model", tokenizer.files[MODEL_FILE])):
        _write(Path(f"{model_prefix}{suffix}"), data)


def _write(path, data):
    """Writes a file as a whole, and the folders above it.  Raises UserError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as beside:
            beside.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set another path") from None
