"""The CUDA kernels of cuda/fused as operators, against float64: emulated on the host, and on this machine's GPU where there is one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from oracles.elementwise import Case, close, misfits, squarable
from oracles.emulated_all import registered
from rwkvlm.cli import doctor
from rwkvlm.ops import fused
from rwkvlm.ops.fused import native, reference

FP32, BF16 = torch.float32, torch.bfloat16
OPERATORS = "fused", native, ((FP32,), 16)  # for the device of conftest.py
# Relative rms of each output and gradient. bf16: each is computed in fp32 and rounded once, by 2^-8 of its size at most; the
# dx of a wide norm_mix twice.
TOLERANCE = {FP32: 2e-6, BF16: 4e-3}
CASES = {
    "norm_mix": [
        dict(),
        dict(T=1),
        dict(T=1, state=True, residual=False, mixes=1),
        dict(T=17, H=12, N=64, state=True, B=1),
        dict(B=3, T=65, H=5, N=16, residual=False),
        dict(T=40, H=9, N=16, mixes=1, state=True),
        dict(B=1, T=23, H=67, N=16),
        dict(B=1, T=51, documents=[1, 16, 1, 17, 16], state=True),
        dict(B=1, T=20, documents=[20], residual=False, mixes=1),
        dict(B=1, T=19, H=129, N=16, state=True),  # wider than a block of norm_mix_backward
    ],
    "token_mix": [
        dict(),
        dict(T=1),
        dict(T=1, state=True),
        dict(T=17, H=12, N=64, state=True, B=1),
        dict(B=3, T=65, H=1, N=64),
        dict(T=40, mixes=1),
        dict(T=40, mixes=3, state=True),
        dict(T=40, mixes=2),
        dict(T=40, mixes=4, state=True),  # of an attention layer
    ],
    "time_mix_inputs": [
        dict(),
        dict(T=1),
        dict(residual=False),
        dict(B=3, T=65, H=1, N=16),
        dict(B=1, T=17, H=2, N=128),
        dict(B=1, T=20, H=12, N=64),
    ],
    "time_mix_output": [dict(), dict(T=1), dict(B=3, T=65, H=1, N=16), dict(B=1, T=17, H=2, N=128), dict(B=1, T=20, H=12, N=64)],
    "relu_square": [dict(), dict(T=1, B=1, H=1, N=16), dict(B=3, T=171)],
}
ALL = [pytest.param(name, sizes, id=f"{name}-{sizes}") for name, several in CASES.items() for sizes in several]


@pytest.fixture
def device(device, monkeypatch):
    """As that of conftest.py; emulated, small inputs too run in one operator."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "_in_one", lambda *inputs: True)
    return device


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, sizes", ALL)
def test_against_float64(device, name, sizes, dtype):
    case = Case(name, dtype=dtype, device=device, **sizes)
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])  # which have other places in shared memory
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_again_and_in_both_schedules(device, name, dtype, request):
    case = Case(name, T=150, H=9, dtype=dtype, device=device)  # more than one warp with channels
    results = []
    for reverse in (0, 1, 0):
        if device.type == "cpu":
            request.getfixturevalue("block_kernels").emulation_reverse(reverse)
        outputs, grads = case.outputs_and_gradients(fused)
        results.append([*outputs, *grads])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("mixes", [1, 6])
@pytest.mark.parametrize(
    "sizes", [dict(), dict(T=40, H=9, N=16, state=True), dict(B=1, T=51, documents=[1, 16, 1, 17, 16]), dict(T=1, state=True)], ids=str
)
def test_wide_norm_mix_where_shared_memory_is_small(device, sizes, mixes, request):
    """No card is as small; the same kernel serves more than 2048 channels."""
    if device.type != "cpu":
        pytest.skip("emulated only")
    library = request.getfixturevalue("block_kernels")
    library.emulation_shared_limit(ctypes.c_size_t(2048))
    try:
        results = []
        for reverse in (0, 1):
            library.emulation_reverse(reverse)
            results.append(Case("norm_mix", mixes=mixes, device=device, **sizes).outputs_and_gradients(fused))
    finally:
        library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))
    for got, want in zip(results[0], Case("norm_mix", mixes=mixes, **sizes).exact()):
        close(got, want, TOLERANCE[FP32])
    assert all(torch.equal(a, b) for one, two in zip(*results) for a, b in zip(one, two))


@pytest.mark.parametrize("mixes", [2, 3])
def test_what_rwkv4_asks_for_is_made_in_parts(device, mixes):
    case = Case("norm_mix", T=20, mixes=mixes, state=mixes == 3, device=device)
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, TOLERANCE[FP32])


@pytest.mark.parametrize("heads", [1, 129], ids=["narrow", "wide"])
def test_more_tokens_than_blocks_take_at_once(device, heads):
    """Sums of several runs or many tokens, over the ends of sequences."""
    tokens = (16 * 342 + 3 if heads == 1 else 1501) if device.type == "cuda" else (611 if heads == 1 else 40)
    case = Case("norm_mix", B=3, T=tokens, H=heads, N=16, mixes=1, device=device)
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, TOLERANCE[FP32])

    def in_training(form, inputs):  # where nobody reads the state behind the last tokens
        stream, _, mixed = case.call(form, *inputs)
        return torch.autograd.grad(stream.square().sum() + mixed.square().sum(), [t for t in inputs if t is not None])

    close(
        in_training(fused, case.inputs),
        in_training(reference, [None if t is None else t.detach().double().requires_grad_() for t in case.inputs]),
        1e-5,
    )


def test_a_mean_far_from_zero_costs_no_digits_but_its_own(device):
    """x = 1000 + noise has lost three digits of its noise by itself; float64 sees the same x."""
    case = Case("norm_mix", H=12, N=64, T=20, residual=False, device=device)
    with torch.no_grad():
        case.inputs[0] += 1000
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, 1e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_that_nobody_has(device, residual):
    """Blends alone, the stream alone, the last token alone: the others' gradients are zeros, not anything in memory."""
    case = Case("norm_mix", T=20, mixes=1, residual=residual, state=True, device=device)
    wanted = [t for t in case.inputs if t is not None]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in case.inputs]
    for i in range(3):
        got = torch.autograd.grad(case.call(fused, *case.inputs)[i].square().sum(), wanted, allow_unused=True, materialize_grads=True)
        exact = case.call(reference, *doubles)[i].square().sum()
        close(got, torch.autograd.grad(exact, [t for t in doubles if t is not None], allow_unused=True, materialize_grads=True), 1e-5)


def test_a_value_of_the_first_block_that_nobody_else_reads(device):
    """In the last block its gradient is that of the residual alone."""
    case = Case("time_mix_inputs", device=device)
    doubles = [t.detach().double().requires_grad_() for t in case.inputs]
    got, exact = (
        torch.autograd.grad(sum(x.square().sum() for x in case.call(form, *inputs)[:5]), inputs)
        for form, inputs in ((fused, case.inputs), (reference, doubles))
    )
    close(got, exact, 1e-5)


def test_pieces_with_the_state_between_them_are_the_whole(device):
    case = Case("norm_mix", T=50, device=device)
    x, branch, *rest = case.inputs
    with torch.no_grad():
        whole, pieces, last = case.call(fused, *case.inputs), [], None
        for part in (slice(0, 1), slice(1, 20), slice(20, 50)):
            pieces.append(case.call(fused, x[:, part], branch[:, part], *rest[:2], last, *rest[3:]))
            last = pieces[-1][1]
    assert torch.equal(last, whole[1])
    for i in (0, *range(2, 8)):
        assert torch.equal(torch.cat([piece[i] for piece in pieces], 1), whole[i])


def test_a_branch_is_added_as_it_is_stored(device):
    """In bf16 the normalised numbers are those of the rounded sum, which is what the backward pass and later blocks read."""
    case = Case("norm_mix", T=40, dtype=BF16, device=device)
    with torch.no_grad():
        stream, *rest = case.call(fused, *case.inputs)
        assert all(torch.equal(a, b) for a, b in zip(rest, case.call(fused, stream, None, *case.inputs[2:])[1:], strict=True))


def test_keys_of_length_zero_and_tiny_ones(device):
    case = Case("time_mix_inputs", T=4, device=device)
    with torch.no_grad():
        case.inputs[1][0, 1] = 0
        case.inputs[1][0, 2] *= 1e-14
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, 1e-5)


def test_extreme_rates_keep_their_digits(device):
    case = Case("time_mix_inputs", T=4, device=device)
    with torch.no_grad():
        case.inputs[2][0] *= 60
        case.inputs[5][0] *= 60
    (outputs, grads), (exact_outputs, exact_grads) = case.outputs_and_gradients(fused), case.exact()
    close(outputs, exact_outputs, 1e-5)
    close(grads, exact_grads, 1e-5)
    far = (case.inputs[2][0] > -80) & (case.inputs[2][0] < -20)  # each by itself: beside the others their gradients are nothing
    assert far.sum() > 50 and (grads[2][0] / exact_grads[2][0] - 1)[far].abs().median() < 1e-5


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_square_alone_gives_every_bit_of_its_gradient(device, dtype):
    """2 max(x, 0) dy from max(x, 0)^2: what is kept of x is its rounded square."""
    x = squarable(dtype).to(device).requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device).to(dtype)
    (dx,) = torch.autograd.grad(fused.relu_square(x), x, dy)
    assert torch.equal(dx, (2 * x.detach().clamp_min(0).float() * dy.float()).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_nan_is_not_hidden(device, name):
    case = Case(name, device=device)
    with torch.no_grad():
        case.inputs[name == "time_mix_inputs"][0, 3, 5] = float("nan")
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        assert any(x.isnan().any() for x in want) and all(
            torch.equal(x.isnan().cpu(), y.isnan().cpu()) for x, y in zip(got, want, strict=True)
        )


def test_inputs_that_are_not_aligned_or_contiguous_are_copied(device):
    case = Case("token_mix", device=device)
    x = case.inputs[0].detach()
    shifted = torch.empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16
    with torch.no_grad():
        right = case.call(fused, *case.inputs)
        for other in (shifted, x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert all(torch.equal(a, b) for a, b in zip(right, case.call(fused, other, *case.inputs[1:])))


def test_what_the_kernels_do_not_take_is_an_error(device):
    for case in (
        Case("norm_mix", mixes=5, device=device),
        Case("token_mix", mixes=5, device=device),
        Case("time_mix_output", N=48, device=device),
    ):
        with pytest.raises(ValueError, match="shape or dtype"):
            case.call(fused, *case.inputs)
    for x in (torch.zeros(1, 6), torch.zeros(0, 16)):
        with pytest.raises(ValueError, match="shape or dtype"):
            torch.ops.rwkvlm.relu_square_forward(x.to(device))


@pytest.mark.parametrize("name", CASES)
def test_an_input_that_does_not_fit_is_a_value_error(device, name):
    case = Case(name, T=5, state=True, device=device)
    for what, inputs in misfits(case):
        with pytest.raises(ValueError):
            pytest.fail(f"{what} was taken: {case.call(fused, *inputs)}")


def test_what_reaches_an_operator_itself_is_looked_at(device):
    """What autograd hands to a backward fits; whoever calls it gets an error all the same, and no kernel reads beside a tensor."""
    ops, B, T, C = torch.ops.rwkvlm, 2, 5, 32
    whole, short, row, other = (
        torch.ones(B, T, C, device=device),
        torch.ones(B, T, C - 4, device=device),
        torch.ones(C, device=device),
        torch.ones(T, B, C, device=device),
    )
    moments, wide = torch.ones(B, T, 2, device=device), whole.double()
    inputs, output = [*[whole] * 6, *[row] * 5, 16], [*[whole] * 5, *[row] * 3, 16, 1e-5]
    calls = [
        ("dout must have the shape", lambda: ops.time_mix_output_backward(other, *output)),
        ("dout must be torch.float32, got torch.float64", lambda: ops.time_mix_output_backward(wide, *output)),
        ("r_k must have 32 elements", lambda: ops.time_mix_output_forward(*output[:7], row[:16], 16, 1e-5)),
        ("dw must have the shape", lambda: ops.time_mix_inputs_backward(short, *[whole] * 4, *inputs)),
        ("more_dv_first must have the shape", lambda: ops.time_mix_inputs_backward(*[whole] * 5, *inputs, short)),
        ("a shape or dtype", lambda: ops.time_mix_inputs_backward(*[whole] * 4, None, *inputs)),
        ("a shape or dtype", lambda: ops.time_mix_inputs_forward(*inputs[:4], None, *inputs[5:])),
        *(("a shape or dtype", lambda N=N: ops.time_mix_inputs_forward(*inputs[:-1], N)) for N in (24, 64)),
        (
            "k must be torch.bfloat16 or torch.float32, got torch.float16",
            lambda: ops.time_mix_inputs_forward(*[None if t is None else t.half() for t in inputs[:-1]], 16),
        ),
        ("last must have the shape \\[2, 32\\], got \\[1, 32\\]", lambda: ops.token_mix_forward(whole, row[None], [row])),
        ("at most 6 mixes, got 7", lambda: ops.token_mix_forward(whole, None, [row] * 7)),
        ("a shape or dtype", lambda: ops.token_mix_forward(whole[..., :6].contiguous(), None, [row[:6]])),
        ("expected \\[B, T, C\\], none of them 0", lambda: ops.token_mix_forward(whole[:, :0], None, [row])),
        ("expected \\[B, T, C\\]", lambda: ops.token_mix_forward(whole[0], None, [row])),
        ("a gradient for each of 2 mixes, got 1", lambda: ops.token_mix_backward([whole], whole, None, [row] * 2)),
        ("a gradient must have the shape", lambda: ops.token_mix_backward([short], whole, None, [row])),
        ("dy must have the shape", lambda: ops.relu_square_backward(short, whole)),
        ("branch must have the shape", lambda: ops.norm_mix_forward(whole, other, row, row, 1e-5, None, [row], None)),
        (
            "bounds must be torch.int32, got torch.int64",
            lambda: ops.norm_mix_forward(whole[:1], None, row, row, 1e-5, None, [row], torch.tensor([0, T], device=device)),
        ),
        ("a shape or dtype", lambda: ops.norm_mix_forward(whole, None, row, row, 1e-5, None, [row] * 4, None)),
        (
            "a shape or dtype",
            lambda: ops.norm_mix_forward(whole, None, row, row, 1e-5, None, [row], torch.tensor([0, T], dtype=torch.int32, device=device)),
        ),
        ("moments must have the shape", lambda: ops.norm_mix_backward(None, None, [whole], whole, moments[:1], row, row, None, [row])),
        (
            "moments must be torch.float32, got torch.float64",
            lambda: ops.norm_mix_backward(None, None, [whole], whole, moments.double(), row, row, None, [row]),
        ),
        ("dnewest must have the shape", lambda: ops.norm_mix_backward(None, row[None], [whole], whole, moments, row, row, None, [row])),
        ("dstream must have the shape", lambda: ops.norm_mix_backward(other, None, [whole], whole, moments, row, row, None, [row])),
        ("a gradient for each of 1 mixes, got 0", lambda: ops.norm_mix_backward(None, None, [], whole, moments, row, row, None, [row])),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"instead of '{message}': {call()}")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_operators_are_well_formed(device, dtype, residual):
    """Schema, fakes, and the same under AOT autograd with sizes that are symbols."""
    ops, check = torch.ops.rwkvlm, torch.library.opcheck

    def tensors(name, **sizes):
        return [None if t is None else t.detach() for t in Case(name, T=5, dtype=dtype, device=device, **sizes).inputs]

    x, last, *mixes = tensors("token_mix", state=residual)
    assert fused._form(x) is native
    check(ops.token_mix_forward.default, (x, last, mixes))
    check(ops.token_mix_backward.default, ([torch.randn_like(x) for _ in mixes], x, last, mixes))
    for state in (False, True):
        x, branch, weight, bias, last, *mixes = tensors("norm_mix", residual=residual, state=state)
        check(ops.norm_mix_forward.default, (x, branch, weight, bias, 1e-5, last, mixes, None))
        bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        check(ops.norm_mix_forward.default, (x[:1], None if branch is None else branch[:1], weight, bias, 1e-5, None, mixes, bounds))
        stream, newest, moments, *douts = ops.norm_mix_forward(x, branch, weight, bias, 1e-5, last, mixes, None)
        check(
            ops.norm_mix_backward.default,
            (x if state else None, newest if residual else None, douts, x, moments, weight, bias, last, mixes),
        )
    inputs = tensors("time_mix_inputs", residual=residual)
    grads = [torch.randn_like(x) for _ in range(5)]
    check(ops.time_mix_inputs_forward.default, (*inputs, 32))
    check(ops.time_mix_inputs_backward.default, (*grads[:4], grads[4] if residual else None, *inputs, 32, *grads[:residual]))
    inputs = tensors("time_mix_output")
    check(ops.time_mix_output_forward.default, (*inputs, 32, 1e-5))
    check(ops.time_mix_output_backward.default, (grads[0], *inputs, 32, 1e-5))
    check(ops.relu_square_forward.default, (x,))
    check(ops.relu_square_backward.default, (x, x.square()))


@pytest.mark.parametrize("name, sizes", [(name, sizes) for name in CASES for sizes in (dict(), dict(residual=False, state=True))], ids=str)
def test_compiles_into_one_graph(device, name, sizes):
    torch._dynamo.reset()
    case = Case(name, device=device, **sizes)

    class Compiled:
        def __getattr__(self, op):
            return torch.compile(getattr(fused, op), fullgraph=True, backend="aot_eager")

    for one, two in zip(case.outputs_and_gradients(fused), case.outputs_and_gradients(Compiled())):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_emulated_kernels_have_run(block_kernels):
    """The seam is not empty: with it, a call reaches the library; without it, the C++ kernels, which take no width of 20."""
    if native.why_not((FP32,), 16):
        pytest.skip("no C++ kernels")
    x = torch.randn(2, 3, 20)
    with registered(block_kernels, "fused"):
        assert torch.equal(torch.ops.rwkvlm.relu_square_forward(x), x.clamp_min(0) ** 2)
    with pytest.raises(ValueError, match="multiple of 16"):
        torch.ops.rwkvlm.relu_square_forward(x)


def test_the_doctor_asks_for_what_the_kernels_take(device, monkeypatch):
    """It would call a healthy GPU sick otherwise."""
    monkeypatch.setattr(doctor, "_device", lambda: device)
    assert "largest deviation from the reference" in doctor.kernel_fused()
