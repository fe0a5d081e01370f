"""ROSA's layers: the official rules for hits and misses, every gradient against running the layer again with one bit flipped."""

import pytest
import torch

from oracles import x080 as oracle
from rwkvlm.config import RosaConfig
from rwkvlm.layers.norm_mix import NormMix
from rwkvlm.layers.rosa import RosaMix, RosaQKV
from rwkvlm.ops.rosa import rosa

B, T, C = 2, 12, 8


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(q, k, v, low, high, bits, miss_is_low):
    on = [(x > 0).long().tolist() for x in (q, k, v)]
    return torch.tensor(
        [oracle.layer(*rows, low.flatten().tolist(), high.flatten().tolist(), bits, miss_is_low) for rows in zip(*on)], dtype=torch.float64
    )


@pytest.mark.parametrize("bits, on_a_miss", [(1, -1.0), (4, 0.0)])
def test_qkv_gives_plus_or_minus_emb_and_what_the_official_layer_gives_on_a_miss(bits, on_a_miss):
    layer = RosaQKV(C, bits, 0.1, "flip").double()
    with torch.no_grad():
        layer.emb.copy_(numbers(1, 1, C, seed=9))
    q, k, v = (numbers(B, T, C, seed=n) for n in range(3))
    out, _ = layer(q, k, v)
    assert torch.equal(out, by_definition(q, k, v, -layer.emb, layer.emb, bits, bits == 1))
    assert torch.equal(out[:, 0], on_a_miss * layer.emb[0].expand(B, C)), "the first token has nothing before it"
    assert {-1.0, 1.0} <= set((out / layer.emb).round(decimals=9).flatten().tolist())


@pytest.mark.parametrize("bits", [1, 4])
def test_every_gradient_is_what_flipping_the_bit_does_to_the_whole_sequence(bits):
    layer = RosaQKV(C, bits, 0.3, "flip").double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(numbers(1, 1, C, seed=20 + n))
    inputs = [numbers(B, T, C, seed=30 + n).requires_grad_() for n in range(3)]
    weight = numbers(B, T, C, seed=40)
    run = lambda xs: layer(*xs)[0]
    (run(inputs) * weight).sum().backward()
    with torch.no_grad():
        for n, x in enumerate(inputs):
            for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
                sums = []
                for sign in (-1, 1):
                    other = x.clone()
                    other[tuple(place)] = sign * x[tuple(place)].abs()
                    sums.append((run([*inputs[:n], other, *inputs[n + 1 :]]) * weight).sum())
                want = (sums[1] - sums[0]) / (2 * x[tuple(place)].abs().clamp(min=0.3))
                assert (x.grad[tuple(place)] - want).abs() < 1e-12, (n, place)
            assert x.grad.count_nonzero() > 20
        for p in layer.parameters():  # linear in these
            was, base = p.clone(), (run(inputs) * weight).sum()
            for c in range(C):
                p[..., c] += 1.0
                assert (p.grad[0, 0, c] - ((run(inputs) * weight).sum() - base)).abs() < 1e-9
                p.copy_(was)


@pytest.mark.parametrize("bits", [1, 4])
def test_how_bits_are_trained_is_as_asked(bits):
    inputs = [numbers(B, T, C, seed=n).requires_grad_() for n in range(3)]
    weight, found = numbers(B, T, C, seed=9), {}
    for grad in ("flip", "soft"):
        layer = RosaQKV(C, bits, 0.1, grad).double()
        ends = [torch.full((C,), -0.5).double(), torch.full((C,), 0.5).double()]
        with torch.no_grad():
            layer.emb.copy_(ends[1])
        out = layer(*inputs)[0]
        want = rosa(*inputs, *ends, bits, "low" if bits == 1 else "zero", 0.1, grad)
        found[grad], expected = (torch.autograd.grad(y, inputs, weight) for y in (out, want))
        assert all(map(torch.equal, found[grad], expected))
    assert not any(map(torch.allclose, found["flip"], found["soft"]))


def test_the_block_is_the_official_one_with_its_names():
    config = RosaConfig(n_embd=32, head_size=16)
    mix = RosaMix(config)
    shapes = {name: tuple(p.shape) for name, p in mix.named_parameters()}
    assert shapes == {f"x_{c}": (1, 1, 32) for c in "qkv"} | {f"{c}.weight": (32, 32) for c in "qkvo"} | {
        f"{c}.bias": (32,) for c in "qkvo"
    } | {"rosa_qkv.emb": (1, 1, 32)}
    mix, norm = mix.double(), NormMix(32).double()
    with torch.no_grad():
        for n, p in enumerate([*mix.parameters(), *norm.parameters()]):
            p.copy_(numbers(*p.shape, seed=n))
    x = numbers(2, 12, 32, seed=50)
    with torch.no_grad():
        same, out, _ = mix(x, norm)
        normed = torch.nn.functional.layer_norm(x, (32,), norm.weight, norm.bias)
        p = {name: t.detach() for name, t in mix.named_parameters()}
        want = torch.stack([oracle.rosa_mix(p, row, 4, 0.1) for row in normed])
    assert torch.equal(same, x) and torch.allclose(out, want, atol=1e-10)


def test_the_stream_gets_a_tenth_of_what_trains_the_bits_and_queries_and_keys_a_fiftieth_of_their_difference():
    """Of the gradients of q, k and v as they are put into the operator.

    q, k and v themselves get the whole of it, but for that difference.
    """
    mix, norm, x, weight = (
        RosaMix(RosaConfig(n_embd=32, head_size=16)).double(),
        NormMix(32).double(),
        numbers(2, 12, 32, seed=50),
        numbers(2, 12, 32, seed=51),
    )
    with torch.no_grad():
        for n, p in enumerate([*mix.parameters(), *norm.parameters()]):
            p.copy_(numbers(*p.shape, seed=n))
    _, out, _ = mix(x.requires_grad_(), norm)
    (out * weight).sum().backward()
    again = x.detach().clone().requires_grad_()
    _, _, mixed = norm(again, None, None, [mix.x_q, mix.x_k, mix.x_v])
    parts = [linear(m) for linear, m in zip((mix.q, mix.k, mix.v), mixed)]
    y, _ = mix.rosa_qkv(*parts)
    y = mix.o(y)
    *of_parts, of_o = torch.autograd.grad((y * weight).sum(), [*parts, mix.o.weight], retain_graph=True)
    q, k, v = of_parts
    assert (q - k).abs().max() > 1e-3
    wanted = [again, mix.x_k, norm.weight, mix.q.weight, mix.k.weight, mix.k.bias, mix.v.bias]
    whole = torch.autograd.grad(parts, wanted, [(q + k) / 2 + 0.02 * (q - k) / 2, (q + k) / 2 - 0.02 * (q - k) / 2, v])
    for p, share, want in zip([x, *wanted[1:], mix.o.weight], [0.1] * 3 + [1.0] * 5, [*whole, of_o]):
        assert want.abs().max() > 0 and torch.allclose(p.grad, share * want, rtol=1e-9, atol=1e-12)
