"""From a weight file to one as RWKV-7's releases are: no unread tensors, dense matrices in the place of factors and Ghost layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.pth import UNUSED, load_weights, model_from
from ..config import PhantomConfig, UserError
from ..config.model import MATRICES
from ..config.phantom import CARRIED
from ..models import read_config
from .output import check_output, save_output
from .weights import whole

# as RWKV-LM's rwkv_v7_numpy.py takes them
RELEASED = "ln1 ln2 ln0 x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a".split()
OF_MATRIX = re.compile(rf"(blocks\.\d+\.(?:{'|'.join(map(re.escape, MATRICES))}))\..+")


def export_file(path: str | Path, out: str | Path) -> None:
    """Writes the model of `path` to `out` for programs that know RWKV-7 only.

    Raises UserError for a model that no RWKV-7 can compute, and for files that cannot be read or written.
    """
    path, out = Path(path), Path(out)
    check_output(path, out)
    weights = load_weights(path)
    if reason := _not_rwkv7(weights):
        raise UserError(f"--model {path} {reason}")
    own = model_from(weights, "cpu", torch.bfloat16).state_dict()  # refuses a file that does not fit together
    save_output(path, out, released({name: tensor.reshape(own[name].shape) for name, tensor in weights.items()}), first=RELEASED)


def _not_rwkv7(weights: Mapping[str, torch.Tensor]) -> str:
    """Why no RWKV-7 can compute what this model does; "" where one can."""
    config, what = read_config(weights), ""
    if config.model_type == "x040":
        return "holds an RWKV-4, whose files are as released ones are: programs for RWKV-4 take this one as it is"
    if isinstance(config, PhantomConfig):
        for name, value in (("ttt_enabled", False), ("ghost_activation", "identity"), ("max_depth_iter", 1), ("layer_norm_eps", 1e-5)):
            if getattr(config, name) != value:
                what = f"Phantom with {name} {getattr(config, name)}"
    elif config.model_type != "x070":
        what = f"model of type {config.model_type}"
    return what and f"holds a {what}: programs for RWKV-7 would compute something else; only this one can run it"


def released(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the same model in the released form; its matrices in bfloat16, rounded where they are products."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name in UNUSED or name == CARRIED:
            continue
        if not (match := OF_MATRIX.fullmatch(name)):
            found[name] = tensor
        elif (matrix := f"{match[1]}.weight") not in found:
            found[matrix] = whole(weights, match[1]).bfloat16()
    return found
