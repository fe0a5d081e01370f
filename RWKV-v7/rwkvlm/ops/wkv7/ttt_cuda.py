"""The CUDA kernels with test-time training of the state inside, as torch operators: all segments of a text in one call, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import address, launch
from . import cuda
from .arguments import check_arguments
from .passing_on import passing_on

MOST_HIDDEN = 32  # units of the head, a bit each


@torch.compiler.assume_constant_result
def runs_here(device: torch.device, dtype: torch.dtype, N: int, segment: int) -> bool:
    """Whether they take these inputs: bf16 on tensor cores, segments of whole chunks. Only where cuda.why_not has returned "" for this device."""
    return cuda.form_for(dtype, cuda.machine(device).capability) == "chunked" and segment % cuda.chunk_tokens("chunked", N) == 0


def wkv7_ttt(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    rate: Tensor,
    head: Tensor | None,
    rows: int,
    segment: int,
    stored: bool,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:
    """wkv7, and after each of the first (T - 1) // segment segments one gradient step on the first `rows` value rows of the state; layers/ttt.py has the formula.

    r, w, k, v, a, b [B, T, H, N] bfloat16, a = -kk; initial_state [B, H, N, N] float32 or None. rate [H] float32: eta / segment.
    head [2, hidden, rows] float32: W1 and the transpose of W2, or None. stored: targets are v (k . kk), else v; they are constants.
    Returns y and the state after the last token, with pass_on also r, k, v, as wkv7 does. Gradients reach the six inputs, initial_state, rate and head. Only where `runs_here`.
    """
    inputs = (r, w, k, v, a, b)
    check_arguments(inputs, initial_state, None)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, initial_state, rate, head))
    operator = _passing_on if pass_on else torch.ops.rwkvlm.wkv7_ttt_cuda_forward
    y, state, _, *passed = operator(*inputs, initial_state, rate, head, rows, segment, stored, save)
    return y, state, *passed


def saved_bytes(B: int, T: int, H: int, N: int, rows: int, hidden: int, segment: int) -> int:
    """Of what the forward leaves for the backward, beside that of wkv7: the rows before each step, and which hidden units are above zero."""
    return cuda.saved_bytes("chunked", B, T, H, N, 0) + 4 * B * H * ((T - 1) // segment * rows * N + (T if hidden else 0))


# Defined for every device, as those of cuda.py.
torch.library.define(
    "rwkvlm::wkv7_ttt_cuda_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor rate, Tensor? head, int rows, int segment, bool stored, bool save)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "rwkvlm::wkv7_ttt_cuda_backward",
    "(Tensor dy, Tensor? d_final_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor rate, Tensor? head, Tensor saved, int rows, int segment,"
    " bool stored, bool state_gradient, Tensor? more_dr=None, Tensor? more_dk=None, Tensor? more_dv=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class _Call(cuda.Call):
    """One call of the library with steps in it."""

    def __init__(
        self, op: str, tensors: tuple[Tensor, ...], initial_state: Tensor | None, rate: Tensor, head: Tensor | None, rows: int, segment: int, stored: bool
    ) -> None:
        super().__init__(op, tensors, initial_state, None)
        if self.form != "chunked":
            raise ValueError(f"{op}: expected bfloat16 and a GPU with bfloat16 tensor cores, got {self.r.dtype} on {self.r.device}")
        _check_steps(op, self.r, head, rows, segment)
        self.shape.segment_chunks = 0  # between two steps the state is no affine map of an earlier one
        hidden = 0 if head is None else head.shape[1]
        places = self.at("rate", rate, self.r.shape[2:3], torch.float32), self.at("head", head, (2, hidden, rows), torch.float32)
        self.steps = cuda.StepsOfTtt(rows, hidden, segment, stored, *places)
        self.saved = saved_bytes(*self.r.shape, rows, hidden, segment)

    def run(self, direction: str, *arguments: Tensor | cuda.Gradients | int | None) -> None:
        places = [address(x) if isinstance(x, Tensor) else x for x in arguments]
        launch(self.machine.library, f"wkv7_ttt_{direction}", self.r.device, self.shape, self.inputs, self.steps, *places)


def _check_steps(op: str, r: Tensor, head: Tensor | None, rows: int, segment: int) -> None:
    """ValueError for what `saved_bytes` and the kernels cannot count with."""
    N, chunk = r.shape[3], cuda.chunk_tokens("chunked", r.shape[3])
    if not 8 <= rows <= N or rows % 8 or segment < chunk or segment % chunk:
        raise ValueError(f"{op}: expected rows from 8 to {N} in steps of 8 and segments of a multiple of {chunk} tokens, got {rows} and {segment}")
    if head is not None and (head.dim() != 3 or not 1 <= head.shape[1] <= MOST_HIDDEN):
        raise ValueError(f"{op}: head must be [2, hidden, {rows}] with 1 to {MOST_HIDDEN} hidden units, got {list(head.shape)}")


@torch.library.impl("rwkvlm::wkv7_ttt_cuda_forward", "CompositeExplicitAutograd")
def _forward(r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored, save):
    call = _Call("wkv7_ttt", (r, w, k, v, a, b), initial_state, rate, head, rows, segment, stored)
    y, final_state, saved = r.new_empty(r.shape), r.new_empty(call.states, dtype=torch.float32), call.bytes(call.saved)
    call.run("forward", y, final_state, saved, *call.scratch("forward"))
    return y, final_state, saved if save else call.bytes(0)


@torch.library.impl("rwkvlm::wkv7_ttt_cuda_backward", "CompositeExplicitAutograd")
def _backward(dy, d_final_state, r, w, k, v, a, b, rate, head, saved, rows, segment, stored, state_gradient, *more):
    call = _Call("wkv7_ttt_backward", (r, w, k, v, a, b), None, rate, head, rows, segment, stored)
    arrived, more = call.arriving(saved, dy, d_final_state, more)
    B, T, H, _ = r.shape
    gradients = [r.new_empty(r.shape) for _ in range(6)]
    d_initial = r.new_empty(call.states if state_gradient else (0,), dtype=torch.float32)
    of_head = (0,) if head is None else head.shape
    sums = r.new_empty((T - 1) // segment * B, H, 1 + torch.Size(of_head).numel(), dtype=torch.float32)
    scratch = call.bytes(call.machine.library.wkv7_ttt_backward_scratch_bytes(call.shape, call.steps))
    out = cuda.Gradients(*map(address, gradients), address(d_initial) if state_gradient else None, *more)
    call.run("backward", *arrived, out, sums, scratch)
    sums = sums.sum(0)
    return *gradients, d_initial, sums[:, 0].clone(), sums[:, 1:].sum(0).view(of_head)


@torch.library.register_fake("rwkvlm::wkv7_ttt_cuda_forward")
def _fake_forward(r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored, save):
    B, T, H, N = r.shape
    saved = saved_bytes(B, T, H, N, rows, 0 if head is None else head.shape[1], segment) if save else 0
    return r.new_empty(r.shape), r.new_empty(B, H, N, N, dtype=torch.float32), r.new_empty(saved, dtype=torch.uint8)


@torch.library.register_fake("rwkvlm::wkv7_ttt_cuda_backward")
def _fake_backward(dy, d_final_state, r, w, k, v, a, b, rate, head, saved, rows, segment, stored, state_gradient, *more):
    B, _, H, N = r.shape
    states = (B, H, N, N) if state_gradient else (0,)
    return *(r.new_empty(r.shape) for _ in range(6)), rate.new_empty(states), rate.new_empty(rate.shape), rate.new_empty((0,) if head is None else head.shape)


def _save(ctx, inputs, output):
    *tensors, initial_state, rate, head, rows, segment, stored, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.settings = rows, segment, stored
    ctx.save_for_backward(*tensors, rate, head, output[2])


@once_differentiable
def _gradients(ctx, dy, d_final_state, _saved, *more):
    *tensors, rate, head, saved = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    wanted = ctx.needs_input_grad[6]
    *gradients, d_initial, d_rate, d_head = torch.ops.rwkvlm.wkv7_ttt_cuda_backward(dy, d_final_state, *tensors, rate, head, saved, *ctx.settings, wanted, *more)
    return *gradients, d_initial if wanted else None, d_rate, None if head is None else d_head, None, None, None, None


torch.library.register_autograd("rwkvlm::wkv7_ttt_cuda_forward", _gradients, setup_context=_save)


_passing_on = passing_on("wkv7_ttt_cuda_forward", _save, _gradients)
