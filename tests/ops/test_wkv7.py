"""Every form of WKV7 against the float64 oracle, with all uninitialised memory filled with NaN by torch itself."""

import functools

import pytest
import torch
import torch.nn.functional as F

from rwkvlm.ops.wkv7 import native as wkv7_native_module
from rwkvlm.ops.wkv7 import wkv7, wkv7_chunked, wkv7_native, wkv7_reference

NATIVE_FAILURE = wkv7_native_module.why_not(torch.float32)
ISA = ["plain", "avx2", "avx512"]
BEST_ISA = -1 if NATIVE_FAILURE else torch.ops.rwkvlm.wkv7_limit_isa(len(ISA))
FORMS = ["torch", *ISA]
RESULTS = ("y", "final_state", "dr", "dw", "dk", "dv", "da", "db", "d_initial_state")


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FORMS)
def form(request):
    """One implementation; the native one at each instruction set that this machine has."""
    if request.param == "torch":
        yield wkv7_chunked
        return
    level = ISA.index(request.param)
    if level > BEST_ISA:
        pytest.skip(NATIVE_FAILURE or f"this machine has no {request.param}")
    torch.ops.rwkvlm.wkv7_limit_isa(level)
    yield wkv7_native
    torch.ops.rwkvlm.wkv7_limit_isa(BEST_ISA)


def make_inputs(B, T, H, N, kind="usual", seed=0):
    """float64 inputs that the model could produce: a = -kk, b = kk * rate with kk of length 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*(shape or (B, T, H, N)), generator=generator, dtype=torch.float64)

    r, k, v, w = normal(), normal() / 2, normal(), normal() * 2 - 1
    kk, rate = normal(), torch.sigmoid(normal())
    if kind == "clamp":
        w = torch.full_like(w, 8.0)
    if kind == "repeated":
        kk, rate = normal(B, 1, H, N) + 0.03 * kk, 0.9 + 0.1 * rate
    kk = F.normalize(kk, dim=-1)
    if kind == "repeated" and T > 1:
        assert F.cosine_similarity(kk[:, 1:], kk[:, :-1], dim=-1).min() >= 0.99
    return [r, w, k, v, -kk, kk * rate]


def run(form, inputs, state, dy, d_state, cu_seqlens=None):
    """The nine results of one forward and backward."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    y, final_state = form(*leaves[:6], leaves[6], cu_seqlens)
    return [y.detach(), final_state.detach(), *torch.autograd.grad((y, final_state), leaves, (dy, d_state))]


@functools.cache
def case(B, T, H, N, kind="usual", dtype=torch.float32):
    """Inputs rounded to dtype, and what the oracle makes of them in float64."""
    inputs = [x.to(dtype) for x in make_inputs(B, T, H, N, kind)]
    generator = torch.Generator().manual_seed(1)
    state, d_state = (torch.randn(B, H, N, N, generator=generator) for _ in range(2))
    dy = torch.randn(B, T, H, N, generator=generator).to(dtype)
    expected = run(wkv7_reference, *([x.double() for x in inputs], state.double(), dy.double(), d_state.double()))
    return inputs, state, dy, d_state, expected


def errors(results, expected):
    return {name: ((x.double() - y).abs().max() / y.abs().max()).item() for name, x, y in zip(RESULTS, results, expected)}


def check(form, *shape, kind="usual", dtype=torch.float32, tolerance=5e-6):
    inputs, state, dy, d_state, expected = case(*shape, kind, dtype)
    results = run(form, inputs, state, dy, d_state)
    assert [x.dtype for x in results] == [dtype, torch.float32, *[dtype] * 6, torch.float32]
    found = errors(results, expected)
    assert all(error <= tolerance for error in found.values()), found  # a NaN fails too


@pytest.mark.parametrize("kind", ["usual", "clamp", "repeated"])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 100])
def test_any_length(form, T, kind):
    check(form, 2, T, 2, 64, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["usual", "clamp", "repeated"])
def test_long(form, kind):
    check(form, 1, 513, 2, 64, kind=kind)


@pytest.mark.parametrize("kind", ["usual", "clamp", "repeated"])
@pytest.mark.parametrize("N", [16, 32, 128])
def test_any_head_size(form, N, kind):
    check(form, 1, 37, 2, N, kind=kind)


@pytest.mark.parametrize("B, H", [(1, 1), (1, 12), (3, 7), (8, 12)])
def test_any_number_of_heads(form, B, H):
    check(form, B, 19, H, 16)


@pytest.mark.parametrize("T, N", [(40, 64), (17, 16), (9, 128)])
def test_bfloat16_in_and_out(form, T, N):
    check(form, 2, T, 2, N, dtype=torch.bfloat16, tolerance=4e-3)  # bf16 keeps 8 bits: half a unit of the last is 2^-9


def test_float64_runs_in_pytorch_to_float64_precision():
    inputs, state, dy, d_state, expected = case(2, 17, 2, 64)
    results = run(wkv7_chunked, [x.double() for x in inputs], state.double(), dy.double(), d_state.double())
    assert max(errors(results, expected).values()) < 1e-13


def test_extreme_decays_stay_finite_and_right(form):
    inputs, state, dy, d_state, _ = case(2, 17, 2, 64)
    inputs = [inputs[0], torch.where(inputs[1] > 0, 200.0, -200.0), *inputs[2:]]
    expected = run(wkv7_reference, [x.double() for x in inputs], state.double(), dy.double(), d_state.double())
    found = errors(run(form, inputs, state, dy, d_state), expected)
    del found["dw"]  # zero in truth
    assert all(error <= 5e-6 for error in found.values()), found


def test_without_initial_state_it_is_zero(form):
    inputs, state, *_ = case(2, 17, 2, 64)
    for without, zero in zip(form(*inputs), form(*inputs, torch.zeros_like(state))):
        assert torch.equal(without, zero)


@pytest.mark.parametrize("again", ["rkv", "k", ""])
@pytest.mark.parametrize("shape, bounds", [((2, 17, 2, 64), None), ((1, 70, 1, 16), [0, 4, 70])], ids=str)
def test_what_is_passed_on_has_its_gradients_added_up(form, again, shape, bounds):
    """For other uses of r, k and v: none, some or all of them; also where a head is divided among threads."""
    if form is wkv7_chunked:
        pytest.skip("it passes nothing on")
    inputs, _, dy, _, _ = case(*shape)
    bounds = None if bounds is None else torch.tensor(bounds)
    slopes = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) if name in again else None for i, name in enumerate("rkv")]

    def gradients(passing):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, _, *passed = form(*leaves, None, bounds, passing)
        both = [(y, dy), *((x, d) for x, d in zip(passed if passing else (leaves[0], *leaves[2:4]), slopes) if d is not None)]
        return torch.autograd.grad([x for x, _ in both], leaves, [d for _, d in both])

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_gradient_of_one_output_alone(form):
    inputs, state, dy, d_state, _ = case(2, 17, 2, 64)
    both = run(form, inputs, state, dy, d_state)
    parts = []
    for which, gradient in ((0, dy), (1, d_state)):
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        parts.append(torch.autograd.grad(form(*leaves)[which], leaves, gradient, materialize_grads=True))
    for total, *summands in zip(both[2:], *parts):
        torch.testing.assert_close(sum(summands), total, rtol=1e-4, atol=1e-4)


def test_a_split_sequence_gives_the_whole(form):
    inputs, state, *_ = case(2, 100, 2, 64)
    y, final_state = form(*inputs, state)
    pieces, carried = [], state
    for start, end in ((0, 1), (1, 33), (33, 100)):
        piece, carried = form(*(x[:, start:end].contiguous() for x in inputs), carried)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carried, final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_documents_equal_separate_runs(form, integer):
    inputs, _, dy, _, _ = case(1, 100, 2, 32)
    bounds = [0, 1, 32, 40, 97, 100]
    generator = torch.Generator().manual_seed(2)
    state, d_state = (torch.randn(5, 2, 32, 32, generator=generator) for _ in range(2))
    packed = run(form, inputs, state, dy, d_state, torch.tensor(bounds, dtype=integer))
    for i, (start, end) in enumerate(zip(bounds, bounds[1:])):
        cut = [x[:, start:end].contiguous() for x in inputs]
        alone = run(form, cut, state[i : i + 1], dy[:, start:end].contiguous(), d_state[i : i + 1])
        for name, whole, part in zip(RESULTS, packed, alone):
            mine = whole[i : i + 1] if "state" in name else whole[:, start:end]
            torch.testing.assert_close(mine, part, rtol=1e-5, atol=1e-6, msg=lambda m: f"document {i}, {name}: {m}")


def test_a_nan_is_not_hidden(form):
    inputs, state, *_ = case(2, 17, 2, 64)
    for i in range(6):
        spoilt = [x.clone() for x in inputs]
        spoilt[i][0, 3, 1, 5] = float("nan")
        y, _ = form(*spoilt, state)
        assert y[0, 3:, 1].isnan().any() and not y[1].isnan().any()


@pytest.mark.skipif(bool(NATIVE_FAILURE), reason=NATIVE_FAILURE)
@pytest.mark.parametrize("isa", range(BEST_ISA + 1), ids=ISA[: BEST_ISA + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B, T, H, N, bounds", [(2, 100, 2, 64, None), (1, 200, 1, 64, None), (1, 64, 1, 128, None), (1, 150, 1, 32, [0, 1, 66, 150])]
)
def test_same_bits_on_every_run_and_for_any_number_of_threads(isa, dtype, B, T, H, N, bounds):
    """With fewer heads than threads the kernel divides a head among them: other functions, which must give the same bits."""
    inputs, _, dy, _, _ = case(B, T, H, N, dtype=dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    generator = torch.Generator().manual_seed(3)
    state, d_state = (torch.randn(B if bounds is None else len(bounds) - 1, H, N, N, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    torch.ops.rwkvlm.wkv7_limit_isa(isa)
    try:
        runs = []
        for count in (1, 1, 2, 3, 5):
            torch.set_num_threads(count)
            runs.append(run(wkv7_native, inputs, state, dy, d_state, cu_seqlens))
            leaves = [x.clone().requires_grad_() for x in inputs]  # no gradient of the final state
            runs[-1] += torch.autograd.grad(wkv7_native(*leaves, None, cu_seqlens)[0], leaves, dy)
    finally:
        torch.set_num_threads(threads)
        torch.ops.rwkvlm.wkv7_limit_isa(BEST_ISA)
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


@pytest.mark.skipif(bool(NATIVE_FAILURE), reason=NATIVE_FAILURE)
@pytest.mark.parametrize("kind", ["usual", "clamp", "repeated"])
@pytest.mark.parametrize("T, N", [(100, 64), (150, 128), (65, 16)])
def test_a_head_divided_among_threads_is_right(kind, T, N):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(wkv7_native, 1, T, 1, N, kind=kind)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.update(r=x["r"][0]), r"r must be \[B, T, H, N\]"),
        (lambda x: x.update(k=x["k"][:, :-1]), r"k must have the shape \[1, 17, 2, 64\]"),
        (lambda x: x.update(v=x["v"].double()), "v must be torch.float32"),
        (lambda x: x.update(r=x["r"].half()), "bfloat16, float32 or float64, got torch.float16"),
        (lambda x: x.update(w=x["w"].to("meta")), "w must be on cpu"),
        (lambda x: x.update(a=x["a"].transpose(1, 2).contiguous().transpose(1, 2)), "a must be contiguous"),
        (lambda x: x.update({n: t[..., :48].contiguous() for n, t in x.items()}), r"N in \[16, 32, 64, 128\]"),
        (lambda x: x.update(initial_state=torch.zeros(1, 2, 64, 32)), r"initial_state must have the shape \[1, 2, 64, 64\]"),
        (lambda x: x.update(initial_state=torch.zeros(1, 2, 64, 64).bfloat16()), "initial_state must be torch.float32"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 5, 16])), "rise strictly from 0 to T = 17"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 5, 5, 17])), "rise strictly from 0 to T = 17"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0.0, 17.0])), "int32 or int64"),
        (lambda x: x.update({n: torch.cat([t, t]) for n, t in x.items()}, cu_seqlens=torch.tensor([0, 17])), "B must be 1"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(change, message):
    arguments = dict(zip(("r", "w", "k", "v", "a", "b"), (x.float() for x in make_inputs(1, 17, 2, 64))))
    change(arguments)
    with pytest.raises(ValueError, match=message) as caught:
        wkv7(**arguments)
    assert "\n" not in str(caught.value)
