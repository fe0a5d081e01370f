"""Head and loss in chunks of tokens with PyTorch operations: the portable form, for every device and floating dtype."""

from __future__ import annotations

import torch


def auto_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk such that a chunk of fp32 logits takes about 64 MiB on a CPU (64 to 512 tokens), 1 GiB on a GPU."""
    if device.type == "cpu":
        return min(512, max(64, (64 << 20) // (4 * vocab_size)))
    return min(32768, max(1024, (1 << 30) // (4 * vocab_size)))


def loss_and_grads(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, l2wrap: float, need_dx: bool, need_dw: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Mean loss of `x [n, C]`, `weight [V, C]`, `targets [n]`, with its gradients in the inputs' dtype (None where not needed).

    One buffer of [chunk, V] holds the logits, then their exponentials, then the gradient; softmax runs in fp32 (float64 for
    float64 inputs), and the gradient of the weight is summed over chunks in that dtype.
    """
    n = x.shape[0]
    chunk = min(n, chunk or auto_chunk(weight.shape[0], x.device))
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    same = exact == x.dtype
    raw = x.new_empty(chunk, weight.shape[0])  # in the GEMM's dtype
    wide = raw if same else raw.new_empty(raw.shape, dtype=exact)
    loss = x.new_zeros((), dtype=exact)
    dx = torch.empty_like(x) if need_dx else None
    dw = torch.zeros_like(weight, dtype=exact) if need_dw else None
    part = torch.empty_like(weight) if need_dw and not same else None
    for begin in range(0, n, chunk):
        rows = slice(begin, min(n, begin + chunk))
        xs, at = x[rows], targets[rows, None]
        g, p = raw[: xs.shape[0]], wide[: xs.shape[0]]
        torch.mm(xs, weight.t(), out=g)
        if not same:
            p.copy_(g)
        top, top_at = p.max(-1, keepdim=True)
        at_target = p.gather(-1, at)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        loss += (total.log() + top - at_target).sum()
        if not (need_dx or need_dw):
            continue
        p.div_(total * n)
        p.scatter_add_(-1, at, torch.full_like(top, -1 / n))
        p.scatter_add_(-1, top_at, top * (l2wrap / n))
        if not same:
            g.copy_(p)
        if dx is not None:
            torch.mm(g, weight, out=dx[rows])
        if dw is not None:
            if part is None:
                dw.addmm_(g.t(), xs)
            else:
                dw += torch.mm(g.t(), xs, out=part)
    return loss / n, dx, None if dw is None else dw.to(weight.dtype)


def scores(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `x [n, C]`, `weight [V, C]`, `targets [n]`: each token's loss in nats, float64, and the token with the largest logit; [n] both."""
    nats, likeliest = [], []
    chunk = auto_chunk(len(weight), x.device)
    for rows, answers in zip(x.split(chunk), targets.split(chunk), strict=True):
        logits = rows @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nats.append((logits.logsumexp(-1) - logits.gather(-1, answers[:, None])[:, 0]).double())
        likeliest.append(logits.argmax(-1))
    return torch.cat(nats), torch.cat(likeliest)
