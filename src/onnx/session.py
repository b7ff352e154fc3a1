"""An exported graph in place of a TRMModel: `sampling.generate` and all that is built on it run under ONNX Runtime.

The folder is all that is needed: model.onnx (its inputs and outputs: templates/values.yaml), config.json, the
tokenizer's files, and onnx.json with what the graph is. Rows come left-padded, as everywhere here; the graph wants each
row from its left edge on, which spares it the mask.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from src.checkpoint import load_config
from src.errors import UserError, one_line
from src.exits import ExitRule, max_depth
from src.files.text import read_object
from src.model import Carry, TRMOutput
from src.runtime import free_cores
from src.tokenizer import read_tokenizer

INPUTS = ("input_ids", "last", "total", "read")
GRAPH, FACTS = "model.onnx", "onnx.json"
PACKAGES = "onnx==1.23.2 onnxruntime==1.31.1 onnxscript==0.7.2"
CUDA = "CUDAExecutionProvider"


def need(name: str):
    """An optional module.  UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name.partition('.')[0]} is not installed: pip install {PACKAGES}") from None


def provider(device: str):
    """ONNX Runtime's provider for cpu, cuda or cuda:1.  UserError where it is not there."""
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return "CPUExecutionProvider"
    if kind != "cuda":
        raise UserError(f"--device {device}: ONNX Runtime runs on cpu or cuda here")
    if CUDA not in need("onnxruntime").get_available_providers():
        raise UserError("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu, or choose --device cpu")
    return CUDA, {"device_id": int(index or 0)}


def load_onnx(folder, device: str = "cpu", threads: int | None = None, quiet: bool = False):
    """(OnnxModel, tokenizer) of an export folder.  device: cpu, cuda, cuda:1, ..., or auto (CUDA for a graph that was
    made for it, where it is there); threads of a CPU, default as torch has; quiet: without a line on stderr.

    UserError where the folder is none, is broken, or asks for what is not installed."""
    folder, runtime = Path(folder), need("onnxruntime")
    facts = _read_facts(folder)
    if device == "auto":
        has_cuda = facts["attention"] == "standard" and CUDA in runtime.get_available_providers()
        device = "cuda" if has_cuda else "cpu"
    config, tokenizer = load_config(folder), read_tokenizer(str(folder))
    session = _start(runtime, folder, provider(device), threads)
    if device != "cpu" and facts["attention"] == "fused":
        raise UserError(f"{folder} was exported for a CPU: export it with --device cuda, or choose --device cpu")
    if device != "cpu" and CUDA not in session.get_providers():
        raise UserError("the CUDA provider does not start here (CUDA or cuDNN is missing): choose --device cpu")
    sizes = tokenizer.vocab_size, config.vocab_size, _check_graph(session, config, folder / GRAPH)
    if len(set(sizes)) > 1:
        raise UserError(
            "{}: the tokenizer has {} tokens, config.json {}, the graph {}: ".format(folder, *sizes)
            + "they are of different models; export again"
        )
    if not quiet:
        print(f"{folder}: ONNX graph, {facts['precision']}, opset {facts['opset']}, on {device}", file=sys.stderr)
    return OnnxModel(session, config, facts, device, folder / GRAPH), tokenizer


def _check_graph(session, config, path) -> int:
    """The vocabulary of a graph.  UserError where it lacks an input or output, or its cache is of another model."""
    shapes = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
    past = [name for name in shapes if name.startswith("past_")]
    for name in (*INPUTS, "logits", *(name.replace("past", "present") for name in past)):
        if name not in shapes:
            raise UserError(f"{path} lacks {name}: it is broken, or no graph of export_onnx.py; export again")
    for name in past:
        if shapes[name][1::2] != [config.n_kv_heads, config.head_dim]:
            raise UserError(f"{path}: {name} is {shapes[name]}, which does not fit config.json: export again")
    return shapes["logits"][-1]


def _read_facts(folder) -> dict:
    for name in (FACTS, GRAPH):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no ONNX export (no {name}): make one with export_onnx.py")
    try:
        facts = read_object(folder / FACTS)
        return {name: facts[name] for name in ("opset", "precision", "attention", "cache")}
    except KeyError:
        raise UserError(f"{folder / FACTS} is broken: export again") from None


def _start(runtime, folder, chosen, threads):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or free_cores(torch.get_num_threads())  # they spin, as torch's do
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # DequantizeLinear once, not at every call
    try:
        return runtime.InferenceSession(str(folder / GRAPH), options, providers=[chosen])
    except Exception as error:  # many kinds, which mean one thing to the user
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / GRAPH} is broken or cut short ({reason}): export again") from None


class OnnxModel:
    """Takes a TRMModel's place at inference: called with ids, it gives an object with logits."""

    training = False

    def __init__(self, session, config, facts: dict, device: str, path="the graph"):
        self.session, self.config, self.facts, self.device, self.path = session, config, facts, device, path

    def eval(self):
        return self

    def train(self, mode: bool = True):
        if mode:
            raise UserError("an ONNX graph cannot be trained: train the checkpoint that it was exported from")
        return self

    def parameters(self):
        """None: they are in the graph, which takes its ids from the CPU wherever it runs."""
        return iter(())

    def new_cache(self, batch: int, max_len: int | None = None, depth=None, last_only=True) -> "OnnxCache":
        """An empty cache of `batch` rows x max_len columns; depth must be the graph's own, and last columns alone are
        read out in any case."""
        return OnnxCache(self, batch, max_len or self.config.max_seq_len)

    def __call__(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        cache: "OnnxCache | None" = None,
        exit: ExitRule | None = None,
        return_steps: bool = False,
    ) -> TRMOutput:
        """logits (B, T, V); with a cache those of the last token alone, (B, 1, V).

        attention_mask: 0 = padding, on the left. A first call with a cache brings the prompts, each later one a token
        a row. UserError for what a graph cannot do: leave the recursion early, or show its steps."""
        self._refuse(exit, return_steps)
        logits = self._whole(input_ids, attention_mask) if cache is None else cache.extend(input_ids, attention_mask)
        steps = torch.full(logits.shape[:2], max_depth(self.config))
        return TRMOutput(None, None, None, logits, None, Carry(None, None, steps))

    def _refuse(self, exit, return_steps):
        if return_steps:
            raise UserError("an ONNX graph gives its last recursion step alone: trace the checkpoint instead")
        if exit is not None and exit.exit != "fixed":
            raise UserError(f"an ONNX graph gives every token the same depth: --exit {exit.exit} needs the checkpoint")
        depth = max_depth(self.config)
        if max_depth(self.config, exit) != depth:
            raise UserError(f"this ONNX graph has max_recursion_depth {depth}: export it again for another")

    def _whole(self, ids, mask) -> Float[Tensor, "b t v"]:
        """A text at once, all logits; those of padding are those of the real token beside it."""
        (B, T), (rows, lengths, first) = ids.shape, aligned(ids, mask)
        column = (np.arange(T) - first[:, None]).clip(0, lengths[:, None] - 1)
        read = np.arange(B)[:, None] * rows.shape[1] + column
        return OnnxCache(self, B, T).run(rows, lengths, read.ravel()).view(B, T, -1)


def aligned(ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows moved to the left edge, (B, U) of the longest row's length U, their lengths (B,), and where they began (B,).

    Padding is on the left, and on the right of rows that have ended.  ValueError for any other mask."""
    B, T = ids.shape
    mask = np.ones((B, T), dtype=np.int64) if mask is None else mask.long().numpy()
    if (np.diff(mask, axis=1, prepend=0) > 0).sum(axis=1).max() > 1 or mask.max() > 1:
        raise ValueError("attention_mask must be 1 from the first real token of a row to its last, and 0 elsewhere")
    lengths, first = mask.sum(axis=1).clip(1), np.where(mask.any(axis=1), mask.argmax(axis=1), T - 1)
    column = np.arange(lengths.max()) + first[:, None]
    return np.take_along_axis(ids.numpy(), column.clip(max=T - 1), axis=1), lengths, first


class OnnxCache:
    """Keys and values of every slot, in buffers that the graph reads and writes in place; where the graph has no
    cache, the text so far instead."""

    def __init__(self, model: OnnxModel, batch: int, max_len: int):
        runtime, c = need("onnxruntime"), model.config
        if max_len > c.max_seq_len:
            raise ValueError(f"the graph has positions for {c.max_seq_len} tokens, not for {max_len}")
        self.model, self.max_len, self.length = model, max_len, 0  # length counts columns, padding included
        self.lengths = np.zeros(batch, dtype=np.int64)  # real tokens of each row
        self.text = None  # ids and mask, without a cache
        self.binding = model.session.io_binding()
        kind, _, index = model.device.partition(":")
        for name in (entry.name for entry in model.session.get_inputs() if entry.name.startswith("past_")):
            zeros = np.zeros((batch, c.n_kv_heads, max_len, c.head_dim), dtype=np.float32)
            slot = runtime.OrtValue.ortvalue_from_numpy(zeros, kind, int(index or 0))
            self.binding.bind_ortvalue_input(name, slot)
            self.binding.bind_ortvalue_output(name.replace("past", "present"), slot)

    def extend(self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"] | None) -> Float[Tensor, "b 1 v"]:
        """Add a prompt, or one token a row; the logits of each row's last token.  ValueError where it does not fit."""
        B, T = ids.shape
        if self.length + T > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} columns, {self.length} are used and {T} more were given")
        if self.length and T > 1:
            raise ValueError(f"{T} tokens a row after the first call: an ONNX graph takes one at a time")
        if not self.model.facts["cache"]:
            mask = torch.ones_like(ids) if mask is None else mask
            new = (ids, mask)
            self.text = new if self.text is None else [torch.cat(pair, dim=1) for pair in zip(self.text, new)]
            logits = self.model._whole(*self.text)[:, -1:]
        elif self.length == 0:
            rows, self.lengths, _ = aligned(ids, mask)
            logits = self.run(rows, self.lengths, np.arange(B) * rows.shape[1] + self.lengths - 1)[:, None]
        else:  # the next token overwrites one that is not real
            logits = self.run(ids.numpy(), self.lengths + 1, np.arange(B))[:, None]
            self.lengths = self.lengths + (1 if mask is None else mask[:, 0].numpy())
        self.length += T
        return logits

    def run(self, rows: np.ndarray, lengths: np.ndarray, read: np.ndarray) -> Float[Tensor, "n v"]:
        """One run of the graph: rows (B, T) end at `lengths` (B,) columns; logits of the flat columns `read` (N,)."""
        last, total = (lengths - 1).astype(np.int32), lengths.max(keepdims=True).astype(np.int32)
        for name, array in zip(INPUTS, (np.ascontiguousarray(rows), last, total, read)):
            self.binding.bind_cpu_input(name, array)
        logits = np.empty((len(read), self.model.config.vocab_size), dtype=np.float32)
        self.binding.bind_ortvalue_output("logits", need("onnxruntime").OrtValue.ortvalue_from_numpy(logits))
        try:
            self.model.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime raises many kinds
            raise UserError(f"{self.model.path} does not run ({one_line(error)}): export again") from None
        if not np.isfinite(logits).all():
            raise UserError(f"{self.model.path} gives NaN or infinity in place of logits: export again")
        return torch.from_numpy(logits)
