"""Token shift: every token sees the one before it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def token_shift(x: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
    """The sequence moved one token to the right.

    x: [B, T, C]. last: [B, C], the token before x[:, 0]; None stands for zeros. Returns [B, T, C].
    """
    if last is None:
        return F.pad(x, (0, 0, 1, -1))
    return torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
