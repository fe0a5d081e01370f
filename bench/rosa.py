"""ROSA, forward and gradient: the kernel, beside running again with every bit turned and, from a checkout of RWKV-LM, the official Python.

    python bench/rosa.py --official RWKV-LM/RWKV-v8/251014_rosa_1bit_layer.py --out rosa.json
    python bench/rosa.py --device cuda --bits 4 --shapes 8x512x768,8x4096x768

One thread of the CPU. Correctness first: the kernel is compared with the plain form, and the official function with the
kernel, and nothing is timed on a wrong result. Times are the fastest of some rounds; those of the official Python, which grow
with T^3, are of one row, times the rows.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from environment import write_record
from rwkvlm.ops import backend
from rwkvlm.ops.rosa import rosa, rosa_self, rosa_tokens

SHAPES = ((8, 128, 64), (8, 512, 256))
# seconds, of the gradient (q = k = v, one bit)
BARS = {(8, 128, 64, "random"): 0.046, (8, 512, 256, "random"): 2.0, (8, 512, 256, "constant"): 1.1}


def inputs(B: int, T: int, C: int, kind: str, count: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, C, generator=rng) if kind == "random" else torch.ones(B, T, C) for _ in range(count)]


def errors(device: str = "cpu", T: int = 40) -> float:
    """The largest relative error of the kernel's gradients, against turning every bit; outputs are the same or it fails."""
    worst = 0.0
    kernel = "cuda" if device == "cuda" else "cpu"
    for bits in (1, 4):
        for kind in ("random", "constant"):
            for function, count in ((rosa_self, 1), (rosa, 3)):
                found = {}
                for form, place in (("torch", "cpu"), (kernel, device)):
                    leaves = [
                        x.to(place).requires_grad_() for x in (*inputs(1, T, 8, kind, count), torch.full((8,), -0.7), torch.full((8,), 1.3))
                    ]
                    with backend.asked_for(form):
                        out = function(*leaves, bits)
                        slopes = torch.sin(torch.arange(out.numel())).view(out.shape).to(place)
                        found[form] = [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, slopes))]
                if not torch.equal(found[kernel][0], found["torch"][0]):
                    sys.exit("rosa: the kernel puts out something else than the plain form")
                for got, want in zip(found[kernel][1:], found["torch"][1:]):
                    worst = max(worst, ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item())
    return worst


def other_tokens(device: str) -> int:
    """How many tokens of ROSA, in two pieces with the state between them, are not those of the plain form."""
    x = torch.randint(3, (2, 70), generator=torch.Generator().manual_seed(0))
    with backend.asked_for("torch"):
        want = rosa_tokens(x)
    with backend.asked_for("cuda" if device == "cuda" else "cpu"):
        first, state = rosa_tokens(x[:, :30].to(device), return_state=True)
        second = rosa_tokens(x[:, 30:].to(device), state)
    return int((torch.cat([first, second], 1).cpu() != want).sum())


def fastest(function: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def measured(B: int, T: int, C: int, kind: str, form: str, bits: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds of forward and gradient of all rows."""
    xs, ends = inputs(B, T, C, kind, 1 if form == "self" else 3), (torch.full((C,), -1.0, device=device), torch.ones(C, device=device))
    leaves = [x.to(device).requires_grad_() for x in xs]
    function = rosa_self if form == "self" else rosa
    out = function(*leaves, *ends, bits)
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    gradient = fastest(lambda: torch.autograd.grad(out, leaves, slopes, retain_graph=True), rounds)
    with torch.no_grad():
        forward = fastest(lambda: function(*leaves, *ends, bits), rounds)
    return {"forward": forward, "gradient": gradient, "forward_us_a_row": forward / (B * C // bits) * 1e6}


def official_function(path: Path) -> Callable[[list[int]], list[int]]:
    """`rosa` of an official file, and nothing else of it: the rest wants a GPU."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "rosa"]
    if not found:
        sys.exit(f"{path}: has no function rosa")
    names: dict[str, Callable] = {}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    return names["rosa"]


def official(function: Callable[[list[int]], list[int]], B: int, T: int, C: int, kind: str) -> dict[str, float]:
    """Estimated seconds for all rows: one forward, and for the gradient one more for each of T bits."""
    bits = (inputs(B, T, C, kind, 1)[0] > 0).long()[0, :, 0].tolist()
    row = torch.tensor(bits).view(1, T, 1) * 2.0 - 1
    ours = rosa_self(row, torch.full((1,), -1.0), torch.ones(1)).flatten().sign().tolist()
    if [(-1, 1)[y] if y >= 0 else 0 for y in function(bits)] != ours:
        sys.exit("rosa: the official function and the kernel put out different symbols")
    one = fastest(lambda: function(bits), 3)
    return {"forward": one * B * C, "gradient": one * (T + 1) * B * C}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="251014_rosa_1bit_layer.py of RWKV-LM, folder RWKV-v8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bits", type=int, default=1, help="of a symbol")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, shape)) for shape in SHAPES), help="BxTxC, separated by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.official and (options.bits != 1 or options.device != "cpu"):
        parser.error("--official is of one bit, on the CPU")
    torch.set_num_threads(1)
    worst = errors(options.device)
    if worst > 1e-4:
        sys.exit(f"rosa: gradients differ by {worst:.1e} from turning every bit")
    print(f"gradients differ by at most {worst:.1e} from turning every bit, outputs by nothing", flush=True)
    backend.set_kernel(options.device)
    theirs = official_function(options.official) if options.official else None
    results = []
    for shape in (tuple(map(int, text.split("x"))) for text in options.shapes.split(",")):
        for kind in ("random", "constant"):
            for form in ("self", "qkv"):
                result = {
                    "shape": shape,
                    "kind": kind,
                    "form": form,
                    **measured(*shape, kind, form, options.bits, options.rounds, options.device),
                }
                line = f"{shape} {kind} {form}: forward {result['forward_us_a_row']:.1f} us a row, gradient {result['gradient']:.4f} s"
                if options.device == "cpu" and options.bits == 1 and form == "self" and (*shape, kind) in BARS:
                    result["bar"] = BARS[(*shape, kind)]
                    line += f" (wanted {result['bar']})"
                if theirs and form == "self":
                    result["official_estimate"] = official(theirs, *shape, kind)
                    line += f"; official {result['official_estimate']['gradient']:.1f} s"
                results.append(result)
                print(line, flush=True)
    found = {"device": options.device, "bits": options.bits, "largest_error": worst, "results": results}
    if options.out:
        write_record(options.out, threads=1, **found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
