"""One token through a whole RWKV-7 model on the CPU, as one native call: what decoding at batch 1 repeats.

A token reads every weight once and computes next to nothing, so that it can run at the speed of memory; as PyTorch operators,
50 a block, it does not. Matrices whose numbers all fit bfloat16, as those of every released file do, are kept in it and widened
on the way to the processor: half the memory to read, arithmetic in float32 all the same. The slow reference is the model itself,
models/lm.py, which also reads prompts and serves every other device, batch and model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkvlm import native

# In the order of struct Vectors and of op.cpp.
VECTORS = (
    "ln1.weight ln1.bias att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w0 att.a0 att.v0 att.k_k att.k_a att.r_k"
    " att.ln_x.weight att.ln_x.bias ln2.weight ln2.bias ffn.x_k"
).split()
MATRICES = (
    "att.receptance.weight att.key.weight att.value.weight att.w1 att.a1 att.v1 att.g1 att.w2 att.a2 att.v2 att.g2"
    " att.output.weight ffn.key.weight ffn.value.weight"
).split()
NORMS = ("blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias")


def why_not() -> str:
    """"" when the step runs here (it is then built and loaded), else the reason."""
    return native.available("rwkv7_step")[1]


class Rwkv7Step:
    """The step of one model. Reads the weights when it is made: later changes of them do not reach it."""

    def __init__(self, weights: Mapping[str, Tensor], n_layer: int, head_size: int) -> None:
        """weights: the model's state dict, on the CPU, float32 or bfloat16. Only where `why_not` has returned ""."""
        self.head_size = head_size
        weights = {name: t.detach() for name, t in weights.items()}
        for name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):  # unused, and filled by nobody where the file lacks them
            weights[name] = torch.zeros_like(weights[name])
        blocks = [f"blocks.{i}." for i in range(n_layer)]
        names = [*(block + name for block in blocks for name in MATRICES), "head.weight"]
        narrow = all(_fits_bfloat16(weights[name]) for name in names)
        *self.matrices, self.head = (_rows(name, weights[name]).to(torch.bfloat16 if narrow else torch.float32) for name in names)
        self.vectors = [torch.stack([weights[block + name].float().flatten() for name in VECTORS]) for block in blocks]
        self.norms = torch.stack([weights[name].float() for name in NORMS])

    def __call__(self, x: Tensor, att_x: list[Tensor], wkv: list[Tensor], ffn_x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [C], the token's embedding; the state before the token, for each of L blocks: att_x and ffn_x [1, C], wkv [1, H, N, N].

        All float32. Returns logits [V] and the state after the token: [L, 1, C], [L, 1, H, N, N], [L, 1, C].
        """
        return torch.ops.rwkvlm.rwkv7_step(x, self.matrices, self.vectors, self.norms, self.head, att_x, wkv, ffn_x, self.head_size)


def _rows(name: str, matrix: Tensor) -> Tensor:
    """Outputs as rows. The low-rank maps are [in, out] in the files, all other matrices [out, in]."""
    return matrix.t().contiguous() if name[-2:] in {f"{letter}{i}" for letter in "wavg" for i in "12"} else matrix.contiguous()


def _fits_bfloat16(matrix: Tensor) -> bool:
    return matrix.dtype == torch.bfloat16 or torch.equal(matrix.bfloat16().to(matrix.dtype), matrix)
