"""WKV4 forward + backward through autograd: the loop, the chunked PyTorch form and the native kernel, in one run.

    python bench/wkv4.py --shapes 1x512x768,8x512x768 --threads 2 --json wkv4.json
    python bench/wkv4.py --device cuda --dtype bfloat16 --shapes 8x1024x768,8x4096x4096 --official RWKV-LM/RWKV-v4neo/cuda --json wkv4.json

Correctness first: every form is compared with float64, on usual keys, keys up to 100 and decays near 1, and nothing is timed
on a wrong result. Rounds of all forms alternate, so that a busy machine hits them alike; a loop slower than --slow seconds is
timed in three rounds only.

--official FOLDER, on a GPU with bfloat16: the official kernel too, from its folder with wkv_op_bf16.cpp and wkv_cuda_bf16.cu,
built by torch as officially, for the longest T of the shapes.

"ideal_ms" is the time of the bytes of k, v, y, dy, dk and dv, read or written once each way as autograd must (k and v twice),
at the rate of a copy measured in the same run. The last line of the output is JSON, for bench/gpu.sh.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from environment import write_record
from gpu_kernels import both
from rwkvlm.ops.wkv4 import backend_for, wkv4, wkv4_chunked, wkv4_reference

KINDS = {"usual": 3e-6, "large": 5e-5, "slow": 2e-5}  # with the largest error in fp32, as in tests/ops/test_wkv4.py
TENSORS = 8  # of [B, T, C] that forward and backward move: k, v, y; k, v, dy, dk, dv


def form_of(recurrence: Callable) -> Callable:
    """A form of the package, which takes the logarithm of the decay, with the raw decay."""
    return lambda w, u, k, v: recurrence(-torch.exp(w), u, k, v)[0]


FORMS = {"loop": form_of(wkv4_reference), "chunked": form_of(wkv4_chunked), "native": wkv4}


def official(folder: Path, longest: int) -> Callable:
    """The official operator, through autograd as the official model calls it."""
    from torch.utils.cpp_extension import load

    flags = ["--use_fast_math", "-O3", "--maxrregcount", "60", "--extra-device-vectorization", f"-DTmax={longest}"]
    module = load(f"wkv_{longest}_bf16", [str(folder / "wkv_op_bf16.cpp"), str(folder / "wkv_cuda_bf16.cu")], extra_cuda_cflags=flags)

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, u, k, v):
            y, w, u = torch.empty_like(k), -torch.exp(w.float()), u.to(k.dtype)
            module.forward(*k.shape, w, u, k, v, y)
            ctx.save_for_backward(w, u, k, v, y)
            return y

        @staticmethod
        def backward(ctx, dy):
            w, u, k, v, y = ctx.saved_tensors
            B, _, C = k.shape
            dw, du, dk, dv = k.new_empty(B, C), k.new_empty(B, C), torch.empty_like(k), torch.empty_like(k)
            module.backward(*k.shape, w, u, k, v, y, dy, dw, du, dk, dv)
            return dw.sum(0).float(), du.sum(0).float(), dk, dv

    return Official.apply


def make_inputs(B: int, T: int, C: int, dtype: torch.dtype, device: torch.device, kind: str = "usual") -> list[torch.Tensor]:
    """w, u, k, v and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    w, u, k, v, dy = (torch.randn(shape, generator=generator) for shape in ((C,), (C,), (B, T, C), (B, T, C), (B, T, C)))
    k = k * 30 if kind == "large" else k
    w = w - 7 if kind == "slow" else w - 1
    return [w.to(device), u.to(device), *(x.to(device, dtype) for x in (k.clamp(-100, 100), v, dy))]


def errors_of(forms: dict[str, Callable], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each form by kind of input: the largest rms error against float64 over y and the gradients, each relative to its tensor."""
    found: dict[str, dict[str, float]] = {name: {} for name in forms}
    for kind in KINDS:
        tensors = make_inputs(2, 100, 64, options.dtype, options.device, kind)
        *inputs, dy = tensors
        expected = both(FORMS["loop"], [x.double() for x in inputs], dy.double())
        for name, form in forms.items():
            pairs = zip(both(form, inputs, dy), expected)
            found[name][kind] = max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
    return found


def seconds(work: Callable[[], object], at_least: float, device: torch.device) -> float:
    """Seconds a call, over as many as fill `at_least` seconds, by the first of them.

    A GPU is waited for at the end alone: where Python is slower, it is Python's time.
    """

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    count = max(1, round(at_least / run(1)))
    return run(count) / count


def measure(shape: tuple[int, int, int], forms: dict[str, Callable], options: argparse.Namespace) -> dict:
    *inputs, dy = make_inputs(*shape, options.dtype, options.device)
    times: dict[str, list[float]] = {name: [] for name in forms}
    copy: list[float] = []
    for name in forms.keys() - {"loop"}:
        seconds(lambda: both(forms[name], inputs, dy), 0.3, options.device)
    for number in range(options.rounds):
        to = torch.empty_like(dy)
        copy.append(seconds(lambda: to.copy_(dy), 0.05, options.device))
        for name, form in forms.items():
            if not (number >= 3 and name == "loop" and times[name][0] > options.slow):
                times[name].append(seconds(lambda: both(form, inputs, dy), 0.2, options.device))
    row = {"B": shape[0], "T": shape[1], "C": shape[2], "ms": {name: round(statistics.median(t) * 1e3, 3) for name, t in times.items()}}
    row["ms_fastest"] = {name: round(min(t) * 1e3, 3) for name, t in times.items()}
    row["ratios"] = {f"{name}/native": round(row["ms"][name] / row["ms"]["native"], 1) for name in forms if name != "native"}
    row["rounds"] = {name: len(t) for name, t in times.items()}
    row["ideal_ms"] = round(min(copy) * TENSORS / 2 * 1e3, 3)  # a copy moves two
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x512x768,8x512x768", help="BxTxC, comma-separated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow", type=float, default=1.0, help="seconds from which the loop is timed in three rounds only")
    parser.add_argument("--official", type=Path, help="folder with the official wkv_op_bf16.cpp and wkv_cuda_bf16.cu")
    parser.add_argument("--json", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.dtype, options.device = getattr(torch, options.dtype), torch.device(options.device)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    torch.set_num_threads(options.threads)
    if options.official and (options.device.type != "cuda" or options.dtype != torch.bfloat16):
        parser.error("--official is a kernel for --device cuda --dtype bfloat16")
    if backend_for(options.device, options.dtype) == "torch":
        return 2  # with the reason said
    forms = FORMS | ({"official": official(options.official, max(T for _, T, _ in shapes))} if options.official else {})

    errors = errors_of(forms, options)
    for name, by_kind in errors.items():
        print(f"error against float64: {name:9}" + "".join(f"  {kind} {error:.1e}" for kind, error in by_kind.items()))
    rounding = 4e-3 if options.dtype == torch.bfloat16 else 0.0
    if not all(errors[name][kind] <= limit + rounding for name in ("chunked", "native") for kind, limit in KINDS.items()):
        print("error: nothing is timed on wrong results", file=sys.stderr)
        return 1
    rows = []
    for shape in shapes:
        row = measure(shape, forms, options)
        rows.append(row)
        cells = "  ".join(f"{name} {ms:.2f} ({row['ms_fastest'][name]:.2f}) ms" for name, ms in row["ms"].items())
        print(
            f"(B,T,C)={shape}  {cells}  ideal {row['ideal_ms']} ms  "
            + "  ".join(f"{name} {value}x" for name, value in row["ratios"].items()),
            flush=True,
        )
    if options.json:
        write_record(options.json, threads=options.threads, device=str(options.device), dtype=str(options.dtype), errors=errors, rows=rows)
    print(json.dumps({"errors": errors, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
