"""The wkv7 operator with r, k and v passed on, for what reads them afterwards: its backward kernel adds up their gradients."""

from __future__ import annotations

from typing import Callable

import torch


def passing_on(operator: str, save: Callable, gradients: Callable) -> Callable:
    """`operator` of torch.ops.rwkvlm, whose outputs are followed by r, k and v as they came: what their other uses give arrives with dy, and the backward
    kernel adds it to what it stores. Otherwise autograd would add up two tensors each. save, gradients: as for torch.library.register_autograd."""

    class PassingOn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r, w, k, v, *others):
            inputs = (r, w, k, v, *others)
            output = getattr(torch.ops.rwkvlm, operator)(*inputs)
            save(ctx, inputs, output)
            return *output, r, k, v

        backward = staticmethod(gradients)

    return PassingOn.apply
