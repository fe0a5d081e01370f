"""The same in plain PyTorch: the oracle, and the form for every other device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    before = F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    shift = before - x
    return [torch.addcmul(x, shift, mix) for mix in mixes]


def norm_mix(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, last: Tensor | None, mixes: list[Tensor], bounds: Tensor | None, shifted=token_mix
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if branch is not None:
        x = x + branch
    normal = F.layer_norm(x, weight.shape, weight, bias, eps)
    if bounds is not None:
        normal = normal.index_fill(1, bounds[1:].long() - 1, 0)
    return x, normal[:, -1].clone(), shifted(normal, last, mixes)  # a view would keep all of it in a state's memory


def time_mix_inputs(
    w_low: Tensor, k: Tensor, a_low: Tensor, v: Tensor, v_first: Tensor | None, v_low: Tensor | None,
    w0: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, v0: Tensor | None, head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    rate = torch.sigmoid(a0 + a_low)
    kk = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1, eps=1e-12).flatten(-2)
    if v_first is not None:
        v = torch.lerp(v, v_first, torch.sigmoid(v0 + v_low))
    return w0 + w_low, k * (1 + (rate - 1) * k_a), -kk, kk * rate, v, v_first


def time_mix_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    (B, T, C), (H, N) = y.shape, r_k.shape
    heads = (B, T, H, N)
    normal = F.group_norm(y.reshape(B * T, C), H, weight, bias, eps).view(heads)
    bonus = (r.reshape(heads) * k.reshape(heads) * r_k).sum(-1, keepdim=True)
    return (normal + bonus * v.reshape(heads)).view(B, T, C) * g


def relu_square(x: Tensor) -> Tensor:
    return torch.relu(x).square()
