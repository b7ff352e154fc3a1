"""The settings of an export to ONNX, which scripts read before they import torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OnnxExport:
    """What to export, and for whom.

    Args:
        checkpoint: checkpoint or run folder (a run folder means its best); none = the released checkpoint
        output: folder to write; it then holds all that generate.py --onnx needs
        enable_kv_cache: keys and values go in and out; false = the whole text is encoded again for each token
        quantize: int8 = 8-bit weights and products; the embedding stays as it is
        opset: version of ONNX's operators, older for older providers; none = the exporter's own
        device: who shall run it: cpu, or cuda, ONNX Runtime's CUDA provider
        contrib_ops: use ONNX Runtime's own operators (com.microsoft), which are faster there; false = ONNX's alone, for
            other runtimes
        max_recursion_depth: recursion steps of every token, fixed in the graph; none = as trained
    """

    checkpoint: str | None = None
    output: str | None = None
    enable_kv_cache: bool = True
    quantize: Literal["none", "int8"] = "none"
    opset: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    contrib_ops: bool = True
    max_recursion_depth: int | None = None
