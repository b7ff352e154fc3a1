"""A causal TRMModel as one ONNX graph for prefill and decoding, with the cache as inputs and outputs.

    input_ids (B, T) int64    tokens; every row begins at the left, what follows its last token is ignored
    last (B,) int32           the column of the cache that each row's last token takes
    total (1,) int32          columns in use: the largest of `last`, plus 1
    read (N,) int64           the tokens whose logits are wanted, each as row * T + column
    past_key_0, past_value_0, ... (B, K, S, E)    every slot of the cache, with room for S columns
    -> logits (N, V), present_key_0, present_value_0, ...: the same slots with the new columns written

Past and present may be one buffer: nothing is copied then. A call either begins every row or adds one token to each.
A graph without a cache ends at `read`, and is given the whole text each time.

Two forms of attention, all else the same: `fused` is ONNX Runtime's GroupQueryAttention for CPUs (heads are split,
rotated, cached and attended in one operator); `standard` is made of ONNX's own operators, for CUDA and other runtimes.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from src.cache import cache_slots
from src.checkpoint import load_model
from src.config import UserError
from src.layers import Context, apply_rotary_emb, rotary_table
from src.losses import kl_divergence
from src.model import TRMModel
from src.onnx_session import CUDA, FACTS, GRAPH, load_onnx, need
from src.sampling import generate_ids

FUSED_HEAD = 16  # GroupQueryAttention rotates heads whose size is a multiple of this
OLDEST_OPSET = 18  # that the exporter writes by itself
CHECKED = 48  # tokens a row of the text that a graph is checked on
TOLERANCE = 1e-3  # of the largest logit: rounding, which many visits multiply
ONE_FILE = 1 << 30  # bytes of weights up to which graph and weights are one file; the format itself ends at 2 GiB


class MatMul(nn.Module):
    """A linear layer stored as (in, out): the graph multiplies by its weight as it is, which quantization asks for."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias

    def forward(self, x):
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Norm(nn.Module):
    """RMSNorm step by step, in the form that ONNX Runtime fuses, at any opset."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class GraphAttention(nn.Module):
    """Attention whose heads and cache are in the hands of ctx.cache.  (B, T, D) -> (B, T, D)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv, self.out = attention.qkv, attention.out
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x, ctx, slot):
        return self.out(ctx.cache.attend(self, self.qkv(x), slot))


class StandardSlots:
    """The cache inside a graph, in ONNX's own operators.  `present`: new keys and values of every slot."""

    def __init__(self, graph: "Graph", last, total, positions, past):
        self.config, self.past, self.present = graph.config, past, [None] * len(past)
        length = past[0][0].shape[2] if past else positions.shape[1]
        is_hidden = torch.arange(length)[None, None] > positions[:, :, None]  # (B, T, S)
        self.is_hidden, self.columns = is_hidden[:, None, None], positions[:, None, :, None]
        self.rotary = [table[positions][:, None] for table in graph.rotary]  # cos, sin: (B, 1, T, E)

    def coda_slot(self, step: int) -> int:
        return cache_slots(self.config, 0)  # only the last step is read out

    def attend(self, attention, qkv, slot) -> Tensor:
        """qkv (B, T, (H + 2K) E) -> (B, T, D); the new columns go into the slot."""
        c, (B, T, _) = self.config, qkv.shape
        H, K = c.n_heads, c.n_kv_heads
        q, k, v = qkv.view(B, T, H + 2 * K, c.head_dim).transpose(1, 2).split((H, K, K), dim=1)
        if c.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if self.rotary:
            q, k = apply_rotary_emb(q, *self.rotary), apply_rotary_emb(k, *self.rotary)
        if self.past:
            columns = self.columns.expand_as(k)
            k, v = self.present[slot] = [past.scatter(2, columns, new) for past, new in zip(self.past[slot], (k, v))]
        q = q.reshape(B, K, H // K, T, c.head_dim)
        scores = q @ k[:, :, None].transpose(-1, -2) * c.head_dim**-0.5  # (B, K, H/K, T, S)
        y = scores.masked_fill(self.is_hidden, -torch.inf).softmax(-1) @ v[:, :, None]
        return y.reshape(B, H, T, -1).transpose(1, 2).reshape(B, T, -1)


class FusedSlots(StandardSlots):
    """The same in ONNX Runtime's GroupQueryAttention, which takes the rows' lengths in place of a mask."""

    def __init__(self, graph, last, total, positions, past):
        self.config, self.past, self.present = graph.config, past, [None] * len(past)
        self.last, self.total = last, total
        self.rotary = [table[:, : graph.config.head_dim // 2] for table in graph.rotary] or [None, None]

    def attend(self, attention, qkv, slot) -> Tensor:
        c, (B, T, _) = self.config, qkv.shape
        q, k, v = qkv, None, None  # packed, unless the heads are normalised before
        if c.qk_norm:
            q, k, v = qkv.split((c.d_model, *[c.n_kv_heads * c.head_dim] * 2), dim=-1)
            q, k = (
                norm(heads.unflatten(-1, (-1, c.head_dim))).flatten(-2)
                for norm, heads in ((attention.q_norm, q), (attention.k_norm, k))
            )
        past = self.past[slot] if self.past else (None, None)
        shape = past[0].shape if self.past else (B, c.n_kv_heads, T, c.head_dim)
        y, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (q, k, v, *past, self.last, self.total, *self.rotary),
            {"num_heads": c.n_heads, "kv_num_heads": c.n_kv_heads, "do_rotary": int(c.positions == "rope")},
            dtypes=[qkv.dtype] * 3,
            shapes=[(B, T, c.d_model), shape, shape],
            version=1,
        )
        if self.past:
            self.present[slot] = present
        return y


class Graph(nn.Module):
    """What is traced: a TRMModel with the linear layers, norms and attention of a graph."""

    def __init__(self, model: TRMModel, fused: bool):
        super().__init__()
        self.config, self.slots = model.config, FusedSlots if fused else StandardSlots
        c = self.config
        self.model = _rebuilt(copy.deepcopy(model))
        every = torch.arange(c.max_seq_len)[None]
        rope = c.head_dim, c.rope_theta, c.rope_scaling, model.embed.weight.dtype, c.rope_trained_len
        tables = rotary_table(every, *rope)
        tables = [table[0, 0] for table in tables] if c.positions == "rope" else []  # (max_seq_len, E)
        self.rotary = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in tables)

    def forward(self, input_ids, last, total, read, past):
        m, c, T = self.model, self.config, input_ids.shape[1]
        start = (last.long() + 1 - T).clamp(min=0)  # a row that begins with this call is no longer than it
        positions = start[:, None] + torch.arange(T)
        x = m.embed(input_ids) * c.embed_scale
        x = x if m.pos_embed is None else x + m.pos_embed(positions)
        slots = self.slots(self, last, total, positions, past)
        ctx = Context(None, None, False, slots)
        for layer, block in enumerate(m.prelude):
            x = block(x, ctx, layer)
        y, z, _ = m._initial_state(x)
        for step in range(c.train_steps):
            y, z = m.deep_recursion(x, y, z, ctx, step * c.visits_per_step)
        h = m._before_head(y, ctx, c.train_steps - 1)
        return m.head(h.flatten(0, 1).index_select(0, read)), slots.present


def _rebuilt(module: nn.Module) -> nn.Module:
    parts = {"Linear": MatMul, "RMSNorm": Norm, "Attention": GraphAttention}
    for name, child in module.named_children():
        part = parts.get(type(child).__name__, lambda child: child)
        setattr(module, name, part(_rebuilt(child)))
    return module


def at_depth(model: TRMModel, depth: int | None = None) -> TRMModel:
    """The same weights with `depth` recursion steps, default as trained.  UserError where the model cannot."""
    c = model.config
    if not c.causal:
        raise UserError("only a causal model generates text: this one sees all positions, and cannot be exported")
    if depth is not None and (depth < 1 or c.recursion == "none" and depth > 1):
        raise UserError(f"max_recursion_depth is {depth}: set it to 1" + (" or more" * (c.recursion != "none")))
    steps = {"loop": {"deep_steps": depth}, "trm": {"supervision_steps": depth}}.get(c.recursion, {}) if depth else {}
    steps["grad_deep_steps"] = steps.get("deep_steps", c.deep_steps)
    plain = TRMModel(dataclasses.replace(c, supervision_weights="equal", **steps)).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def trace(model: TRMModel, fused: bool, cache: bool = True, opset: int | None = None):
    """The graph as onnx.ModelProto, at the opset asked for, default the exporter's own.  UserError if it cannot be."""
    onnx, c = need("onnx"), model.config
    need("onnxscript")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise UserError(f"opset {opset} is unknown: choose {OLDEST_OPSET} to {newest}, or try an older one")
    slots, auto = cache_slots(c) if cache else 0, Dim.DYNAMIC
    past = [tuple(torch.zeros(2, c.n_kv_heads, 5, c.head_dim) for _ in "kv") for _ in range(slots)]
    numbers = torch.full((2,), 2, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    names = [f"{part}_{slot}" for slot in range(slots) for part in ("key", "value")]
    try:
        with _quietly(), torch.no_grad():
            proto = torch.onnx.export(
                Graph(model, fused).eval(),
                (torch.zeros(2, 3, dtype=torch.long), *numbers, torch.arange(6), past),
                input_names=["input_ids", "last", "total", "read", *(f"past_{name}" for name in names)],
                output_names=["logits", *(f"present_{name}" for name in names)],
                dynamic_shapes=({0: auto, 1: auto}, {0: auto}, None, {0: auto}, [({0: auto, 2: auto},) * 2] * slots),
                opset_version=None if opset is None else max(opset, OLDEST_OPSET),
                dynamo=True,
                verbose=False,
            ).model_proto
        return proto if opset in (None, opset_of(proto)) else onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError) as error:
        if opset is None:
            raise
        raise UserError(f"opset {opset} cannot be had ({str(error).splitlines()[0]}): choose another") from None


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


def quantize(proto):
    """The graph with 8-bit weights, a scale for every block of a column; activations are quantized as it runs, row by
    row, so that a row's text does not depend on its neighbours.  A weight that several visits share stays one."""
    sizes = {tensor.dims[0] for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    block = next((size for size in (128, 64) if not any(rows % size for rows in sizes)), 32)
    options = {"block_size": block, "is_symmetric": True, "accuracy_level": 4, "bits": 8}  # 4: products in int8
    with _quietly():
        tools = need("onnxruntime.quantization.matmul_nbits_quantizer")
        quantizer = tools.MatMulNBitsQuantizer(proto, algo_config=tools.DefaultWeightOnlyQuantConfig(**options))
        quantizer.process()
    return quantizer.model.model


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
    prompt = ids[:1].repeat(1, model.config.max_seq_len)[:, : model.config.max_seq_len - 2]
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


@dataclasses.dataclass
class OnnxExport:
    """What to export, and for whom.

    Args:
        checkpoint: checkpoint or run folder (a run folder means its best); none = the released checkpoint
        output: folder to write; it then holds all that generate.py --onnx needs
        enable_kv_cache: keys and values go in and out; false = the whole text is encoded again for each token
        quantize: int8 = 8-bit weights and products; the embedding stays as it is
        opset: version of ONNX's operators, older for older providers; none = the exporter's own
        device: who shall run it: cpu, or cuda, ONNX Runtime's CUDA provider
        max_recursion_depth: recursion steps of every token, fixed in the graph; none = as trained
    """

    checkpoint: str | None = None
    output: str | None = None
    enable_kv_cache: bool = True
    quantize: Literal["none", "int8"] = "none"
    opset: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    max_recursion_depth: int | None = None


def export_onnx(settings: OnnxExport) -> dict:
    """Write the export folder, whole or not at all; returns the facts of its onnx.json, its bytes and its errors.

    UserError for a folder that is something else, and where the graph does not do what the model does."""
    if settings.output is None:
        raise UserError("--output is not given: name a folder to write")
    folder = Path(settings.output)
    if folder.exists() and not (folder / FACTS).is_file():
        raise UserError(f"{folder} exists and is no ONNX export: choose another --output, or remove it")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    trained, tokenizer = load_model(settings.checkpoint)
    model = at_depth(trained, settings.max_recursion_depth)
    fused = settings.device == "cpu" and fits_fused(model.config)
    proto = trace(model, fused, settings.enable_kv_cache, settings.opset)
    facts = {
        "opset": opset_of(proto),
        "precision": "fp32" if settings.quantize == "none" else settings.quantize,
        "attention": "fused" if fused else "standard",
        "cache": settings.enable_kv_cache,
    }
    beside, aside = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        tokenizer.save(beside)
        for name, values in (("config.json", {"model": model.config.to_dict(), "info": {}}), (FACTS, facts)):
            (beside / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        errors = _write_graph(proto, model, beside, settings)
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)
        beside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}): choose another --output") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return facts | {"bytes": sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*")), "errors": errors}


def fits_fused(config) -> bool:
    """Whether GroupQueryAttention takes heads of this size; a line on stderr where it does not."""
    multiple = FUSED_HEAD if config.positions == "rope" else FUSED_HEAD // 2
    if config.head_dim % multiple:
        print(f"heads of {config.head_dim} channels, no multiple of {multiple}: standard attention", file=sys.stderr)
    return config.head_dim % multiple == 0


def _write_graph(proto, model, folder, settings) -> dict:
    """Write the graph, checked against the model, quantized where asked for; returns the errors measured."""
    device = settings.device
    if device == "cuda" and CUDA not in need("onnxruntime").get_available_providers():
        print("no CUDA provider here: the graph is checked on the CPU", file=sys.stderr)
        device = "cpu"
    save(proto, folder / GRAPH)
    errors = {"logits": check(model, load_onnx(folder, device)[0])}
    if settings.quantize == "int8":
        save(quantize(proto), folder / GRAPH)
        errors["int8"] = quantization_error(model, load_onnx(folder, device)[0])
    return errors
