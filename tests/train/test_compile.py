"""--compile 1: two graphs for all blocks, the results of eager ones, under every strategy; and where it is refused."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from rwkvlm.config import ModelConfig, PhantomConfig, TrainConfig, UserError, model_config
from rwkvlm.models import build, init_weights
from rwkvlm.native import available
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train import compiled, graphs
from rwkvlm.train.compiled import check_compile, compile_blocks
from rwkvlm.train.strategy import Launch

needs_compiler = pytest.mark.skipif(not available("wkv7")[0], reason="torch.compile needs a C++ compiler")
COMPILED = dict(compile=1, kernel="auto", adam_eps=1e-8)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is compiled yet, and settings are afterwards what they were."""
    torch._dynamo.reset()
    counters.clear()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        yield
    torch._dynamo.reset()


SIZES = dict(n_embd=64, vocab_size=256, head_size=32)
MODELS = {
    "x070": ModelConfig(n_layer=12, **SIZES),
    "x080": model_config("x080", n_layer=4, rosa_bits=4, deep_embed=True, **SIZES),
    "fixed symbols": model_config("x080", n_layer=4, rosa_bits=4, rosa_grad="none", **SIZES),
    "rosa": model_config("rosa", n_layer=4, n_embd=64, vocab_size=256, rosa_bits=1),
}


def model_of(config: ModelConfig) -> torch.nn.Module:
    model = build(config)
    init_weights(model, 1)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05, generator=rng)
    return model


@needs_compiler
@pytest.mark.parametrize("kind", ["x070", "x080", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rosa", "fixed symbols"))])
def test_all_blocks_are_two_graphs_with_the_results_of_eager_ones(kind):
    model, idx = model_of(MODELS[kind]), torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    parameters, names = {name: p for name, p in model.named_parameters() if p.requires_grad}, list(model.state_dict())

    def results():
        loss = head_cross_entropy(model.features(idx[:, :-1]), model.head.weight, idx[:, 1:])
        return loss.item(), torch.autograd.grad(loss, list(parameters.values()))

    loss, grads = results()
    compile_blocks(model)
    assert list(model.state_dict()) == names
    compiled_loss, compiled_grads = results()
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, eager, ours in zip(parameters, grads, compiled_grads):
        assert (ours - eager).norm() <= 2e-5 * eager.norm(), name
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
def test_the_curve_and_the_number_of_graphs(run, whole, losses, tmp_path):
    """Training and validation have two graphs each; one more is the trial of the compiler."""
    assert run(tmp_path / "out", n_layer=2, max_steps=20, **COMPILED) == 0
    assert run(tmp_path / "eager", n_layer=2, max_steps=20, **COMPILED | {"compile": 0}) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    assert run(tmp_path / "out", **COMPILED) == 0  # goes on, with blocks compiled anew
    assert run(tmp_path / "whole", **COMPILED, grad_cp=1) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@needs_compiler
@pytest.mark.slow
def test_with_cuda_graphs_each_pass_is_announced(run, losses, tmp_path, monkeypatch):
    """--cuda_graphs 1 beside it: the compiler is asked for graphs, of which it makes none on a CPU.

    It may use their memory again with each batch.
    """
    asked, passes = [], []
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: asked.append(how["options"]) or compile_block(block, **how))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: passes.append(torch.is_grad_enabled()))
    monkeypatch.setattr(graphs, "check_graphs", lambda *_: None)
    for name, graphed in (("graphs", 1), ("none", 0)):
        assert run(tmp_path / name, n_layer=2, max_steps=6, cuda_graphs=graphed, **COMPILED) == 0
    assert losses(tmp_path / "graphs") == losses(tmp_path / "none")
    assert [how["triton.cudagraphs"] for how in asked] == [True, True, False, False]
    assert passes.count(True) == 6 and passes.count(False) > 0


@needs_compiler
@pytest.mark.slow
def test_documents_of_all_lengths_are_the_same_graphs(run, losses, tmp_path):
    flags = dict(COMPILED, doc_reset=1, precision="bf16")
    for name, stops in (("out", [13, None]), ("whole", [None])):
        for stop in stops:
            torch._dynamo.reset()
            counters.clear()
            assert run(tmp_path / name, max_steps=stop, **flags) == 0
            assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    assert run(tmp_path / "eager", **flags | {"compile": 0}) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=5e-3)


@needs_compiler
@pytest.mark.slow
def test_an_x080(run, losses, tmp_path):
    flags = dict(COMPILED, my_testing="x080", deep_embed=1, my_exit_tokens=10 * 4 * 32)
    for name, stops in (("out", [4, None]), ("whole", [None])):
        for stop in stops:
            assert run(tmp_path / name, max_steps=stop, **flags) == 0
    assert run(tmp_path / "eager", **flags | {"compile": 0}) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@needs_compiler
@pytest.mark.slow
def test_a_phantom_without_test_time_training(run, losses, tmp_path):
    """Its dropout too: a resumed run draws what one that was not interrupted draws."""
    flags = dict(COMPILED, my_testing="phantom", ttt_enabled=0, max_depth_iter=2)
    for name, more in (("out", {}), ("eager", {"compile": 0})):
        assert run(tmp_path / name, max_steps=8, **flags | more) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    counters.clear()
    for name, stops in (("a", [5, 10]), ("b", [15])):
        torch.manual_seed(1)
        for stop in stops:
            assert run(tmp_path / name, max_steps=stop, dropout=0.1, **flags) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and counters["stats"]["unique_graphs"] <= 13


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compiler's cache that is empty when the first of two processes comes."""
    return str(tmp_path_factory.mktemp("inductor"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_two_processes_give_the_curve_of_one(tiny, whole, losses, cache, tmp_path, strategy):
    argv = tiny.argv(tmp_path / "out", strategy=strategy, devices=2, micro_bsz=2, compile=1, kernel="auto", max_steps=20)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "rwkvlm", "train", *argv], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "blocks compiled" in done.stdout
    assert losses(tmp_path / "out") == pytest.approx(losses(whole)[:20], rel=1e-4)


def check(kernel="cpu", model=ModelConfig(n_layer=2, n_embd=64), strategy="auto"):
    check_compile(TrainConfig(compile=1), Launch("cpu", 1, 1, strategy), model, kernel)


def test_where_it_is_refused(monkeypatch):
    def broken(function, **how):
        raise RuntimeError(
            "backend='inductor' raised:\nCppCompileError: C++ compile error\nfatal error: Python.h: No such file or directory"
        )

    refusals = [
        (dict(strategy="deepspeed_stage_3"), "--strategy deepspeed_stage_3.*; use deepspeed_stage_2 or ddp, or leave --compile out"),
        (dict(strategy="deepspeed_stage_3_offload"), "--strategy deepspeed_stage_3_offload"),
        (dict(model=PhantomConfig(n_layer=2, n_embd=64)), "test-time training.*; use --ttt_enabled 0, or leave --compile out"),
        (dict(kernel="torch"), "needs the native kernels"),
    ]
    monkeypatch.setattr(compiled, "_why_not", lambda device: "")
    for flags, line in refusals:
        with pytest.raises(UserError, match=line) as caught:
            check(**flags)
        assert "\n" not in str(caught.value)
    check(model=PhantomConfig(n_layer=2, n_embd=64, ttt_enabled=False))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", broken)
    if available("wkv7")[0]:
        with pytest.raises(
            UserError,
            match="fatal error: Python.h: No such file or directory; it needs g.. and Python's headers "
            ".apt-get install g.. python3-dev.; or leave --compile out",
        ) as caught:
            check()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match="no C.. compiler .no-such-compiler is not on the PATH.; install g.. or set CXX; or leave --compile out"
    ):
        check()
    gpu = torch.device("cuda")  # where nothing is tried
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled._why_not(gpu).startswith("triton is not installed")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled._why_not(gpu).startswith("triton needs a C compiler")
    with pytest.raises(UserError, match="--compile 2 is not known; use 0 or 1"):
        TrainConfig(compile=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_compiler_says_so_before_the_run_begins(tiny, tmp_path):
    argv = tiny.argv(tmp_path / "out", compile=1, kernel="")
    done = subprocess.run(
        [sys.executable, "-m", "rwkvlm", "train", *argv],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.splitlines()[-1].startswith("error: --compile 1: torch.compile does not work here: no C++ compiler")
    )
    assert not list((tmp_path / "out").glob("*.pth"))
