"""RWKV-7 files in both directions: the PyPI package `rwkv` gets our logits from our file, and we its from one in the released layout."""

import importlib

import pytest
import torch

from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.config import ModelConfig, model_config
from rwkvlm.infer.engine import load_engine
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


@pytest.mark.parametrize("model_type, says", [("phantom", "phantom_config"), ("x080", "rosa_bits")])
def test_what_is_no_rwkv7_is_not_read_as_one(official, tmp_path, model_type, says):
    """It has all names of an RWKV-7, and more. Files from before the name of what describes them changed are read as before."""
    own = {"core_ratio": 1.0} if model_type == "phantom" else {}
    model = build(model_config(model_type, n_layer=2, n_embd=64, vocab_size=50, **own))
    init_weights(model, 1)
    save_weights(tmp_path / "rwkv-0.pth", model.state_dict())
    with pytest.raises(ValueError, match=says):
        official(str(tmp_path / "rwkv-0"), "cpu fp32")
    tensors = load_weights(tmp_path / "rwkv-0.pth")
    assert says in tensors and read_config(tensors) == model.config
    torch.save(tensors, tmp_path / "older.pth")
    assert load_weights(tmp_path / "older.pth").keys() == tensors.keys()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file with the names, shapes and order of the released ones, made without our model.

    No v0, v1, v2 in block 0, and ranks (of 2.9B) that our trainer would not choose.
    """
    g, C, H = torch.Generator().manual_seed(21), 128, 2
    normal = lambda *shape: torch.randn(*shape, generator=g)
    ranks = dict(w=96, a=96, g=320, v=64)
    tensors = {"emb.weight": 0.1 * normal(400, C)}
    for i in range(3):
        at = f"blocks.{i}."
        for norm in ("ln1", "ln2", *["ln0"] * (i == 0)):
            tensors |= {f"{at}{norm}.weight": 1 + 0.1 * normal(C), f"{at}{norm}.bias": 0.1 * normal(C)}
        tensors |= {f"{at}att.x_{x}": torch.rand(1, 1, C, generator=g) for x in "rwkvag"}
        tensors |= {f"{at}att.w0": normal(1, 1, C) - 3, f"{at}att.r_k": 0.1 * normal(H, 64)}
        for x, parts in (("w", "12"), ("a", "120"), ("g", "12"), ("v", "210" if i else "")):
            shapes = {"0": (1, 1, C), "1": (C, ranks[x]), "2": (ranks[x], C)}
            tensors |= {f"{at}att.{x}{part}": normal(*shapes[part]) / shapes[part][0] ** 0.5 for part in parts}
        tensors |= {f"{at}att.k_k": 0.8 + 0.1 * normal(1, 1, C), f"{at}att.k_a": 1 + 0.1 * normal(1, 1, C)}
        tensors |= {f"{at}att.{name}.weight": normal(C, C) / C**0.5 for name in ("receptance", "key", "value", "output")}
        tensors |= {
            f"{at}att.ln_x.weight": 1 + 0.1 * normal(C),
            f"{at}att.ln_x.bias": 0.1 * normal(C),
            f"{at}ffn.x_k": torch.rand(1, 1, C, generator=g),
        }
        tensors |= {f"{at}ffn.key.weight": normal(4 * C, C) / C**0.5, f"{at}ffn.value.weight": normal(C, 4 * C) / C}
    tensors |= {"ln_out.weight": 1 + 0.1 * normal(C), "ln_out.bias": 0.1 * normal(C), "head.weight": normal(400, C) / C**0.5}
    path = tmp_path_factory.mktemp("released") / "rwkv7-released.pth"
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    return path


def test_a_released_file_as_it_is(official, released):
    tokens = torch.randint(400, (24,), generator=torch.Generator().manual_seed(22)).tolist()
    with torch.no_grad():
        ours = load_engine(released, device="cpu", dtype=torch.float32).model(torch.tensor([tokens]))[0]
        theirs, _ = official(str(released.with_suffix("")), "cpu fp32").forward(tokens, None, full_output=True)
    assert ours.std() > 0.1, "a trivial output would prove nothing"
    assert (ours - theirs).abs().max() < 2e-4
