"""One AdamW everywhere: against a float64 one written from the formulas."""

import math

import pytest
import torch

from rwkvlm import models
from rwkvlm.config import ModelConfig, TrainConfig, UserError
from rwkvlm.ops import backend
from rwkvlm.train.optimizer import MasterAdamW, make_optimizer
from rwkvlm.train.strategy import make_strategy, param_dtype

BETA1, BETA2, EPS, LR, DECAY = 0.9, 0.99, 1e-18, 3e-3, 0.1
DECAYED = ("emb.weight", "head.weight", "receptance.weight", "key.weight", "value.weight", "output.weight")


def expected(start: torch.Tensor, grads: list[torch.Tensor], name: str) -> torch.Tensor:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in float64, with the groups of RWKV-7."""
    p, m, v = start.double(), 0.0, 0.0
    lr = LR * (2 if name.endswith("att.w0") else 1)
    decay = DECAY if name.endswith(DECAYED) else 0.0
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        p = p - lr * decay * p - lr * (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
    return p


def build(**flags):
    config = TrainConfig(accelerator="cpu", lr_init=LR, beta1=BETA1, beta2=BETA2, adam_eps=EPS, weight_decay=DECAY, **flags)
    model = models.build(ModelConfig(n_layer=2, n_embd=32, vocab_size=40, head_size=16))
    models.init_weights(model, 0)
    model.to(param_dtype(config))
    return model, make_optimizer(model, config, make_strategy(config))


def gradients(p: torch.Tensor, i: int, steps: int) -> list[torch.Tensor]:
    """Of very different sizes, so that epsilon and clamping would show."""
    generator = torch.Generator().manual_seed(i)
    scale = 10.0 ** torch.randint(-12, 3, p.shape, generator=generator)
    return [torch.randn(p.shape, generator=generator) * scale for _ in range(steps)]


@pytest.mark.parametrize("flags", [dict(precision="fp32"), dict(precision="bf16"), dict(precision="fp32", strategy="deepspeed_stage_2")])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_step_equals_the_formulas(flags, steps):
    model, optimizer = build(**flags)
    named = [(name, p) for name, p in model.named_parameters()]
    start = {name: p.detach().clone() for name, p in named}
    grads = {name: gradients(p, i, steps) for i, (name, p) in enumerate(named)}
    for t in range(steps):
        for name, p in named:
            p.grad = grads[name][t].clone()
        optimizer.step()
    for name, p in named:
        result = optimizer.state[p].get("master", p).detach()
        assert result.dtype == torch.float32
        want = expected(start[name], grads[name], name)
        moved = (want - start[name].double()).abs().max()
        assert moved > 0.5 * LR, name
        assert (result.double() - want).abs().max() < 1e-5 * moved + 2e-7 * want.abs().max(), name
        assert torch.equal(p.detach(), result.to(p.dtype)), name


def test_kinds():
    assert all(type(build(precision=precision)[1]) is MasterAdamW for precision in ("fp32", "bf16"))
    assert type(build(precision="bf16", strategy="deepspeed_stage_3")[1]) is torch.optim.AdamW, "DeepSpeed's own would compile for a minute"
    _, optimizer = build(precision="bf16")
    assert sorted({(g["weight_decay"], g["my_lr_scale"], g["lr"]) for g in optimizer.param_groups}) == [
        (0.0, 1.0, LR),
        (0.0, 2.0, 2 * LR),
        (DECAY, 1.0, LR),
    ]


@pytest.mark.parametrize("micro_batches, grad_dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_no_autocast_but_bf16_parameters_and_fp32_moments_and_sums(monkeypatch, micro_batches, grad_dtype):
    monkeypatch.setenv("RWKV_KERNEL", "torch")
    model, optimizer = build(precision="bf16", accumulate_grad_batches=micro_batches)
    idx = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    assert model(idx).dtype == torch.bfloat16
    model(idx).float().logsumexp(-1).mean().backward()
    for p in model.parameters():
        assert p.dtype == torch.bfloat16 and p.grad.dtype == grad_dtype
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}


def test_micro_batches_are_added_up_in_fp32():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    MasterAdamW([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-18, accumulate=True)
    for k in (1.0, *[2.0**-10] * 64):  # 1 + 2^-10 is 1 in bf16, whose sum would stay 1
        (p * k).sum().backward()
    assert p.grad.tolist() == [1 + 64 * 2.0**-10] * 4


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_is_a_factor_of_the_step(monkeypatch, dtype, kernel):
    monkeypatch.setattr(backend, "_requested", kernel)
    grad = torch.tensor([3.0, 4.0, 0.0, 12.0])
    for most, factor in ((0.0, 1), (1.0, 1 / 13), (20.0, 1)):
        p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = MasterAdamW([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-18)
        p.grad = grad.to(dtype)
        optimizer.clip(torch.tensor(13.0), most)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * factor * grad, rtol=1e-6, atol=0)
        assert torch.equal(p.grad, grad.to(dtype))
    optimizer.clip(torch.tensor(float("nan")), 1.0)
    before = optimizer.state[p]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], before) and optimizer.state[p]["step"] == 1


def test_small_updates_add_up_in_the_master():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([p], lr=1e-4, betas=(0.9, 0.99), eps=1e-18)
    for _ in range(100):
        p.grad = torch.ones(1)
        optimizer.step()
    assert math.isclose(optimizer.state[p]["master"].item(), 0.99, rel_tol=1e-5), "a bf16 weight alone would still be 1"
    assert p.item() == torch.tensor(0.99).bfloat16().item()


def test_fp16_without_deepspeed_is_refused():
    with pytest.raises(UserError, match="--precision fp16 needs"):
        build(precision="fp16")
