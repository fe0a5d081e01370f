"""The wkv7 kernels with steps of test-time training, emulated; and what float64 makes of the same inputs, step by step through autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.emulated_wkv7 import Buffers, Case, Gradients, Kernels, Pointers, Shape, StepsOfTtt, make_case, pointer
from rwkvlm.config import PhantomConfig
from rwkvlm.layers.ttt import StateTTT
from rwkvlm.ops.wkv7 import wkv7_reference
from rwkvlm.ops.wkv7.arguments import NAMES


@dataclass
class TttCase:
    """The inputs of a recurrence, and a StateTTT in float64 with its parameters, which are numbers of fp32."""

    case: Case
    ttt: StateTTT

    def expected(self, masks: Tensor | None = None, watch: list[Tensor] | None = None) -> dict[str, Tensor]:
        """The results of the kernels, in float64: the token by token reference, and each step the gradient of the inner loss by autograd.

        d_rate [steps, B, H] is the gradient of each step's eta / segment, d_head that of W1 and the transpose of W2.
        masks [B, T, H] int32: which hidden units are above zero. Where the kernels' state, whose factors are bf16, puts one on
        the other side of zero, gradients jump, and no limit on rounding errors would hold.
        watch: receives for each step which are, [B, tokens, H, hidden].
        """
        case, ttt = self.case, self.ttt
        (B, T, H, N), segment, c = case.dy.shape, ttt.config.ttt_chunk, ttt.rows
        tensors = [x.double().requires_grad_() for x in case.inputs]
        state = torch.zeros(B, H, N, N, dtype=torch.float64) if case.initial_state is None else case.initial_state.double()
        state.requires_grad_()
        rate = (2 * torch.sigmoid(ttt.rate.detach()) / segment).expand((T - 1) // segment, B, H).contiguous().requires_grad_()
        head = torch.stack([ttt.w1.detach(), ttt.w2.detach().mT]).requires_grad_() if ttt.has_head else None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny operations
        S, ys = state, []
        for number, at in enumerate(range(0, T, segment)):
            piece = [x[:, at : at + segment] for x in tensors]
            y, S = wkv7_reference(*piece, S)
            ys.append(y)
            if at + segment >= T:
                break
            keys = -piece[4].transpose(1, 2)  # [B, H, n, N]
            stored = (piece[2].transpose(1, 2) * keys).sum(-1, keepdim=True) if ttt.config.ttt_target == "stored" else 1
            z = (piece[3][..., :c].transpose(1, 2) * stored).detach()
            u = keys @ S[:, :, :c].mT
            guess = u
            if head is not None:
                hidden = u @ head[0].mT
                active = hidden > 0
                if watch is not None:
                    watch.append(active.transpose(1, 2))
                if masks is not None:
                    active = (masks[:, at : at + segment].transpose(1, 2)[..., None] >> torch.arange(len(head[0])) & 1).bool()
                guess = u + (hidden * active) @ head[1]
            (slope,) = torch.autograd.grad((guess - z).square().sum() / 2, u, create_graph=True)
            S = torch.cat([S[:, :, :c] - rate[number][..., None, None] * slope.mT @ keys, S[:, :, c:]], 2)
        outputs, slopes = [torch.cat(ys, 1)], [case.dy.double()]
        if case.d_final_state is not None:
            outputs, slopes = [*outputs, S], [*slopes, case.d_final_state.double()]
        names = [*(f"d{n}" for n in (*NAMES, "_initial_state")), "d_rate", "d_head"]
        leaves = [*tensors, state, rate, *([] if head is None else [head])]
        found = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True, materialize_grads=True)
        torch.set_num_threads(threads)
        return {"y": outputs[0].detach(), "final_state": S.detach(), **dict(zip(names, found))}


def make_ttt_case(
    T: int, N: int = 64, rows: int = 16, segment: int = 64, head: bool = True, target: str = "stored", H: int = 2, seed: int = 0, **options
) -> TttCase:
    config = PhantomConfig(
        n_layer=1, n_embd=H * N, head_size=N, vocab_size=8, ttt_chunk=segment, ttt_core_ratio=rows / N, ttt_head=head, ttt_target=target
    )
    assert config.ttt_rows == rows
    ttt = StateTTT(config).double()
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, p in ttt.named_parameters():  # steps that matter, a head that matters, half of its units above zero
            p.copy_((torch.randn(p.shape, generator=g) / (1 if name == "rate" else 0.7 * p.shape[1] ** 0.5)).to(torch.float32))
    case = make_case(T, N, H=H, seed=seed, **options)
    # k . kk near 2, as in trained models
    case.inputs[2] = (case.inputs[2].double() / N**0.5 - 2 * case.inputs[4].double()).to(case.inputs[2].dtype)
    return TttCase(case, ttt)


def run(kernels: Kernels, given: TttCase, backward: bool = True, reverse: bool = False) -> dict[str, Tensor]:
    """As Kernels.run: every buffer poisoned, guards and error codes checked."""
    library, case, ttt = kernels.library, given.case, given.ttt
    r = case.inputs[0]
    B, T, H, N = r.shape
    segment, rows = ttt.config.ttt_chunk, ttt.rows
    hidden = ttt.w1.shape[0] if ttt.has_head else 0
    rate = (2 * torch.sigmoid(ttt.rate.detach()) / segment).float()
    head = torch.stack([ttt.w1.detach(), ttt.w2.detach().mT]).float().contiguous() if hidden else None
    shape, steps = (
        Shape(B, T, H, N, 0, None, 0),
        StepsOfTtt(rows, hidden, segment, ttt.config.ttt_target == "stored", rate.data_ptr(), head.data_ptr() if hidden else None),
    )
    buffers = Buffers()
    library.emulation_reverse(int(reverse))
    y, final_state = buffers.new(r.shape, r.dtype), buffers.new((B, H, N, N), torch.float32)
    saved = buffers.new((library.wkv7_ttt_saved_bytes(shape, steps),), torch.uint8)
    scratch = buffers.new((library.wkv7_chunked_forward_scratch_bytes(shape),), torch.uint8)
    inputs = Pointers(*(x.data_ptr() for x in case.inputs), pointer(case.initial_state))
    kernels.call("wkv7_ttt_forward", shape, inputs, steps, pointer(y), pointer(final_state), pointer(saved), pointer(scratch), None)
    results = {"y": y, "final_state": final_state}
    if backward:
        gradients = {f"d{n}": buffers.new(r.shape, r.dtype) for n in NAMES}
        gradients["d_initial_state"] = buffers.new((B, H, N, N), torch.float32)
        out = Gradients(*(x.data_ptr() for x in gradients.values()))
        sums = buffers.new(((T - 1) // segment * B, H, 1 + 2 * hidden * rows), torch.float32)
        scratch = buffers.new((library.wkv7_ttt_backward_scratch_bytes(shape, steps),), torch.uint8)
        arguments = (pointer(saved), pointer(case.dy), pointer(case.d_final_state), out, pointer(sums), pointer(scratch), None)
        kernels.call("wkv7_ttt_backward", shape, inputs, steps, *arguments)
        results.update(gradients)
        results["d_rate"] = sums[..., 0].view(-1, B, H)
        if hidden:
            results["d_head"] = sums[..., 1:].sum((0, 1)).view(2, hidden, rows)
    if hidden:
        results["masks"] = saved[-4 * B * T * H :].view(torch.int32).view(B, T, H)
    buffers.check()
    return results
