"""What a tokenizer.json says about its tokens: special ones and their names, and the bytes of the others."""

import json
import re
from pathlib import Path

from src.errors import UserError
from src.files.text import decode, parse_json, read_object

SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
TOKENIZER_FILES = MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
REPLACEMENT = "\ufffd".encode()
SPECIAL = {  # the names of a tokenizer_config.json -> usual tokens, most telling first
    "eos_token": "</s> <|endoftext|> <|end_of_text|> <eos> [EOS] <|im_end|> [SEP]".split(),
    "bos_token": "<s> <|begin_of_text|> <bos> [BOS] <|startoftext|> [CLS]".split(),
    "pad_token": "<pad> [PAD] <|pad|> <|padding|>".split(),
    "unk_token": "<unk> [UNK] <|unk|>".split(),
}


def as_list(value):
    return value if isinstance(value, list) else [value]


def names_beside(file):
    """The tokenizer_config.json beside a tokenizer's file: a dict, {} where there is none."""
    path = Path(file).with_name(CONFIG_FILE)
    return read_object(path) if path.is_file() else {}


def parse_tokenizer(data, name):
    """The tokenizers.Tokenizer of a tokenizer.json.  UserError for what breaks it, or ends the library's own way."""
    from tokenizers import Tokenizer  # here, so that the other kinds do not wait for its import

    settings = parse_json(decode(data, name), name)
    template = settings.get("post_processor") if isinstance(settings, dict) else None
    template = json.dumps(template, sort_keys=True)  # put around texts; the library panics where it names a token
    for token in re.findall(r'"SpecialToken": {"id": ("(?:\\.|[^"\\])*")', template):  # that it does not explain
        if f"{token}: {{" not in template:
            raise UserError(f"{name}: its post_processor puts {json.loads(token)} around texts, which it does not have")
    try:
        tok = Tokenizer.from_str(json.dumps(settings))
        tok.no_padding()
        tok.no_truncation()
        tok.encode("a <0x0A> \U0010fffd")  # what it does not know shows whether it can say so
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, no Exception
            raise
        raise UserError(f"{name} is not a whole tokenizer.json of the tokenizers library ({error})") from None
    largest = max(tok.get_vocab().values(), default=-1)
    if not 0 <= largest < 2 * tok.get_vocab_size() + 1000:
        raise UserError(f"{name} has {tok.get_vocab_size()} tokens, but an id {largest}: correct it")
    return tok


def find_roles(tok, names, file):
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


def config_of(tok, roles):
    """The content of a tokenizer_config.json, as `transformers` reads it too."""
    names = {role: tok.id_to_token(index) for role, index in roles.items()}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}).encode()


def keep_apart(tok, special):
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


def byte_characters():
    """{character: byte} as byte-level models write bytes: all of them printable, in the order of GPT-2's table."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(tok, vocab_size, special, unk_id):
    """Bytes of every id."""
    decoder = tok.decoder.__getstate__().decode() if tok.decoder else ""  # its part of tokenizer.json
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
