"""Structured sparsity: whole hidden units of the channel mixing are removed, a row of ffn.key with its column of ffn.value."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import ModelConfig, PhantomConfig, UserError
from ..config.phantom import CARRIED, encode, parse_ratios
from ..layers.ghost import to_digits
from .weights import Weights, first, is_ghost, last, order_of, whole

KEY, VALUE = "ffn.key", "ffn.value"


def importance(weights: Weights, layer: int, activity: torch.Tensor | None = None) -> torch.Tensor:
    """How much each hidden unit of a block matters, [dim_ffn]: |its row of key| * |its column of value|.

    With activity [dim_ffn], the root mean square of what each unit puts out on a text, it is activity * |column|: how far
    the block's output moves without the unit.
    """
    columns = whole(weights, f"blocks.{layer}.{VALUE}").norm(dim=0)
    return columns * (whole(weights, f"blocks.{layer}.{KEY}").norm(dim=1) if activity is None else activity.to(columns))


def units_left(config: ModelConfig, ratio: float) -> int:
    """Hidden units that remain in every block: to the nearest multiple of 16, which the native kernels ask for.

    All of them for ratio 0; UserError for a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise UserError(f"--sparsity_ratio {ratio} must lie in [0, 1); 0 removes nothing")
    return min(config.dim_ffn, max(16, 16 * round(config.dim_ffn * (1 - ratio) / 16))) if ratio else config.dim_ffn


@torch.no_grad()
def remove_units(
    weights: Weights, config: ModelConfig, ratio: float, activity: list[torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights without the least important hidden units, equally many in every block, so that one dim_ffn describes them all.

    activity: one tensor a block (see importance). Rows of a Ghost layer's core stay, since its ghosts are made of them.
    Raises UserError where a Phantom's Ghost layers leave fewer to remove.
    """
    left, smaller = units_left(config, ratio), dict(weights)
    if left == config.dim_ffn:
        return smaller
    after = _described(config, left, ratio)
    for layer in range(config.n_layer):
        key, value = f"blocks.{layer}.{KEY}", f"blocks.{layer}.{VALUE}"
        worth = importance(weights, layer, None if activity is None else activity[layer])
        if is_ghost(weights, key):
            rows = config.core_rows(KEY)
            order = order_of(weights, key, config.dim_ffn)
            worth[order < rows] = torch.inf
            keep = _best(worth, left)
            kept = order[keep].sort().values  # rows of [core ; ghost]; the core is first and whole
            ghost = last(weights, f"{key}.ghost")
            smaller[ghost] = weights[ghost][kept[rows:] - rows]
            if f"{key}.order" in weights:
                smaller[f"{key}.order"] = to_digits(torch.searchsorted(kept, order[keep]))
        else:
            keep = _best(worth, left)
            smaller[last(weights, key)] = weights[last(weights, key)][keep]
        reader = first(weights, f"{value}.core" if is_ghost(weights, value) else value)
        smaller[reader] = weights[reader][:, keep]
    if CARRIED in weights:
        smaller[CARRIED] = torch.tensor(encode(after), dtype=torch.float32)
    return smaller


def _best(worth: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest are, in their order."""
    return worth.topk(count).indices.sort().values


def _described(config: ModelConfig, dim_ffn: int, ratio: float) -> ModelConfig:
    """The sizes with fewer hidden units: cores stay as large as they are, so that their share of the rows is larger."""
    if not isinstance(config, PhantomConfig):
        return config.with_(dim_ffn=dim_ffn)
    ratios, rows = parse_ratios(config.core_ratios), config.core_rows(KEY)
    if rows >= dim_ffn:
        raise UserError(
            f"--sparsity_ratio {ratio} leaves {dim_ffn} hidden units, but the core of {KEY} has {rows}, which all stay; use a smaller one"
        )
    if ratios.get(KEY, config.core_ratio) < 1:
        ratios[KEY] = rows / dim_ffn if rows else 1.0  # a dense one stays so too
    after = replace(config, dim_ffn=dim_ffn, core_ratios=",".join(f"{name}={share:.6g}" for name, share in ratios.items()))
    if after.parts().keys() != config.parts().keys():
        raise UserError(
            f"--sparsity_ratio {ratio} leaves {dim_ffn} hidden units, too few for the Ghost layer of {VALUE}; use a smaller one"
        )
    assert after.core_rows(KEY) == rows
    return after
