"""RWKV-4 through the same trainer: a run, its files, killed and resumed, two processes, text, what does not go with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights, save_weights
from rwkvlm.cli import main
from rwkvlm.config import ModelConfig
from rwkvlm.models import build, init_weights, read_config
from rwkvlm.native import available

ROOT = Path(__file__).resolve().parents[2]
RWKV4 = dict(my_testing="x040", head_size=None, kernel="auto")
needs_compiler = pytest.mark.skipif(not available("wkv4")[0], reason="torch.compile needs a C++ compiler")


def same_weights(a: Path, b: Path) -> bool:
    left, right = load_weights(a), load_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A run of 30 steps, undisturbed, one of the same flags for each format."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rwkv4")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RWKV_FP32_PRODUCTS", "highest")
        for precision in ("fp32", "bf16"):
            assert tiny(folder / precision, **RWKV4, precision=precision) == 0
    return folder


@pytest.fixture(autouse=True)
def same_products(monkeypatch):
    """As in the run above: which of two paths is faster, each would find out for itself."""
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "highest")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_and_the_file_is_an_rwkv4(trained, losses, records, precision):
    curve = losses(trained / precision)
    assert len(curve) == 30 and curve[0] == pytest.approx(5.55, abs=0.2) and sum(curve[-5:]) / 5 < 4.6
    assert records(trained / precision, "val_loss")[30]["val_loss"] < curve[0] - 0.8
    assert set(records(trained / precision)[1]["grad_norms"]) == {"emb", "ln", "att", "ffn", "head"}
    weights = load_weights(trained / precision / "rwkv-final.pth")
    assert read_config(weights) == ModelConfig(model_type="x040", n_layer=2, n_embd=64, vocab_size=256)
    assert weights["blocks.1.att.time_decay"].shape == (64,)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_is_the_same_run(trained, run, losses, tmp_path, precision):
    for stop in (7, 9, None):
        assert run(tmp_path / "out", **RWKV4, precision=precision, max_steps=stop) == 0
    assert losses(tmp_path / "out") == losses(trained / precision)
    assert same_weights(tmp_path / "out" / "rwkv-final.pth", trained / precision / "rwkv-final.pth")


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(trained, tiny, losses, tmp_path):
    """kill -9 once it has saved a state."""
    argv = tiny.argv(tmp_path / "out", **RWKV4, save_steps=3)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "state" / "latest").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "start     training state" in done.stdout, done.stderr
    assert losses(tmp_path / "out") == losses(trained / "fp32")
    assert same_weights(tmp_path / "out" / "rwkv-final.pth", trained / "fp32" / "rwkv-final.pth")


def test_what_it_says_about_itself(run, tmp_path, capfd):
    assert run(tmp_path / "out", **RWKV4 | dict(head_size=64), rank_w=8, max_steps=1) == 0
    out, err = capfd.readouterr()
    assert "model     x040 L2 D64, vocabulary 256, 0." in out and ("wkv4 in C++" in out or not available("wkv4")[0])
    assert "--head_size 64 has no effect: --my_testing x040 has no heads and no low ranks\n" in err and "--rank_w 8 has no effect" in err
    assert run(tmp_path / "out", **RWKV4 | dict(head_size=64), max_steps=1) == 0  # and goes on with it
    assert run(tmp_path / "plain", **RWKV4 | dict(kernel="torch"), max_steps=1) == 0
    assert "wkv4 in plain PyTorch" in capfd.readouterr().out


def test_plain_pytorch_trains_alike(trained, run, losses, tmp_path):
    assert run(tmp_path / "out", **RWKV4 | dict(kernel="torch"), max_steps=10, grad_cp=1, accumulate_grad_batches=2, micro_bsz=2) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(trained / "fp32")[:10], rel=1e-5)


def test_text_from_it(run, capfd, tmp_path):
    """The characters of its vocabulary are those of a tokenizer of bytes; a text is what one makes of the logits."""
    (tmp_path / "text.txt").write_text("abcabcabd" * 400)
    flags = dict(
        data_file=tmp_path / "text.txt", data_type="utf-8", my_testing="x040", n_layer=1, n_embd=32, ctx_len=16, micro_bsz=8,
        my_exit_tokens=40 * 8 * 16, lr_init=1e-2, accelerator="cpu", precision="fp32", train_stage=3, random_seed=1,
        enable_progress_bar=False, proj_dir=tmp_path / "out",
    )  # fmt: skip
    assert main(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    capfd.readouterr()
    generate = [
        "generate",
        "--model",
        str(tmp_path / "out" / "rwkv-final.pth"),
        "--tokenizer",
        str(tmp_path / "out" / "tokenizer.json"),
        "--device",
        "cpu",
    ]
    assert main([*generate, "--prompt", "abcabcabd", "--length", "8", "--top_k", "1", "--seed", "1"]) == 0
    assert "abcabcab" in capfd.readouterr().out


def weights(folder: Path, **sizes) -> Path:
    model = build(ModelConfig(**sizes))
    init_weights(model, 0)
    save_weights(folder / "model.pth", model.state_dict())
    return folder / "model.pth"


CASES = {
    "width": (lambda f: dict(n_embd=48), "--n_embd 48 is not a multiple of 32, which --my_testing x040 needs; change it"),
    "dim_att": (lambda f: dict(dim_att=32), "--dim_att 32 differs from --n_embd 64; --my_testing x040 needs them equal"),
    "an RWKV-7 file": (
        lambda f: dict(train_stage=0, load_model=weights(f, n_layer=2, n_embd=64, vocab_size=256, head_size=32)),
        "--my_testing x040, but {f}/model.pth holds a model of type x070; use --my_testing x070",
    ),
    "its file as another model": (
        lambda f: dict(my_testing="phantom", train_stage=0, load_model=weights(f, model_type="x040", n_layer=2, n_embd=64, vocab_size=256)),
        "--my_testing phantom, but {f}/model.pth holds a model of type x040; use --my_testing x040",
    ),
    "compiled in plain PyTorch": (lambda f: dict(compile=1, kernel="torch"), "in plain PyTorch wkv4 is a loop in Python"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_go_with_it_is_one_line(run, tmp_path, capfd, case):
    make, said = CASES[case]
    assert run(tmp_path / "out", **RWKV4 | make(tmp_path)) == 2
    err = capfd.readouterr().err
    assert said.replace("{f}", str(tmp_path)) in err and "Traceback" not in err, err


@needs_compiler
@pytest.mark.slow
def test_compiled_it_is_two_graphs_with_the_curve_of_eager_blocks(trained, run, losses, tmp_path):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        assert run(tmp_path / "out", **RWKV4, compile=1, max_steps=6) == 0
    # training and validation have two each, and one is the trial of the compiler
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    assert losses(tmp_path / "out") == pytest.approx(losses(trained / "fp32")[:6], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_alike_under_ddp_and_zero_3(trained, forked, losses, tmp_path):
    strategies = ("ddp", "deepspeed_stage_3")
    two = RWKV4 | dict(devices=2, micro_bsz=2, max_steps=4)
    for result in forked(*((two | dict(proj_dir=tmp_path / s, strategy=s), {}) for s in strategies)):
        assert set(result["codes"]) == {0}, result["said"]
    for strategy in strategies:
        assert losses(tmp_path / strategy) == pytest.approx(losses(trained / "fp32")[:4], rel=1e-5)
