"""Reads a tokenizer.json: finds its special tokens, and the bytes that each other token stands for."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from src.errors import UserError
from src.files.text import decode, parse_json, read_object

SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
TOKENIZER_FILES = MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
PUZZLE_FILE = "puzzle.json"  # a checkpoint that solves puzzles has this file instead of those
NAMES_FILE = "identifiers.json"  # and this one, if its puzzles have ids: their names
REPLACEMENT = "\ufffd".encode()
SPECIAL = {  # name in a tokenizer_config.json -> the usual tokens, best candidate first
    "eos_token": "</s> <|endoftext|> <|end_of_text|> <eos> [EOS] <|im_end|> [SEP]".split(),
    "bos_token": "<s> <|begin_of_text|> <bos> [BOS] <|startoftext|> [CLS]".split(),
    "pad_token": "<pad> [PAD] <|pad|> <|padding|>".split(),
    "unk_token": "<unk> [UNK] <|unk|>".split(),
}
# The sentinels of fill-in-the-middle: before the prefix, before the suffix, before the middle, and what ends the middle
# in place of EOS. Ours are the first, which Qwen and CodeGemma share; the others are those of StarCoder, SantaCoder,
# Code Llama and DeepSeek-Coder.
FIM_NAMES = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
]


class FimTokens(NamedTuple):
    """The ids of the sentinels of fill-in-the-middle. end is None if only EOS ends the middle."""

    prefix: int
    suffix: int
    middle: int
    end: int | None = None

    @property
    def ids(self):
        """All of these ids."""
        return tuple(index for index in self if index is not None)


def find_fim(id_of):
    """Returns the FimTokens of a vocabulary, or None if it has no complete set. id_of(name): a token's id, or None."""
    for names in FIM_NAMES:
        ids = [id_of(name) for name in names]
        if None not in ids[:3]:
            return FimTokens(*ids)
    return None


def as_list(value):
    return value if isinstance(value, list) else [value]


def names_beside(file):
    """Returns the tokenizer_config.json next to a tokenizer's file as a dict, or {} if there is none."""
    path = Path(file).with_name(CONFIG_FILE)
    return read_object(path) if path.is_file() else {}


def parse_tokenizer(data, name):
    """Returns the tokenizers.Tokenizer of a tokenizer.json. Raises UserError if it is broken in any way, including ways
    that make the library panic."""
    from tokenizers import Tokenizer  # imported here, because other kinds of tokenizer do not need it

    settings = parse_json(decode(data, name), name)
    # the post-processor adds special tokens to a text; the library panics if it uses one that it does not define
    template = settings.get("post_processor") if isinstance(settings, dict) else None
    template = json.dumps(template, sort_keys=True)
    for token in re.findall(r'"SpecialToken": {"id": ("(?:\\.|[^"\\])*")', template):
        if f"{token}: {{" not in template:
            raise UserError(f"{name}: its post_processor adds {json.loads(token)} without defining it: correct it")
    try:
        tok = Tokenizer.from_str(json.dumps(settings))
        tok.no_padding()
        tok.no_truncation()
        tok.encode("a <0x0A> \U0010fffd")  # has an unknown character, because only that shows a wrong unk token
    except BaseException as error:
        # the exception for a Rust panic is not a subclass of Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name} is not a valid tokenizer.json of the tokenizers library ({error})") from None
    largest = max(tok.get_vocab().values(), default=-1)
    if not 0 <= largest < 2 * tok.get_vocab_size() + 1000:  # a table of all ids must fit in memory
        raise UserError(f"{name} has {tok.get_vocab_size()} tokens, but an id {largest}: correct the id")
    return tok


def find_roles(tok, names, file):
    """Returns {"eos_token": id, ...}: which special token of a tokenizer has which role.

    The roles are the keys of SPECIAL. `names` is the content of its tokenizer_config.json. A role that it does not name
    goes to the token that the post-processor adds, else to one with a usual name. Raises UserError if no EOS is found,
    or if `names` has an EOS or BOS that is not a token."""
    around = tok.encode("a")
    ends = {"bos_token": 0, "eos_token": -1} if len(around) > 1 else {}
    added = {role: around.tokens[at] for role, at in ends.items() if around.special_tokens_mask[at]}
    roles = {}
    for role, usual in SPECIAL.items():
        name = names.get(role)
        name = name.get("content") if isinstance(name, dict) else name  # some files write a token with its settings
        name = name if isinstance(name, str) else None
        if role in ("eos_token", "bos_token") and name is not None and tok.token_to_id(name) is None:
            raise UserError(f"{CONFIG_FILE} names {name} as {role}, but {file} has no such token: correct the name")
        candidates = (tok.token_to_id(n) for n in (name, added.get(role), *usual) if n is not None)
        roles[role] = next((i for i in candidates if i is not None), None)
    if roles["eos_token"] is None:
        raise UserError(f"{file} has no known EOS token: set eos_token in a {CONFIG_FILE} in the same folder")
    return {role: index for role, index in roles.items() if index is not None}


def config_of(tok, roles):
    """Returns the content (bytes) of a tokenizer_config.json, which `transformers` can read too."""
    names = {role: tok.id_to_token(index) for role, index in roles.items()}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}).encode()


def keep_apart(tok, special):
    """Changes `tok` so that the name of a special token or byte piece in a text ("</s>", "<0x0A>") stays plain text."""
    from tokenizers import Regex, pre_tokenizers

    tok.add_special_tokens([tok.id_to_token(i) for i in special])
    tok.encode_special_tokens = True  # their names become plain text; but some models also have them as ordinary tokens
    names = [tok.id_to_token(i) for i in special] + [f"<0x{b:02X}>" for b in range(256)]
    known = [n for n in names if tok.token_to_id(n) in tok.encode(n, add_special_tokens=False).ids]
    if known:  # split such names after their first character, so that the model never finds them whole
        inside = "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in known)
        cut = pre_tokenizers.Split(Regex(inside), "isolated")
        tok.pre_tokenizer = pre_tokenizers.Sequence([tok.pre_tokenizer, cut]) if tok.pre_tokenizer else cut


def byte_characters():
    """Returns {character: byte}: the printable characters that byte-level models write for bytes, as in GPT-2."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(tok, vocab_size, special, unk_id):
    """Returns the bytes of every id, in order: b"" for special tokens, U+FFFD for the unknown token."""
    decoder = tok.decoder.__getstate__().decode() if tok.decoder else ""  # the decoder as JSON text
    byte_of = byte_characters()
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
