"""CUDA kernels are built by the nvcc that is found; one line for every failure."""

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

from rwkvlm import native
from rwkvlm.config import env

CUDA = native.SOURCE_DIR

if subprocess.run(["sh", "-c", "command -v ${CXX:-g++}"], capture_output=True).returncode:
    pytest.skip("no C++ compiler", allow_module_level=True)


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


def test_a_compiler_too_new_for_nvcc(toy_cuda, tmp_path, monkeypatch):
    gpu(monkeypatch, (9, 0))
    stand_in(
        tmp_path,
        monkeypatch,
        'case "$*" in --version) echo nvcc;;\n*"-ccbin g++-15 "*) echo "error: as asked" >&2; exit 1;;\n'
        '*) echo "error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!" >&2; exit 1;; esac\n',
    )
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    assert native.cuda_available("toy")[1].endswith("are not supported!; install g++-15 and set NVCC_CCBIN=g++-15")
    native.cuda_available.cache_clear()
    monkeypatch.setenv("NVCC_CCBIN", "g++-15")
    assert native.cuda_available("toy") == (False, "CUDA kernel toy does not compile: error: as asked")


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


def test_a_driver_that_is_too_old_is_a_reason(toy_cuda, monkeypatch, tmp_path):
    gpu(monkeypatch, (9, 0))
    source = tmp_path / "refuses.cpp"
    source.write_text('extern "C" int cuda_probe() { return 35; } extern "C" const char* cuda_message(int) { return "driver too old"; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "refuses.so")], check=True)
    monkeypatch.setattr(native, "_nvcc_for", lambda name: "nvcc")
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


def test_nvcc_beside_a_newer_c_library(toy_cuda, tmp_path, monkeypatch):
    """glibc 2.42 has an rsqrt that throws nothing; CUDA 13.0 declares one that may throw."""
    if native.nvcc() is None:
        pytest.skip("needs nvcc")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "math.h").write_text(
        '#include_next <math.h>\n#ifdef __USE_GNU\nextern "C" double rsqrt(double) noexcept(true);\n#endif\n'
    )
    monkeypatch.setenv("CPATH", str(tmp_path / "newer"))
    assert ctypes.CDLL(str(native.build_cuda("toy", ("80",)))).answer() == 42
