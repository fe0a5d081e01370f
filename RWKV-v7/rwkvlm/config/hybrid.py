"""The shape of a hybrid: RWKV-7's sizes, which blocks have attention in the place of time mixing, with how many heads, how far back."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UserError
from .model import ModelConfig


@dataclass(frozen=True)
class HybridConfig(ModelConfig):
    """Settings of a hybrid beside RWKV-7's sizes.

    attention_layers    blocks with attention, counted from 0, as "3,7,11"; or "1/4": the last of each four, in fewer blocks the last one.
                        After construction always numbers. Block 0 is none of them: its value is what the other blocks' v_first is
    attention_kv_heads  heads of keys and values, each read by n_head / attention_kv_heads heads of queries; 0: n_head
    attention_window    tokens that a token sees, itself included; 0: all
    """

    model_type: str = "hybrid"
    attention_layers: str = "1/4"
    attention_kv_heads: int = 0
    attention_window: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention_layers", ",".join(map(str, self._layers())))
        if self.attention_kv_heads == 0:
            object.__setattr__(self, "attention_kv_heads", self.n_head)
        if self.attention_kv_heads < 1 or self.n_head % self.attention_kv_heads:
            raise UserError(
                f"--attention_kv_heads {self.attention_kv_heads} does not divide the {self.n_head} heads; use 0 for as many, or a divisor"
            )
        if self.attention_window < 0:
            raise UserError(f"--attention_window {self.attention_window} must be at least 0; 0 means the whole context")

    def _layers(self) -> list[int]:
        text = self.attention_layers
        if self.n_layer < 2:
            raise UserError(
                f"--my_testing hybrid needs at least 2 blocks, and --n_layer is {self.n_layer}: "
                "the first one is RWKV-7's; use a larger one, or x070"
            )
        if match := re.fullmatch(r"1/(\d+)", text):
            each = int(match[1])
            if each < 2:
                raise UserError(
                    f"--attention_layers {text} would take block 0 too, which must be RWKV-7's; use 1/2, 1/3, ... or numbers like 3,7,11"
                )
            return list(range(each - 1, self.n_layer, each)) or [self.n_layer - 1]
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise UserError(f"--attention_layers {text!r} is neither numbers of blocks like 3,7,11 nor a share like 1/4")
        layers = sorted({int(number) for number in text.split(",")})
        if layers[0] == 0:
            raise UserError(
                f"--attention_layers {text} names block 0, which must be RWKV-7's: "
                "the other blocks' values lean on its own (v_first); leave it out"
            )
        if layers[-1] >= self.n_layer:
            raise UserError(
                f"--attention_layers {text} names block {layers[-1]}, but --n_layer {self.n_layer} has blocks 0 to {self.n_layer - 1}"
            )
        return layers

    @property
    def attention(self) -> tuple[int, ...]:
        """The blocks with attention."""
        return tuple(map(int, self.attention_layers.split(",")))

    def seen(self, ctx_len: int) -> float:
        """Tokens that a token of a sequence sees on average, itself included."""
        window = min(self.attention_window or ctx_len, ctx_len)
        return window - window * (window - 1) / (2 * ctx_len)
