"""Random inputs of the WKV4 operator, the gradients that come in, what a form makes of them, and what float64 does."""

from __future__ import annotations

import torch

from rwkvlm.ops.wkv4 import EMPTY, wkv4_reference

NAMES = ("y", "final state", "dw", "du", "dk", "dv", "d_initial")


class Case:
    """w (the logarithm of the decay), u, k, v, initial state, and the gradients of y and of the final state.

    kind: normal | large (keys up to 100) | slow (decays near 1) | fast (the state is forgotten in a token or two) | repeated
    (the same key everywhere, one more at the beginning: the state's exponent is that token's, decayed) | empty (a state that
    has seen nothing, given as a tensor)
    """

    def __init__(self, B=2, T=70, C=48, dtype=torch.float32, state=True, kind="normal", device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        shift = {"slow": -7.0, "fast": 2.0}.get(kind, -1.0)
        w, u, k, v = -torch.exp(normal(C) + shift), normal(C), normal(B, T, C), normal(B, T, C)
        if kind == "large":
            k = 100 * (2 * torch.rand(B, T, C, generator=generator, dtype=torch.float64) - 1)
        if kind == "repeated":
            k = torch.full_like(k, 0.5)
            k[:, 0] = 2.0
        given = torch.stack([normal(B, C), normal(B, C).exp(), normal(B, C)], 1) if state else None
        if kind == "empty":
            given = torch.zeros(B, 3, C, dtype=torch.float64)
            given[:, 2] = EMPTY
        carried = torch.float32
        self.dtype = dtype
        self.inputs = [
            None if x is None else x.to(device, t) for x, t in ((w, carried), (u, carried), (k, dtype), (v, dtype), (given, carried))
        ]
        self.slopes = [normal(B, T, C).to(device, dtype), normal(B, 3, C).to(device, carried)]

    def run(self, form, double=False):
        """Outputs and all gradients; double: in float64, on the CPU."""
        cast = (lambda x: x.double().cpu()) if double else (lambda x: x)
        inputs = [None if x is None else cast(x.detach().clone()).requires_grad_() for x in self.inputs]
        outputs = form(*inputs)
        grads = torch.autograd.grad(outputs, [x for x in inputs if x is not None], [cast(x) for x in self.slopes])
        return [*(x.detach() for x in outputs), *grads]

    def exact(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny operations: threads would only wait for one another
        results = self.run(wkv4_reference, double=True)
        torch.set_num_threads(threads)
        return results


def errors(got, want):
    """Relative rms of each result, NaN where a NaN is left."""
    assert len(got) == len(want) and all(g.shape == w.shape for g, w in zip(got, want))
    return {name: ((g.double().cpu() - w).norm() / w.norm().clamp_min(1e-30)).item() for name, g, w in zip(NAMES, got, want)}
