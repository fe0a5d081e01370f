"""The large matrices of a block, in one piece or as two low-rank factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

# (name, inputs, outputs) -> a module from [..., inputs] to [..., outputs]; names: att.receptance, att.key, att.value,
# att.output, ffn.key, ffn.value
Linear = Callable[[str, int, int], nn.Module]


def dense(name: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


class LowRank(nn.Module):
    """`up (down x)`, in the place of a matrix [outputs, inputs]: down.weight [rank, inputs], up.weight [outputs, rank]."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.up(self.down(x))


def linear_of(ranks: Mapping[str, int]) -> Linear:
    """Makes the matrices that have a rank as two factors, and all others in one piece."""
    return lambda name, inputs, outputs: LowRank(inputs, outputs, ranks[name]) if name in ranks else dense(name, inputs, outputs)
