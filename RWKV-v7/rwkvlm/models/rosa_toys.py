"""Parameter names of RWKV-LM's small ROSA models (RWKV-v8: 251024_rosaQKV, 251105_reverse, 260123_reverse), translated to those of x080."""

from __future__ import annotations

import re

import torch

from ..config import UserError
from .sizes import Sizes

# e; in block i, from 1: ln{i}a and rwkv{i}, ln{i}b and ffn{i}, ln{i}c and rosa{i}; lno; o
OUTER = {"e": "emb", "lno": "ln_out", "o": "head"}
IN_BLOCK = {r"rwkv(\d+)": "att", r"ffn(\d+)": "ffn", r"rosa(\d+)": "rosa", r"ln(\d+)a": "ln1", r"ln(\d+)b": "ln2", r"ln(\d+)c": "ln3"}


def by_usual_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A toy's weights as x080 has them, without ln0; any other file's as they are. UserError for a toy that x080 cannot be."""
    if "e.weight" not in tensors or "o.weight" not in tensors:
        return tensors
    if "emb_rosa.emb.weight" in tensors:
        raise UserError(
            "the checkpoint is a stack of ROSA layers that read their own input (emb_rosa, rosa1.emb0), which no --my_testing is; "
            "bench/rosa_tasks.py trains such stacks, and of RWKV-LM's toys those with rosa1.q can be used"
        )
    usual = {_usual(name): tensor for name, tensor in tensors.items()}
    if "head.bias" in usual:
        usual["ln_out.bias"] = _with_head_bias(usual.pop("head.bias"), Sizes(usual, "a ROSA", "x080"))
    return usual


def _usual(name: str) -> str:
    part, _, rest = name.partition(".")
    for pattern, usual in IN_BLOCK.items():
        if found := re.fullmatch(pattern, part):
            return f"blocks.{int(found[1]) - 1}.{usual}.{rest}"
    return f"{OUTER.get(part, part)}.{rest}"


def _with_head_bias(bias: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """ln_out.bias with so much added that the head puts out its bias, which no other model has.

    That is possible where the head's rows are independent.
    """
    rows, columns = sizes.shape("head.weight", 2)
    if bias.shape == (rows,) and sizes.shape("ln_out.bias", 1) == (columns,):
        head, bias = sizes.tensors["head.weight"].double(), bias.double()
        more = torch.linalg.pinv(head.nan_to_num()) @ bias
        if torch.allclose(head @ more, bias):
            return (sizes.tensors["ln_out.bias"] + more).to(sizes.tensors["ln_out.bias"].dtype)
    raise UserError(
        f"the checkpoint's o.bias {list(bias.shape)} cannot become part of lno.bias: "
        f"the {rows} rows of o.weight do not reach it; models here have no bias in the head"
    )
