"""Which number format is the faster one on a device: what --precision auto means."""

from __future__ import annotations

import torch


def fastest_precision(device: torch.device) -> str:
    """"bf16" where matrix products in bfloat16 have hardware of their own (GPU tensor cores, AMX, AVX512-BF16), else "fp32".

    Decided from what the processor says it has, not by timing: a run must find the same answer when it is started again.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = (getattr(torch.cpu, f"_is_{feature}_supported", lambda: False) for feature in ("amx_tile", "avx512_bf16"))
    return "bf16" if any(probe() for probe in has) else "fp32"
