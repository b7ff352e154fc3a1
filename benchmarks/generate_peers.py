"""The generators that bench_generate.py compares, as jobs to time: our torch and ONNX paths, and transformers."""

import sys
from pathlib import Path

import common  # noqa: F401  (puts the repository root on sys.path)
import torch
from torch import nn

from src.decode import store_for_decoding
from src.errors import UserError
from src.model import TRMModel
from src.quantize import quantize
from src.sampling import generate_ids
from tests.reference import llama_with_weights_of

TORCH, ONNX = ("fp32", "bf16", "int8"), ("onnx_fp32", "onnx_int8")
EXACT = ("fp32", "onnx_fp32")  # paths that must write the same text as transformers


class Greedy:
    """A job that generates greedily and keeps the ids in `ids`."""

    def __init__(self, generate):
        self.generate, self.ids = generate, None

    def __call__(self):
        self.ids = self.generate()


def ours(model, prompt, new_tokens: int, mask=None, use_cache: bool = True) -> Greedy:
    options = {"temperature": 0, "use_cache": use_cache, "attention_mask": mask}
    return Greedy(lambda: generate_ids(model, prompt, new_tokens, **options))


def in_precision(config, weights: dict, path: str, folder: str):
    """Returns a model with these weights for one of our paths.  Raises UserError if a package is missing."""
    model = TRMModel(config).eval()
    model.load_state_dict(weights)
    if path in ONNX:
        return _onnx_model(model, path == "onnx_int8", Path(folder))
    if path == "int8":
        return quantize(model)
    return model.bfloat16() if path == "bf16" else store_for_decoding(model)


def _onnx_model(model, in_int8, folder):
    """Returns the model as an ONNX session, exported as by export_onnx.py but without a tokenizer."""
    from src.onnx import export as onnx_export
    from src.onnx.session import GRAPH, OnnxModel, need

    runtime = need("onnxruntime")
    proto = onnx_export.trace(model, fused=onnx_export.fits_fused(model.config))
    onnx_export.save(onnx_export.quantize(proto) if in_int8 else proto, folder / GRAPH)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    return OnnxModel(session, model.config, {"cache": True}, "cpu")


def transformers_job(model: nn.Module, prompt, new_tokens: int, mask=None) -> Greedy:
    llama = llama_with_weights_of(model)  # it has no EOS, so it always generates new_tokens
    assert llama.config._attn_implementation == "sdpa"
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt) if mask is None else mask

    def generate():
        with torch.inference_mode():
            return llama.generate(prompt, **options)

    return Greedy(generate)


def available(paths: list[str]) -> list[str]:
    """Returns the paths whose packages are installed, and prints a line on stderr for each other path."""
    kept = []
    for path in paths:
        try:
            if path in ONNX:
                from src.onnx.session import need

                need("onnxruntime"), need("onnxscript")
            if path == "transformers":
                import transformers  # noqa: F401
            kept.append(path)
        except (UserError, ImportError) as error:
            print(f"{path} is skipped: {error}", file=sys.stderr)
    return kept
