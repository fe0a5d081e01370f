"""`python -m rwkvlm machine`: the answers that the shell relies on. tests/scripts/test_env.py asks through the shell."""

import os
import sys
import types

import pytest

from rwkvlm.cli import machine
from rwkvlm.config import UserError


@pytest.mark.parametrize(
    "built_for, capability, runs",
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),  # binaries run on a higher minor version
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_80", "compute_90"], (12, 0), True),  # PTX is compiled for later devices
        (["sm_80", "compute_120"], (9, 0), False),
        (["sm_100", "sm_120"], (12, 1), True),
    ],
)
def test_architectures(built_for, capability, runs):
    assert machine.covers(built_for, capability) == runs


def fake_torch(cuda_version, available=True, capability=(9, 0), arch_list=("sm_90",)):
    torch = types.ModuleType("torch")
    torch.__version__ = "2.13.0+cu130"
    torch.version = types.SimpleNamespace(cuda=cuda_version)
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 1,
        get_device_capability=lambda i: capability,
        get_device_name=lambda i: "GPU of the test",
        get_arch_list=lambda: list(arch_list),
    )
    return torch


@pytest.mark.parametrize(
    "torch, words",
    [
        (fake_torch(None), ("built without CUDA", "--force-reinstall torch==2.13.0 --index-url")),
        (fake_torch("13.0", available=False), ("driver", "CUDA 13.0", "CUDA_VISIBLE_DEVICES")),
        (fake_torch("13.0", capability=(12, 0)), ("GPU of the test, sm_120", "sm_90")),
    ],
)
def test_gpu_that_torch_cannot_use(monkeypatch, torch, words):
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(machine, "listed_gpus", lambda: 1)
    with pytest.raises(UserError) as error:
        machine.main([])
    message = str(error.value)
    assert "\n" not in message and "ACCELERATOR=cpu" in message and all(word in message for word in words)


def test_a_driver_that_hangs(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "PATIENCE", 0.2)
    with pytest.raises(UserError, match="nvidia-smi does not answer within 0.2 s.*ACCELERATOR=cpu"):
        machine.main([])
    assert machine.main(["--accelerator", "cpu"]) == 0


def test_without_nvidia_smi_the_devices_count(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    for name in ("nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert machine.listed_gpus() == 0
    for name in ("nvidia0", "nvidia11"):
        (tmp_path / name).touch()
    for driver, gpus in ((False, 0), (True, 2)):
        monkeypatch.setattr(machine, "has_driver", lambda: driver)
        assert machine.listed_gpus() == gpus


def test_answers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", fake_torch("13.0"))
    monkeypatch.setattr(machine, "listed_gpus", lambda: 1)
    assert machine.main([]) == 0 and capsys.readouterr().out == "ACCELERATOR=gpu\n"
    assert machine.main(["--accelerator", "cpu"]) == 0 and capsys.readouterr().out == "ACCELERATOR=cpu\n"
