"""The arithmetic of a token: more passes through a block, and test-time training as torch itself counts its products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkvlm.config import ModelConfig, model_config
from rwkvlm.layers.ttt import StateTTT
from rwkvlm.train.flops import flops_per_token, peak_flops

SIZES = dict(n_layer=3, n_embd=64, head_size=32, vocab_size=100)
OFF = dict(core_ratio=1.0, ttt_enabled=False)


def test_rwkv7_by_hand():
    sizes = ModelConfig(**SIZES, dim_ffn=128, rank_w=8, rank_a=16, rank_v=24, rank_g=32)
    C, ranks = 64, 2 * (8 + 16 + 32)
    weights = 3 * (4 * C * C + ranks * C + 2 * C * 128) + 2 * 2 * 24 * C + 100 * C  # block 0 has no value residual
    assert flops_per_token(sizes) == 6 * weights + 3 * 27 * 32 * C


@pytest.mark.parametrize("kind", ["x080", "rosa"])
def test_symbols_that_nothing_trains_are_read_forwards_only(kind):
    all_of_it, none = (flops_per_token(model_config(kind, **SIZES, rosa_grad=grad)) for grad in ("flip", "none"))
    assert all_of_it - none == 3 * 3 * 64 * 64 * (6 - 2)


@pytest.mark.parametrize("settings", [OFF, dict(ttt_chunk=16), dict(ttt_kind="memory")], ids=["plain", "state", "memory"])
def test_every_pass_through_a_block_counts(settings):
    one, three = (flops_per_token(model_config("phantom", **SIZES, **settings, max_depth_iter=n)) for n in (1, 3))
    assert three - one == 2 * (one - 6 * 64 * 100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(ttt_head=False),
        dict(ttt_steps=3),
        dict(ttt_meta=True),
        dict(ttt_second_order=False),
        dict(ttt_second_order=False, ttt_meta=True, ttt_steps=2),
    ],
    ids=str,
)
def test_steps_on_the_state_are_what_torch_counts(settings):
    """Of one segment in a layer; the last segment's meta term is made of the next one's tokens, as many."""
    sizes = model_config("phantom", **SIZES, core_ratio=1.0, ttt_chunk=16, **settings)
    ttt = StateTTT(sizes)
    for parameter in ttt.parameters():
        torch.nn.init.normal_(parameter)
    (B, H, N), n, c = (2, 2, 32), sizes.ttt_chunk, sizes.ttt_rows
    S, keys, values = torch.randn(B, H, N, N, requires_grad=True), torch.randn(B, n, H, N, requires_grad=True), torch.randn(B, n, H, c)
    with FlopCounterMode(display=False) as counter:
        after = ttt.step(S, keys, values, 2 * torch.sigmoid(ttt.rate)[:, None, None])
        error = ttt.relative_error(after, keys.transpose(1, 2), values.transpose(1, 2)).sum() if sizes.ttt_meta else 0
        (after.sum() + error).backward()
    assert flops_per_token(sizes) - flops_per_token(sizes.with_(ttt_enabled=False)) == 3 * counter.get_total_flops() / (B * n) > 0


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L20", 119.5), ("NVIDIA L4", 121),
        ("NVIDIA A10", 125), ("NVIDIA RTX A6000", 155), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA A10G", None), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A3000 Laptop GPU", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_whole_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and 1e12 * tflops)
