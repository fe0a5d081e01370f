"""What a step of training costs the host, on any machine: the CUDA operators over a library whose functions return at once.

    python bench/host_time.py --layers 12
    python bench/host_time.py --layers 12 --model x080                      # or x040
    python bench/host_time.py --layers 12 --strategy deepspeed_stage_2      # of a whole run of train.py in bf16, one process

A GPU whose kernels take less than that waits for Python (--cuda_graphs, --strategy). Tensors are small and lie on the CPU. The products
are real ones, of 16 tokens and 64 features: what they take is counted, and what it takes to start a kernel of a GPU is not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch

from environment import ROOT
from rwkvlm.cli import train
from rwkvlm.config import model_config
from rwkvlm.config.train import STRATEGIES
from rwkvlm.ops import adamw, backend, cross_entropy, fused, launch, rosa, wkv4, wkv7
from train_step import Training

FOLDERS = ("adamw", "fused", "loss", "rosa", "wkv4")


def idle_library(folder: Path) -> ctypes.CDLL:
    """Every function of the api.cuh: success, or where it is asked for a size, a few."""
    text = "".join((ROOT / "cuda" / name / "api.cuh").read_text() for name in (*FOLDERS, "wkv7"))
    functions = re.findall(r"^(int|int64_t) (\w+)\(", text, re.M) + [("int", "cuda_message")]
    (folder / "idle.c").write_text("".join(f"long long {name}() {{ return {0 if kind == 'int' else 64}; }}\n" for kind, name in functions))
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "idle.c", "-o", "idle.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "idle.so"))


def register(library: ctypes.CDLL) -> None:
    """From now on CPU tensors go the way of a GPU's."""
    backend.set_kernel("cpu")
    fp32 = torch.float32
    for reason in (fused.native.why_not((fp32,), 64), adamw.native.why_not(), rosa.native.why_not(fp32), wkv4.native.why_not(fp32, 64)):
        assert not reason  # they define the operators
    for folder in FOLDERS:
        launch.register(folder, library, "CPU")
    machine = wkv7.cuda.machine_over(library, torch.device("cpu"), (9, 0), 132)
    wkv7.cuda.machine = lambda device: machine
    wkv7.backend_for = lambda device, dtype: "cuda"
    fused._in_one = lambda *inputs: fused._form(*inputs) is fused.native
    cross_entropy._form = lambda device, dtype, n_embd: cross_entropy.cuda


def whole_run(folder: Path, model: str, layers: int, steps: int, strategy: str) -> float:
    """Milliseconds of a step. What no kernel writes is 0 here, so that no step is skipped for its numbers."""
    allocator = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    zeros, empty = ctypes.c_bool.in_dll(allocator, "FLAGS_caffe2_cpu_allocator_do_zero_fill"), torch.empty

    def untouched(*shape, **options):  # DeepSpeed's buckets
        zeros.value = False
        try:
            return empty(*shape, **options)
        finally:
            zeros.value = True

    zeros.value, torch.empty = True, untouched
    (folder / "text").write_bytes(os.urandom(16 * steps + 1000))
    sizes = dict(my_testing=model, n_layer=layers, n_embd=64, vocab_size=256, ctx_len=16, micro_bsz=1, precision="bf16")
    place = dict(
        data_file=folder / "text",
        data_type="bytes",
        proj_dir=folder / "out",
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        kernel="cpu",
        check_kernels=0,
    )
    flags = sizes | place | dict(train_stage=3, random_seed=1, my_exit_tokens=16 * steps, epoch_samples=steps, enable_progress_bar=False)
    assert train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))]) == 0
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    made = [record for record in records if "loss" in record]
    assert len(made) == steps and not any("skipped" in record for record in made)
    return statistics.median(1e3 * 16 / record["tokens_per_s"] for record in made[steps // 8 :])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("x070", "x080", "x040"), default="x070")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--strategy", choices=STRATEGIES, help="the whole step of a run of train.py with this one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    with tempfile.TemporaryDirectory() as folder:
        register(idle_library(Path(folder)))
        if options.strategy:
            found = whole_run(Path(folder), options.model, options.layers, options.steps, options.strategy)
            print(
                json.dumps(
                    {"model": options.model, "layers": options.layers, "strategy": options.strategy, "ms": {"step": round(found, 2)}}
                )
            )
            return 0
    training = Training(model_config(options.model, n_layer=options.layers, n_embd=64, vocab_size=64), "fp32", 1, 16)
    times = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(options.steps + 5):
        training.optimizer.zero_grad()
        begin = time.perf_counter()
        loss = training.loss(training.batches[0])
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        training.optimizer.clip(training.norms.measure(), 1.0)
        training.optimizer.step()
        for name, t in zip(times, (forward - begin, backward - forward, time.perf_counter() - backward)):
            times[name].append(t * 1e3)
    found = {name: round(statistics.median(values[5:]), 2) for name, values in times.items()}
    print(json.dumps({"model": options.model, "layers": options.layers, "ms": found | {"step": round(sum(found.values()), 2)}}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
