"""Native kernels: builds cuda/<name>/ on its first use, keeps the result, and loads it: C++ into torch.ops.rwkvlm, CUDA through ctypes.

Every *.cpp of the folder is compiled once, except cpu.cpp, which is compiled once per instruction set of the machine's family
(see cuda/common/isa.h). The compiler is called directly, since torch.utils.cpp_extension.load takes half a minute for what the
stable ABI of torch makes a matter of seconds. Nothing is built at import. Threads are torch's own (torch::stable::parallel_for):
no second OpenMP runtime enters the process, none is needed to build, and torch.set_num_threads is obeyed.

A folder without op.cpp has nothing to do with torch: a plain C interface, for commands that should not wait for torch to load.

The *.cu of a folder become a library of their own (`cuda_library`), by nvcc, for the GPUs of this machine. What starts
them, *gpu.cpp, is a third library (`load_launches`), which only they need: it includes headers beyond the stable ABI,
with which a file takes twenty seconds. So does fused/autograd.cpp, which the CPU's operators need.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .config import UserError, env
from .config.cgroups import cpus
from .config.locks import try_lock

SOURCE_DIR = Path(__file__).resolve().parents[2] / "cuda"
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -DNDEBUG -ffp-contract=fast -fno-math-errno -Wno-psabi".split()
INSTRUCTION_SETS = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
# With _GNU_SOURCE, which g++ defines, glibc 2.41 declares sinpi and 2.42 rsqrt otherwise than the headers of CUDA 12 and 13.0 do.
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC -diag-suppress 177 -U_GNU_SOURCE".split()
LAUNCHES = "*gpu.cpp"
CUDA_DEFAULT = Path("/usr/local/cuda")
TIME_OUT = 600.0  # seconds, for the compiler and for another process's build


class NativeBuildError(RuntimeError):
    """A native kernel cannot be built or loaded here; one line that says why."""


@functools.cache
def load(name: str) -> None:
    """Make the operators of cuda/<name>/ available as torch.ops.rwkvlm.*; builds them on the first use ever. NativeBuildError."""
    _load_operators(f"native kernel {name}", build(name))


@functools.cache
def load_launches(name: str) -> None:
    """The same for those of its *gpu.cpp, which call a `cuda_library`, or another library with the same functions. NativeBuildError."""
    _load_operators(f"launch of CUDA kernel {name}", build_launches(name))


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The C functions of cuda/<name>/, a folder without op.cpp; built on the first use ever, torch is not imported. NativeBuildError."""
    return _opened(f"native kernel {name}", build(name))


@functools.cache
def available(name: str) -> tuple[bool, str]:
    """Whether `load(name)` works here, and the reason why not; asked once in a process."""
    try:
        load(name)
    except NativeBuildError as error:
        return False, str(error)
    return True, ""


@functools.cache
def cuda_library(name: str) -> ctypes.CDLL:
    """The C functions of the *.cu of cuda/<name>/, built for this machine's GPUs on the first use ever. NativeBuildError.

    What starts them (`load_launches`) is built and loaded too. The library knows nothing of torch, and is called with
    addresses: x.data_ptr(), torch.cuda.current_stream().cuda_stream. So nvcc needs no header of torch, which take it
    minutes and tie the result to one version; the same library serves every torch, one built for another CUDA release
    included, since it brings its own CUDA runtime, and memory and streams belong to the driver, which all runtimes share.
    Its functions return 0, or an error that `cuda_message` names. The caller makes the tensors' device the current one.
    """
    architectures, _ = _architectures(name), _nvcc_for(name)
    with ThreadPoolExecutor(max_workers=1) as pool:
        launches = pool.submit(load_launches, name)  # built while nvcc compiles
        found = _opened(f"CUDA kernel {name}", build_cuda(name, architectures))
    launches.result()
    code = found.cuda_probe()
    if code:
        raise NativeBuildError(
            f"CUDA kernel {name}: the driver does not run what {nvcc()} builds: {cuda_message(found, code)}; "
            "update the driver, or set CUDA_HOME to a toolkit of the driver's CUDA release (nvidia-smi shows it)"
        )
    return found


@functools.cache
def cuda_available(name: str) -> tuple[bool, str]:
    """Whether `cuda_library(name)` works here, and the reason why not, with the cure; asked once in a process."""
    try:
        cuda_library(name)
    except NativeBuildError as error:
        return False, str(error)
    return True, ""


def cuda_message(library: ctypes.CDLL, code: int) -> str:
    """What it means that a function of a `cuda_library` has returned this and not 0."""
    library.cuda_message.restype = ctypes.c_char_p
    return f"{library.cuda_message(code).decode()} ({code})"


def nvcc() -> str | None:
    """Where nvcc is: in CUDA_HOME if that is set, else on the PATH, in /usr/local/cuda or among Python's packages; None: nowhere there."""
    if env.cuda_home():
        return shutil.which("nvcc", path=str(Path(env.cuda_home()) / "bin"))
    for folder in (None, CUDA_DEFAULT, *_toolkits_of_pypi()):
        if found := shutil.which("nvcc", path=folder and str(folder / "bin")):
            return found
    return None


def _toolkits_of_pypi() -> list[Path]:
    """Where Python's packages have put parts of a CUDA toolkit: nvidia/cu13 of each folder of packages."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ValueError:  # somebody has put a module of that name into sys.modules
        return []
    return [found for folder in (spec and spec.submodule_search_locations) or () for found in sorted(Path(folder).glob("cu[0-9]*"))]


def toolkits_around(compiler: str) -> list[Path]:
    """The folders that nvcc needs besides its own if it is one of Python's packages: pip takes parts that torch has brought as they lie."""
    found = _toolkits_of_pypi()
    return found if Path(compiler).resolve().parents[1] in (folder.resolve() for folder in found) else []


def nvcc_package() -> str:
    """What pip installs nvcc of torch's CUDA release with; "": PyPI has none for it, as before CUDA 13."""
    release = _cuda_of_torch()
    return f"cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]=={release}.*" if int(release.partition(".")[0] or 0) >= 13 else ""


def nvcc_cure() -> str:
    """What to do where there is no nvcc."""
    if env.cuda_home():
        return "set CUDA_HOME to a CUDA toolkit, or unset it"
    if package := nvcc_package():
        return f"{sys.executable} -m pip install '{package}'"
    return f"install the CUDA toolkit {_cuda_of_torch() or 'of a torch built for CUDA'}, or set CUDA_HOME"


def _cuda_of_torch() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return torch.version.cuda or ""


def build(name: str) -> Path:
    """The shared library of cuda/<name>/, compiled if these sources, flags, compiler and torch have not met in this cache yet."""
    return _built(f"native kernel {name}", name, name, [x for x in _sources(name, "*.cpp") if not x.match(LAUNCHES)], (".h",))


def build_launches(name: str) -> Path:
    """That of its *gpu.cpp, which share structs with the kernels (api.cuh); needs neither nvcc nor a GPU."""
    return _built(f"launch of CUDA kernel {name}", f"launch-{name}", name, _sources(name, LAUNCHES), (".h", ".cuh"))


def build_cuda(name: str, architectures: tuple[str, ...]) -> Path:
    """The shared library of the *.cu of cuda/<name>/ for these GPUs ("80", "90a"); needs nvcc, but neither torch nor a GPU."""
    compiler = _nvcc_for(name)
    targets = _targets(name, compiler, architectures)
    host = shutil.which(env.cuda_cxx())
    facts = [_says(compiler, "--version"), _says(host, "--version") if host else "", platform.machine(), *CUDA_FLAGS, *targets]
    key = _digest(facts, name, (".cu", ".cuh", ".h"))
    return _cached(f"CUDA kernel {name}", f"cuda-{name}-{key}.so", lambda library: _compile_cuda(name, compiler, targets, library))


def _nvcc_for(name: str) -> str:
    compiler = nvcc()
    if compiler is None:
        where = f"in CUDA_HOME={env.cuda_home()}" if env.cuda_home() else f"on the PATH, in {CUDA_DEFAULT} or among Python's packages"
        raise NativeBuildError(f"CUDA kernel {name}: nvcc is not {where}; {nvcc_cure()}")
    return compiler


def _built(what: str, stem: str, name: str, sources: list[Path], included: tuple[str, ...]) -> Path:
    compiler = shutil.which(env.cxx())
    if compiler is None:
        raise NativeBuildError(f"{what}: no C++ compiler ({env.cxx()} is not on the PATH; install g++ or set CXX)")
    torch_build = (_torch() / "version.py").read_text() if _registers(name) else "none"  # two builds of one version may differ
    facts = [_says(compiler, "--version"), platform.machine(), torch_build, *FLAGS, *env.cxx_flags(), repr(INSTRUCTION_SETS)]
    key = _digest(facts, name, included, sources)
    return _cached(what, f"{stem}-{key}.so", lambda library: _compile(what, name, sources, compiler, library))


def _cached(what: str, file: str, make: Callable[[Path], None]) -> Path:
    """The library of this name in the cache; `make` compiles it where it is not there, in one process at a time."""
    stem = file.rpartition("-")[0]
    try:
        cache = env.cache_dir(file) / "native"
        cache.mkdir(parents=True, exist_ok=True)
        library = cache / file
        if not library.exists():
            with _lock(cache / f"{stem}.lock", what):
                if not library.exists():  # another process may have built it while this one waited
                    for leftover in cache.glob(f"{stem}-*.building"):
                        shutil.rmtree(leftover, ignore_errors=True)
                    make(library)
    except UserError as error:
        raise NativeBuildError(f"{what}: {error}") from None
    except OSError as error:
        raise NativeBuildError(f"{what}: {error}; RWKV_CACHE_DIR chooses another place to build in") from None
    return library


def _load_operators(what: str, library: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise NativeBuildError(_not_loaded(what, error.__cause__ or error)) from None  # torch's own error does not say why


def _opened(what: str, path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(_not_loaded(what, error)) from None


def _not_loaded(what: str, error: BaseException) -> str:
    """The linker's message names the file."""
    reason = _one_line(str(error))
    noexec = "; its folder may be mounted noexec: set RWKV_CACHE_DIR to one that is not" if "failed to map segment" in reason else ""
    return f"{what} does not load: {reason}{noexec}"


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def _registers(name: str) -> bool:
    """Whether the folder registers operators with torch."""
    return (SOURCE_DIR / name / "op.cpp").exists()


def _architectures(name: str) -> tuple[str, ...]:
    """Those of all GPUs that torch uses here: one library serves them all."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        raise NativeBuildError(
            f"CUDA kernel {name}: torch {torch.__version__} uses no GPU here; python -m rwkvlm doctor says why and what to do"
        )
    return tuple(sorted({architecture(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}))


def architecture(capability: tuple[int, int]) -> str:
    """A compute capability as nvcc's number, with the "a" that opens the instructions of that chip alone where kernels may use them."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a" if number in ("90", "100") else number


def _targets(name: str, compiler: str, architectures: tuple[str, ...]) -> list[str]:
    """nvcc's flags for these GPUs.

    For one that this nvcc does not know: PTX for the newest before it, of which the driver makes machine code.
    """
    known = sorted({int(number) for number in re.findall(r"sm_(\d+)", _says(compiler, "--list-gpu-code"))})
    flags = []
    for wanted in architectures:
        number = int(wanted.rstrip("a"))
        before = [k for k in known if k < number]
        if not known or number in known:
            flags.append(f"-gencode=arch=compute_{wanted},code=sm_{wanted}")
        elif before:
            flags.append(f"-gencode=arch=compute_{before[-1]},code=compute_{before[-1]}")
        else:
            raise NativeBuildError(
                f"CUDA kernel {name}: {compiler} makes code for compute capability {known[0] / 10} and higher, "
                f"and a GPU here has {number / 10}; hide it with CUDA_VISIBLE_DEVICES, or set CUDA_HOME to an older toolkit"
            )
    return list(dict.fromkeys(flags))


@functools.cache
def _says(compiler: str, question: str) -> str:
    try:
        return subprocess.run([compiler, question], capture_output=True, text=True, timeout=TIME_OUT).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{compiler} does not run: {error}") from None


def _digest(facts: list[str], name: str, suffixes: tuple[str, ...], sources: Sequence[Path] = ()) -> str:
    """A name for these facts, the sources, and what of the folder and of the common one has these suffixes."""
    digest = hashlib.sha256("\n".join(facts).encode())
    for folder in ("common", name):
        for source in sorted(p for p in (SOURCE_DIR / folder).glob("*") if p.suffix in suffixes or p in sources):
            digest.update(f"\n{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """One builder at a time; on a file system without locks two may build the same thing, and the last rename wins."""
    with open(path, "a+") as file:
        deadline, told = time.monotonic() + TIME_OUT, False
        while not try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if time.monotonic() > deadline:
                raise NativeBuildError(
                    f"{what}: process {holder} has been building it for over {TIME_OUT:.0f} s; stop it, then start again"
                )
            if not told:
                print(f"waiting for process {holder}, which builds {what}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


@contextlib.contextmanager
def _workshop(what: str, takes: str, library: Path) -> Iterator[Path]:
    """A folder to build in beside the library, gone afterwards."""
    print(f"building {what} (once, {takes})", file=sys.stderr, flush=True)
    work = Path(tempfile.mkdtemp(prefix=library.stem.rpartition("-")[0] + "-", suffix=".building", dir=library.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(what: str, name: str, sources: list[Path], compiler: str, library: Path) -> None:
    with _workshop(what, "10 to 20 s", library) as work:
        common, linked = [compiler, *FLAGS], []
        if _registers(name):
            common.append(f"-I{_torch() / 'include'}")
            linked = [f"-L{_torch() / 'lib'}", "-ltorch_cpu", "-lc10"]
            if sys.platform == "darwin":  # where it does not suffice that the process has them loaded
                linked.append(f"-Wl,-rpath,{_torch() / 'lib'}")
        jobs = []
        for source in sources:
            variants = INSTRUCTION_SETS if source.name == "cpu.cpp" else {"": []}
            for isa, flags in variants.items():
                define = [f"-DISA={isa}", *flags] if isa else []
                target = work / f"{source.stem}{isa}.o"
                jobs.append((target, [*common, *define, *env.cxx_flags(), "-c", str(source), "-o", str(target)]))
        _run_all(what, [command for _, command in jobs])
        objects = [str(target) for target, _ in jobs]
        built = work / "built.so"
        _run(what, [compiler, "-shared", *env.cxx_flags(), *objects, "-o", str(built), *linked])
        os.replace(built, library)


def _compile_cuda(name: str, compiler: str, targets: list[str], library: Path) -> None:
    what, sources = f"CUDA kernel {name}", [*_sources(name, "*.cu"), *_sources("common", "*.cu")]
    with _workshop(what, "a minute or two", library) as work:
        beside = toolkits_around(compiler)
        common = [compiler, "-ccbin", env.cuda_cxx(), *CUDA_FLAGS, *targets, *(f"-I{folder / 'include'}" for folder in beside)]
        jobs = [(work / f"{i}.o", source) for i, source in enumerate(sources)]
        _run_all(what, [[*common, "-c", str(source), "-o", str(target)] for target, source in jobs])
        built = work / "built.so"
        # The runtime within is this library's own: another in the process must neither be taken for it nor see it.
        hidden = ["-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "-Bsymbolic"]
        # No kernel here starts kernels, and the runtime for that is not among Python's packages.
        found = ["-cudadevrt", "none", *(f"-L{folder / 'lib'}" for folder in beside)]
        _run(what, [*common, "-shared", *hidden, *found, *(str(target) for target, _ in jobs), "-o", str(built)])
        os.replace(built, library)


def _sources(name: str, pattern: str) -> list[Path]:
    found = sorted((SOURCE_DIR / name).glob(pattern))
    if not found:
        raise NativeBuildError(f"native kernel {name}: no sources in {SOURCE_DIR / name}; install the repository with pip install -e .")
    return found


def _run_all(what: str, commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(max_workers=cpus()) as pool:
        list(pool.map(lambda command: _run(what, command), commands))


def _run(what: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_OUT)
    except subprocess.TimeoutExpired:
        raise NativeBuildError(f"{what}: the compiler took longer than {TIME_OUT:.0f} s") from None
    if done.returncode:
        newest = re.search(r"gcc versions later than (\d+) are not supported", done.stderr)
        cure = f"; install g++-{newest[1]} and set NVCC_CCBIN=g++-{newest[1]}" if newest else ""
        raise NativeBuildError(f"{what} does not compile: {_one_line(done.stderr)}{cure}")


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    # collect2 says only that ld has said why
    told = (line for line in lines if ("error" in line or "fatal" in line) and not line.startswith("collect2:"))
    return next(told, lines[0])[:300]
