"""Head and loss on a GPU: torch's matrix products, and between them one kernel (cuda/loss) that turns logits into gradients in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import why_not_built

LOGITS = 1 << 30  # bytes that a chunk of logits may take, about


def why_not(dtype: torch.dtype) -> str:
    """Empty when the kernel runs here on inputs of this dtype (it is then built and registered), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 or float32, not {dtype}"
    return why_not_built("loss")


torch.library.define(
    "rwkvlm::loss_of_logits", "(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, float scale, float wrap, bool gradient) -> ()"
)


@torch.library.register_fake("rwkvlm::loss_of_logits")
def _fake(logits, targets, losses, scale, wrap, gradient):
    pass


def auto_chunk(vocab_size: int, itemsize: int) -> int:
    """Tokens per chunk whose logits take about 1 GiB: few enough to fit, many enough that the products run at full speed."""
    return min(32768, max(1024, LOGITS // (itemsize * vocab_size)))


def loss_and_grads(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int, l2wrap: float, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `chunked.loss_and_grads`, where `why_not` has returned "". One buffer of [chunk, V] in the inputs' dtype; the host never waits.

    A target outside the vocabulary, which only the device can see, makes the loss NaN.
    """
    n, V = x.shape[0], weight.shape[0]
    chunk = min(n, chunk or auto_chunk(V, x.element_size()))
    logits, losses = x.new_empty(chunk, V), x.new_empty(n, dtype=torch.float32)
    dx = torch.empty_like(x) if need_dx else None
    dw = torch.empty_like(weight, dtype=weight.dtype if n <= chunk else torch.float32) if need_dw else None
    part = torch.empty_like(weight) if need_dw and dw.dtype != weight.dtype else None
    for begin in range(0, n, chunk):
        rows = slice(begin, min(n, begin + chunk))
        xs, g = x[rows], logits[: min(n, begin + chunk) - begin]
        torch.mm(xs, weight.t(), out=g)
        torch.ops.rwkvlm.loss_of_logits(g, targets[rows], losses[rows], 1 / n, l2wrap / n, need_dx or need_dw)
        if dx is not None:
            torch.mm(g, weight, out=dx[rows])
        if dw is None:
            continue
        if begin == 0:
            dw.copy_(torch.mm(g.t(), xs, out=part)) if part is not None else torch.mm(g.t(), xs, out=dw)
        elif part is not None:
            dw += torch.mm(g.t(), xs, out=part)
        else:
            dw.addmm_(g.t(), xs)
    return losses.mean(), dx, None if dw is None else dw.to(weight.dtype)
