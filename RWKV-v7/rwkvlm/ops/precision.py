"""What this processor's matrix products can do: which fp32 path is fast and still fp32, and whether bf16 is faster.

MKL runs fp32 at half speed on AMD, where "medium" takes torch through oneDNN at twice the speed with fp32's error; on Intel
with AMX the same word means bf16, whose error is 10,000 times that. So the choice is measured, on the machine, in under half
a second, and nothing is changed unless asked.
"""

from __future__ import annotations

import time

import torch

SHAPE = (256, 768, 3072)  # tokens, in and out features: a channel mixer of L12-D768, a quarter of it of L6-D256
FP32_ERROR = 1e-6  # rms, relative
GAIN = 1.1  # a different path must be this much faster: less is noise
REPEATS = 5
SECONDS = 0.05  # for the repeats of one measurement


def fp32_matmul_choice() -> tuple[str, str]:
    """What to give torch.set_float32_matmul_precision, measured on the CPU, and a line that says so.

    Of "highest" and "medium" it is the faster one whose error is fp32's.
    """
    before = torch.get_float32_matmul_precision()
    gflops, error = {}, {}
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            gflops[setting], error[setting] = _fp32_rate_and_error()
    finally:
        torch.set_float32_matmul_precision(before)
    faster = error["medium"] <= FP32_ERROR and gflops["medium"] > GAIN * gflops["highest"]
    setting = "medium" if faster else "highest"
    figures = ", ".join(f"{name} {gflops[name]:.0f} GFLOP/s with error {error[name]:.0e}" for name in gflops)
    return setting, f"fp32 matrix products: {setting} ({figures})"


def bf16_is_faster() -> bool:
    """Whether matrix products in bf16 beat fp32's, as this process is set, on the CPU."""
    bf16, fp32 = (_gflops(*_operands(dtype)) for dtype in (torch.bfloat16, torch.float32))
    return bf16 > GAIN * fp32


def _fp32_rate_and_error() -> tuple[float, float]:
    x, w = _operands(torch.float32)
    got, exact = (x @ w)[:, :64], x.double() @ w[:, :64].double()
    return _gflops(x, w), ((got - exact).norm() / exact.norm()).item()


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)  # leaves the process's own random state alone
    tokens, inner, outer = SHAPE
    return torch.randn(tokens, inner, generator=rng).to(dtype), torch.randn(inner, outer, generator=rng).to(dtype)


def _gflops(x: torch.Tensor, w: torch.Tensor) -> float:
    """Best of a few: the others shared the machine. A slow machine gets fewer tries."""
    out = torch.mm(x, w)
    best, spent, tries = float("inf"), 0.0, 0
    while tries < REPEATS and spent < SECONDS:
        begin = time.perf_counter()
        torch.mm(x, w, out=out)
        best = min(best, time.perf_counter() - begin)
        spent, tries = spent + best, tries + 1
    return 2e-9 * x.shape[0] * w.numel() / best
