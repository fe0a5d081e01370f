"""Documents one after the other in one row, each with a state and a token shift of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


class Packed(NamedTuple):
    """Where documents lie in a row [1, T]. Each is followed by one token of padding, whose zeros the next one's token shift sees.

    bounds: [documents + 1] int32, from 0 to T, the padding belonging to the document before it (cu_seqlens of ops/wkv7,
        bounds of ops/fused)
    tokens: [T - documents] int64, the places of all that is not padding
    on_host: bounds once more, in the host's memory, for what runs document by document: nobody waits for a device to read them
    """

    bounds: torch.Tensor
    tokens: torch.Tensor
    on_host: np.ndarray


def by_document(run: Callable, packed: Packed | None, *inputs: torch.Tensor, dim: int = 1):
    """run(*inputs), from tensors with T along `dim` to one such tensor, or several; packed documents one by one.

    For these run is called for each document alone, and its results are concatenated along `dim`. No module may be called
    in it: under ZeRO-3 that is a collective, and other ranks have other numbers of documents.
    """
    if packed is None:
        return run(*inputs)
    lengths = np.diff(packed.on_host).tolist()
    # not slices, whose backward would pad each to the whole
    made = [run(*document) for document in zip(*(x.split(lengths, dim) for x in inputs))]
    return torch.cat(made, dim) if isinstance(made[0], torch.Tensor) else tuple(torch.cat(parts, dim) for parts in zip(*made))
