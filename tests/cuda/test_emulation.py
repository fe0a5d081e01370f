"""The host emulation must find what it says it finds: each of these small kernels is right, or has one planted fault."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from oracles.emulated_wkv7 import CUDA, RACES, run_sanitized
from oracles.ptx import compile_ptx, why_not

SOURCE = r"""
#include "wkv7/mma.cuh"
using namespace wkv7;

// Neighbour exchange through shared memory, with or without the barrier between writing and reading.
__global__ void exchange(float* out, int barrier) {
    float* x = reinterpret_cast<float*>(shared_memory());
    x[threadIdx.x] = float(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = x[(threadIdx.x + 1) % blockDim.x];
}
// Each lane writes into a place, of its own or one that it shares with a lane of the other warp, and reads it again after a collective.
__global__ void places(float* out, int own) {
    const int place = 4 * (own ? threadIdx.x : threadIdx.x % 32);
    float sum = 0.f;
    for (int i = 0; i < 3; ++i) {
        shared<float>(place) = float(threadIdx.x);
        __syncwarp();
        sum += shared<float>(place);
    }
    out[threadIdx.x] = sum;
}
__global__ void half_a_barrier(float*, int) { if (threadIdx.x < 32) __syncthreads(); }
__global__ void two_barriers(float*, int one) {
    if (threadIdx.x < 32 || one)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void a_mask(float* out, int whole) { out[threadIdx.x] = __shfl_xor_sync(whole ? ~0u : 0xffffu, 1.f, 1); }
__global__ void half_a_warp(float* out, int) { if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1); }
__global__ void copy(float* out, int wait) {
    float* x = reinterpret_cast<float*>(shared_memory());
    copy_async(16 * threadIdx.x, out + 4 * threadIdx.x, true);
    copy_commit();
    if (wait) copy_wait<0>();
    out[4 * threadIdx.x] = x[4 * threadIdx.x] + 1.f;
}
// D [16, 8] = A [16, 16] B [16, 8] with A and B made of small integers, through ldmatrix of bf16 tiles in shared memory (B transposed).
__global__ void product(float* out, int) {
    const int a = 0, b = 512, lane = threadIdx.x;  // b: [8][16], row n, column k
    for (int i = lane; i < 256; i += 32) shared<bf16>(a + 2 * i) = from_float<bf16>(float((i / 16) * 3 % 7 - i % 16 % 5));
    for (int i = lane; i < 128; i += 32) shared<bf16>(b + 2 * i) = from_float<bf16>(float((i / 16) * 5 % 3 + i % 16 % 4));
    __syncthreads();
    uint32_t A[4], B[4];
    ldmatrix<false>(A, a + ((lane % 16) * 16 + lane / 16 * 8) * 2);
    ldmatrix<false>(B, b + ((lane % 8) * 16 + lane / 8 % 2 * 8) * 2);
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    const uint32_t b2[2] = {B[0], B[1]};
    mma(d, A, b2);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
__global__ void beyond(float* out, int index) {
    shared<float>(4 * threadIdx.x) = 1.f;
    out[threadIdx.x] = shared<float>(4 * (threadIdx.x + index));
}
// Neighbours within a warp, which no schedule tells from right ones, lanes going on until the next collective; a shuffle orders nothing.
__global__ void lanes(float* out, int ordered) {
    shared<float>(4 * threadIdx.x) = float(threadIdx.x);
    if (ordered) __syncwarp(); else __shfl_xor_sync(~0u, 1.f, 1);
    out[threadIdx.x] = shared<float>(4 * (threadIdx.x ^ 1));
}
// The second round writes what slower warps may still read.
__global__ void rounds(float* out, int barriers) {
    for (int i = 0; i < 2; ++i) {
        shared<float>(4 * threadIdx.x) = float(threadIdx.x);
        __syncthreads();
        out[threadIdx.x] = shared<float>(4 * (threadIdx.x ^ 32));
        if (barriers) __syncthreads();
    }
}
__global__ void factors(float* out, int ordered) {
    shared<uint4>(16 * threadIdx.x) = make_uint4(0, 0, 0, 0);
    if (ordered) __syncwarp();
    uint32_t x[4];
    ldmatrix<false>(x, 16 * threadIdx.x);
    out[threadIdx.x] = float(x[0]);
}
__global__ void copies_of_others(float* out, int barrier) {
    copy_async(16 * threadIdx.x, out + 128, true);
    copy_commit(), copy_wait<0>();
    if (barrier) __syncthreads();
    out[threadIdx.x] = shared<float>(16 * (threadIdx.x ^ 16));
}
__launch_bounds__(32) __global__ void bounded(float* out, int) { out[threadIdx.x] = 1.f; }
__global__ void two_blocks(float* out, int own) { out[threadIdx.x + (own ? blockIdx.x * 32 : 0)] = 1.f; }
__global__ void highest(float* out, int atomic) {
    int* const at = reinterpret_cast<int*>(out);
    if (atomic) atomicMax(at, int(threadIdx.x)); else if (threadIdx.x > 30) *at = int(threadIdx.x);
}
#define ENTRY(name, threads, bytes, ...) \
    extern "C" int run_##name(float* out, int flag) { return launch(name, dim3(__VA_ARGS__), threads, bytes, nullptr, out, flag); }
ENTRY(exchange, 64, 256)
ENTRY(places, 64, 256)
ENTRY(half_a_barrier, 64, 0)
ENTRY(two_barriers, 64, 0)
ENTRY(a_mask, 32, 0)
ENTRY(half_a_warp, 32, 0)
ENTRY(copy, 32, 512)
ENTRY(product, 32, 768)
ENTRY(beyond, 32, 128)
ENTRY(lanes, 32, 128)
ENTRY(rounds, 64, 256)
ENTRY(factors, 32, 512)
ENTRY(copies_of_others, 32, 512)
ENTRY(bounded, 64, 0)
ENTRY(two_blocks, 32, 0, 2)
ENTRY(highest, 64, 0)
"""


def compile_planted(folder: Path, *flags: str, architecture: str = "") -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "planted.cu").write_text(SOURCE)
    if architecture:
        if missing := why_not(architecture):
            pytest.skip(missing)
        return compile_ptx(folder / "ptx", architecture, [folder / "planted.cu"])
    linked = [flag for flag in flags if flag != RACES]
    commands = (
        ["-c", *flags, f"-I{CUDA}", "-x", "c++", "planted.cu", "-o", "planted.o"],
        ["-shared", *linked, "planted.o", "-o", "planted.so"],
    )
    for command in commands:
        build = subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", *command], cwd=folder, capture_output=True, text=True, timeout=120)
        assert build.returncode == 0, build.stderr
    return folder / "planted.so"


@pytest.fixture(scope="module", params=["", "90a", pytest.param("100a", marks=pytest.mark.slow)])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiled from the source, or translated from the PTX for an architecture."""
    found = ctypes.CDLL(str(compile_planted(tmp_path_factory.mktemp("planted"), architecture=request.param)))
    found.emulation_error.restype = ctypes.c_char_p
    found.of_ptx = bool(request.param)
    return found


def run(library: ctypes.CDLL, name: str, flag: int = 0, reverse: int = 0) -> tuple[int, list[float]]:
    out = (ctypes.c_float * 256)(*range(256))
    library.emulation_reverse(reverse)
    return getattr(library, f"run_{name}")(out, flag), list(out)


def test_a_barrier_orders_and_its_absence_shows(library: ctypes.CDLL) -> None:
    right = [float((i + 1) % 64) for i in range(64)]
    assert [run(library, "exchange", 1, reverse)[1][:64] == right for reverse in (0, 1)] == [True, True]
    assert [run(library, "exchange", 0, reverse)[1][:64] == right for reverse in (0, 1)] == [False, False]  # NaN poison, then order


def test_warps_that_take_turns_meet_in_places_that_are_not_their_own(library: ctypes.CDLL) -> None:
    right = [3.0 * i for i in range(64)]
    assert [run(library, "places", 1, reverse)[1][:64] == right for reverse in (0, 1)] == [True, True]
    assert [run(library, "places", 0, reverse)[1][:64] == right for reverse in (0, 1)] == [True, False]


@pytest.mark.parametrize("name", ["half_a_barrier", "half_a_warp"])
def test_divergence_is_an_error_and_not_a_hang(library: ctypes.CDLL, name: str) -> None:
    code, _ = run(library, name)
    assert code == 1 and b"deadlock" in library.emulation_error()


@pytest.mark.parametrize(("name", "said"), [("two_barriers", b"different lines"), ("a_mask", b"a part of a warp")])
def test_what_hardware_leaves_undefined_is_an_error(library: ctypes.CDLL, name: str, said: bytes) -> None:
    """A barrier under a condition on which the block does not agree; a mask that leaves out lanes that are there."""
    assert run(library, name, 1)[0] == 0
    assert run(library, name, 0)[0] == 1 and said in library.emulation_error()


def test_a_missing_wait_for_an_asynchronous_copy_shows(library: ctypes.CDLL) -> None:
    assert run(library, "copy", 1)[1][:128:4] == [4.0 * i + 1 for i in range(32)]
    assert all(x != x for x in run(library, "copy", 0)[1][:128:4])
    assert run(library, "copy", 0, reverse=1)[1][:128:4] == [4.0 * i + 1 for i in range(32)]  # there it lands at once


def test_fragments_multiply_as_matrices(library: ctypes.CDLL) -> None:
    a = [[i * 3 % 7 - k % 5 for k in range(16)] for i in range(16)]
    b = [[n * 5 % 3 + k % 4 for k in range(16)] for n in range(8)]
    right = [float(sum(p * q for p, q in zip(a[i], b[n]))) for i in range(16) for n in range(8)]
    assert run(library, "product")[1][:128] == right


@pytest.mark.parametrize(("name", "said"), [("bounded", b"__launch_bounds__ has 32"), ("beyond", b"beyond the launch's shared memory")])
def test_what_the_ptx_alone_shows(library: ctypes.CDLL, name: str, said: bytes) -> None:
    assert run(library, name, 1)[0] == library.of_ptx and (said in library.emulation_error()) == library.of_ptx


def test_the_sanitizer_sees_the_end_of_shared_memory(tmp_path: Path) -> None:
    path = compile_planted(tmp_path, "-fsanitize=address")
    for index, found in ((0, False), (1, True)):
        done = run_sanitized(f"import ctypes; ctypes.CDLL({str(path)!r}).run_beyond((ctypes.c_float * 32)(), {index})")
        assert ("heap-buffer-overflow" in done.stderr) == found == (done.returncode != 0), done.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = ctypes.CDLL(str(compile_planted(tmp_path_factory.mktemp("watched"), RACES)))
    found.emulation_error.restype = ctypes.c_char_p
    return found


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("name", ["exchange", "places", "copy", "lanes", "rounds", "factors", "copies_of_others", "two_blocks", "highest"])
def test_a_race_is_an_error_in_either_schedule(watched: ctypes.CDLL, name: str, reverse: int) -> None:
    assert run(watched, name, 1, reverse)[0] == 0, watched.emulation_error()
    assert run(watched, name, 0, reverse)[0] == 1 and watched.emulation_error().startswith(b"race: ")


@pytest.mark.parametrize(
    ("name", "drop"), [("rounds", (0, 0, -1, -1)), ("rounds", (0, 1, -1, -1)), ("lanes", (0, -1, 0, -1)), ("copy", (0, -1, -1, 0))]
)
def test_what_a_dropped_barrier_ordered_becomes_a_race(watched: ctypes.CDLL, name: str, drop: tuple[int, ...]) -> None:
    watched.emulation_drop(*drop)
    assert run(watched, name, 1)[0] == 1 and watched.emulation_error().startswith(b"race: ") and watched.emulation_dropped()
    watched.emulation_drop(1, *drop[1:])  # a launch that does not come
    assert run(watched, name, 1)[0] == 0 and not watched.emulation_dropped()
    watched.emulation_drop(-1, -1, -1, -1)


def test_an_asynchronous_copy_to_an_odd_address_is_an_error(library: ctypes.CDLL) -> None:
    assert library.run_copy(ctypes.byref((ctypes.c_float * 257)(), 4), 1) == 1 and b"no multiple" in library.emulation_error()
