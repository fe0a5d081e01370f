"""Test-time training inside the CUDA kernels as a torch operator, and StateTTT over it.

Emulated on the host, and on this machine's GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracles.emulated_ttt import TttCase, make_ttt_case
from oracles.emulated_wkv7 import Shape, StepsOfTtt, emulated_machine, errors, prototypes
from rwkvlm.config import model_config
from rwkvlm.layers import ttt as layer
from rwkvlm.models import build, init_weights
from rwkvlm.ops.wkv7 import cuda, ttt_cuda
from rwkvlm.ops.wkv7.arguments import NAMES

BF16 = torch.bfloat16
# test_ttt.py has them by result
LIMITS = {"d_rate": 1e-2} | dict.fromkeys(["y", "final_state", *(f"d{n}" for n in NAMES), "d_initial_state", "d_head"], 6.8e-3)


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Where the operator runs: CPU tensors over the kernels in emulation, or the GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    monkeypatch.setattr(layer, "backend_for", lambda device, dtype: "cuda")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield torch.device("cuda", 0)
    else:
        kernels = request.getfixturevalue("kernels")
        kernels.library.emulation_reverse(0)
        machine = emulated_machine(kernels.library)
        monkeypatch.setattr(cuda, "machine", lambda device: machine)
        yield torch.device("cpu")
    torch.use_deterministic_algorithms(False)


def arguments(given: TttCase, device: torch.device, gradients: bool = True) -> list:
    """Of the operator's forward, without `save` and the machine; on a GPU the first time."""
    ttt, case = given.ttt, given.case
    rate = (2 * torch.sigmoid(ttt.rate.detach()) / ttt.config.ttt_chunk).float()
    head = torch.stack([ttt.w1.detach(), ttt.w2.detach().mT]).float() if ttt.has_head else None
    leaves = [None if x is None else x.to(device).requires_grad_(gradients) for x in (*case.inputs, case.initial_state, rate, head)]
    return [*leaves, ttt.rows, ttt.config.ttt_chunk, ttt.config.ttt_target == "stored"]


def detached(asked: list) -> list:
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in asked]


@pytest.mark.parametrize(
    "options",
    [
        dict(T=130),
        dict(T=128, N=16, rows=8, H=1),
        dict(T=140, N=32, rows=8, B=2, head=False, target="value"),
        dict(T=70, N=128, rows=32, segment=32, states=False),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_float64(device, options):
    given = make_ttt_case(**options)
    asked = arguments(given, device)
    saved = torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*detached(asked), True, cuda.number_of(device))[2]
    y, final_state = torch.ops.rwkvlm.wkv7_ttt_cuda(*asked, False, cuda.number_of(device))
    leaves, B, T, H = [x for x in asked[:9] if x is not None], *y.shape[:3]
    outputs, slopes = [y], [given.case.dy.to(device)]
    if given.case.d_final_state is not None:
        outputs, slopes = [y, final_state], [*slopes, given.case.d_final_state.to(device)]
    found = torch.autograd.grad(outputs, leaves, slopes)
    masks = saved[-4 * B * T * H :].view(torch.int32).view(B, T, H).cpu() if given.ttt.has_head else None
    expected = given.expected(masks)
    expected["d_rate"] = expected["d_rate"].sum((0, 1))
    names = ["y", "final_state", *(f"d{n}" for n in NAMES), *(["d_initial_state"] if asked[6] is not None else []), "d_rate", "d_head"]
    worst = errors({name: x.detach().cpu() for name, x in zip(names, [y, final_state, *found])}, expected)
    assert all(x < LIMITS[name] for name, x in worst.items()), worst


def test_rates_and_head_may_be_trained_alone(device):
    asked, found = arguments(make_ttt_case(T=130, N=16, rows=8, H=1), device), []
    for some in (
        asked,
        [*detached(asked[:7]), *asked[7:]],
        [*detached(asked[:8]), *asked[8:]],
        [*detached(asked[:7]), asked[7], *detached(asked[8:])],
    ):
        y = torch.ops.rwkvlm.wkv7_ttt_cuda(*some, False, cuda.number_of(device))[0]
        gradients = torch.autograd.grad(y.float().square().sum(), [x for x in some[7:9] if x.requires_grad])
        found.append(dict(zip([i for i in (7, 8) if some[i].requires_grad], gradients)))
    assert all(torch.equal(x, found[0][i]) for one in found for i, x in one.items()) and [*map(len, found)] == [2, 2, 1, 1]


def test_scans_in_segments_are_not_asked_for(device):
    """As they are without test-time training, by few heads of a long text."""
    asked, found = detached(arguments(make_ttt_case(T=130, N=16, rows=8, H=1), device)), []
    try:
        for chunks in (0, 1):
            cuda.ask_for_segments(chunks)
            found.append(torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*asked, False, cuda.number_of(device)))
    finally:
        cuda.ask_for_segments(-1)
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_opcheck(device):
    for options in (dict(T=70), dict(T=130, states=False, head=False, target="value")):
        given = make_ttt_case(N=16, rows=8, H=1, **options)
        asked, machine = arguments(given, device, gradients=False), cuda.number_of(device)
        for save in (True, False):
            torch.library.opcheck(torch.ops.rwkvlm.wkv7_ttt_cuda_forward, (*asked, save, machine))
        _, final_state, saved = torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*asked, True, machine)
        for slope in (None, torch.randn_like(final_state)):
            wanted = (given.case.dy.to(device), slope, *asked[:6], *asked[7:9], saved, *asked[9:], slope is not None, machine)
            torch.library.opcheck(torch.ops.rwkvlm.wkv7_ttt_cuda_backward, wanted)
        torch.library.opcheck(torch.ops.rwkvlm.wkv7_ttt_cuda_backward, (*wanted, asked[0], None, asked[2]))


def test_a_second_derivative_is_an_error(device):
    asked = arguments(make_ttt_case(T=70, N=16, rows=8, H=1), device)
    y = torch.ops.rwkvlm.wkv7_ttt_cuda(*asked, False, cuda.number_of(device))[0]
    (slope,) = torch.autograd.grad(y.square().sum(), asked[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


def test_the_sizes_told_to_fake_tensors_are_the_librarys(device):
    library = prototypes(cuda.machine(device).library)
    for B, T, H, N, rows, hidden, segment in ((2, 200, 3, 64, 16, 4, 64), (1, 64, 1, 16, 8, 2, 64), (2, 100, 1, 128, 128, 0, 32)):
        sizes = Shape(B, T, H, N, 0, None, 0), StepsOfTtt(rows, hidden, segment, 1, None, None)
        assert library.wkv7_ttt_saved_bytes(*sizes) == cuda.ttt_saved_bytes(B, T, H, N, rows, hidden, segment)


def test_a_backward_needs_what_the_forward_has_saved(device):
    given = make_ttt_case(T=70, N=16, rows=8, H=1)
    asked = arguments(given, device, gradients=False)
    machine = cuda.number_of(device)
    y, _, saved = torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*asked, False, machine)
    with pytest.raises(RuntimeError, match="what a forward with save has left"):
        torch.ops.rwkvlm.wkv7_ttt_cuda_backward(y, None, *asked[:6], *asked[7:9], saved, *asked[9:], False, machine)


def test_what_the_kernels_do_not_take_is_an_error(device):
    asked = arguments(make_ttt_case(T=70, N=16, rows=8, H=1), device, gradients=False)
    rate, head = asked[7:9]
    for place, other, message in (
        (7, rate.double(), "rate must be torch.float32, got torch.float64"),
        (7, torch.cat([rate, rate]), "rate must have the shape \\[1\\], got \\[2\\]"),
        (8, head[:, :, :4], "head must have the shape"),
        (8, head[0], "head must be \\[2, hidden, 8\\]"),
        (8, head.repeat(1, 40, 1), "with 1 to 32 hidden units"),
        (9, 12, "rows from 8 to 16 in steps of 8"),
        (9, 24, "rows from 8 to 16 in steps of 8"),
        (10, 0, "segments of a multiple of 64 tokens"),
        (10, 70, "segments of a multiple of 64 tokens"),
        (10, 2**32 + 64, "below 2\\^31"),  # the kernels' int32 would make 64 of it
        (1, asked[1][:, 1:], "w must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ttt_cuda.wkv7_ttt(*asked[:place], other, *asked[place + 1 :])
    with pytest.raises(ValueError, match="expected bfloat16 and a GPU with"):
        torch.ops.rwkvlm.wkv7_ttt_cuda_forward(*(x.float() for x in asked[:6]), *asked[6:], False, cuda.number_of(device))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_one_call_of_the_operator(device, monkeypatch, head, training):
    """Also from a state that is not zero; with the loop's results, whose kernel runs segment by segment."""
    given = make_ttt_case(T=150, N=32, rows=8, head=head)
    ttt = given.ttt.float().to(device)
    leaves = [x.to(device).requires_grad_() for x in (*given.case.inputs, given.case.initial_state)]
    looped = []
    monkeypatch.setattr(layer, "wkv7", lambda *x, **y: looped.append(1) or (lambda y, S: (y, S))(*cuda.wkv7_cuda(*x, y["initial_state"])))

    def run():
        with torch.set_grad_enabled(training):
            y = ttt(*leaves[:6], initial_state=ttt.init_state(leaves[6]))
        return [y.detach(), *(torch.autograd.grad(y, [*leaves, *ttt.parameters()], given.case.dy.to(device)) if training else ())]

    got = run()
    assert not looped
    monkeypatch.setattr(type(ttt), "_at_once", lambda *_: None)
    for ours, theirs in zip(got, run(), strict=True):
        assert (ours - theirs).float().norm() < 0.03 * theirs.float().norm()  # a hidden unit may change its side of zero
    assert len(looped) == 3


def test_checkpointing_and_repeated_runs_give_the_same_bits(device):
    given = make_ttt_case(T=130, N=16, rows=8)
    asked = arguments(given, device)
    leaves = [x for x in asked[:9] if x is not None]
    results = []
    for form in (ttt_cuda.wkv7_ttt, ttt_cuda.wkv7_ttt, lambda *x: checkpoint(ttt_cuda.wkv7_ttt, *x, use_reentrant=False)):
        y, state = form(*asked)
        results.append([y, state, *torch.autograd.grad(y.float().square().sum() + state.sum(), leaves)])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*results, strict=True))


def test_what_is_passed_on_has_its_gradients_added_up(device):
    given = make_ttt_case(T=130, N=16, rows=8)
    results = []
    for pass_on in (True, False):
        asked = arguments(given, device)
        leaves = [x for x in asked[:9] if x is not None]
        y, state, *passed = ttt_cuda.wkv7_ttt(*asked, pass_on)
        r, k, v = passed if pass_on else (asked[0], asked[2], asked[3])
        loss = (y * given.case.dy.to(device)).float().sum() + state.sum() + (r.float() ** 2 + 2 * k.float() ** 2 - v.float() ** 2).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        # r, k, v: rounded once
        assert torch.equal(ours, theirs) or i in (0, 2, 3) and (ours - theirs).float().norm() < 4e-3 * theirs.float().norm(), i


def test_a_phantom_compiles_into_one_graph(device, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("rwkvlm.ops.wkv7.backend_for", lambda device, dtype: "cuda")
    model = build(model_config("phantom", n_layer=1, n_embd=64, vocab_size=64, head_size=32, core_ratio=1.0))
    init_weights(model, 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the output matrices begin as zeros
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    block, x = model.blocks[0].to(device, BF16), torch.randn(1, 70, 64, generator=g).to(device, BF16).requires_grad_()
    leaves, both = [x, *block.att.ttt.parameters(), block.att.key.weight], []
    for form in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = form(x, None)[0]
        both.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for ours, theirs in zip(*both, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    given = make_ttt_case(T=300)
    asked, dy = arguments(given, torch.device("cuda", 0)), given.case.dy.cuda()
    torch.autograd.grad(ttt_cuda.wkv7_ttt(*asked)[0], asked[:9], dy)  # the build, the probe
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(ttt_cuda.wkv7_ttt(*asked)[0], asked[:9], dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
