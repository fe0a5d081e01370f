"""The whole training step on a GPU: tokens/s, MFU, what the GPU's time goes to. bench/gpu.sh calls it; the last line of its output is JSON.

    python bench/gpu_step.py L12-D768x16x512        layers, width x samples x tokens of a sample; bf16, vocabulary 65536, nothing recomputed
    python bench/gpu_step.py L24-D2048x4x4096 --grad_cp 1
    python bench/gpu_step.py L12-D768x16x512 --graphs               the blocks in CUDA graphs, as --cuda_graphs 1 of training has them
    python bench/gpu_step.py L12-D768x16x512 --compile default      the blocks compiled, as --compile 1 of training has them;
                                                    reduce-overhead: as --compile 1 --cuda_graphs 1
    python bench/gpu_step.py P12-D768x16x512        P: a Phantom without Ghost layers, RWKV-7 with test-time training of the state:
                                                    beside L, its price
    python bench/gpu_step.py X12-D768x16x512        X: x080, RWKV-7 with ROSA beside it; --rosa_grad none: without a gradient of its bits

Model, loss, gradient norms, clipping and optimizer are those of training in one process. Correctness first: loss and the
gradient of each parameter of a small model against plain PyTorch in float64 (x080's in fp32: rounded to bf16, ROSA's bits
would be others); exit code 1, and nothing is timed, where they are wrong. Steps are timed between events without waiting in
between. mfu: of the arithmetic that the model needs (train/flops.py) and the chip's data sheet; share_of_gemm: of the rate
of a large matrix product, measured in the same run. --device cpu is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable

import torch
from torch.autograd import DeviceType

import train_step
from gpu import MODES
from gpu_kernels import timed
from rwkvlm import models
from rwkvlm.config import ModelConfig, TrainConfig, model_config
from rwkvlm.models import phantom, rosa
from rwkvlm.models.table import Row, init_from_table
from rwkvlm.ops import backend
from rwkvlm.train.compiled import compile_blocks
from rwkvlm.train.flops import flops_per_token, peak_flops
from rwkvlm.train.graphs import graph_blocks
from rwkvlm.train.module import TrainModule
from rwkvlm.train.norms import GradientNorms
from rwkvlm.train.optimizer import make_optimizer
from rwkvlm.train.selfcheck import DRAWS, with_gradients, worst
from rwkvlm.train.strategy import make_strategy, param_dtype

# Relative: loss and the whole gradient in bf16, against float64, in every pass; of each parameter by itself as before a run,
# in one of the last.
LIMIT = 2e-2
GRAPHED = MODES[1]
WARM_UP = 5  # steps. With CUDA graphs the first of them run without, then they are recorded


def model_sizes(kind: str, rosa_grad: str, **sizes: int) -> ModelConfig:
    """L: RWKV-7; P: RWKV-7 TTT Phantom, all of whose matrices are RWKV-7's; X: RWKV-7 with ROSA."""
    if kind == "X":
        return model_config("x080", **sizes, rosa_grad=rosa_grad)
    return model_config("phantom", **sizes, core_ratio=1.0) if kind == "P" else ModelConfig(**sizes)


class Training(train_step.Training):
    """A model with random matrices, made where it trains."""

    def __init__(self, sizes: ModelConfig, batch: int, ctx: int, options: argparse.Namespace, precision: str = "bf16") -> None:
        where = dict(accelerator="gpu" if options.device == "cuda" else "cpu", devices="1", precision=precision)
        how = dict(
            grad_cp=options.grad_cp, compile=int(bool(options.compile)), cuda_graphs=int(options.graphs or options.compile == GRAPHED)
        )
        config = TrainConfig(**where, **how, weight_decay=0.001, lr_init=1e-4)
        strategy = make_strategy(config)
        self.module = TrainModule(config)
        with torch.device(options.device):
            model = models.build(sizes)
        # The table's own are orthogonal, which takes a CPU minutes at these sizes, or zeros, which would hide what follows
        # them. Twice as large, they make a model in which roundings of bf16 grow, in some to 5 or 10 percent of the
        # gradient, in plain PyTorch as well.
        rng = torch.Generator(options.device).manual_seed(0)
        matrices = "|".join(
            re.escape(name) for name, x in model.state_dict().items() if x.dim() == 2 and not name.endswith("r_k") and ".rosa." not in name
        )
        random = Row(matrices, lambda s: torch.randn(s.shape, generator=rng, device=options.device) * 0.5 / s.shape[1] ** 0.5)
        init_from_table(model, [random, *(rosa.TABLE if sizes.model_type == "x080" else phantom.TABLE)], 0)
        self.model = model.to(param_dtype(config))
        self.module.attach(self.model)
        if options.compile:
            compile_blocks(self.model, graphs=options.compile == GRAPHED)
        if options.graphs:
            graph_blocks(self.model, batch, ctx, bool(options.grad_cp))
        self.optimizer = make_optimizer(self.model, config, strategy)
        self.norms = GradientNorms(self.model)
        self.batches = [torch.randint(sizes.vocab_size, (batch, ctx + 1), generator=rng, device=options.device) for _ in range(8)]
        self.made = 0


def errors(kind: str, kernel: str, options: argparse.Namespace) -> dict:
    """Of a small model, against plain PyTorch in float64 from the same rounded weights, relative.

    "loss", "gradient": the most in any pass; "parameter": what is furthest off in the best of the last passes, which are
    replays where there are graphs.
    """
    small = model_sizes(kind, options.rosa_grad, n_layer=3, n_embd=128, vocab_size=1000, head_size=64)
    # plain PyTorch takes its time for ROSA
    training = Training(small, 2, 30 if kind == "X" else 100, options, "fp32" if kind == "X" else "bf16")

    batches = training.batches[: DRAWS + (WARM_UP if options.compile or options.graphs else 0)]

    def results(model: models.LanguageModel) -> list[dict[str, torch.Tensor]]:
        training.module.attach(model)
        return [with_gradients(model, training.loss(idx)) for idx in batches]

    backend.set_kernel(kernel)
    ours = results(training.model)
    backend.set_kernel("torch")
    with torch.device(options.device):
        plain = models.build(training.model.config)  # neither compiled nor in graphs
    plain.to(training.model.head.weight.dtype).load_state_dict(training.model.state_dict())
    passes = list(zip(ours, results(plain), results(plain.double())))
    backend.set_kernel(kernel)

    def off(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
        """Of the loss, and of all gradients as one."""
        (loss, *gradients), (right, *right_gradients) = got.values(), exact.values()
        pairs = (loss, right), (torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in right_gradients]))
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    loss, gradient = map(max, zip(*(off(got, exact) for got, _, exact in passes)))
    part, parameter, most = min((worst(*three) for three in passes[-DRAWS:]), key=lambda row: row[1] / row[2])
    return {"loss": loss, "gradient": gradient, "parameter": parameter, "of which": part, "at most": most}


def step_ms(training: Training, steps: int, device: str) -> list[float]:
    """Milliseconds of each of so many steps, of which none waits for the GPU."""
    if device == "cpu":
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            training.step()
            times.append((time.perf_counter() - begin) * 1e3)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        training.step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


def gemm_flops(options: argparse.Namespace) -> float:
    """FLOP/s of a large bf16 matrix product, the best of twenty."""
    n = 256 if options.small else 8192
    x, y = (torch.randn(n, n, device=options.device).to(torch.bfloat16) for _ in range(2))
    rounds = argparse.Namespace(device=options.device, warmup=0, rounds=20)
    return 2 * n**3 / timed({"product": lambda i: x @ y}, 1, rounds)["product"]["ms_fastest"] * 1e3


def by_kernel(training: Training, device: str, most: int = 50) -> dict:
    """What the time of one step goes to, the longest first, and the sum.

    Where the step takes longer than its kernels, Python is what it waits for.
    """
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profile:
        training.step()
        if device == "cuda":
            torch.cuda.synchronize()
    return times_by_kernel(profile.key_averages(), device, most)


def times_by_kernel(events: Iterable, device: str, most: int) -> dict:
    """An operator's time on the device is that of its kernels, which are events of their own: these alone count."""
    if device == "cuda":
        rows = [(e.self_device_time_total, e.count, e.key) for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    else:
        rows = [(e.self_cpu_time_total, e.count, e.key) for e in events]
    longest = [
        {"ms": round(us / 1e3, 3), "calls": count, "name": name[:120]} for us, count, name in sorted(rows, reverse=True)[:most] if us > 0
    ]
    return {
        "kernels_ms": round(sum(us for us, _, _ in rows) / 1e3, 3),
        "launches": sum(count for _, count, _ in rows),
        "by_kernel": longest,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="for example L12-D768x16x512")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small vocabulary, few steps")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--compile", choices=("", *MODES), default="", help="the blocks through torch.compile in this mode")
    parser.add_argument("--graphs", action="store_true", help="the blocks in CUDA graphs")
    parser.add_argument("--rosa_grad", choices=("flip", "none"), default="flip", help="of x080")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--kernel",
        default="",
        help="torch: to compare with plain PyTorch; else by itself, which is an error here where it is not the native one",
    )
    options = parser.parse_args(arguments)
    if options.compile and options.kernel == "torch":
        parser.error("--compile needs the native kernels: in plain PyTorch wkv7 is a loop in Python that would take minutes to compile")
    if options.graphs and (options.compile or options.kernel == "torch" or options.device == "cpu"):
        parser.error("--graphs needs a GPU and its kernels, and records blocks that are not compiled")
    if options.compile == GRAPHED and options.grad_cp:
        parser.error("--compile reduce-overhead recomputes nothing, and training refuses it with --grad_cp 1; use --grad_cp 0")
    if options.small:
        options.vocabulary, options.steps = 1000, 3
    kind, *numbers = re.fullmatch(r"([LPX])(\d+)-D(\d+)x(\d+)x(\d+)", options.model).groups()
    layers, width, batch, ctx = map(int, numbers)
    kernel = options.kernel or ("cuda" if options.device == "cuda" else "")
    backend.set_kernel(kernel)
    found = errors(kind, kernel, options)
    if not (max(found["loss"], found["gradient"]) <= LIMIT and found["parameter"] < found["at most"]):
        print(f"error: of a small model {found}, more than {LIMIT:g}; nothing is timed on wrong results", file=sys.stderr)
        return 1
    sizes = model_sizes(kind, options.rosa_grad, n_layer=layers, n_embd=width, vocab_size=options.vocabulary)
    training = Training(sizes, batch, ctx, options)
    warm_up = step_ms(training, WARM_UP, options.device)
    times = step_ms(training, options.steps, options.device)
    ms, tokens = statistics.median(times), batch * ctx
    flops, peak, gemm = flops_per_token(sizes) * tokens / ms * 1e3, peak_flops(torch.device(options.device)), gemm_flops(options)
    row = {
        "model": options.model,
        "kernel": kernel or "auto",
        "rosa_grad": options.rosa_grad if kind == "X" else "",
        "grad_cp": options.grad_cp,
        "compile": options.compile,
        "graphs": options.graphs,
    }
    row |= {
        "warm_up_s": round(sum(warm_up) / 1e3, 1),
        "errors": found,
        "steps": len(times),
        "ms": round(ms, 3),
        "ms_fastest": round(min(times), 3),
    }
    row |= {"tokens_per_s": round(tokens / ms * 1e3), "tflops": round(flops / 1e12, 3)}
    row |= {"mfu": round(flops / peak, 4) if peak else None, "gemm_tflops": round(gemm / 1e12, 2), "share_of_gemm": round(flops / gemm, 4)}
    row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if options.device == "cuda" else None
    try:
        row |= by_kernel(training, options.device)
    except Exception as error:  # no profiler here, say; what has been timed counts all the same
        row["by_kernel"] = repr(error)[:300]
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
