"""A block's large matrices, in whatever form a file stores them: dense, as two factors, as a Ghost layer, or as one of factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..layers.ghost import from_digits

Weights = Mapping[str, torch.Tensor]


def first(weights: Weights, part: str) -> str:
    """The name of the tensor that reads a part's inputs: its columns are theirs."""
    return down if (down := f"{part}.down.weight") in weights else f"{part}.weight"


def last(weights: Weights, part: str) -> str:
    """The name of the tensor that gives a part's outputs: its rows are theirs."""
    return up if (up := f"{part}.up.weight") in weights else f"{part}.weight"


def product(weights: Weights, part: str) -> torch.Tensor:
    """The matrix [outputs, inputs] in one piece, float32."""
    down, up = first(weights, part), last(weights, part)
    return weights[down].float() if down == up else weights[up].float() @ weights[down].float()


def is_ghost(weights: Weights, matrix: str) -> bool:
    return last(weights, f"{matrix}.ghost") in weights


def order_of(weights: Weights, matrix: str, outputs: int) -> torch.Tensor:
    """Which row of [core ; ghost] each output of a Ghost layer is, [outputs] whole numbers."""
    return from_digits(weights[f"{matrix}.order"].float()) if f"{matrix}.order" in weights else torch.arange(outputs)


def whole(weights: Weights, matrix: str) -> torch.Tensor:
    """The matrix that a dense or Ghost layer amounts to, [outputs, inputs], float32; an activation inside it is taken for the identity."""
    if not is_ghost(weights, matrix):
        return product(weights, matrix)
    core = product(weights, f"{matrix}.core")
    rows = torch.cat([core, product(weights, f"{matrix}.ghost") @ core])
    return rows[order_of(weights, matrix, len(rows))]
