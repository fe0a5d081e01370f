"""Hybrid through the same trainer: a run, resuming, an RWKV-7 that becomes one, documents, strategies, arithmetic, memory, bad flags."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch._dynamo.utils import counters

from rwkvlm.checkpoint.pth import load_weights, save_weights
from rwkvlm.cli import main
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import HybridConfig, ModelConfig, TrainConfig, UserError
from rwkvlm.layers.packed import Packed
from rwkvlm.models import build, init_weights, read_config
from rwkvlm.native import available
from rwkvlm.ops import backend
from rwkvlm.train import compiled
from rwkvlm.train.compiled import check_compile, compile_blocks
from rwkvlm.train.flops import flops_per_token
from rwkvlm.train.memory import measure_activations
from rwkvlm.train.plan import make_plan
from rwkvlm.train.planner import probe_flags
from rwkvlm.train.start import model_sizes
from rwkvlm.train.strategy import Launch

HYBRID = dict(my_testing="hybrid", n_layer=3, attention_layers="1/3", attention_kv_heads=1, attention_window=9)
SHORT = dict(my_exit_tokens=10 * 4 * 32, epoch_samples=20, epoch_save=1)

# where two paths of fp32 products are as fast, each run would choose by itself
SAME = {"OMP_NUM_THREADS": "1", "RWKV_FP32_PRODUCTS": "highest"}


def in_a_process(run, folder, **flags):
    argv = [sys.executable, "-m", "rwkvlm", "train", *run.argv(folder, **flags)]
    done = subprocess.run(argv, env=os.environ | SAME, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("hybrid") / "out"
    said = in_a_process(tiny, folder, **HYBRID, **SHORT)
    assert "hybrid L3 D64" in said and "attention in block 2, 2 heads (1 of keys and values), window 9" in said
    return folder


def test_it_learns_and_generates(hybrid, losses, capsys):
    curve = losses(hybrid)
    assert len(curve) == 10 and sum(curve[-3:]) < sum(curve[:3]) - 0.5
    config = read_config(load_weights(hybrid / "rwkv-final.pth"))
    assert (config.model_type, config.attention_layers, config.attention_kv_heads, config.attention_window) == ("hybrid", "2", 1, 9)
    assert (
        main(["generate", "--model", str(hybrid / "rwkv-final.pth"), "--prompt", "a", "--length", "20", "--seed", "1", "--device", "cpu"])
        == 0
    )
    assert capsys.readouterr().out.startswith("a")


def test_stopped_and_gone_on_it_is_the_same_run(run, hybrid, losses, tmp_path):
    in_a_process(run, tmp_path / "out", **HYBRID, **SHORT, max_steps=3)
    in_a_process(run, tmp_path / "out", my_testing="hybrid", n_layer=3, **SHORT)  # what it is comes from the state
    assert losses(tmp_path / "out") == losses(hybrid)
    one, other = (load_weights(folder / "rwkv-final.pth") for folder in (hybrid, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_rwkv7_becomes_one(run, losses, tmp_path, capfd):
    model = build(ModelConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=256))
    init_weights(model, 3)
    for block in model.blocks[:2]:
        torch.nn.init.normal_(block.att.output.weight, std=0.05)
    save_weights(tmp_path / "x070.pth", model.state_dict())  # block 2 adds nothing yet, as attention does not
    flags = dict(SHORT, train_stage=0, n_layer=3, load_model=tmp_path / "x070.pth", max_steps=1)
    assert run(tmp_path / "x070", **flags) == 0
    assert run(tmp_path / "hybrid", **flags | HYBRID) == 2
    assert "lacks blocks.2.att.x_q (11 missing in all); use --load_partial 1" in capfd.readouterr().err
    assert run(tmp_path / "hybrid", **flags | HYBRID, load_partial=1) == 0
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "x070"), rel=1e-6)


def test_a_deeper_one(run, hybrid, tmp_path, capfd):
    flags = SHORT | HYBRID | dict(train_stage=1, load_model=hybrid / "rwkv-final.pth", load_partial=1, n_layer=6)
    assert run(tmp_path / "a", **flags) == 0
    assert read_config(load_weights(tmp_path / "a" / "rwkv-init.pth")).attention == (2, 5)
    assert run(tmp_path / "b", **flags | dict(attention_layers=None)) == 0
    assert read_config(load_weights(tmp_path / "b" / "rwkv-init.pth")).attention == (2,)
    assert run(tmp_path / "c", **flags | dict(attention_layers="1/2")) == 2
    assert "--attention_layers 1/2, but" in capfd.readouterr().err


@pytest.mark.parametrize("window", [0, 4])
def test_a_packed_row_is_the_documents_by_themselves(window):
    model = build(HybridConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=256, attention_layers="1,2", attention_window=window))
    init_weights(model, 1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    bounds = torch.tensor([0, 2, 9, 30, 34], dtype=torch.int32)
    idx, padding = torch.randint(1, 256, (1, 34), generator=torch.Generator().manual_seed(0)), bounds[1:].long() - 1
    tokens = torch.tensor([t for t in range(34) if t not in padding])
    x = model.features(idx, packed=Packed(bounds, tokens, bounds.numpy()))[0, tokens]
    alone = torch.cat([model.features(idx[:, start : stop - 1])[0] for start, stop in pairwise(bounds)])
    torch.testing.assert_close(x, alone, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(
        *(torch.autograd.grad(y.square().sum(), [p for name, p in model.named_parameters() if name != "head.weight"]) for y in (x, alone))
    ):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-8


def test_a_run_with_documents(run, losses, tmp_path):
    for name, stops in (("a", [None]), ("b", [4, None])):
        for stop in stops:
            assert run(tmp_path / name, **HYBRID, **SHORT, doc_reset=1, max_steps=stop) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("window", [0, 1, 7, 20, 64])
def test_arithmetic_by_hand(window):
    sizes = dict(n_layer=4, n_embd=64, head_size=32, vocab_size=100)
    hybrid = HybridConfig(**sizes, attention_layers="1,3", attention_kv_heads=1, attention_window=window)
    seen = sum(min(t + 1, window or 20) for t in range(20))
    C, ranks = 64, hybrid.rank_w + hybrid.rank_a + hybrid.rank_v
    weights = 2 * (2 * C * C - 2 * C * 32 + 2 * ranks * C)  # what RWKV-7 has in these blocks and attention has not
    states = 2 * 27 * 32 * C
    assert flops_per_token(ModelConfig(**sizes)) - flops_per_token(hybrid, 20) == pytest.approx(
        6 * weights + states - 2 * 12 * C * seen / 20, abs=1
    )


@pytest.mark.parametrize("window", [0, 48, 192, 1000])
def test_memory_of_both_kinds_of_blocks(window):
    """The planner's sum over blocks is what autograd keeps for the whole model."""
    sizes = HybridConfig(
        n_layer=5, n_embd=64, head_size=32, vocab_size=256, attention_layers="1,4", attention_kv_heads=1, attention_window=window
    )
    found = measure_activations(sizes, TrainConfig(ctx_len=192, precision="fp32", kernel="torch"), torch.device("cpu"))
    model = build(sizes)
    own, kept = {p.untyped_storage().data_ptr() for p in model.state_dict(keep_vars=True).values()}, {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = model.features(torch.zeros(2, 192, dtype=torch.int64))
    assert x.shape == (2, 192, 64)
    assert 384 * (found.outside + 5 * found.block) == pytest.approx(sum(kept.values()), rel=0.05)


BAD = {
    "block 0": (dict(attention_layers="0"), "--attention_layers 0 names block 0"),
    "above": (dict(attention_layers="7"), "--attention_layers 7 names block 7, but --n_layer 3"),
    "words": (dict(attention_layers="all"), "--attention_layers 'all' is neither numbers"),
    "heads": (dict(attention_kv_heads=3), "--attention_kv_heads 3 does not divide the 2 heads"),
    "window": (dict(attention_window=-5), "--attention_window -5 must be at least 0"),
    "one block": (dict(n_layer=1), "--my_testing hybrid needs at least 2 blocks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(run, tmp_path, capfd, case):
    flags, said = BAD[case]
    assert run(tmp_path / "out", **HYBRID | flags) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_another_model_is_not_mixed_into_a_run(run, hybrid, tmp_path, capfd):
    for flags, said in (
        (dict(my_testing="x070"), "holds a model of type hybrid; use --my_testing hybrid"),
        (dict(my_testing="hybrid", attention_layers="1,2"), "--attention_layers 1,2, but"),
        (dict(my_testing="hybrid", attention_window=8), "--attention_window 8, but"),
        (dict(my_testing="hybrid", attention_kv_heads=0), "--attention_kv_heads 0, but"),
    ):
        assert run(tmp_path / "out", train_stage=0, load_model=hybrid / "rwkv-final.pth", n_layer=3, **flags) == 2
        assert said in capfd.readouterr().err


def test_flags_of_a_hybrid_say_when_they_have_no_effect():
    (line,) = TrainConfig(attention_window=64).flags_without_effect()
    assert line == "--attention_window 64 has no effect: --my_testing x070 has no attention"
    assert TrainConfig(my_testing="hybrid", attention_window=64).flags_without_effect() == []


def test_compile_is_refused_with_documents_and_only_then(monkeypatch):
    monkeypatch.setattr(compiled, "_why_not", lambda device: "")
    check = lambda **flags: check_compile(
        TrainConfig(my_testing="hybrid", compile=1, **flags), Launch("cpu", 1, 1, "auto"), HybridConfig(n_layer=2, n_embd=64), "cpu"
    )
    check()
    with pytest.raises(UserError, match="--compile 1 does not go with --doc_reset 1 for --my_testing hybrid"):
        check(doc_reset=1)


def test_a_probe_is_a_run_of_the_same_model(run, tmp_path):
    plan = make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", **HYBRID), "train.py"))
    again = parse_flags(TrainConfig, probe_flags(plan, str(tmp_path)), "train.py")
    assert model_sizes(again) == plan.start.model and plan.start.model.attention_window == 9


@pytest.mark.slow
@pytest.mark.skipif(not available("wkv7")[0], reason="torch.compile needs a C++ compiler")
def test_compiled_it_is_the_same():
    """Three graphs: of block 0, of all other RWKV-7 blocks, and of all blocks with attention."""
    model = build(
        HybridConfig(n_layer=6, n_embd=64, head_size=32, vocab_size=256, attention_layers="2,4,5", attention_kv_heads=1, attention_window=9)
    )
    init_weights(model, 1)
    idx = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    for i, p in enumerate(model.parameters()):
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))

    def results():
        x = model.features(idx)
        return [x, *torch.autograd.grad(x.square().mean(), [p for name, p in model.named_parameters() if name != "head.weight"])]

    backend.set_kernel("cpu")
    torch._dynamo.reset()
    counters.clear()
    eager = results()
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        compile_blocks(model)
        for ours, want in zip(results(), eager):
            assert (ours - want).norm() <= 1e-4 * want.norm()
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(run, hybrid, losses, tmp_path):
    """Under ZeRO-3, where a parameter is there only while its owner runs."""
    in_a_process(run, tmp_path / "two", **HYBRID, **SHORT, devices=2, micro_bsz=2, strategy="deepspeed_stage_3", grad_cp=1)
    assert losses(tmp_path / "two") == pytest.approx(losses(hybrid), rel=1e-5)
    one, two = (load_weights(folder / "rwkv-final.pth") for folder in (hybrid, tmp_path / "two"))
    assert one.keys() == two.keys() and read_config(one) == read_config(two)
