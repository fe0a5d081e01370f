"""The choice of an implementation: by name or by itself."""

import subprocess
import sys

import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.ops import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "")
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.delenv("RWKV_KERNEL", raising=False)


@pytest.mark.parametrize("requested", ["", "auto", "@rwkv3"])
def test_auto_takes_the_native_kernel_silently(requested, capfd):
    backend.set_kernel(requested)
    assert backend.choose("op", CPU, {"cpu": lambda: ""}) == "cpu"
    assert capfd.readouterr().err == ""


def test_auto_says_each_reason_once_an_operator(capfd):
    for op, reason in (("p", "x"), ("p", "x"), ("p", "y"), ("q", "x")):
        assert backend.choose(op, CPU, {"cpu": lambda reason=reason: reason}) == "torch"
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"{op}: running in plain PyTorch, which is slower ({why})" for op, why in (("p", "x"), ("p", "y"), ("q", "x"))]


def test_auto_on_a_device_without_a_kernel(capfd):
    assert backend.choose("op", torch.device("cuda", 0), {"cpu": lambda: ""}) == "torch"
    assert "there is no cuda kernel for it yet" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, device, supported, message",
    [
        ("cpu", CPU, {"cpu": lambda: "no compiler"}, "--kernel cpu: op cannot run: no compiler"),
        ("cuda", CPU, {"cuda": lambda: ""}, "the tensors are on cpu"),
        ("cpu", torch.device("cuda", 1), {"cpu": lambda: ""}, "the tensors are on cuda:1"),
        ("cuda", torch.device("cuda", 0), {"cpu": lambda: ""}, "there is no cuda kernel for it yet"),
        ("triton", CPU, {}, "--kernel triton: unknown; expected one of cuda, cpu, torch"),
    ],
)
def test_an_asked_for_backend_runs_or_fails(name, device, supported, message):
    with pytest.raises(UserError, match=message) as caught, backend.asked_for(name):
        backend.choose("op", device, supported)
    assert "\n" not in str(caught.value)


def test_plain_pytorch_by_name_is_silent(capfd):
    with backend.asked_for("torch"):
        assert backend.choose("op", CPU, {"cpu": lambda: ""}) == "torch"
    assert capfd.readouterr().err == ""


def test_set_kernel_outranks_the_environment(monkeypatch):
    assert backend.requested() == ""
    monkeypatch.setenv("RWKV_KERNEL", "torch")
    assert backend.requested() == "torch"
    backend.set_kernel("cpu")
    assert backend.requested() == "cpu"
    with pytest.raises(UserError):
        backend.set_kernel("gpu")
    backend.set_kernel("")  # what train.py says without --kernel
    assert backend.requested() == "torch"
    with backend.asked_for("cuda"), backend.asked_for(""):
        assert backend.requested() == "cuda"
    with backend.restored(), backend.asked_for("cuda"):
        backend.set_kernel("cpu")
        with backend.asked_for("torch"):
            assert backend.requested() == "torch"
        assert backend.requested() == "cuda"
    with pytest.raises(ZeroDivisionError), backend.asked_for("cpu"):
        1 / 0
    assert backend.requested() == "torch"
    monkeypatch.setenv("RWKV_KERNEL", "gpu")
    with pytest.raises(UserError, match="gpu: unknown"):
        backend.requested()


def test_the_mark_is_torchs_own():
    assert vars(backend.decided_while_tracing(lambda: 0)) == vars(torch.compiler.assume_constant_result(lambda: 0))


def test_a_program_that_compiles_nothing_does_not_wait_for_the_compiler():
    """torch.compiler's own decorators import it."""
    code = "import sys, rwkvlm.infer, rwkvlm.models; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
