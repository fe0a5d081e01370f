"""RWKV-8 with ROSA through the same trainer: a run, killed and resumed, its files, text from it, two processes, bad flags."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights, save_weights
from rwkvlm.cli import main
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import ModelConfig, TrainConfig, UserError, model_config
from rwkvlm.infer import load_engine
from rwkvlm.models import build, init_weights, read_config
from rwkvlm.train.flops import flops_per_token
from rwkvlm.train.memory import Activations, estimate
from rwkvlm.train.plan import make_plan
from rwkvlm.train.planner import probe_flags
from rwkvlm.train.start import model_sizes
from rwkvlm.train.strategy import Launch

ROOT = Path(__file__).resolve().parents[2]
STEPS, CTX, BATCH = 20, 16, 16
SHORT = dict(
    n_embd=32,
    head_size=16,
    ctx_len=CTX,
    micro_bsz=BATCH,
    my_exit_tokens=STEPS * BATCH * CTX,
    epoch_samples=80,
    epoch_save=1,
    lr_init=5e-3,
    lr_final=5e-3,
)
KINDS = {
    "x080": dict(my_testing="x080", deep_embed=1),
    "rosa": dict(my_testing="rosa", head_size=None, rosa_bits=1),
}


def start(run, folder, **flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *run.argv(folder, **SHORT | flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RWKV_FP32_PRODUCTS": "highest"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(run, folder, **flags):
    process = start(run, folder, **flags)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "Traceback" not in err, err[-3000:]
    return out, err


@pytest.fixture(scope="module", params=["x080", pytest.param("rosa", marks=pytest.mark.slow)])
def trained(request, tiny, tmp_path_factory):
    """flags of a type, and the folder of an undisturbed run with them."""
    flags, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param) / "out"
    return flags, folder, command(tiny, folder, **flags)


def test_it_learns_and_says_what_it_is(trained, losses):
    flags, folder, (out, err) = trained
    curve = losses(folder)
    assert len(curve) == STEPS and sum(curve[-3:]) < sum(curve[:3]) - 0.5, curve
    kind = {"x080": "x080 L2 D32, 2 heads of 16, ROSA of 4 bits, vocabulary 256, ", "rosa": "rosa L2 D32, ROSA of 1 bit, vocabulary 256, "}[
        flags["my_testing"]
    ]
    assert kind in out and "has no effect" not in err
    assert f"'my_testing': '{flags['my_testing']}'" in (folder / "train_log.txt").read_text() and (folder / "report.html").exists()
    config = read_config(load_weights(folder / "rwkv-final.pth"))
    assert (config.model_type, config.rosa_bits, config.deep_embed) == (
        flags["my_testing"],
        flags.get("rosa_bits", 4),
        bool(flags.get("deep_embed")),
    )


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(trained, tiny, losses, tmp_path):
    flags, folder, _ = trained
    process = start(tiny, tmp_path / "out", **flags, save_steps=1)
    until = time.monotonic() + 300
    while not any(int(saved.name.removeprefix("step")) >= 3 for saved in (tmp_path / "out").glob("state/step*[0-9]")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # what it is comes from the state
    out, _ = command(tiny, tmp_path / "out", my_testing=flags["my_testing"], head_size=None, save_steps=1)
    assert "training state" in out
    assert losses(tmp_path / "out") == losses(folder)
    one, other = (load_weights(f / "rwkv-final.pth") for f in (folder, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_text_from_its_file_is_that_of_the_whole_sequence(trained):
    """The vocabulary of 256 has the World tokenizer's single bytes."""
    engine = load_engine(trained[1] / "rwkv-final.pth", device="cpu")
    with torch.no_grad():
        engine.model.emb.weight[0] = 3.0
        engine.model.head.weight[0] = -10 * engine.model.head.weight.abs().max()  # else it might end the text
    ids = [1, 2, 3, 4, 3, 2, 3, 4]
    with torch.inference_mode():
        logits, state = engine.read(ids)
        for _ in range(12):
            whole = engine.model(torch.tensor([ids]))[:, -1]
            assert (logits - whole).abs().max() <= 1e-5 * whole.abs().max()
            ids.append(int(logits.argmax()))
            logits, state = engine.read(ids[-1:], state)
    assert (
        main(["generate", "--model", str(trained[1] / "rwkv-final.pth"), "--prompt", "", "--length", "5", "--seed", "1", "--device", "cpu"])
        == 0
    )


def test_from_weights_alone_and_how_bits_are_trained_may_change(run, trained, tmp_path, capfd):
    flags, folder, _ = trained
    own = dict(SHORT, train_stage=0, load_model=folder / "rwkv-final.pth", max_steps=1)
    assert run(tmp_path / "a", **own | flags) == 0
    assert run(tmp_path / "b", **own | dict(my_testing=flags["my_testing"], head_size=None, rosa_grad="soft", rosa_tau=0.5)) == 0
    told = capfd.readouterr()
    assert told.err.count("--rosa_tau 0.5 has no effect: --rosa_grad is soft\n") == 1 and " (--rosa_grad soft), vocabulary " in told.out
    other = 5 - flags.get("rosa_bits", 4)
    for more, said in (
        (dict(rosa_bits=other), f"--rosa_bits {other}, but"),
        (dict(my_testing="x070"), f"holds a model of type {flags['my_testing']}; use --my_testing {flags['my_testing']}"),
        (dict(deep_embed=1 - flags.get("deep_embed", 0)), f"--deep_embed {1 - flags.get('deep_embed', 0)}, but"),
    ):
        assert run(tmp_path / "c", **own | flags | more) == 2
        err = capfd.readouterr().err
        assert err.splitlines()[-1].startswith("error: ") and said in err and "Traceback" not in err


def test_an_official_file_is_told_its_bits_once(run, tmp_path, capfd):
    model = build(model_config("rosa", n_layer=2, n_embd=32, vocab_size=256))
    init_weights(model, 0)
    save_weights(tmp_path / "official.pth", {name: tensor for name, tensor in model.state_dict().items() if name != "rosa_bits"})
    flags = dict(SHORT, my_testing="rosa", head_size=None, load_model=tmp_path / "official.pth", train_stage=1)
    assert run(tmp_path / "out", **flags) == 2
    assert "give --rosa_bits" in (said := capfd.readouterr().err) and said.count("\n") == 1
    assert run(tmp_path / "out", **flags, rosa_bits=1) == 0
    assert read_config(load_weights(tmp_path / "out" / "rwkv-init.pth")).rosa_bits == 1


def test_a_model_without_ln0_is_trained_on(run, losses, tmp_path, capfd):
    """Through a training state too: no flag says that it has none."""
    config = model_config("x080", n_layer=2, n_embd=32, vocab_size=256, head_size=16, rosa_bits=1, ln0=False)
    model = build(config)
    init_weights(model, 0)
    save_weights(tmp_path / "a.pth", model.state_dict())
    flags = dict(SHORT, my_testing="x080", load_model=tmp_path / "a.pth")
    assert main(["train", *run.argv(tmp_path / "out", **flags), "--dry_run"]) == 0
    assert run(tmp_path / "whole", **flags, max_steps=6) == 0
    assert run(tmp_path / "out", **flags, max_steps=3) == 0 and run(tmp_path / "out", **flags, max_steps=3) == 0
    assert "training state" in capfd.readouterr().out and losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert read_config(load_weights(tmp_path / "out" / "rwkv-0.pth")) == config


def test_grad_cp_and_micro_batches_give_the_same_curve(run, losses, tmp_path):
    flags = dict(SHORT, my_testing="x080", max_steps=3)
    assert run(tmp_path / "whole", **flags, rosa_grad="flip") == 0
    assert run(tmp_path / "parts", **flags | dict(grad_cp=1, micro_bsz=8, accumulate_grad_batches=2)) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_bf16(run, losses, tmp_path):
    assert run(tmp_path / "out", **SHORT, my_testing="x080", precision="bf16") == 0
    curve = losses(tmp_path / "out")
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.5


def test_the_probe_is_of_the_model_that_the_file_says(run, trained, tmp_path):
    flags, folder, _ = trained
    plan = make_plan(
        parse_flags(
            TrainConfig,
            run.argv(tmp_path / "out", **SHORT | flags | dict(train_stage=0, load_model=folder / "rwkv-final.pth", rosa_tau=0.25)),
            "train.py",
        )
    )
    config = parse_flags(TrainConfig, probe_flags(plan, str(tmp_path / "probe")), "train.py")
    assert model_sizes(config, Path(config.load_model)) == plan.start.model and plan.start.model.rosa_tau == 0.25
    assert config.flags_without_effect() == []


def test_arithmetic_by_hand():
    C, F, V, L = 32, 128, 50, 2
    x070 = flops_per_token(ModelConfig(n_layer=L, n_embd=C, vocab_size=V, head_size=16))
    assert (
        flops_per_token(model_config("x080", n_layer=L, n_embd=C, vocab_size=V, head_size=16, deep_embed=True)) == x070 + 6 * L * 4 * C * C
    )
    assert flops_per_token(model_config("rosa", n_layer=L, n_embd=C, vocab_size=V)) == 6 * (L * (4 * C * C + 2 * C * F) + V * C)


def test_memory_counts_the_vectors_of_deep_embed():
    sizes = model_config("x080", n_layer=2, n_embd=64, vocab_size=1000, head_size=32)
    plain, deep = (
        estimate(s, TrainConfig(precision="fp32"), Launch("cpu", 1, 1, "auto"), Activations(0, 0), 0)
        for s in (sizes, sizes.with_(deep_embed=True))
    )
    more = 2 * 1000 * 64
    assert (deep.parameters - plain.parameters, deep.optimizer - plain.optimizer, deep.gradients - plain.gradients) == (
        4 * more,
        8 * more,
        4 * more,
    )


BAD = {
    "bits": (dict(rosa_bits=2), "--rosa_bits 2 is not supported; choose one of: 1, 4"),
    "grad": (dict(rosa_grad="hard"), "--rosa_grad 'hard' is not known; choose one of: "),
    "tau": (dict(rosa_tau=0), "--rosa_tau 0.0 must be above 0"),
    "deep": (dict(deep_embed=2), "--deep_embed 2 is not known; use 0 or 1"),
    "width": (dict(my_testing="rosa", n_embd=40, head_size=None), "--n_embd 40 is not a multiple of 16"),
    "documents": (
        dict(doc_reset=1, compile=1),
        "--compile 1 does not go with --doc_reset 1 for --my_testing x080, which runs document by document in Python; "
        "leave one of them out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(run, tmp_path, capfd, case):
    flags, said = BAD[case]
    assert run(tmp_path / "out", **SHORT | dict(my_testing="x080") | flags) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_symbols_that_stay_as_they_begin(run, losses, tmp_path, kernel):
    """--rosa_grad none: also resumed, and gone on with flips, which train what the bits come from."""
    flags = dict(SHORT, my_testing="x080", kernel=kernel)
    for folder, stops in (("whole", [12]), ("parts", [5, 7])):
        for stop in stops:
            assert run(tmp_path / folder, **flags, rosa_grad="none", max_steps=stop) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert run(tmp_path / "flips", **flags, max_steps=12) == 0
    assert (
        losses(tmp_path / "flips")[0] == losses(tmp_path / "whole")[0] and losses(tmp_path / "flips")[4:] != losses(tmp_path / "whole")[4:]
    )
    assert run(tmp_path / "whole", **flags, rosa_grad="flip") == 0
    first, at_rest, last = (
        load_weights(file)
        for file in (tmp_path / "whole" / "rwkv-init.pth", tmp_path / "whole" / "rwkv-1.pth", tmp_path / "whole" / "rwkv-final.pth")
    )
    bits = [name for name in first if re.search(r"ln3|rosa\.(x_[qkv]|[qkv]\.)", name)]
    assert len(bits) == 2 * (2 + 3 + 6)
    assert all(torch.equal(first[name], at_rest[name]) for name in bits)
    assert all(
        not torch.equal(first[name], at_rest[name])
        for name in first
        if name not in bits and not re.search(r"blocks\.0\.att\.v[012]|rosa_bits", name)
    )
    assert all(not torch.equal(at_rest[name], last[name]) for name in bits if name.endswith(("q.weight", "k.weight")))


def test_it_is_not_compressed(trained, tmp_path, capsys):
    assert (
        main(["compress", "--model", str(trained[1] / "rwkv-final.pth"), "--out", str(tmp_path / "small.pth"), "--svd_rank_ratio", "0.5"])
        == 2
    )
    err = capsys.readouterr().err
    assert f"of type {trained[0]['my_testing']}; compress is made for x070 and phantom\n" in err and err.count("\n") == 1


def test_flags_say_when_they_have_no_effect():
    (line,) = TrainConfig(rosa_bits=1).flags_without_effect()
    assert line == "--rosa_bits 1 has no effect: --my_testing x070 has no ROSA"
    assert TrainConfig(my_testing="rosa", rosa_bits=1, deep_embed=1, rosa_tau=0.2).flags_without_effect() == []
    assert TrainConfig(my_testing="rosa", rank_w=8, head_size=32).flags_without_effect() == [
        f"--{name} has no effect: --my_testing rosa has no heads and no low ranks" for name in ("head_size 32", "rank_w 8")
    ]
    with pytest.raises(UserError, match="--deep_embed 3 is not known"):
        TrainConfig(my_testing="rosa", deep_embed=3).own_settings()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_and_resume(run, forked, losses, tmp_path, monkeypatch):
    """Under ZeRO-3, where a parameter is there only while its owner runs."""
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "highest")
    flags = SHORT | KINDS["x080"]
    assert run(tmp_path / "one", **flags, max_steps=6) == 0
    half = flags | dict(proj_dir=tmp_path / "two", devices=2, micro_bsz=8, strategy="deepspeed_stage_3", max_steps=3)
    for result in forked((half, {}), (half, {})):
        assert result["codes"] == [0, 0] and "Traceback" not in result["said"], result
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
