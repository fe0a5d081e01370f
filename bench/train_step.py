"""The whole training step on the CPU: tokens/s, the share of ideal, where the time goes, and peak memory.

    python bench/train_step.py --models L12-D768x1,L6-D256x8 --precisions bf16,fp32 --json train_step.json
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python bench/train_step.py --precisions bf16      (as on a CPU without AMX)

Model, loss, gradient norms, clipping and optimizer are those of training, and so is the environment of the process (taken from
demo-training-run.sh). Correctness first: loss and gradients of a small model against plain PyTorch in float64; nothing is timed on
wrong results. Then steps and measurements of the machine alternate.

"ideal" is 6 * (parameters without embedding, head included) * tokens / the rate of torch's own matrix products, measured in the same
run on the model's large shapes, forward and both gradients: what the step would take if everything else were free. Shares come from
torch.profiler, of one step among others. "memory time" is what the optimizer and the gradient norms must move, at the measured rate of
a copy: no arrangement of the step avoids it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from environment import as_in_the_demo, memory_mib, seconds, write_record

CTX = 512
PARTS = {  # of an operator in the profile; the first pattern that fits it or, else, the nearest operator around it
    "embedding": r"aten::embedding|EmbeddingBackward",
    "head + loss": r"rwkvlm::head_ce|_HeadCrossEntropy",
    "wkv7": r"rwkvlm::wkv7|wkv7_forward",
    "time mix": r"rwkvlm::t(oken|ime)_mix|aten::(tanh|sigmoid)|(Tanh|Sigmoid)Backward",
    "channel mix": r"rwkvlm::relu_square",
    "layer norm": r"layer_norm|LayerNorm",
    "norms, optimizer": r"rwkvlm::(adamw_|gradient_norms)|optimizer",
    "GEMMs": r"aten::(mm|addmm|matmul|linear)|MmBackward",
}


if __name__ == "__main__":
    as_in_the_demo()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below that torch's profiler writes a line whenever it starts and stops

import torch

from rwkvlm import models
from rwkvlm.config import ModelConfig, TrainConfig
from rwkvlm.train.module import TrainModule
from rwkvlm.train.norms import GradientNorms
from rwkvlm.train.optimizer import make_optimizer
from rwkvlm.train.selfcheck import answers, spread, worst
from rwkvlm.train.strategy import make_strategy, param_dtype


class Training:
    """A model and what a step of training does with it."""

    def __init__(self, sizes: ModelConfig, precision: str, batch: int, ctx: int) -> None:
        config = TrainConfig(accelerator="cpu", precision=precision, weight_decay=0.001, lr_init=1e-4)
        strategy = make_strategy(config)
        self.module = TrainModule(config)
        self.model = spread(sizes).to(param_dtype(config))
        self.module.attach(self.model)
        self.optimizer = make_optimizer(self.model, config, strategy)
        self.norms = GradientNorms(self.model)
        rng = torch.Generator().manual_seed(1)
        self.batches = [torch.randint(sizes.vocab_size, (batch, ctx + 1), generator=rng) for _ in range(8)]
        self.made = 0

    def loss(self, idx: torch.Tensor) -> torch.Tensor:
        return self.module.training_step((idx[:, :-1].contiguous(), idx[:, 1:].contiguous()), 0)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.batches[self.made % len(self.batches)]).backward()
        self.optimizer.clip(self.norms.measure(), self.module.config.grad_clip)
        self.optimizer.step()
        self.made += 1


def error(precision: str) -> tuple[str, float, float]:
    """What is furthest off in a small model, loss or the gradient of a parameter, by how much of itself, and by how much it may be."""
    sizes = ModelConfig(n_layer=3, n_embd=128, vocab_size=1000, head_size=64)
    return worst(*answers(sizes, param_dtype(TrainConfig(accelerator="cpu", precision=precision)), torch.device("cpu")))


class Machine:
    """Best rates seen: matrix products in the shapes of a model's large matrices, and copies of memory."""

    def __init__(self, model: models.LanguageModel, tokens: int) -> None:
        shapes = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
        dtype = model.head.weight.dtype
        self.works, self.weights, self.operations = [], [], []
        for (n, k), count in shapes.items():
            m = min(tokens, 512) if n * tokens > 1 << 26 else tokens  # of the head, a part of the tokens at a time
            x, w, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(m, n).to(dtype)
            out, dx, dw = torch.empty_like(y), torch.empty_like(x), torch.empty_like(w)
            self.works += [lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out), lambda y=y, w=w, dx=dx: torch.mm(y, w, out=dx)]
            self.works += [lambda x=x, y=y, dw=dw: torch.mm(y.t(), x, out=dw)]
            self.weights += [count * tokens / m] * 3
            self.operations += [2 * m * n * k] * 3
        self.best = [float("inf")] * len(self.works)
        self.source = torch.ones(50_000_000)
        self.target = torch.zeros_like(self.source)
        self.best_copy = float("inf")

    def look(self) -> None:
        for i, work in enumerate(self.works):
            work()
            self.best[i] = min(self.best[i], *(seconds(work) for _ in range(3)))
        self.best_copy = min(self.best_copy, seconds(lambda: self.target.copy_(self.source)))

    @property
    def gflops(self) -> float:
        total = sum(count * operations for count, operations in zip(self.weights, self.operations))
        return total / sum(count * best for count, best in zip(self.weights, self.best)) / 1e9

    @property
    def copy_gb_s(self) -> float:
        """Bytes on the bus: a copy reads the source, reads the lines that it will overwrite, and writes them."""
        return 12 * self.source.numel() / self.best_copy / 1e9


def shares(step: Callable[[], object], steps: int = 4) -> dict[str, float]:
    """Seconds of the operators of each part, in the last of some steps; the profiler's own allocations have settled by then."""
    spent: dict[str, float] = dict.fromkeys([*PARTS, "rest"], 0.0)

    def part_of(event) -> str:
        while event is not None:
            for part, pattern in PARTS.items():
                if re.search(pattern, event.name):
                    return part
            event = event.cpu_parent
        return "rest"

    def ready(profile) -> None:
        for event in profile.events():
            if not event.name.startswith("ProfilerStep"):
                spent[part_of(event)] += event.self_cpu_time_total / 1e6

    schedule = torch.profiler.schedule(wait=0, warmup=steps - 1, active=1)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, schedule=schedule, on_trace_ready=ready, acc_events=True) as profile:
        for _ in range(steps):
            step()
            profile.step()
    return spent


def measure(name: str, precision: str, options: argparse.Namespace) -> dict:
    layers, width, batch = map(int, re.fullmatch(r"L(\d+)-D(\d+)x(\d+)", name).groups())
    training = Training(ModelConfig(n_layer=layers, n_embd=width, vocab_size=options.vocabulary), precision, batch, CTX)
    tokens = batch * CTX
    for _ in range(3):
        training.step()
    peak = memory_mib("VmHWM")
    machine = Machine(training.model, tokens)
    times = []
    for _ in range(options.rounds):
        machine.look()
        training.step()  # settles what the measurement has thrown out of the caches
        times += [seconds(training.step) for _ in range(options.steps)]
    own = shares(training.step)
    parameters = sum(p.numel() for p in training.model.parameters())
    small = 2 if precision == "bf16" else 4
    # master and moments both ways, gradient twice, bf16 weight both ways
    moved = parameters * (24 + 2 * small + (4 if precision == "bf16" else 0))
    ideal = 6 * (parameters - training.model.emb.weight.numel()) * tokens / machine.gflops / 1e9
    row = {"model": name, "precision": precision, "parameters": parameters, "tokens": tokens, "gemm_gflops": round(machine.gflops)}
    row |= {
        "ideal_ms": round(ideal * 1e3, 1),
        "copy_gb_s": round(machine.copy_gb_s, 1),
        "memory_ms": round(moved / machine.copy_gb_s / 1e6, 1),
    }
    for key, pick in (("median", statistics.median), ("fastest", min)):
        step = pick(times)
        row |= {
            f"ms_{key}": round(step * 1e3, 1),
            f"tokens_per_s_{key}": round(tokens / step),
            f"ideal_share_{key}": round(ideal / step, 3),
        }
    row["profiled_ms"] = {part: round(t * 1e3, 1) for part, t in own.items()}
    row["peak_mib"] = round(peak)
    return row


def report(row: dict) -> None:
    print(
        f"{row['model']} {row['precision']}: GEMMs at {row['gemm_gflops']} GFLOP/s, ideal {row['ideal_ms']} ms; "
        f"peak memory {row['peak_mib']} MiB"
    )
    for key in ("median", "fastest"):
        print(f"  {key:7} {row[f'ms_{key}']:8.1f} ms {row[f'tokens_per_s_{key}']:7} tokens/s {row[f'ideal_share_{key}']:6.1%} of ideal")
    total = sum(row["profiled_ms"].values())
    print(f"  shares of {total:.0f} ms profiled: " + ", ".join(f"{part} {ms / total:.1%}" for part, ms in row["profiled_ms"].items()))
    print(f"  optimizer and norms must move memory for {row['memory_ms']} ms at {row['copy_gb_s']} GB/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="L12-D768x1,L6-D256x8", help=f"layers, width x batch of {CTX} tokens, comma-separated")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed in each round")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for precision in options.precisions.split(","):
        part, off, most = error(precision)
        print(f"{precision}: {part} is furthest off, by {off:.1e} of itself, against float64")
        if not off < most:
            print(f"error: more than {most:.1e}; nothing is timed on wrong results", file=sys.stderr)
            return 1
        for name in options.models.split(","):
            rows.append(measure(name, precision, options))
            report(rows[-1])
    if options.json:
        write_record(options.json, threads=options.threads, onednn_max_cpu_isa=os.environ.get("ONEDNN_MAX_CPU_ISA", ""), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
