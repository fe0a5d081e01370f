"""RWKV-7 TTT Phantom: RWKV-7 with Ghost layers and test-time training. With both switched off it is RWKV-7, name by name and bit by bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from ..config.phantom import CARRIED, CARRIED_BYTES, MATRICES, PhantomConfig, encode
from ..layers.channel_mix import ChannelMix
from ..layers.ghost import GhostLinear, factorise, to_digits
from ..layers.linear import linear_of
from ..layers.memory import Memory
from ..layers.packed import Packed
from ..layers.state import BlockState
from ..layers.time_mix import TimeMix
from ..layers.ttt import StateTTT
from . import rwkv7
from .block import Block
from .lm import LanguageModel, Terms
from .rwkv7 import ATT, BLOCK, FFN, as_wide, constant, orthogonal
from .table import Row, Slot


class PhantomBlock(Block):
    """RWKV-7's block, run max_depth_iter times with the same weights, each time with a state of its own."""

    def __init__(self, config: PhantomConfig, layer: int) -> None:
        linear = functools.partial(_linear, config)
        super().__init__(
            config,
            layer,
            TimeMix(config, layer, linear, KINDS[config.ttt_kind](config) if config.ttt_enabled else None),
            ChannelMix(config, linear),
        )
        self.passes = config.max_depth_iter
        if config.dropout:
            for last in (self.att.output, self.ffn.value):
                last.register_forward_hook(lambda module, _, y: F.dropout(y, config.dropout, module.training))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> list[BlockState]:
        return [super().init_state(batch, device, dtype)] * self.passes

    def forward(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        state: list[BlockState] | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[BlockState] | None]:
        if self.ln0 is not None:
            x = self.ln0(x)
        new_state = []
        for i in range(self.passes):
            x, v, after = self.mix(x, v_first, state[i] if state is not None else None, return_state, packed)
            v_first = v_first if v_first is not None else v
            new_state.append(after)
        return x, v_first, new_state if return_state else None


class Phantom(LanguageModel):
    def __init__(self, config: PhantomConfig) -> None:
        super().__init__(config, [PhantomBlock(config, layer) for layer in range(config.n_layer)])
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        if not config.is_plain:
            self.register_buffer(CARRIED, torch.empty(CARRIED_BYTES))

    def for_training(self, idx: torch.Tensor, grad_cp: bool = False) -> tuple[torch.Tensor, Terms]:
        config, steps = self.config, -(-idx.shape[1] // self.config.ttt_chunk) - 1
        if not (self.training and config.steps_on_state and config.ttt_meta):
            return super().for_training(idx, grad_cp)
        x, state = self.features(idx, return_state=True, grad_cp=grad_cp)
        errors = torch.stack([p.wkv.error for passes in state for p in passes])
        return x, {"meta_loss": (config.ttt_loss_weight, errors.mean() / steps)}


build = Phantom


def _linear(config: PhantomConfig, name: str, inputs: int, outputs: int) -> nn.Module:
    rows, linear = config.core_rows(name), linear_of(config.rank_of())
    if not rows:
        return linear(name, inputs, outputs)
    parts = lambda part, inputs, outputs: linear(f"{name}.{part}", inputs, outputs)
    return GhostLinear(inputs, outputs, rows, config.ghost_activation, config.ghost_permuted, parts)


def adapted(tensors: Mapping[str, torch.Tensor], model: LanguageModel) -> Mapping[str, torch.Tensor]:
    """A Phantom's weights as they are, an RWKV-7's factorised (from_rwkv7)."""
    return tensors if CARRIED in tensors or model.config.is_plain else from_rwkv7(tensors, model)


@torch.no_grad()
def from_rwkv7(tensors: Mapping[str, torch.Tensor], model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of an RWKV-7 in the form of this model; what an RWKV-7 does not have keeps the values that it has in the model."""
    converted = dict(tensors)
    for name, own in model.state_dict().items():
        matrix, core, _ = name.partition(".core.")
        if core and f"{matrix}.weight" in converted:  # what a file lacks load_into names
            core, ghost, order = factorise(converted.pop(f"{matrix}.weight").float(), own.shape[0])
            converted |= {f"{matrix}.core.weight": core, f"{matrix}.ghost.weight": ghost, f"{matrix}.order": to_digits(order)}
        elif name == CARRIED or ".ttt." in name:
            converted[name] = own
    return converted


def costs(config: PhantomConfig) -> list[str]:
    """A table of parameters and FLOPs per token, forward, of a block's matrices, dense beside ghost; what is trained while reading."""
    reading = [_memory_line(config)] if config.has_memory else [_state_line(config)] if config.steps_on_state else []
    if not config.has_ghosts:
        return reading
    lines = [f"{'matrix':15} {'shape':>12} {'core':>5} {'parameters':>22} {'FLOPs/token':>22} {'saved':>6}"]
    total, ranks = [0, 0], config.rank_of()
    for name in MATRICES:
        inputs, outputs = config.matrix_shape(name)
        rows, whole = config.core_rows(name), inputs * outputs
        parts = sum(
            ranks[part] * (i + o) if part in ranks else i * o
            for part, (i, o) in config.parts().items()
            if f"{part}.".startswith(f"{name}.")
        )
        total = [total[0] + whole, total[1] + parts]
        lines.append(_line(name, f"{outputs}x{inputs}", str(rows) if rows else "dense", whole, parts))
    return [*lines, _line("per block", "", "", *total), *reading]


def _state_line(config: PhantomConfig) -> str:
    steps = f"{config.ttt_steps} step{'s' * (config.ttt_steps > 1)}"
    return f"state: {steps} of test-time training after every {config.ttt_chunk} tokens, on {config.ttt_core_ratio:.0%} of its rows"


def _memory_line(config: PhantomConfig) -> str:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Memory(config).parameters())
    return (
        f"memory: {config.ttt_features} features of each key, "
        f"{parameters:,} parameters and {config.memory_flops:,} FLOPs/token more in each block"
    )


def _line(name: str, shape: str, core: str, whole: int, parts: int) -> str:
    return (
        f"{name:15} {shape:>12} {core:>5} {f'{whole:,} -> {parts:,}':>22} {f'{2 * whole:,} -> {2 * parts:,}':>22} {1 - parts / whole:6.0%}"
    )


def _ffn_core(s: Slot) -> torch.Tensor:
    """Rows as long as those of the dense key, an orthogonal matrix with more rows than columns."""
    return orthogonal(min(1.0, math.sqrt(s.config.n_embd / s.config.dim_ffn)))(s)


def _logit_of_step(s: Slot) -> torch.Tensor:
    """2 sigmoid(rate) is the first step."""
    half = s.config.first_step / 2
    return torch.full(s.shape, math.log(half / (1 - half)))


def _features(s: Slot) -> torch.Tensor:
    """Rows of length 1 about."""
    return torch.randn(s.shape, generator=s.generator) / math.sqrt(s.shape[-1])


KINDS = {"state": StateTTT, "memory": Memory}

TABLE = [
    Row(CARRIED, lambda s: torch.tensor(encode(s.config), dtype=torch.float32)),
    Row(r".*\.order", lambda s: to_digits(torch.arange(s.shape[1]))),
    Row(ATT + r"(?:receptance|value)\.core(?:\.up)?\.weight", orthogonal(1.0), decay=True),
    Row(ATT + r"key\.core(?:\.up)?\.weight", orthogonal(0.1), decay=True),
    Row(FFN + r"key\.core(?:\.up)?\.weight", _ffn_core, decay=True),
    Row(BLOCK + r"(?:att\.output|ffn\.value)\.core(?:\.up)?\.weight", constant(0.0), decay=True),
    Row(r".*\.ghost(?:\.up)?\.weight", as_wide(1.0), decay=True),  # a ghost is as large as the core that it is made of
    Row(ATT + r"ttt\.rate", _logit_of_step, lr=2.0),
    Row(ATT + r"ttt\.w1", orthogonal(1.0), lr=2.0),
    Row(ATT + r"ttt\.w2", constant(0.0), lr=2.0),
    Row(ATT + r"ttt\.features", _features),
    Row(ATT + r"ttt\.gain", constant(0.0), lr=2.0),
    *rwkv7.TABLE,
]
