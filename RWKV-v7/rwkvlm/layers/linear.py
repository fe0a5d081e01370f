"""The large matrices of a block, and who makes them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Linear = Callable[[str, int, int], nn.Module]
"""(name, inputs, outputs) -> a module from [..., inputs] to [..., outputs]; names: att.receptance, att.key, att.value, att.output, ffn.key, ffn.value."""


def dense(name: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)
