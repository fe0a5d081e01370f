"""The CUDA kernel of cuda/loss and the head around it, against float64: emulated on the host, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from rwkvlm.ops import cross_entropy as package
from rwkvlm.ops.cross_entropy import cuda, head_cross_entropy, reference

FP32, BF16 = torch.float32, torch.bfloat16
# Relative (rms for gradients), of the kernel from its own logits; in bf16 a gradient is rounded once, by 2^-8 of its size at most.
LOSS, GRADIENT = 1e-6, {FP32: 2e-6, BF16: 4e-3}
# Of the whole head: in bf16 the logits are rounded too.
HEAD_LOSS, HEAD_GRADIENT = {FP32: 1e-6, BF16: 2e-3}, {FP32: 2e-6, BF16: 1e-2}
SIZES = [(5, 1), (3, 7), (4, 8), (2, 4096), (3, 1000), (3, 5001), (2, 9221)]
OPERATORS = "loss", None, ()  # for the device of conftest.py


@pytest.fixture(autouse=True)
def head_on_the_kernel(monkeypatch):
    monkeypatch.setattr(package, "_form", lambda device, dtype, n_embd: cuda)


def make(rows, V, dtype, device, scale=3.0):
    rng = torch.Generator().manual_seed(rows * V)
    logits = (torch.randn(rows, V, generator=rng) * scale).to(dtype)
    return logits.to(device), torch.randint(V, (rows,), generator=rng).to(device)


def run(logits, targets, wrap=0.25, gradient=True):
    losses, result = torch.empty(len(targets), dtype=FP32, device=logits.device), logits.clone()
    torch.ops.rwkvlm.loss_of_logits(result, targets, losses, 0.5, wrap, gradient)
    return losses, result


def exact(logits, targets, wrap=0.25):
    x = logits.double()
    losses = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    gradient = 0.5 * torch.softmax(x, -1)
    rows = torch.arange(len(targets), device=logits.device)
    gradient[rows, targets] -= 0.5
    first = (x == x.max(-1, keepdim=True).values).int().argmax(-1)
    gradient[rows, first] += wrap * x[rows, first]
    return losses, gradient


def rms(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, V", SIZES)
def test_against_float64(device, rows, V, dtype):
    """Rows of an odd V begin at any address."""
    logits, targets = make(rows, V, dtype, device)
    targets[0], targets[-1] = V - 1, 0
    losses, gradient = run(logits, targets)
    want, want_gradient = exact(logits, targets)
    assert (losses.double() - want).abs().max() <= LOSS * (1 + want.abs().max())
    assert rms(gradient, want_gradient) <= GRADIENT[dtype]
    kept, untouched = run(logits, targets, gradient=False)
    assert torch.equal(kept, losses) and torch.equal(untouched, logits)


def test_of_equal_maxima_the_first_counts(device):
    logits, targets = make(3, 3000, BF16, device)
    logits[:, 17::500] = 40.0
    assert rms(run(logits, targets)[1], exact(logits, targets)[1]) <= GRADIENT[BF16]


def test_huge_logits_and_a_certain_row(device):
    logits, targets = make(4, 2000, FP32, device, scale=300.0)
    targets[:2] = logits.argmax(-1)[:2]
    losses, gradient = run(logits, targets, wrap=0.0)
    want, want_gradient = exact(logits, targets, wrap=0.0)
    assert want.max() > 500 and torch.allclose(losses.double(), want, rtol=1e-6, atol=1e-6)
    assert rms(gradient, want_gradient) <= 1e-5


def test_minus_infinity_is_a_probability_of_zero(device):
    logits, targets = make(2, 600, FP32, device)
    logits[:, ::2] = float("-inf")
    targets[:] = 1
    losses, gradient = run(logits, targets)
    assert losses.isfinite().all() and (gradient[:, ::2] == 0).all() and rms(gradient, exact(logits, targets)[1]) <= 2e-6


@pytest.mark.parametrize("bad", ["nan", "target", "negative"])
def test_nothing_is_hidden(device, bad):
    logits, targets = make(3, 700, FP32, device)
    if bad == "nan":
        logits[1, 600] = float("nan")
    else:
        targets[1] = 700 if bad == "target" else -1
    losses, _ = run(logits, targets)
    assert losses.isnan().tolist() == [False, True, False]


def test_both_schedules_give_the_same_bits(device, request):
    logits, targets = make(5, 2777, BF16, device)
    first = run(logits, targets)
    if device.type == "cpu":
        request.getfixturevalue("block_kernels").emulation_reverse(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(logits, targets)))


def test_the_operator_is_well_formed(device):
    logits, targets = make(3, 33, BF16, device)
    arguments = (logits, targets, torch.empty(3, device=device), 0.5, 0.1, True)
    torch.library.opcheck(torch.ops.rwkvlm.loss_of_logits.default, arguments)
    losses, wide = arguments[2], torch.empty(6, device=device)
    for message, wrong in (
        ("targets must have the shape \\[3\\], got \\[2\\]", (logits, targets[:2], losses)),
        ("targets must be torch.int64, got torch.int32", (logits, targets.int(), losses)),
        ("losses must have the shape", (logits, targets, wide)),
        ("losses must be contiguous", (logits, targets, wide[::2])),
        ("losses must be torch.float32, got torch.float64", (logits, targets, losses.double())),
        ("logits must be \\[rows, V\\] and contiguous", (logits.t().contiguous().t(), targets, losses)),
        ("logits must be torch.bfloat16 or torch.float32, got torch.float16", (logits.half(), targets, losses)),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.rwkvlm.loss_of_logits(*wrong, *arguments[3:])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_the_head(device, dtype, chunk):
    """Loss and both gradients of head_cross_entropy, in one chunk and in several."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 24, generator=rng).to(device, dtype).requires_grad_()
    weight = (torch.randn(331, 24, generator=rng) * 0.6).to(device, dtype).requires_grad_()
    targets = torch.randint(331, (2, 10), generator=rng).to(device)
    loss = head_cross_entropy(x, weight, targets, chunk, l2wrap=0.1)
    got = loss.detach(), *torch.autograd.grad(loss, (x, weight))
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = reference.head_cross_entropy(*doubles, targets, l2wrap=0.1)
    gradients = torch.autograd.grad(want, doubles)
    assert abs(got[0].item() / want.item() - 1) <= HEAD_LOSS[dtype]
    assert all(a.dtype == dtype and rms(a, b) <= HEAD_GRADIENT[dtype] for a, b in zip(got[1:], gradients))
    for wanted, right in ((0, got[1]), (1, got[2])):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((x, weight))]
        assert torch.equal(torch.autograd.grad(head_cross_entropy(*leaves, targets, chunk, l2wrap=0.1), leaves[wanted])[0], right)
    with torch.no_grad():
        assert head_cross_entropy(x, weight, targets, chunk).item() == loss.item()
