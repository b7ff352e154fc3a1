"""Exports a checkpoint to an ONNX folder: traces `src/onnx/graph.py`, checks the graph, optionally quantizes to int8.

The folder contains model.onnx, model.onnx.data if the weights are large, config.json, the tokenizer's files, README.md
with an example, and onnx.json. The last holds facts about the graph, the tokens that begin and end a text, and the list
of files that the export wrote.
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
from src.data.tokenizer_json import JSON_FILE, TOKENIZER_FILES
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

OLDEST_OPSET = 18  # the oldest opset that the exporter writes without a conversion
CHECKED = 48  # tokens per row in the text for the check
TOLERANCE = 1e-3  # relative to the largest logit: rounding errors grow with the number of visits
README = "README.md"
ONE_FILE = 1 << 30  # larger graphs store their weights in a second file, as the format ends at 2 GiB


def at_depth(model: TRMModel, depth: int | None = None) -> TRMModel:
    """Returns the model with `depth` recursion steps, by default as trained.

    Raises UserError if the model is not causal, has a window, or cannot have this depth."""
    c = model.config
    if not c.causal:
        raise UserError("only a causal model can be exported, as it must generate text: this model sees all positions")
    if c.attention_window is not None:
        raise UserError(f"a model with attention_window {c.attention_window} cannot be exported: use the checkpoint")
    if depth is not None and (depth < 1 or c.recursion == "none" and depth > 1):
        possible = "1" if c.recursion == "none" else "1 or more"
        raise UserError(f"max_recursion_depth is {depth}: set it to {possible}")
    steps = {}
    if depth is not None and c.recursion == "loop":
        steps["deep_steps"] = depth
    elif depth is not None and c.recursion == "trm":
        steps["supervision_steps"] = depth
    steps["grad_deep_steps"] = steps.get("deep_steps", c.deep_steps)  # must not exceed deep_steps
    try:
        deeper = dataclasses.replace(c, supervision_weights=None, **steps)
    except ValueError as error:
        raise UserError(f"max_recursion_depth is {depth}: {error}") from None
    plain = TRMModel(deeper).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def trace(model: TRMModel, fused: bool, cache: bool = True, opset: int | None = None):
    """Returns the graph as onnx.ModelProto. opset None = the exporter's default.

    Raises UserError if the opset is unknown, or if the graph cannot be converted to it."""
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
        raise UserError(f"opset {opset} is not possible ({str(error).splitlines()[0]}): choose another") from None


def _older(proto, opset):
    """Converts a graph to an opset that is older than OLDEST_OPSET, with ONNX's own converter."""
    proto = need("onnx.version_converter").convert_version(proto, opset)
    for node in proto.graph.node:  # the converter leaves this attribute of opset 18, set to its default: remove it
        for attribute in [a for a in node.attribute if a.name == "noop_with_empty_axes"]:
            node.attribute.remove(attribute)
    return proto


def opset_of(proto) -> int:
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


@contextlib.contextmanager
def _quietly():
    """Suppresses log lines and warnings of the exporter and the quantizer."""
    level = logging.getLogger().level  # importing the quantizer changes the level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)


def quantize(proto, contrib_ops: bool = True):
    """Returns the graph with 8-bit weights and one scale per block of a column.

    The runtime quantizes activations row by row, so the text of a row does not depend on the other rows of the batch. A
    weight that several visits share is stored once. Without contrib_ops only the weights are quantized, with one scale
    per column, and the graph converts them back to floats."""
    weights = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in weights]
    if not contrib_ops:
        return _stored_as_int8(proto, tensors)
    block = next((size for size in (128, 64) if not any(tensor.dims[0] % size for tensor in tensors)), 32)
    # accuracy_level 4 means int8 products
    options = {"block_size": block, "is_symmetric": True, "accuracy_level": 4, "bits": 8}
    with _quietly():
        tools = need("onnxruntime.quantization.matmul_nbits_quantizer")
        quantizer = tools.MatMulNBitsQuantizer(proto, algo_config=tools.DefaultWeightOnlyQuantConfig(**options))
        quantizer.process()
    return quantizer.model.model


def _stored_as_int8(proto, tensors):
    """Stores each weight (in, out) as int8 with one scale per column. One DequantizeLinear serves all visits."""
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
    """Writes a graph, replacing an existing one. A graph above ONE_FILE bytes has its weights in a second file."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # otherwise onnx appends to it
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)  # ByteSize fails above 2 GiB
    need("onnx").save(proto, path, save_as_external_data=size > ONE_FILE, location=data.name)


@torch.no_grad()
def sample_text(model: TRMModel, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Returns ids (rows, T) of text that the model generated, and a mask (rows, T) that left-pads all but row 0."""
    c = model.config
    first = torch.randint(0, c.vocab_size, (rows, 1), generator=torch.Generator().manual_seed(0))
    ids = model.generate(first, min(c.max_seq_len, CHECKED) - 1, seed=0)
    width = ids.shape[1]
    padding = torch.tensor([row * width // (2 * rows) for row in range(rows)])
    return ids, (torch.arange(width) >= padding[:, None]).long()


@torch.no_grad()
def check(model: TRMModel, graph) -> float:
    """Returns the largest difference between the logits of a model and its graph, in one call and token by token.

    Raises UserError if it is more than rounding, or if greedy text that is longer than the context differs."""
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
        raise UserError(
            f"the graph's logits differ from the model's by {error:.2g}: nothing was written; try another opset"
        )
    length = max(1, model.config.max_seq_len - 2)
    prompt = ids[:1].repeat(1, length)[:, :length]
    greedy = [generate_ids(runs, prompt, 6, temperature=0).tolist() for runs in (model, graph)]
    if greedy[0] != greedy[1]:
        raise UserError("the graph and the model generate different text: nothing was written; try another opset")
    return error


@torch.no_grad()
def quantization_error(model: TRMModel, graph) -> dict:
    """Measures what int8 costs, on text that the model generated.

    Returns the rms error of the logits, their standard deviation, how often the most likely token is the same, and the
    additional loss in nats per token. This loss is KL(model || graph), because the model generated the text."""
    ids, mask = sample_text(model, rows=4)
    wanted, found = (runs(ids, attention_mask=mask).logits[mask.bool()].double() for runs in (model, graph))
    return {
        "rms": (found - wanted).square().mean().sqrt().item(),
        "deviation": wanted.std(-1).mean().item(),
        "same_likeliest": (found.argmax(-1) == wanted.argmax(-1)).double().mean().item(),
        "nats": kl_divergence(wanted, found).mean().item(),
    }


def export_onnx(settings: OnnxExport) -> dict:
    """Writes the export folder and returns the facts in its onnx.json, plus its size in bytes and the measured errors.

    A failure leaves an existing folder unchanged. Raises UserError if the output folder is something other than an
    export, or if the graph does not compute what the model computes."""
    if settings.output is None:
        raise UserError("--output is not given: name the folder to write")
    folder = Path(settings.output)
    if folder.exists() and not (folder / FACTS).is_file():
        raise UserError(f"{folder} exists and is not an ONNX export: choose another --output, or remove it")
    run_folder.check_writable(folder, "output")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    trained, tokenizer = load_model(settings.checkpoint)
    model = at_depth(trained, settings.max_recursion_depth)
    c = model.config
    fused = settings.device == "cpu" and settings.contrib_ops and fits_fused(c)
    _say(f"tracing {effective_depth(c).total} blocks (visits x layers), up to two seconds each")
    proto = trace(model, fused, settings.enable_kv_cache, settings.opset)
    facts = {  # describes the graph, and has what a program needs to run it without this project
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
            if tokenizer.kind == "hf":  # in this form, names of special tokens in a text stay plain text
                (beside / JSON_FILE).write_text(tokenizer.json, encoding="utf-8")
            _write_json(beside / "config.json", {"model": c.to_dict(), "info": {}})
            _write_json(beside / FACTS, facts)
            errors, facts["contrib_ops"] = _write_graph(proto, model, beside, settings)
            (beside / README).write_text(readme(folder.name, facts), encoding="utf-8")
            facts |= {"files": sorted(path.name for path in beside.iterdir()), "readme": _digest(beside / README)}
            _write_json(beside / FACTS, facts)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}): choose another --output") from None
    except UserError as error:  # name the final folder, not the temporary one
        raise UserError(str(error).replace(f".{folder.name}.writing", folder.name)) from None
    return facts | {"bytes": sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*")), "errors": errors}


def _is_own(folder: Path, name: str) -> bool:
    """Whether an earlier export wrote this file of the folder, so that it may be replaced.

    False for a README.md that was edited since, and for all other files."""
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
    """Whether GroupQueryAttention supports heads of this size. Prints a line on stderr if not."""
    multiple = FUSED_HEAD if config.positions == "rope" else FUSED_HEAD // 2
    if config.head_dim % multiple:
        _say(f"the head size {config.head_dim} is not a multiple of {multiple}: using standard attention")
    return config.head_dim % multiple == 0


def _write_graph(proto, model, folder, settings) -> tuple[dict, list[str]]:
    """Writes the graph, checks it against the model, and quantizes it if the settings ask for it.

    Returns the measured errors and the operators outside the ONNX standard."""
    device, path = settings.device, folder / GRAPH
    if device == "cuda" and CUDA not in need("onnxruntime").get_available_providers():
        _say("no CUDA provider found: checking the graph on the CPU")
        device = "cpu"
    save(proto, path)
    try:
        graph, _ = load_onnx(folder, device, quiet=True)
    except UserError as error:
        if settings.opset is None:
            raise
        raise UserError(f"ONNX Runtime does not run opset {settings.opset}: choose another ({error})") from None
    _say("checking the graph against torch")
    errors = {"logits": check(model, graph)}
    if settings.quantize == "int8":
        _say("quantizing the graph to int8 and comparing it with torch")
        # load the graph again, because saving moves large weights out of `proto`
        proto = quantize(need("onnx").load(path), settings.contrib_ops)
        save(proto, path)
        errors["int8"] = quantization_error(model, load_onnx(folder, device, quiet=True)[0])
    return errors, contrib_operators(proto)
