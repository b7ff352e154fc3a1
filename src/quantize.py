"""Int8 weights for decoding on a CPU: a quarter of the bytes to read for each token, half the time of an fp32 product.

Only weights are rounded ahead; each row of activations is rounded to bf16 by itself on its way into a product, so a
row's result depends on no other row. Products run in torch's int8 weight-only kernel, the one torchao builds on. Its
time grows with the rows: from about 16 on, a prompt or a batch takes as long as in fp32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 127  # int8, symmetric about 0
# torch._weight_int8pack_mm (aten/src/ATen/native/cpu/int8mm_kernel.cpp, tinygemm_kernel) takes the inputs of a row in
# steps of 16 (AVX-512, also on CPUs with AMX), 8 (AVX2, NEON) or 1, and checks nothing: the last step reads beyond a
# width that is no multiple. AVX-512 also loads 32 bytes of inputs and 16 of weights from addresses that must be
# multiples of these. Any number of rows and outputs is allowed. So widths are padded with zeros to a multiple of 16,
# and both tensors are new ones, which torch aligns to 64 bytes; a slice of another tensor may not be aligned.
STEP = 16


class Int8Linear(nn.Module):
    """nn.Linear for inference, (..., D) -> (..., O): int8 weights (O, D padded to STEP), a scale per output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LEVELS).clamp(min=1e-30).bfloat16()  # as the kernel takes it
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


def quantize(model: nn.Module) -> nn.Module:
    """Replace every linear layer of a TRMModel on a CPU by its Int8Linear, in place; returns the model, in eval mode.

    Weights that are visited many times are rounded once. A head tied to the embedding becomes one of its own, so that
    the embedding stays as it is; so does the halting head, which is one row."""
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear) and name != "q_head":
                setattr(module, name, Int8Linear(linear).eval())
    return model
