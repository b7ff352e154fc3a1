"""Text to token ids and back, without loss: SentencePiece, plain bytes, or a Hugging Face tokenizer.json.

All three have one interface: encode, encode_batch, decode, decode_bytes, id_to_bytes, save, vocab_size, pad_id,
bos_id, eos_id, unk_id, kind, fingerprint. Every id stands for a fixed string of bytes, so decoding is joining; a
character spread over several ids is whole once they are joined (StreamDecoder waits for the last of them).

A checkpoint folder holds one file of these: tokenizer.model (SentencePiece), tokenizer.json (Hugging Face), or
tokenizer_config.json with {"tokenizer_kind": "byte"}.
"""

import codecs
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import sentencepiece as spm

from src.config import UserError

SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
REPLACEMENT = "\ufffd".encode()
SAMPLE_CHARS = 4_000_000  # as much text as the line-break pieces are counted on
MAX_BREAKS = 16  # more of them no longer shorten source code
LINE_CHARS = 4096  # a longer line is cut for training, so that no text is ignored
_LINE_BREAKS = re.compile(r"\n+(?: +|\t+)?")


class _Tokenizer:
    """What the three kinds share; a subclass sets the attributes named here, and encode_batch."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    _bytes: list[bytes]
    _data: bytes  # the content of the tokenizer's file
    _file: str  # its name in a checkpoint folder

    def encode(self, text, bos=False, eos=False):
        """Ids of `text` (list[int]), with BOS before and EOS after it if asked for."""
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts):
        """Ids of each text: list[list[int]], no special tokens."""
        raise NotImplementedError

    def id_to_bytes(self, index):
        """UTF-8 bytes that one id stands for; b"" for pad, BOS and EOS. Half a character is possible."""
        return self._bytes[index]

    def decode_bytes(self, ids):
        """UTF-8 bytes of a sequence of ids."""
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids):
        """Text of a sequence of ids, special tokens dropped; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def fingerprint(self):
        """sha256 (hex) of kind and content: equal for equal tokenizers, wherever their file lies."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self._data).hexdigest()

    def save(self, folder):
        """Write the tokenizer's file into a (checkpoint) folder."""
        os.makedirs(folder, exist_ok=True)
        Path(folder, self._file).write_bytes(self._data)


class TokenizerWrapper(_Tokenizer):
    """A SentencePiece model. The round trip is exact for models of `train_sentencepiece`, and for others as far as
    their own normalisation and vocabulary go. `model_file` is a path, or the model's bytes."""

    kind = "sentencepiece"
    _file = MODEL_FILE

    def __init__(self, model_file):
        self._data = bytes(model_file) if isinstance(model_file, bytes) else _read(model_file)
        self._sp = spm.SentencePieceProcessor()
        name = "the SentencePiece model" if isinstance(model_file, bytes) else model_file
        try:
            if not self._sp.LoadFromSerializedProto(self._data):
                raise RuntimeError
        except (RuntimeError, ValueError):
            raise UserError(f"{name} is not a whole SentencePiece model; make one with train_spm.py") from None
        sp = self._sp
        self.vocab_size = sp.get_piece_size()
        self.unk_id = sp.unk_id()
        self.eos_id = sp.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{name} defines no EOS id; make one that does with train_spm.py")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else self.eos_id
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self._byte_ids = {self._bytes[i][0]: i for i in range(self.vocab_size) if sp.is_byte(i)}

    def _piece_bytes(self, index):
        piece = self._sp.id_to_piece(index)
        if self._sp.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # "<0xE3>"
        if self._sp.is_unknown(index):
            return REPLACEMENT
        return b"" if self._sp.is_control(index) else piece.replace(SPACE, " ").encode()

    def encode_batch(self, texts):
        return [self._encode_marked(t) if SPACE in t else self._sp.encode(t) for t in texts]

    def _encode_marked(self, text):
        """A text with U+2581 itself, which SentencePiece cannot tell from a space: its three bytes, where it can."""
        mark = [self._byte_ids.get(b, self.unk_id) for b in SPACE.encode()]
        parts = [self._sp.encode(part) for part in text.split(SPACE)]
        return list(itertools.chain(parts[0], *(mark + part for part in parts[1:])))

    def __getstate__(self):
        return self._data

    def __setstate__(self, data):
        self.__init__(data)


class ByteLevelTokenizer(_Tokenizer):
    """One id per UTF-8 byte (0..255), then pad, BOS and EOS. Needs no file and knows every text."""

    kind = "byte"
    _file = CONFIG_FILE
    _data = json.dumps({"tokenizer_kind": "byte"}).encode()
    pad_id, bos_id, eos_id = 256, 257, 258
    unk_id = pad_id
    vocab_size = 259
    _bytes = [bytes([i]) for i in range(256)] + [b""] * 3

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


class HFTokenizer(_Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (byte-level, or SentencePiece-like with U+2581 for a space)."""

    kind = "hf"
    _file = JSON_FILE

    def __init__(self, json_file):
        self._data = bytes(json_file) if isinstance(json_file, bytes) else _read(json_file)
        from tokenizers import Tokenizer  # here, so that the other kinds do not wait for its import

        try:
            self._tok = Tokenizer.from_str(self._data.decode("utf-8"))
        except Exception:  # noqa: BLE001  (the library raises bare Exception)
            raise UserError(f"{json_file} is not a whole tokenizer.json of the tokenizers library") from None
        self._tok.encode_special_tokens = True  # "<|endoftext|>" inside a text is text, not a command
        self._tok.no_padding()
        self._tok.no_truncation()
        self.vocab_size = self._tok.get_vocab_size()
        self.eos_id = self._special("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
        if self.eos_id is None:
            raise UserError(f"{json_file} has no EOS token that is known (</s>, <|endoftext|>, <eos>, ...); add one")
        eos = self._tok.id_to_token(self.eos_id)  # stands in for what the file does not have
        self.bos_id = self._special("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "[CLS]", eos)
        self.pad_id = self._special("<pad>", "[PAD]", "<|pad|>", "<|padding|>", eos)
        self.unk_id = self._special("<unk>", "[UNK]", "<|unk|>", eos)
        self._bytes = _hf_bytes(self._tok, self.vocab_size, self.unk_id)

    def _special(self, *names):
        return next((i for i in map(self._tok.token_to_id, names) if i is not None), None)

    def encode_batch(self, texts):
        return [e.ids for e in self._tok.encode_batch(texts, add_special_tokens=False)]

    def __getstate__(self):
        return self._data

    def __setstate__(self, data):
        self.__init__(data)


def _hf_bytes(tok, vocab_size, unk_id):
    """Bytes of every id. Byte-level models write each byte as a printable character, in the order of GPT-2's table."""
    kinds = json.dumps(json.loads(tok.to_str())["decoder"])
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    special = {i for i, token in tok.get_added_tokens_decoder().items() if token.special}

    def of(index):
        token = tok.id_to_token(index)
        if index in special or token is None:
            return REPLACEMENT if index == unk_id and token is not None and "unk" in token.lower() else b""
        if '"ByteLevel"' in kinds and all(c in byte_of for c in token):
            return bytes(byte_of[c] for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token) and '"ByteFallback"' in kinds:
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    return [of(i) for i in range(vocab_size)]


def load_tokenizer(name_or_path):
    """The tokenizer of a name ("byte"), a .model file, a tokenizer.json, or a checkpoint folder with one of these.

    Raises UserError where it is missing or broken.
    """
    if str(name_or_path) == "byte":
        return ByteLevelTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        for name in (MODEL_FILE, JSON_FILE, CONFIG_FILE):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise UserError(f"{path} holds no tokenizer ({MODEL_FILE}, {JSON_FILE} or {CONFIG_FILE})")
    if path.name == CONFIG_FILE:
        try:
            if json.loads(_read(path))["tokenizer_kind"] == "byte":
                return ByteLevelTokenizer()
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f'{path}: expected {{"tokenizer_kind": "byte"}}; beside it should lie {MODEL_FILE} or {JSON_FILE}'
        )
    return (HFTokenizer if path.suffix == ".json" else TokenizerWrapper)(path)


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f'tokenizer {path}: {error.strerror or error}; give "byte", a .model or a tokenizer.json'
        ) from None


class StreamDecoder:
    """Text of ids as they arrive, never half a character. The pieces with flush() last equal tokenizer.decode(ids)."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index):
        """Text that is complete with this id; "" while a character lacks bytes."""
        return self._decoder.decode(self._tokenizer.id_to_bytes(int(index)))

    def flush(self):
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


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
):
    """Train SentencePiece on documents (an iterable of str, or the path of a text file); returns a TokenizerWrapper.

    Lossless by its settings: no normalisation, spaces kept, bytes for rare characters. A line break is one piece, and
    so are the line breaks with indentation that are frequent in the text. pad, unk, BOS, EOS are 0, 1, 2, 3. The same
    text gives the same bytes. Writes {model_prefix}.model and .vocab unless model_prefix is None. Of longer texts a
    random `max_sentences` lines are used. verbose shows the equivalent spm_train command on stderr. Raises UserError
    for a vocabulary that the text cannot fill, or is too small for it.
    """
    if isinstance(texts, (str, os.PathLike)):
        from src.corpus import read_documents

        texts = read_documents([os.fspath(texts)])
    head, texts = _peek(iter(texts), SAMPLE_CHARS)
    flags = spm_flags(vocab_size, model_type, character_coverage, byte_fallback, split_by_unicode_script, max_sentences)
    flags["user_defined_symbols"] = [s.replace(" ", SPACE) for s in frequent_line_breaks(head)]
    if verbose:
        shown = {"model_prefix": model_prefix, **flags, "user_defined_symbols": ",".join(flags["user_defined_symbols"])}
        print("spm_train", *(f"--{k}={shlex.quote(str(v))}" for k, v in shown.items()), file=sys.stderr)
    spm.set_random_generator_seed(seed)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=_lines(texts), model_writer=model, minloglevel=2, **flags)
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    tokenizer = TokenizerWrapper(model.getvalue())
    if model_prefix is not None:
        _write_model(tokenizer, model_prefix)
    return tokenizer


def spm_flags(vocab_size, model_type, character_coverage, byte_fallback, split_by_unicode_script, max_sentences):
    """SentencePiece's own settings: name -> value. Threads are fixed in number because sums depend on their order."""
    return {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "byte_fallback": byte_fallback,
        "split_by_unicode_script": split_by_unicode_script,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": 4 * LINE_CHARS + 1,  # in bytes
        "num_threads": 2,
        "input_sentence_size": max_sentences,
        "shuffle_input_sentence": True,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
    }


def frequent_line_breaks(texts):
    """The line breaks of a text with the blanks that follow, most frequent first; "\\n" is always among them."""
    counts, chars = Counter(), 0
    for text in texts:
        counts.update(_LINE_BREAKS.findall(text))
        chars += len(text)
    frequent = [s for s, n in counts.most_common(MAX_BREAKS) if s != "\n" and n * 20_000 >= chars and len(s) <= 32]
    return ["\n", *sorted(frequent)]


def _peek(texts, n_chars):
    """(The first texts, about n_chars in all; an iterator over all of them)."""
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


def _explain(message, vocab_size):
    """SentencePiece's complaint as one sentence that names the size to use."""
    if largest := re.search(r"size too high.*value <= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text: the largest possible is {largest[1]}"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: the special tokens, bytes and characters of this text alone need "
            f"{smallest[1]}; raise it or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a SentencePiece model on"
    return f"SentencePiece refused: {message}"


def _write_model(tokenizer, model_prefix):
    """{prefix}.model and {prefix}.vocab (piece, tab, score; \\n and \\t spelt out), written beside, then renamed."""
    sp = tokenizer._sp
    pieces = (sp.id_to_piece(i).replace("\n", "\\n").replace("\t", "\\t") for i in range(tokenizer.vocab_size))
    vocab = "".join(f"{piece}\t{sp.get_score(i):g}\n" for i, piece in enumerate(pieces))
    for suffix, data in ((".vocab", vocab.encode()), (".model", tokenizer._data)):
        path = Path(f"{model_prefix}{suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another model_prefix") from None
