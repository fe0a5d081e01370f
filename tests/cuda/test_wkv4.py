"""The CUDA kernels of cuda/wkv4 as operators, against float64: emulated on the host, and on this machine's GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from oracles.emulated_all import registered
from oracles.wkv4_cases import Case, errors
from rwkvlm.cli import doctor
from rwkvlm.ops.wkv4 import native, wkv4_native

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [
    dict(),
    dict(B=1, T=1, C=16),
    dict(B=3, T=31, C=16, state=False),
    dict(B=1, T=32, C=144),
    dict(B=2, T=33, C=16),
    dict(B=1, T=200, C=272),
    dict(B=2, T=300, C=16, state=False),  # more segments than a step of the scans takes
    dict(kind="large"),
    dict(kind="slow"),
    dict(kind="fast"),
    dict(kind="repeated"),
    dict(kind="empty"),
]
TOLERANCE = {"large": 5e-5, "slow": 2e-5}  # as in tests/ops/test_wkv4.py
OPERATORS = "wkv4", native, (FP32, 16)  # for the device of conftest.py


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_against_float64(device, sizes, dtype):
    case = Case(dtype=dtype, device=device, **sizes)
    rounding = 4e-3 if dtype == BF16 else 0
    for name, error in errors(case.run(wkv4_native), case.exact()).items():
        assert error < TOLERANCE.get(sizes.get("kind"), 5e-6) + rounding * (name in ("y", "dk", "dv")), (name, error)


def test_the_same_bits_again_and_in_both_schedules(device, request):
    case, results = Case(T=150, C=144, device=device), []
    for reverse in (0, 1, 0):
        if device.type == "cpu":
            request.getfixturevalue("block_kernels").emulation_reverse(reverse)
        results.append(case.run(wkv4_native))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_inference_saves_nothing_and_gives_the_same(device):
    inputs = [x.detach() for x in Case(device=device).inputs]
    (*outputs, saved), (*again, kept) = (torch.ops.rwkvlm.wkv4_forward(*inputs, save) for save in (False, True))
    assert saved.numel() == 0 < kept.numel() and all(torch.equal(a, b) for a, b in zip(outputs, again))


def test_nan_is_not_hidden(device):
    case = Case(device=device)
    case.inputs[2][0, 3, 5] = float("nan")
    y, _, dw, *_ = case.run(wkv4_native)
    assert y[0, 3:, 5].isnan().all() and dw[5].isnan() and not y[1].isnan().any()


def test_what_reaches_an_operator_itself_is_looked_at(device):
    case = Case(B=2, T=37, C=16, device=device)
    inputs, ops = [x.detach() for x in case.inputs], torch.ops.rwkvlm
    w, u, k, v, state = inputs
    dy, d_final, starts = k.clone(), state.clone(), ops.wkv4_forward(*inputs, True)[2]
    for message, call in (
        ("v must have the shape", lambda: ops.wkv4_forward(w, u, k, v[:, :-1], None, False)),
        ("w must be torch.float32, got torch.bfloat16", lambda: ops.wkv4_forward(w.bfloat16(), u, k, v, None, False)),
        ("u must have the shape", lambda: ops.wkv4_forward(w, u[:8], k, v, None, False)),
        ("initial_state must have the shape", lambda: ops.wkv4_forward(w, u, k, v, state[:1], False)),
        ("k must be torch.bfloat16 or torch.float32", lambda: ops.wkv4_forward(w, u, k.double(), v.double(), None, False)),
        ("k must be \\[B, T, C\\]", lambda: ops.wkv4_forward(w, u, k[0], v[0], None, False)),
        ("dy must have the shape", lambda: ops.wkv4_backward(dy[:1], None, w, u, k, v, starts)),
        ("d_final must have the shape", lambda: ops.wkv4_backward(dy, d_final[:, :2], w, u, k, v, starts)),
        ("checkpoints must have the shape", lambda: ops.wkv4_backward(dy, d_final, w, u, k, v, starts[:0])),
    ):
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"instead of '{message}': {call()}")


def test_the_operators_are_well_formed(device):
    case = Case(T=37, C=16, device=device)
    torch.library.opcheck(torch.ops.rwkvlm.wkv4_forward, (*[x.requires_grad_() for x in case.inputs], True))
    inputs = [x.detach() for x in case.inputs]
    _, _, checkpoints = torch.ops.rwkvlm.wkv4_forward(*inputs, True)
    torch.library.opcheck(torch.ops.rwkvlm.wkv4_backward, (*case.slopes, *inputs[:4], checkpoints))


def test_the_emulated_kernels_have_run(block_kernels):
    """The seam is not empty: with it, a call reaches the library; without it, the C++ kernels, which agree, and take no 20 channels."""
    if native.why_not(FP32, 16):
        pytest.skip("no C++ kernels")
    case, other = Case(), Case(C=20)
    with registered(block_kernels, "wkv4"):
        emulated = case.run(wkv4_native)
        assert max(errors(other.run(wkv4_native), other.exact()).values()) < 5e-6
    assert max(errors(emulated, [x.double() for x in case.run(wkv4_native)]).values()) < 5e-6
    with pytest.raises(RuntimeError, match="multiple of 16"):
        other.run(wkv4_native)


def test_the_doctor_asks_for_what_the_kernels_take(device, monkeypatch):
    monkeypatch.setattr(doctor, "_device", lambda: device)
    assert "largest deviation from the reference" in doctor.kernel_wkv4()
