"""tests/fake_gpu, where torch is built for CUDA 13: results, late streams, graphs, what a capture forbids, NCCL between two processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).resolve().parents[1] / "fake_gpu" / "run.py"
BUILT = (torch.version.cuda or "").startswith("13.") and shutil.which("g++") and shutil.which("nvcc")
pytestmark = pytest.mark.skipif(not BUILT, reason="needs a torch built for CUDA 13, g++ and CUDA's headers")

COMPUTES = """
import torch
x = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
w = x.cuda().requires_grad_()
(torch.nn.functional.silu(w @ w) * 1.7).sum().backward()
v = x.clone().requires_grad_()
(torch.nn.functional.silu(v @ v) * 1.7).sum().backward()
assert w.grad.is_cuda and torch.allclose(w.grad.cpu(), v.grad, rtol=1e-5)
assert torch.arange(65536.0, device="cuda").topk(2)[1].tolist() == [65535, 65534]
"""
LATE = """
import torch
x, stream = torch.ones(3, device="cuda"), torch.cuda.Stream()
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    y = x + 1
early = y.cpu()  # nobody has waited
y = x + 1
assert not torch.equal(early, torch.full((3,), 2.0)) and torch.equal(y.cpu(), torch.full((3,), 2.0))
"""
GRAPHS = """
import torch
x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 3
for value in (1.0, 5.0):
    x.fill_(value)
    graph.replay()
    assert torch.equal(y.cpu(), torch.full((3,), 3 * value))
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        (x * 3).sum().item()
except RuntimeError:
    raise SystemExit
raise SystemExit("a wait in a capture passed")
"""
TOGETHER = """
import socket, torch, torch.distributed as dist, torch.multiprocessing as mp
def of_rank(rank, port):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, parts = torch.tensor([1.0 + rank, 4.0], dtype=torch.bfloat16, device="cuda"), torch.empty(4, device="cuda")
    dist.all_gather_into_tensor(parts, torch.tensor([rank, 7.0], device="cuda"))
    dist.all_reduce(x)
    assert x.tolist() == [3, 8] and parts.tolist() == [0, 7, 1, 7]
if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(of_rank, (port,), 2)
"""

AT_ONCE, LAZY = {}, {"FAKE_GPU_LAZY": "1"}
PROGRAMS = [(COMPUTES, AT_ONCE), (COMPUTES, LAZY), (LATE, LAZY), (GRAPHS, AT_ONCE), (GRAPHS, LAZY), (TOGETHER, {"FAKE_GPUS": "2"})]


@pytest.mark.parametrize("program, settings", PROGRAMS)
def test_a_program_on_the_fake_gpu(tmp_path, monkeypatch, program, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "program.py").write_text(program)
    ran = subprocess.run([sys.executable, RUN, sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "not computed" not in ran.stderr


def test_kernels_of_the_package_run_on_it():
    tests = "gpu and against_float64 and relu_square"
    ran = subprocess.run(
        [
            sys.executable,
            RUN,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            RUN.parents[1] / "cuda" / "test_fused.py",
            "-k",
            tests,
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0 and "6 passed" in ran.stdout, ran.stdout + ran.stderr
