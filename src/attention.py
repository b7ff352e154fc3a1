"""Scaled dot-product attention, with other ways for bf16 on a CPU where PyTorch's is slow."""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.dropout import dropout

MOST_SCORES = 2**27  # B * H * T * T, the largest number of scores held at once in the backward pass
SHORT = 128  # T up to which batched products without a causal mask are faster than the flash kernel; a board has 81


class _CausalCPU(torch.autograd.Function):
    """Causal attention with a backward pass that recomputes the scores and consists of five batched matrix products.

    The forward pass is PyTorch's flash kernel. On CPUs with bf16 hardware, the backward pass of that kernel is far
    slower than matrix products are. If the caller is compiled, the elementwise work between the products is fused."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        B, H, T, E = grad.shape
        q, k, v, logsumexp = ctx.saved_tensors  # gradient checkpointing allows reading them only once
        q, k, v, grad = (t.reshape(B * H, T, E) for t in (q, k, v, grad))
        logsumexp, scale = logsumexp.reshape(B * H, T, 1), E**-0.5
        is_past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = torch.bmm(q.float(), k.float().transpose(1, 2)) * scale  # fp32: exp would amplify rounding
        p = torch.where(is_past, torch.exp(scores - logsumexp), 0.0).to(q.dtype)
        grad_p = torch.bmm(grad, v.transpose(1, 2)).float()
        row = (p.float() * grad_p).sum(-1, keepdim=True)  # from p and grad_p, so that roundings cancel
        grad_scores = (p.float() * (grad_p - row) * scale).to(q.dtype)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        return tuple(t.view(B, H, T, E) for t in (grad_q, grad_k, grad_v))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, p: float) -> Tensor:
    """softmax(q k^T / sqrt(E)) v.  q (B, H, T, E); k, v (B, K, S, E) with H a multiple of K -> (B, H, T, E).

    mask: True where a query may attend.  is_causal: without a mask, each query attends to its own and earlier keys.
    p: probability of dropout."""
    is_plain = mask is None and not p and q.dtype == k.dtype == torch.bfloat16 and q.device.type == "cpu"
    if p and q.device.type == "cpu":
        return _with_dropout(q, k, v, mask, is_causal, p)
    if is_plain and is_causal and _is_slow_in_torch(q, k):
        return _CausalCPU.apply(q, *_for_all_heads(q, k, v))
    if is_plain and not is_causal and _is_short(q, k):
        return _by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, enable_gqa=q.shape[1] != k.shape[1])


def _by_products(q, k, v):
    """Attention to all positions by two batched matrix products.  Keeps all scores: for short rows."""
    B, H, T, E = q.shape
    q, k, v = (t.reshape(B * H, -1, E) for t in (q, k, v))
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)) * E**-0.5  # fp32: exp would amplify rounding
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(B, H, T, E)


def _for_all_heads(q, k, v) -> list[Tensor]:
    """Repeats keys and values (B, K, S, E) that several query heads share -> (B, H, S, E)."""
    groups = q.shape[1] // k.shape[1]
    return [t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v)]


def _with_dropout(q, k, v, mask, is_causal, p):
    """Attention with dropout of its weights, on a CPU.  Keeps all scores.

    If the caller is compiled, the work between the two products is fused."""
    (T, E), S = q.shape[-2:], k.shape[2]
    k, v = _for_all_heads(q, k, v)
    if mask is None and is_causal:
        mask = torch.ones(T, S, dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):  # scores in fp32: exp would amplify rounding
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * E**-0.5
        # not -inf, which would make the row of a query that sees no key NaN
        seen = scores if mask is None else scores.masked_fill(~mask, torch.finfo(wide).min)
        return dropout(seen.softmax(-1), scores, p).to(v.dtype) @ v


def _is_short(q, k) -> bool:
    return q.shape[:2] == k.shape[:2] and 1 < q.shape[2] == k.shape[2] <= SHORT


def _is_slow_in_torch(q, k) -> bool:
    is_square = q.shape[2] == k.shape[2] and q.shape[0] * q.shape[1] * q.shape[2] ** 2 <= MOST_SCORES
    return is_square and torch.is_grad_enabled()
