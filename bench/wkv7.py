"""WKV7 forward + backward through autograd: the naive loop, the chunked PyTorch form and the native kernel, in one run.

    python bench/wkv7.py --shapes 1x512,8x512 --threads 2 --out wkv7.json

Correctness first: every form is compared with float64 and nothing is timed on a wrong result. The two PyTorch forms of the
package are the yardsticks: the loop is what one writes straight from the formula, the chunked form the best that matmuls
give. Rounds of all forms alternate, so that a busy machine hits them alike; the ratios are those of the medians, and of
the fastest rounds beside them. A form slower than --slow seconds is timed once a round on fewer rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

from rwkvlm.ops.wkv7 import wkv7_chunked, wkv7_native, wkv7_reference
from rwkvlm.ops.wkv7.native import why_not

FORMS = {"loop": wkv7_reference, "chunked": wkv7_chunked, "native": wkv7_native}


def make_inputs(B: int, T: int, H: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """r, w, k, v, a, b as a trained model makes them, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    r, w, k, v, kk, rate, dy = (torch.randn(B, T, H, N, generator=generator) for _ in range(7))
    kk = F.normalize(kk, dim=-1)
    tensors = [r / 2, w * 2 - 1, k / 2, v, -kk, kk * torch.sigmoid(rate), dy]
    return [x.to(dtype).contiguous() for x in tensors]


def step(form: Callable, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One forward and backward: y and the six gradients."""
    *inputs, dy = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, _ = form(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def worst_error(form: Callable, tensors: list[torch.Tensor]) -> float:
    """Largest error against float64 over y and the gradients, each relative to the largest value of its tensor."""
    expected = step(wkv7_reference, [x.double() for x in tensors])
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(step(form, tensors), expected))


def seconds(form: Callable, tensors: list[torch.Tensor], at_least: float) -> float:
    """Seconds a step, over as many steps as fill `at_least` seconds."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < at_least or count == 0:
        step(form, tensors)
        count += 1
    return elapsed / count


def measure(B: int, T: int, options: argparse.Namespace) -> dict:
    tensors = make_inputs(B, T, options.heads, options.head_size, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for name in ("chunked", "native"):
        seconds(FORMS[name], tensors, 0.5)
    for number in range(options.rounds):
        for name, form in FORMS.items():
            if not (number >= 3 and name == "loop" and times[name][0] > options.slow):
                times[name].append(seconds(form, tensors, 0.2))
    row = {"B": B, "T": T, "H": options.heads, "N": options.head_size, "dtype": options.dtype}
    row["ms"] = {name: round(statistics.median(t) * 1e3, 3) for name, t in times.items()}
    row["ms_fastest"] = {name: round(min(t) * 1e3, 3) for name, t in times.items()}
    for key in ("ms", "ms_fastest"):
        row[f"ratios_{key}"] = {f"{name}/native": round(row[key][name] / row[key]["native"], 1) for name in ("loop", "chunked")}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x512,8x512", help="BxT, comma-separated")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow", type=float, default=1.0, help="seconds from which the loop is timed in three rounds only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if reason := why_not(getattr(torch, options.dtype)):
        print(f"error: {reason}", file=sys.stderr)
        return 2

    small = make_inputs(1, 100, 2, options.head_size, getattr(torch, options.dtype))
    errors = {name: worst_error(FORMS[name], small) for name in ("chunked", "native")}
    tolerance = 5e-6 if options.dtype == "float32" else 1e-2
    print("worst error against float64: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    if not all(error <= tolerance for error in errors.values()):
        print(f"error: above {tolerance:g}; nothing is timed on wrong results", file=sys.stderr)
        return 1

    rows = []
    for shape in options.shapes.split(","):
        row = measure(*map(int, shape.split("x")), options)
        rows.append(row)
        for label, key in (("median", "ms"), ("fastest", "ms_fastest")):
            cells = "  ".join(f"{name} {ms:9.2f} ms" for name, ms in row[key].items())
            ratios = "  ".join(f"{name} {value:.1f}x" for name, value in row[f"ratios_{key}"].items())
            print(f"(B,T)=({row['B']},{row['T']}) {label:7}  {cells}  {ratios}", flush=True)
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
        about = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({**about, "command": sys.argv, "errors": errors, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
