"""One token through a whole RWKV-7 model on the CPU, as one native call: what decoding at batch 1 repeats.

A token reads every weight once and computes next to nothing, so that it can run at the speed of memory; as PyTorch operators,
50 a block, it does not. Matrices whose numbers all fit bfloat16, as those of every released file do, are kept in it and widened
on the way to the processor: half the memory to read, arithmetic in float32 all the same. The slow reference is the model itself,
models/lm.py, which also reads prompts and serves every other device, batch and model.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from rwkvlm import native

# In the order of struct Vectors and of op.cpp.
VECTORS = (
    "ln1.weight ln1.bias att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w0 att.a0 att.v0 att.k_k att.k_a att.r_k"
    " att.ln_x.weight att.ln_x.bias ln2.weight ln2.bias ffn.x_k"
).split()
LOW_RANK = tuple(f"att.{letter}{i}" for i in "12" for letter in "wavg")  # [in, out] in the files, all other matrices [out, in]
MATRICES = (
    *("att.receptance.weight", "att.key.weight", "att.value.weight"),
    *LOW_RANK,
    *("att.output.weight", "ffn.key.weight", "ffn.value.weight"),
)
NORMS = ("blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias")
LINE = 64  # bytes of a cache line


def why_not() -> str:
    """Empty when the step runs here (it is then built and loaded), else the reason."""
    return native.available("rwkv7_step")[1]


class Rwkv7Step:
    """The step of one model. Reads the weights when it is made: later changes of them need not reach it."""

    def __init__(self, weights: Mapping[str, Tensor], n_layer: int, head_size: int) -> None:
        """weights: the model's own tensors by name, on the CPU, float32 or bfloat16. Only where `why_not` has returned "".

        Matrices that the step keeps as they are move into its memory, so that they are not there twice.
        """
        self.head_size = head_size
        weights = dict(weights)
        for name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):  # unused, and filled by nobody where the file lacks them
            weights[name] = torch.zeros_like(weights[name])
        blocks = [f"blocks.{i}." for i in range(n_layer)]
        names = [*(block + name for block in blocks for name in MATRICES), "head.weight"]
        matrices = [weights[name].detach().t() if name.endswith(LOW_RANK) else weights[name].detach() for name in names]
        dtype = torch.bfloat16 if all(_fits_bfloat16(matrix) for matrix in matrices) else torch.float32
        copies = on_large_pages(matrices, dtype)
        for name, copy in zip(names, copies):
            if weights[name].dtype == dtype and not name.endswith(LOW_RANK):
                weights[name].data = copy
        *self.matrices, self.head = copies
        self.vectors = [torch.stack([weights[block + name].detach().float().flatten() for name in VECTORS]) for block in blocks]
        self.norms = torch.stack([weights[name].detach().float() for name in NORMS])

    def __call__(self, x: Tensor, att_x: list[Tensor], wkv: list[Tensor], ffn_x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [C], the token's embedding; the state before the token, for each of L blocks: att_x and ffn_x [1, C], wkv [1, H, N, N].

        All float32. Returns logits [V] and the state after the token: [L, 1, C], [L, 1, H, N, N], [L, 1, C].
        """
        return torch.ops.rwkvlm.rwkv7_step(x, self.matrices, self.vectors, self.norms, self.head, att_x, wkv, ffn_x, self.head_size)


def _fits_bfloat16(matrix: Tensor) -> bool:
    return matrix.dtype == torch.bfloat16 or torch.equal(matrix.bfloat16().to(matrix.dtype), matrix)


def on_large_pages(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in one piece of memory, on large pages where the system grants them: memory is read up to 1.4 times as fast from these."""
    ends, end = [], 0
    for matrix in matrices:
        end += -(-matrix.numel() * dtype.itemsize // LINE) * LINE
        ends.append(end)
    memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel without them, macOS
        memory.madvise(mmap.MADV_HUGEPAGE)
    copies = []
    for matrix, begin in zip(matrices, [0, *ends]):
        copies.append(torch.frombuffer(memory, dtype=dtype, count=matrix.numel(), offset=begin).view(matrix.shape).copy_(matrix))
    return copies
