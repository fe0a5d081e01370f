"""How much arithmetic a token is, and how much a device could do: for the MFU in the logs."""

from __future__ import annotations

import torch

from .. import models
from ..config import ModelConfig

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets (without sparsity); the first name that the device's contains counts.
PEAK = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A40": 150, "A30": 165, "A10": 125, "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def flops_per_token(sizes: ModelConfig) -> int:
    """Of forward and backward, nothing recomputed: 6 for each weight of a matrix product, 27 N C for each layer's state.

    The recurrence takes 9 N^2 a head: decay 1, and 2 each for S a, its product with b, v k and S r; the backward pass twice that.
    """
    with torch.device("meta"):
        named = dict(models.build(sizes).named_parameters())
    weights = sum(p.numel() for name, p in named.items() if p.dim() == 2 and not name.startswith("emb.") and not name.endswith("r_k"))
    return 6 * weights + 27 * sizes.head_size * sizes.n_embd * sizes.n_layer


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bf16; None for a CPU, whose peak nobody knows, and for unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK.items() if known in name), None)
