"""The slow oracle: all logits at once, torch's own cross entropy, and L2Wrap as a second autograd step."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _L2Wrap(torch.autograd.Function):
    """Passes the loss through; its backward adds `l2wrap / rows * max_logit` to each row's arg-max (RWKV-LM, train_temp)."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, logits: torch.Tensor, l2wrap: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.l2wrap = l2wrap
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (logits,) = ctx.saved_tensors
        top, at = logits.max(-1, keepdim=True)
        grad = torch.zeros_like(logits).scatter_(-1, at, top * (ctx.l2wrap / logits.shape[0]))
        return grad_output, grad_output.to(grad.dtype) * grad, None


def head_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = 0, l2wrap: float = 1e-4) -> torch.Tensor:
    """Same contract as `rwkvlm.ops.cross_entropy.head_cross_entropy`; `chunk` is ignored. Softmax in fp32 or better."""
    logits = x.reshape(-1, x.shape[-1]) @ weight.t()
    if logits.dtype != torch.float64:
        logits = logits.float()
    return _L2Wrap.apply(F.cross_entropy(logits, targets.reshape(-1)), logits, l2wrap)
