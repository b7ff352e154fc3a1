"""Int8 weights for decoding on a CPU.

Compared with fp32, decoding a token reads a quarter of the bytes, and a matrix product takes half the time. Only
weights are quantized. Activations are rounded to bf16 before each product, row by row, so the result of a row does
not depend on other rows. Products use PyTorch's int8 weight-only kernel, on which torchao is built. Its time grows with
the number of rows: from about 16 rows on, a prompt or batch takes as long as in fp32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from src.checkpoint import load_model
from src.errors import UserError
from src.language_model import LanguageModel
from src.runtime import DTYPES, choose_precision

LEVELS = 127  # int8, symmetric about 0
# torch._weight_int8pack_mm (aten/src/ATen/native/cpu/int8mm_kernel.cpp, tinygemm_kernel) reads the inputs of a row in
# steps of 16 (AVX-512, also on CPUs with AMX), 8 (AVX2, NEON) or 1. It does not check the width: if the width is not a
# multiple of the step, the last step reads past the row. AVX-512 also needs aligned addresses, to 32 bytes for inputs
# and 16 for weights. Any number of rows and outputs is allowed. So widths are padded with zeros to a multiple of 16,
# and both tensors are new: PyTorch aligns a new tensor to 64 bytes, but a slice of another may not be aligned.
STEP = 16


class Int8Linear(nn.Module):
    """nn.Linear for inference, (..., D) -> (..., O), with int8 weights (O, D padded to STEP) and a scale per output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LEVELS).clamp(min=1e-30).bfloat16()  # the kernel needs bf16
        levels = (weight / scale[:, None]).round().clamp(-LEVELS, LEVELS)
        self.padding = (0, -linear.in_features % STEP)
        self.weight, self.scale = nn.Buffer(F.pad(levels, self.padding).to(torch.int8).contiguous()), nn.Buffer(scale)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
        rows = x.reshape(-1, x.shape[-1])
        rows = F.pad(rows, self.padding) if self.padding[1] else rows
        rows = rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype).view(*x.shape[:-1], len(self.scale))
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def train(self, mode: bool = True):
        if mode:
            raise ValueError("int8 weights cannot be trained: load the checkpoint in fp32")
        return super().train(mode)


def load_for_writing(folder, device: torch.device, precision: str) -> LanguageModel:
    """Returns the LanguageModel of a checkpoint or run folder.  precision: auto, fp32, bf16, fp16, or int8 weights.

    Raises UserError as `load_model` does, and for int8 without a CPU."""
    in_int8 = precision == "int8"
    if in_int8 and device.type != "cpu":
        raise UserError(f"--precision int8 needs a CPU, not {device.type}: use --device cpu or another precision")
    name, _ = choose_precision("fp32" if in_int8 else precision, device)
    lm = load_model(folder, device, DTYPES[name])
    return lm._replace(model=quantize(lm.model)) if in_int8 else lm


def quantize(model: nn.Module) -> nn.Module:
    """Replaces every linear layer of a TRMModel on a CPU by an Int8Linear, in place.  Returns the model in eval mode.

    A head tied to the embedding gets its own int8 weights; the embedding stays in its precision. The halting head is a
    single row and is not quantized."""
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear) and name != "q_head":
                setattr(module, name, Int8Linear(linear).eval())
    return model
