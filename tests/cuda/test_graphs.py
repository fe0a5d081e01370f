"""CUDA graphs of the blocks on a GPU: bits, random numbers, memory, nothing that waits, a whole run.

Without a GPU: tests/train/test_graphs.py, and test_model.py here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvlm.cli import main
from rwkvlm.config import ModelConfig, model_config
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train import graphs
from rwkvlm.train.flops import peak_flops
from rwkvlm.train.graphs import graph_blocks, try_graphs
from rwkvlm.train.optimizer import MasterAdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, SIZES = "cuda", dict(n_embd=128, vocab_size=256, head_size=64)
MODELS = {
    "x070": ModelConfig(n_layer=3, **SIZES),
    "phantom": model_config("phantom", n_layer=2, core_ratio=0.5, **SIZES),  # in bf16 one operator, in fp32 a loop
    "x080": model_config("x080", n_layer=2, rosa_bits=4, deep_embed=True, **SIZES),
    "memory": model_config("phantom", n_layer=2, ttt_kind="memory", max_depth_iter=2, **SIZES),
}


@pytest.fixture(autouse=True)
def kernels():
    backend.set_kernel("cuda")


def model_of(config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    model = build(config)
    init_weights(model, 0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3 / p.shape[-1] ** 0.5, generator=rng)
    return model.to(DEVICE, dtype)


def loss_of(model: torch.nn.Module, number: int, batch: int = 2, tokens: int = 300, grad_cp: bool = False) -> torch.Tensor:
    idx = torch.randint(256, (batch, tokens + 1), generator=torch.Generator().manual_seed(number)).to(DEVICE)
    return head_cross_entropy(model.features(idx[:, :-1], grad_cp=grad_cp), model.head.weight, idx[:, 1:])


@pytest.mark.parametrize("recompute", [False, True], ids=["", "grad_cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_a_gpu_have_the_bits_of_eager_ones(name, dtype, recompute):
    """Two micro batches a step over other tokens each time, the trainer's optimizer, validation and a batch of another shape in between."""
    pair = [model_of(MODELS[name], dtype) for _ in range(2)]
    # with its two passes refused
    optimizers = [MasterAdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, accumulate=name != "memory") for m in pair]
    random = torch.cuda.get_rng_state()
    graph_blocks(pair[1], 2, 300, recompute)
    assert torch.equal(torch.cuda.get_rng_state(), random) and all(p.grad is None for p in pair[1].parameters())
    assert all(map(torch.equal, pair[0].state_dict().values(), pair[1].state_dict().values()))
    for step in range(4):
        for micro in range(2):
            eager, graphed = [loss_of(m, 10 * step + micro, grad_cp=recompute) for m in pair]
            for loss in (eager, graphed):
                loss.backward()
            assert eager.item() == graphed.item()
        for (key, p), q in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), f"step {step}: {key}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for m in pair:
            m.eval()
        with torch.no_grad():
            assert loss_of(pair[0], 99).item() == loss_of(pair[1], 99).item()
        for m in pair:
            m.train()
        assert loss_of(pair[0], 98, 1, 77).item() == loss_of(pair[1], 98, 1, 77).item()
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_graphs_of_a_gpu_wait_for_nothing():
    model = model_of(MODELS["x070"], torch.bfloat16)
    graph_blocks(model, 2, 300)
    loss_of(model, 0).backward()
    x = model.emb.weight[torch.zeros(2, 300, dtype=torch.int64, device=DEVICE)].detach().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, v_first = x, None
        for block in model.blocks:
            y, v_first, _ = block(y, v_first)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_made_again_takes_no_memory_of_the_gpu():
    """The graphs of --grad_cp 1 share the room for what one block's backward pass needs."""
    taken = []
    for recompute in (False, True):
        model = model_of(ModelConfig(n_layer=6, n_embd=256, vocab_size=256), torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph_blocks(model, 4, 2048, recompute)
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - before)
        loss_of(model, 0, 4, 2048, recompute).backward()
        del model
    assert taken[1] < 0.6 * taken[0]


def pools() -> set[tuple[int, int]]:
    return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}


@pytest.mark.parametrize("failure", ["a wait", "an error", "other numbers"])
def test_graphs_of_a_gpu_that_fail_take_no_memory(monkeypatch, failure):
    """A wait for the GPU breaks a recording off, and torch would keep the memory of those before it for good."""
    model, before = model_of(MODELS["x070"], torch.bfloat16), pools()
    block, eager = model.blocks[2], model.blocks[2].forward

    def forward(x, *more):
        if torch.cuda.is_current_stream_capturing() and failure == "a wait":
            x.sum().item()
        elif torch.cuda.is_current_stream_capturing():
            raise RuntimeError("refused")
        return eager(x, *more)

    if failure == "other numbers":
        monkeypatch.setattr(graphs, "_near", lambda *_: False)
    else:
        block.forward = forward
    assert try_graphs(model, 2, 300).startswith(
        "they give other numbers" if failure == "other numbers" else "a block cannot be recorded here: "
    )
    assert pools() <= before | {(0, 0)}


@pytest.mark.parametrize("compiled", [0, 1], ids=["", "compiled"])
def test_a_run_on_a_gpu(tmp_path, capsys, compiled):
    """Its losses with graphs, without, and with graphs after an interruption; and with those that are tried first."""
    with BinIdxWriter(tmp_path / "data", np.uint16) as writer:
        for document in np.array_split(np.cumsum(np.random.default_rng(1).integers(0, 7, 20000)) % 256, 20):
            writer.add(document.astype(np.uint16))
    flags = dict(
        data_file=tmp_path / "data", vocab_size=256, n_layer=2, n_embd=64, head_size=32, ctx_len=32, micro_bsz=2,
        accumulate_grad_batches=2 - compiled, compile=compiled, random_seed=1, epoch_samples=40, accelerator="gpu", devices=1,
        precision="bf16", kernel="cuda", train_stage=3, my_exit_tokens=10**6, lr_init=2e-3, enable_progress_bar=False,
    )  # fmt: skip
    curves = []
    for name, cuda_graphs, stops in (("eager", 0, [16]), ("graphs", 1, [16]), ("parts", 1, [7, 9]), ("tried", -1, [16])):
        for stop in stops:
            torch._dynamo.reset()
            given = flags | dict(proj_dir=tmp_path / name, cuda_graphs=cuda_graphs, max_steps=stop)
            assert main(["train", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]) == 0
        lines = map(json.loads, Path(tmp_path / name / "metrics.jsonl").read_text().splitlines())
        curves.append({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert len(curves[0]) == 16 and curves[1] == curves[2]
    for curve in (curves[1], curves[3]):
        assert curve == (pytest.approx(curves[0], rel=1e-3) if compiled else curves[0])
    said = capsys.readouterr()
    assert "run without CUDA graphs" not in said.err and said.out.count(", blocks in CUDA graphs, ") == 3 + (
        not compiled and peak_flops(torch.device(DEVICE)) is not None
    )
