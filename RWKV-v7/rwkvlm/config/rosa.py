"""The shape of RWKV-8 with ROSA: RWKV-7's sizes, what its symbols are, and how their bits are trained."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError
from .model import ModelConfig

BITS = (1, 4)
GRADS = ("flip", "soft", "none")
TRAINING_ONLY = ("rosa_grad", "rosa_tau")


@dataclass(frozen=True)
class RosaConfig(ModelConfig):
    """Settings of a model with ROSA: x080 has it beside RWKV-7's time mixing, rosa in its place.

    Those of TRAINING_ONLY change how it is trained, all others what it computes.

    rosa_bits   channels that make a symbol together. On a miss 1 bit gives -emb, 4 bits give 0 (the official layers differ there)
    rosa_grad   the gradient of a bit: "flip": exactly, from what the loss would be if the bit were the other one; "soft": a dense
                surrogate. It trains q, k and v, q and k mostly together, and a tenth of it what is below (layers/rosa.py).
                "none": there is none, and q, k and v stay as they are
    rosa_tau    least size of an activation in the gradient of its bit, which falls with its distance from 0: with the 1e-3 of the
                official 1-bit self layer those nearest to 0 would get most of it
    deep_embed  DeepEmbed: the output of channel mixing is multiplied by a learned vector of the token, in each block
    ln0         block 0 normalises the embedding; False only for a file that has no ln0, as RWKV-LM's toys: no flag sets it
    """

    model_type: str = "x080"
    rosa_bits: int = 4
    rosa_grad: str = "flip"
    rosa_tau: float = 0.1
    deep_embed: bool = False
    ln0: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rosa_bits not in BITS:
            raise UserError(f"--rosa_bits {self.rosa_bits} is not supported; choose one of: {', '.join(map(str, BITS))}")
        if self.rosa_grad not in GRADS:
            raise UserError(f"--rosa_grad {self.rosa_grad!r} is not known; choose one of: {', '.join(GRADS)}")
        if not 0 < self.rosa_tau < float("inf"):
            raise UserError(f"--rosa_tau {self.rosa_tau} must be above 0")

    @property
    def has_time_mixing(self) -> bool:
        return self.model_type == "x080"

    def idle(self, name: str) -> str:
        if name == "rosa_tau" and self.rosa_grad != "flip" and self.rosa_tau != RosaConfig.rosa_tau:
            return f"--rosa_grad is {self.rosa_grad}"
        return ""
