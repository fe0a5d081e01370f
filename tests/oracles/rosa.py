"""ROSA from its definition, one pair of places after the other; and rows of symbols of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("random", "sparse", "constant", "periodic", "almost periodic")


def from_definition(q: list[int], k: list[int], v: list[int]) -> list[int]:
    """What is put out at each place, -1 on a miss."""
    out = []
    for i in range(len(q)):
        best = (0, -1)
        for j in range(i):
            w = 0
            while w <= j and q[i - w] == k[j - w]:
                w += 1
            best = max(best, (w, j))
        out.append(v[best[1] + 1] if best[0] else -1)
    return out


def numbers(kind: str, *shape: int, rng: torch.Generator) -> Tensor:
    """[B, T, C] whose signs are of this kind along T; among them zeros of both signs, which are no ones."""
    x = torch.randn(shape, generator=rng)
    chance = torch.rand(shape, generator=rng)
    if kind == "sparse":
        x = torch.where(chance < 0.1, 1.0, -1.0) * x.abs()
    elif kind == "constant":
        x = x.abs()
    elif "periodic" in kind:
        period = 1 + int(torch.randint(5, (), generator=rng))
        x = x[:, :period].repeat(1, shape[1] // period + 1, 1)[:, : shape[1]].clone()
        x = torch.where(chance < 0.04, -x, x) if kind.startswith("almost") else x
    x[:, :: max(2, shape[1] // 3), 0] = 0.0
    x[:, 1 :: max(2, shape[1] // 3), -1] = -0.0
    return x


def structured(T: int) -> Tensor:
    """[T, 12], a row of +-1 a channel: random, all 1, all -1, with the periods 2 to 8, a Fibonacci and a Thue-Morse word."""
    t, fibonacci = torch.arange(T), ["0", "01"]
    while len(fibonacci[-1]) < T:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    rows = [torch.rand(T, generator=torch.Generator().manual_seed(T)) < 0.5, t >= 0]
    rows += [t % period < period // 2 for period in range(1, 9)]
    rows += [torch.tensor([symbol == "1" for symbol in fibonacci[-1][:T]]), torch.tensor([n.bit_count() % 2 == 1 for n in range(T)])]
    return torch.stack(rows, 1) * 2.0 - 1


def results(function, inputs: list[Tensor], low: Tensor, high: Tensor, **options) -> list[Tensor]:
    """The output, and the gradients of all arguments, under slopes that differ everywhere."""
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, low, high)]
    out = function(*leaves, **options)
    slopes = torch.sin(torch.arange(out.numel(), device=out.device) * 1.7).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, slopes)]


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    assert torch.equal(got[0], want[0].to(got[0].dtype)), "the output is copied, not computed"
    for a, b in zip(got[1:], want[1:], strict=True):
        scale = b.double().abs().nan_to_num(0).max().item() if b.numel() else 0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
