"""A small RWKV-7, and its kin, over all CUDA kernels together, against plain PyTorch in float64, and compiled.

Emulated, and on a GPU where there is one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from oracles.emulated_all import registered
from oracles.emulated_wkv7 import emulated_machine
from oracles.tape import Tape
from rwkvlm import native as build
from rwkvlm.config import ModelConfig, model_config
from rwkvlm.layers import ttt
from rwkvlm.layers.packed import Packed
from rwkvlm.models import build as build_model
from rwkvlm.models import init_weights
from rwkvlm.ops import backend, cross_entropy, fused
from rwkvlm.ops import wkv7 as recurrence
from rwkvlm.ops.cross_entropy import chunked, head_cross_entropy
from rwkvlm.ops.cross_entropy import cuda as loss_cuda
from rwkvlm.ops.fused import native as fused_native
from rwkvlm.ops.rosa import native as rosa_native
from rwkvlm.ops.wkv7 import cuda as recurrence_cuda
from rwkvlm.train import graphs, selfcheck
from rwkvlm.train.compiled import compile_blocks

LIMIT = 2e-5  # relative, in fp32: features, state, the gradient of each parameter


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Where the CUDA kernels run: emulated for CPU tensors, or on the GPU."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        monkeypatch.setattr(backend, "_requested", "cuda")
        yield "cuda"
        return
    for name in ("fused", "rosa"):
        if not build.available(name)[0]:
            pytest.skip(build.available(name)[1])
    recurrent, others = request.getfixturevalue("kernels"), request.getfixturevalue("block_kernels")
    recurrent.library.emulation_reverse(0)
    others.emulation_reverse(0)
    monkeypatch.setattr(backend, "_requested", "cpu")
    assert fused_native.why_not((torch.float32,), 64) == rosa_native.why_not(torch.float32) == ""  # defines the operators
    for module in (recurrence, ttt):
        monkeypatch.setattr(module, "backend_for", lambda device, dtype: "cuda")
    machine = emulated_machine(recurrent.library)
    monkeypatch.setattr(recurrence_cuda, "machine", lambda device: machine)
    monkeypatch.setattr(fused, "_in_one", lambda *inputs: True)
    monkeypatch.setattr(cross_entropy, "_form", lambda device, dtype, n_embd: loss_cuda)
    with registered(others, "fused", "loss", "rosa"):
        yield "cpu"


def in_plain_pytorch(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "torch")
    for module in (recurrence, ttt):
        monkeypatch.setattr(module, "backend_for", lambda device, dtype: "torch")
    monkeypatch.setattr(fused, "_in_one", lambda *inputs: False)
    monkeypatch.setattr(cross_entropy, "_form", lambda device, dtype, n_embd: chunked)


SIZES = ModelConfig(n_layer=2, n_embd=64, vocab_size=97, head_size=32)
MODELS = {
    "x070": SIZES,
    "phantom": model_config("phantom", n_layer=2, n_embd=64, vocab_size=97, head_size=32, core_ratio=0.5),
    "x080": model_config("x080", n_layer=2, n_embd=64, vocab_size=97, head_size=32, rosa_bits=4, deep_embed=True),
    "hybrid": model_config("hybrid", n_layer=2, n_embd=64, vocab_size=97, head_size=32, attention_layers="1"),
}


def make_model(device, dtype, config=SIZES):
    """No gradient is zero in it."""
    model = build_model(config)
    init_weights(model, 0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.3 / p.shape[1] ** 0.5, generator=rng)
    return model.to(device, dtype), torch.randint(97, (2, 71), generator=rng).to(device)


def slopes_like(model, idx):
    """A gradient of the features: the square of what a norm gives is nearly a constant, and would have none."""
    return torch.randn(*idx.shape, model.config.n_embd, generator=torch.Generator().manual_seed(2)).to(idx.device)


def loss_and_gradients(model, idx):
    return selfcheck.with_gradients(model, head_cross_entropy(model.features(idx[:, :-1]), model.head.weight, idx[:, 1:], chunk=50))


def assert_right(got, model, idx, monkeypatch):
    """Loss and the gradient of each parameter."""
    in_plain_pytorch(monkeypatch)
    rounded = loss_and_gradients(model, idx)
    exact = loss_and_gradients(model.double(), idx)
    part, off, most = selfcheck.worst(got, rounded, exact)
    assert off < (LIMIT if got[part].dtype == torch.float32 else most / 3), part


@pytest.mark.parametrize(
    "kind, dtype",
    [("x070", torch.float32), ("x070", torch.bfloat16), ("x080", torch.float32), ("hybrid", torch.float32)],
    ids=["fp32", "bf16", "x080", "hybrid"],
)
def test_loss_and_gradients(device, kind, dtype, monkeypatch):
    """x080 in fp32 only: what is rounded to bf16 has other bits, and other symbols."""
    model, idx = make_model(device, dtype, MODELS[kind])
    assert_right(loss_and_gradients(model, idx), model, idx, monkeypatch)


@pytest.mark.parametrize(
    "kind, dtype", [("x070", torch.float32), ("x070", torch.bfloat16), ("phantom", torch.bfloat16), ("x080", torch.float32)]
)
def test_the_check_before_the_first_step_passes_with_room(device, kind, dtype, monkeypatch):
    sizes = selfcheck.small(MODELS[kind])
    model, idx = selfcheck.spread(sizes).to(device, dtype), selfcheck.tokens(sizes).to(device)
    got = selfcheck.loss_and_gradients(model, idx)
    in_plain_pytorch(monkeypatch)
    part, off, most = selfcheck.worst(got, selfcheck.loss_and_gradients(model, idx), selfcheck.loss_and_gradients(model.double(), idx))
    assert off < most / 3, part


def test_loss_and_gradients_of_a_phantom(device, monkeypatch):
    """Test-time training inside the kernels, one operator a layer; the oracle goes from segment to segment."""
    calls, operator = [], recurrence.ttt_cuda.wkv7_ttt
    monkeypatch.setattr(recurrence.ttt_cuda, "wkv7_ttt", lambda *x: calls.append(1) or operator(*x))
    model, idx = make_model(device, torch.bfloat16, MODELS["phantom"])
    got = loss_and_gradients(model, idx)
    assert len(calls) == 2
    assert_right(got, model, idx, monkeypatch)
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind, recompute", [("x070", False), ("phantom", True), ("x080", False)])
def test_blocks_in_graphs(device, kind, recompute, monkeypatch):
    """The bits of eager blocks, two passes over other tokens summed.

    Emulated kernels are on a tape: that they are operators which read and write tensors alone.
    """
    (eager, idx), (graphed, _) = (make_model(device, torch.bfloat16, MODELS[kind]) for _ in range(2))
    if device == "cpu":
        monkeypatch.setattr(graphs, "WARM_UP", 1)
    graphs.graph_blocks(graphed, 2, 70, recompute, Tape(2, recompute) if device == "cpu" else None)
    for shift in range(2):
        tokens = (idx + shift) % 97
        losses = []
        for model in (eager, graphed):
            loss = head_cross_entropy(model.features(tokens[:, :-1], grad_cp=recompute), model.head.weight, tokens[:, 1:], chunk=50)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        for (name, p), q in zip(eager.named_parameters(), graphed.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


def test_packed_documents_and_states(device, monkeypatch):
    """Features and every gradient of documents in a row; the state after some tokens."""
    model, idx = make_model(device, torch.float32)
    bounds = torch.tensor([0, 1, 3, 20, 36, 71], dtype=torch.int32, device=device)
    leaves, slopes = [p for p in model.parameters() if p is not model.head.weight], slopes_like(model, idx)
    packed = Packed(bounds, torch.tensor([i for i in range(71) if i + 1 not in bounds.tolist()], device=device), bounds.cpu().numpy())

    def results():
        x = model.features(idx[:1], packed=packed)[0, packed.tokens]
        _, state = model.features(idx[:, :40], return_state=True)
        rest, state = model.features(idx[:, 40:], state, return_state=True)
        gradients = torch.autograd.grad([x, rest], leaves, [slopes[0, : len(x)].to(x.dtype), slopes[:, : rest.shape[1]].to(x.dtype)])
        return [t.double() for t in (x, rest, *(part for block in state for part in block), *gradients)]

    got = results()
    in_plain_pytorch(monkeypatch)
    model.double()
    for ours, right in zip(got, results(), strict=True):
        assert (ours - right).norm() <= LIMIT * right.norm()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(device, compiler):
    """Both blocks with every operator: the same as eagerly."""
    torch._dynamo.reset()
    model, idx = make_model(device, torch.float32)
    leaves, slopes = [p for p in model.parameters() if p is not model.head.weight], slopes_like(model, idx)
    both = []
    for features in (model.features, torch.compile(model.features, fullgraph=True, backend=compiler)):
        x = features(idx)
        both.append([x.detach(), *torch.autograd.grad(x, leaves, slopes)])
    for compiled, eager in zip(*reversed(both), strict=True):
        assert (compiled - eager).norm() <= 1e-5 * eager.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x070", "x080"])
@pytest.mark.parametrize("graphs", [False, True])
def test_blocks_compiled_as_for_training(device, graphs, kind):
    """Two graphs for four blocks; with CUDA graphs the passes after the first ones are replays, each of which must see its own tokens."""
    if device == "cpu" and graphs:
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    counters.clear()
    model, idx = make_model(device, torch.float32, replace(MODELS[kind], n_layer=4))
    batches = [(idx + shift) % 97 for shift in range(5)]
    eager = [loss_and_gradients(model, idx) for idx in batches]
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):  # what compile_blocks sets ends here
        compile_blocks(model, graphs=graphs)
        for idx, want in zip(batches, eager):
            torch.compiler.cudagraph_mark_step_begin()
            for (name, got), exact in zip(loss_and_gradients(model, idx).items(), want.values(), strict=True):
                assert (got - exact).norm() <= LIMIT * exact.norm(), name
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
