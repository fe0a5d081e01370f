"""The lazy build: once, locked, one line for every failure."""

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwkvlm import native
from rwkvlm.config import UserError, env

CUDA = native.SOURCE_DIR

if subprocess.run(["sh", "-c", "command -v ${CXX:-g++}"], capture_output=True).returncode:
    pytest.skip("no C++ compiler", allow_module_level=True)


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


def test_the_line_that_is_told_is_the_one_that_says_why():
    full = "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status\n"
    assert native._one_line(full) == "/usr/bin/ld: final link failed: No space left on device"
    warned = (
        "nvcc warning : Support for offline compilation for architectures prior to ... will be removed\n"
        "nvcc fatal   : Unsupported gpu architecture 'compute_120'\n"
    )
    assert native._one_line(warned) == "nvcc fatal   : Unsupported gpu architecture 'compute_120'"


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
