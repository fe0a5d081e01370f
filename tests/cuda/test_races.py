"""No kernel has a race: the emulation's detector sees none in any of them, and sees one wherever a barrier that they need is taken away."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from oracles.elementwise import Case
from oracles.emulated_all import registered, run_around_wkv7, run_wkv7
from oracles.emulated_ttt import make_ttt_case, run
from oracles.emulated_wkv7 import AROUND, RACES, Kernels, compile_kernels, make_case
from rwkvlm.ops.adamw import native as adamw
from rwkvlm.ops.fused import native as fused
from rwkvlm.ops.rosa import native as rosa

pytestmark = pytest.mark.slow

# Of each launch that has any: what taking away each barrier of a block, each __syncwarp of a warp, each wait for copies of a
# thread does; R: a race. A dot is right for the last barrier of a scan, behind which no chunk comes, for one before anything
# was read, where a step of training has waited for the next chunk already, and for a __syncwarp that is there for ptxas.
SCAN, COLLECT = ("R.R.", "RR", "RR"), ("R", "", "")
WKV7 = {
    "chunked": [("RRRRRRR", "R.", "R"), SCAN, ("R.R.", "....", "RR"), ("RRRRRRRRRR", "", "RR")],
    "wide": [("RRRRRR", "R..", "R"), ("RRRRRRRRRRRRRRR", "", "RRR")],
    "segments": [("R.R.", "", "RR"), ("RRR", "", "RRR")] * 2,
    "sequential": [(".RRRRR", "", ""), (".RRRRRRRRRRRRRRRRR", "", "")],
    "ttt": [("RRRRRRRR...", "RR", "RR."), ("RRRRRRRR...", "....", "RR."), ("RRRRRRRRRRRRRRR", "", "RR")],
}
AROUND_WKV7 = {
    "norm_mix": [("R", "", ""), ("RRR", "", "RRR"), COLLECT],
    "wide_norm_mix": [("R", "", ""), ("RRR.", "", ""), COLLECT],
    "time_mix_inputs": [("RR", "", "R" * 16), COLLECT],
    "time_mix_output": [("RR", "", "R" * 16), COLLECT],
    "loss": [("R", "", "")],
    "norms": [("R", "", ""), ("R", "", "")],
    "rosa": [(".RRRRRR", "", "")],
    "rosa_backward": [(".RRRRRRRRRRRRRRRRR..", ".RRRRR.R.R.R", "")],
    "rosa_long_match": [("." + "R" * 104 + ".", "." + "R" * 33 + ".R" * 17, "")],  # which two warps share
}


@pytest.fixture(scope="module")
def wkv7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels(tmp_path_factory.mktemp("races"), "-O1", "-g1", RACES)


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels(tmp_path_factory.mktemp("races"), "-O1", "-g1", RACES, sources=AROUND)


@pytest.fixture
def shared_limit() -> Iterator[Callable[[ctypes.CDLL, int], None]]:
    """Sets how much shared memory a block may have, until the end of the test."""
    libraries = []

    def set_limit(library: ctypes.CDLL, count: int) -> None:
        libraries.append(library)
        library.emulation_shared_limit(ctypes.c_size_t(count))

    yield set_limit
    for library in libraries:
        library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))


def test_wkv7_has_no_race(wkv7: Path, shared_limit: Callable[[ctypes.CDLL, int], None]) -> None:
    shared_limit(ctypes.CDLL(str(wkv7)), 99 * 1024)  # what a block may have on sm_86, sm_89 and sm_120
    run_wkv7(wkv7)


def test_what_is_around_wkv7_has_no_race(around: Path) -> None:
    run_around_wkv7(around)


def without_each(library: ctypes.CDLL, work: Callable[[], object], launches: tuple[int, ...] = ()) -> list[tuple[str, str, str]]:
    """What becomes of `work` without each barrier of each launch (of these alone) in turn, as the tables have it."""
    library.emulation_error.restype = ctypes.c_char_p
    library.emulation_drop(-1, -1, -1, -1)
    work()
    found = []
    for launch in launches or range(library.emulation_launches()):
        of_launch = ["", "", ""]
        for kind in range(3):
            while True:
                drop = [-1, -1, -1]
                drop[kind] = len(of_launch[kind])
                library.emulation_drop(launch, *drop)
                try:
                    work()
                    seen = "."
                except (AssertionError, RuntimeError):
                    assert library.emulation_error().startswith(b"race: "), library.emulation_error()
                    seen = "R"
                if not library.emulation_dropped():
                    break
                of_launch[kind] += seen
        found.append(tuple(of_launch))
    library.emulation_drop(-1, -1, -1, -1)
    return [x for x in found if any(x)]


@pytest.mark.parametrize("name", WKV7)
def test_each_barrier_of_wkv7(wkv7: Path, name: str) -> None:
    kernels = Kernels(wkv7)
    work = {
        "chunked": lambda: kernels.run("chunked", make_case(67, N=32, H=1)),
        "wide": lambda: kernels.run("chunked", make_case(20, N=128, H=1)),
        "segments": lambda: kernels.run("chunked", make_case(260, N=32, H=1, segment_chunks=2)),
        "sequential": lambda: kernels.run("sequential", make_case(35, N=32, H=1)),
        "ttt": lambda: run(kernels, make_ttt_case(67, H=1)),
    }[name]
    launches = {"wide": (0, 3), "segments": (1, 2, 5, 6), "ttt": (1, 2, 4)}.get(name, ())  # the others are those of "chunked"
    assert without_each(kernels.library, work, launches) == WKV7[name]


@pytest.mark.parametrize("name", AROUND_WKV7)
def test_each_barrier_of_what_is_around_wkv7(around: Path, name: str, shared_limit: Callable[[ctypes.CDLL, int], None]) -> None:
    library = ctypes.CDLL(str(around))
    assert fused.why_not((torch.float32,), 16) == adamw.why_not() == rosa.why_not(torch.float32) == ""  # defines the operators
    ops = torch.ops.rwkvlm
    torch.manual_seed(0)
    symbols, ends, logits, gradients = torch.randn(1, 6, 1).sign(), torch.randn(2, 1), torch.randn(1, 600), [torch.randn(9000)]
    same = torch.ones(1, 34, 1)

    def inputs(operator: str, T: int, H: int) -> list:
        return [t if t is None else t.detach() for t in Case(operator, B=1, T=T, H=H, N=64, dtype=torch.bfloat16).inputs]

    def norm_mix() -> None:
        x, branch, weight, bias, last, *mixes = inputs("norm_mix", 152 if "wide" in name else 40, 5)
        stream, newest, moments, *out = ops.norm_mix_forward(x, branch, weight, bias, 1e-5, last, mixes, None)
        ops.norm_mix_backward(x, newest, out, x if branch is None else stream, moments, weight, bias, last, mixes)

    def time_mix_inputs() -> None:
        tensors = inputs("time_mix_inputs", 17, 2)
        ops.time_mix_inputs_backward(*ops.time_mix_inputs_forward(*tensors, 64), *tensors, 64, None)

    def time_mix_output() -> None:
        tensors = inputs("time_mix_output", 17, 2)
        ops.time_mix_output_backward(ops.time_mix_output_forward(*tensors, 64, 1e-5), *tensors, 64, 1e-5)

    work = {
        "norm_mix": norm_mix,
        "wide_norm_mix": norm_mix,
        "time_mix_inputs": time_mix_inputs,
        "time_mix_output": time_mix_output,
        "loss": lambda: ops.loss_of_logits(logits.clone(), torch.tensor([0]), torch.empty(1), 1.0, 0.1, True),
        "norms": lambda: ops.gradient_norms(gradients),
        "rosa": lambda: ops.rosa(symbols, symbols, symbols, *ends, 1, False, 0.1, False, None, None, None, True),
        "rosa_backward": lambda: ops.rosa_backward(symbols, symbols, None, None, *ends, 1, False, 0.1, True),
        "rosa_long_match": lambda: ops.rosa_backward(same, same, same, same, *ends, 1, False, 0.1, True),
    }[name]
    shared_limit(library, 8192 if "wide" in name else 227 * 1024)
    with registered(library, "adamw", "fused", "loss", "rosa"):
        assert without_each(library, work) == AROUND_WKV7[name]
