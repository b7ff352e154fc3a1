"""Reads GGUF files with Llama architecture, using the `gguf` package: the weights as float32, and the tokenizer."""

import functools

import numpy as np
import torch
from torch import Tensor

from src.checkpoint import check_tensors
from src.errors import UserError
from src.interop.llama import GGUF, count, from_llama, plain_config
from src.model_config import LIMITS, TRMConfig
from src.tokenizer import HFTokenizer, TokenizerWrapper

MAGIC = b"GGUF"
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # GGUF uses SentencePiece's token types
TITLES = {
    **{"source_name": "general.name", "license": "general.license"},
    "base_model": "general.base_model.0.repo_url",
}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
ENDS = ("eos", "eot", "eom")  # keys of the token ids that end a text
ENDS_BY_NAME = "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <EOT>".split()
LLAMA3_WORDS = (  # the regular expression by which Llama 3 splits a text into words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.lru_cache(1)  # weights and tokenizer are read in separate calls: parse the file only once
def open_gguf(path):
    """Returns the gguf.GGUFReader of a file. Raises UserError if the package is missing or the file is incomplete."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path} is a GGUF file, which needs the gguf package: pip install gguf==0.19.0") from None

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, **options):
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):  # the package would continue with empty values, for any length in the file
                raise ValueError(f"it ends at byte {len(self.data):,}, but its header declares more")
            return super()._get(offset, dtype, count, **options)

    try:
        return Reader(path)
    except Exception as error:  # noqa: BLE001  (ValueError, IndexError or KeyError, depending on where the file is cut)
        raise UserError(f"{path} is a broken or cut short GGUF file ({error}): copy it again") from None


def read_gguf(path) -> tuple[TRMConfig, dict[str, Tensor], dict]:
    """Returns (config, weights with this project's names, name and license) of a Llama GGUF, quantized or not."""
    reader = open_gguf(path)
    stored, tensors, end = {t.name: t for t in reader.tensors}, {}, 0
    try:
        c = _config(reader, stored, path)
        info = {title: str(value) for title, key in TITLES.items() if (value := _value(reader, key)) is not None}
        if "base_model" in info:
            info["base_model"] = info["base_model"].removeprefix("https://huggingface.co/")
    except (TypeError, ValueError, OverflowError) as error:  # for example a string that is not UTF-8
        raise UserError(f"{path} contains a setting of the wrong type ({error}): it cannot be converted") from None
    from gguf import dequantize

    for name, tensor in sorted(stored.items(), key=lambda item: item[1].data_offset):
        if tensor.data_offset < end:
            raise UserError(f"{path}: {name} overlaps the tensor before it: the file is broken; copy it again")
        end = tensor.data_offset + tensor.n_bytes
        try:
            tensors[name] = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: the gguf package cannot dequantize {name} ({kind}): give another file") from None
    return c, from_llama(c, check_tensors(tensors, path), GGUF, path), info


def _value(reader, key, default=None):
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader, tensors, path) -> TRMConfig:
    def get(key, default=None):
        value = _value(reader, f"llama.{key}", default)
        if value is None:
            raise UserError(f"{path} lacks llama.{key}: it is not a complete GGUF of a Llama")
        return value

    def size(key, *default):
        most = LIMITS["n_layers" if key == "block_count" else "d_model"]
        return count(get(key, *default), f"{path}: llama.{key}", most)

    name = _value(reader, "general.architecture")
    if name != "llama":
        raise UserError(f"{path} has the architecture {name}: only llama can be converted")
    heads, dim = size("attention.head_count"), size("embedding_length")
    # older files have only a factor, under one of two names, which then is a linear one, as in llama.cpp
    factor = get("rope.scaling.factor", 0) or get("rope.scale_linear", 0)
    scaling = get("rope.scaling.type", "linear" if factor else "none")
    unsupported = {
        "mixture of experts": get("expert_count", 0) > 0,
        "rotary factors per channel (rope_freqs, as of Llama 3.1)": "rope_freqs.weight" in tensors,
        f"rope scaling {scaling}": scaling not in ("none", "linear"),
        "weights in several files": _value(reader, "split.count", 1) > 1,
        "heads that do not divide its width": dim % heads or get("rope.dimension_count", dim // heads) != dim // heads,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise UserError(f"{path} has {what}, which this project does not support: it cannot be converted")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks token_embd.weight: it is not a complete GGUF of a Llama")
    return plain_config(
        path, d_model=dim, n_heads=heads, n_kv_heads=size("attention.head_count_kv", heads),
        n_layers=size("block_count"), d_ff=size("feed_forward_length"), max_seq_len=size("context_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[-1]), tie_embeddings="output.weight" not in tensors,
        norm_eps=float(get("attention.layer_norm_rms_epsilon")), rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=float(factor or get("rope.scaling.factor")) if scaling == "linear" else None,
    )  # fmt: skip


def read_gguf_tokenizer(path):
    """Returns the tokenizer inside a GGUF: SentencePiece (`llama`), or byte-level BPE (`gpt2`).

    Raises UserError for any other kind, and for a BPE whose rule for splitting words is unknown here."""
    try:
        return _read_tokenizer(open_gguf(path), path)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises bare Exception)
        raise UserError(f"the tokenizer in {path} is broken ({error}): give another with --tokenizer") from None


def _read_tokenizer(reader, path):
    kind, tokens = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type")
    if tokens is None or types is None:
        raise UserError(f"{path} contains no tokenizer: give one with --tokenizer")
    build = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}.get(kind)
    if build is None:
        raise UserError(
            f"{path} contains a tokenizer of type {kind}, which cannot be read: give another with --tokenizer"
        )
    return build(reader, tokens, types, path)


def read_gguf_ends(path, tokenizer) -> dict:
    """Returns the arguments of `tokenizer.set_ends` (BOS and end tokens) for a GGUF, with llama.cpp's defaults."""
    reader = open_gguf(path)
    kind, pre = (_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    tokens, types = (_value(reader, f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        raise UserError(f"the tokenizer in {path} is broken (its tokens are no list): copy the file again")
    ends = [_value(reader, f"tokenizer.ggml.{key}_token_id") for key in ENDS]
    kinds = (CONTROL, USER_DEFINED)
    ends += [i for i, (token, type_) in enumerate(zip(tokens, types)) if type_ in kinds and token in ENDS_BY_NAME]
    add_bos = _value(reader, "tokenizer.ggml.add_bos_token", kind != "gpt2" or pre == "llama-bpe")
    return {"add_bos": bool(add_bos), "ends": ends}


def _byte_level_bpe(reader, tokens, types, path) -> HFTokenizer:
    """Builds a tokenizer.json from the tokens and merges of a GGUF."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    words = ByteLevel(add_prefix_space=False)
    bare = ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt-2": words,
        "smollm": Sequence([Digits(individual_digits=True), words]),
        "llama-bpe": Sequence([Split(Regex(LLAMA3_WORDS), "isolated"), bare]),
    }
    pre = _value(reader, "tokenizer.ggml.pre", "default")
    if pre not in splits:
        raise UserError(
            f"{path} splits words by the rule {pre!r}, but only {', '.join(splits)} are supported: "
            "give the model's tokenizer.json with --tokenizer"
        )
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    tok = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tok.pre_tokenizer, tok.decoder = splits[pre], decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types) if type_ == CONTROL]
    tok.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [token for token, type_ in zip(tokens, types) if type_ == USER_DEFINED]  # found whole in a text
    tok.add_tokens([AddedToken(token, normalized=False) for token in own])
    ids = {name: _value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    return HFTokenizer(tok.to_str().encode(), names)


def _sentencepiece(reader, tokens, types, path) -> TokenizerWrapper:
    """Builds a SentencePiece model from the pieces and scores of a GGUF."""
    from sentencepiece import sentencepiece_model_pb2 as pb  # imported here, because protobuf imports slowly

    model = pb.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = pb.TrainerSpec.BPE, BYTE in types
    model.trainer_spec.vocab_size = len(tokens)
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    model.normalizer_spec.add_dummy_prefix = bool(_value(reader, "tokenizer.ggml.add_space_prefix", True))
    ends = (token in ENDS_BY_NAME and type_ == USER_DEFINED for token, type_ in zip(tokens, types))
    types = [CONTROL if is_end else type_ for is_end, type_ in zip(ends, types)]
    for name, key, default in (("bos", "bos", 1), ("eos", "eos", 2), ("unk", "unknown", 0)):
        named = _value(reader, f"tokenizer.ggml.{key}_token_id", None)
        index = default if named is None else named
        if types[index] == USER_DEFINED or types[index] == NORMAL and named is not None and name != "unk":
            types[index] = CONTROL  # such a piece would be text
        setattr(model.trainer_spec, f"{name}_id", index)
        setattr(model.trainer_spec, f"{name}_piece", tokens[index])
    for token, score, type_ in zip(tokens, _value(reader, "tokenizer.ggml.scores"), types):
        model.pieces.add(piece=token, score=score, type=type_)
    return TokenizerWrapper(model.SerializeToString(deterministic=True))
