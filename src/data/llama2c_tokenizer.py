"""The tokenizer file of llama2.c (tokenizer.bin, tok512.bin), as a SentencePiece model."""

import struct

from src.data.tokenizer_json import SPACE


def sentencepiece_of_llama2c(data):
    """Returns the SentencePiece model (bytes) of the content of a llama2.c tokenizer file.

    The file describes a SentencePiece BPE that starts with <unk>, <s>, </s> and 256 byte pieces, and adds a space
    before every text. Its layout: length of the longest piece (int32), then for each piece its score (float32), length
    (int32) and bytes. Raises ValueError if the content is broken.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb  # imported here, because protobuf imports slowly

    model, kind, at = pb.ModelProto(), pb.ModelProto.SentencePiece, 4
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = pb.TrainerSpec.BPE, True
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            (piece,) = struct.unpack_from(f"<{size}s", data, at + 8)
            index, at = len(model.pieces), at + 8 + size
            text = piece.decode()
            if index < 3:
                name = text.strip("\0\n")
            elif index < len(kinds):
                name = f"<0x{index - 3:02X}>"
            else:
                name = text.replace(" ", SPACE).removeprefix("\0")
            type_ = kinds[index] if index < len(kinds) else kind.CONTROL if piece[:1] == b"\0" else kind.NORMAL
            model.pieces.add(piece=name, score=score, type=type_)
    except struct.error as error:
        raise ValueError(error) from None
    # without a piece that has a space, a space is encoded as its byte
    model.normalizer_spec.escape_whitespaces = SPACE in (p.piece for p in model.pieces)
    if [p.piece for p in model.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("it does not start with <unk>, <s> and </s>")
    return model.SerializeToString(deterministic=True)
