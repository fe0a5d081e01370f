"""Operators: one folder each, holding its contract and dispatch, a slow reference, a plain PyTorch form and the native kernel's face."""

import torch

# oneMKL 2024.2 chooses the code of each vector function when it is first called, and threads that race for the first call may
# compute their share with few digits (pytorch#188792; seen here as an error of 1e-12 in float64): a run would not repeat to the
# bit. One call of each from one thread, before anything else, settles the choice.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf):
        _function(torch.ones(1, dtype=_dtype))
