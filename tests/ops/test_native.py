"""The lazy build: once, locked, one line for every failure."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from rwkvlm import native

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
    assert capfd.readouterr().err == "building native kernel toy (once, about 10 s)\n"
    before = library.stat().st_mtime_ns
    assert native.build("toy") == library and library.stat().st_mtime_ns == before
    assert capfd.readouterr().err == ""
    (toy.parent / "common" / "new.h").write_text("// changed\n")
    assert native.build("toy") != library


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


def test_no_compiler_is_one_line(toy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NativeBuildError, match="no-such-compiler is not on the PATH; install") as caught:
        native.build("toy")
    assert "\n" not in str(caught.value)


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
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); f.write('9'); f.flush(); print('held', flush=True); time.sleep(60)"
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
    build = "import sys; from pathlib import Path; from rwkvlm import native; native.SOURCE_DIR = Path(sys.argv[1]); print(native.build('toy'))"
    command = [sys.executable, "-c", build, str(toy.parent)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (out, err), (out2, err2) = (p.communicate(timeout=120) for p in both)
    assert out == out2 and out.strip().endswith(".so")
    assert (err + err2).count("building native kernel") == 1


def test_nothing_is_built_at_import(tmp_path):
    code = "import rwkvlm.ops.wkv7, rwkvlm.native, os, sys; sys.exit(os.path.exists(os.environ['RWKV_CACHE_DIR']))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"RWKV_CACHE_DIR": str(tmp_path / "cache")}, timeout=120).returncode == 0
