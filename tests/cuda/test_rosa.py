"""The CUDA kernels of cuda/rosa as operators, against turning every bit: emulated on the host, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from oracles.emulated_all import registered
from oracles.emulated_wkv7 import CUDA, compile_kernels
from oracles.rosa import KINDS, close, from_definition, numbers, results, structured
from rwkvlm.ops import backend
from rwkvlm.ops.rosa import native, rosa, rosa_self, rosa_tokens

FP32, BF16 = torch.float32, torch.bfloat16
OPERATORS = "rosa", native, (FP32,)  # for the device of conftest.py


@pytest.fixture(scope="module")
def counted_steps(tmp_path_factory):
    """How many blocks of code a use of the emulated kernels enters: exact, and the same on every machine."""
    folder: Path = tmp_path_factory.mktemp("steps")
    (folder / "steps.cu").write_text("""extern "C" {
long long steps = 0;
__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() { ++steps; }
}""")
    sources = [CUDA / "rosa" / "rosa.cu", folder / "steps.cu"]
    sources += sorted((CUDA / "common").glob("*.cu"))
    library = ctypes.CDLL(str(compile_kernels(folder, "-O1", "-fsanitize-coverage=trace-pc", sources=sources)))
    steps = ctypes.c_longlong.in_dll(library, "steps")
    assert native.why_not(FP32) == ""  # defines the operators

    def count(*arguments) -> int:
        steps.value = 0
        with registered(library, "rosa"):
            torch.ops.rwkvlm.rosa_backward(*arguments)
        return steps.value

    return count


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


LENGTHS = [1, 2, 15, 16, 17, 64, 130, pytest.param(100, marks=pytest.mark.slow), pytest.param(257, marks=pytest.mark.slow)]


@pytest.fixture
def in_cpp(request):
    """The C++ kernels' gradients; asked for before `device` puts others in their place."""
    if native.why_not(FP32):
        pytest.skip("no C++ kernels")

    def gradients(T, bits):
        """Arguments and results.

        Weights and slopes are small integers, and all sums are exact: a single turn whose match is another one shows.
        """
        rng = torch.Generator().manual_seed(T)
        whole = lambda *shape: torch.randint(-8, 9, shape, generator=rng).float()
        x = structured(T)
        for inputs in ([x.repeat(1, 2), torch.cat([x, x.roll(bits, 1)], 1), whole(T, 24).sign()], [x]):
            C = inputs[0].shape[1]
            tensors = [whole(1, T, C), *(t.unsqueeze(0) for t in inputs), *[None] * (3 - len(inputs)), whole(C), whole(C)]
            arguments = (*tensors, bits, T % 2 == 0, 1.0, True)
            yield arguments, torch.ops.rwkvlm.rosa_backward(*arguments)

    return list(gradients(*(request.node.callspec.params[name] for name in ("T", "bits"))))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("T", LENGTHS)
def test_the_same_bits_as_every_other_form_on_rows_with_a_structure(in_cpp, device, T, bits):
    for arguments, want in in_cpp:
        got = torch.ops.rwkvlm.rosa_backward(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments))
        assert len(got) == len(want) and all(torch.equal(a.cpu(), b) for a, b in zip(got, want))
        if T <= 64:
            assert all(torch.equal(a, b) for a, b in zip(torch.ops.rwkvlm.rosa_plain_backward(*arguments), want))


def test_a_match_that_begins_inside_the_one_that_won_and_outlasts_it(device):
    """Two warps share the places of the one that won, of which the other begins among those of the first."""
    for before in (3, 30):
        text = torch.ones(before)  # its end is not what the period would have there
        period = torch.tensor([1.0, 1.0, -1.0]).repeat(21)
        q, k = torch.cat([-torch.ones(before + 64), text, period[:60]]), torch.cat([text, period, -torch.ones(before + 61)])
        tensors = [torch.ones(1, len(q), 1), *(x.view(1, -1, 1) for x in (q, k, k)), -torch.ones(1), torch.ones(1)]
        want = torch.ops.rwkvlm.rosa_plain_backward(*tensors, 1, True, 1.0, True)
        got = torch.ops.rwkvlm.rosa_backward(*(x.to(device) for x in tensors), 1, True, 1.0, True)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T, bits", [(80, 1), (80, 2)])
def test_rows_whose_lags_do_not_fit_into_shared_memory(in_cpp, device, T, bits, request):
    if device.type == "cuda":
        x, slopes = structured(40000)[:, : 2 * bits].contiguous().unsqueeze(0), torch.ones(1, 40000, 2 * bits)
        cases = [(slopes, x, *others, -slopes[0, 0], slopes[0, 0], bits, True, 1.0, True) for others in ((x, x), (None, None))]
        in_cpp = [(arguments, torch.ops.rwkvlm.rosa_backward(*arguments)) for arguments in cases]
    else:
        library = request.getfixturevalue("block_kernels")
        scratch = [library.rosa_scratch_bytes(T, bits, form) for form in (0, 1)]
        library.emulation_shared_limit(ctypes.c_size_t(960))
        request.addfinalizer(lambda: library.emulation_shared_limit(ctypes.c_size_t(227 * 1024)))
        assert all(library.rosa_scratch_bytes(T, bits, form) > scratch[form] for form in (0, 1))
    for arguments, want in in_cpp:
        got = torch.ops.rwkvlm.rosa_backward(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["self", "rosa"])
def test_steps_grow_with_the_square_of_the_length_whatever_the_symbols(counted_steps, form):
    """Blocks of code of the compiled kernel that are entered.

    One that made a pass over the lags for each turn inside the match that won took 14 times as many on 512 equal bits as on
    random ones, 25 times with q, k and v; one that looked at every place for each output 374 times 512^2 on either.
    """
    found = {}
    for T in (128, 512):
        x, slopes, ends = structured(T), torch.ones(1, T, 1), torch.tensor([[-1.0], [1.0]])
        for channel in range(x.shape[1]) if T == 128 else (0, 1, 3, 9, 10, 11):
            row = x[None, :, channel, None]
            others = (None, None) if form == "self" else (row, row)
            found[T, channel] = counted_steps(slopes, row, *others, *ends, 1, False, 1.0, True)
    for (T, channel), steps in found.items():
        assert T == 128 or 4 * found[128, channel] < steps < 16 * found[128, channel], channel
    assert min(found[512, channel] for channel in (0, 1, 3, 9, 10, 11)) < 130 * 512**2 and max(found.values()) < 600 * 512**2


@pytest.mark.parametrize("function", [rosa, rosa_self], ids=["rosa", "self"])
def test_the_same_bits_again_and_in_both_schedules(device, function, request):
    """More lags than threads; and the results of the C++ kernel."""
    inputs, low, high = case("almost periodic", 1, 140, 3)
    arguments = inputs if function is rosa else inputs[:1]
    found = []
    for reverse in (0, 1, 0):
        if device.type == "cpu":
            request.getfixturevalue("block_kernels").emulation_reverse(reverse)
        found.append(results(function, [x.to(device) for x in arguments], low.to(device), high.to(device), tau=0.1))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with backend.asked_for("torch"):
        close([x.cpu() for x in found[0]], results(function, arguments, low, high, tau=0.1), 2e-5)


def test_more_rows_than_have_memory_at_once(device):
    inputs, low, high = case("almost periodic", 2, 4, 1050)
    got = results(rosa, [x.to(device) for x in inputs], low.to(device), high.to(device), tau=0.1)
    with backend.asked_for("torch"):
        close([x.cpu() for x in got], results(rosa, inputs, low, high, tau=0.1), 2e-5)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_more_rows_need_no_more_memory_at_once(device):
    largest = []
    for rows in (2050, 3000):
        x, ends = torch.ones(1, 2, rows), torch.ones(2, rows)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            torch.ops.rwkvlm.rosa_backward(x, x, None, None, *ends, 1, False, 0.1, True)
        largest.append(max(event.self_cpu_memory_usage for event in seen.events() if event.name == "aten::empty"))
    assert largest[0] == largest[1] > 2 * 8 * 3000  # which the sums have


def test_no_state_is_returned_that_nobody_asked_for(device):
    x, ends = torch.ones(2, 5, 4, device=device), torch.ones(2, 4, device=device)
    for k in (None, x):
        _, *state = torch.ops.rwkvlm.rosa(x, k, k, *ends, 2, False, 0.1, False, None, None, None, False)
        assert [t.shape for t in state] == [(2, 2, 0)] * 3
    _, *state = torch.ops.rwkvlm.rosa_tokens(torch.ones(2, 5, dtype=torch.int64, device=device), None, None, False)
    assert [t.shape for t in state] == [(2, 0)] * 2


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


@pytest.mark.parametrize("flips", [True, False])
def test_sums_over_tokens_lose_nothing(device, flips):
    """One symbol everywhere: a miss, then hits, of which two large slopes cancel. In float32 the ones between them would be lost."""
    slopes, x = torch.ones(1, 20, 1), torch.ones(1, 20, 1, device=device)
    slopes[0, 3], slopes[0, -1] = 2.0**26, -(2.0**26)
    low, high = torch.zeros(1, device=device), torch.ones(1, device=device)
    *_, dlow, dhigh = torch.ops.rwkvlm.rosa_backward(slopes.to(device), x, None, None, low, high, 1, True, 0.1, flips)
    assert (dlow.item(), dhigh.item()) == (1, 17)


def test_a_gradient_of_nan_is_nan(device):
    x = torch.tensor([1.0, -1.0, float("nan"), 1.0]).view(1, 4, 1).to(device)
    for function in (lambda x, *ends: rosa(x, x, x, *ends), rosa_self):
        gradient = results(function, [x], torch.zeros(1, device=device), torch.ones(1, device=device))[1]
        assert gradient.flatten().isnan().tolist() == [False, False, True, False]


def test_what_reaches_an_operator_itself_is_looked_at(device):
    q, ends, ops = torch.ones(2, 5, 4, device=device), torch.ones(4, device=device), torch.ops.rwkvlm
    short, tokens = q[:, :-1], torch.ones(2, 5, dtype=torch.int64, device=device)
    old, runs = torch.ones(2, 2, 3, dtype=torch.uint8, device=device), torch.ones(2, 2, 3, dtype=torch.int32, device=device)

    options = False, 0.1, False, None, None, None, False

    def rosa_of(q=q, k=None, v=None, low=ends, bits=2, old_k=None, old_runs=None):
        return ops.rosa(q, k, v, low, ends, bits, *options[:3], old_k, None, old_runs, False)

    for message, call in (
        ("k must have the shape", lambda: rosa_of(k=short, v=q)),
        ("v must be torch.float32, got torch.bfloat16", lambda: rosa_of(k=q, v=q.bfloat16())),
        ("low must have the shape", lambda: rosa_of(low=ends[:3])),
        ("low must be torch.float32", lambda: rosa_of(low=ends.bfloat16())),
        ("q must be torch.bfloat16 or torch.float32, got torch.float64", lambda: rosa_of(q=q.double())),
        ("bits from 1 to 8 that divide C", lambda: rosa_of(bits=3)),
        ("bits from 1 to 8 that divide C", lambda: rosa_of(bits=0)),
        (
            "bits from 1 to 8 that divide C",
            lambda: ops.rosa(*[torch.ones(2, 5, 9, device=device)] * 3, *torch.ones(2, 9, device=device), 9, *options),
        ),
        ("k and v or neither", lambda: rosa_of(k=q)),
        ("old_k must have the shape", lambda: rosa_of(old_k=old[:1], old_runs=runs)),
        ("old_runs must be torch.int32, got torch.int64", lambda: rosa_of(old_k=old, old_runs=runs.long())),
        ("expected old_k, old_v and old_runs, or none", lambda: rosa_of(old_k=old)),
        ("expected old_k, old_v and old_runs, or none", lambda: rosa_of(k=q, v=q, old_k=old, old_runs=runs)),
        ("dout must have the shape", lambda: ops.rosa_backward(short, q, None, None, ends, ends, 2, False, 0.1, True)),
        ("high must have the shape", lambda: ops.rosa_backward(q, q, None, None, ends, ends[:2], 2, False, 0.1, True)),
        ("expected \\[B, T\\] int64", lambda: ops.rosa_tokens(tokens.int(), None, None, False)),
        (
            "state.runs \\[2, 5\\] of torch.int32 on .*, got \\[2, 3\\] of torch.int32",
            lambda: ops.rosa_tokens(tokens, tokens, runs[0], False),
        ),
        ("expected old and old_runs, or neither", lambda: ops.rosa_tokens(tokens, tokens, None, False)),
    ):
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"instead of '{message}': {call()}")


def test_no_batch(device):
    x = torch.zeros(0, 3, 4, device=device)
    assert [t.shape[0] for t in results(rosa, [x, x, x], *torch.ones(2, 4, device=device), bits=2)] == [0, 0, 0, 0, 4, 4]
    assert rosa_tokens(torch.zeros(0, 3, dtype=torch.int64, device=device)).shape == (0, 3)


def test_the_emulated_kernels_have_run(block_kernels):
    """The seam is not empty.

    With it, a call reaches the library, which has an error of its own; without it, the C++ kernels, which agree.
    """
    if native.why_not(FP32):
        pytest.skip("no C++ kernels")
    x, ends = torch.ones(1, 3, 2), torch.ones(2, 2)
    with backend.asked_for("cpu"):
        with registered(block_kernels, "rosa"):
            first = rosa_self(x, *ends)
            with pytest.raises(ValueError, match="low must have the shape"):
                torch.ops.rwkvlm.rosa_backward(x, x, None, None, ends[0, :1], ends[1], 1, True, 0.1, True)
        assert torch.equal(first, rosa_self(x, *ends))
        with pytest.raises(RuntimeError, match="expected contiguous tensors whose dtypes and sizes fit"):
            torch.ops.rwkvlm.rosa_backward(x, x, None, None, ends[0, :1], ends[1], 1, True, 0.1, True)
