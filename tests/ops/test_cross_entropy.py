"""Head and loss in chunks against full logits: values, gradients, memory, errors; every form that runs on this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkvlm import native
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import chunked, head_cross_entropy, head_scores, reference
from rwkvlm.ops.cross_entropy import native as native_form

# Against a float64 computation from the same rounded inputs, relative (rms for gradients). In bf16 the C++ form has fp32
# logits, so that its loss is exact and its gradients carry the rounding of softmax, x and the result (2^-9 at most each);
# plain PyTorch also rounds the logits to bf16.
LOSS_TOLERANCE = {"float64": 1e-11, "float32": 1e-6, "bfloat16 cpu": 1e-6, "bfloat16 torch": 2e-3}
GRAD_TOLERANCE = {"float64": 1e-11, "float32": 2e-6, "bfloat16 cpu": 3e-3, "bfloat16 torch": 1e-2}


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def form(request, monkeypatch):
    """Every test runs in both forms; "auto" stands for "cpu" since float64 has no C++ form."""
    if request.param == "cpu" and not native.available("loss")[0]:
        pytest.skip(native.available("loss")[1])
    monkeypatch.setattr(backend, "_requested", "auto" if request.param == "cpu" else "torch")
    return request.param


def tolerance(table, dtype, form, n_embd=2):
    name = str(dtype).removeprefix("torch.")
    if form == "cpu" and native_form.why_not(dtype, n_embd):
        form = "torch"  # an odd n_embd in bf16, or a processor without the matrix kernels
    return table.get(name) or table[f"{name} {form}"]


def make(tokens, C, V, dtype, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, C, generator=rng, dtype=torch.float64)
    weight = torch.randn(V, C, generator=rng, dtype=torch.float64) * (scale * 3 / C**0.5)
    targets = torch.randint(V, tokens, generator=rng)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def oracle(x, weight, targets, l2wrap=1e-4, grad_output=1.0):
    """Loss and gradients in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = reference.head_cross_entropy(x, weight, targets, l2wrap=l2wrap)
    return loss.detach(), *torch.autograd.grad(loss * grad_output, (x, weight))


def rms_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, C, V, chunk",
    [
        ((2, 48), 64, 1000, 0),
        ((97,), 32, 513, 16),
        ((1,), 16, 7, 0),
        ((3, 5, 7), 24, 331, 64),
        ((64,), 33, 65, 1),
        ((9,), 2, 3, 4),
        ((40,), 1056, 200, 32),  # C beyond the columns of one matrix product
        ((300,), 96, 5001, 128),  # several parts of the vocabulary, several chunks, nothing divides
    ],
)
def test_matches_reference(form, dtype, tokens, C, V, chunk):
    x, weight, targets = make(tokens, C, V, dtype)
    loss = head_cross_entropy(x, weight, targets, chunk)
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert (dx.dtype, dw.dtype) == (dtype, dtype) and dx.shape == x.shape
    expected, expected_dx, expected_dw = oracle(x, weight, targets)
    assert abs(loss.item() / expected.item() - 1) <= tolerance(LOSS_TOLERANCE, dtype, form, C)
    assert rms_error(dx, expected_dx) <= tolerance(GRAD_TOLERANCE, dtype, form, C)
    assert rms_error(dw, expected_dw) <= tolerance(GRAD_TOLERANCE, dtype, form, C)


def test_gradcheck():
    x, weight, targets = make((2, 5), 6, 11, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: head_cross_entropy(x, w, targets, 3, l2wrap=0.0), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edges_of_the_vocabulary(form, dtype):
    """Targets at both ends, and each row's arg-max at both ends too."""
    x, weight, _ = make((6,), 32, 101, dtype)
    with torch.no_grad():
        weight[0], weight[100] = 2 * x[0], 2 * x[1]
    targets = torch.tensor([0, 100, 0, 100, 100, 0])
    grads = torch.autograd.grad(head_cross_entropy(x, weight, targets, 4, l2wrap=0.5), (x, weight))
    for got, expected in zip(grads, oracle(x, weight, targets, l2wrap=0.5)[1:]):
        assert rms_error(got, expected) <= tolerance(GRAD_TOLERANCE, dtype, form)


def test_l2wrap_is_the_official_formula():
    """Its gradient alone: 1e-4 / tokens * max_logit at the arg-max, times grad_output; the loss does not move."""
    x, weight, targets = make((40,), 32, 300, torch.float64)
    with_wrap, without = (head_cross_entropy(x, weight, targets, 7, l2wrap=s) for s in (1e-4, 0.0))
    assert with_wrap.item() == without.item()
    extra = (
        torch.autograd.grad(with_wrap, x, torch.tensor(3.0).double())[0] - torch.autograd.grad(without, x, torch.tensor(3.0).double())[0]
    )
    top, at = (x @ weight.t()).detach().max(-1)
    torch.testing.assert_close(extra, 3 * 1e-4 / 40 * top[:, None] * weight.detach()[at], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_output_scales(dtype):
    x, weight, targets = make((50,), 32, 300, dtype)
    loss = head_cross_entropy(x, weight, targets, 16)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * 0.25, (x, weight))
    for a, b in zip(once, scaled):
        assert torch.equal(a * 0.25, b)


def test_backward_twice():
    """The gradients kept for backward are not those handed out."""
    x, weight, targets = make((50,), 32, 300, torch.float32)
    loss = head_cross_entropy(x, weight, targets, 16)
    loss.backward(retain_graph=True)
    expected = weight.grad.clone()
    weight.grad.zero_()
    loss.backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["x", "weight", "none"])
def test_only_what_is_needed(dtype, wanted):
    x, weight, targets = make((33,), 32, 300, dtype)
    loss = head_cross_entropy(x, weight, targets, 16)
    full = dict(zip(("x", "weight"), torch.autograd.grad(loss, (x, weight))))
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    again = head_cross_entropy(x, weight, targets, 16)
    assert again.item() == loss.item() and again.requires_grad == (wanted != "none")
    if wanted != "none":
        again.backward()
        assert torch.equal({"x": x, "weight": weight}[wanted].grad, full[wanted])
    with torch.no_grad():
        quiet = head_cross_entropy(x, weight, targets, 16)
    assert quiet.item() == loss.item() and not quiet.requires_grad


def test_confident_rows_and_huge_logits():
    """Losses from 0 to hundreds of nats stay exact: nothing overflows."""
    x, weight, targets = make((64,), 64, 500, torch.float32, scale=40)
    with torch.no_grad():
        targets[:32] = (x @ weight.t()).argmax(-1)[:32]
    loss = head_cross_entropy(x, weight, targets)
    expected, *grads = oracle(x, weight, targets)
    assert expected > 50 and abs(loss.item() / expected.item() - 1) <= 1e-6
    for got, want in zip(torch.autograd.grad(loss, (x, weight)), grads):
        assert rms_error(got, want) <= 1e-4  # logits of 500 carry an absolute error of 3e-5 in fp32


def test_the_operator_itself_looks_at_targets(form):
    """What lies outside of the head must not be read."""
    if form != "cpu":
        pytest.skip("the C++ form has the operator")
    x, weight, targets = (t.detach() for t in make((5,), 16, 50, torch.float32))
    assert native_form.why_not(torch.float32, 16) == ""
    for target in (-1, 50, 1 << 40):
        targets[3] = target
        for call in (
            lambda: torch.ops.rwkvlm.head_ce(x, weight, targets, 64, 0.0, True, True),
            lambda: torch.ops.rwkvlm.head_scores(x, weight, targets, 64),
        ):
            with pytest.raises(RuntimeError, match="targets must lie in"):
                call()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7FC00001], ids=hex)
def test_nan_is_not_hidden(bits):
    """Whatever its bits: GPUs make other ones than processors."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, targets = make((20,), 16, 50, dtype)
        targets[targets == 7] = 8
        with torch.no_grad():
            weight[7, 3] = nan
        assert head_cross_entropy(x, weight, targets).isnan()
        assert head_scores(x, weight, targets)[0].isnan().all()


@pytest.mark.parametrize("gap", [70.0, 110.0, 1000.0])
def test_another_token_far_above_the_own_one(gap):
    """Where exp(logit - own logit) would be too large for fp32, and before."""
    x, weight, targets = torch.ones(3, 2), torch.zeros(50, 2), torch.tensor([1, 2, 3])
    weight[7, 0] = gap
    loss = head_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, l2wrap=0.0)
    assert loss.item() == pytest.approx(gap, rel=1e-6)
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.allclose(dx[:, 0], torch.full((3,), gap / 3)) and not dx[:, 1].any()


def test_tokens_without_a_chance_add_nothing():
    x, weight, targets = torch.ones(5, 2), torch.full((5000, 2), -60.0), torch.full((5,), 7)
    weight[7] = 0
    assert head_scores(x, weight, targets)[0].max() < 1e-20  # 4999 times exp(-120)


@pytest.mark.parametrize("V", [5, 31, 63, 287])
def test_what_lies_behind_the_weight_is_not_read(V):
    """A matrix of bf16 is taken two rows at a time."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, targets = make((20,), 32, V, dtype)
        memory = torch.full((V + 32, 32), torch.nan, dtype=dtype)
        memory[:V] = weight.detach()
        loss = head_cross_entropy(x, inside := memory[:V].requires_grad_(), targets)
        for got, want in zip(
            torch.autograd.grad(loss, (x, inside)), torch.autograd.grad(head_cross_entropy(x, weight, targets), (x, weight))
        ):
            assert torch.equal(got, want)


BEHIND = """
import ctypes, mmap, torch
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import backend_for, head_cross_entropy
dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if backend_for(torch.device("cpu"), dtype, 32) == "cpu"]
assert torch.float32 in dtypes
backend.set_kernel("cpu")
for V in (5, 31, 63, 287):
    for dtype in dtypes:
        bytes, weight = V * 32 * dtype.itemsize, torch.randn(V, 32).to(dtype)
        whole = -(-bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0) == 0
        inside = torch.frombuffer(memory, dtype=dtype, count=weight.numel(), offset=whole - bytes).view(V, 32)
        inside = inside.copy_(weight).requires_grad_()
        head_cross_entropy(torch.randn(20, 32).to(dtype).requires_grad_(), inside, torch.zeros(20, dtype=torch.int64)).backward()
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forbids memory as Linux does")
def test_what_lies_behind_the_weight_is_not_touched(form):
    """The last row ends where memory does that may not be read."""
    if form != "cpu":
        pytest.skip("the C++ form reads whole vectors")
    done = subprocess.run([sys.executable, "-c", BEHIND], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_nan_of_any_logit_is_not_hidden():
    """Neither that of the own token's logit nor that of another one; in gradients whose width no vector divides, too."""
    for dtype in (torch.float32, torch.bfloat16):
        for C in (16, 22):
            x, weight, targets = make((20,), C, 50, dtype)
            with torch.no_grad():
                weight[7] = float("nan")
            for target in (7, 8):
                loss = head_cross_entropy(x, weight, torch.full_like(targets, target))
                dx, dw = torch.autograd.grad(loss, (x, weight))
                assert loss.isnan() and dx.isnan().all() and dw.isnan().all()


def test_same_bits_again():
    x, weight, targets = make((200,), 64, 3000, torch.bfloat16)
    runs = [torch.autograd.grad(head_cross_entropy(x, weight, targets), (x, weight)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


def test_checkpointing_and_module():
    """Called with a module's weight, under both kinds of torch.utils.checkpoint."""

    class Head(torch.nn.Linear):
        def forward(self, x, targets):
            return head_cross_entropy(x, self.weight, targets, 8)

    x, _, targets = make((2, 20), 32, 300, torch.float32)
    torch.manual_seed(0)
    head = Head(32, 300, bias=False)
    plain = torch.autograd.grad(head(x, targets), (x, head.weight))
    for reentrant in (False, True):
        x.grad = head.weight.grad = None
        checkpoint(head, x, targets, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, plain[0]) and torch.equal(head.weight.grad, plain[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, C, V", [(300, 96, 5001), (1, 16, 7)])
def test_scores_of_given_tokens(form, dtype, n, C, V, monkeypatch):
    for module in (chunked, native_form):
        monkeypatch.setattr(module, "auto_chunk", lambda *_: 128)
    x, weight, targets = (t.detach() for t in make((n,), C, V, dtype))
    logits = x.double() @ weight.double().t()
    nats, likeliest = head_scores(x, weight, targets)
    assert (nats.dtype, likeliest.dtype, nats.shape, likeliest.shape) == (torch.float64, torch.int64, (n,), (n,))
    rounding = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 2**-8 if form == "torch" or native_form.why_not(dtype, C) else 1e-5,
    }[dtype] * logits.abs().max()
    assert (nats - torch.nn.functional.cross_entropy(logits, targets, reduction="none")).abs().max() <= rounding
    assert (logits.amax(-1) - logits.gather(-1, likeliest[:, None])[:, 0]).max() <= rounding


def test_of_equal_maxima_the_first_counts(form):
    """In each of the parts of the vocabulary that have maxima of their own."""
    assert not head_scores(torch.ones(40, 8), torch.ones(5001, 8), torch.full((40,), 7))[1].any()


def test_rounded_logits_are_summed_in_full():
    """In bf16 the logits of the plain form are rounded, by up to 2^-9 of them, and nothing after them.

    Their sum of exponentials would lose as much again.
    """
    x, weight, targets = (t.detach() for t in make((20,), 16, 300, torch.bfloat16))
    logits = (x @ weight.t()).double()
    nats, likeliest = chunked.scores(x, weight, targets)
    assert torch.allclose(nats, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), rtol=0, atol=1e-5)
    assert torch.equal(likeliest, logits.argmax(-1))


MEMORY = """
import torch
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import head_cross_entropy
backend.set_kernel("{kernel}")
def peak():  # KiB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def run(tokens):
    x = torch.randn(tokens, 32, dtype=torch.{dtype}, requires_grad=True)
    weight = torch.zeros(65536, 32, dtype=torch.{dtype}, requires_grad=True)
    head_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.int64), 64).backward()
run(1)
before = peak()
run(4096)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_never_whole(form, dtype):
    """Peak memory of 4096 tokens over that of one: 1024 MiB of fp32 logits, or 512 of bf16, would show."""
    source = MEMORY.format(kernel="torch" if form == "torch" else "", dtype=dtype)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 10


def test_the_operator_is_well_formed(form):
    if form == "torch" or native_form.why_not(torch.bfloat16, 2):
        pytest.skip("no C++ form here")
    x, weight, targets = make((20,), 16, 40, torch.bfloat16)
    torch.library.opcheck(torch.ops.rwkvlm.head_ce.default, (x.detach(), weight.detach(), targets, 8, 1e-4, True, False))
    torch.library.opcheck(torch.ops.rwkvlm.head_scores.default, (x.detach(), weight.detach(), targets, 8))
    with pytest.raises(RuntimeError, match="head_ce: inputs do not fit"):  # numbers of 16 bits come in pairs
        torch.ops.rwkvlm.head_scores(
            torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64), 8
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_exponentials_than_are_kept_at_a_time(form, dtype):
    if form == "torch" or native_form.why_not(dtype, 2):
        pytest.skip("no C++ form here")
    test_matches_reference(form, dtype, (1030,), 8, 65535, 512)


@pytest.mark.parametrize("level", [0, 1, 2], ids=["plain", "avx2", "avx512"])
def test_every_instruction_set(form, level):
    if form == "torch" or native_form.why_not(torch.bfloat16, 2):
        pytest.skip("no C++ form here")
    limit = torch.ops.rwkvlm.head_ce_limit_isa
    try:
        if limit(level) != level:
            pytest.skip("this processor lacks it")
        for dtype in (torch.float32, torch.bfloat16):
            test_matches_reference(form, dtype, (101,), 50, 403, 37)
            test_matches_reference(form, dtype, (300,), 96, 5001, 128)
    finally:
        limit(2)


def test_same_bits_for_any_number_of_threads():
    x, weight, targets = make((200,), 64, 5000, torch.bfloat16)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = head_cross_entropy(x, weight, targets, 64)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    finally:
        torch.set_num_threads(threads)
    if backend.requested() == "torch":
        pytest.skip("torch's own sums depend on the number of threads")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(targets=torch.zeros(3, dtype=torch.int64)), "targets [3]"),
        (dict(targets=torch.zeros(4, dtype=torch.int32)), "torch.int32"),
        (dict(targets=torch.tensor([0, 1, 2, 9])), "[0, 9]"),
        (dict(targets=torch.tensor([0, -1, 2, 3])), "[-1, 3]"),
        (dict(x=torch.zeros(4, 7)), "do not fit"),
        (dict(weight=torch.zeros(9, 8, dtype=torch.bfloat16)), "bfloat16"),
        (dict(x=torch.zeros(4, 8, dtype=torch.float16)), "float16"),
        (dict(x=torch.zeros(4, 8, dtype=torch.int32), weight=torch.zeros(9, 8, dtype=torch.int32)), "int32"),
        (dict(x=torch.zeros(0, 8), targets=torch.zeros(0, dtype=torch.int64)), "one or more"),
        (dict(chunk=-1), "chunk is -1"),
        (dict(x=torch.zeros(4, 8, device="meta")), "one device"),
    ],
)
def test_errors_are_one_clear_line(change, says):
    arguments = dict(x=torch.zeros(4, 8), weight=torch.zeros(9, 8), targets=torch.zeros(4, dtype=torch.int64)) | change
    with pytest.raises(ValueError) as error:
        head_cross_entropy(**arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_reaches_the_operator_itself_is_looked_at(form):
    """Whoever calls it without `head_cross_entropy` gets an error, and nothing is read beside a tensor."""
    if form != "cpu":
        pytest.skip("the operator of the C++ form")
    x, weight, targets = torch.ones(4, 8), torch.ones(9, 8), torch.zeros(4, dtype=torch.int64)
    wrong = {
        "too few targets": (x, weight, targets[:3]),
        "no tokens": (x[:0], weight, targets[:0]),
        "targets of 32 bits": (x, weight, targets.int()),
        "not contiguous": (torch.ones(8, 4).t(), weight, targets),
        "a weight that is not contiguous": (x, torch.ones(8, 9).t(), targets),
        "targets that are not contiguous": (x, weight, torch.zeros(8, dtype=torch.int64)[::2]),
        "another width": (x, torch.ones(9, 10), targets),
        "another dtype": (x, weight.bfloat16(), targets),
        "float16": (x.half(), weight.half(), targets),
        "an odd width in bf16": (x[:, :7].bfloat16().contiguous(), weight[:, :7].bfloat16().contiguous(), targets),
    }
    for what, inputs in wrong.items():
        with pytest.raises(RuntimeError, match="head_ce: "):
            pytest.fail(f"{what}: {torch.ops.rwkvlm.head_scores(*inputs, 64)}")
    with pytest.raises(RuntimeError, match="head_ce: "):
        torch.ops.rwkvlm.head_ce(x, weight, targets, 0, 0.0, False, False)
