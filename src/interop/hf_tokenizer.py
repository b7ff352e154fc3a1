"""Writes any tokenizer as a tokenizer.json, for `transformers` and other programs that read this format.

A text should get the same ids there as here, including BOS. The texts in PROBES, and texts with the name of each added
token, are used to find differences.
"""

import json
import sys
from pathlib import Path

from src.data.tokenizer_json import CONFIG_FILE, FIM_NAMES, JSON_FILE, MODEL_FILE, SPACE, SPECIAL, byte_characters
from src.errors import UserError
from src.tokenizer import HFTokenizer

PROBES = [  # texts on which tokenizers often differ
    "", " ", "  two  spaces ", "Once upon a time, there was a little girl named Lily.",
    "def f(x):\n    return  x[10:]\n", "a\tb\r\n\n\n", "3.14159 20000", "I don't",
    "京都は日本の都市である。", "😀👩‍👩‍👧 é ｆ①", "\u2581 mark\u2581", "<0x41>",
]  # fmt: skip


def to_hf(tokenizer) -> HFTokenizer:
    """Returns the same tokens and ids as an HFTokenizer. Raises UserError if the library has no such model."""
    if tokenizer.kind == "hf":
        return tokenizer
    tok = _of_bytes(tokenizer) if tokenizer.kind == "byte" else _of_sentencepiece(tokenizer)
    names = {role: tok.id_to_token(getattr(tokenizer, role.replace("token", "id"))) for role in SPECIAL}
    return HFTokenizer(tok.to_str().encode(), names | tokenizer.settings)


def to_json(tokenizer) -> tuple[bytes, list[str]]:
    """Returns (content of a tokenizer.json, texts that it encodes differently). It adds BOS if `tokenizer` does."""
    from tokenizers import Tokenizer, decoders, processors

    def different(tok):
        tok.encode_special_tokens = True
        ids = [tok.encode(text).ids for text in probes]
        return [text for text, i in zip(probes, ids) if i != tokenizer.encode(text, bos=tokenizer.add_bos)]

    hf = to_hf(tokenizer)
    added = Tokenizer.from_str(hf.json).get_added_tokens_decoder().values()
    probes = [*PROBES, *(f"a{token.content}b" for token in added)]
    original, tok = (Tokenizer.from_str(text) for text in (hf.files[JSON_FILE].decode(), hf.json))
    if tokenizer.kind == "hf" and not tokenizer.prefix and not different(original):
        return hf.files[JSON_FILE], []
    bos = tok.id_to_token(hf.bos_id)
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, hf.bos_id)]
    )
    tok.post_processor = begin if tokenizer.add_bos else None
    if tokenizer.prefix and not isinstance(tok.decoder, decoders.ByteLevel):
        # keep the leading space: `transformers` decodes a continuation separately, and there the space is real
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tok.decoder = decoders.Sequence(parts)
    data = tok.to_str()
    return data.encode(), different(tok)


def save_for_transformers(tokenizer, folder, max_len: int) -> list[str]:
    """Writes the tokenizer into a folder for `transformers` and `read_tokenizer`; returns the texts that differ.

    tokenizer_config.json names the class that uses tokenizer.json unchanged. As in this project, the name of a special
    token in a text is encoded as plain text, and rows are padded on the left."""
    tokenizer.save(folder)
    data, different = to_json(tokenizer)
    (Path(folder) / JSON_FILE).write_bytes(data)
    names = json.loads(to_hf(tokenizer).files[CONFIG_FILE])
    own = json.loads(tokenizer.files.get(CONFIG_FILE, b"{}"))
    config = {"pad_token": names["eos_token"], **names, **own, "tokenizer_kind": tokenizer.kind, **tokenizer.settings}
    config |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False, "split_special_tokens": True}
    config |= {"padding_side": "left", "model_max_length": max_len, "clean_up_tokenization_spaces": False}
    (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for text in different[:1]:
        name = Path(folder).name
        print(f"{name}: transformers splits some texts into other tokens, for example {text!r}", file=sys.stderr)
    return different


def _of_bytes(tokenizer):
    """Builds the byte tokenizer: a BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tok = Tokenizer(models.BPE(byte_characters(), []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<pad>", "<s>", "</s>", *(FIM_NAMES[0] if tokenizer.fim else ())])  # ids 256, 257, ...
    return tok


def _of_sentencepiece(tokenizer):
    """Converts a SentencePiece model. Its pieces get real spaces, because U+2581 in a text is a different character."""
    from sentencepiece import sentencepiece_model_pb2 as pb  # imported here, because protobuf imports slowly
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    model = pb.ModelProto.FromString(tokenizer.files[MODEL_FILE])
    kind, trainer, normalizer = pb.ModelProto.SentencePiece, model.trainer_spec, model.normalizer_spec
    pieces = [(p.piece.replace(SPACE, " "), p.score) for p in model.pieces]
    if trainer.model_type == pb.TrainerSpec.UNIGRAM:
        for i, piece in enumerate(model.pieces):
            if piece.type == kind.USER_DEFINED:  # SentencePiece prefers these; the bonus was measured (0.2.3)
                pieces[i] = pieces[i][0], 0.1 * len(piece.piece.encode()) - 0.1
        tok = Tokenizer(models.Unigram(pieces, tokenizer.unk_id, trainer.byte_fallback))
    elif trainer.model_type == pb.TrainerSpec.BPE:
        score = {name: score for (name, score), p in zip(pieces, model.pieces) if p.type == kind.NORMAL}
        # every split of a piece into two pieces is a merge; the best score merges first
        pairs = [(name[:k], name[k:]) for name in score for k in range(1, len(name))]
        merges = [pair for pair in pairs if pair[0] in score and pair[1] in score]
        merges.sort(key=lambda pair: -score["".join(pair)])
        vocab, unk = {name: i for i, (name, _) in enumerate(pieces)}, pieces[tokenizer.unk_id][0]
        tok = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback))
    else:
        raise UserError("a SentencePiece model of type word or char cannot become a tokenizer.json: use bpe or unigram")
    steps = [normalizers.Precompiled(normalizer.precompiled_charsmap)] if normalizer.precompiled_charsmap else []
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" +"), " ")]
    steps += [normalizers.Prepend(" ")] * normalizer.add_dummy_prefix
    tok.normalizer = normalizers.Sequence(steps) if steps else None
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for (name, _), piece in zip(pieces, model.pieces):
        if piece.type == kind.USER_DEFINED and trainer.model_type == pb.TrainerSpec.BPE:
            tok.add_tokens([AddedToken(name, normalized=False)])
        elif piece.type in (kind.CONTROL, kind.UNKNOWN):
            tok.add_special_tokens([name])
    return tok
