"""Ghost layers: a small core that is trained in full, and cheap projections of it in the place of all other outputs.

Source: GhostNet (arXiv 1911.11907) and GhostRNN (arXiv 2411.14489).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .linear import Linear, dense


class GhostLinear(nn.Module):
    """`[core ; ghost]` with `core = W_c x` and `ghost = P f(core)`, in the place of a matrix [outputs, inputs].

    core.weight [core_rows, inputs], ghost.weight [outputs - core_rows, core_rows]. f is the identity, or ReLU times sqrt(2), which
    keeps the mean square of its input. permuted: `order` [2, outputs] says which row of [core ; ghost] each output is, as two digits
    to the base 256, which every floating-point format has exactly. linear makes "core" and "ghost".
    """

    def __init__(
        self, inputs: int, outputs: int, core_rows: int, activation: str = "identity", permuted: bool = False, linear: Linear = dense
    ) -> None:
        super().__init__()
        self.core = linear("core", inputs, core_rows)
        self.ghost = linear("ghost", core_rows, outputs - core_rows)
        self.activation = activation
        if permuted:
            self.register_buffer("order", torch.empty(2, outputs))
        else:
            self.order = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        core = self.core(x)
        y = torch.cat([core, self.ghost(torch.relu(core) * math.sqrt(2) if self.activation == "relu" else core)], dim=-1)
        return y if self.order is None else y[..., from_digits(self.order)]


def to_digits(order: torch.Tensor) -> torch.Tensor:
    """[n] whole numbers below 65536 -> [2, n] digits to the base 256, as floating-point numbers."""
    return torch.stack([order // 256, order % 256]).float()


def from_digits(digits: torch.Tensor) -> torch.Tensor:
    high, low = digits.long()
    return high * 256 + low


@torch.no_grad()
def factorise(weight: torch.Tensor, core_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best permuted GhostLinear with f = identity in the place of a matrix.

    weight [outputs, inputs] -> core.weight, ghost.weight, order as whole numbers [outputs], in the dtype of weight.
    The error is the truncated SVD's, the smallest of this rank (Eckart-Young). With U the first singular vectors, the core
    is those rows of the truncated matrix that a pivoted elimination of U chooses, so that P = U_rest U_core^-1 has small
    entries; the first rows as they come would make it as large as their condition is bad.
    """
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    permutation, L, upper = torch.linalg.lu(U[:, :core_rows])
    core = L[:core_rows] @ upper @ (S[:core_rows, None] * Vh[:core_rows])
    ghost = torch.linalg.solve_triangular(L[:core_rows], L[core_rows:], upper=False, left=False, unitriangular=True)
    return core.to(weight.dtype), ghost.to(weight.dtype), permutation.argmax(1)  # U = permutation [L_core ; L_rest] upper
