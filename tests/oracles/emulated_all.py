"""Every kernel in emulation once or more, on small odd sizes, in both schedules: for what watches it meanwhile.

What they compute, tests/cuda checks.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from oracles import wkv4_cases
from oracles.elementwise import Case
from oracles.emulated_ttt import make_ttt_case, run
from oracles.emulated_wkv7 import WRONG_BOUNDS, Kernels, make_case, with_bounds
from oracles.rosa import structured
from rwkvlm.ops.adamw import native as adamw
from rwkvlm.ops.cross_entropy import cuda as defined  # noqa: F401  (loss_of_logits)
from rwkvlm.ops.fused import native as fused
from rwkvlm.ops.launch import register
from rwkvlm.ops.rosa import native as rosa
from rwkvlm.ops.wkv4 import native as wkv4


@contextlib.contextmanager
def registered(library: ctypes.CDLL, *folders: str) -> Iterator[None]:
    """Within it the operators of these folders of cuda/, which are defined, have the library's kernels for CPU tensors."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            forms = register(folder, library, "CPU")
            stack.callback(getattr(torch.ops.rwkvlm, f"{folder}_unregister"), forms)
        yield


def run_wkv7(path: Path) -> None:
    """path: a library of the kernels of cuda/wkv7. AssertionError where a launch fails."""
    kernels = Kernels(path)
    for reverse in (False, True):
        for options in (
            dict(T=67, H=2),
            dict(T=35, N=32),
            dict(T=17, N=16, B=2),
            dict(T=70, documents=[1, 64, 5]),
            dict(T=35, N=128, H=1),
            dict(T=200, N=32, documents=[1, 199], segment_chunks=1),
            dict(T=90, N=128, H=1, segment_chunks=1),
            dict(T=67, more="rkv"),
            dict(T=35, N=16, more="v"),
        ):
            kernels.run("chunked", make_case(**options), reverse=reverse)
            kernels.run("sequential", make_case(**options), reverse=reverse)
        for bounds in WRONG_BOUNDS:
            for kernel, chunks in (("chunked", 0), ("chunked", 1), ("sequential", 0)):
                kernels.run(
                    kernel, with_bounds(make_case(T=100, N=32, H=1, documents=[1, 99], segment_chunks=chunks), bounds), reverse=reverse
                )
        for options in (
            dict(T=140, rows=8),
            dict(T=67, rows=64),
            dict(T=130, N=16, rows=16, B=2),
            dict(T=140, N=32, rows=24, segment=128, head=False),
            dict(T=35, N=128, rows=128, segment=32),
        ):
            run(kernels, make_ttt_case(H=1, **options), reverse=reverse)


def run_around_wkv7(path: Path) -> None:
    """path: a library of all other kernels. Buffers have exactly the right size. RuntimeError where a launch fails."""
    library = ctypes.CDLL(str(path))
    fp32 = torch.float32
    assert fused.why_not((fp32,), 16) == adamw.why_not() == rosa.why_not(fp32) == wkv4.why_not(fp32, 16) == ""  # defines the operators
    with registered(library, "adamw", "fused", "loss", "rosa", "wkv4"):
        for reverse in (0, 1):
            library.emulation_reverse(reverse)
            _around_wkv7()


def _around_wkv7() -> None:
    ops = torch.ops.rwkvlm
    for dtype in (torch.float32, torch.bfloat16):
        for bounds in (None, torch.tensor([0, 1, 16, 17, 18, 40], dtype=torch.int32)):  # 132 channels: the last warp has one lane's
            x, weight, mix = torch.randn(1, 40, 132, dtype=dtype), torch.randn(132, dtype=dtype), torch.randn(132, dtype=dtype)
            _, newest, moments, out = ops.norm_mix_forward(x, None, weight, weight, 1e-5, None, [mix], bounds)
            ops.norm_mix_backward(None, None, [out], x, moments, weight, weight, None, [mix])
        for sizes in (
            dict(B=1, T=17, H=5, N=64),
            dict(B=3, T=2, H=1, N=16, state=True, mixes=1),
            dict(B=1, T=33, H=2, N=128, residual=False),
        ):
            inputs = lambda name: [t if t is None else t.detach() for t in Case(name, dtype=dtype, **sizes).inputs]
            x, last, *mixes = inputs("token_mix")
            ops.token_mix_backward(ops.token_mix_forward(x, last, mixes), x, last, mixes)
            x, branch, weight, bias, last, *mixes = inputs("norm_mix")
            stream, newest, moments, *out = ops.norm_mix_forward(x, branch, weight, bias, 1e-5, last, mixes, None)
            ops.norm_mix_backward(x, newest, out, x if branch is None else stream, moments, weight, bias, last, mixes)
            tensors = inputs("time_mix_inputs")
            grads = ops.time_mix_inputs_forward(*tensors, sizes["N"])
            for more in (None, *grads[4:]):
                ops.time_mix_inputs_backward(*grads, *[None] * (5 - len(grads)), *tensors, sizes["N"], more)
            tensors = inputs("time_mix_output")
            ops.time_mix_output_backward(ops.time_mix_output_forward(*tensors, sizes["N"], 1e-5), *tensors, sizes["N"], 1e-5)
            ops.relu_square_backward(x, ops.relu_square_forward(x))
        for sizes in (dict(B=1, T=1, C=16), dict(T=67, C=16), dict(B=1, T=33, C=144, state=False)):
            case = wkv4_cases.Case(dtype=dtype, **sizes)
            inputs = [x if x is None else x.detach() for x in case.inputs]
            _, _, starts = ops.wkv4_forward(*inputs, True)
            ops.wkv4_backward(*case.slopes, *inputs[:4], starts)
        long = structured(70)[None, :, [1, 4, 11]].repeat(1, 2, 1)  # matches that several warps share
        for q, bits in (*((torch.randn(2, T, 2 * bits), bits) for T, bits in ((1, 1), (37, 1), (9, 3), (140, 1))), (long, 1)):
            T, q, ends = q.shape[1], q.to(dtype), torch.randn(2, q.shape[2]).to(dtype)
            for k in (q, None):
                _, *state = ops.rosa(q, k, k, *ends, bits, False, 0.1, False, None, None, None, True)
                ops.rosa(q, k, k, *ends, bits, True, 0.1, False, *state, False)
                ops.rosa_backward(q, q, k, k, *ends, bits, False, 0.1, True)
            _, *state = ops.rosa_tokens(torch.arange(2 * T).view(2, T) % 3, None, None, True)
            ops.rosa_tokens(torch.arange(2 * T).view(2, T) % 3, *state, True)
        for V in (1, 7, 600, 5001):
            ops.loss_of_logits(torch.randn(3, V).to(dtype), torch.tensor([0, V - 1, V]), torch.empty(3), 1.0, 0.1, True)
        sizes = (0, 1, 3, 767, 2048, 2051, 8191, 8192, 100003, *[7] * 600)
        masters, grads, averages, squares = ([torch.rand(size) for size in sizes] for _ in range(4))
        grads, rounded = [g.to(dtype) for g in grads], [p.bfloat16() for p in masters]
        for narrow in (rounded, []):
            scale = ops.gradient_norms(grads)[1]
            ops.adamw_(
                masters, narrow, grads, averages, squares, [torch.zeros(()) for _ in sizes], scale, scale, 1e-3, 0.9, 0.99, 1e-18, 0.1
            )
            ops.adamw_(masters, narrow, grads, averages, squares, [torch.zeros(()) for _ in sizes], None, None, 1e-3, 0.9, 0.99, 1e-18, 0.1)
        for moved in range(5):  # each in turn begins at an odd address
            lists = [
                [torch.zeros(9000, dtype=kind)[j == moved :][:8999]]
                for j, kind in enumerate((torch.float32, torch.bfloat16, dtype, *[torch.float32] * 2))
            ]
            ops.gradient_norms(lists[2])
            ops.adamw_(*lists, [torch.zeros(())], None, None, 1e-3, 0.9, 0.99, 1e-18, 0.1)
