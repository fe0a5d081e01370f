"""The CUDA kernels of cuda/adamw as operators, against float64: emulated on the host, and on this machine's GPU where there is one."""

from __future__ import annotations

import functools

import pytest
import torch

from oracles.emulated_all import registered
from rwkvlm.cli import doctor
from rwkvlm.config import UserError
from rwkvlm.ops import adamw, backend, launch
from rwkvlm.ops.adamw import native, reference
from rwkvlm.train.optimizer import MasterAdamW

FP32, BF16 = torch.float32, torch.bfloat16
RATES = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-18, weight_decay=0.1)
SIZES = [1, 3, 767, 2048, 2049, 8191, 8192, 100003]  # a tile is 2048 numbers for the step, 8192 for the norms
OPERATORS = "adamw", native, ()  # for the device of conftest.py
GUARD = 64  # bytes on both sides of each tensor that nobody may touch
buffers: list[torch.Tensor] = []


@pytest.fixture
def device(device):
    """As that of conftest.py; guards are looked at."""
    buffers.clear()
    yield device
    assert all((b[:GUARD] == 0xFF).all() and (b[-GUARD:] == 0xFF).all() for b in buffers), "a kernel wrote beside a tensor"


def guarded(tensor, device, shift=0):
    """The same numbers with guards around, the first number so many bytes behind a multiple of 16."""
    bytes = tensor.numel() * tensor.element_size()
    storage = torch.full((bytes + 2 * GUARD + shift,), 0xFF, dtype=torch.uint8, device=device)
    buffers.append(storage)
    place = storage[GUARD + shift : GUARD + shift + bytes].view(tensor.dtype)
    assert place.data_ptr() % 16 == shift
    return place.copy_(tensor.flatten()).view(tensor.shape)


def make(device, grad_dtype=BF16, narrow=True, done=7.0, sizes=SIZES, shifts=(0,) * 6):
    """Arguments of a step; gradients of very different sizes, here and there zero from the first step on."""
    rng = torch.Generator().manual_seed(0)
    tensors = [[] for _ in range(6)]
    for i, size in enumerate(sizes):
        scale = 10.0 ** torch.randint(-12, 3, (size,), generator=rng) * (torch.arange(size) % 11 > 0)
        master, grad, average, square = (torch.randn(size, generator=rng) for _ in range(4))
        average, square = (average * scale, (square * scale).square()) if done else (torch.zeros(size), torch.zeros(size))
        values = [
            master,
            torch.full((size,), torch.nan, dtype=BF16),
            (grad * scale).to(grad_dtype),
            average,
            square,
            torch.tensor(done + i * bool(done)),
        ]
        for j, value in enumerate(values):
            if narrow or j != 1:
                tensors[j].append(guarded(value, device, shifts[j]))
    return tensors


def copies(state):
    return [[t.clone() for t in tensors] for tensors in state]


def equal(one, two):
    return all(torch.equal(a, b) for some, others in zip(one, two, strict=True) for a, b in zip(some, others, strict=True))


def check(state, after, scale):
    """A step from `state` has led to `after`, as far as fp32 can tell."""
    masters, rounded, grads, averages, squares, steps = after
    exact = [[t.double() for t in tensors] for tensors in copies(state)]
    reference.adamw_(exact[0], [], *exact[2:], scale, None, **RATES)
    assert equal([grads], [state[2]]), "gradients are left as they are"
    assert [s.item() for s in steps] == [s.item() + 1 for s in state[5]]
    for got, want in zip(averages + squares, exact[3] + exact[4]):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=want.abs().max().item() * 1e-7)
    for got, want, before in zip(masters, exact[0], state[0]):
        moved = (want - before.double()).abs().max()
        assert (got.double() - want).abs().max() <= 1e-5 * moved + 2e-7 * want.abs().max()
    assert all(torch.equal(narrow, p.bfloat16()) for narrow, p in zip(rounded, masters))


@pytest.mark.parametrize("done", [0.0, 7.0, 99999.0])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("grad_dtype, narrow", [(FP32, False), (FP32, True), (BF16, True), (BF16, False)], ids=str)
def test_a_step_against_float64(device, grad_dtype, narrow, scale, done):
    state = make(device, grad_dtype, narrow, done)
    before = copies(state)
    adamw.adamw_(*state, None if scale is None else torch.tensor(scale, device=device), None, **RATES)
    check(before, state, scale)


def test_steps_that_follow_each_other_and_a_gradient_of_each_kind(device):
    state = make(device, done=0.0)
    state[2] = [g.float() if i % 2 else g for i, g in enumerate(state[2])]
    for _ in range(3):
        before = copies(state)
        adamw.adamw_(*state, torch.tensor(0.5, device=device), torch.tensor(0.0, device=device), **RATES)
        check(before, state, 0.5)


@pytest.mark.parametrize("found", [1.0, float("nan"), float("inf")])
def test_nothing_changes_where_found_inf_says_so(device, found):
    state = make(device)
    before = copies(state)
    adamw.adamw_(*state, torch.tensor(float("nan"), device=device), torch.tensor(found, device=device), **RATES)
    assert equal(before[:1] + before[2:], state[:1] + state[2:]) and all(r.isnan().all() for r in state[1])
    adamw.adamw_(*state, None, torch.tensor(0.0, device=device), **RATES)
    check(before, state, None)


@pytest.mark.parametrize("moved", range(5), ids=["master", "rounded", "grad", "exp_avg", "exp_avg_sq"])
def test_tensors_that_begin_anywhere(device, moved):
    """One of them at an odd address: the same bits as if all were aligned."""
    aligned = make(device)
    shifted = make(device, shifts=[(2 if j in (1, 2) else 4) * (j == moved) for j in range(6)])
    for state in (aligned, shifted):
        adamw.adamw_(*state, None, None, **RATES)
    assert equal(aligned, shifted)


def test_more_tensors_than_a_launch_carries(device):
    """The same bits as one by one; among them empty ones, at the beginning, in the middle and at the end."""
    sizes = [0, *[i % 7 for i in range(520)], 5000, 3, 0]
    together, single = make(device, sizes=sizes), make(device, sizes=sizes)
    adamw.adamw_(*together, None, None, **RATES)
    for one in zip(*single):
        adamw.adamw_(*([t] for t in one), None, None, **RATES)
    assert equal(together, single) and [s.item() for s in together[5]] == [8.0 + i for i in range(len(sizes))]
    norms = adamw.gradient_norms(together[2])
    assert torch.equal(norms, torch.cat([adamw.gradient_norms([g]) for g in together[2]])) and (norms[[0, -1]] == 0).all()
    torch.testing.assert_close(norms.double(), reference.gradient_norms(together[2]), rtol=1e-6, atol=0)


def test_the_same_bits_again_and_in_both_schedules(device, request):
    results = []
    for reverse in (0, 1, 0):
        if device.type == "cpu":
            request.getfixturevalue("block_kernels").emulation_reverse(reverse)
        state = make(device)
        norms = adamw.gradient_norms(state[2])
        adamw.adamw_(*state, norms[0], None, **RATES)
        results.append([[norms], *state])
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("dtype, shift", [(FP32, 0), (FP32, 8), (BF16, 0), (BF16, 2)], ids=str)
def test_norms_against_float64(device, dtype, shift):
    grads = make(device, dtype, shifts=[shift * (j == 2) for j in range(6)])[2]
    grads += [torch.zeros(5, dtype=dtype, device=device), torch.full((100000,), 1e-3, dtype=dtype, device=device)]
    norms = adamw.gradient_norms(grads)
    assert norms.dtype == FP32
    torch.testing.assert_close(norms.double(), reference.gradient_norms(grads), rtol=1e-6, atol=0)
    grads[3].view(-1)[3], grads[-1][-1] = float("nan"), float("inf")
    assert adamw.gradient_norms(grads).isfinite().tolist() == [i not in (3, len(grads) - 1) for i in range(len(grads))]


def test_fifty_million_squares_lose_nothing(device):
    """One large number before as many small ones: added one after the other in fp32, these would all be lost."""
    grad = torch.full((50_000_000 if device.type == "cuda" else 8_000_000,), 1e-4, dtype=BF16, device=device)
    grad[0] = 2.0
    norm = adamw.gradient_norms([grad]).item()
    small = grad[1].item() ** 2
    assert abs(norm / (4 + small * (len(grad) - 1)) ** 0.5 - 1) <= 1e-6


WRONG = {
    "a size": (2, torch.zeros(4)),
    "a step that is two": (5, torch.zeros(2)),
    "a narrow master": (0, torch.zeros(3, dtype=BF16)),
    "a wide rounded": (1, torch.zeros(3)),
    "a gradient in float64": (2, torch.zeros(3, dtype=torch.float64)),
    "a step on another device": (5, torch.tensor(7.0)),
    "a view with gaps": (3, torch.zeros(6)[::2]),
}


@pytest.mark.parametrize("kind", [*WRONG, "one too few", "one too many", "a scale for each"])
def test_what_the_kernels_do_not_take_is_an_error(device, kind):
    state, scale, step = make(device, sizes=[3, 3]), None, torch.ops.rwkvlm.adamw_
    if kind in WRONG:
        place, tensor = WRONG[kind]
        state[place][1] = tensor if kind == "a step on another device" else tensor.to(device)
        if kind == "a step on another device" and device.type == "cpu":  # by itself it would be dispatched to that one
            state[place][1] = tensor.to("meta")
            step = functools.partial(step.default.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))
        if kind == "a view with gaps":  # a copy has none
            state[place][1] = torch.zeros(6, device=device)[::2]
    elif kind == "one too few":
        state[4].pop()
    elif kind == "one too many":
        state[4].append(torch.zeros(3, device=device))
    else:
        scale = torch.ones(2, device=device)
    with pytest.raises(ValueError, match="adamw: expected contiguous tensors of the same sizes"):
        step(*state, scale, None, *RATES.values())
    with pytest.raises(ValueError, match="gradient_norms: expected contiguous"):
        torch.ops.rwkvlm.gradient_norms([torch.zeros(4, 4, device=device).t()[:2]])


def test_transposed_gradients_are_understood(device):
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for g in (grad.t(), grad.t().contiguous()):
        p, m, v, t = torch.ones(4, 6, device=device), *torch.zeros(2, 4, 6, device=device), torch.zeros((), device=device)
        adamw.adamw_([p], [], [g], [m], [v], [t], None, None, **RATES)
        results.append([m, adamw.gradient_norms([g])])
    assert equal(*[[r] for r in results])


def test_the_optimizer_and_its_clipping(device):
    """bf16 gradients reach the kernel as they are: no copy in fp32 is made of them."""
    p = torch.nn.Parameter(torch.ones(4, dtype=BF16, device=device))
    optimizer = MasterAdamW([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-18)
    p.grad = torch.tensor([3.0, 4.0, 0.0, 12.0], dtype=BF16, device=device)
    norm = adamw.gradient_norms([p.grad])[0]
    optimizer.clip(norm, 1.0)
    optimizer.step()
    assert norm.item() == 13
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 / 13 * p.grad.float(), rtol=1e-6, atol=0)
    assert p.grad.dtype == BF16 and torch.equal(p, optimizer.state[p]["master"].bfloat16())


def test_the_operators_are_well_formed(device):
    tests = ("test_schema", "test_autograd_registration")
    state = make(device)
    torch.library.opcheck(torch.ops.rwkvlm.gradient_norms.default, (state[2],), test_utils=tests)
    state[1] = [torch.zeros_like(t) for t in state[1]]
    torch.library.opcheck(torch.ops.rwkvlm.adamw_.default, (*state, None, None, *RATES.values()), test_utils=tests)


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_step_is_captured_in_a_graph_of_the_gpu(device):
    """Nothing is uploaded and nothing waits: replayed, it is the same step again."""
    assert adamw.backend_for(device) == "cuda"
    state, other = make(device, done=0.0), make(device, done=0.0)

    def step(state):
        norms = adamw.gradient_norms(state[2])
        adamw.adamw_(*state, norms[3], (~norms[4].isfinite()).float(), **RATES)

    for _ in range(3):
        step(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(state)
    for _ in range(3):
        graph.replay()
    assert equal(state, other) and state[5][0].item() == 3


def test_who_computes_it_on_a_gpu(monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(native, "why_not", lambda: "")
    for reason in ("", "nvcc is not there"):
        monkeypatch.setattr(launch, "why_not_built", lambda name, reason=reason: reason)
        monkeypatch.setattr(backend, "_said", set())
        for asked, form in (("torch", "torch"), ("auto", "torch" if reason else "cuda"), ("cuda", "" if reason else "cuda")):
            monkeypatch.setattr(backend, "_requested", asked)
            if form:
                assert adamw.backend_for(gpu) == form
            else:
                with pytest.raises(UserError, match="--kernel cuda: adamw cannot run: nvcc is not there"):
                    adamw.backend_for(gpu)
        assert ("adamw: running in plain PyTorch, which is slower (nvcc is not there)" in capsys.readouterr().err) == bool(reason)


def test_the_emulated_kernels_have_run(block_kernels):
    """The seam is not empty: with it, a call reaches the library, which has an error of its own; without it, the C++ kernels."""
    if native.why_not():
        pytest.skip("no C++ kernels")
    gaps = [torch.zeros(4, 4).t()[:2]]
    with registered(block_kernels, "adamw"):
        with pytest.raises(ValueError, match="gradient_norms: expected contiguous"):
            torch.ops.rwkvlm.gradient_norms(gaps)
    with pytest.raises(ValueError, match="adamw: expected contiguous"):
        torch.ops.rwkvlm.gradient_norms(gaps)


def test_the_doctor_asks_for_what_the_kernels_take(device, monkeypatch):
    """It would call a healthy GPU sick otherwise."""
    monkeypatch.setattr(doctor, "_device", lambda: device)
    assert "largest deviation from the reference" in doctor.kernel_adamw()
