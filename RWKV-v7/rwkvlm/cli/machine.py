"""`python -m rwkvlm machine`: what there is to train on, as a line KEY=value for the shell (RWKV-v7/env.sh).

torch is imported only where there is a GPU, so that the answer costs a tenth of a second elsewhere.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..config import UserError
from .flags import Parser

PATIENCE = 60  # seconds for nvidia-smi
DEVICES = Path("/dev")


def listed_gpus() -> int:
    """GPUs that nvidia-smi lists, 0 where there is no driver behind it.

    Where nvidia-smi is missing, as in containers that get the driver's libraries alone: those in /dev.
    """
    if not shutil.which("nvidia-smi"):
        return 0 if not has_driver() else sum(bool(re.fullmatch(r"nvidia\d+", device.name)) for device in DEVICES.iterdir())
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi does not answer within {PATIENCE} s: the driver hangs; "
            "restart the machine, or train on the CPU with ACCELERATOR=cpu"
        ) from None
    return len(re.findall(r"^GPU \d+:", answer.stdout, re.MULTILINE))


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def covers(arch_list: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch built for `arch_list` ("sm_90", "compute_120") runs on a device of this compute capability.

    Binaries run on the same major and any higher minor version; PTX ("compute_") is compiled for any later device.
    """
    for arch in arch_list:
        kind, number = re.match(r"(sm|compute)_(\d+)", arch).groups()
        built_for = (int(number[:-1]), int(number[-1]))
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return False


def check_torch_sees_gpus() -> int:
    """The number of GPUs that torch can use; UserError with the cure when there is none or one is too new or too old for it."""
    import torch

    pip = (
        f"{sys.executable} -m pip install --force-reinstall "
        f"torch=={torch.__version__.partition('+')[0]} --index-url https://download.pytorch.org/whl/"
    )
    otherwise = "; or train on the CPU with ACCELERATOR=cpu"
    version = f"torch {torch.__version__} of {sys.executable}"
    if torch.version.cuda is None:
        raise UserError(f"there is a GPU, but {version} is built without CUDA; install a CUDA build: {pip}cu130{otherwise}")
    if not torch.cuda.is_available():
        raise UserError(
            f"there is a GPU, but {version} cannot use it: CUDA_VISIBLE_DEVICES hides it, or the driver is older than"
            f" CUDA {torch.version.cuda} (nvidia-smi shows its version); "
            f"update the driver or install an older CUDA build: {pip}cu126{otherwise}"
        )
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not covers(torch.cuda.get_arch_list(), capability):
            raise UserError(
                f"GPU {index} ({torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}) "
                f"is not among the architectures of {version}"
                f" ({' '.join(torch.cuda.get_arch_list())}); install another CUDA build: {pip}cu130 (newer GPU) or cu126 (older){otherwise}"
            )
    return torch.cuda.device_count()


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m rwkvlm machine", description="Print ACCELERATOR=cpu or gpu, what this machine trains on, for the shell."
    )
    parser.add_argument("--accelerator", default="auto", help="auto, cpu (even where there is a GPU) or gpu (an error where there is none)")
    wanted = parser.parse_args(argv).accelerator
    if wanted not in ("auto", "cpu", "gpu"):
        raise UserError(f"ACCELERATOR={wanted} is not known; use auto, cpu or gpu")
    gpus = 0 if wanted == "cpu" else listed_gpus()
    if wanted == "gpu" and not gpus:
        raise UserError("ACCELERATOR=gpu, but there is no GPU (nvidia-smi -L, /dev/nvidia*); check the driver, or use ACCELERATOR=cpu")
    if gpus:
        check_torch_sees_gpus()
    print(f"ACCELERATOR={'gpu' if gpus else 'cpu'}")
    return 0
