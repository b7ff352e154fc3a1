"""Settings of an ONNX export. Importing this module does not import torch, so that --help is fast."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OnnxExport:
    """What to export, and for which runtime.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is used
        output: folder to write; it will contain everything that generate.py --onnx needs
        enable_kv_cache: let the graph take and return the key/value cache; false = it computes the whole text again for
            each token
        quantize: int8 = 8-bit weights and matrix products; the embedding stays in fp32
        opset: ONNX opset version; older runtimes need an older one. If not given, the exporter's default
        device: device that will run the graph: cpu, or cuda (ONNX Runtime's CUDA provider)
        contrib_ops: use ONNX Runtime's own operators (com.microsoft), which are faster; false = only standard ONNX
            operators, for other runtimes
        max_recursion_depth: number of recursion steps per token, fixed in the graph; if not given, as in training
    """

    checkpoint: str | None = None
    output: str | None = None
    enable_kv_cache: bool = True
    quantize: Literal["none", "int8"] = "none"
    opset: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    contrib_ops: bool = True
    max_recursion_depth: int | None = None
