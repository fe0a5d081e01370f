"""The language-model head and its loss as one op: cross entropy with L2Wrap over logits that never exist as a whole.

With 65536 tokens the head is a third of a small model's training step and more, and its logits would be by far the largest
tensor. So tokens go through in chunks, and the gradients are made in the forward pass while a chunk's logits are at hand;
backward only scales them.
"""

from __future__ import annotations

import torch

from .. import backend
from . import chunked, cuda, native

__all__ = ["backend_for", "head_cross_entropy", "head_scores"]

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def head_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = 0, l2wrap: float = 1e-4) -> torch.Tensor:
    """Mean cross entropy of `softmax(x weight^T)` against `targets`, in nats; a scalar in fp32 (float64 for float64 inputs).

    x        [..., C] bf16, fp32 or float64 (fp16 in fp32): the features after the last normalisation
    weight   [V, C]   same dtype: the head
    targets  [...]    int64 in [0, V)
    chunk    tokens whose logits exist at a time, at most; 0 chooses
    l2wrap   `l2wrap / tokens * max_logit` is added to the gradient at each row's arg-max; the loss value is unchanged
             (RWKV-LM, RWKV-v7/train_temp)

    The gradient of the weight is summed over chunks in fp32 and then rounded; each chunk's part is rounded as well
    where torch makes it (all forms but the C++ one). Where no gradient is asked for, only the loss is computed.
    Raises ValueError for shapes, dtypes, devices or targets that do not fit.
    """
    x, weight = backend.widened(x, weight)  # of fp16 only rounded when a scaled gradient has come
    _check(x, weight, targets, chunk)
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    form = _form(x.device, x.dtype, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _HeadCrossEntropy.apply(x, weight, targets, chunk, l2wrap, form)
    return form.loss_and_grads(x, weight, targets, chunk, l2wrap, False, False)[0]


def head_scores(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head says of given tokens: each one's loss in nats, float64, and the likeliest token, int64, [n] both; without gradients.

    x [n, C], weight [V, C], targets [n], and the errors: as for `head_cross_entropy`.
    """
    x, weight = backend.widened(x, weight)
    _check(x, weight, targets, 0)
    form = native if backend_for(x.device, x.dtype, x.shape[-1]) == "cpu" else chunked
    return form.scores(x, weight, targets)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk, l2wrap, form) -> torch.Tensor:
        loss, *grads = form.loss_and_grads(x, weight, targets, chunk, l2wrap, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        grads = ctx.saved_tensors
        # On a GPU, a look at grad_output would make the host wait; on the CPU it mostly saves a copy of [V, C].
        if grad_output.device.type != "cpu" or grad_output != 1:
            grads = tuple(None if g is None else g * grad_output.to(g.dtype) for g in grads)
        return *grads, None, None, None, None


@backend.decided_while_tracing
def _form(device: torch.device, dtype: torch.dtype, n_embd: int):
    return {"cuda": cuda, "cpu": native, "torch": chunked}[backend_for(device, dtype, n_embd)]


def backend_for(device: torch.device, dtype: torch.dtype, n_embd: int) -> str:
    """Who computes it here: "cuda", "cpu" or "torch"; builds what is missing. UserError for a kernel asked for that cannot run."""
    supported = {"cuda": lambda: cuda.why_not(dtype), "cpu": lambda: native.why_not(dtype, n_embd)}
    return backend.choose("head_cross_entropy", device, supported)


def _check(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"head_cross_entropy: x {list(x.shape)} and weight {list(weight.shape)} do not fit; expected [..., C] and [V, C]")
    if targets.shape != x.shape[:-1] or targets.numel() == 0:
        raise ValueError(
            f"head_cross_entropy: targets {list(targets.shape)} must be one or more and match x {list(x.shape)} without its last dimension"
        )
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"head_cross_entropy: x is {x.dtype} and weight {weight.dtype}; both must be the same of bfloat16, float32, float64"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"head_cross_entropy: targets are {targets.dtype}; expected torch.int64")
    if not x.device == weight.device == targets.device:
        raise ValueError(
            f"head_cross_entropy: x is on {x.device}, weight on {weight.device}, targets on {targets.device}; expected one device"
        )
    if chunk < 0:
        raise ValueError(f"head_cross_entropy: chunk is {chunk}; expected a number of tokens, or 0 to choose one")
    # on a GPU the look would make the host wait; there plain PyTorch asserts on the device, and the kernel's loss is NaN
    if targets.device.type == "cpu":
        low, high = targets.aminmax()
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"head_cross_entropy: targets lie in [{low}, {high}]; expected [0, {weight.shape[0]}), the rows of weight")
