"""Head and loss, forward + backward: full logits, chunks in PyTorch, the native kernel; and the time that the products alone take.

    python bench/head_loss.py --shapes 2048x256,512x768 --threads 2 --out head_loss.json

Shapes are tokens x features. Correctness first: every form is compared with float64 on a small vocabulary, and nothing is
timed on a wrong result. "ideal" is 6 * tokens * features * vocabulary operations at the best rate of torch's own matrix
products in the head's three shapes, measured in the same rounds: what a step would take if softmax, loss and memory were
free. The native kernel may pass 100 %, since its products read packed operands from the cache. Peak memory is what a form
adds to the process, with its result.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from environment import as_in_the_demo, memory_mib, seconds, write_record
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import head_cross_entropy, native, reference

TOLERANCE = {"float32": (1e-6, 2e-6), "bfloat16": (2e-3, 1e-2)}  # relative: loss, rms of gradients


def make(tokens: int, features: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=rng).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, features, generator=rng) / features**0.5).to(dtype).requires_grad_()
    return x, weight, torch.randint(vocabulary, (tokens,), generator=rng)


def in_form(kernel: str) -> Callable[..., torch.Tensor]:
    def form(*inputs: torch.Tensor) -> torch.Tensor:
        backend.set_kernel(kernel)
        return head_cross_entropy(*inputs)

    return form


FORMS = {"full": reference.head_cross_entropy, "chunked": in_form("torch"), "native": in_form("cpu")}


def step(form: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    loss = form(x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def errors(dtype: torch.dtype) -> dict[str, list[float]]:
    """Of each form against float64: the loss, and the gradients of x and weight."""
    inputs = make(300, 64, 5000, dtype)
    exact = step(reference.head_cross_entropy, *(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    return {name: [((a.double() - b).norm() / b.norm()).item() for a, b in zip(step(form, *inputs), exact)] for name, form in FORMS.items()}


def products(x: torch.Tensor, weight: torch.Tensor, tokens: int) -> list[Callable[[], object]]:
    """The head's three products for a chunk of tokens: logits, and the gradients of x and weight."""
    x, weight = x.detach()[:tokens], weight.detach()
    logits, dx, dw = x.new_zeros(len(x), len(weight)), torch.empty_like(x), torch.empty_like(weight)
    return [
        lambda: torch.mm(x, weight.t(), out=logits),
        lambda: torch.mm(logits, weight, out=dx),
        lambda: torch.mm(logits.t(), x, out=dw),
    ]


def added_memory(work: Callable[[], object]) -> float | None:
    """MiB by which the process grows at its peak; None where Linux does not say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what others have used and the allocator has kept
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_mib("VmRSS")
        work()
        return memory_mib("VmHWM") - before
    except OSError:
        return None


def measure(tokens: int, features: int, options: argparse.Namespace) -> dict:
    inputs = make(tokens, features, options.vocabulary, getattr(torch, options.dtype))
    parts = products(*inputs[:2], min(tokens, 512))
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    product_times: list[list[float]] = [[] for _ in parts]
    memory = {}
    for name, form in FORMS.items():
        memory[name] = added_memory(lambda: step(form, *inputs))
    for part in parts:
        part()
    for _ in range(options.rounds):
        for name, form in FORMS.items():
            times[name].append(seconds(lambda: step(form, *inputs)))
        for part, record in zip(parts, product_times):
            record.append(seconds(part))
    operations = 2 * tokens * features * options.vocabulary
    rate = 2 * min(tokens, 512) * features * options.vocabulary / min(min(record) for record in product_times)
    row = {
        "tokens": tokens,
        "features": features,
        "vocabulary": options.vocabulary,
        "dtype": options.dtype,
        "product_gflops": round(rate / 1e9),
    }
    ideal = 3 * operations / rate
    row["ideal_ms"] = round(ideal * 1e3, 1)
    for key, pick in (("median", statistics.median), ("fastest", min)):
        row[f"ms_{key}"] = {name: round(pick(t) * 1e3, 1) for name, t in times.items()}
        row[f"ideal_share_{key}"] = {name: round(ideal / pick(t), 2) for name, t in times.items()}
    row["added_mib"] = {name: None if m is None else round(m) for name, m in memory.items()}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x256,512x768", help="tokens x features, comma-separated")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if reason := native.why_not(getattr(torch, options.dtype), 2):
        print(f"error: {reason}", file=sys.stderr)
        return 2

    found = errors(getattr(torch, options.dtype))
    print(
        "error of loss, dx, dw against float64: "
        + "; ".join(f"{name} " + " ".join(f"{e:.1e}" for e in error) for name, error in found.items())
    )
    for_loss, for_grads = TOLERANCE[options.dtype]
    if not all(error[0] <= for_loss and max(error[1:]) <= for_grads for error in found.values()):
        print(f"error: above {for_loss:g} (loss) or {for_grads:g} (gradients); nothing is timed on wrong results", file=sys.stderr)
        return 1

    rows = []
    for shape in options.shapes.split(","):
        row = measure(*map(int, shape.split("x")), options)
        rows.append(row)
        print(
            f"{shape} {options.dtype}: products at {row['product_gflops']} GFLOP/s, ideal {row['ideal_ms']} ms; "
            f"added MiB {row['added_mib']}"
        )
        for key in ("median", "fastest"):
            cells = "  ".join(
                f"{name} {ms:9.1f} ms {row[f'ideal_share_{key}'][name]:5.0%} of ideal" for name, ms in row[f"ms_{key}"].items()
            )
            print(f"  {key:7}  {cells}", flush=True)
    if options.out:
        write_record(options.out, threads=options.threads, errors=found, rows=rows)
    return 0


if __name__ == "__main__":
    as_in_the_demo()
    sys.exit(main())
