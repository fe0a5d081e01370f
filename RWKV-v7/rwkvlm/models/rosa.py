"""RWKV-8 with ROSA (x080): RWKV-7 with exact recall beside its time mixing; and the pure ROSA model (rosa), which has it in its place.

Source: RWKV-LM, RWKV-v8, whose names and starting values these are, but for ROSA's o, which begins smaller, and k,
which begins as q; where its files have none (embedding, head, channel mixing), RWKV-7's. The learning rate of q, k and
v is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..config import RosaConfig, UserError, model_config
from ..config.rosa import BITS
from ..layers.channel_mix import ChannelMix, DeepChannelMix
from ..layers.norm_mix import NormMix
from ..layers.packed import Packed
from ..layers.rosa import RosaMix, RosaMixState
from ..layers.time_mix import TimeMix
from . import rwkv7
from .lm import LanguageModel
from .rwkv7 import BLOCK, FFN, constant
from .sizes import Sizes
from .table import Row, Slot

CARRIED = "rosa_bits"  # the tensor by which a weight file says what shapes do not


class RosaBlockState(NamedTuple):
    """att_x, wkv, ffn_x: as in BlockState, the first two None without time mixing."""

    att_x: torch.Tensor | None
    wkv: torch.Tensor | None
    rosa: RosaMixState
    ffn_x: torch.Tensor


class RosaBlock(nn.Module):
    """`x += att(ln1(x)) + rosa(ln3(x)); x += ffn(ln2(x))`, in the pure ROSA model without att.

    Block 0 also normalises the embedding with ln0, if it has one.
    """

    def __init__(self, config: RosaConfig, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.ln0 = nn.LayerNorm(C) if layer == 0 and config.ln0 else None
        self.ln1 = NormMix(C) if config.has_time_mixing else None
        self.ln2 = NormMix(C)
        self.ln3 = NormMix(C)
        self.att = TimeMix(config, layer) if config.has_time_mixing else None
        self.rosa = RosaMix(config)
        if self.rosa.fixed:
            self.ln3.requires_grad_(False)  # which leads nowhere else
        self.ffn = (DeepChannelMix if config.deep_embed else ChannelMix)(config)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> RosaBlockState:
        x = torch.zeros(batch, *self.ln2.normalized_shape, device=device, dtype=dtype)
        att_x, wkv = (None, None) if self.att is None else (x.clone(), self.att.init_state(batch, device, dtype))
        return RosaBlockState(att_x, wkv, RosaMixState(x.clone(), None), x)

    def forward(
        self,
        x: torch.Tensor,
        beside: tuple[torch.Tensor, torch.Tensor | None],
        state: RosaBlockState | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None], RosaBlockState | None]:
        """x: [B, T, C] residual stream; beside: the tokens [B, T] and block 0's value, None in block 0.

        Returns x, beside, and the new state or None.
        """
        tokens, v_first = beside
        att_x, wkv, seen, ffn_x = state if state is not None else (None, None, None, None)
        if self.ln0 is not None:
            x = self.ln0(x)
        x, branch, seen = self.rosa(x, self.ln3, seen, return_state, packed)
        if self.att is not None:
            x, att, v_first, att_x, wkv = self.att(x, self.ln1, v_first, att_x, wkv, return_state, packed)
            branch = att + branch
        more = (tokens,) if isinstance(self.ffn, DeepChannelMix) else ()
        x, ffn, ffn_x = self.ffn(x, branch, self.ln2, ffn_x, packed, *more)
        return x + ffn, (tokens, v_first), RosaBlockState(att_x, wkv, seen, ffn_x) if return_state else None


class Rosa(LanguageModel):
    def __init__(self, config: RosaConfig) -> None:
        super().__init__(config, [RosaBlock(config, layer) for layer in range(config.n_layer)])
        self.register_buffer(CARRIED, torch.empty(1))

    def beside(self, idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return idx, None


build = Rosa


def is_rosa(tensors: Mapping[str, torch.Tensor]) -> bool:
    return "blocks.0.rosa.q.weight" in tensors


def config_of(tensors: Mapping[str, torch.Tensor], bits: int = 0) -> RosaConfig:
    """Type and sizes from the names and shapes of a checkpoint.

    The bits of a symbol, which these do not say, come from the tensor that our files carry, else from `bits`. UserError
    where neither says it, as with the official files.
    """
    if CARRIED in tensors:
        bits = int(tensors[CARRIED]) if tensors[CARRIED].numel() == 1 and tensors[CARRIED] in BITS else -1
        if bits < 0:
            raise UserError(
                f"the checkpoint's {CARRIED} cannot be read: it is damaged or of a newer version; use the version that wrote it"
            )
    if not bits:
        raise UserError(
            f"the checkpoint has ROSA layers, but no tensor {CARRIED}: "
            "whether their symbols have 1 bit or 4 its shapes do not say; give --rosa_bits, "
            "with train.py --train_stage 1 --load_model it writes a file that says so"
        )
    if "blocks.0.att.r_k" in tensors:
        given = rwkv7.config_of(tensors).as_dict() | {"model_type": "x080"}
    else:
        sizes = Sizes(tensors, "a ROSA", "rosa")
        vocab_size, n_embd = sizes.shape("emb.weight", 2)
        given = dict(
            model_type="rosa",
            n_layer=sizes.n_layer(),
            n_embd=n_embd,
            vocab_size=vocab_size,
            dim_ffn=sizes.shape("blocks.0.ffn.key.weight", 2)[0],
        )
    return model_config(**given, rosa_bits=bits, deep_embed="blocks.0.ffn.enn.weight" in tensors, ln0="blocks.0.ln0.weight" in tensors)


def adapted(tensors: Mapping[str, torch.Tensor], model: LanguageModel) -> dict[str, torch.Tensor]:
    """A file's weights in the form that the model has them.

    Official files have in each block a ln0 that nothing reads, and do not carry the bits.
    """
    own = model.state_dict()
    return {CARRIED: own[CARRIED]} | {name: tensor for name, tensor in tensors.items() if ".ln0." not in name or name in own}


def _linear(s: Slot) -> torch.Tensor:
    """As torch begins a Linear, weight and bias alike: both read C inputs."""
    bound = s.config.n_embd**-0.5
    return torch.empty(s.shape).uniform_(-bound, bound, generator=s.generator)


def _output(s: Slot) -> torch.Tensor:
    """Smaller the more blocks there are, for what it reads is noise at first.

    Not 0, as RWKV-7's: with that recall is learned less surely (records/2026-11-26-rosa-gradient).
    """
    return _linear(s) / s.config.n_layer


ROSA = BLOCK + r"rosa\."
# A token's query is its key at first, so each symbol finds where it has been before, as in the official self layers.
# Where they begin apart only chance brings them together, mostly in one symbol of eight, and what that one cannot tell
# apart stays so (records/2026-11-27-rosa-copy).
AS_QUERIES = (".k.", ".q.")
# the factor on the learning rate of q, k and v: on text the symbols that they begin with are good already, and moved fast
# they cost 0.05 to 0.1 nats a byte (same record)
OF_BITS = 0.1

TABLE = [
    Row(CARRIED, lambda s: torch.full(s.shape, float(s.config.rosa_bits))),
    Row(BLOCK + r"ln3\.weight", constant(1.0)),
    Row(BLOCK + r"ln3\.bias", constant(0.0)),
    Row(ROSA + r"x_[qkv]", constant(0.0)),
    Row(ROSA + r"k\.weight", _linear, lr=OF_BITS, decay=True, like=AS_QUERIES),
    Row(ROSA + r"k\.bias", _linear, lr=OF_BITS, like=AS_QUERIES),
    Row(ROSA + r"[qv]\.weight", _linear, lr=OF_BITS, decay=True),
    Row(ROSA + r"[qv]\.bias", _linear, lr=OF_BITS),
    Row(ROSA + r"o\.weight", _output, decay=True),
    Row(ROSA + r"o\.bias", _output),
    Row(ROSA + r"rosa_qkv\.emb", constant(1.0)),
    Row(FFN + r"enn\.weight", constant(1.0)),
    *rwkv7.TABLE,
]
