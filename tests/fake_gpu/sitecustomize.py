"""Python loads this by itself where run.py has set PYTHONPATH: torch computes on the fake GPU, the CUDA kernels are emulated ones."""

from __future__ import annotations

import ctypes
import functools
import importlib.abc
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

BUILT = Path(os.environ["FAKE_GPU_BUILT"])


def torch_is_loaded(torch: ModuleType) -> None:
    torch.ops.load_library(BUILT / "operators.so")
    torch.ops.fake_gpu.enable()
    run = threading.Thread.run

    def enabled(thread: threading.Thread) -> None:
        torch.ops.fake_gpu.enable()
        run(thread)

    threading.Thread.run = enabled
    for kind in ("flash", "mem_efficient", "cudnn"):  # attention of which the CPU has no form
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)


def native_is_loaded(native: ModuleType) -> None:
    submit = ctypes.CDLL(None).fake_gpu_submit  # of runtime.cpp

    @functools.cache
    def cuda_library(name: str) -> ctypes.CDLL:
        native.load_launches(name)
        library = ctypes.CDLL(str(BUILT / f"{name}.so"))
        library.emulation_submit(submit)
        return library

    native.cuda_library = cuda_library


class Watch(importlib.abc.MetaPathFinder):
    """Calls the functions above when their modules have been imported."""

    then = {"torch": torch_is_loaded, "rwkvlm.native": native_is_loaded}

    def find_spec(self, name, path, target=None):
        if name not in self.then:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Watch())
