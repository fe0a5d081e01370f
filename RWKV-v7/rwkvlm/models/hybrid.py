"""RWKV-7 with attention in some blocks: the recipe, sizes from a file, starting from an RWKV-7, and the table's rows beside RWKV-7's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from ..config import HybridConfig, UserError
from ..layers.attention import Attention
from ..layers.channel_mix import ChannelMix
from ..layers.linear import linear_of
from ..layers.time_mix import TimeMix
from . import rwkv7
from .block import Block
from .lm import LanguageModel
from .rwkv7 import ATT, orthogonal, shift_mix
from .sizes import Sizes
from .table import Row, Slot

WINDOW = "attention_window"  # [0, window], without a number in it: its shape says in a weight file what no other shape does
QUERY = r"blocks\.(\d+)\.att\.query\.weight"


class Hybrid(LanguageModel):
    def __init__(self, config: HybridConfig) -> None:
        linear = linear_of(config.rank_of())

        def block(layer: int) -> Block:
            att = Attention(config) if layer in config.attention else TimeMix(config, layer, linear)
            return Block(config, layer, att, ChannelMix(config, linear))

        super().__init__(config, [block(layer) for layer in range(config.n_layer)])
        if config.attention_window:
            self.register_buffer(WINDOW, torch.empty(0, config.attention_window))


build = Hybrid


def attention_layers(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """The blocks with attention in a file; none: it holds another model."""
    return sorted(int(match[1]) for name in tensors if (match := re.fullmatch(QUERY, name)))


def config_of(tensors: Mapping[str, torch.Tensor]) -> HybridConfig:
    """All sizes from the shapes of a checkpoint; block 0 says what is RWKV-7's."""
    layers = attention_layers(tensors)
    found, sizes = rwkv7.config_of(tensors), Sizes(tensors, "a hybrid", "hybrid")
    key = f"blocks.{layers[0]}.att.key.weight"
    rows = sizes.shape(key, 2)[0]
    if rows % found.head_size:
        raise UserError(
            f"the checkpoint's {key} has {rows} rows, which are not whole heads of {found.head_size}; give a complete hybrid .pth file"
        )
    return HybridConfig(
        **found.as_dict() | {"model_type": "hybrid"},
        attention_layers=",".join(map(str, layers)),
        attention_kv_heads=rows // found.head_size,
        attention_window=sizes.shape(WINDOW, 2)[1] if WINDOW in tensors else 0,
    )


def adapted(tensors: Mapping[str, torch.Tensor], model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights that this model takes from an RWKV-7 or a hybrid: no time mixing of blocks that have attention here and not there."""
    gone = tuple(f"blocks.{layer}.att." for layer in set(model.config.attention) - set(attention_layers(tensors)))
    window = {name: tensor for name, tensor in model.named_buffers() if name == WINDOW}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)} | window


def costs(config: HybridConfig) -> list[str]:
    """Which blocks have attention, and what it remembers, in a line."""
    heads, N = config.attention_kv_heads, config.head_size
    grows = f"{2 * heads * N * len(config.attention):,} numbers more with each token"
    memory = f"window {config.attention_window}: {grows}, up to it" if config.attention_window else f"whole context: {grows}"
    blocks, own = "s" * (len(config.attention) > 1), "s" * (config.n_head > 1)
    return [f"attention in block{blocks} {config.attention_layers}, {config.n_head} head{own} ({heads} of keys and values), {memory}"]


def _key(s: Slot) -> torch.Tensor:
    """Attention normalises its keys, so the size of the matrix is not seen in them; but an optimizer step turns a small matrix further."""
    return orthogonal(1.0 if s.layer in s.config.attention else 0.1)(s)


def _scale(s: Slot) -> torch.Tensor:
    """The best match is 8 at first, as a scale of 1 makes it in heads of 64.

    In heads of 16 a scale of 1 makes it 4: too little to find one of a hundred tokens (records/2026-11-26-hybrid).
    """
    return torch.full(s.shape, 8 / math.sqrt(s.config.head_size))


TABLE = [
    Row(WINDOW, lambda s: torch.empty(s.shape)),
    Row(ATT + r"x_q", shift_mix(0.2)),
    Row(ATT + r"scale", _scale, lr=2.0),  # moves as far as two factors would, one of queries and one of keys
    Row(ATT + r"query\.weight", orthogonal(1.0), decay=True),
    Row(ATT + r"key\.weight", _key, decay=True),
    *rwkv7.TABLE,
]
