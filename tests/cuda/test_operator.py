"""The CUDA kernels as torch operators: on this machine's GPU where there is one, and everywhere the same code over the emulated kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracles.emulated_wkv7 import Case, Kernels, Shape, emulated_machine, errors, make_case, prototypes
from rwkvlm import native
from rwkvlm.config import ModelConfig, UserError
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend
from rwkvlm.ops import wkv7 as package
from rwkvlm.ops.wkv7 import cuda, wkv7, wkv7_chunked
from rwkvlm.ops.wkv7.arguments import NAMES

BF16, FP32 = torch.bfloat16, torch.float32
LIMITS = {BF16: 6.2e-3, FP32: 2e-6}  # rms, relative to float64; test_chunked.py and test_sequential.py have them by result


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Where the operators run: CPU tensors over the kernels in emulation, or the GPU. wkv7 itself takes them, too."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    monkeypatch.setattr(package, "backend_for", lambda device, dtype: "cuda")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield torch.device("cuda", 0)
    else:
        kernels: Kernels = request.getfixturevalue("kernels")
        kernels.library.emulation_reverse(0)
        machine = emulated_machine(kernels.library)
        monkeypatch.setattr(cuda, "machine", lambda device: machine)
        yield torch.device("cpu")
    torch.use_deterministic_algorithms(False)


def run(case: Case, device: torch.device, form=wkv7) -> dict[str, torch.Tensor]:
    leaves = [x.to(device).requires_grad_() for x in case.inputs]
    state = None if case.initial_state is None else case.initial_state.to(device).requires_grad_()
    y, final_state = form(*leaves, initial_state=state, output_final_state=True, cu_seqlens=case.cu_seqlens)
    outputs, slopes = [y], [case.dy.to(device)]
    if case.d_final_state is not None:
        outputs, slopes = [*outputs, final_state], [*slopes, case.d_final_state.to(device)]
    wanted = leaves if state is None else [*leaves, state]
    gradients = torch.autograd.grad(outputs, wanted, slopes)
    names = [f"d{n}" for n in (*NAMES, "_initial_state")]
    return {name: x.detach().cpu() for name, x in zip(["y", "final_state", *names], [y, final_state, *gradients])}


@pytest.mark.parametrize(
    "options",
    [
        dict(T=70),
        dict(T=33, N=16, B=2),
        dict(T=70, states=False),
        dict(T=131, H=1, documents=[1, 63, 64, 3]),
        dict(T=20, N=128),
        dict(T=35, dtype=FP32),
        dict(T=35, dtype=FP32, documents=[30, 5]),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_float64(device, options):
    case = make_case(**options)
    worst = errors(run(case, device), case.expected())
    limit = LIMITS[options.get("dtype", BF16)]
    assert max(worst.values()) < limit, worst


def test_scans_in_segments(device):
    case = make_case(T=200, H=1)
    plain = run(case, device)
    cuda.ask_for_segments(1)
    try:
        cut = run(case, device)
    finally:
        cuda.ask_for_segments(-1)
    worst = errors(cut, case.expected())
    assert max(worst.values()) < LIMITS[BF16] and not torch.equal(cut["final_state"], plain["final_state"]), worst


def test_the_rule_of_the_segments_is_asked(device):
    """One head of 4096 tokens: segments of 8 chunks on any machine with two multiprocessors or more."""
    inputs = [x.to(device) for x in make_case(T=4096, N=16, H=1, states=False, kind="slow").inputs]
    finals = []
    try:
        for asked in (-1, 8, 0):
            cuda.ask_for_segments(asked)
            finals.append(wkv7(*inputs, output_final_state=True)[1])
    finally:
        cuda.ask_for_segments(-1)
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


def test_another_machines_number_is_refused(device):
    elsewhere = cuda.machine_over(cuda.machine(device).library, torch.device("cuda", 7), (9, 0), 132).number
    with pytest.raises(ValueError, match="r must be on cuda:7"):
        torch.ops.rwkvlm.wkv7_cuda(*(x.to(device) for x in make_case(T=3).inputs), None, None, False, elsewhere)
    for unknown in (elsewhere + 1, 10**6, -1):
        with pytest.raises(ValueError, match="no machine has the number"):
            torch.ops.rwkvlm.wkv7_cuda(*(x.to(device) for x in make_case(T=3).inputs), None, None, False, unknown)


def test_without_tensor_cores_it_is_the_sequential_kernels_in_bf16_too(device):
    inputs, library = [x.to(device) for x in make_case(T=20, N=16).inputs], cuda.machine(device).library
    older = cuda.machine_over(library, device, (7, 5), 40).number
    saved = torch.ops.rwkvlm.wkv7_cuda_forward(*inputs, None, None, True, older)[2]
    assert saved.numel() == cuda.saved_bytes("sequential", *inputs[0].shape, 0) != cuda.saved_bytes("chunked", *inputs[0].shape, 0)
    with pytest.raises(ValueError, match="expected bfloat16 and a GPU with bfloat16 tensor cores"):
        torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*inputs, None, torch.ones(2, device=device), None, 8, 64, False, False, older)


def test_repeated_runs_give_the_same_bits(device):
    case = make_case(T=100)
    first, again = run(case, device), run(case, device)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_inference_saves_nothing_and_gives_the_same(device):
    case = make_case(T=70, H=1)
    inputs = [x.to(device) for x in case.inputs]
    machine = cuda.number_of(device)
    y, _, saved = torch.ops.rwkvlm.wkv7_cuda_forward(*inputs, None, None, False, machine)
    again, _, kept = torch.ops.rwkvlm.wkv7_cuda_forward(*inputs, None, None, True, machine)
    assert torch.equal(y, again) and saved.numel() == 0 and kept.numel() > 0
    with pytest.raises(RuntimeError, match="what a forward with save has left"):
        torch.ops.rwkvlm.wkv7_cuda_backward(y, None, *inputs, None, None, saved, False, machine)


def test_the_sizes_told_to_fake_tensors_are_the_librarys(device):
    library = prototypes(cuda.machine(device).library)
    for B, T, H, N, documents in ((2, 100, 3, 64, 0), (1, 1, 1, 16, 0), (1, 200, 2, 32, 7), (2, 100, 3, 128, 0)):
        bounds = torch.zeros(documents + 1, dtype=torch.int32)
        shape = Shape(B, T, H, N, documents, bounds.data_ptr() if documents else None)
        for form in ("chunked", "sequential"):
            assert getattr(library, f"wkv7_{form}_saved_bytes")(shape) == cuda.saved_bytes(form, B, T, H, N, documents)


@pytest.mark.parametrize("options", [dict(T=9), dict(T=9, dtype=FP32), dict(T=9, states=False), dict(T=12, documents=[4, 8])], ids=str)
def test_opcheck(device, options):
    case = make_case(N=16, **options)
    inputs, machine = [x.to(device) for x in case.inputs], cuda.number_of(device)
    state = None if case.initial_state is None else case.initial_state.to(device)
    bounds = None if case.cu_seqlens is None else case.cu_seqlens.to(device)
    for save in (True, False):
        torch.library.opcheck(torch.ops.rwkvlm.wkv7_cuda_forward, (*inputs, state, bounds, save, machine))
    _, final_state, saved = torch.ops.rwkvlm.wkv7_cuda_forward(*inputs, state, bounds, True, machine)
    for slope in (None, torch.randn_like(final_state)):
        given = (case.dy.to(device), slope, *inputs, state, bounds, saved, slope is not None, machine)
        torch.library.opcheck(torch.ops.rwkvlm.wkv7_cuda_backward, given)
    torch.library.opcheck(torch.ops.rwkvlm.wkv7_cuda_backward, (*given, inputs[0], None, inputs[2]))


@pytest.mark.parametrize("again", ["rkv", "v", ""])
@pytest.mark.parametrize("options", [dict(T=70), dict(T=35, dtype=FP32, documents=[30, 5])], ids=str)
def test_what_is_passed_on_has_its_gradients_added_up(device, options, again):
    """As if its other uses read r, k and v themselves; none, some or all of them."""
    case = make_case(**options, states=False)
    used = [(name in again) * (1 + i) for i, name in enumerate("rkv")]

    def run(passing, form=wkv7):
        leaves = [x.to(device).requires_grad_() for x in case.inputs]
        y, *passed = (
            form(*leaves, cu_seqlens=case.cu_seqlens, pass_on=True)
            if passing
            else (wkv7(*leaves, cu_seqlens=case.cu_seqlens), leaves[0], *leaves[2:4])
        )
        loss = (y * case.dy.to(device)).float().sum() + sum((x.float() ** 2).sum() * n for x, n in zip(passed, used) if n)
        return [y.detach(), *torch.autograd.grad(loss, leaves)]

    plain = run(False)
    for got in (run(True), run(True, lambda *x, **y: checkpoint(wkv7, *x, **y, use_reentrant=False))):
        for name, ours, theirs in zip(("y", *NAMES), got, plain):
            if name in again and ours.dtype == BF16:  # rounded once instead of twice
                assert (ours.float() - theirs.float()).norm() < 4e-3 * theirs.float().norm()
            else:
                assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("pass_on", [False, True])
def test_a_second_derivative_is_an_error(device, pass_on):
    leaves = [x.to(device).requires_grad_() for x in make_case(T=5, N=16, H=1, states=False).inputs]
    y = wkv7(*leaves, output_final_state=True, pass_on=pass_on)[0]
    (slope,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()
    (slope,) = torch.autograd.grad(wkv7(*leaves).float().sum(), leaves[:1], create_graph=True)  # of gradients that are constants it is one
    assert not slope.requires_grad


def test_only_the_final_state_may_be_used(device):
    case = make_case(T=20, N=16)
    leaves = [x.to(device).requires_grad_() for x in case.inputs]
    _, final_state = wkv7(*leaves, output_final_state=True)
    (dk,) = torch.autograd.grad(final_state.sum(), leaves[2])
    wide = [x.double().requires_grad_() for x in case.inputs]
    (expected,) = torch.autograd.grad(package.wkv7_reference(*wide, None)[1].sum(), wide[2])
    assert errors({"dk": dk.cpu()}, {"dk": expected})["dk"] < LIMITS[BF16]


def test_the_state_alone_may_be_trained(device):
    case = make_case(T=20, N=16)
    inputs, state = [x.to(device) for x in case.inputs], case.initial_state.to(device).requires_grad_()
    outputs = wkv7(*inputs, initial_state=state, output_final_state=True)
    (gradient,) = torch.autograd.grad(outputs, state, [case.dy.to(device), case.d_final_state.to(device)])
    assert torch.equal(gradient.cpu(), run(case, device)["d_initial_state"])


def block_and_inputs(device, dtype):
    """A block of RWKV-7 with weights that let every gradient through, x and the first block's value."""
    model = build(ModelConfig(n_layer=2, n_embd=64, vocab_size=64, head_size=32))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the output matrices begin as zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    x, v_first = (torch.randn(2, 40, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    return model.blocks[1].to(device, dtype), x, v_first


def results(function, block, x, v_first) -> list[torch.Tensor]:
    """With a use of v_first behind the block, as in a model."""
    y, passed, _ = function(x, v_first)
    leaves = [x, v_first, *block.parameters()]
    loss = y.float().square().sum() + passed.float().square().sum()
    return [y.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dtype, limit", [(FP32, 1e-4), (BF16, 0.1)], ids=["fp32", "bf16"])
def test_a_whole_block(device, monkeypatch, dtype, limit):
    """Against the same rounded block in plain PyTorch in fp32; in bf16 its other parts round far more than wkv7."""
    block, x, v_first = block_and_inputs(device, dtype)
    got = results(block, block, x, v_first)
    monkeypatch.setattr(package, "backend_for", lambda device, dtype: "torch")
    expected = results(block.float(), block, x.detach().float().requires_grad_(), v_first.detach().float().requires_grad_())
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert (ours.float() - theirs).norm() <= limit * theirs.norm() + 1e-6, i


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_compiles_into_one_graph(device, compiler):
    torch._dynamo.reset()
    block, x, v_first = block_and_inputs(device, FP32)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for ours, theirs in zip(results(block, block, x, v_first), results(compiled, block, x, v_first), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lengths_that_change_compile_once_more(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: wkv7(*x) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (9, 70):
        leaves = [x.to(device).requires_grad_() for x in make_case(T=T, N=16).inputs]
        found = []
        for form in (compiled, lambda *x: wkv7(*x) * 2):
            y = form(*leaves)
            assert y.shape[1] == T
            found.append(torch.autograd.grad(y.float().square().sum(), leaves))
        assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_activation_checkpointing_gives_the_same_bits(device):
    leaves = [x.to(device).requires_grad_() for x in make_case(T=20, N=32).inputs]
    plain = torch.autograd.grad(wkv7(*leaves).float().square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(wkv7, *leaves, use_reentrant=False).float().square().sum(), leaves)
    checkpoint(wkv7, *leaves, use_reentrant=True).float().square().sum().backward()
    assert all(torch.equal(p, q) and torch.equal(p, x.grad) for p, q, x in zip(plain, again, leaves))


def test_tensors_that_lie_askew_are_put_right(device):
    """A gradient that is not contiguous, an input that begins between two lines of 16 bytes, inputs in another order."""
    case = make_case(T=20, N=16, states=False)
    expected = run(case, device)
    askew = torch.empty(case.inputs[0].numel() + 1, dtype=BF16, device=device)[1:].view(case.inputs[0].shape).copy_(case.inputs[0])
    leaves = [askew.requires_grad_(), *(x.to(device).requires_grad_() for x in case.inputs[1:])]
    dy = case.dy.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    y = wkv7(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    for x, name in zip((y, *gradients), ("y", *(f"d{n}" for n in NAMES))):
        assert torch.equal(x.cpu(), expected[name]), name
    turned = [x.to(device).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in case.inputs]
    y = torch.ops.rwkvlm.wkv7_cuda(*turned, None, None, False, cuda.number_of(device))[0]  # wkv7 itself refuses them
    for x, name in zip((y, *torch.autograd.grad(y, turned, dy)), ("y", *(f"d{n}" for n in NAMES))):
        assert torch.equal(x.cpu(), expected[name]), name


def test_what_reaches_the_operator_itself_is_looked_at(device):
    case = make_case(T=12, N=16)
    inputs, state, dy = [x.to(device) for x in case.inputs], case.initial_state.to(device), case.dy.to(device)
    machine = cuda.number_of(device)

    def forward(*x):
        return torch.ops.rwkvlm.wkv7_cuda_forward(*x, machine)

    def backward(dy, d_final, *x, more=()):
        return torch.ops.rwkvlm.wkv7_cuda_backward(dy, d_final, *x, machine, *more)

    _, final, saved = forward(*inputs, state, None, True)
    bounds, whole = torch.tensor([0, 4, 12], device=device), dict(enumerate(inputs))

    def with_(i, x):
        return (whole | {i: x}).values()

    for message, call in (
        ("w must have the shape", lambda: forward(*with_(1, inputs[1][:, :-1]), state, None, False)),
        ("b must be torch.bfloat16, got torch.float32", lambda: forward(*with_(5, inputs[5].float()), state, None, False)),
        ("r must be torch.bfloat16 or torch.float32", lambda: forward(*(x.double() for x in inputs), None, None, False)),
        ("r must be \\[B, T, H, N\\]", lambda: forward(*(x[0] for x in inputs), None, None, False)),
        ("r must be .*none of them 0", lambda: forward(*(x[:, :0] for x in inputs), None, None, False)),
        ("initial_state must have the shape", lambda: forward(*inputs, state[:, :1], None, False)),
        ("initial_state must be torch.float32", lambda: forward(*inputs, state.double(), None, False)),
        ("cu_seqlens must be torch.int32, got torch.int64", lambda: forward(*inputs, None, bounds, False)),
        ("a shape or dtype", lambda: forward(*(x[..., :8].contiguous() for x in inputs), None, None, False)),
        ("dy must have the shape", lambda: backward(dy[:, 1:], None, *inputs, state, None, saved, False)),
        ("dy must be torch.bfloat16", lambda: backward(dy.float(), None, *inputs, state, None, saved, False)),
        ("d_final_state must have the shape", lambda: backward(dy, final[:, :1], *inputs, state, None, saved, False)),
        ("a gradient must have the shape", lambda: backward(dy, final, *inputs, state, None, saved, False, more=(dy[:, 1:], None, None))),
    ):
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"instead of '{message}': {call()}")


def test_bounds_are_checked_where_that_needs_no_waiting(device):
    case = make_case(T=12, N=16, documents=[4, 8])
    inputs = [x.to(device) for x in case.inputs]
    with pytest.raises(ValueError, match="cu_seqlens must rise strictly from 0 to T = 12"):
        wkv7(*inputs, cu_seqlens=torch.tensor([0, 9, 7, 12]))
    y = wkv7(*inputs, cu_seqlens=torch.tensor([0, 4, 12]))  # int64, on the CPU
    assert torch.equal(y, wkv7(*inputs, cu_seqlens=case.cu_seqlens.to(device)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    case = make_case(T=300, states=True)
    run(case, torch.device("cuda", 0))  # the build, the probe
    leaves = [x.cuda().requires_grad_() for x in case.inputs]
    bounds, dy = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda"), case.dy.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(cuda.wkv7_cuda(*leaves, None, bounds)[0], leaves, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_choice_of_the_form():
    assert cuda.form_for(BF16, (9, 0)) == cuda.form_for(BF16, (8, 0)) == "chunked"
    assert cuda.form_for(FP32, (9, 0)) == cuda.form_for(BF16, (7, 5)) == "sequential"


GPU = torch.device("cuda", 0)


def test_by_name_it_runs_or_says_why_not(monkeypatch, capfd):
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(native, "cuda_available", lambda name: (False, "CUDA kernel wkv7: nvcc is not on the PATH"))
    assert package.backend_for(GPU, BF16) == package.backend_for(GPU, BF16) == "torch"
    assert capfd.readouterr().err == "wkv7: running in plain PyTorch, which is slower (CUDA kernel wkv7: nvcc is not on the PATH)\n"
    backend.set_kernel("cuda")
    with pytest.raises(UserError, match="--kernel cuda: wkv7 cannot run: CUDA kernel wkv7: nvcc is not on the PATH; ask for another"):
        package.backend_for(GPU, BF16)
    monkeypatch.setattr(native, "cuda_available", lambda name: (True, ""))
    assert package.backend_for(GPU, BF16) == "cuda"
    with pytest.raises(UserError, match="takes bfloat16 or float32, not torch.float64"):
        package.backend_for(GPU, torch.float64)
    backend.set_kernel("torch")
    assert package.backend_for(GPU, BF16) == "torch" and capfd.readouterr().err == ""
    backend.set_kernel("")
    assert package.backend_for(GPU, FP32) == "cuda"


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="need tensors on a GPU, got cpu"):
        cuda.wkv7_cuda(*make_case(T=3).inputs)


def test_plain_pytorch_agrees_in_a_case_of_this_file():
    case = make_case(T=35, dtype=FP32)
    form = lambda *x, initial_state, output_final_state, cu_seqlens: wkv7_chunked(*x, initial_state, cu_seqlens)
    assert max(errors(run(case, torch.device("cpu"), form), case.expected()).values()) < 1e-5
