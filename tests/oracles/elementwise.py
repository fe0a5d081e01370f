"""Random inputs of the elementwise operators, what float64 makes of them, and how near two results are."""

from __future__ import annotations

import torch

from rwkvlm.ops.fused import reference


class Case:
    """Random inputs of one operator: call(module) -> outputs."""

    def __init__(self, name, B=2, T=33, H=3, N=32, dtype=torch.float32, state=False, residual=True, mixes=6, documents=None, device="cpu"):
        rng = torch.Generator().manual_seed(0)
        C = H * N

        def normal(*shape, scale=1.0, shift=0.0):
            return (torch.randn(*shape, generator=rng) * scale + shift).to(device, dtype).requires_grad_()

        def whole():
            return normal(B, T, C)

        def vector(**kwargs):
            return normal(1, 1, C, **kwargs)

        self.name, self.head_size, self.bounds = name, N, None
        if name == "norm_mix":
            branch, last = whole() if residual else None, normal(B, C) if state else None
            self.inputs = [whole(), branch, normal(C, shift=1.0), normal(C), last, *(vector() for _ in range(mixes))]
            if documents is not None:
                self.bounds = torch.tensor([0, *documents], device=device).cumsum(0).int()
                assert self.bounds[-1] == T
        elif name == "token_mix":
            self.inputs = [whole(), normal(B, C) if state else None, *(vector() for _ in range(mixes))]
        elif name == "time_mix_inputs":
            rest = [whole(), whole()] if residual else [None, None]
            vectors = [vector(), vector(shift=1.0), vector(shift=1.0), vector(), vector() if residual else None]
            self.inputs = [whole(), whole(), whole(), whole(), *rest, *vectors]
        elif name == "time_mix_output":
            self.inputs = [*(whole() for _ in range(5)), normal(C, shift=1.0), normal(C), normal(H, N)]
        else:
            self.inputs = [whole()]

    def call(self, module, *inputs):
        if self.name == "norm_mix":
            x, branch, weight, bias, last, *mixes = inputs
            stream, newest, mixed = module.norm_mix(x, branch, weight, bias, 1e-3, last, mixes, self.bounds)
            return [stream, newest, *mixed]
        if self.name == "token_mix":
            return module.token_mix(inputs[0], inputs[1], list(inputs[2:]))
        if self.name == "time_mix_inputs":
            return [t for t in module.time_mix_inputs(*inputs, self.head_size) if t is not None]
        if self.name == "time_mix_output":
            return [module.time_mix_output(*inputs, 64e-5)]
        return [module.relu_square(*inputs)]

    def outputs_and_gradients(self, module, inputs=None):
        inputs = self.inputs if inputs is None else inputs
        outputs = self.call(module, *inputs)
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=rng).to(out.device, self.inputs[0].dtype).to(out.dtype) for out in outputs]
        wanted = [t for t in inputs if t is not None]
        return [out.detach() for out in outputs], torch.autograd.grad(outputs, wanted, weights)

    def exact(self):
        return self.outputs_and_gradients(reference, [None if t is None else t.detach().double().requires_grad_() for t in self.inputs])


def misfits(case):
    """(what is wrong, inputs) for each input but the one that the others are measured by.

    One channel too few, as many numbers in another shape, another dtype.
    """
    measure = {"time_mix_inputs": 1}.get(case.name, 0)
    for i, x in enumerate(case.inputs):
        if x is None or i == measure:
            continue
        others = {"short": x[..., :-1], "double": x.double()}
        if x.dim() > 1 and x.shape[0] != x.shape[1] and 1 not in x.shape:
            others["swapped"] = x.transpose(0, 1)
        for kind, other in others.items():
            if not (case.name == "time_mix_output" and i == 7 and kind == "swapped"):  # r_k says itself what a head is
                yield f"{kind} input {i}", [other if j == i else t for j, t in enumerate(case.inputs)]


def squarable(dtype):
    """[1, T, 64] numbers whose squares are normal numbers: of bfloat16 all there are, of float32 a sample of every size."""
    if dtype == torch.bfloat16:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        x = x[(x.abs() >= 2.0**-63) & (x.abs() < 2.0**63)]
    else:
        rng = torch.Generator().manual_seed(0)
        x = (1 + torch.rand(1 << 17, generator=rng)) * 2.0 ** torch.randint(-63, 62, (1 << 17,), generator=rng)
        x = torch.cat([x, -x])
    return x.view(1, -1, 64)


def close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.isfinite().all()
        assert (g.double() - w).norm() <= tolerance * w.norm() + 1e-30
