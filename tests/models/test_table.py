"""Initial values: every row of the official table, entry by entry where it is exact, by its statistics where it is random."""

import math

import pytest
import torch

from rwkvlm.config import ModelConfig, UserError
from rwkvlm.models import build, count_parameters, init_weights, param_groups

CONFIG = ModelConfig(n_layer=3, n_embd=128, vocab_size=300, head_size=64)
LARGE = {"emb.weight", "head.weight"} | {
    f"blocks.{i}.{m}.weight" for i in range(3) for m in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
}


@pytest.fixture(scope="module")
def weights():
    model = build(CONFIG)
    init_weights(model, 7)
    return model.state_dict()


def vectors():
    """The official loops, over plain Python numbers."""
    C, N, L = CONFIG.n_embd, CONFIG.head_size, CONFIG.n_layer
    for layer in range(L):
        r0, r1 = layer / (L - 1), 1 - layer / L
        lin = [n / (C - 1) - 0.5 for n in range(C)]
        z = [((n % N) - (N - 1) / 2) / ((N - 1) / 2) for n in range(C)]
        zig = [v * abs(v) for v in z]
        for letter, power in dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2).items():
            yield f"blocks.{layer}.att.x_{letter}", [1 - (n / C) ** (power * r1) for n in range(C)]
        yield f"blocks.{layer}.att.w0", [-6 + 6 * (n / (C - 1)) ** (1 + r0**0.3) + 0.5 + 2.5 * zig[n] for n in range(C)]
        yield f"blocks.{layer}.att.a0", [-0.19 + 0.3 * zig[n] + 0.4 * lin[n] for n in range(C)]
        yield f"blocks.{layer}.att.v0", [0.73 - 0.4 * lin[n] for n in range(C)]
        yield f"blocks.{layer}.att.k_k", [0.71 - 0.1 * lin[n] for n in range(C)]
        yield f"blocks.{layer}.att.k_a", [1.02] * C
        yield f"blocks.{layer}.att.r_k", [-0.04] * C
        yield f"blocks.{layer}.att.ln_x.weight", [((1 + layer) / L) ** 0.7] * C
        yield f"blocks.{layer}.att.ln_x.bias", [0.0] * C
        yield f"blocks.{layer}.ffn.x_k", [1 - (n / C) ** (r1**4) for n in range(C)]
        for norm in ["ln0"] * (layer == 0) + ["ln1", "ln2"]:
            yield f"blocks.{layer}.{norm}.weight", [1.0] * C
            yield f"blocks.{layer}.{norm}.bias", [0.0] * C
    yield "ln_out.weight", [1.0] * C
    yield "ln_out.bias", [0.0] * C


EXACT = dict(vectors())
RANDOM_GAIN = {
    **{f"blocks.{i}.att.{m}.weight": 1.0 for i in range(3) for m in ("receptance", "value")},
    **{f"blocks.{i}.att.key.weight": 0.1 for i in range(3)},
    **{f"blocks.{i}.ffn.key.weight": 1.0 for i in range(3)},
    **{f"blocks.{i}.att.{c}2": 0.1 for i in range(3) for c in "wavg"},
    "head.weight": 0.5 * math.sqrt(300 / 128),
}
ZERO = {f"blocks.{i}.{n}" for i in range(3) for n in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1")}


def test_every_parameter_is_covered(weights):
    assert set(weights) == set(EXACT) | set(RANDOM_GAIN) | ZERO | {"emb.weight"}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_entries(weights, name):
    want = torch.tensor(EXACT[name], dtype=torch.float64)
    assert torch.allclose(weights[name].flatten().double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(RANDOM_GAIN))
def test_orthogonal(weights, name):
    w = weights[name].double()
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    want = RANDOM_GAIN[name] ** 2 * torch.eye(len(gram), dtype=torch.float64)
    assert torch.allclose(gram, want, atol=1e-5)
    assert w.mean().abs() < 4 * w.std() / w.numel() ** 0.5, "an orthogonal matrix drawn at random has mean near 0"


def test_zeros_and_embedding(weights):
    for name in ZERO:
        assert not weights[name].any(), name
    emb = weights["emb.weight"]
    assert -1e-4 <= emb.min() < -0.99e-4 and 0.99e-4 < emb.max() <= 1e-4
    assert abs(emb.std().item() - 2e-4 / 12**0.5) < 1e-6


def test_seed_decides(weights):
    again, other = build(CONFIG), build(CONFIG)
    init_weights(again, 7)
    init_weights(other, 8)
    assert all(torch.equal(t, weights[n]) for n, t in again.state_dict().items())
    for name in RANDOM_GAIN:
        assert not torch.equal(other.state_dict()[name], weights[name]), name
    a, b = weights["blocks.1.att.receptance.weight"], weights["blocks.2.att.receptance.weight"]
    assert not torch.equal(a, b), "two blocks must not share their random values"


def test_one_layer_and_a_narrow_vocabulary():
    model = build(ModelConfig(n_layer=1, n_embd=64, vocab_size=20, head_size=16))
    init_weights(model, 0)
    w = model.state_dict()
    assert all(torch.isfinite(t).all() for t in w.values())
    gram = w["head.weight"].double() @ w["head.weight"].double().T
    assert torch.allclose(gram, 0.25 * torch.eye(20, dtype=torch.float64), atol=1e-5)


def test_groups():
    model = build(CONFIG)
    groups = param_groups(model, 0.1)
    found = {}
    for group in groups:
        for name, param in zip(group["names"], group["params"]):
            assert param is dict(model.named_parameters())[name]
            found[name] = (group["weight_decay"], group["my_lr_scale"])
    trained = {n for n in build(CONFIG).state_dict() if n not in {f"blocks.0.att.v{i}" for i in range(3)}}
    assert set(found) == trained
    for name, (decay, lr) in found.items():
        assert decay == (0.1 if name in LARGE else 0.0), name
        assert lr == (2.0 if name.endswith("att.w0") else 1.0), name


@pytest.mark.parametrize(
    "ranks,count", [({}, 453_980_160), ({"rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128}, 450_834_432)], ids=["table", "released"]
)
def test_published_parameter_counts(ranks, count):
    with torch.device("meta"):
        model = build(ModelConfig(n_layer=24, n_embd=1024, vocab_size=65536, **ranks))
    assert count_parameters(model) == count


@pytest.mark.parametrize(
    "n_embd,ranks", [(768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2048, (128, 128, 64, 224)), (256, (32, 32, 32, 64))]
)
def test_low_ranks(n_embd, ranks):
    c = ModelConfig(n_embd=n_embd)
    assert (c.rank_w, c.rank_a, c.rank_v, c.rank_g) == ranks


@pytest.mark.parametrize(
    "bad,word",
    [
        ({"n_layer": 0}, "n_layer"),
        ({"head_size": 48}, "head_size"),
        ({"n_embd": 100}, "n_embd"),
        ({"model_type": "x060"}, "my_testing"),
        ({"rank_w": -1}, "rank_w"),
    ],
)
def test_bad_sizes_are_named(bad, word):
    with pytest.raises(UserError, match=word) as error:
        ModelConfig(**bad)
    assert "\n" not in str(error.value)
