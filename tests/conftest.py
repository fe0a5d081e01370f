"""Every test starts in a process as it was at first: runs of the trainer in this process choose kernels, threads, precision, environment and signals for themselves."""

import os
import signal

import pytest
import torch

from rwkvlm.ops import backend

# A job in the background inherits one ignored, nohup's the other, and so would all runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
THREADS, PRECISION = torch.get_num_threads(), torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def process_as_it_was():
    backend._requested = ""  # also what fixtures of a wider scope have left
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    backend._requested = ""
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision(PRECISION)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
