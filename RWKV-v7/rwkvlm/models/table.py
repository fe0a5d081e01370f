"""Initial values, learning-rate scale and weight decay of every parameter: the machinery that executes a model's table.

A table is a list of rows. The first row whose pattern matches a parameter's whole name rules it; a parameter that no row
matches is an error, so a table is complete by construction.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..config import ModelConfig


@dataclass(frozen=True)
class Slot:
    """The parameter to be filled: its shape, its block (0 outside blocks), the model's sizes, a generator of its own."""

    shape: torch.Size
    layer: int
    config: ModelConfig
    generator: torch.Generator


@dataclass(frozen=True)
class Row:
    """The rule for the parameters whose whole names match `pattern`, a regular expression.

    init: makes the fp32 values; lr: factor on the learning rate; decay: weight decay or not; like: (part of the name,
    another in its place): the random numbers are those that the parameter of that name draws.
    """

    pattern: str
    init: Callable[[Slot], torch.Tensor]
    lr: float = 1.0
    decay: bool = False
    like: tuple[str, str] = ("", "")


def row_of(table: list[Row], name: str) -> Row:
    for row in table:
        if re.fullmatch(row.pattern, name):
            return row
    raise KeyError(f"no row of the table matches parameter {name!r}")


def _layer(name: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else 0


@torch.no_grad()
def init_from_table(model: nn.Module, table: list[Row], seed: int) -> None:
    """Fills every parameter and buffer in place.

    Values depend on seed and name, not on the order of creation; the last bits of orthogonal ones also on the number of
    threads.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        row = row_of(table, name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name.replace(*row.like)}".encode()))  # its seed has 32 bits
        slot = Slot(tensor.shape, _layer(name), model.config, generator)
        tensor.copy_(row.init(slot).reshape(tensor.shape))


def groups_from_table(model: nn.Module, table: list[Row], weight_decay: float) -> list[dict]:
    """Optimizer groups in the official form: params, names, weight_decay, my_lr_scale.

    Decided from names alone, so that sharded parameters (ZeRO-3) fall into the same groups; parameters without gradient
    are left out.
    """
    groups: dict[tuple[bool, float], dict] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        row = row_of(table, name)
        group = groups.setdefault(
            (row.decay, row.lr),
            {"params": [], "names": [], "weight_decay": weight_decay if row.decay else 0.0, "my_lr_scale": row.lr},
        )
        group["params"].append(param)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
