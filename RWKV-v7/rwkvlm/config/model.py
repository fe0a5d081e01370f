"""The shape of a model. Every derived size is computed here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from .errors import UserError

MODEL_TYPES = ("x070", "phantom", "hybrid", "x080", "rosa", "x040")
HEAD_SIZES = (16, 32, 64, 128)
OF_TIME_MIXING = ("head_size", "rank_w", "rank_a", "rank_v", "rank_g")
UNUSED = {"x040": OF_TIME_MIXING, "rosa": OF_TIME_MIXING}  # by model type: sizes that mean nothing to it, and are 0 there
MULTIPLES = {"x040": 32, "rosa": 16}  # of which the width must be one, in models without heads
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")  # the large ones of a block


def low_rank(factor: float, n_embd: int) -> int:
    """Inner size of a low-rank map: `factor * sqrt(n_embd)` rounded (half to even) to a multiple of 32, at least 32."""
    return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; 0 means "derive it". After construction every field is a real size.

    Source of the derived sizes: RWKV-LM, RWKV-v7/train_temp (decay and in-context rate 2.5, value 1.7, gate 5).
    Raises UserError naming the field when sizes do not fit together.
    """

    model_type: str = "x070"
    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    head_size: int = 64
    dim_ffn: int = 0  # hidden size of channel mixing; 0 = 4 * n_embd
    rank_w: int = 0  # decay
    rank_a: int = 0  # in-context learning rate
    rank_v: int = 0  # value residual
    rank_g: int = 0  # output gate
    ranks: str = ""  # of large matrices that are two factors, in every block, as "att.key=16,ffn.value=24"; compression makes them

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"--my_testing {self.model_type!r} is not a known model; choose one of: {', '.join(MODEL_TYPES)}")
        for name in ("n_layer", "n_embd", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in self.unused:
            object.__setattr__(self, name, 0)
        if "head_size" in self.unused:
            if self.n_embd % (multiple := MULTIPLES[self.model_type]):
                raise UserError(
                    f"--n_embd {self.n_embd} is not a multiple of {multiple}, which --my_testing {self.model_type} needs; change it"
                )
        elif self.head_size not in HEAD_SIZES:
            raise UserError(f"--head_size {self.head_size} is not supported; choose one of: {', '.join(map(str, HEAD_SIZES))}")
        elif self.n_embd % self.head_size:
            raise UserError(f"--n_embd {self.n_embd} is not a multiple of --head_size {self.head_size}; change one of them")
        derived = {
            "dim_ffn": 4 * self.n_embd,
            "rank_w": low_rank(2.5, self.n_embd),
            "rank_a": low_rank(2.5, self.n_embd),
            "rank_v": low_rank(1.7, self.n_embd),
            "rank_g": low_rank(5.0, self.n_embd),
        }
        for name, value in derived.items():
            given = getattr(self, name)
            if given < 0:
                raise UserError(f"--{name} is {given}; it must be positive, or 0 to derive it")
            if given == 0 and name not in self.unused:
                object.__setattr__(self, name, value)
        for name, rank in self.rank_of().items():
            if name not in self.parts() or rank < 1:
                raise UserError(
                    f"{name} is two factors of rank {rank}, but this model's matrices are {', '.join(self.parts())}: "
                    "a factorised matrix cannot become a Ghost layer; use --core_ratio 1"
                )

    def rank_of(self) -> dict[str, int]:
        """The ranks by name; a matrix that is in one piece has none."""
        return {name: int(rank) for name, _, rank in (part.partition("=") for part in self.ranks.split(",") if part)}

    def matrix_shape(self, matrix: str) -> tuple[int, int]:
        """Inputs and outputs of one of MATRICES."""
        return {"ffn.key": (self.n_embd, self.dim_ffn), "ffn.value": (self.dim_ffn, self.n_embd)}.get(matrix, (self.n_embd, self.n_embd))

    def parts(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices that a block's large matrices are made of, by name."""
        return {matrix: self.matrix_shape(matrix) for matrix in MATRICES}

    @property
    def unused(self) -> tuple[str, ...]:
        """Sizes that mean nothing to a model of this type."""
        return UNUSED.get(self.model_type, ())

    def idle(self, name: str) -> str:
        """Why a setting of its own type has no effect beside the others; "" where it may have one, or is the default."""
        return ""

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size if self.head_size else 0

    def with_(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed; sizes are checked again."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
