"""Every test starts in a process as it was at first.

Runs of the trainer in this process choose kernels, threads, precision, environment and signals for themselves.
"""

import os
import signal
from pathlib import Path

TESTS = Path(__file__).parent
SHARED = "PYTEST_XDIST_WORKER" in os.environ
if SHARED:
    # OpenMP's threads that wait for each other sleep at once, in what tests start too: beside another worker, which has as
    # many threads on the same cores, they would spin for whole time slices. To be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch

from rwkvlm.ops import backend

# A job in the background inherits one ignored, nohup's the other, and so would all runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
THREADS, PRECISION = torch.get_num_threads(), torch.get_float32_matmul_precision()
# Beside another worker torch's threads wait for each other: the QR of an initial matrix, 0.3 ms on one, takes 0.3 s on two.
# What of ours divides its work among them are the C++ kernels, and their tests have them all.
KERNELS = {"ops", "test_step.py"}
if SHARED:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--ptx", default="", metavar="90a", help="emulate the CUDA kernels from the PTX that nvcc makes for this architecture")


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: workers that take file by file then end together, on short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def process_as_it_was(request):
    backend._requested = ""  # also what fixtures of a wider scope have left
    if KERNELS & {*request.path.relative_to(TESTS).parts}:
        torch.set_num_threads(THREADS)
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    backend._requested = ""
    torch.set_num_threads(1 if SHARED else THREADS)
    torch.set_float32_matmul_precision(PRECISION)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
