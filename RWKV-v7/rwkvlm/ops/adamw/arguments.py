"""What the optimizer's operators take, as checks of the form in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MASTER, GRADIENT = {torch.float32}, {torch.float32, torch.bfloat16}


def check_step(
    masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """ValueError for other dtypes, sizes that differ, tensors with gaps, several devices."""
    sizes, index = [p.numel() for p in masters], masters[0].get_device() if masters else -1
    scalars = [*steps, *(x for x in (scale, found_inf) if x is not None)]
    fit = masters and len(steps) == len(masters) and _fit(scalars, [1] * len(scalars), MASTER, index)
    fit = (
        fit
        and all(_fit(tensors, sizes, MASTER, index) for tensors in (masters, exp_avgs, exp_avg_sqs))
        and _fit(grads, sizes, GRADIENT, index)
    )
    if not (fit and (not rounded or _fit(rounded, sizes, {torch.bfloat16}, index))):
        raise ValueError(
            "adamw: expected contiguous tensors of the same sizes on one device: "
            "fp32 masters, moments and steps, bf16 or fp32 gradients, bf16 to round to"
        )


def check_gradients(grads: list[Tensor]) -> None:
    """ValueError likewise."""
    sizes = [g.numel() for g in grads]
    if not (grads and _fit(grads, sizes, GRADIENT, grads[0].get_device())):
        raise ValueError("gradient_norms: expected contiguous bf16 or fp32 gradients on one device")


def _fit(tensors: list[Tensor], sizes: list[int], dtypes: set[torch.dtype], index: int) -> bool:
    """Whether there is one contiguous tensor of each size, all on the device of this index (-1: the host)."""
    return (
        [t.numel() for t in tensors] == sizes
        and {t.dtype for t in tensors} <= dtypes
        and {t.get_device() for t in tensors} == {index}
        and all([t.is_contiguous() for t in tensors])  # noqa: C419  (faster than a generator)
    )
