"""Text to token ids and back, without loss: SentencePiece, plain bytes, or a tokenizer.json of Hugging Face.

All three have one interface: encode, encode_batch, decode, decode_bytes, id_to_bytes, save, vocab_size, pad_id,
bos_id, eos_id, unk_id, prefix, kind, fingerprint. Every id stands for a fixed string of bytes, so decoding is joining;
a character spread over several ids is whole once they are joined (StreamDecoder waits for the last of them). BOS, EOS
and pad never come out of a text, whatever it says.

A checkpoint folder holds one of these: tokenizer.json (Hugging Face), with the names of its special tokens in
tokenizer_config.json; tokenizer.model (SentencePiece); tokenizer_config.json alone, {"tokenizer_kind": "byte"}.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import sentencepiece as spm

from src.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
REPLACEMENT = "\ufffd".encode()
SPECIAL = {  # the names of a tokenizer_config.json -> usual tokens, most telling first
    "eos_token": "</s> <|endoftext|> <|end_of_text|> <eos> [EOS] <|im_end|> [SEP]".split(),
    "bos_token": "<s> <|begin_of_text|> <bos> [BOS] <|startoftext|> [CLS]".split(),
    "pad_token": "<pad> [PAD] <|pad|> <|padding|>".split(),
    "unk_token": "<unk> [UNK] <|unk|>".split(),
}


class _Tokenizer:
    """What the three kinds share; a subclass sets the attributes named here, and encode_batch."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    prefix = ""  # a space where the tokenizer puts one before every text; `decode` takes it away again
    _bytes: list[bytes]
    _files: dict[str, bytes]  # name in a checkpoint folder -> content

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
        """UTF-8 bytes of a sequence of ids, from anywhere in a text."""
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids):
        """Text of all its ids, special tokens dropped; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace").removeprefix(self.prefix)

    @property
    def fingerprint(self):
        """sha256 (hex) of kind and content: equal for equal tokenizers, wherever their file lies."""
        return hashlib.sha256(b"\0".join((self.kind.encode(), *self._files.values()))).hexdigest()

    def save(self, folder):
        """Write the tokenizer's files into a (checkpoint) folder."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self._files.items():
            Path(folder, name).write_bytes(content)

    def _find_prefix(self):
        return " " if self.decode_bytes(self.encode("a")).startswith(b" ") else ""


class TokenizerWrapper(_Tokenizer):
    """A SentencePiece model. The round trip is exact for models of `train_sentencepiece`, and for others as far as
    their own normalisation and vocabulary go. `model_file` is a path, or the model's bytes."""

    kind = "sentencepiece"

    def __init__(self, model_file):
        data = model_file if isinstance(model_file, bytes) else _read(model_file)
        name = "the SentencePiece model" if isinstance(model_file, bytes) else model_file
        self._sp = sp = spm.SentencePieceProcessor()
        try:
            if not sp.LoadFromSerializedProto(data):
                raise RuntimeError
        except (RuntimeError, ValueError):
            raise UserError(f"{name} is not a whole SentencePiece model; make one with train_spm.py") from None
        self._files = {MODEL_FILE: data}
        self.vocab_size = sp.get_piece_size()
        self.unk_id = sp.unk_id()
        self.eos_id = sp.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{name} defines no EOS id; make one that does with train_spm.py")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else self.eos_id
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self._byte_ids = {self._bytes[i][0]: i for i in range(self.vocab_size) if sp.is_byte(i)}
        self._added = ""  # what encode_batch puts before a text itself
        self.prefix = self._find_prefix()
        if self.prefix:
            self._take_over_prefix(data)

    def _take_over_prefix(self, data):
        """Let encode_batch add the space, once a text; SentencePiece would add it to every part of _encode_marked."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # its protobuf takes a while to import

        model = ModelProto.FromString(data)
        if not model.normalizer_spec.remove_extra_whitespaces:  # else the space would be removed again
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
        """A text with U+2581 itself, which SentencePiece cannot tell from a space: its three bytes, where it can."""
        mark = [self._byte_ids.get(b, self.unk_id) for b in SPACE.encode()]
        parts = [self._sp.encode(part) for part in text.split(SPACE)]
        return list(itertools.chain(parts[0], *(mark + part for part in parts[1:])))

    def __getstate__(self):
        return self._files[MODEL_FILE]

    def __setstate__(self, data):
        self.__init__(data)


class ByteLevelTokenizer(_Tokenizer):
    """One id per UTF-8 byte (0..255), then pad, BOS and EOS. Needs no file and knows every text."""

    kind = "byte"
    pad_id, bos_id, eos_id = 256, 257, 258
    unk_id = pad_id
    vocab_size = 259
    _bytes = [bytes([i]) for i in range(256)] + [b""] * 3
    _files = {CONFIG_FILE: json.dumps({"tokenizer_kind": "byte"}).encode()}

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


class HFTokenizer(_Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (byte-level, or SentencePiece-like with U+2581 for a space).

    Which of its tokens are BOS, EOS, pad and unknown is told by a tokenizer_config.json beside it, else by what its
    post-processor puts around a text, else by their usual names; EOS stands in for those it lacks. `json_file` is a
    path, or the file's bytes; `names` takes the place of that tokenizer_config.json."""

    kind = "hf"

    def __init__(self, json_file, names=None):
        from tokenizers import Tokenizer  # here, so that the other kinds do not wait for its import

        is_content = isinstance(json_file, bytes)
        data, name = (json_file, "the tokenizer.json") if is_content else (_read(json_file), json_file)
        names = _names_beside(json_file) if names is None and not is_content else names or {}
        try:
            self._tok = tok = Tokenizer.from_str(data.decode("utf-8"))
        except Exception:  # noqa: BLE001  (the library raises bare Exception)
            raise UserError(f"{name} is not a whole tokenizer.json of the tokenizers library") from None
        tok.no_padding()
        tok.no_truncation()
        self.vocab_size = max(tok.get_vocab().values()) + 1
        roles = _roles(tok, names, name)
        self._files = {JSON_FILE: data, CONFIG_FILE: _config_of(tok, roles)}
        self.eos_id, self.bos_id, self.pad_id, self.unk_id = (roles.get(role, roles["eos_token"]) for role in SPECIAL)
        special = {i for i, token in tok.get_added_tokens_decoder().items() if token.special} | {*roles.values()}
        self._bytes = _hf_bytes(tok, self.vocab_size, special, roles.get("unk_token"))
        _keep_apart(tok, special)
        self.prefix = self._find_prefix()
        if " " not in self.decode(self.encode("a a")):
            raise UserError(f"{name} loses the spaces of a text: a byte-level or SentencePiece-like one is needed")

    def encode_batch(self, texts):
        return [e.ids for e in self._tok.encode_batch(texts, add_special_tokens=False)]

    def __getstate__(self):
        return self._files

    def __setstate__(self, files):
        self.__init__(files[JSON_FILE], json.loads(files[CONFIG_FILE]))


def _names_beside(json_file):
    """The tokenizer_config.json beside a tokenizer.json: a dict, {} where there is none."""
    path = Path(json_file).with_name(CONFIG_FILE)
    try:
        names = json.loads(_read(path)) if path.is_file() else {}
    except ValueError:
        names = None
    if not isinstance(names, dict):
        raise UserError(f"{path} is broken: copy it again, or remove it")
    return names


def _roles(tok, names, file):
    """{"eos_token": id, ...} of the special tokens that a tokenizer has."""
    around = tok.encode("a")
    ends = {"bos_token": 0, "eos_token": -1} if len(around) > 1 else {}
    added = {role: around.tokens[at] for role, at in ends.items() if around.special_tokens_mask[at]}
    roles = {}
    for role, usual in SPECIAL.items():
        name = names.get(role)
        name = name.get("content") if isinstance(name, dict) else name  # a token with its settings
        name = name if isinstance(name, str) else None
        if role in ("eos_token", "bos_token") and name is not None and tok.token_to_id(name) is None:
            raise UserError(f"{CONFIG_FILE} names {name} as {role}, which {file} does not have: correct it")
        candidates = (tok.token_to_id(n) for n in (name, added.get(role), *usual) if n is not None)
        roles[role] = next((i for i in candidates if i is not None), None)
    if roles["eos_token"] is None:
        raise UserError(f"{file} has no known EOS token: name it in a {CONFIG_FILE} beside it, as eos_token")
    return {role: index for role, index in roles.items() if index is not None}


def _config_of(tok, roles):
    """The content of a tokenizer_config.json, as `transformers` reads it too."""
    names = {role: tok.id_to_token(index) for role, index in roles.items()}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}).encode()


def _keep_apart(tok, special):
    """Never let a text become a special token or a byte piece by saying its name: "</s>", "<0x0A>"."""
    from tokenizers import Regex, pre_tokenizers

    tok.add_special_tokens([tok.id_to_token(i) for i in special])
    tok.encode_special_tokens = True  # then they go the way of every text, where some models know them as words
    names = [tok.id_to_token(i) for i in special] + [f"<0x{b:02X}>" for b in range(256)]
    known = [n for n in names if tok.token_to_id(n) in tok.encode(n, add_special_tokens=False).ids]
    if known:
        inside = "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in known)
        cut = pre_tokenizers.Split(Regex(inside), "isolated")
        tok.pre_tokenizer = pre_tokenizers.Sequence([tok.pre_tokenizer, cut]) if tok.pre_tokenizer else cut


def _hf_bytes(tok, vocab_size, special, unk_id):
    """Bytes of every id. Byte-level models write each byte as a printable character, in the order of GPT-2's table."""
    decoder = tok.decoder.__getstate__().decode() if tok.decoder else ""  # its part of tokenizer.json
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    added = tok.get_added_tokens_decoder()

    def of(index):
        token = tok.id_to_token(index)
        if index in special or token is None:
            return REPLACEMENT if index == unk_id else b""
        if '"ByteLevel"' in decoder and index not in added and all(c in byte_of for c in token):
            return bytes(byte_of[c] for c in token)
        if '"ByteFallback"' in decoder and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    return [of(i) for i in range(vocab_size)]


def read_llama2c_tokenizer(path):
    """The TokenizerWrapper of a llama2.c tokenizer file (tokenizer.bin, tok512.bin): SentencePiece BPE with <unk>, <s>,
    </s> and the 256 bytes in front, and a space before every text.  UserError where the file is broken.

    The file holds the length of the longest piece (int32), then score (float32), length (int32) and bytes of each.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb  # its protobuf takes a while to import

    data, at = _read(path), 4
    model, kind = pb.ModelProto(), pb.ModelProto.SentencePiece
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = pb.TrainerSpec.BPE, True
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            (piece,) = struct.unpack_from(f"<{size}s", data, at + 8)
            index, at = len(model.pieces), at + 8 + size
            name = piece.decode().strip("\n") if index < 3 else piece.decode().replace(" ", SPACE)
            model.pieces.add(piece=name, score=score, type=kinds[index] if index < len(kinds) else kind.NORMAL)
        if [p.piece for p in model.pieces[:3]] == ["<unk>", "<s>", "</s>"]:
            return TokenizerWrapper(model.SerializeToString(deterministic=True))
    except (struct.error, UnicodeDecodeError, UserError):
        pass
    raise UserError(f"{path} is not a whole tokenizer file of llama2.c: copy it again")


def read_tokenizer(name_or_path):
    """The tokenizer of a name ("byte"), a file (.model; tokenizer.json; .bin of llama2.c), or a checkpoint folder.

    Raises UserError where it is missing or broken.
    """
    if str(name_or_path) == "byte":
        return ByteLevelTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        for name in (JSON_FILE, MODEL_FILE, CONFIG_FILE):
            if (path / name).is_file():
                return read_tokenizer(path / name)
        raise UserError(f"{path} holds no tokenizer ({JSON_FILE}, {MODEL_FILE} or {CONFIG_FILE})")
    if path.name == CONFIG_FILE:
        try:
            if json.loads(_read(path))["tokenizer_kind"] == "byte":
                return ByteLevelTokenizer()
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f'{path}: expected {{"tokenizer_kind": "byte"}}; beside it should lie {MODEL_FILE} or {JSON_FILE}'
        )
    return {".json": HFTokenizer, ".bin": read_llama2c_tokenizer}.get(path.suffix, TokenizerWrapper)(path)


class LoadedTokenizer(NamedTuple):
    tokenizer: TokenizerWrapper | ByteLevelTokenizer | HFTokenizer
    vocab_size: int
    pad_id: int


def load_tokenizer(name_or_path) -> LoadedTokenizer:
    """(tokenizer, vocabulary size, pad id) of what `read_tokenizer` takes; bytes, and a line on stderr that says why,
    where it cannot be read. Whatever needs this very tokenizer (a checkpoint, a run) uses `read_tokenizer`."""
    try:
        tokenizer = read_tokenizer(name_or_path)
    except UserError as error:
        print(f"{error}; going on with bytes", file=sys.stderr)
        tokenizer = ByteLevelTokenizer()
    return LoadedTokenizer(tokenizer, tokenizer.vocab_size, tokenizer.pad_id)


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f'tokenizer {path}: {error.strerror or error}; give "byte", a .model or a tokenizer.json'
        ) from None


class StreamDecoder:
    """Text of ids as they arrive, never half a character. The pieces with flush() last are the text of the ids.

    starts_text: they are all ids of a text, so that the tokenizer's prefix is taken away as in tokenizer.decode(ids);
    else they go on from other text."""

    def __init__(self, tokenizer, starts_text=False):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = tokenizer.prefix if starts_text else ""

    def push(self, index):
        """Text that is complete with this id; "" while a character lacks bytes."""
        text = self._decoder.decode(self._tokenizer.id_to_bytes(int(index)))
        if text and self._prefix:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text

    def flush(self):
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)
