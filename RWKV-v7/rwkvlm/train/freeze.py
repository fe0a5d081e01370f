"""--freeze: parts of the model that stay as they were loaded. They get no gradient and no optimizer state."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from .. import models
from ..config import ModelConfig, UserError


def frozen_names(patterns: str, names: list[str]) -> set[str]:
    """The parameters that `patterns` (separated by commas) mean: a whole name, or its beginning up to a dot, with the shell's wildcards.

    "head" is head.weight, "blocks.1" the second block and not the eleventh, "*.att.w0" every decay. Raises UserError for a pattern
    that means nothing and when nothing would be left to train.
    """
    frozen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        meant = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")}
        if not meant:
            raise UserError(
                f"--freeze {patterns}: no parameter is called {pattern}; names are like emb, head, ln_out, blocks.0, blocks.*.ffn, *.att.w0"
            )
        frozen |= meant
    if frozen == set(names):
        raise UserError(f"--freeze {patterns} leaves nothing to train; name fewer parts")
    return frozen


def check_freeze(patterns: str, sizes: ModelConfig) -> None:
    """UserError when the patterns do not fit a model of these sizes."""
    if patterns:
        with torch.device("meta"):
            frozen_names(patterns, [name for name, _ in models.build(sizes).named_parameters()])


def freeze(model: nn.Module, patterns: str) -> None:
    """Takes the named parameters out of training; before the optimizer is made."""
    names = frozen_names(patterns, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
