"""WKV7 forward + backward through autograd: the naive loop, the chunked PyTorch form and the native kernel, in one run.

    python bench/wkv7.py --shapes 1x512,8x512 --threads 2 --json wkv7.json

Correctness first: every form is compared with float64, on usual inputs, at the decay clamp (w = 8) and with repeated keys, and
nothing is timed on a wrong result. The two PyTorch forms of the package are the yardsticks: the loop is what one writes straight
from the formula, the chunked form the best that matmuls give. Rounds of all forms alternate, so that a busy machine hits them alike;
the ratios are those of the medians, and of the fastest rounds beside them. Every form is timed on all rows; a loop slower than --slow
seconds in three rounds only.

"ideal" is the time of the kernel's multiply-adds at the best rate of torch's own fp32 matrix product, measured in the same run: what a
step would take if memory, exponentials and autograd were free.

--allocator training runs in the environment that demo-training-run.sh sets (memory is kept, not given back). The
loop, which allocates most, gains most by it: its ratios are then smaller and the kernel's times are those of training.
--allocator huge asks for pages of 2 MB besides (glibc >= 2.35, where the kernel's transparent huge pages are "madvise" or "always").
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from environment import variables, write_record
from gpu_kernels import KINDS, both, recurrence_inputs
from rwkvlm.ops.wkv7 import wkv7_chunked, wkv7_native, wkv7_reference
from rwkvlm.ops.wkv7.native import why_not

FORMS = {"loop": wkv7_reference, "chunked": wkv7_chunked, "native": wkv7_native}
ALLOCATORS = {"default": {}, "training": variables(), "huge": variables() | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}


def step(form: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One forward and backward: y and the six gradients."""
    return both(lambda *inputs: form(*inputs)[0], tensors[:-1], tensors[-1])


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


def gemm_rate() -> float:
    """Multiply-adds a second of torch's fp32 matrix product, the best of twenty."""
    x, best = torch.ones(1024, 1024), 0.0
    for _ in range(20):
        start = time.perf_counter()
        x @ x
        best = max(best, 1024**3 / (time.perf_counter() - start))
    return best


def multiply_adds(N: int) -> int:
    """What the kernel does for one token of one head, as in cuda/wkv7/cpu.cpp.

    Forward 5 N^2, token by token. Backward in chunks of C = 8: products with a state or its gradient, of which the eighth chunk from a
    checkpoint to the next saves one; then M and dM, whole, and what is multiplied by them, without the empty quarter.
    """
    C = 8
    return 5 * N * N + (10 * N * N - N * N // 4) + 8 * C * N + 6 * C * N + 9 * C * N // 4


def measure(B: int, T: int, options: argparse.Namespace) -> dict:
    tensors = recurrence_inputs(B, T, options.heads, options.head_size, getattr(torch, options.dtype), "cpu")
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for name in ("chunked", "native"):
        seconds(FORMS[name], tensors, 0.5)
    rate = 0.0
    for number in range(options.rounds):
        rate = max(rate, gemm_rate())
        for name, form in FORMS.items():
            if not (number >= 3 and name == "loop" and times[name][0] > options.slow):
                times[name].append(seconds(form, tensors, 0.2))
    row = {"B": B, "T": T, "H": options.heads, "N": options.head_size, "dtype": options.dtype}
    row["ms"] = {name: round(statistics.median(t) * 1e3, 3) for name, t in times.items()}
    row["ms_fastest"] = {name: round(min(t) * 1e3, 3) for name, t in times.items()}
    for key in ("ms", "ms_fastest"):
        row[f"ratios_{key}"] = {f"{name}/native": round(row[key][name] / row[key]["native"], 1) for name in ("loop", "chunked")}
    row["rounds"] = {name: len(t) for name, t in times.items()}
    row["gemm_gflops"] = round(2 * rate / 1e9, 1)
    row["ideal_ms"] = round(B * T * options.heads * multiply_adds(options.head_size) / rate * 1e3, 3)
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
    parser.add_argument(
        "--allocator",
        choices=ALLOCATORS,
        default="default",
        help="malloc as it is, as the training script sets it, or that with huge pages",
    )
    parser.add_argument("--json", type=Path, help="JSON file to write")
    options = parser.parse_args()
    allocator = ALLOCATORS[options.allocator]
    if any(os.environ.get(name) != value for name, value in allocator.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | allocator)  # malloc reads them when it starts
    torch.set_num_threads(options.threads)
    if reason := why_not(getattr(torch, options.dtype)):
        print(f"error: {reason}", file=sys.stderr)
        return 2

    errors = dict.fromkeys(("chunked", "native"), 0.0)
    for kind in KINDS:
        small = recurrence_inputs(1, 100, 2, options.head_size, getattr(torch, options.dtype), "cpu", kind)
        errors = {name: max(error, worst_error(FORMS[name], small)) for name, error in errors.items()}
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
            cells = "  ".join(f"{name} {ms:.2f} ms" for name, ms in row[key].items())
            ratios = "  ".join(f"{name} {value}x" for name, value in row[f"ratios_{key}"].items())
            print(f"(B,T)=({row['B']},{row['T']}) {label:7}  {cells}  {ratios}", flush=True)
        print(
            f"(B,T)=({row['B']},{row['T']}) ideal    {row['ideal_ms']} ms at the {row['gemm_gflops']} GFLOP/s of torch's matrix product",
            flush=True,
        )
    if options.json:
        write_record(options.json, threads=options.threads, allocator=options.allocator, errors=errors, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
