"""RWKV-7 against a float64 model written from the formulas, and every mode against every other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import x070
from rwkvlm.config import ModelConfig
from rwkvlm.models import build, init_weights
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.ops.fused import native

SHAPES = [
    ModelConfig(n_layer=2, n_embd=32, vocab_size=37, head_size=16),
    ModelConfig(n_layer=1, n_embd=32, vocab_size=29, head_size=32),
    ModelConfig(n_layer=3, n_embd=64, vocab_size=50, head_size=64, dim_ffn=96, rank_w=8, rank_a=4, rank_v=6, rank_g=10),
    ModelConfig(n_layer=2, n_embd=128, vocab_size=50, head_size=128),
]


def shape_id(c):
    return f"L{c.n_layer}-D{c.n_embd}-N{c.head_size}"


def alive(config, dtype, seed=0):
    """A model away from its initial values, where outputs are zero and many gradients vanish."""
    model = build(config).to(dtype)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[-1] ** 0.5)
    return model


def tokens(config, batch, length, seed=2):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


class Additions(TorchDispatchMode):
    """Counts those of whole tensors."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += function.overloadpacket is torch.ops.aten.add and out.shape == self.shape
        return out


@pytest.mark.skipif(bool(native.why_not((torch.float32,), 64)), reason="plain PyTorch adds them up one by one")
def test_kernels_add_up_the_gradients_of_what_they_pass_on():
    """What is left to autograd.

    Block 0's value, which all others read; of each other block the input of the value residual's rate; on a CPU, where a norm
    and what is around it are several operators, the residual stream twice a block.
    """
    layers = 4
    model = alive(ModelConfig(n_layer=layers, n_embd=64, vocab_size=37, head_size=32), torch.float32)
    features = model.features(tokens(model.config, 2, 20))
    with Additions(features.shape) as additions:
        features.square().sum().backward()
    assert additions.count == 1 + (layers - 1) + 2 * layers


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("config", SHAPES, ids=shape_id)
def test_forward_loss_and_every_gradient(config, dtype, tolerance):
    model = alive(config, dtype)
    data = tokens(config, 2, 20)
    idx, targets = data[:, :-1], data[:, 1:]
    params = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}

    want = x070.logits(params, idx, config.head_size)
    want_loss, logit_grad = x070.loss_and_logit_gradient(want, targets)
    unused = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    names = [n for n in params if n not in unused]
    want_grads = torch.autograd.grad(want, [params[n] for n in names], logit_grad)

    assert relative(model(idx).detach(), want.detach()) < tolerance
    loss = head_cross_entropy(model.features(idx), model.head.weight, targets)
    assert abs(loss.item() - want_loss.item()) < tolerance * abs(want_loss.item())
    loss.backward()
    got = dict(model.named_parameters())
    assert set(got) == set(names)
    for name, grad in zip(names, want_grads):
        assert grad.abs().max() > 0, name
        assert relative(got[name].grad, grad) < 10 * tolerance, name


@pytest.mark.parametrize("config", SHAPES, ids=shape_id)
@pytest.mark.parametrize("pieces", [[1] * 37, [16, 16, 5], [3, 1, 33], [36, 1]], ids=str)
def test_recurrent_equals_parallel(config, pieces):
    model = alive(config, torch.float32).eval()
    idx = tokens(config, 3, 37)
    with torch.no_grad():
        whole, end = model(idx, return_state=True)
        state, parts = model.init_state(3), []
        for piece in idx.split(pieces, dim=1):
            part, state = model(piece, state, return_state=True)
            parts.append(part)
    assert relative(torch.cat(parts, 1), whole.double()) < 1e-4
    for got, want in zip(state, end):
        for a, b in zip(got, want):
            assert relative(a, b.double()) < 1e-4


def test_state_of_one_sequence_does_not_touch_another():
    config = SHAPES[0]
    model = alive(config, torch.float32).eval()
    a, b = tokens(config, 1, 9, seed=5), tokens(config, 1, 9, seed=6)
    with torch.no_grad():
        together = model(torch.cat([a, b]))
        assert relative(together[:1], model(a).double()) < 1e-5
        assert relative(together[1:], model(b).double()) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    config = SHAPES[2]
    idx = tokens(config, 2, 18)
    grads = []
    for grad_cp in (False, True):
        model = alive(config, torch.float32)
        model.features(idx, grad_cp=grad_cp).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 40
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_bf16_runs_and_stays_near():
    config = SHAPES[2]
    model = alive(config, torch.float32)
    idx = tokens(config, 2, 33)
    with torch.no_grad():
        want = model(idx)
        got = model.bfloat16()(idx)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).pow(2).mean() / want.pow(2).mean()).sqrt() < 0.05
