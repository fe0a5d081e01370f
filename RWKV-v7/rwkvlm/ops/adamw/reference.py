"""The slow oracle: AdamW from its formulas, in the dtype of the masters (float64 in tests)."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_(
    masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """As `ops.adamw.adamw_`. Source: arXiv 1711.05101, algorithm 2, with bias correction."""
    if found_inf is not None and found_inf:
        return
    for i, (p, m, v, step) in enumerate(zip(masters, exp_avgs, exp_avg_sqs, steps)):
        g = grads[i].to(p.dtype) * (1 if scale is None else scale)
        step += 1
        t = step.item()
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        p.mul_(1 - lr * weight_decay)
        p -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        if rounded:
            rounded[i].copy_(p)


def gradient_norms(grads: list[Tensor]) -> Tensor:
    return torch.stack([grad.double().square().sum().sqrt() for grad in grads])
