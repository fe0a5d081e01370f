"""RWKV-7 (x070): the recipe and its table of initial values, learning rates and weight decay.

Source: RWKV-LM, RWKV-v7/train_temp, whose values these are. Weight decay touches the large matrices only: this matters
a great deal for quality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from ..config import ModelConfig, UserError, model_config
from ..config.phantom import CARRIED, decode
from ..layers.channel_mix import ChannelMix
from ..layers.linear import linear_of
from ..layers.time_mix import TimeMix
from .block import Block
from .lm import LanguageModel
from .sizes import Sizes
from .table import Row, Slot


def build(config: ModelConfig) -> LanguageModel:
    linear = linear_of(config.rank_of())
    return LanguageModel(
        config, [Block(config, layer, TimeMix(config, layer, linear), ChannelMix(config, linear)) for layer in range(config.n_layer)]
    )


def config_of(tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
    """All sizes, low ranks included, from the shapes of a checkpoint; a Phantom's also from the tensor CARRIED."""
    sizes = Sizes(tensors, "an RWKV-7", "x070")
    n_layer = sizes.n_layer()
    vocab_size, n_embd = sizes.shape("emb.weight", 2)
    n_head, head_size = sizes.shape("blocks.0.att.r_k", 2)
    if n_head * head_size != n_embd:
        raise UserError(
            f"the checkpoint's blocks.0.att.r_k has shape {[n_head, head_size]}, "
            f"which does not fit the width {n_embd} of emb.weight; give a complete .pth file of an RWKV-7"
        )
    with_value_rank = next((layer for layer in reversed(range(n_layer)) if f"blocks.{layer}.att.v1" in tensors), None)
    key = "blocks.0.ffn.key"
    factors = {match[1]: name for name in tensors if (match := re.fullmatch(r"blocks\.0\.(.+)\.down\.weight", name))}
    ghost = any(name.startswith(f"{key}.ghost.") for name in tensors)
    parts = [f"{key}.core", f"{key}.ghost"] if ghost else [key]
    dim_ffn = sum(sizes.shape(f"{part}.{'up.' * (part.removeprefix('blocks.0.') in factors)}weight", 2)[0] for part in parts)
    carried = decode(tensors[CARRIED].tolist()) if CARRIED in tensors else None
    return model_config(
        "x070" if carried is None else "phantom",
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=head_size,
        dim_ffn=dim_ffn,
        rank_w=sizes.shape("blocks.0.att.w1", 2)[1],
        rank_a=sizes.shape("blocks.0.att.a1", 2)[1],
        rank_v=0 if with_value_rank is None else sizes.shape(f"blocks.{with_value_rank}.att.v1", 2)[1],
        rank_g=sizes.shape("blocks.0.att.g1", 2)[1],
        ranks=",".join(f"{name}={sizes.shape(down, 2)[0]}" for name, down in sorted(factors.items())),
        **(carried or {}),
    )


def channels(s: Slot) -> torch.Tensor:
    return torch.arange(s.config.n_embd, dtype=torch.float64)


def _linear(s: Slot) -> torch.Tensor:
    """-1/2 to 1/2 over the channels."""
    return channels(s) / (s.config.n_embd - 1) - 0.5


def _zigzag(s: Slot) -> torch.Tensor:
    """-1 to 1 over the channels of each head, z|z|."""
    half = (s.config.head_size - 1) / 2
    z = (channels(s) % s.config.head_size - half) / half
    return z * z.abs()


def _depth_left(s: Slot) -> float:
    """1 in the first block, towards 0 in the last."""
    return 1 - s.layer / s.config.n_layer


def depth(s: Slot) -> float:
    """0 in the first block, 1 in the last."""
    return s.layer / (s.config.n_layer - 1) if s.config.n_layer > 1 else 0.0


def shift_mix(power: float, depth_power: int = 1):
    """In fp32, as officially: small shares in deep models lose digits there, and files shall have the same bits."""
    return lambda s: 1 - (channels(s) / s.config.n_embd).float() ** (power * _depth_left(s) ** depth_power)


def _decay(s: Slot) -> torch.Tensor:
    ramp = (channels(s) / (s.config.n_embd - 1)) ** (1 + depth(s) ** 0.3)
    return -6 + 6 * ramp + 0.5 + 2.5 * _zigzag(s)


def constant(value: float):
    return lambda s: torch.full(s.shape, value)


def orthogonal(gain: float):
    return lambda s: torch.nn.init.orthogonal_(torch.empty(s.shape), gain, generator=s.generator)


def as_wide(gain: float):
    """Orthogonal, with rows of the length gain, on average where there are more of them than columns."""
    return lambda s: orthogonal(gain * max(1.0, math.sqrt(s.shape[0] / s.shape[1])))(s)


def _embedding(s: Slot) -> torch.Tensor:
    return torch.empty(s.shape).uniform_(-1e-4, 1e-4, generator=s.generator)


BLOCK = r"blocks\.\d+\."
ATT = BLOCK + r"att\."
FFN = BLOCK + r"ffn\."

TABLE = [
    Row(r"emb\.weight", _embedding, decay=True),
    Row(rf"(?:{BLOCK}ln[012]|ln_out)\.weight", constant(1.0)),
    Row(rf"(?:{BLOCK}ln[012]|ln_out)\.bias", constant(0.0)),
    Row(ATT + r"x_[rg]", shift_mix(0.2)),
    Row(ATT + r"x_[wa]", shift_mix(0.9)),
    Row(ATT + r"x_[kv]", shift_mix(0.7)),
    Row(ATT + r"w0", _decay, lr=2.0),
    Row(ATT + r"[wavg]1", constant(0.0)),
    Row(ATT + r"[wavg]2", as_wide(0.1)),
    Row(ATT + r"a0", lambda s: -0.19 + 0.3 * _zigzag(s) + 0.4 * _linear(s)),
    Row(ATT + r"v0", lambda s: 0.73 - 0.4 * _linear(s)),
    Row(ATT + r"k_k", lambda s: 0.71 - 0.1 * _linear(s)),
    Row(ATT + r"k_a", constant(1.02)),
    Row(ATT + r"r_k", constant(-0.04)),
    Row(ATT + r"(?:receptance|value)(?:\.up)?\.weight", orthogonal(1.0), decay=True),
    Row(ATT + r"key(?:\.up)?\.weight", orthogonal(0.1), decay=True),
    Row(ATT + r"output(?:\.up)?\.weight", constant(0.0), decay=True),
    Row(ATT + r"ln_x\.weight", lambda s: torch.full(s.shape, ((1 + s.layer) / s.config.n_layer) ** 0.7)),
    Row(ATT + r"ln_x\.bias", constant(0.0)),
    Row(FFN + r"x_k", shift_mix(1.0, 4)),
    Row(FFN + r"key(?:\.up)?\.weight", orthogonal(1.0), decay=True),
    Row(FFN + r"value(?:\.up)?\.weight", constant(0.0), decay=True),
    Row(BLOCK + r".*\.down\.weight", orthogonal(1.0), decay=True),  # the first of two factors; the second is as the matrix would be
    Row(r"head\.weight", as_wide(0.5), decay=True),
]
