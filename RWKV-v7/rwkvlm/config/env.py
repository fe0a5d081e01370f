"""Every environment variable that the package reads, in one place.

Values are read when asked for, not at import, so that tests and launchers may set them late.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from .cgroups import cpus, cpus_allowed
from .errors import UserError


def kernel() -> str:
    """RWKV_KERNEL: the backend asked for ("" or "auto", "cuda", "cpu", "torch", and the official "@rwkv3", which means auto)."""
    return os.environ.get("RWKV_KERNEL", "")


def cache_dir(library: str = "") -> Path:
    """RWKV_CACHE_DIR: where native kernels are built; default ~/.cache/rwkvlm.

    Where that cannot be written to, as in some containers: a folder of the user's own among the temporary files.
    library: a file of the folder's native/; a home folder that has it need not be writable.
    """
    if given := os.environ.get("RWKV_CACHE_DIR"):
        return Path(given)
    try:
        own = Path.home() / ".cache" / "rwkvlm"
        built = own / "native"
        if library and (built / library).exists():
            return own
        built.mkdir(parents=True, exist_ok=True)
        if not os.access(built, os.W_OK):
            raise PermissionError(built)
        return own
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        temporary = Path(tempfile.gettempdir()) / f"rwkvlm-{os.getuid()}"
        with suppress(OSError):
            temporary.mkdir(mode=0o700, exist_ok=True)
            found = temporary.lstat()
            # what is in it is loaded: nobody else may have put it there
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return temporary
        raise UserError(
            f"neither the home folder nor {temporary} can be used to build kernels in; "
            "set RWKV_CACHE_DIR to a folder that only you can write to"
        ) from None


def cxx() -> str:
    """CXX: the C++ compiler; default g++."""
    return os.environ.get("CXX", "g++")


def cuda_cxx() -> str:
    """NVCC_CCBIN: the C++ compiler behind nvcc, which may be no newer than nvcc knows; default that of CXX."""
    return os.environ.get("NVCC_CCBIN") or cxx()


def cc() -> str:
    """CC: the C compiler of triton, which otherwise looks for gcc and clang."""
    return os.environ.get("CC", "gcc")


def cxx_flags() -> list[str]:
    """RWKV_CXXFLAGS: further compiler flags for the native kernels, for example -fsanitize=address,undefined."""
    return os.environ.get("RWKV_CXXFLAGS", "").split()


def cuda_home() -> str:
    """CUDA_HOME: the toolkit whose nvcc is used; "": nvcc on the PATH, else that of /usr/local/cuda or of Python's packages."""
    return os.environ.get("CUDA_HOME", "")


def let_waiting_threads_sleep() -> None:
    """GOMP_SPINCOUNT, unless it is set: OpenMP's threads that wait for each other soon sleep. To be called before torch is imported.

    By default they spin for long, and beside other work on the cores each wait costs a time slice (records/2026-11-21-cpu-demo).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


_threads = 0  # that limit_threads has set


def limit_threads() -> None:
    """OMP_NUM_THREADS, unless it is set: no more threads than there is CPU time for, as in a container with a quota.

    Of more threads some would stand still, and the others wait for them. To be called before torch is imported.
    """
    global _threads
    if "OMP_NUM_THREADS" not in os.environ and cpus() < cpus_allowed():
        _threads = cpus()
        os.environ["OMP_NUM_THREADS"] = str(_threads)


def share_threads(processes: int) -> int:
    """The threads of one of so many processes on this machine, now in OMP_NUM_THREADS, where limit_threads has set it; else 0."""
    if not _threads:
        return 0
    os.environ["OMP_NUM_THREADS"] = str(max(1, _threads // processes))
    return int(os.environ["OMP_NUM_THREADS"])


def rewrites_lines(stream: TextIO) -> bool:
    """Whether it is a terminal that knows the codes that rewrite a line. TERM: dumb means one that only prints, such as Emacs' shell."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def torch_extensions_dir() -> Path | None:
    """TORCH_EXTENSIONS_DIR: where torch.utils.cpp_extension, and so DeepSpeed, builds; None: torch's default."""
    place = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(place) if place else None


def minipile_url() -> str:
    """MINIPILE_URL: folder (http, https) that holds minipile.bin and minipile.idx; default: the official one."""
    return os.environ.get("MINIPILE_URL", "")


def first_process() -> bool:
    """True in the one process that may print, by the variables of torchrun, deepspeed, SLURM or Lightning; True without any."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name):
            return int(os.environ[name]) == 0
    return all(int(os.environ.get(name) or 0) == 0 for name in ("NODE_RANK", "LOCAL_RANK"))


def first_of_node() -> bool:
    """True in the first process of each node."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def node_rank() -> int:
    """NODE_RANK: which of several nodes this is, where Lightning starts its processes."""
    return _number("NODE_RANK")


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name) or 0)
    except ValueError:
        raise UserError(f"{name}={os.environ[name]} is set, which is no number; unset it") from None


def launched_by_variables() -> bool:
    """True when a launcher (torchrun, deepspeed) has started every process and set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR."""
    return all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def meeting_place_given() -> bool:
    """MASTER_PORT is, and which node this one is: each of those that no launcher has started would choose a port, and be the first."""
    return bool(os.environ.get("MASTER_PORT") and (os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK")))


def meet_on_this_machine() -> None:
    """MASTER_ADDR and MASTER_PORT of a run that this process alone starts: here, at a free port, whatever a cluster has left in them."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.pop("MASTER_PORT", None)


def launched_per_node() -> int:
    """Processes on this node according to a launcher's variables (torchrun: LOCAL_WORLD_SIZE, deepspeed: LOCAL_SIZE); 0 when unknown."""
    return _number("LOCAL_WORLD_SIZE") or _number("LOCAL_SIZE")


def launched_processes() -> int:
    """WORLD_SIZE: all processes according to a launcher; 0 when unknown."""
    return _number("WORLD_SIZE")


def launched_nodes() -> int:
    """Nodes according to a launcher's WORLD_SIZE and its processes per node; 0 when unknown."""
    here = launched_per_node()
    return launched_processes() // here if here else 0


def forget_launchers_of_others() -> None:
    """Drops what says which process of a launcher's this one is, where none has started it: it would wait for processes that never come.

    srun's variables are in a batch script too, which is alone, and without SLURM_STEP_ID, and in salloc's shell, a step of one task. RANK
    alone is not of a launcher that starts each process: a PyTorchJob's says which node this is. Processes that Lightning has started
    have LOCAL_RANK and WORLD_SIZE.
    """
    if not os.environ.get("SLURM_STEP_ID") or "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_TASKS")):
        for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
            os.environ.pop(name, None)
    if not os.environ.get("WORLD_SIZE"):
        os.environ.pop("LOCAL_RANK", None)
    if not launched_by_variables():
        os.environ.pop("RANK", None)


def slurm_tasks() -> int:
    """SLURM_NTASKS; 0 when unknown. Meaningful only in processes that srun started."""
    return _number("SLURM_NTASKS")


def slurm_tasks_per_node() -> int:
    """SLURM_NTASKS_PER_NODE; 0 when unknown. Meaningful only in processes that srun started."""
    return _number("SLURM_NTASKS_PER_NODE")


def use_deepspeed_on_cpu() -> None:
    """Makes DeepSpeed, imported after this, run on the CPU (it would look for other accelerators first)."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def use_interface(name: str) -> None:
    """GLOO_SOCKET_IFNAME, unless it is set: the network interface by which gloo's processes reach each other."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def decided_precision() -> str:
    """RWKV_PRECISION: what the first process found for --precision auto, for the processes that it starts; "" when nothing was decided."""
    return os.environ.get("RWKV_PRECISION", "")


def hand_on_precision(precision: str) -> None:
    """Tells the processes that this one will start what --precision auto means."""
    os.environ["RWKV_PRECISION"] = precision


def decided_fp32_products() -> str:
    """RWKV_FP32_PRODUCTS: the path of fp32 matrix products that the first process chose, for the processes that it starts; "": none yet."""
    return os.environ.get("RWKV_FP32_PRODUCTS", "")


def hand_on_fp32_products(setting: str) -> None:
    """Tells the processes that this one will start how to multiply fp32 matrices."""
    os.environ["RWKV_FP32_PRODUCTS"] = setting


def starter() -> int:
    """RWKV_STARTER: the process that has started this one; 0: none has said so. Unlike getppid() also right when that one is dead."""
    return int(os.environ.get("RWKV_STARTER", 0))


def hand_on_starter() -> None:
    """Tells the processes that this one will start whose they are."""
    os.environ["RWKV_STARTER"] = str(os.getpid())
