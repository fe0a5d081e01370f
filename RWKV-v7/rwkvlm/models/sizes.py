"""The sizes of a model, read off a checkpoint's tensors, with errors that name the tensor that is missing or wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..config import UserError


class Sizes:
    """The tensors of a file that should hold a model of this kind, such as "an RWKV-7".

    give: the type to ask the user for where it does not.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], kind: str, give: str) -> None:
        self.tensors, self.kind, self.give = tensors, kind, give

    def n_layer(self) -> int:
        layers = {int(match[1]) for name in self.tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
        if not layers or layers != set(range(len(layers))):
            raise UserError(
                f"the checkpoint is not {self.kind} model: its blocks are {sorted(layers) or 'missing'}; "
                f"give a complete {self.give} .pth file"
            )
        return len(layers)

    def shape(self, name: str, dims: int) -> torch.Size:
        """Of a tensor that must be there, with so many dimensions."""
        if name not in self.tensors:
            raise UserError(f"the checkpoint is not {self.kind} model: {name} is missing; give a .pth file of type {self.give}")
        if self.tensors[name].dim() != dims:
            raise UserError(
                f"the checkpoint's {name} has shape {list(self.tensors[name].shape)}, not {dims} dimensions; "
                f"give a .pth file of type {self.give}"
            )
        return self.tensors[name].shape
