"""The elementwise parts of a block in plain PyTorch: the oracle, and the form for every other device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_fit


def token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    B, _, C = _sequences("token_mix", x)
    _check("token_mix", x=x, last=(last, (B, C)), **{f"mixes[{i}]": (mix, C) for i, mix in enumerate(mixes)})
    before = F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    shift = before - x
    return [torch.addcmul(x, shift, mix) for mix in mixes]


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor | None,
    mixes: list[Tensor],
    bounds: Tensor | None,
    shifted=token_mix,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    B, T, C = _sequences("norm_mix", x)
    _check("norm_mix", x=x, branch=(branch, (B, T, C)), weight=(weight, (C,)), bias=(bias, (C,)))
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
    whole, C = tuple(k.shape), _sequences("time_mix_inputs", k)[2]
    if head_size < 1 or C % head_size:
        raise ValueError(f"time_mix_inputs: expected a head_size that divides the {C} channels, got {head_size}")
    _check("time_mix_inputs", k=k, w_low=(w_low, whole), a_low=(a_low, whole), v=(v, whole), v_first=(v_first, whole), v_low=(v_low, whole))
    _check("time_mix_inputs", k=k, w0=(w0, C), k_k=(k_k, C), k_a=(k_a, C), a0=(a0, C), v0=(v0, C))
    if len({x is None for x in (v_first, v_low, v0)}) > 1:
        raise ValueError("time_mix_inputs: v_first, v_low and v0 come together or not at all")
    rate = torch.sigmoid(a0 + a_low)
    kk = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1, eps=1e-12).flatten(-2)
    if v_first is not None:
        v = torch.lerp(v, v_first, torch.sigmoid(v0 + v_low))
    return w0 + w_low, k * (1 + (rate - 1) * k_a), -kk, kk * rate, v, v_first


def time_mix_output(y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float) -> Tensor:
    (B, T, C), (H, N), whole = _sequences("time_mix_output", y), r_k.shape, tuple(y.shape)
    _check(
        "time_mix_output",
        y=y,
        r=(r, whole),
        k=(k, whole),
        v=(v, whole),
        g=(g, whole),
        weight=(weight, (C,)),
        bias=(bias, (C,)),
        r_k=(r_k, C),
    )
    heads = (B, T, H, N)
    normal = F.group_norm(y.reshape(B * T, C), H, weight, bias, eps).view(heads)
    bonus = (r.reshape(heads) * k.reshape(heads) * r_k).sum(-1, keepdim=True)
    return (normal + bonus * v.reshape(heads)).view(B, T, C) * g


def relu_square(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# Broadcasting would make something of nearly any shapes; the kernels refuse what these two checks refuse.


def _check(op: str, **tensors: Tensor | tuple[Tensor | None, tuple[int, ...] | int]) -> None:
    """ValueError for one that is not on the device of the first, or has not the shape (or number of elements) that stands beside it.

    The first stands alone; one that is None is passed over.
    """
    (first, like), *others = tensors.items()
    for name, (x, shape) in others:
        if x is not None:
            check_fit(op, name, x, shape, first, like.device)


def _sequences(op: str, x: Tensor) -> torch.Size:
    if x.dim() != 3 or not x.numel():
        raise ValueError(f"{op}: expected [B, T, C], none of them 0, got {list(x.shape)}")
    return x.shape
