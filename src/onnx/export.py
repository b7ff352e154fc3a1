"""Checkpoint -> ONNX folder: the graph of `src/onnx/graph.py`, checked against the model, in fp32 or int8.

The folder: model.onnx (and model.onnx.data, where the weights are large), config.json, the tokenizer's files, README.md
with an example, and onnx.json: what the graph is, how a text begins and ends, and which files the export wrote.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from src.cache import cache_slots
from src.checkpoint import load_model, read_info
from src.data.corpus import content_hash
from src.data.tokenizer_json import TOKENIZER_FILES
from src.errors import UserError
from src.files.folders import replacing
from src.files.text import read_json
from src.losses import kl_divergence
from src.metrics import effective_depth
from src.model import TRMModel
from src.onnx.card import contrib_operators, describe, readme
from src.onnx.config import OnnxExport
from src.onnx.graph import FUSED_HEAD, Graph
from src.onnx.session import CUDA, FACTS, GRAPH, load_onnx, need
from src.sampling import generate_ids
from src.training import run_folder

OLDEST_OPSET = 18  # that the exporter writes by itself
CHECKED = 48  # tokens a row of the text that a graph is checked on
TOLERANCE = 1e-3  # of the largest logit: rounding, which many visits multiply
README = "README.md"
ONE_FILE = 1 << 30  # bytes of weights up to which graph and weights are one file; the format itself ends at 2 GiB


def at_depth(model: TRMModel, depth: int | None = None) -> TRMModel:
    """The same weights with `depth` recursion steps, default as trained.  UserError where the model cannot."""
    c = model.config
    if not c.causal:
        raise UserError("only a causal model generates text: this one sees all positions, and cannot be exported")
    if depth is not None and (depth < 1 or c.recursion == "none" and depth > 1):
        raise UserError(f"max_recursion_depth is {depth}: set it to 1" + (" or more" * (c.recursion != "none")))
    steps = {"loop": {"deep_steps": depth}, "trm": {"supervision_steps": depth}}.get(c.recursion, {}) if depth else {}
    steps["grad_deep_steps"] = steps.get("deep_steps", c.deep_steps)
    plain = TRMModel(dataclasses.replace(c, supervision_weights=None, **steps)).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def trace(model: TRMModel, fused: bool, cache: bool = True, opset: int | None = None):
    """The graph as onnx.ModelProto, at the opset asked for, default the exporter's own.  UserError if it cannot be."""
    onnx, c = need("onnx"), model.config
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise UserError(f"opset {opset} is unknown: choose {OLDEST_OPSET} to {newest}, or try an older one")
    slots = cache_slots(c) if cache else 0
    past = [tuple(torch.zeros(2, c.n_kv_heads, 5, c.head_dim) for _ in "kv") for _ in range(slots)]
    numbers = torch.full((2,), 2, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    rows = {0: "batch"}
    names = [f"{part}_{slot}" for slot in range(slots) for part in ("key", "value")]
    try:
        with _quietly(), torch.no_grad():
            proto = torch.onnx.export(
                Graph(model, fused).eval(),
                (torch.zeros(2, 3, dtype=torch.long), *numbers, torch.arange(6), past),
                input_names=["input_ids", "last", "total", "read", *(f"past_{name}" for name in names)],
                output_names=["logits", *(f"present_{name}" for name in names)],
                dynamic_shapes=(rows | {1: "length"}, rows, None, {0: "reads"}, [(rows | {2: "room"},) * 2] * slots),
                opset_version=None if opset is None else max(opset, OLDEST_OPSET),
                dynamo=True,
                verbose=False,
            ).model_proto
        return proto if opset in (None, opset_of(proto)) else _older(proto, opset)
    except (RuntimeError, ValueError) as error:
        if opset is None:
            raise
        raise UserError(f"opset {opset} cannot be had ({str(error).splitlines()[0]}): choose another") from None


def _older(proto, opset):
    """Under the exporter's oldest opset, by ONNX's own converter."""
    proto = need("onnx.version_converter").convert_version(proto, opset)
    for node in proto.graph.node:  # it leaves an attribute of opset 18, which only says what holds without it
        for attribute in [a for a in node.attribute if a.name == "noop_with_empty_axes"]:
            node.attribute.remove(attribute)
    return proto


def opset_of(proto) -> int:
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


@contextlib.contextmanager
def _quietly():
    """Without what the exporter and the quantizer log about their own workings."""
    level = logging.getLogger().level  # importing the quantizer changes it
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)


def quantize(proto, contrib_ops: bool = True):
    """The graph with 8-bit weights, a scale for every block of a column; activations are quantized as it runs, row by
    row, so that a row's text does not depend on its neighbours.  A weight that several visits share stays one.

    Without contrib_ops the weights alone are quantized, with a scale for every column, and decoded in the graph."""
    weights = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in weights]
    if not contrib_ops:
        return _stored_as_int8(proto, tensors)
    block = next((size for size in (128, 64) if not any(tensor.dims[0] % size for tensor in tensors)), 32)
    options = {"block_size": block, "is_symmetric": True, "accuracy_level": 4, "bits": 8}  # 4: products in int8
    with _quietly():
        tools = need("onnxruntime.quantization.matmul_nbits_quantizer")
        quantizer = tools.MatMulNBitsQuantizer(proto, algo_config=tools.DefaultWeightOnlyQuantConfig(**options))
        quantizer.process()
    return quantizer.model.model


def _stored_as_int8(proto, tensors):
    """Each weight (in, out) as int8 times a scale per column, which DequantizeLinear multiplies once for all visits."""
    helper, arrays = need("onnx.helper"), need("onnx.numpy_helper")
    for tensor in tensors:
        name, weight = tensor.name, arrays.to_array(tensor)
        scale = abs(weight).max(axis=0).clip(1e-12) / 127
        tensor.CopyFrom(arrays.from_array((weight / scale).round().astype("int8"), f"{name}_int8"))
        proto.graph.initializer.append(arrays.from_array(scale.astype("float32"), f"{name}_scale"))
        sources = [f"{name}_int8", f"{name}_scale"]
        proto.graph.node.insert(0, helper.make_node("DequantizeLinear", sources, [name], f"{name}/Dequantize", axis=1))
    return proto


def save(proto, path: Path):
    """Write a graph over another; weights of more than ONE_FILE bytes go into a second file beside it."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # it would be appended to
    need("onnx").save(proto, path, save_as_external_data=proto.ByteSize() > ONE_FILE, location=data.name)


@torch.no_grad()
def sample_text(model: TRMModel, rows: int = 3) -> tuple[Tensor, Tensor]:
    """ids (rows, T) that the model itself wrote, and a mask (rows, T) which pads all rows but the first."""
    c = model.config
    first = torch.randint(0, c.vocab_size, (rows, 1), generator=torch.Generator().manual_seed(0))
    ids = model.generate(first, min(c.max_seq_len, CHECKED) - 1, seed=0)
    width = ids.shape[1]
    padding = torch.tensor([row * width // (2 * rows) for row in range(rows)])
    return ids, (torch.arange(width) >= padding[:, None]).long()


@torch.no_grad()
def check(model: TRMModel, graph) -> float:
    """Largest difference of logits between a model and its graph: padded rows at once and token by token.

    UserError where it is more than rounding, or where greedy text beyond the context differs."""
    ids, mask = sample_text(model)
    whole = model(ids, attention_mask=mask).logits
    start, width = ids.shape[1] // 2 + 1, ids.shape[1]
    cache = graph.new_cache(len(ids))
    steps = [graph(ids[:, :start], attention_mask=mask[:, :start], cache=cache).logits]
    steps += [graph(ids[:, t : t + 1], cache=cache).logits for t in range(start, width)]
    found = graph(ids, attention_mask=mask).logits, torch.cat(steps, dim=1)
    wanted = whole, whole[:, start - 1 :]
    real = mask.bool(), mask.bool()[:, start - 1 :]
    error = max((f - w)[r].abs().max().item() for f, w, r in zip(found, wanted, real))
    if not error <= TOLERANCE * max(1.0, whole.abs().max().item()):
        raise UserError(f"the graph's logits differ from the model's by {error:.2g}: not kept, try another opset")
    length = max(1, model.config.max_seq_len - 2)
    prompt = ids[:1].repeat(1, length)[:, :length]
    greedy = [generate_ids(runs, prompt, 6, temperature=0).tolist() for runs in (model, graph)]
    if greedy[0] != greedy[1]:
        raise UserError("the graph continues a text otherwise than the model: not kept, try another opset")
    return error


@torch.no_grad()
def quantization_error(model: TRMModel, graph) -> dict:
    """What int8 costs on text of the model's own: rms error of the logits and their deviation, how often the likeliest
    token is the same, and nats lost per token, which is KL(model || graph) as the text is the model's."""
    ids, mask = sample_text(model, rows=4)
    wanted, found = (runs(ids, attention_mask=mask).logits[mask.bool()].double() for runs in (model, graph))
    return {
        "rms": (found - wanted).square().mean().sqrt().item(),
        "deviation": wanted.std(-1).mean().item(),
        "same_likeliest": (found.argmax(-1) == wanted.argmax(-1)).double().mean().item(),
        "nats": kl_divergence(wanted, found).mean().item(),
    }


def export_onnx(settings: OnnxExport) -> dict:
    """Write the export folder, whole or not at all; returns the facts of its onnx.json, its bytes and its errors.

    UserError for a folder that is something else, and where the graph does not do what the model does."""
    if settings.output is None:
        raise UserError("--output is not given: name a folder to write")
    folder = Path(settings.output)
    if folder.exists() and not (folder / FACTS).is_file():
        raise UserError(f"{folder} exists and is no ONNX export: choose another --output, or remove it")
    run_folder.check_writable(folder, "output")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    trained, tokenizer = load_model(settings.checkpoint)
    model = at_depth(trained, settings.max_recursion_depth)
    c = model.config
    fused = settings.device == "cpu" and settings.contrib_ops and fits_fused(c)
    _say(f"tracing {effective_depth(c).total} blocks (visits x layers), up to two seconds each")
    proto = trace(model, fused, settings.enable_kv_cache, settings.opset)
    facts = {  # what the graph is, and what a program needs that runs it by itself
        "opset": opset_of(proto),
        "precision": "fp32" if settings.quantize == "none" else settings.quantize,
        "attention": "fused" if fused else "standard",
        "cache": settings.enable_kv_cache,
        "family": c.recursion,
        "vocab_size": c.vocab_size,
        "context": c.max_seq_len,
        "tokenizer": tokenizer.kind,
        "bos_id": tokenizer.bos_id,
        "add_bos": tokenizer.add_bos,
        "end_ids": list(tokenizer.end_ids),
        "license": read_info(settings.checkpoint).get("license"),
    }
    describe(proto, facts)
    try:
        with replacing(folder, lambda name: _is_own(folder, name)) as beside:
            tokenizer.save(beside)
            _write_json(beside / "config.json", {"model": c.to_dict(), "info": {}})
            _write_json(beside / FACTS, facts)
            errors, facts["contrib_ops"] = _write_graph(proto, model, beside, settings)
            (beside / README).write_text(readme(folder.name, facts), encoding="utf-8")
            facts |= {"files": sorted(path.name for path in beside.iterdir()), "readme": _digest(beside / README)}
            _write_json(beside / FACTS, facts)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}): choose another --output") from None
    except UserError as error:  # the user knows the folder by its own name
        raise UserError(str(error).replace(f".{folder.name}.writing", folder.name)) from None
    return facts | {"bytes": sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*")), "errors": errors}


def _is_own(folder: Path, name: str) -> bool:
    """Whether an export before wrote this file of its folder: not a README.md that was changed since, nor what it
    does not know."""
    if name == README:
        before = read_json(folder / FACTS)
        return isinstance(before, dict) and before.get("readme") == _digest(folder / README)
    return name in (GRAPH, f"{GRAPH}.data", FACTS, "config.json", *TOKENIZER_FILES)


def _digest(path: Path) -> str:
    return f"{content_hash(path.read_bytes()):016x}"


def _write_json(path: Path, values: dict):
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _say(what: str):
    print(what, file=sys.stderr, flush=True)


def fits_fused(config) -> bool:
    """Whether GroupQueryAttention takes heads of this size; a line on stderr where it does not."""
    multiple = FUSED_HEAD if config.positions == "rope" else FUSED_HEAD // 2
    if config.head_dim % multiple:
        _say(f"heads of {config.head_dim} channels, no multiple of {multiple}: standard attention")
    return config.head_dim % multiple == 0


def _write_graph(proto, model, folder, settings) -> tuple[dict, list[str]]:
    """Write the graph, checked against the model, quantized where asked for; returns the errors measured, and the
    operators that are not ONNX's own."""
    device, path = settings.device, folder / GRAPH
    if device == "cuda" and CUDA not in need("onnxruntime").get_available_providers():
        _say("no CUDA provider here: the graph is checked on the CPU")
        device = "cpu"
    save(proto, path)
    try:
        graph, _ = load_onnx(folder, device, quiet=True)
    except UserError as error:
        if settings.opset is None:
            raise
        raise UserError(f"opset {settings.opset} does not run here: choose another ({error})") from None
    _say("checking it against torch")
    errors = {"logits": check(model, graph)}
    if settings.quantize == "int8":
        _say("quantizing it to int8, and comparing that with torch")
        proto = quantize(need("onnx").load(path), settings.contrib_ops)  # read again, as large weights go when saved
        save(proto, path)
        errors["int8"] = quantization_error(model, load_onnx(folder, device, quiet=True)[0])
    return errors, contrib_operators(proto)
