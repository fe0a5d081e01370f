"""The lazy build: once, locked, one line for every failure."""

import ctypes
import fcntl
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwkvlm import native
from rwkvlm.config import UserError, env

CUDA = native.SOURCE_DIR

if subprocess.run(["sh", "-c", "command -v ${CXX:-g++}"], capture_output=True).returncode:
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A kernel folder of our own: op.cpp says how many of the builds of cpu.cpp are linked with it."""
    monkeypatch.setenv("RWKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCE_DIR", tmp_path / "cuda")
    folder = tmp_path / "cuda" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "cuda" / "common").mkdir()
    isas = list(native.INSTRUCTION_SETS)
    declared = "".join(f"int answer_{isa}();" for isa in isas)
    summed = " + ".join(f"answer_{isa}()" for isa in isas)
    (folder / "cpu.cpp").write_text("#define JOIN(a, b) a##b\n#define NAME(isa) JOIN(answer_, isa)\nint NAME(ISA)() { return 1; }\n")
    (folder / "op.cpp").write_text(f'{declared}\nextern "C" __attribute__((visibility("default"))) int answer() {{ return {summed}; }}\n')
    return folder


def test_builds_once_and_again_when_a_source_changes(toy, capfd):
    library = native.build("toy")
    assert ctypes.CDLL(str(library)).answer() == len(native.INSTRUCTION_SETS)
    assert capfd.readouterr().err == "building native kernel toy (once, 10 to 20 s)\n"
    before = library.stat().st_mtime_ns
    assert native.build("toy") == library and library.stat().st_mtime_ns == before
    assert capfd.readouterr().err == ""
    (toy.parent / "common" / "new.h").write_text("// changed\n")
    changed = native.build("toy")
    assert changed != library
    with open(toy / "op.cpp", "a") as file:
        file.write("// changed\n")
    assert native.build("toy") not in (library, changed)


def test_flags_and_compiler_are_part_of_the_key(toy, monkeypatch):
    first = native.build("toy")
    monkeypatch.setenv("RWKV_CXXFLAGS", "-DOTHER")
    assert native.build("toy") != first


def test_a_compile_error_is_one_line(toy):
    (toy / "op.cpp").write_text("int f( {\n")
    with pytest.raises(native.NativeBuildError, match="native kernel toy does not compile: .*op.cpp:1.*error") as caught:
        native.build("toy")
    assert "\n" not in str(caught.value)
    assert not [p for p in (toy.parents[1] / "cache" / "native").iterdir() if p.suffix in (".so", ".building")]


def test_so_many_compilers_at_once_as_there_are_cpus_for(toy, monkeypatch):
    asked = []
    monkeypatch.setattr(native, "cpus", lambda: 3)
    monkeypatch.setattr(native, "ThreadPoolExecutor", lambda max_workers: asked.append(max_workers) or ThreadPoolExecutor(max_workers))
    native.build("toy")
    assert asked == [3]


def test_no_compiler_is_one_line(toy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NativeBuildError, match="no-such-compiler is not on the PATH; install") as caught:
        native.build("toy")
    assert "\n" not in str(caught.value)


def test_where_there_is_no_home_kernels_are_built_among_the_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv("RWKV_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert env.cache_dir() == tmp_path / "home" / ".cache" / "rwkvlm"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    own = tmp_path / f"rwkvlm-{os.getuid()}"
    for home in (str(tmp_path / "file"), "/proc/nowhere"):
        monkeypatch.setenv("HOME", home)
        assert env.cache_dir() == own and own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert env.cache_dir() == own
    own.chmod(0o2700)  # as in a folder that hands its group on
    assert env.cache_dir() == own
    own.chmod(0o770)  # somebody else's libraries would be loaded
    with pytest.raises(
        native.NativeBuildError, match="neither the home folder nor .* set RWKV_CACHE_DIR to a folder that only you can write to"
    ):
        native.build("tokenizer")
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(UserError, match="set RWKV_CACHE_DIR"):
        env.cache_dir()


def test_a_home_that_cannot_be_written_to_serves_the_kernels_that_it_has(toy, monkeypatch, tmp_path):
    """As after one start by root, in an image, or on a home mounted read-only."""
    monkeypatch.delenv("RWKV_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    built, own, access = tmp_path / "home" / ".cache" / "rwkvlm" / "native", tmp_path / f"rwkvlm-{os.getuid()}" / "native", os.access
    there = native.build("toy")
    assert there.parent == built
    monkeypatch.setattr(os, "access", lambda path, mode: path != built and access(path, mode))
    assert native.build("toy") == there
    there.unlink()
    assert native.build("toy") == own / there.name and env.cache_dir() == own.parent


def test_a_folder_from_which_nothing_may_be_executed_is_named_with_the_cure(toy, tmp_path, monkeypatch):
    """Mounting one needs root's rights; the message is the linker's own, which torch hides behind one of its own."""

    def load(path):
        raise OSError(f"Could not load this library: {path}") from OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(torch.ops, "load_library", load)
    built = native.build("toy")
    assert native.available("toy") == (
        False,
        f"native kernel toy does not load: {built}: failed to map segment from shared object; "
        "its folder may be mounted noexec: set RWKV_CACHE_DIR to one that is not",
    )


def test_an_unknown_kernel_and_an_unusable_cache_are_one_line(toy, tmp_path, monkeypatch):
    with pytest.raises(native.NativeBuildError, match="native kernel other: no sources"):
        native.build("other")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RWKV_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(native.NativeBuildError, match="RWKV_CACHE_DIR chooses another place"):
        native.build("toy")


def test_a_library_that_does_not_load_is_one_line(toy, monkeypatch):
    (toy / "op.cpp").write_text("void missing_function();\nstruct At { At() { missing_function(); } } at;\n")
    (toy / "cpu.cpp").write_text("")
    assert native.available("toy")[0] is False
    assert "does not load" in native.available("toy")[1] and "\n" not in native.available("toy")[1]


def test_what_a_killed_builder_left_behind_blocks_nobody(toy):
    cache = toy.parents[1] / "cache" / "native"
    cache.mkdir(parents=True)
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('9'); f.flush(); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(cache / "toy.lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    (cache / "toy-abandoned.building").mkdir()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    native.build("toy")
    assert time.monotonic() - started < 20
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".so"]


def test_a_living_builder_is_waited_for_and_named(toy, monkeypatch, capfd):
    monkeypatch.setattr(native, "TIME_OUT", 0.3)
    cache = toy.parents[1] / "cache" / "native"
    cache.mkdir(parents=True)
    with open(cache / "toy.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711")
        file.flush()
        with pytest.raises(native.NativeBuildError, match="process 4711 has been building it for over 0 s; stop it"):
            native.build("toy")
    assert capfd.readouterr().err == "waiting for process 4711, which builds native kernel toy\n"


def test_two_processes_build_once(toy):
    build = (
        "import sys; from pathlib import Path; from rwkvlm import native; native.SOURCE_DIR = Path(sys.argv[1]); print(native.build('toy'))"
    )
    command = [sys.executable, "-c", build, str(toy.parent)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (out, err), (out2, err2) = (p.communicate(timeout=120) for p in both)
    assert out == out2 and out.strip().endswith(".so")
    assert (err + err2).count("building native kernel") == 1


def test_nothing_is_built_at_import(tmp_path):
    code = "import rwkvlm.ops.wkv7, rwkvlm.native, os, sys; sys.exit(os.path.exists(os.environ['RWKV_CACHE_DIR']))"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"RWKV_CACHE_DIR": str(tmp_path / "cache")}, timeout=120).returncode
        == 0
    )


def test_what_starts_cuda_kernels_is_a_library_of_its_own(toy, capfd):
    """Which a machine without a GPU does not wait for."""
    (toy / "gpu.cpp").write_text("int f( {\n")
    (toy / "autograd_gpu.cpp").write_text('extern "C" __attribute__((visibility("default"))) int launched() { return 7; }\n')
    library = native.build("toy")
    assert ctypes.CDLL(str(library)).answer() == len(native.INSTRUCTION_SETS)
    with pytest.raises(native.NativeBuildError, match="^launch of CUDA kernel toy does not compile: .*gpu.cpp:1.*error") as caught:
        native.build_launches("toy")
    assert "\n" not in str(caught.value)
    (toy / "gpu.cpp").write_text("")
    capfd.readouterr()
    launches = native.build_launches("toy")
    assert ctypes.CDLL(str(launches)).launched() == 7 and native.build("toy") == library
    assert capfd.readouterr().err == "building launch of CUDA kernel toy (once, 10 to 20 s)\n"
    (toy / "api.cuh").write_text("// what they share with the kernels\n")
    assert native.build_launches("toy") != launches and native.build("toy") == library
    assert {path.name for path in library.parent.glob("*.lock")} == {"toy.lock", "launch-toy.lock"}  # nobody waits for who builds the other


@pytest.fixture
def toy_cuda(toy):
    """A kernel folder with a .cu: one function that needs no GPU."""
    shutil.rmtree(toy.parent / "common")
    shutil.copytree(CUDA / "common", toy.parent / "common")
    os.symlink(CUDA / "emulation", toy.parent / "emulation")
    (toy / "gpu.cpp").write_text("")
    (toy / "toy.cu").write_text('#include "../common/device.cuh"\nextern "C" int answer() { return device::ceil_div(125, 3); }\n')
    return toy


def gpu(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    for function in (native.cuda_library, native.cuda_available, native.load_launches):
        function.cache_clear()


def test_without_a_gpu_the_reason_leads_to_the_doctor(toy_cuda, monkeypatch):
    gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    can, reason = native.cuda_available("toy")
    assert not can and "uses no GPU here; python -m rwkvlm doctor" in reason


def test_without_nvcc_the_reason_names_the_cure(toy_cuda, tmp_path, monkeypatch):
    gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    can, reason = native.cuda_available("toy")
    assert not can and reason == f"CUDA kernel toy: nvcc is not in CUDA_HOME={tmp_path}; set CUDA_HOME to a CUDA toolkit, or unset it"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(native, "CUDA_DEFAULT", tmp_path)
    monkeypatch.setattr(native, "_toolkits_of_pypi", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    for release, cure in (
        ("13.0", f"{sys.executable} -m pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.*'"),
        ("12.8", "install the CUDA toolkit 12.8, or set CUDA_HOME"),  # PyPI has no nvcc of that
    ):
        monkeypatch.setattr(torch.version, "cuda", release)
        native.cuda_available.cache_clear()
        reason = f"CUDA kernel toy: nvcc is not on the PATH, in {tmp_path} or among Python's packages; {cure}"
        assert native.cuda_available("toy") == (False, reason)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.nvcc_cure() == "install the CUDA toolkit of a torch built for CUDA, or set CUDA_HOME"


def test_where_nvcc_is(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), str(tmp_path / "of torch")])
    (tmp_path / "packages" / "nvidia" / "cu13").mkdir(parents=True)
    (tmp_path / "of torch" / "nvidia" / "cu13").mkdir(parents=True)
    importlib.invalidate_caches()
    monkeypatch.setattr(native, "CUDA_DEFAULT", tmp_path / "default")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert native.nvcc() is None
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    assert native.nvcc() is None
    monkeypatch.delitem(sys.modules, "nvidia")
    for place in ("packages/nvidia/cu13/bin", "default/bin", "path", "home/bin"):  # the last one counts
        path = tmp_path / place / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        if place == "home/bin":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert native.nvcc() == str(path)
        of_pypi = [tmp_path / folder / "nvidia/cu13" for folder in ("packages", "of torch")]
        assert native.toolkits_around(str(path)) == (of_pypi if place.startswith("packages") else [])


def stand_in(tmp_path, monkeypatch, script, knows=()):
    """An nvcc of our own that makes code for these GPUs; for none: it does not tell."""
    path = tmp_path / "home" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    lists = "".join(f"echo sm_{number};" for number in knows) or "exit 1;"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then {lists} exit 0; fi\n{script}')
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))


def test_what_nvcc_says_is_one_line(toy_cuda, tmp_path, monkeypatch):
    gpu(monkeypatch, (12, 0))
    stand_in(
        tmp_path,
        monkeypatch,
        'case "$*" in --version) echo nvcc 11;; *) echo "nvcc fatal   : Unsupported gpu architecture $*" >&2; exit 1;; esac\n',
    )
    can, reason = native.cuda_available("toy")
    assert (
        not can
        and reason.startswith("CUDA kernel toy does not compile: nvcc fatal   : Unsupported gpu architecture")
        and "compute_120" in reason
    )
    assert "\n" not in reason


def emulating_nvcc(tmp_path, monkeypatch):
    """nvcc's place is taken by g++ and the emulation: what is built and loaded is real, the GPU is not.

    Gives the file where its calls are written down.
    """
    log = tmp_path / "log"
    stand_in(
        tmp_path,
        monkeypatch,
        f'echo "$*" >> {log}\n'
        'case "$*" in --version) echo nvcc;;\n'
        '*" -c "*) while [ "$1" != -c ]; do shift; done; exec g++ -std=c++17 -fPIC -Wno-unknown-pragmas -x c++ "$@";;\n'
        '*) while [ "${1%.o}" = "$1" ]; do shift; done; exec g++ -shared "$@";; esac\n',
    )
    return log


def test_a_library_for_all_gpus_of_the_machine(toy_cuda, tmp_path, monkeypatch, capfd):
    gpu(monkeypatch, (9, 0), (8, 6), (9, 0))
    log = emulating_nvcc(tmp_path, monkeypatch)
    native.build_launches("toy")
    capfd.readouterr()
    library = native.cuda_library("toy")
    assert library.answer() == 42
    assert capfd.readouterr().err == "building CUDA kernel toy (once, a minute or two)\n"
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    assert len(compiled) == 2
    assert all(
        line.count("-gencode") == 2 and "arch=compute_86,code=sm_86" in line and "arch=compute_90a,code=sm_90a" in line for line in compiled
    )
    assert native.cuda_available("toy") == (True, "")
    assert native.cuda_message(library, -1) == "a shape or dtype that this kernel does not take (-1)"
    first = native.build_cuda("toy", ("90a",))
    (toy_cuda / "new.cuh").write_text("// changed\n")
    assert native.build_cuda("toy", ("90a",)) != first


def test_the_launches_are_compiled_while_nvcc_works(toy_cuda, tmp_path, monkeypatch, capfd):
    gpu(monkeypatch, (9, 0))
    built = f"{env.cache_dir()}/native/launch-toy-*.so"
    waiting = f"for _ in $(seq 300); do ls {built} >/dev/null 2>&1 && echo they are there >&2 && exit 1; sleep 0.1; done; exit 1"
    stand_in(tmp_path, monkeypatch, f'[ "$1" = --version ] || {{ {waiting}; }}\n')
    assert native.cuda_available("toy")[1] == "CUDA kernel toy does not compile: they are there"
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "building CUDA kernel toy (once, a minute or two)",
        "building launch of CUDA kernel toy (once, 10 to 20 s)",
    ]
    assert list((env.cache_dir() / "native").glob("launch-toy-*.so"))


def test_launches_that_do_not_compile_are_the_reason_why_not(toy_cuda, tmp_path, monkeypatch):
    """Of the CUDA kernels alone."""
    gpu(monkeypatch, (9, 0))
    emulating_nvcc(tmp_path, monkeypatch)
    (toy_cuda / "gpu.cpp").write_text("int f( {\n")
    can, reason = native.cuda_available("toy")
    assert not can and reason.startswith("launch of CUDA kernel toy does not compile: ") and "gpu.cpp:1" in reason and "\n" not in reason
    native.build("toy")


@pytest.mark.parametrize(
    "knows, gpus, flags",
    [
        # nvcc 12.4
        ((80, 86, 90), ("86", "90a", "120"), ["compute_86,code=sm_86", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]),
        ((80, 90), ("100a", "120"), ["compute_90,code=compute_90"]),
        ((90, 100, 120), ("103", "120"), ["compute_100,code=compute_100", "compute_120,code=sm_120"]),
        ((), ("100a", "61"), ["compute_100a,code=sm_100a", "compute_61,code=sm_61"]),  # one that does not tell: it is asked
    ],
    ids=str,
)
def test_a_gpu_that_nvcc_does_not_know_gets_what_its_driver_can_compile(toy_cuda, tmp_path, monkeypatch, knows, gpus, flags):
    """And one beside it that nvcc knows is served as if it were alone."""
    log = tmp_path / "log"
    stand_in(tmp_path, monkeypatch, f'echo "$*" >> {log}\ncase "$*" in --version) echo nvcc;; *) exit 1;; esac\n', knows)
    with pytest.raises(native.NativeBuildError, match="does not compile"):
        native.build_cuda("toy", gpus)
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    assert compiled and all(
        [word.removeprefix("-gencode=arch=") for word in line.split() if word.startswith("-gencode")] == flags for line in compiled
    )


def test_a_gpu_that_nvcc_no_longer_knows_is_a_reason(toy_cuda, tmp_path, monkeypatch):
    gpu(monkeypatch, (8, 6), (6, 1))
    stand_in(tmp_path, monkeypatch, "echo nvcc\n", (75, 80, 86, 90, 120))
    can, reason = native.cuda_available("toy")
    assert not can and reason == (
        f"CUDA kernel toy: {tmp_path}/home/bin/nvcc makes code for compute capability 7.5 and higher, and a GPU here has 6.1;"
        " hide it with CUDA_VISIBLE_DEVICES, or set CUDA_HOME to an older toolkit"
    )


def test_the_nvcc_that_is_here_knows_the_gpus_that_are_compiled_for():
    if native.nvcc() is None:
        pytest.skip("needs nvcc")
    assert native._targets("toy", native.nvcc(), ("80", "90a")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_an_nvcc_that_does_not_start_is_one_line(toy_cuda, tmp_path, monkeypatch):
    gpu(monkeypatch, (9, 0))
    stand_in(tmp_path, monkeypatch, "")
    path = tmp_path / "home" / "bin" / "nvcc"
    path.write_bytes(b"\x7fELF of another machine")
    can, reason = native.cuda_available("toy")
    assert not can and reason.startswith(f"{path} does not run: [Errno 8] Exec format error") and "\n" not in reason


def test_the_line_that_is_told_is_the_one_that_says_why():
    full = "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status\n"
    assert native._one_line(full) == "/usr/bin/ld: final link failed: No space left on device"
    warned = (
        "nvcc warning : Support for offline compilation for architectures prior to ... will be removed\n"
        "nvcc fatal   : Unsupported gpu architecture 'compute_120'\n"
    )
    assert native._one_line(warned) == "nvcc fatal   : Unsupported gpu architecture 'compute_120'"


def test_a_driver_that_is_too_old_is_a_reason(toy_cuda, monkeypatch, tmp_path):
    gpu(monkeypatch, (9, 0))
    source = tmp_path / "refuses.cpp"
    source.write_text('extern "C" int cuda_probe() { return 35; } extern "C" const char* cuda_message(int) { return "driver too old"; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "refuses.so")], check=True)
    monkeypatch.setattr(native, "build_cuda", lambda name, architectures: tmp_path / "refuses.so")
    can, reason = native.cuda_available("toy")
    assert not can and "driver too old (35); update the driver, or set CUDA_HOME to a toolkit" in reason


def test_nvcc_builds_a_library_that_needs_no_cuda_runtime_of_others(toy_cuda):
    if native.nvcc() is None:
        pytest.skip("needs nvcc")
    path = native.build_cuda("toy", ("80",))
    library = ctypes.CDLL(str(path))
    assert library.answer() == 42
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "cudaLaunchKernel" not in symbols and "answer" in symbols
    if not torch.cuda.is_available():
        assert "driver" in native.cuda_message(library, library.cuda_probe())


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in native.SOURCE_DIR.glob("*/cpu.cpp")))
def test_the_plain_path_compiles_for_aarch64(folder, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross compiler (Debian: g++-aarch64-linux-gnu)")
    flags = [flag for flag in native.FLAGS if flag != "-O3"]
    source = native.SOURCE_DIR / folder / "cpu.cpp"
    target = tmp_path / "cpu.o"
    done = subprocess.run(
        [compiler, *flags, "-DISA=plain", "-c", str(source), "-o", str(target)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and target.stat().st_size, done.stderr[-2000:]
