"""Tokenizers: SentencePiece, plain bytes, and Hugging Face's tokenizer.json. Text to token ids and back, without loss.

All three have the same interface: encode, encode_batch, encode_inside, start, infill, around, infill_ends, decode,
decode_bytes, id_to_bytes, save, vocab_size, pad_id, bos_id, eos_id, unk_id, end_ids, fim, suffix_first, add_bos,
prefix, kind, fingerprint. Every id stands for a fixed byte string, so decoding joins byte strings. One character may be
spread over several ids; StreamDecoder waits for the last of them. Encoding a text never yields BOS, EOS, pad or a
sentinel of fill-in-the-middle, even if the text contains their names.

A checkpoint folder contains one of
- tokenizer.json (Hugging Face), with tokenizer_config.json for the names of its special tokens
- tokenizer.model (SentencePiece)
- tokenizer_config.json alone, with {"tokenizer_kind": "byte"}; with "fill_in_the_middle": true there, it has sentinels
For converted models, tokenizer_config.json also says how texts start and end: {"starts_with_bos": false,
"end_token_ids": [2, 0]}. {"suffix_first": true} is there if the model was trained with `--fim_order spm`.
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import sentencepiece as spm

from src.data.llama2c_tokenizer import sentencepiece_of_llama2c
from src.data.tokenizer_json import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    PUZZLE_FILE,
    REPLACEMENT,
    SPACE,
    SPECIAL,
    FimTokens,
    as_list,
    config_of,
    find_fim,
    find_roles,
    keep_apart,
    names_beside,
    parse_tokenizer,
    token_bytes,
)
from src.errors import UserError
from src.files.text import read_bytes, read_object

read_file = functools.partial(read_bytes, what='tokenizer ("byte", a .model or a tokenizer.json)')


class _Tokenizer:
    """Base class of the three kinds. A subclass sets the attributes without a value here, and encode_batch."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    fim: FimTokens | None = None  # the sentinels of fill-in-the-middle, if the vocabulary has them
    suffix_first = False  # whether this model reads the suffix before the prefix
    prefix = ""  # " " if the tokenizer adds a space before every text; `decode` removes it again
    _bytes: list[bytes]  # of every id
    files: dict[str, bytes]  # name in a checkpoint folder -> content
    add_bos = True  # whether this model's texts start with BOS
    _more_ends: tuple[int, ...] = ()

    @property
    def end_ids(self):
        """All ids that end a text, EOS first. Generation stops at any of them."""
        return tuple(dict.fromkeys((self.eos_id, *self._more_ends)))

    def set_ends(self, add_bos=True, ends=()):
        """Sets whether texts start with BOS, and which ids besides EOS end a text; returns self.

        Ignores ids outside the vocabulary. Neither setting changes the ids of a text or the fingerprint."""
        self.add_bos = add_bos
        self._more_ends = tuple(i for i in ends if type(i) is int and 0 <= i < self.vocab_size)
        return self

    def _take_settings(self, names):
        """Takes over what the entries of a tokenizer_config.json say about this model's texts."""
        self.suffix_first = names.get("suffix_first") is True
        return self.set_ends(names.get("starts_with_bos") is not False, as_list(names.get("end_token_ids")))

    @property
    def settings(self):
        """What this model's texts have that differs from the defaults, as entries of tokenizer_config.json."""
        settings = {} if self.add_bos else {"starts_with_bos": False}
        settings |= {"end_token_ids": list(self.end_ids)} if len(self.end_ids) > 1 else {}
        return settings | ({"suffix_first": True} if self.suffix_first else {})

    def encode(self, text, bos=False, eos=False):
        """Returns the ids of `text` (list[int]). bos=True applies `start` to them; eos=True appends EOS."""
        ids = self.encode_batch([text])[0]
        return (self.start(ids) if bos else ids) + [self.eos_id] * eos

    def start(self, ids):
        """Returns `ids` as the start of a text: with BOS if this model's texts have it. [] always becomes [BOS]."""
        return [self.bos_id, *ids] if self.add_bos or not ids else ids

    def infill(self, prefix, suffix):
        """Returns the ids after which a model writes what belongs between the two texts. Needs `fim`."""
        return self.start(self.around(self.encode(prefix), self.encode_inside([suffix])[0]))

    def around(self, prefix_ids, suffix_ids):
        """Returns both parts and the sentinels, in the order this model was trained with; the middle follows."""
        if self.suffix_first:
            return [self.fim.prefix, self.fim.suffix, *suffix_ids, self.fim.middle, *prefix_ids]
        return [self.fim.prefix, *prefix_ids, self.fim.suffix, *suffix_ids, self.fim.middle]

    @property
    def infill_ends(self):
        """The ids that end what is written after `infill`: a middle that goes on with a sentinel is over as well."""
        return (*self.end_ids, *self.fim.ids)

    def encode_batch(self, texts):
        """Returns the ids of each text (list[list[int]]), without special tokens."""
        raise NotImplementedError

    def encode_inside(self, texts):
        """Returns the ids of texts that continue another text: as encode_batch, but without `prefix`."""
        if not self.prefix:
            return self.encode_batch(texts)
        return [self._after_a_character(text) for text in texts]

    def _after_a_character(self, text):
        for before in "\n;~":  # with some of them, a tokenizer joins the text, or adds another space
            ids = self.encode(before + text)
            for n in range(1, 6):
                is_rest = self.decode_bytes(ids[n:])[:1] == text.encode()[:1]
                if is_rest and self.decode_bytes(ids[:n]) == (self.prefix + before).encode():
                    return ids[n:]
        return self.encode(text)

    def continuing(self, text):
        """Returns what to encode so that the ids decode to `text` inside another text, for example after a prompt.

        It is the text without the space that the tokenizer would add, so such a tokenizer needs a text that starts with
        a space."""
        return text.removeprefix(self.prefix)

    def id_to_bytes(self, index):
        """Returns the UTF-8 bytes of one id, possibly only a part of a character; b"" for pad, BOS and EOS."""
        return self._bytes[index]

    def decode_bytes(self, ids):
        """Returns the UTF-8 bytes of a sequence of ids, from anywhere in a text."""
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids):
        """Returns the text of ids from the start of a text, without special tokens. Invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace").removeprefix(self.prefix)

    def lost_bytes(self, text, ids):
        """Returns how many UTF-8 bytes of `text` are lost when its `ids` are decoded; 0 if none."""
        back = self.decode(ids)
        if back == text:
            return 0
        # a character counts as kept as often as it occurs in both texts, in whatever order
        kept = sum(len(character.encode()) * n for character, n in (Counter(text) & Counter(back)).items())
        return max(1, len(text.encode()) - kept)

    @property
    def fingerprint(self):
        """sha256 (hex) of kind and content. It does not depend on the file's location."""
        return hashlib.sha256(b"\0".join((self.kind.encode(), *self.files.values()))).hexdigest()

    def save(self, folder):
        """Writes the tokenizer's files into a (checkpoint) folder."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)
        if settings := self.settings:
            config = json.loads(self.files.get(CONFIG_FILE, b"{}")) | settings
            Path(folder, CONFIG_FILE).write_bytes(json.dumps(config).encode())

    def _find_prefix(self):
        return " " if self.decode_bytes(self.encode("a")).startswith(b" ") else ""


class TokenizerWrapper(_Tokenizer):
    """A SentencePiece model.

    Models of `train_sentencepiece` are lossless; others lose what their normalization changes and their vocabulary
    lacks. `model_file` is a path or the model's bytes, `names` the content of the tokenizer_config.json next to it."""

    kind = "sentencepiece"

    def __init__(self, model_file, names=None):
        data = model_file if isinstance(model_file, bytes) else read_file(model_file)
        name = "the SentencePiece model" if isinstance(model_file, bytes) else model_file
        self._sp = sp = spm.SentencePieceProcessor()
        try:
            if not sp.LoadFromSerializedProto(data):
                raise RuntimeError
            self._bytes = [self._piece_bytes(i) for i in range(sp.get_piece_size())]
        except (RuntimeError, ValueError):  # ValueError: a piece is not UTF-8
            raise UserError(f"{name} is not a valid SentencePiece model: make one with train_spm.py") from None
        self.files = {MODEL_FILE: data}
        self.vocab_size = sp.get_piece_size()
        self.unk_id = sp.unk_id()
        self.eos_id = sp.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{name} has no EOS id: make a model that has one with train_spm.py")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else self.eos_id
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        self._byte_ids = {self._bytes[i][0]: i for i in range(self.vocab_size) if sp.is_byte(i)}
        # only control pieces, because a text could contain another kind of piece
        controls = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)}
        self.fim = find_fim(controls.get)
        self._take_settings(names or {})
        self._added = ""  # the prefix, if encode_batch has to add it
        self.prefix = self._find_prefix()
        if self.prefix:
            self._take_over_prefix(data)

    def _take_over_prefix(self, data):
        """Lets encode_batch add the prefix once per text. SentencePiece would add it to each part in _encode_marked."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # imported here, because protobuf imports slowly

        model = ModelProto.FromString(data)
        if not model.normalizer_spec.remove_extra_whitespaces:  # else SentencePiece would remove the added space
            model.normalizer_spec.add_dummy_prefix = False
            self._sp.LoadFromSerializedProto(model.SerializeToString())
            self._added = self.prefix

    def _piece_bytes(self, index):
        piece = self._sp.id_to_piece(index)
        if self._sp.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # "<0xE3>"
        if self._sp.is_unknown(index):
            return REPLACEMENT
        return b"" if self._sp.is_control(index) else piece.replace(SPACE, " ").encode()

    def encode_batch(self, texts):
        texts = (self._added + t if t else t for t in texts)
        return [self._encode_marked(t) if SPACE in t else self._sp.encode(t) for t in texts]

    def _encode_marked(self, text):
        """Encodes a text that contains U+2581, which SentencePiece would read as a space: writes it as three bytes."""
        mark = [self._byte_ids.get(b, self.unk_id) for b in SPACE.encode()]  # unknown, if the model has no byte pieces
        parts = [self._sp.encode(part) for part in text.split(SPACE)]
        return list(itertools.chain(parts[0], *(mark + part for part in parts[1:])))

    @property
    def processor(self) -> spm.SentencePieceProcessor:
        """The SentencePieceProcessor of the model."""
        return self._sp

    def __reduce__(self):
        return TokenizerWrapper, (self.files[MODEL_FILE], self.settings)


class ByteLevelTokenizer(_Tokenizer):
    """One id per UTF-8 byte (0 to 255), then pad, BOS and EOS. It needs no file and can encode any text.

    With "fill_in_the_middle": true in `names` (the content of a tokenizer_config.json), three sentinels follow."""

    kind = "byte"
    pad_id, bos_id, eos_id = 256, 257, 258
    unk_id = pad_id
    vocab_size = 259
    _bytes = [bytes([i]) for i in range(256)] + [b""] * 3
    files = {CONFIG_FILE: json.dumps({"tokenizer_kind": "byte"}).encode()}

    def __init__(self, names=None):
        names = names or {}
        if names.get("fill_in_the_middle") is True:
            self.fim = FimTokens(*range(self.vocab_size, self.vocab_size + 3))
            self.vocab_size, self._bytes = self.vocab_size + 3, self._bytes + [b""] * 3
            self.files = {CONFIG_FILE: json.dumps({"tokenizer_kind": "byte", "fill_in_the_middle": True}).encode()}
        self._take_settings(names)

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


class HFTokenizer(_Tokenizer):
    """A tokenizer.json of the `tokenizers` library: byte-level, or SentencePiece-like with U+2581 for a space.

    BOS, EOS, pad and unknown are the tokens that the tokenizer_config.json next to it names, else those that the
    post-processor adds to a text, else those with the usual names. EOS stands in for missing ones. `json_file` is a
    path or the file's bytes; `names`, if given, replaces the content of that tokenizer_config.json."""

    kind = "hf"

    def __init__(self, json_file, names=None):
        is_content = isinstance(json_file, bytes)
        data, name = (json_file, "the tokenizer.json") if is_content else (read_file(json_file), json_file)
        names = names_beside(json_file) if names is None and not is_content else names or {}
        self._tok = tok = parse_tokenizer(data, name)
        self.vocab_size = max(tok.get_vocab().values()) + 1
        roles = find_roles(tok, names, name)
        self.files = {JSON_FILE: data, CONFIG_FILE: config_of(tok, roles)}
        self.eos_id, self.bos_id, self.pad_id, self.unk_id = (roles.get(role, roles["eos_token"]) for role in SPECIAL)
        self.fim = find_fim(tok.token_to_id)
        special = {i for i, token in tok.get_added_tokens_decoder().items() if token.special} | {*roles.values()}
        special.update(self.fim.ids if self.fim else ())  # some files do not mark them as special
        others = (self.eos_id, self.bos_id, self.pad_id)  # GPT-2's EOS is also its unknown token
        unknown = None if self.unk_id in others else self.unk_id
        self._bytes = token_bytes(tok, self.vocab_size, special, unknown)
        keep_apart(tok, special)
        self._take_settings(names)
        self.prefix = self._find_prefix()
        if " " not in self.decode(self.encode("a a")):
            raise UserError(f"{name} loses the spaces of a text: use a byte-level or SentencePiece-like tokenizer")

    @property
    def json(self):
        """The tokenizer.json in use: the one from the file, after `keep_apart`."""
        return self._tok.to_str()

    @property
    def puts_bos(self):
        """Whether the file's post-processor puts BOS before a text."""
        return self._tok.encode("a").ids[:1] == [self.bos_id]

    def encode_batch(self, texts):
        return [e.ids for e in self._tok.encode_batch(texts, add_special_tokens=False)]

    def __reduce__(self):
        return HFTokenizer, (self.files[JSON_FILE], json.loads(self.files[CONFIG_FILE]) | self.settings)


def read_llama2c_tokenizer(path):
    """Returns the TokenizerWrapper of a llama2.c tokenizer file (tokenizer.bin, tok512.bin).

    Raises UserError if the file is broken."""
    data = read_file(path)
    try:
        return TokenizerWrapper(sentencepiece_of_llama2c(data))
    except (ValueError, UserError):
        raise UserError(f"{path} is not a valid llama2.c tokenizer file: copy it again") from None


def read_tokenizer(name_or_path):
    """Returns the tokenizer of a name ("byte"), a file (.model, tokenizer.json, llama2.c .bin) or a checkpoint folder.

    Raises UserError if it is missing or broken.
    """
    if str(name_or_path) == "byte":
        return ByteLevelTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        # `convert.py --to hf` adds a tokenizer.json to the other kinds, so its presence does not decide the kind
        kind = names_beside(path / JSON_FILE).get("tokenizer_kind")
        first = {"byte": [CONFIG_FILE], "sentencepiece": [MODEL_FILE]}.get(kind, [])
        for name in (*first, JSON_FILE, MODEL_FILE, CONFIG_FILE):
            if (path / name).is_file():
                return read_tokenizer(path / name)
        if (path / PUZZLE_FILE).is_file():
            raise UserError(f"{path} is a puzzle model, without a tokenizer: give a language model")
        raise UserError(f"{path} contains no tokenizer: it needs {JSON_FILE}, {MODEL_FILE} or {CONFIG_FILE}")
    if path.name == CONFIG_FILE:
        names = read_object(path, "tokenizer")
        if names.get("tokenizer_kind") == "byte":
            return ByteLevelTokenizer(names)
        raise UserError(
            f'{path}: add {MODEL_FILE} or {JSON_FILE} next to it, or write {{"tokenizer_kind": "byte"}} in it'
        )
    if path.name == MODEL_FILE:
        return TokenizerWrapper(path, names_beside(path))
    return {".json": HFTokenizer, ".bin": read_llama2c_tokenizer}.get(path.suffix, TokenizerWrapper)(path)


def warn_of_loss(lost, n_bytes):
    """If the tokenizer lost some bytes of the text, warns that bits per byte will not be reported."""
    if lost:
        print(
            f"warning: the tokenizer loses {100 * lost / n_bytes:.3g} % of the text's bytes: bits per byte would be "
            "too low, so only nats per token are reported",
            file=sys.stderr,
        )


class StreamDecoder:
    """Decodes ids one by one into whole characters. The results of push, and of flush at the end, join to the text.

    With starts_text=True, the ids start a text, so the tokenizer's prefix is removed as in tokenizer.decode(ids).
    Otherwise they continue another text."""

    def __init__(self, tokenizer, starts_text=False):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = tokenizer.prefix if starts_text else ""

    def push(self, index):
        """Returns the characters that this id completes; "" if the next character still lacks bytes."""
        text = self._decoder.decode(self._tokenizer.id_to_bytes(int(index)))
        if text and self._prefix:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text

    def flush(self):
        """Returns the rest at the end: U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)
