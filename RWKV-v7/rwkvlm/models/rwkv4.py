"""RWKV-4 (x040): the recipe and its table of initial values, learning rates and weight decay.

Source: RWKV-LM, RWKV-v4neo, whose names and values these are, but for the embedding: there it begins in +- lr_init,
here in +- 6e-4, which is that flag's default, since a model knows no learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..config import ModelConfig, UserError, model_config
from ..layers.rwkv4 import ChannelMix4, TimeMix4
from .block import Block
from .lm import LanguageModel
from .rwkv7 import ATT, BLOCK, FFN, as_wide, channels, constant, depth
from .sizes import Sizes
from .table import Row, Slot

DECAY = "blocks.0.att.time_decay"  # RWKV-4 to 6 have it, RWKV-7 does not


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, [Block(config, layer, TimeMix4(config), ChannelMix4(config)) for layer in range(config.n_layer)])


def config_of(tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
    """All sizes from the shapes of a checkpoint."""
    if tensors[DECAY].squeeze().dim() > 1 or "blocks.0.att.ln_x.weight" in tensors:
        raise UserError(
            f"the checkpoint is an RWKV-5 or RWKV-6: its {DECAY} has shape {list(tensors[DECAY].shape)}; "
            "there are RWKV-4 (x040) and RWKV-7 (x070) here"
        )
    sizes = Sizes(tensors, "an RWKV-4", "x040")
    vocab_size, n_embd = sizes.shape("emb.weight", 2)
    if sizes.shape(DECAY, 1)[0] != n_embd:
        raise UserError(
            f"the checkpoint's {DECAY} has shape {list(tensors[DECAY].shape)}, "
            f"which does not fit the width {n_embd} of emb.weight; give a complete .pth file of an RWKV-4"
        )
    return model_config(
        "x040", n_layer=sizes.n_layer(), n_embd=n_embd, vocab_size=vocab_size, dim_ffn=sizes.shape("blocks.0.ffn.key.weight", 2)[0]
    )


def _ramp(s: Slot) -> torch.Tensor:
    """0 to 1 over the channels."""
    return channels(s) / (s.config.n_embd - 1)


def _mix(power: float, deeper: float = 0.0):
    """The share of the token itself; `deeper` more in the last block than in the first."""
    return lambda s: (channels(s) / s.config.n_embd) ** (power * (1 - s.layer / s.config.n_layer)) + deeper * depth(s)


def _zigzag(s: Slot) -> torch.Tensor:
    """0, 1/2, -1/2 in turn."""
    return ((channels(s) + 1) % 3 - 1) / 2


TABLE = [
    Row(r"emb\.weight", lambda s: torch.empty(s.shape).uniform_(-6e-4, 6e-4, generator=s.generator), decay=True),
    Row(rf"(?:{BLOCK}ln[012]|ln_out)\.weight", constant(1.0)),
    Row(rf"(?:{BLOCK}ln[012]|ln_out)\.bias", constant(0.0)),
    Row(ATT + r"time_decay", lambda s: -5 + 8 * _ramp(s) ** (0.7 + 1.3 * depth(s)), lr=2.0),
    Row(ATT + r"time_first", lambda s: math.log(0.3) + _zigzag(s), lr=3.0),
    Row(ATT + r"time_mix_k", _mix(1.0)),
    Row(ATT + r"time_mix_v", _mix(1.0, deeper=0.3)),
    Row(ATT + r"time_mix_r", _mix(0.5)),
    Row(FFN + r"time_mix_[kr]", _mix(1.0)),
    Row(ATT + r"value\.weight", as_wide(1.0), decay=True),
    Row(ATT + r"(?:key|receptance|output)\.weight", constant(0.0), decay=True),
    Row(FFN + r"key\.weight", as_wide(1.0), decay=True),
    Row(FFN + r"(?:receptance|value)\.weight", constant(0.0), decay=True),
    Row(r"head\.weight", as_wide(0.5), decay=True),
]
