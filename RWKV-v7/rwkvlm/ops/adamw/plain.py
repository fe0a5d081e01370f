"""The optimizer's step and the norms with torch's own fused AdamW, for every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .arguments import check_gradients, check_step


def adamw_(
    masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """As `ops.adamw.adamw_`."""
    grads = [grad.contiguous() for grad in grads]
    check_step(masters, rounded, grads, exp_avgs, exp_avg_sqs, steps, scale, found_inf)
    grads = [grad.to(torch.float32, copy=scale is not None) for grad in grads]
    if scale is not None:
        torch._foreach_mul_(grads, scale)  # in the copies: a third set of gradients would be the largest thing there is
    if found_inf is not None:
        found_inf = (found_inf != 0).float()  # torch knows 1 and 0
    rates = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    adamw(masters, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, found_inf=found_inf, amsgrad=False, maximize=False, **rates)
    if rounded:
        torch._foreach_copy_(rounded, masters)


def gradient_norms(grads: list[Tensor]) -> Tensor:
    grads = [grad.contiguous() for grad in grads]
    check_gradients(grads)
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
