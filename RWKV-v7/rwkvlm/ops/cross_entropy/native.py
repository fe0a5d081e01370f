"""The C++ kernel (cuda/loss): bf16 and fp32 on the CPU, at the speed of its matrix products."""

from __future__ import annotations

import functools

import torch

from rwkvlm import native

LARGEST_CHUNK = 512


def why_not(dtype: torch.dtype, n_embd: int) -> str:
    """Empty when the kernel runs here on such inputs (it is then built and registered), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 or float32, not {dtype}"
    if dtype == torch.bfloat16 and n_embd % 2:
        return f"in bfloat16 it takes an even number of features, not {n_embd}"
    built, reason = native.available("loss")
    return reason if not built else _processor(dtype)


@functools.cache
def _processor(dtype: torch.dtype) -> str:
    torch.library.register_fake("rwkvlm::head_ce", _fake, allow_override=True)
    torch.library.register_fake("rwkvlm::head_scores", _fake_scores, allow_override=True)
    supported = torch.ops.rwkvlm.head_ce_supported(dtype == torch.bfloat16)
    instead = "; float32 is faster here" if dtype == torch.bfloat16 else ""
    return "" if supported else f"torch has no {dtype} matrix kernels for this processor{instead}"


def _fake(x, weight, targets, chunk, l2wrap, need_dx, need_dw):
    (n, C), V = x.shape, weight.shape[0]
    return x.new_empty((), dtype=torch.float32), x.new_empty(n if need_dx else 0, C), x.new_empty(V if need_dw else 0, C)


def _fake_scores(x, weight, targets, chunk):
    return x.new_empty(len(x), dtype=torch.float64), torch.empty_like(targets)


def auto_chunk(weight: torch.Tensor) -> int:
    """Tokens per chunk, 64 to 512: few enough that a chunk's features and their gradient stay in a second-level cache of 2 MiB.

    The kernel keeps a [V, chunk] array of such chunks; of fp32 it takes about 64 MiB.
    """
    V, C = weight.shape
    chunk = (192 << 10) // C // 32 * 32
    if weight.dtype == torch.float32:
        chunk = min(chunk, (64 << 20) // (4 * V) // 32 * 32)
    return min(LARGEST_CHUNK, max(64, chunk))


def loss_and_grads(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, l2wrap: float, need_dx: bool, need_dw: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `chunked.loss_and_grads`, where `why_not` has returned ""."""
    inputs = (x.contiguous(), weight.contiguous(), targets.contiguous())
    loss, dx, dw = torch.ops.rwkvlm.head_ce(*inputs, min(chunk, LARGEST_CHUNK) or auto_chunk(weight), l2wrap, need_dx, need_dw)
    return loss, dx if need_dx else None, dw if need_dw else None


def scores(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `chunked.scores`, where `why_not` has returned ""."""
    return torch.ops.rwkvlm.head_scores(x.contiguous(), weight.contiguous(), targets.contiguous(), auto_chunk(weight))
