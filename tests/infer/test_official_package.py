"""What we save, the ecosystem loads: the PyPI package `rwkv` reads our file and computes our logits."""

import importlib

import pytest
import torch

from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.config import ModelConfig
from rwkvlm.models import build, init_weights, read_config


@pytest.fixture(scope="module")
def official():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        precision = torch.get_float32_matmul_precision()
        module = importlib.import_module("rwkv.model")
        torch.set_float32_matmul_precision(precision)  # the package allows TF32 for the whole process
        yield module.RWKV_x070


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of ours whose weights are away from their initial values (where the output would be trivial)."""
    config = ModelConfig(n_layer=3, n_embd=128, vocab_size=400, head_size=64)
    model = build(config)
    init_weights(model, 11)
    g = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    path = tmp_path_factory.mktemp("official") / "rwkv-0.pth"
    save_weights(path, model.state_dict())
    return path


def test_logits_at_every_position(official, saved):
    tensors = load_weights(saved)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    model = build(read_config(tensors))
    load_into(model, tensors)
    tokens = torch.randint(400, (48,), generator=torch.Generator().manual_seed(13)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([tokens]))[0]
        theirs = official(str(saved.with_suffix("")), "cpu fp32")
        whole, _ = theirs.forward(tokens, None, full_output=True)
        state, steps = None, []
        for token in tokens:
            step, state = theirs.forward([token], state)
            steps.append(step)
    assert ours.std() > 0.1, "a trivial output would prove nothing"
    assert (ours - whole).abs().max() < 2e-4
    assert (ours - torch.stack(steps)).abs().max() < 2e-4
