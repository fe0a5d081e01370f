"""The shape of RWKV-7 TTT Phantom: RWKV-7's sizes, its Ghost layers and its test-time training. Both switched off, it is RWKV-7."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from .errors import UserError
from .model import HEAD_SIZES, MATRICES, ModelConfig

ACTIVATIONS = ("identity", "relu")
TTT_KINDS = ("state", "memory")
TTT_TARGETS = ("stored", "value")
FIRST_STEP = {"state": 0.01, "memory": 0.5}
OF_OLDER_MEMORY = ("memory_dim", "memory_rows")
OF_STATE = (
    "ttt_chunk",
    "ttt_steps",
    "ttt_second_order",
    "ttt_meta",
    "ttt_core_ratio",
    "ttt_head",
    "ttt_target",
    "ttt_anchor",
    "ttt_loss_weight",
)
OF_TTT = (*OF_STATE, "ttt_kind", "ttt_lr", "ttt_features")
TRAINING_ONLY = ("ttt_second_order", "ttt_meta", "ttt_loss_weight", "dropout")


@dataclass(frozen=True)
class PhantomConfig(ModelConfig):
    """Settings of a Phantom; those of TRAINING_ONLY change how it is trained, all others what it computes.

    core_ratio        share of each large matrix's rows that are trained in full; 1: no Ghost layers
    core_ratios       other shares for some matrices, as "ffn.key=1,att.output=0.5"
    ghost_activation  between core and ghost. The identity is the default: it lost less than ReLU at equal parameters (first evidence)
    ghost_permuted    rows are stored in another order, as a factorised RWKV-7 needs them
    max_depth_iter    passes through each block
    ttt_enabled       test-time training, of kind "state" (steps on the wkv state) or "memory" (on fast weights beside it, layers/memory.py)
    ttt_lr            step size per token at the start; None: 0.01 for "state", 0.5 for "memory". The steps on the state average
                      over the segment, so that eta starts at ttt_lr * ttt_chunk: 0.01 alone moved the state by 0.1 % and did nothing
    ttt_features      features of each key of the "memory", one of HEAD_SIZES and no less than head_size; None: twice head_size, at most 128

    Of "state" alone ("memory" makes a step after each token):
    ttt_chunk         tokens per segment, a multiple of 16
    ttt_steps         gradient steps per segment
    ttt_core_ratio    share of the state's value rows that are stepped on, rounded up to a multiple of 8
    ttt_head          a small prediction head in the inner loss
    ttt_target        "stored": what the delta rule has stored for a key, v (k . kk); "value": v. The default is "stored": against v
                      alone, which is two to three times smaller, the step mostly shrinks the state
    ttt_anchor        weight of the squared distance from the state before the steps; without effect when ttt_steps is 1
    ttt_second_order  False: the inner gradient is a constant to the outer loss
    ttt_meta          adds ttt_loss_weight * the inner loss on the segment after the step
    """

    model_type: str = "phantom"
    core_ratio: float = 0.2
    core_ratios: str = ""
    ghost_activation: str = "identity"
    ghost_permuted: bool = False
    ttt_enabled: bool = True
    ttt_kind: str = "state"
    ttt_chunk: int = 64
    ttt_lr: float | None = None
    ttt_steps: int = 1
    ttt_core_ratio: float = 0.25
    ttt_head: bool = True
    ttt_target: str = "stored"
    ttt_anchor: float = 0.01
    ttt_features: int | None = None
    max_depth_iter: int = 1
    layer_norm_eps: float = 1e-5
    ttt_second_order: bool = True
    ttt_meta: bool = False
    ttt_loss_weight: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("ghost_activation", ACTIVATIONS), ("ttt_kind", TTT_KINDS), ("ttt_target", TTT_TARGETS)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)!r} is not known; choose one of: {', '.join(choices)}")
        for name in ("core_ratio", "ttt_core_ratio"):
            _check_ratio(f"--{name}", getattr(self, name))
        parse_ratios(self.core_ratios)
        for name in ("ttt_steps", "max_depth_iter"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("ttt_lr", "ttt_features"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._default(name))
        for name in ("ttt_lr", "layer_norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("ttt_anchor", "ttt_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must be at least 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout} must lie in [0, 1)")
        if self.ttt_kind == "state" and (self.ttt_chunk < 16 or self.ttt_chunk % 16):
            raise UserError(f"--ttt_chunk {self.ttt_chunk} is not a multiple of 16; use 16, 32, 48, 64, ...")
        if self.has_memory and (self.ttt_features not in HEAD_SIZES or self.ttt_features < self.head_size):
            fitting = [size for size in HEAD_SIZES if size >= self.head_size]
            raise UserError(
                f"--ttt_features {self.ttt_features} does not go with --head_size {self.head_size}; "
                f"use one of: {', '.join(map(str, fitting))}"
            )
        if self.ttt_enabled and self.first_step >= 2:
            times = f" times --ttt_chunk {self.ttt_chunk} is {self.first_step:g}" if self.steps_on_state else ""
            raise UserError(
                f"--ttt_lr {self.ttt_lr}{times}, but steps of 2 and more diverge; use --ttt_lr below {2 * self.ttt_lr / self.first_step:g}"
            )

    def _default(self, name: str) -> object:
        """What a setting is where none is given."""
        derived = {"ttt_lr": FIRST_STEP[self.ttt_kind], "ttt_features": min(2 * self.head_size, HEAD_SIZES[-1])}
        return derived.get(name, getattr(PhantomConfig, name))

    @property
    def steps_on_state(self) -> bool:
        return self.ttt_enabled and self.ttt_kind == "state"

    @property
    def has_memory(self) -> bool:
        return self.ttt_enabled and self.ttt_kind == "memory"

    @property
    def memory_flops(self) -> int:
        """In a layer, for each token, forward: the features of a query and of a key, and M read by both and changed twice."""
        return 16 * self.head_size * self.ttt_features * self.n_head

    @property
    def first_step(self) -> float:
        """eta, which stays below 2, at the start."""
        return self.ttt_lr * (self.ttt_chunk if self.steps_on_state else 1)

    @property
    def has_ttt_head(self) -> bool:
        """Whether the inner loss has its prediction head: not where nothing would train it."""
        return self.ttt_head and (self.ttt_second_order or self.ttt_meta)

    @property
    def ttt_rows(self) -> int:
        """Value rows of a head's state that TTT steps on."""
        return 8 * math.ceil(self.ttt_core_ratio * self.head_size / 8)

    def core_rows(self, matrix: str) -> int:
        """Rows of a Ghost layer's core in the place of this matrix of MATRICES; 0 where it stays dense because nothing would be saved.

        c (in + out - c) < in out just when c < min(in, out).
        """
        inputs, outputs = self.matrix_shape(matrix)
        ratio = parse_ratios(self.core_ratios).get(matrix, self.core_ratio)
        rows = max(8, 8 * round(ratio * outputs / 8))
        return rows if ratio < 1 and rows < min(inputs, outputs) else 0

    def parts(self) -> dict[str, tuple[int, int]]:
        found = {}
        for matrix, (inputs, outputs) in super().parts().items():
            rows = self.core_rows(matrix)
            found |= {f"{matrix}.core": (inputs, rows), f"{matrix}.ghost": (rows, outputs - rows)} if rows else {matrix: (inputs, outputs)}
        return found

    @property
    def has_ghosts(self) -> bool:
        return any(map(self.core_rows, MATRICES))

    @property
    def is_plain(self) -> bool:
        """Whether this is RWKV-7: its files are plain RWKV-7 files then."""
        return not (self.has_ghosts or self.ttt_enabled or self.max_depth_iter > 1 or self.layer_norm_eps != 1e-5)

    def idle(self, name: str) -> str:
        if name == "ttt_head" and self.ttt_head and not self.has_ttt_head:
            return "with --ttt_second_order 0 and without --ttt_meta 1 nothing would train it"
        if getattr(self, name) == self._default(name):
            return ""
        if name == "ghost_activation" and not self.has_ghosts:
            return "there are no Ghost layers"
        if name == "core_ratio" and len(parse_ratios(self.core_ratios)) == len(MATRICES):
            return "--core_ratios names every matrix"
        if name == "core_ratio" and self.core_ratio < 1 and not self.has_ghosts:
            return "the cores would be so large that every matrix stays as it is"
        if name in OF_TTT and not self.ttt_enabled:
            return "--ttt_enabled is 0"
        if name in OF_STATE and self.has_memory:
            return "--ttt_kind is memory"
        if name == "ttt_features" and self.steps_on_state:
            return "--ttt_kind is state"
        if name == "ttt_anchor" and self.ttt_steps == 1:
            return "--ttt_steps is 1, and before the first step it pulls nowhere"
        if name == "ttt_loss_weight" and not self.ttt_meta:
            return "--ttt_meta is 0"
        return ""

    def carried(self) -> dict[str, object]:
        """What a weight file must say because the shapes of its tensors do not: Phantom's own settings that change what it computes."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(ModelConfig)} - set(TRAINING_ONLY)
        return {name: value for name, value in self.as_dict().items() if name in own} | {"ttt_head": self.has_ttt_head}


CARRIED = "phantom_config"  # the tensor by which a weight file says what shapes do not
CARRIED_BYTES = 512


def encode(config: PhantomConfig) -> list[int]:
    """What is carried, as JSON in a fixed number of bytes, each a number of one more tensor: bfloat16 is exact up to 256."""
    text = json.dumps(config.carried(), separators=(",", ":")).encode().ljust(CARRIED_BYTES)
    if len(text) > CARRIED_BYTES:
        raise UserError(f"--core_ratios is {len(config.core_ratios)} characters long; shorten it")
    return list(text)


def decode(numbers: Iterable[float]) -> dict[str, object]:
    """The inverse of encode, as fields of a PhantomConfig. Raises UserError for anything that encode has not written."""
    try:
        found = json.loads(bytes(int(n) for n in numbers))
        known = {f.name for f in fields(PhantomConfig)}
        if not isinstance(found, dict) or found.keys() - known - set(OF_OLDER_MEMORY):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(
            "the checkpoint's phantom_config cannot be read: it is damaged or of a newer version; use the version that wrote it"
        ) from None
    return as_now(found)


def as_now(found: Mapping[str, object]) -> dict[str, object]:
    """Settings as an older version wrote them, without the sizes of the memory that there was then. UserError where that is used."""
    if found.keys() & set(OF_OLDER_MEMORY) and found.get("ttt_enabled") and found.get("ttt_kind") == "memory":
        raise UserError("the model has the memory that there was until November 2026; use the version that wrote it (commit abf24d8)")
    return {name: value for name, value in found.items() if name not in OF_OLDER_MEMORY}


def parse_ratios(text: str) -> dict[str, float]:
    """ "ffn.key=1,att.output=0.5" -> {"ffn.key": 1.0, "att.output": 0.5}. UserError naming what is wrong."""
    ratios = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in MATRICES:
            raise UserError(f"--core_ratios names {name!r}; write MATRIX=RATIO,... with matrices of: {', '.join(MATRICES)}")
        try:
            ratios[name] = float(number)
        except ValueError:
            raise UserError(f"--core_ratios {part!r}: {number!r} is not a number; write MATRIX=RATIO,...") from None
        _check_ratio(f"--core_ratios {name}", ratios[name])
    return ratios


def core_ratio_of(core_ratio: float | None, ghost_ratio: float | None) -> float | None:
    """The core ratio that two flags mean; None when neither is given. UserError when they do not sum to 1."""
    if ghost_ratio is None:
        return core_ratio
    if core_ratio is not None and abs(core_ratio + ghost_ratio - 1) > 1e-6:
        raise UserError(f"--core_ratio {core_ratio} and --ghost_ratio {ghost_ratio} do not sum to 1; give only one of them")
    return 1 - ghost_ratio if core_ratio is None else core_ratio


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise UserError(f"{name} {ratio} must lie in (0, 1]")
