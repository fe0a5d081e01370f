"""The native kernels (cuda/adamw): C++ on the CPU, CUDA on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvlm import native


def why_not() -> str:
    """Empty when the C++ kernels run here (they are then built), else the reason."""
    return native.available("adamw")[1]


def adamw_(
    masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """As `ops.adamw.adamw_`; on a CPU numbers below the smallest normal one (1.2e-38) count as zero."""
    grads = [grad.contiguous() for grad in grads]
    torch.ops.rwkvlm.adamw_(masters, rounded, grads, exp_avgs, exp_avg_sqs, steps, scale, found_inf, lr, beta1, beta2, eps, weight_decay)


def gradient_norms(grads: list[Tensor]) -> Tensor:
    return torch.ops.rwkvlm.gradient_norms([grad.contiguous() for grad in grads])
