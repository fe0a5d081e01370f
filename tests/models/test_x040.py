"""RWKV-4 against a float64 model written from the formulas; its table and groups are the official ones; its files; all modes agree."""

import math

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

import rwkv7_ttt_phantom
from oracles import x040, x070
from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.compress.run import compress_file
from rwkvlm.config import ModelConfig, TrainConfig, UserError
from rwkvlm.models import build, count_parameters, init_weights, param_groups, read_config
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train.flops import flops_per_token
from rwkvlm.train.optimizer import make_optimizer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def sizes(**changes):
    return ModelConfig(**dict(model_type="x040", n_layer=2, n_embd=32, vocab_size=37) | changes)


SHAPES = [sizes(), sizes(n_layer=1, n_embd=64), sizes(n_layer=3, dim_ffn=96)]
MATRICES = ("att.key", "att.value", "att.receptance", "att.output", "ffn.key", "ffn.receptance", "ffn.value")


def alive(config, dtype=torch.float32, seed=0):
    """A model away from its initial values, where outputs are zero and many gradients vanish."""
    model = build(config).to(dtype)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[-1] ** (0.5 * (p.dim() == 2)))
    return model


def tokens(config, batch, length, seed=2):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"L{c.n_layer}-D{c.n_embd}")
def test_forward_loss_and_every_gradient(config, dtype, tolerance):
    model = alive(config, dtype)
    data = tokens(config, 2, 21)
    idx, targets = data[:, :-1], data[:, 1:]
    params = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
    want = x040.logits(params, idx)
    want_loss, logit_grad = x070.loss_and_logit_gradient(want, targets)
    want_grads = torch.autograd.grad(want, list(params.values()), logit_grad)

    assert relative(model(idx).detach(), want.detach()) < tolerance
    loss = head_cross_entropy(model.features(idx), model.head.weight, targets)
    assert abs(loss.item() - want_loss.item()) < tolerance * abs(want_loss.item())
    loss.backward()
    got = dict(model.named_parameters())
    assert set(got) == set(params)
    for name, grad in zip(params, want_grads):
        assert grad.abs().max() > 0, name
        assert relative(got[name].grad, grad) < 10 * tolerance, name


def test_the_state_before_the_first_token_is_empty_for_any_key():
    """Also where e^k is 0 beside 1: what is empty has no weight at all."""
    model = alive(SHAPES[0]).eval()
    idx = tokens(SHAPES[0], 2, 9)
    with torch.no_grad():
        for block in model.blocks:
            block.att.key.weight.mul_(300)
        assert torch.equal(model(idx, model.init_state(2), return_state=True)[0], model(idx)) and model(idx).isfinite().all()


def test_first_step_with_its_groups_equals_the_formulas():
    settings = TrainConfig(lr_init=1e-2, weight_decay=0.1, precision="fp32", my_testing="x040")
    model = alive(SHAPES[0], seed=1)
    data = tokens(SHAPES[0], 2, 17)
    params = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    logits = x040.logits(params, data[:, :-1])
    grads = dict(zip(params, torch.autograd.grad(logits, list(params.values()), x070.loss_and_logit_gradient(logits, data[:, 1:])[1])))
    rates = {n: 2 if "time_decay" in n else 3 if "time_first" in n else 1 for n in params}
    want = {}
    for n, p in params.items():  # AdamW's first step is the sign of the gradient
        decay = 0.1 if p.dim() == 2 else 0.0
        want[n] = p.detach() * (1 - 1e-2 * decay) - 1e-2 * rates[n] * grads[n].sign()

    optimizer = make_optimizer(model, settings, SingleDeviceStrategy(torch.device("cpu")))
    head_cross_entropy(model.features(data[:, :-1].contiguous()), model.head.weight, data[:, 1:].contiguous()).backward()
    optimizer.step()
    for n, p in model.named_parameters():
        clear = grads[n].abs() > 1e-4 * grads[n].abs().max()  # where fp32 can tell the sign
        assert clear.any() and (p.detach() - want[n])[clear].abs().max() < 2e-6, n


@pytest.mark.parametrize("pieces", [[1] * 37, [16, 16, 5], [3, 1, 33], [36, 1]], ids=str)
def test_recurrent_equals_parallel(pieces):
    config = SHAPES[2]
    model = alive(config).eval()
    idx = tokens(config, 3, 37)
    with torch.no_grad():
        whole, end = model(idx, return_state=True)
        state, parts = model.init_state(3), []
        for piece in idx.split(pieces, dim=1):
            part, state = model(piece, state, return_state=True)
            parts.append(part)
        apart = model(idx[1:2])
    assert relative(torch.cat(parts, 1), whole.double()) < 1e-4
    assert relative(whole[1:2], apart.double()) < 1e-5
    for got, want in zip(state, end):
        for a, b in zip(got, want):
            assert relative(a, b.double()) < 1e-4


def test_gradient_checkpointing_changes_nothing_and_bf16_stays_near():
    config, grads = SHAPES[2], []
    idx = tokens(config, 2, 40)
    for grad_cp in (False, True):
        model = alive(config)
        model.features(idx, grad_cp=grad_cp).square().sum().backward()
        grads.append([p.grad for n, p in model.named_parameters() if n != "head.weight"])
    assert len(grads[0]) > 40 and all(torch.equal(a, b) for a, b in zip(*grads))
    with torch.no_grad():
        want, got = model(idx), model.bfloat16()(idx)
    assert got.dtype == torch.bfloat16 and ((got.float() - want).pow(2).mean() / want.pow(2).mean()).sqrt() < 0.05


def official_values(config):
    """The official loops, over plain Python numbers."""
    C, L = config.n_embd, config.n_layer
    for layer in range(L):
        down, up = 1 - layer / L, layer / (L - 1)
        share = [i / C for i in range(C)]
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        yield att + "time_decay", [-5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * up) for i in range(C)]
        yield att + "time_first", [math.log(0.3) + ((i + 1) % 3 - 1) * 0.5 for i in range(C)]
        yield att + "time_mix_k", [s**down for s in share]
        yield att + "time_mix_v", [s**down + 0.3 * up for s in share]
        yield att + "time_mix_r", [s ** (0.5 * down) for s in share]
        yield ffn + "time_mix_k", [s**down for s in share]
        yield ffn + "time_mix_r", [s**down for s in share]
        for norm in ["ln0"] * (layer == 0) + ["ln1", "ln2"]:
            yield f"blocks.{layer}.{norm}.weight", [1.0] * C
            yield f"blocks.{layer}.{norm}.bias", [0.0] * C
    yield "ln_out.weight", [1.0] * C
    yield "ln_out.bias", [0.0] * C


def test_initial_values_row_by_row():
    config = sizes(n_layer=3, n_embd=64, vocab_size=100)
    model = build(config)
    init_weights(model, 7)
    weights, exact = model.state_dict(), dict(official_values(config))
    zero = {f"blocks.{i}.{m}.weight" for i in range(3) for m in ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value")}
    gains = {f"blocks.{i}.att.value.weight": 1.0 for i in range(3)} | {f"blocks.{i}.ffn.key.weight": 2.0 for i in range(3)}
    gains["head.weight"] = 0.5 * math.sqrt(100 / 64)
    assert set(weights) == set(exact) | zero | set(gains) | {"emb.weight"}
    for name, want in exact.items():
        assert torch.allclose(weights[name].flatten().double(), torch.tensor(want, dtype=torch.float64), atol=1e-6), name
    assert not any(weights[name].any() for name in zero)
    for name, gain in gains.items():  # more rows than columns: columns of this length, orthogonal
        w = weights[name].double()
        assert torch.allclose(w.T @ w, gain**2 * torch.eye(64, dtype=torch.float64), atol=1e-5), name
    assert -6e-4 <= weights["emb.weight"].min() < -5.9e-4 and 5.9e-4 < weights["emb.weight"].max() <= 6e-4
    one = build(sizes(n_layer=1))
    init_weights(one, 0)
    assert all(t.isfinite().all() for t in one.state_dict().values())


def test_groups_are_the_official_ones():
    model = build(SHAPES[0])
    found = {name: (group["my_lr_scale"], group["weight_decay"]) for group in param_groups(model, 0.1) for name in group["names"]}
    assert set(found) == set(model.state_dict())
    for name, (lr, decay) in found.items():
        assert lr == {"time_decay": 2, "time_first": 3}.get(name.split(".")[-1], 1), name
        assert decay == (0.1 if name.removesuffix(".weight").split(".", 2)[-1] in (*MATRICES, "emb", "head") else 0.0), name


def test_sizes_and_arithmetic():
    with torch.device("meta"):
        model = build(sizes(n_layer=12, n_embd=768, vocab_size=50277))
    assert count_parameters(model) == 169_342_464  # RWKV-4-Pile-169M
    C = 32
    assert flops_per_token(SHAPES[0]) == 6 * (37 * C + 2 * (5 * C * C + 2 * 4 * C * C)) + 2 * 33 * C


def test_a_file_says_what_it_is():
    for config in SHAPES:
        assert read_config(build(config).state_dict()) == config
    assert sizes(head_size=64, rank_w=32) == SHAPES[0]  # what means nothing to it is 0
    with pytest.raises(UserError, match="--n_embd 40 is not a multiple of 32, which --my_testing x040 needs"):
        sizes(n_embd=40)
    weights = build(SHAPES[0]).state_dict()
    for name, tensor, said in (
        ("blocks.0.att.time_decay", torch.zeros(2, 16), r"is an RWKV-5 or RWKV-6: its blocks.0.att.time_decay has shape \[2, 16\]"),
        ("blocks.0.att.ln_x.weight", torch.zeros(32), "is an RWKV-5 or RWKV-6"),
        (
            "blocks.0.att.time_decay",
            torch.zeros(16),
            r"has shape \[16\], which does not fit the width 32 .*; give a complete .pth file of an RWKV-4$",
        ),
        ("blocks.0.ffn.key.weight", None, "not an RWKV-4 model: blocks.0.ffn.key.weight is missing; give a .pth file of type x040"),
    ):
        changed = {n: t for n, t in (weights | {name: tensor}).items() if t is not None}
        with pytest.raises(UserError, match=said):
            read_config(changed)


def test_what_is_made_for_rwkv7_says_so(tmp_path):
    save_weights(tmp_path / "rwkv4.pth", alive(SHAPES[0]).state_dict())
    with pytest.raises(UserError, match="holds a model of type x040; compress is made for x070 and phantom"):
        compress_file(tmp_path / "rwkv4.pth", tmp_path / "small.pth", svd_rank_ratio=0.5)
    with pytest.raises(UserError, match="holds a model of type x040; give a .pth file of an RWKV-7 or a Phantom"):
        rwkv7_ttt_phantom.load_pretrained_rwkv7(tmp_path / "rwkv4.pth")
