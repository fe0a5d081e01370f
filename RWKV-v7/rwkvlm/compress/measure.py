"""What a model does on a text: its loss, and how much each hidden unit of its channel mixing puts out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.pth import load_weights, model_from
from ..data.binidx import BinIdx, idx_path
from ..data.dataset import HeldOutSamples, Pair
from ..models import LanguageModel
from ..ops.cross_entropy import head_cross_entropy


def load(path: str | Path) -> LanguageModel:
    """The model of a file, to be measured: on the GPU in bf16 if there is one, else on the CPU in float32."""
    return model_from(load_weights(path), *(("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)))


class Text:
    """`samples` sequences of ctx_len tokens, evenly spread over a .bin/.idx pair. UserError where it does not fit."""

    def __init__(self, prefix: str, ctx_len: int, samples: int, vocab_size: int) -> None:
        self.samples = HeldOutSamples(BinIdx(prefix), ctx_len, vocab_size)
        count = min(samples, len(self.samples))
        self.numbers = 1 + np.arange(count) * (len(self.samples) // count)

    def __iter__(self) -> Iterator[Pair]:
        for number in self.numbers:
            yield self.samples[np.array([number])]


def held_out(prefix: str) -> str:
    """PREFIX.val where there is one, as in training, else PREFIX itself."""
    return val if idx_path(val := f"{prefix}.val").is_file() else prefix


@torch.no_grad()
def loss(model: LanguageModel, text: Text) -> float:
    """Mean cross entropy a token, in nats."""
    weight = model.head.weight
    losses = [head_cross_entropy(model.features(x.to(weight.device)), weight, y.to(weight.device)).item() for x, y in text]
    return sum(losses) / len(losses)


@torch.no_grad()
def activity(model: LanguageModel, text: Text) -> list[torch.Tensor]:
    """The root mean square of each hidden unit's output, one tensor [dim_ffn] a block, on the CPU."""
    sums = [torch.zeros(model.config.dim_ffn) for _ in model.blocks]
    counts = [0] * len(sums)

    def watch(layer: int):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            hidden = inputs[0].float().flatten(0, -2)
            sums[layer] += hidden.square().sum(0).cpu()
            counts[layer] += len(hidden)

        return hook

    hooks = [block.ffn.value.register_forward_pre_hook(watch(layer)) for layer, block in enumerate(model.blocks)]
    for x, _ in text:
        model.features(x.to(model.head.weight.device))
    for hook in hooks:
        hook.remove()
    return [(total / count).sqrt() for total, count in zip(sums, counts)]
