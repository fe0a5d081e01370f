"""The whole model's weights on rank 0, whatever the strategy spread them over."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from . import ranks


@torch.no_grad()
def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """bfloat16 copies on the CPU by official name on rank 0, an empty dict elsewhere. Every rank calls.

    model: the bare module, as built, also when DDP or a DeepSpeed engine wraps it. Under ZeRO-3 one parameter after the other is
    assembled, so no device ever holds more than its own share and one parameter.
    """
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with _assembled(tensor):
            if ranks.rank() == 0:
                weights[name] = tensor.detach().to("cpu", torch.bfloat16, copy=True)
    return weights


def _assembled(tensor: torch.Tensor):
    """A context in which a parameter that ZeRO-3 has partitioned is whole."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
