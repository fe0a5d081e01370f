"""The CUDA kernels of cuda/rosa as operators, against turning every bit: emulated on the host, and on this machine's GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from oracles.rosa import KINDS, close, from_definition, numbers, results
from rwkvlm import native as build
from rwkvlm.ops import backend
from rwkvlm.ops.rosa import backend_for, cuda, native, rosa, rosa_self, rosa_tokens

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Where the operators run: CPU tensors over the kernels in emulation, or the GPU. All new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        monkeypatch.setattr(backend, "_requested", "cuda")
        assert backend_for(torch.device("cuda", 0), FP32) == "cuda"
        yield torch.device("cuda", 0)
    else:
        if not build.available("rosa")[0]:
            pytest.skip(build.available("rosa")[1])
        monkeypatch.setattr(backend, "_requested", "cpu")
        assert native.why_not(FP32) == ""  # defines the operators
        kernels = request.getfixturevalue("block_kernels")
        kernels.emulation_reverse(0)
        with torch.library._scoped_library("rwkvlm", "IMPL") as registration:
            cuda.register(registration, kernels, "CPU")
            yield torch.device("cpu")
    torch.use_deterministic_algorithms(False)


def case(kind, B, T, C, dtype=FP32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    inputs = [numbers(kind, B, T, C, rng=rng).to(dtype) for _ in range(3)]
    return inputs, torch.randn(C, generator=rng).to(dtype), torch.randn(C, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, T", [(1, 1), (1, 35), (2, 20), (8, 7)])
def test_against_turning_every_bit(device, bits, T, kind, dtype):
    inputs, low, high = case(kind, 2, T, 2 * bits, dtype)
    for function, arguments in ((rosa, inputs), (rosa_self, inputs[:1])):
        options = dict(bits=bits, miss="low" if T % 2 else "zero", tau=0.1)
        with backend.asked_for("torch"):
            want = results(function, arguments, low, high, **options)
        got = results(function, [x.to(device) for x in arguments], low.to(device), high.to(device), **options)
        close([x.cpu() for x in got], want, 2e-5 if dtype == FP32 else 0.01)


@pytest.mark.parametrize("function", [rosa, rosa_self], ids=["rosa", "self"])
def test_the_same_bits_again_and_in_both_schedules(device, function, monkeypatch, request):
    """More lags than threads, more rows than blocks; and the results of the C++ kernel."""
    inputs, low, high = case("almost periodic", 1, 140, 3)
    arguments = inputs if function is rosa else inputs[:1]
    monkeypatch.setattr(cuda, "ROWS_AT_ONCE", 2)
    found = []
    for reverse in (0, 1, 0):
        if device.type == "cpu":
            request.getfixturevalue("block_kernels").emulation_reverse(reverse)
        found.append(results(function, [x.to(device) for x in arguments], low.to(device), high.to(device), tau=0.1))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with backend.asked_for("torch"):
        close([x.cpu() for x in found[0]], results(function, arguments, low, high, tau=0.1), 2e-5)


@pytest.mark.parametrize("bits", [1, 3])
def test_pieces_give_the_whole(device, bits):
    (q, k, v), low, high = case("almost periodic", 2, 40, 2 * bits)
    q, k, v, low, high = (x.to(device) for x in (q, k, v, low, high))
    x = torch.randint(3, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    calls = [
        (lambda s, *x: rosa(*x, low, high, bits, "zero", state=s, return_state=True), [q, k, v]),
        (lambda s, *x: rosa_self(*x, low, high, bits, "low", state=s, return_state=True), [q]),
        (lambda s, x: rosa_tokens(x, s, True), [x]),
    ]
    for call, inputs in calls:
        whole, last = call(None, *inputs)
        for cuts in ([1] * 40, [7, 33]):
            outs, state = [], None
            for pieces in zip(*(x.split(cuts, 1) for x in inputs)):
                out, state = call(state, *pieces)
                outs.append(out)
            assert torch.equal(torch.cat(outs, 1), whole) and all(torch.equal(a, b) for a, b in zip(state, last))
    assert rosa_tokens(x).tolist() == [from_definition(row, row, row) for row in x.tolist()]


def test_the_sums_alone(device):
    """Inputs that are frozen: no flips."""
    inputs, low, high = case("random", 2, 20, 4)
    arguments = [x.to(device) for x in (inputs[0], *inputs, low, high)]
    *_, dlow, dhigh = torch.ops.rwkvlm.rosa_backward(*arguments, 2, True, 0.1, True)
    sums = torch.ops.rwkvlm.rosa_backward(*arguments, 2, True, 0.1, False)
    assert len(sums) == 2 and torch.equal(sums[0], dlow) and torch.equal(sums[1], dhigh)


def test_no_batch(device):
    x = torch.zeros(0, 3, 4, device=device)
    assert [t.shape[0] for t in results(rosa, [x, x, x], *torch.ones(2, 4, device=device), bits=2)] == [0, 0, 0, 0, 4, 4]
    assert rosa_tokens(torch.zeros(0, 3, dtype=torch.int64, device=device)).shape == (0, 3)


def test_the_emulated_kernels_have_run(block_kernels, monkeypatch):
    """The seam is not empty: with it, a call reaches the library."""
    if native.why_not(FP32):
        pytest.skip("no C++ kernels")
    calls = []

    class Counting(cuda.Kernels):
        def rosa(self, *arguments):
            calls.append(1)
            return super().rosa(*arguments)

    monkeypatch.setattr(cuda, "Kernels", Counting)
    x, ends = torch.ones(1, 3, 2), torch.ones(2, 2)
    with backend.asked_for("cpu"):
        with torch.library._scoped_library("rwkvlm", "IMPL") as registration:
            cuda.register(registration, block_kernels, "CPU")
            first = rosa_self(x, *ends)
        assert torch.equal(first, rosa_self(x, *ends)) and calls == [1]
