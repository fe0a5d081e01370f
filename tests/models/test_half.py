"""Every model in half precision: a training step in float16 against float32, and generation in bf16.

In float16, as --precision fp16 trains it, loss and gradients of a step against float32; in bf16 with a state, as it generates.
"""

import pytest
import torch

from rwkvlm.config import MODEL_TYPES, model_config
from rwkvlm.models import build, init_weights
from rwkvlm.ops.cross_entropy import head_cross_entropy

SCALE = 2.0**10


def made(model_type, dtype):
    """A model in which what begins at 0 does not hide what comes before it."""
    more = {"ttt_chunk": 16} if model_type == "phantom" else {"rosa_grad": "soft"} if model_type in ("x080", "rosa") else {}
    model = build(model_config(model_type, n_layer=2, n_embd=64, vocab_size=97, **{"head_size": 32} | more))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any() and "ttt" not in name:
                p.normal_(std=0.05, generator=generator)
    return model.to(dtype)


def step(model, idx):
    """Loss, and gradients of the loss times SCALE, in float32."""
    loss = head_cross_entropy(model.features(idx[:, :-1]), model.head.weight, idx[:, 1:])
    (loss * SCALE).backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_step_in_float16_is_near_that_in_float32(model_type):
    idx = torch.randint(97, (2, 41), generator=torch.Generator().manual_seed(3))
    (loss, grads), (exact, expected) = (step(made(model_type, dtype), idx) for dtype in (torch.float16, torch.float32))
    # a number that rounding moves over 0 is another symbol
    loss_near, near = (1e-2, 0.3) if model_type in ("x080", "rosa") else (2e-3, 0.02)
    assert loss == pytest.approx(exact, rel=loss_near)
    assert grads.keys() == expected.keys() and all(g.isfinite().all() for g in grads.values())
    assert all(
        (grads[name] - g).norm() < near * g.norm() for name, g in expected.items() if name in ("head.weight", "blocks.1.ffn.value.weight")
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_in_bf16_a_text_begins_with_the_first_state_and_goes_on(model_type):
    """As without a state, which has float32 in it here and bf16 there."""
    model, idx = made(model_type, torch.bfloat16), torch.randint(97, (2, 41), generator=torch.Generator().manual_seed(3))
    whole, (first, state) = model(idx), model(idx[:, :40], model.init_state(2), return_state=True)
    rest, _ = model(idx[:, 40:], state, return_state=True)
    got = torch.cat([first, rest], 1)
    assert got.dtype == torch.bfloat16 and (got - whole).float().norm() < 0.02 * whole.float().norm()
