"""Ghost layers: the formula, and the factorisation of a dense matrix against the truncated SVD."""

import pytest
import torch

from rwkvlm.layers.ghost import GhostLinear, factorise, from_digits, to_digits


def test_formula():
    layer = GhostLinear(6, 10, 4, "relu").double()
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = layer(x)
        core = torch.einsum("oi,bti->bto", layer.core.weight, x)
        ghost = torch.einsum("oc,btc->bto", layer.ghost.weight, core.clamp(min=0) * 2**0.5)
    assert got.shape == (3, 5, 10)
    assert torch.allclose(got, torch.cat([core, ghost], -1), rtol=1e-12)
    assert sorted(layer.state_dict()) == ["core.weight", "ghost.weight"]


def test_order_survives_every_format():
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(from_digits(to_digits(order).to(dtype)), order)


def ill_conditioned_top(n):
    """Its first rows are nearly the same, so that they cannot be the core."""
    w = torch.randn(n, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[: n // 2] = w[0] + 1e-7 * w[: n // 2]
    return w


MATRICES = {
    "square": lambda: torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "wide": lambda: torch.randn(48, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "tall": lambda: torch.randn(192, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "first rows alike": lambda: ill_conditioned_top(48),
    "zero": lambda: torch.zeros(48, 48, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [8, 24, 40])
@pytest.mark.parametrize("matrix", MATRICES)
def test_factorisation_has_the_error_of_the_truncated_svd(matrix, rows, dtype):
    weight = MATRICES[matrix]().to(dtype)
    core, ghost, order = factorise(weight, rows)
    layer = GhostLinear(weight.shape[1], weight.shape[0], rows, permuted=True).to(dtype)
    with torch.no_grad():
        layer.core.weight.copy_(core)
        layer.ghost.weight.copy_(ghost)
        layer.order.copy_(to_digits(order))
        rebuilt = layer(torch.eye(weight.shape[1], dtype=dtype)).T
    best = torch.linalg.svdvals(weight.double())[rows:].norm()
    error = (rebuilt.double() - weight.double()).norm()
    assert abs(error - best) <= 1e-5 * max(best.item(), weight.double().norm().item())
    assert ghost.abs().max() < 10, "a pivoted core keeps the projection small"
    assert sorted(order.tolist()) == list(range(weight.shape[0]))
