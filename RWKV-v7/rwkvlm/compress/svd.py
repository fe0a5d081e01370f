"""Two factors in the place of a matrix, from its singular value decomposition: of this rank, nothing is nearer to it (Eckart-Young)."""

from __future__ import annotations

import torch

from ..config import ModelConfig, UserError
from .weights import Weights, first, last, product


def factorise(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [outputs, inputs] -> down [rank, inputs] and up [outputs, rank], float32.

    The square root of each singular value goes to either side. The Frobenius error of up @ down is the root of the sum
    of squares of the singular values that are left out.
    """
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).float(), (U[:, :rank] * root).float()


def rank_for(ratio: float, inputs: int, outputs: int) -> int:
    """The rank that leaves `ratio` of a matrix's parameters, to the nearest multiple of 8; 0 for ratio 1 and where nothing is saved."""
    rank = max(8, 8 * round(ratio * inputs * outputs / (inputs + outputs) / 8))
    return rank if ratio < 1 and rank * (inputs + outputs) < inputs * outputs else 0


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise UserError(f"--svd_rank_ratio {ratio} must lie in (0, 1]; 1 leaves every matrix in one piece")


@torch.no_grad()
def factorise_matrices(weights: Weights, config: ModelConfig, ratio: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The large matrices of all blocks as two factors, wherever that is smaller than the form in which they are.

    ratio in (0, 1]: of a dense matrix's parameters, that is of the rank at which two factors are as large as it; 1 changes nothing.
    Returns the weights, and for each matrix that has changed the relative Frobenius error, root mean square over the blocks.
    """
    check_ratio(ratio)
    smaller, errors, ranks = dict(weights), {}, config.rank_of()
    for name, (inputs, outputs) in config.parts().items():
        rank = rank_for(ratio, inputs, outputs)
        if not 0 < rank < ranks.get(name, rank + 1):  # nothing is saved, or it is in two factors as small already
            continue
        squares = []
        for layer in range(config.n_layer):
            part = f"blocks.{layer}.{name}"
            weight = product(weights, part)
            if not weight.isfinite().all():
                raise UserError(f"the checkpoint's {part} has numbers that are not finite; give an earlier checkpoint of that run")
            down, up = factorise(weight, rank)
            del smaller[first(weights, part)]
            smaller.pop(last(weights, part), None)
            smaller |= {f"{part}.down.weight": down, f"{part}.up.weight": up}
            squares.append(((up @ down - weight).norm() / weight.norm().clamp(min=1e-30)) ** 2)
        errors[name] = float(torch.stack(squares).mean().sqrt())
    return smaller, errors
