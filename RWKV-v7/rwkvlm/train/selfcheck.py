"""Before the first step: the kernels of a run, on its device, against plain PyTorch.

They are built on the machine where they run, by its compiler and for its processor, a pair that may be the first of its
kind; and what a wrong one does to a model may show in nothing but a loss that falls more slowly.
"""

from __future__ import annotations

import functools
from dataclasses import fields

import torch

from .. import models
from ..config import ModelConfig, UserError
from ..config.errors import out_of_memory
from ..ops import backend
from ..ops.cross_entropy import head_cross_entropy

# relative error that the loss and each parameter's gradient may have; the kernels have up to 1e-5 and 0.07
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# beside it, so many times the error of plain PyTorch in the same dtype: large where a sum cancels, or products are in tf32
ROUNDING = 4.0
# draws of weights and tokens: a wrong kernel is wrong in all of them; in one alone a rounding may have turned a ReLU, or
# the few numbers of a gradient be far off
DRAWS = 3
CURE = (
    "`python -m rwkvlm doctor` asks each by itself; set RWKV_CACHE_DIR to an empty folder to build them again, "
    "or use --kernel torch, which is slower (--check_kernels 0: train all the same)"
)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def check_kernels(sizes: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """UserError where a kernel fails, or a small model of this kind has another loss or gradient than in plain PyTorch."""
    if backend.requested() == "torch":
        return
    dtype = backend.computed_in(dtype)
    if has_rosa(sizes):  # in fp32, whose roundings turn no bit; what is beside ROSA as the run has it
        _check(small(sizes), torch.float32, device)
        if sizes.model_type == "rosa":
            return
        sizes = ModelConfig(head_size=sizes.head_size)
    _check(small(sizes), dtype, device)


def small(sizes: ModelConfig) -> ModelConfig:
    """The same kind of model, two blocks of a few heads, all of its sizes as they are derived from these."""
    derived = dict.fromkeys(("dim_ffn", "rank_w", "rank_a", "rank_v", "rank_g", "attention_kv_heads"), 0)
    own = derived | dict(
        ranks="", core_ratios="", dropout=0.0, attention_layers="1", n_layer=2, n_embd=2 * max(sizes.head_size, 32), vocab_size=200
    )
    if has_rosa(sizes):
        own |= dict(head_size=32, n_embd=64)  # plain PyTorch takes its time for ROSA
    return sizes.with_(**{f.name: own[f.name] for f in fields(sizes) if f.name in own})


def has_rosa(sizes: ModelConfig) -> bool:
    return sizes.model_type in ("x080", "rosa")


@functools.cache
def _check(sizes: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Once in a process."""
    for draw in range(DRAWS):
        try:
            part, off, most = worst(*answers(sizes, dtype, device, draw))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise UserError(f"a kernel fails on this machine: {str(error).splitlines()[0]}; {CURE}") from error
        if off < most:
            return
    raise UserError(
        f"a kernel is wrong on this machine: in a small {sizes.model_type} in {NAMES[dtype]}, {part} is off by {off:.1e} of itself; {CURE}"
    )


def answers(sizes: ModelConfig, dtype: torch.dtype, device: torch.device, draw: int = 0) -> list[dict[str, torch.Tensor]]:
    """Loss and gradients of a model with the kernels, in plain PyTorch, and in plain PyTorch with the same weights in float64."""
    model, idx = spread(sizes, draw).to(device, dtype), tokens(sizes, draw).to(device)
    found = [loss_and_gradients(model, idx)]
    with backend.asked_for("torch"):
        return [*found, loss_and_gradients(model, idx), loss_and_gradients(model.double(), idx)]


def worst(got: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[str, float, float]:
    """What is furthest off, by how much of itself, and by how much it may be; all are tensors of one dtype, but for `wanted`, in float64.

    Of what should be 0 any rounding would be infinitely much: it may be anything that is a number.
    """

    def off(name: str, x: torch.Tensor) -> float:
        exact = wanted[name]
        return ((x.double() - exact).norm() / exact.norm()).item() if exact.any() else x.double().sum().item() * 0

    found = [(name, off(name, x), LIMITS[x.dtype] + ROUNDING * off(name, rounded[name])) for name, x in got.items()]
    return max(found, key=lambda row: row[1] / row[2] if row[1] == row[1] else float("inf"))


def tokens(sizes: ModelConfig, draw: int = 0) -> torch.Tensor:
    """[2, T + 1], the same eleven over and over."""
    # two chunks of wkv7's, two steps of test-time training
    T = 30 if has_rosa(sizes) else max(100, 2 * sizes.ttt_chunk + 10 if getattr(sizes, "steps_on_state", False) else 0)
    return torch.randint(sizes.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1 + draw)).repeat(1, T // 11 + 1)[:, : T + 1]


def spread(sizes: ModelConfig, draw: int = 0) -> models.LanguageModel:
    """Initial weights, but matrices of random numbers in place of zeros, which would hide what comes before them."""
    with torch.device("meta"):  # which draws no random numbers
        model = models.build(sizes)
    models.init_weights(model.to_empty(device="cpu"), draw)
    rng = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.3 / p.shape[1] ** 0.5, generator=rng)
    return model


def loss_and_gradients(model: models.LanguageModel, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of the trained parameters, by name; idx: [B, T + 1]."""
    x, terms = model.for_training(idx[:, :-1].contiguous())
    loss = sum(
        (weight * value for weight, value in terms.values()), start=head_cross_entropy(x, model.head.weight, idx[:, 1:].contiguous())
    )
    return with_gradients(model, loss)


def with_gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """A loss and its gradients, as `worst` compares them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    return {"the loss": loss.detach().to(gradients[0].dtype)} | {f"the gradient of {name}": g for name, g in zip(trained, gradients)}
