"""One whole training step, forward to AdamW with its groups, against the float64 model written from the formulas."""

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from oracles import hybrid, x070
from rwkvlm.config import HybridConfig, ModelConfig, TrainConfig
from rwkvlm.models import build, init_weights
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train.optimizer import make_optimizer

SIZES = dict(n_layer=2, n_embd=32, vocab_size=37, head_size=16)
MODELS = {"x070": (ModelConfig(**SIZES), x070.logits), "hybrid": (HybridConfig(**SIZES, attention_kv_heads=1), hybrid.logits)}
SETTINGS = TrainConfig(lr_init=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, adam_eps=1e-18, precision="fp32")
MATRICES = ("emb", "head", "receptance", "query", "key", "value", "output")


def decayed(name):
    return name.endswith(".weight") and name.split(".")[-2] in MATRICES


@pytest.mark.parametrize("kind", MODELS)
def test_first_step_equals_the_formulas(kind):
    config, formulas = MODELS[kind]
    model = build(config)
    init_weights(model, 1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # away from the initial zeros, where most gradients vanish
            p.add_(0.2 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    data = torch.randint(config.vocab_size, (2, 17), generator=g)
    idx, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    params = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}

    logits = formulas(params, idx, config.head_size)
    _, logit_grad = x070.loss_and_logit_gradient(logits, targets)
    grads = dict(zip(params, torch.autograd.grad(logits, list(params.values()), logit_grad)))
    want = x070.adamw_step(
        {n: p.detach() for n, p in params.items()},
        grads,
        SETTINGS.lr_init,
        SETTINGS.weight_decay,
        decayed,
        lambda n: n.endswith(("att.w0", "att.scale")),
    )

    optimizer = make_optimizer(model, SETTINGS, SingleDeviceStrategy(torch.device("cpu")))
    head_cross_entropy(model.features(idx), model.head.weight, targets).backward()
    optimizer.step()

    compared = 0
    for name, p in model.named_parameters():
        # Adam's first step is the sign of the gradient: where fp32 cannot tell the sign, nothing can be compared
        clear = grads[name].abs() > 1e-4 * grads[name].abs().max()
        error = (p.detach().double() - want[name]).abs()[clear].max().item()
        assert error < 2e-6, f"{name}: {error}"
        compared += int(clear.sum())
    assert compared > 0.8 * sum(p.numel() for p in model.parameters())
