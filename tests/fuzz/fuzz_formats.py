"""The fuzzer's mutations of binary formats: safetensors, .pt, .bin, SentencePiece, ONNX, GGUF, Parquet.

They have the interface that fuzz_mutations.py describes. `mutate` chooses a mutation by the kind of file.
"""

import io
import json
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path

import torch
from fuzz_mutations import INTEGERS, ODD, odd_value, of_bytes, of_gzip, of_json, of_lines, of_nest, of_yaml


def mutate(kind: str, content: bytes, rng) -> tuple[bytes, str]:
    """Breaks a file of the given kind, one time in five as plain bytes, and sometimes in several places."""
    try:
        content, must_refuse = KINDS["bytes" if rng.random() < 0.2 else kind](content, rng)
    except Exception:  # noqa: BLE001  (the format cannot store the new value)
        content, must_refuse = of_bytes(content, rng)
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        content, must_refuse = of_bytes(content, rng)[0], ""  # as bytes, because parsing a broken file may take forever
    return content, must_refuse


def of_parquet(content: bytes, rng) -> tuple[bytes, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "strings": pa.array(["a b", "c"]),
        "integers": pa.array([1, 2]),
        "none": pa.array([None, None]),
        "lists": pa.array([["a"], []]),
        "null strings": pa.array(["a", None]),
        "binary": pa.array([b"a", b"\xff"]),
        "structs": pa.array([{"a": 1}, None]),
        "large": pa.array(["a", "b"], pa.large_string()),
        "dictionary": pa.array(["a", "a"]).dictionary_encode(),
        "empty": pa.array([], "string"),
        "views": pa.array(["a", "b"], pa.string_view()),
    }
    if rng.random() < 0.1:  # many rows that share one text
        columns["long"] = pa.DictionaryArray.from_arrays([0] * rng.choice((1, 60)), ["a" * rng.choice((10**5, 10**7))])
    file, name = io.BytesIO(), "long" if "long" in columns else rng.choice(list(columns))
    pq.write_table(pa.table({"text": columns[name]}), file, compression=rng.choice(("zstd", "snappy", "none", "gzip")))
    return (file.getvalue() if rng.random() < 0.5 else of_bytes(content, rng)[0]), ""


# ---- tensors --------------------------------------------------------------------------------------------------------


def of_tensor(tensor, rng):
    """Returns (replacement for a tensor, reason why every model must refuse it or "")."""
    one = tensor.clone().float()
    action = rng.randrange(12)
    if action < 3 and one.numel():
        value = (float("nan"), float("inf"), -float("inf"))[action]
        one.view(-1)[rng.randrange(one.numel())] = value
        return one, f"{value} in a tensor"
    if action == 3:
        dtype = rng.choice((torch.int8, torch.bool, torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn))
        return one.to(dtype), f"{dtype}"
    if action == 4:
        return one.to(rng.choice((torch.float16, torch.bfloat16, torch.float64))), ""
    if action == 5:
        return one.flatten(), "a flat tensor" if one.dim() > 1 else ""
    if action == 6:
        return one[..., : one.shape[-1] // 2].contiguous() if one.dim() else one[None], "half a tensor"
    if action == 7:
        shape = rng.choice([shape for shape in ((), (0,), (1,), (3, 0)) if shape != one.shape])
        return one.new_zeros(shape), "another shape"
    if action == 8:
        return torch.cat((one, one)) if one.dim() else one.expand(2), "a doubled tensor"
    return one * rng.choice((0, 1, -1, 1e4)), ""


def of_tensors(tensors: dict, rng) -> tuple[dict, str]:
    tensors, name = dict(tensors), rng.choice(sorted(tensors))
    action = rng.randrange(6)
    if action == 0:
        del tensors[name]
        return tensors, "a tensor less"
    if action == 1:
        return tensors | {f"{name}x": tensors[name].clone()}, "a tensor more"
    if action == 2:
        tensors[f"{name}x"] = tensors.pop(name)
        return tensors, "a renamed tensor"
    tensors[name], reason = of_tensor(tensors[name], rng)
    return tensors, reason


def of_safetensors(content: bytes, rng) -> tuple[bytes, str]:
    from safetensors.torch import load, save

    if rng.random() < 0.6:
        tensors, reason = of_tensors(load(content), rng)
        return save(tensors), reason
    (size,) = struct.unpack_from("<Q", content)
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    reason = ""
    if rng.random() < 0.3 and header[a]["shape"] == header[b]["shape"] and a != b:
        header[a]["data_offsets"], reason = header[b]["data_offsets"], "overlapping offsets"
        text = json.dumps(header).encode()
    else:
        text = of_json(json.dumps(header).encode(), rng)[0]
    return struct.pack("<Q", len(text)) + text + rest, reason


class _Runs:
    """A pickle that runs code when it is loaded without weights_only."""

    def __reduce__(self):
        return __import__, ("fuzz_marker",)


def odd_state(rng, old):
    if isinstance(old, torch.Tensor):
        one = old.clone()
        wide = one.reshape(-1)[:1].expand(10**6, 10**6) if one.numel() else one
        return rng.choice(
            (
                *(
                    None,
                    one.to_sparse() if one.dim() else one,
                    one.to("meta"),
                    3,
                    "x",
                    [one],
                    one.bool(),
                    one.new_zeros(()),
                ),
                *(one.flatten()[::2], torch.full_like(one, 127), wide, one[..., :0] if one.dim() else one),
                *((one.float() * float("nan")), one.to(torch.complex64), torch.nn.Parameter(one.float()), one.half()),
            )
        )
    if rng.random() < 0.3:
        return rng.choice(INTEGERS)
    return rng.choice([value for value in ODD if not isinstance(value, str) or len(value) < 100])


def of_pt(content: bytes, rng) -> tuple[bytes, str]:
    file = io.BytesIO()
    if rng.random() < 0.1:
        torch.save({"model": _Runs(), "step": _Runs()}, file)
        return file.getvalue(), "code"
    if rng.random() < 0.1:  # change a file inside the archive, with a correct checksum
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            broken = rng.choice(old.namelist())
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, of_bytes(data, rng)[0] if name == broken else data)
        return file.getvalue(), ""
    if rng.random() < 0.05:
        return content[: len(content) * rng.randrange(10) // 10], "a cut"
    state = torch.load(io.BytesIO(content), weights_only=True)
    torch.save(of_nest(state, rng, odd_state), file, pickle_protocol=rng.choice((2, 2, pickle.HIGHEST_PROTOCOL)))
    return file.getvalue(), ""


# ---- binary formats with fields -------------------------------------------------------------------------------------


def of_bin(content: bytes, rng) -> tuple[bytes, str]:
    """Breaks llama2.c's legacy .bin: its header of seven integers, or one of its weights."""
    data, at = bytearray(content), rng.randrange(7)
    if rng.random() < 0.3:
        place = 28 + 4 * rng.randrange((len(content) - 28) // 4)
        data[place : place + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"))))
        return bytes(data), ""
    old = struct.unpack_from("<i", content, 4 * at)[0]
    number = rng.choice((*INTEGERS[:16], old + 1, old * 2, -old)) * rng.choice((1, 1, -1))
    struct.pack_into("<I", data, 4 * at, number % 2**32)
    return bytes(data), ""


def of_protobuf(message, rng):
    """Clears or duplicates one field somewhere inside a protobuf message, or gives it an odd value."""
    fields = [f for f, _ in message.ListFields()] or list(message.DESCRIPTOR.fields)
    field = rng.choice(fields if rng.random() < 0.8 else list(message.DESCRIPTOR.fields))
    is_list = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    value = getattr(message, field.name)
    if rng.random() < 0.1 or is_list and not len(value):
        return message.ClearField(field.name)
    if is_list:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            del value[at]
        elif rng.random() < 0.1:
            value.extend([value[at]] * rng.choice((1, 100)))
        elif field.type == field.TYPE_MESSAGE:
            of_protobuf(value[at], rng)
        else:
            value[at] = _scalar(field, value[at], rng)
    elif field.type == field.TYPE_MESSAGE:
        of_protobuf(value, rng)
    else:
        setattr(message, field.name, _scalar(field, value, rng))


def _scalar(field, old, rng):
    if isinstance(old, str):
        return rng.choice(("", "x", "<unk>", "</s>", old + "x", "\u2581", "\0", "a" * 10_000))
    if isinstance(old, bytes):
        return of_bytes(old, rng)[0]
    if isinstance(old, bool):
        return not old
    if isinstance(old, float):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    return rng.choice((0, 1, 2, -1, 3, 2**31 - 1, -(2**31), old + 1)) if "UINT" not in str(field.type) else old + 1


def of_sentencepiece(content: bytes, rng) -> tuple[bytes, str]:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(content)
    part = rng.choice((model, model.trainer_spec, model.normalizer_spec, rng.choice(model.pieces)))
    of_protobuf(part, rng)
    data = model.SerializeToString()
    if rng.random() < 0.1:  # a piece that is not UTF-8
        piece = rng.choice(model.pieces).piece.encode()
        data = data.replace(
            b"\x0a" + bytes([len(piece)]) + piece, b"\x0a" + bytes([len(piece)]) + b"\xff" * len(piece), 1
        )
    return data, ""


def of_onnx(content: bytes, rng) -> tuple[bytes, str]:
    import onnx

    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    if rng.random() < 0.3:
        weights = rng.choice([i for i in graph.initializer if i.data_type == 1 and i.raw_data])
        data = bytearray(weights.raw_data)
        for at in range(0, len(data), 4):
            data[at : at + 4] = struct.pack("<f", float("nan"))
        weights.raw_data = bytes(data)
        return model.SerializeToString(), "NaN in the graph"
    of_protobuf(
        rng.choice((model, graph, rng.choice(graph.node), rng.choice(graph.initializer), rng.choice(graph.output))), rng
    )
    return model.SerializeToString(), ""


def write_gguf(writer):
    """Write all parts of a GGUFWriter to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_gguf(content: bytes, rng) -> tuple[bytes, str]:
    """Changes a field or a tensor of a GGUF file, and writes the file with the gguf package."""
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.gguf"), Path(folder, "b.gguf")
        source.write_bytes(content)
        reader = gguf.GGUFReader(source)
        fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        fields = of_nest(fields, rng, odd_value) if rng.random() < 0.7 else fields
        reason, writer = "", gguf.GGUFWriter(target, str(fields.pop("general.architecture", "llama")))
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        for name, value in fields.items():
            try:
                many = writer.add_uint64 if isinstance(value, int) and value >= 2**32 else writer.add_uint32
                add.get(type(value), writer.add_int32 if isinstance(value, int) and value < 0 else many)(name, value)
            except Exception:  # noqa: BLE001, S112  (leave out what the format cannot store)
                continue
        broken = rng.randrange(len(reader.tensors)) if rng.random() < 0.3 else -1
        for number, tensor in enumerate(reader.tensors):
            data = np.array(tensor.data)
            if number == broken:
                reason = "NaN in a tensor"
                data.reshape(-1)[0] = np.nan
            writer.add_tensor(tensor.name, data)
        write_gguf(writer)
        return target.read_bytes(), reason


KINDS = {
    "bytes": of_bytes,
    "json": of_json,
    "yaml": of_yaml,
    "lines": of_lines,
    "gzip": of_gzip,
    "parquet": of_parquet,
    "safetensors": of_safetensors,
    "pt": of_pt,
    "bin": of_bin,
    "sentencepiece": of_sentencepiece,
    "onnx": of_onnx,
    "gguf": of_gguf,
}
