"""FLOPs of a token and peak FLOP/s of a device, for the MFU in the logs."""

from __future__ import annotations

import re

import torch

from .. import models
from ..config import HybridConfig, ModelConfig, PhantomConfig

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets, without sparsity (RTX 4090 D: by its multiprocessors, 114 of
# 128). The first that stands in the device's name, as whole words, counts.
PEAK = {
    "GB200": 2500, "B200": 2250,
    "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L20": 119.5, "L4": 121, "A40": 150, "A30": 165, "A10": 125,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090 D": 147, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def flops_per_token(sizes: ModelConfig, ctx_len: int | None = None) -> int:
    """Of forward and backward in a long text, nothing recomputed.

    Matrix products: 6 for each weight whenever it is used; 2 where nothing is trained, nor anything below: q, k and v with
    --rosa_grad none. (--freeze, which is no matter of sizes, does not count.) Embeddings are not multiplied, DeepEmbed's
    no more than the first one; ROSA compares bits, which is no arithmetic of this kind.

    The state of a layer: 27 N C. The recurrence takes 9 N^2 a head: decay 1, and 2 each for S a, its product with b, v k
    and S r; the backward pass twice that. That of RWKV-4 takes 11 a channel beside its exponentials: two weighted means of
    numerator and denominator, and their quotient.

    Attention: 12 C for each token that a token sees, on average over a sequence of ctx_len, which no other model needs:
    q k^T and its product with v.
    """
    with torch.device("meta"):
        named = dict(models.build(sizes).named_parameters())
    products = {
        name: p
        for name, p in named.items()
        if p.dim() == 2 and not name.startswith("emb.") and not name.endswith(("r_k", "enn.weight")) and ".ttt." not in name
    }
    weights = {name: p.numel() * (6 if p.requires_grad else 2) for name, p in products.items()}
    head = weights.pop("head.weight")
    layer = 33 * sizes.n_embd if sizes.model_type == "x040" else 27 * sizes.head_size * sizes.n_embd  # 0 without heads
    passes = 1
    if isinstance(sizes, PhantomConfig):
        passes, layer = sizes.max_depth_iter, layer + _of_test_time_training(sizes)
    states, seen = sizes.n_layer * layer, 0
    if isinstance(sizes, HybridConfig):
        states -= len(sizes.attention) * layer
        seen = round(12 * sizes.n_embd * len(sizes.attention) * sizes.seen(ctx_len))
    return head + passes * (sum(weights.values()) + states) + seen


def _of_test_time_training(sizes: PhantomConfig) -> int:
    """In a layer, for each token; a step at the end of a segment is shared out among its tokens."""
    N = sizes.head_size
    if sizes.has_memory:
        return 3 * sizes.memory_flops
    if not sizes.steps_on_state:
        return 0
    c, hidden = sizes.ttt_rows, sizes.ttt_rows // 4 if sizes.has_ttt_head else 0
    read, step, head = 2 * c * N, 2 * c * N, 8 * c * hidden  # S kk, gradient^T kk, and W1, W2 each forwards and backwards
    if sizes.ttt_second_order:
        each = 3 * (read + step + head)
    else:  # only the step itself has a derivative, for its size
        each = read + 2 * step + head
    meta = 3 * (read + head // 2) if sizes.ttt_meta else 0
    return sizes.n_head * (sizes.ttt_steps * each + meta)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bf16; None for a CPU, whose peak nobody knows, and for unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # an A10G is no A10, an RTX A4000 no A40
    return next((1e12 * peak for known, peak in PEAK.items() if re.search(rf"\b{known}\b", name)), None)
