"""Which implementation of an operator runs: asked for by name, or the best that can run here, with the reason said once."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Mapping

import torch

from rwkvlm.config import UserError, env

BACKENDS = {"cuda": "CUDA", "cpu": "C++", "torch": "plain PyTorch"}  # and what they are called
AUTO = ("", "auto", "@rwkv3")  # "@rwkv3" is the official trainer's name for "pick one"

_requested = ""
_here: contextvars.ContextVar[str] = contextvars.ContextVar("kernel", default="")  # of this thread, inside `asked_for`
_said: set[str] = set()


def set_kernel(name: str) -> None:
    """Ask for a backend in this process: "auto" or "@rwkv3", "cuda", "cpu", "torch", which outrank RWKV_KERNEL; "" leaves it to that."""
    global _requested
    _requested = _valid(name)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """After it, what `set_kernel` asked for is what it was before: for a run that chooses for itself."""
    global _requested
    before = _requested
    try:
        yield
    finally:
        _requested = before


@contextlib.contextmanager
def asked_for(name: str) -> Iterator[None]:
    """Within it, this thread asks for another backend; "" changes nothing. Outranks `set_kernel`."""
    token = _here.set(_valid(name) or _here.get())
    try:
        yield
    finally:
        _here.reset(token)


def requested() -> str:
    """What `asked_for` asks for, else what `set_kernel` did, else RWKV_KERNEL, else auto."""
    return _here.get() or _requested or _valid(env.kernel())


def choose(op: str, device: torch.device, supported: Mapping[str, Callable[[], str]]) -> str:
    """The backend that runs `op` on `device`, as `requested` says.

    supported: native backend -> function that returns "" when it can run these inputs here, else the reason why not. One that is
        not in it has not been written for this operator; "torch", plain PyTorch, always can.
    A backend asked for by name that cannot run: UserError with the reason. Auto takes the device's native backend, else
    "torch", and says on stderr why, once per operator and reason.
    """
    name = requested()
    if name not in AUTO:
        reason = _why_not(name, device, supported)
        if reason:
            raise UserError(f"--kernel {name}: {op} cannot run: {reason}; ask for another kernel or leave --kernel empty")
        return name
    native = device.type
    reason = _why_not(native, device, supported)
    if not reason:
        return native
    line = f"{op}: running in plain PyTorch, which is slower ({reason})"
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
    return "torch"


def decided_while_tracing(function: Callable) -> Callable:
    """A decorator: called, and what it needs is built, once while torch.compile traces, whose graphs have its result as a constant.

    As torch.compiler.assume_constant_result, which imports the whole compiler: two seconds at each start of a program
    that compiles nothing.
    """
    function._dynamo_marked_constant = True
    return function


def _valid(name: str) -> str:
    if name not in AUTO and name not in BACKENDS:
        raise UserError(f"--kernel {name}: unknown; expected one of {', '.join(BACKENDS)}, or nothing to choose by itself")
    return name


def _why_not(name: str, device: torch.device, supported: Mapping[str, Callable[[], str]]) -> str:
    if name == "torch":
        return ""
    if name != device.type:
        return f"the tensors are on {device}"
    if name not in supported:
        return f"there is no {name} kernel for it yet"
    return supported[name]()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, whose range the recurrences and unscaled gradients of a loss leave; every other dtype itself."""
    return torch.float32 if dtype == torch.float16 else dtype


def widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that they are computed in. Where their dtypes differ they stay as they are, for the contract to refuse."""
    return tuple(x.to(computed_in(x.dtype)) for x in tensors) if all(x.dtype == tensors[0].dtype for x in tensors) else tensors
