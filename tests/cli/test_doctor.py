"""doctor: every illness that can be made here, with its cure, and a machine that is well."""

import importlib
import os
import re
import sys
import time

import pytest
import torch

from rwkvlm import native
from rwkvlm.cli import doctor, main
from rwkvlm.config import UserError
from rwkvlm.data.tokenizer import WorldTokenizer
from rwkvlm.ops import wkv4, wkv7
from rwkvlm.ops.adamw import reference as adamw
from rwkvlm.ops.cross_entropy import reference as loss
from rwkvlm.ops.fused import reference as fused
from rwkvlm.ops.rosa import reference as rosa
from rwkvlm.ops.rwkv7_step import Rwkv7Step

KERNELS = ["wkv7", "wkv4", "rosa", "loss", "fused", "adamw", "rwkv7_step", "tokenizer"]
NAMES = ["python", "compiler", "gpu", "nvcc", *KERNELS, "ranks", "disk", "locks"]


@pytest.mark.slow
def test_a_machine_that_is_well(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(doctor, "SPACE", 0)
    monkeypatch.setattr(doctor, "SLOW", 0)
    assert main(["doctor", "--proj_dir", str(tmp_path / "not" / "yet")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in NAMES]
    assert (
        all(re.search(r"C\+\+, largest deviation from the reference \de-\d\d$", line) for line in lines[4:11])
        and "2 processes over gloo add up" in lines[12]
    )


def told(capsys) -> dict[str, str]:
    return {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}


def test_each_illness_has_one_line_with_its_cure(capsys, tmp_path, monkeypatch):
    """No compiler, ranks that fail, a full disk, a lock left behind, and a check that breaks; the exit code says so."""
    stale, fresh = tmp_path / "fused_adam" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir()
        lock.touch()
    old = time.time() - 2 * doctor.STALE
    os.utime(stale.parent, (old, old))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "RANK", "raise SystemExit('no route to host')")
    monkeypatch.setattr(doctor, "SPACE", 1 << 60)
    monkeypatch.setattr(
        doctor,
        "KERNELS",
        dict.fromkeys(KERNELS, lambda: "not here") | {"wkv7": lambda: 1 / 0, "rosa": lambda: importlib.import_module("torchless")},
    )
    assert main(["doctor", "--proj_dir", str(tmp_path)]) == 1
    lines = told(capsys)
    assert list(lines) == NAMES
    assert lines["compiler"].startswith("CURE  compiler") and "apt-get install g++, or set CXX" in lines["compiler"]
    assert "2 processes over gloo fail: no route to host; a firewall" in lines["ranks"]
    assert "free some space" in lines["disk"] and "iB free in" in lines["disk"]
    assert lines["locks"].endswith(f"rm {stale}") and str(fresh) not in lines["locks"]
    assert lines["wkv7"].endswith("division by zero") and lines["loss"].startswith("ok ")
    assert lines["rosa"] == f"-     rosa       not looked at: {sys.executable} has no torchless"


def test_packages_that_are_missing_or_of_another_version_are_named(tmp_path, monkeypatch):
    lacking = tmp_path / "requirements.txt"
    lacking.write_text("torch>=2\nnot-there>=1\nnumpy>=99\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", lacking)
    with pytest.raises(
        UserError, match=rf"lacks not-there>=1 \(not installed\), numpy>=99 \(installed: .*\); run: .*python.* -m pip install -r {lacking}"
    ):
        doctor.python()


def test_every_native_kernel_is_asked():
    assert set(doctor.KERNELS) == {source.parent.name for source in native.SOURCE_DIR.glob("*/*.cpp")}


def a_little_more(right):
    def wrong(*args):
        found = right(*args)
        return 1.01 * found if isinstance(found, torch.Tensor) else [1.01 * tensor for tensor in found]

    return wrong


WRONG = {
    "wkv7": (wkv7, "wkv7_reference", a_little_more),
    "wkv4": (wkv4, "wkv4_reference", a_little_more),
    "rosa": (rosa, "values", a_little_more),
    "loss": (loss, "head_cross_entropy", a_little_more),
    "fused": (fused, "relu_square", a_little_more),
    "adamw": (adamw, "gradient_norms", a_little_more),
    "rwkv7_step": (Rwkv7Step, "__call__", a_little_more),
    "tokenizer": (WorldTokenizer, "encode", lambda right: lambda *args: right(*args)[1:]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_computes_something_else_is_found(monkeypatch, name):
    """One side of the comparison is made wrong by one percent, or by one token."""
    place, attribute, spoil = WRONG[name]
    monkeypatch.setattr(place, attribute, spoil(getattr(place, attribute)))
    with pytest.raises(UserError, match="differs from the reference.*; set RWKV_CACHE_DIR to an empty folder to build it again"):
        doctor.KERNELS[name]()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied; choose another --proj_dir"):
        doctor.disk(tmp_path)


def test_nvcc_on_a_machine_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "listed_gpus", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvcc = tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="wkv7 runs in plain PyTorch, much slower; set CUDA_HOME to a CUDA toolkit, or unset it"):
        doctor.nvcc()
    nvcc.parent.mkdir()
    for release, told in (("13.0", "CUDA 13.0"), ("12.8", "CUDA 12.8; torch's is 13.0, so DeepSpeed's FusedAdam does not build")):
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        nvcc.chmod(0o755)
        assert doctor.nvcc().startswith(told)


def test_why_a_kernel_runs_in_plain_pytorch(monkeypatch):
    same = [torch.ones(2)]
    cuda = torch.device("cuda")
    monkeypatch.setattr(native, "cuda_available", lambda name: (False, f"no nvcc for {name}"))
    assert doctor._compared("wkv7", "cuda", cuda, same, same).startswith("CUDA, largest deviation")
    with pytest.raises(UserError, match="runs in plain PyTorch, slower: no nvcc for wkv7"):
        doctor._compared("wkv7", "torch", cuda, same, same)
