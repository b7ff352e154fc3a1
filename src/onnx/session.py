"""Runs an exported graph in ONNX Runtime in place of a TRMModel, so that `sampling.generate` works with it unchanged.

It needs only the export folder: model.onnx (templates/values.yaml describes its inputs and outputs), config.json, the
tokenizer's files, and onnx.json with facts about the graph. The graph takes no mask; instead, every row must start at
the left edge. The rest of this project pads rows on the left, so this module moves them.
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
    """Imports an optional module. Raises UserError with the install command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name.partition('.')[0]} is not installed: pip install {PACKAGES}") from None


def provider(device: str):
    """Returns ONNX Runtime's provider for cpu, cuda or cuda:1. Raises UserError if it is not available."""
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return "CPUExecutionProvider"
    if kind != "cuda":
        raise UserError(f"--device {device}: with ONNX Runtime it must be cpu or cuda")
    if CUDA not in need("onnxruntime").get_available_providers():
        raise UserError("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu, or choose --device cpu")
    return CUDA, {"device_id": int(index or 0)}


def load_onnx(folder, device: str = "cpu", threads: int | None = None, quiet: bool = False):
    """Returns (OnnxModel, tokenizer) of an export folder.

    device: cpu, cuda, cuda:1 and so on, or auto, which is CUDA if it is available and the graph was exported for it;
    threads: number of CPU threads, by default as many as torch uses; quiet: print no line on stderr.
    Raises UserError if the folder is not an export or is broken, or if something that it needs is not installed."""
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
            + "they belong to different models; export again"
        )
    if not quiet:
        print(f"{folder}: ONNX graph, {facts['precision']}, opset {facts['opset']}, on {device}", file=sys.stderr)
    return OnnxModel(session, config, facts, device, folder / GRAPH), tokenizer


def _check_graph(session, config, path) -> int:
    """Returns the vocabulary size. Raises UserError for a missing input or output, or a cache of another shape."""
    shapes = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
    past = [name for name in shapes if name.startswith("past_")]
    for name in (*INPUTS, "logits", *(name.replace("past", "present") for name in past)):
        if name not in shapes:
            raise UserError(f"{path} lacks {name}: it is broken, or export_onnx.py did not write it; export again")
    for name in past:
        if shapes[name][1::2] != [config.n_kv_heads, config.head_dim]:
            raise UserError(f"{path}: {name} has shape {shapes[name]}, which does not fit config.json: export again")
    return shapes["logits"][-1]


def _read_facts(folder) -> dict:
    for name in (FACTS, GRAPH):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an ONNX export (no {name}): make one with export_onnx.py")
    try:
        facts = read_object(folder / FACTS)
        return {name: facts[name] for name in ("opset", "precision", "attention", "cache")}
    except KeyError:
        raise UserError(f"{folder / FACTS} is broken: export again") from None


def _start(runtime, folder, chosen, threads):
    options = runtime.SessionOptions()
    # like torch's threads, those of ONNX Runtime busy-wait, so use no more than there are free cores
    options.intra_op_num_threads = threads or free_cores(torch.get_num_threads())
    options.log_severity_level = 3  # only errors
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # decode int8 weights once, not in every call
    try:
        return runtime.InferenceSession(str(folder / GRAPH), options, providers=[chosen])
    except Exception as error:  # ONNX Runtime raises many types; for the user they all mean a broken file
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / GRAPH} is broken or cut short ({reason}): export again") from None


class OnnxModel:
    """Stands in for a TRMModel at inference. Call it with ids to get a TRMOutput with logits."""

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
        """Yields nothing: the weights are in the graph. Callers then keep the ids on the CPU, as the graph expects."""
        return iter(())

    def new_cache(self, batch: int, max_len: int | None = None, depth=None, last_only=True) -> "OnnxCache":
        """Returns an empty cache of `batch` rows x max_len columns.

        `depth` and `last_only` are ignored: the depth is fixed in the graph, which reads out only the last column."""
        return OnnxCache(self, batch, max_len or self.config.max_seq_len)

    def __call__(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        cache: "OnnxCache | None" = None,
        exit: ExitRule | None = None,
        return_steps: bool = False,
    ) -> TRMOutput:
        """Returns logits (B, T, V); with a cache only those of the last token, (B, 1, V).

        attention_mask: 0 = padding, on the left. The first call with a cache passes the prompts, each later call one
        token per row. Raises UserError for early exits and for return_steps, which a graph does not support."""
        self.refuse(exit, return_steps)
        logits = self._whole(input_ids, attention_mask) if cache is None else cache.extend(input_ids, attention_mask)
        steps = torch.full(logits.shape[:2], max_depth(self.config))
        return TRMOutput(None, None, None, logits, None, Carry(None, None, steps))

    def refuse(self, exit: ExitRule | None, return_steps: bool):
        """Raises UserError for an exit rule or a read-out that the graph does not support."""
        if return_steps:
            raise UserError("an ONNX graph returns only its last recursion step: use the checkpoint to trace all steps")
        if exit is not None and exit.exit != "fixed":
            raise UserError(
                f"an ONNX graph has the same depth for every token: --exit {exit.exit} needs the checkpoint"
            )
        depth = max_depth(self.config)
        if max_depth(self.config, exit) != depth:
            raise UserError(f"this ONNX graph has max_recursion_depth {depth}: export it again with another depth")

    def _whole(self, ids, mask) -> Float[Tensor, "b t v"]:
        """Returns all logits of a text in one call. A padding column gets the logits of the nearest real token."""
        (B, T), (rows, lengths, first) = ids.shape, aligned(ids, mask)
        column = (np.arange(T) - first[:, None]).clip(0, lengths[:, None] - 1)
        read = np.arange(B)[:, None] * rows.shape[1] + column
        return OnnxCache(self, B, T).run(rows, lengths, read.ravel()).view(B, T, -1)


def aligned(ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows moved to the left edge (B, U), their lengths (B,), and their first columns before (B,).

    U is the length of the longest row. Padding may be on the left, and on the right of rows that have ended. Raises
    ValueError for any other mask."""
    B, T = ids.shape
    mask = np.ones((B, T), dtype=np.int64) if mask is None else mask.long().numpy()
    if (np.diff(mask, axis=1, prepend=0) > 0).sum(axis=1).max() > 1 or mask.max() > 1:
        raise ValueError("attention_mask must be 1 from the first real token of a row to its last, and 0 elsewhere")
    lengths, first = mask.sum(axis=1).clip(1), np.where(mask.any(axis=1), mask.argmax(axis=1), T - 1)
    column = np.arange(lengths.max()) + first[:, None]
    return np.take_along_axis(ids.numpy(), column.clip(max=T - 1), axis=1), lengths, first


class OnnxCache:
    """The keys and values of every slot, in buffers that the graph reads and writes in place.

    For a graph without a cache it stores the text so far instead."""

    takes_pieces = False  # the first call passes the whole prompts

    def __init__(self, model: OnnxModel, batch: int, max_len: int):
        c = model.config
        if max_len > c.max_seq_len:
            raise ValueError(f"the graph has positions for {c.max_seq_len} tokens, not for {max_len}")
        self.model, self.max_len, self.length = model, max_len, 0  # length is in columns and includes padding
        self.lengths = np.zeros(batch, dtype=np.int64)  # real tokens of each row
        self.text = None  # (ids, mask) so far, for a graph without a cache
        shape, inputs = (batch, c.n_kv_heads, max_len, c.head_dim), model.session.get_inputs()
        self.slots = {e.name: np.zeros(shape, np.float32) for e in inputs if e.name.startswith("past_")}
        self._bind(batch)

    def _bind(self, rows: int):
        """Lets the graph use the first rows of the buffers. On a CPU it works in them, on a GPU in copies."""
        runtime, self.binding = need("onnxruntime"), self.model.session.io_binding()
        kind, _, index = self.model.device.partition(":")
        for name, buffer in self.slots.items():
            slot = runtime.OrtValue.ortvalue_from_numpy(buffer[:rows], kind, int(index or 0))
            self.binding.bind_ortvalue_input(name, slot)
            self.binding.bind_ortvalue_output(name.replace("past", "present"), slot)

    def be_empty(self):
        """Removes all rows. From then on, the batch consists of the rows that `adopt` adds."""
        self.lengths, self.length = self.lengths[:0], 0

    def adopt(self, other: "OnnxCache", row: int, tokens: int):
        """Adds a row: the `tokens` tokens of a row of another cache.  Works on a CPU, for a graph with a cache."""
        for name, buffer in self.slots.items():
            buffer[len(self.lengths), :, :tokens] = other.slots[name][row, :, :tokens]
        self._begin_with(np.append(self.lengths, tokens))

    def drop(self, row: int):
        """Removes a row. The last row takes its number."""
        last, lengths = len(self.lengths) - 1, self.lengths.copy()
        for buffer in self.slots.values():
            buffer[row, :, : lengths[last]] = buffer[last, :, : lengths[last]]
        lengths[row] = lengths[last]
        self._begin_with(lengths[:last])

    def trim(self):
        """Sets `length` to what the longest row needs; padding takes no place here."""
        self.length = int(self.lengths.max(initial=0))

    def _begin_with(self, lengths):
        self.lengths = lengths
        self.trim()
        if len(lengths):
            self._bind(len(lengths))

    def extend(self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"] | None) -> Float[Tensor, "b 1 v"]:
        """Adds the prompts, or one token per row. Returns the logits of each row's last token.

        Raises ValueError if the cache is full, or if a later call passes more than one token per row."""
        B, T = ids.shape
        if self.length + T > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} columns, {self.length} are used and {T} more were given")
        if self.length and T > 1:
            raise ValueError(f"{T} tokens per row after the first call: an ONNX graph takes one at a time")
        if not self.model.facts["cache"]:
            mask = torch.ones_like(ids) if mask is None else mask
            new = (ids, mask)
            self.text = new if self.text is None else [torch.cat(pair, dim=1) for pair in zip(self.text, new)]
            logits = self.model._whole(*self.text)[:, -1:]
        elif self.length == 0:
            rows, self.lengths, _ = aligned(ids, mask)
            logits = self.run(rows, self.lengths, np.arange(B) * rows.shape[1] + self.lengths - 1)[:, None]
        else:  # a masked token does not increase its row's length, so the next token overwrites it
            logits = self.run(ids.numpy(), self.lengths + 1, np.arange(B))[:, None]
            self.lengths = self.lengths + (1 if mask is None else mask[:, 0].numpy())
        self.length += T
        return logits

    def run(self, rows: np.ndarray, lengths: np.ndarray, read: np.ndarray) -> Float[Tensor, "n v"]:
        """Runs the graph once and returns the logits (N, V) of the tokens `read` (N,), given as row * T + column.

        rows (B, T) are the new tokens; lengths (B,) are the lengths of the rows after this call."""
        last, total = (lengths - 1).astype(np.int32), lengths.max(keepdims=True).astype(np.int32)
        for name, array in zip(INPUTS, (np.ascontiguousarray(rows), last, total, read)):
            self.binding.bind_cpu_input(name, array)
        logits = np.empty((len(read), self.model.config.vocab_size), dtype=np.float32)
        self.binding.bind_ortvalue_output("logits", need("onnxruntime").OrtValue.ortvalue_from_numpy(logits))
        try:
            self.model.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime raises many types
            raise UserError(f"{self.model.path} does not run ({one_line(error)}): export again") from None
        if not np.isfinite(logits).all():
            raise UserError(f"{self.model.path} returns NaN or infinity as logits: export again")
        return torch.from_numpy(logits)
