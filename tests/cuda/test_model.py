"""Loss and every gradient of a small RWKV-7 over all CUDA kernels together, against plain PyTorch in float64; emulated, and on a GPU where there is one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rwkvlm import native as build
from rwkvlm.config import ModelConfig
from rwkvlm.models import build as build_model, init_weights
from rwkvlm.ops import backend, cross_entropy, wkv7 as recurrence
from rwkvlm.ops.cross_entropy import cuda as loss_cuda, head_cross_entropy
from rwkvlm.ops.fused import cuda as fused_cuda, native as fused_native
from rwkvlm.ops.wkv7 import cuda as recurrence_cuda

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # relative: the gradient as a whole


def loss_and_gradient(model, idx):
    loss = head_cross_entropy(model.features(idx[:, :-1]), model.head.weight, idx[:, 1:], chunk=50)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.double().flatten() for g in gradients])


@pytest.mark.parametrize("where", ["emulated", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients(where, dtype, request, monkeypatch):
    device = "cuda" if where == "gpu" else "cpu"
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if not build.available("fused")[0]:
        pytest.skip(build.available("fused")[1])
    model = build_model(ModelConfig(n_layer=2, n_embd=64, vocab_size=97, head_size=32))
    init_weights(model, 0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.3 / p.shape[1] ** 0.5, generator=rng)
    model.to(device, dtype)
    idx = torch.randint(97, (2, 71), generator=rng).to(device)

    with contextlib.ExitStack() as stack:
        if where == "gpu":
            monkeypatch.setattr(backend, "_requested", "cuda")
            got = loss_and_gradient(model, idx)
        else:
            wkv7_kernels, others = request.getfixturevalue("kernels"), request.getfixturevalue("block_kernels")
            monkeypatch.setattr(backend, "_requested", "cpu")
            assert fused_native.why_not((dtype,), 64) == ""  # defines the operators
            patch = stack.enter_context(monkeypatch.context())
            patch.setattr(recurrence, "backend_for", lambda device, dtype: "cuda")
            patch.setattr(recurrence_cuda, "machine", lambda device: recurrence_cuda.Machine(wkv7_kernels.library, (9, 0), 132, lambda: contextlib.nullcontext(None)))
            patch.setattr(cross_entropy, "_form", lambda device, dtype, n_embd: loss_cuda)
            registration = stack.enter_context(torch.library._scoped_library("rwkvlm", "IMPL"))
            fused_cuda.register(registration, others, "CPU")
            loss_cuda.register(registration, others, "CPU")
            got = loss_and_gradient(model, idx)
    monkeypatch.setattr(backend, "_requested", "torch")
    want = loss_and_gradient(model.double(), idx)
    assert abs(got[0] / want[0] - 1) < LIMIT[dtype] / 10
    assert ((got[1] - want[1]).norm() / want[1].norm()).item() < LIMIT[dtype]
