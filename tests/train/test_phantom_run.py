"""Phantom through the same trainer: a run, its files, resuming, an RWKV-7 that becomes one, every strategy, the demo script, bad flags."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.config import ModelConfig, PhantomConfig, TrainConfig, UserError, model_config
from rwkvlm.config.phantom import MATRICES
from rwkvlm.infer import load_engine
from rwkvlm.models import build, init_weights, read_config

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = dict(my_testing="phantom", ttt_chunk=16, core_ratio=0.5)
SHORT = dict(my_exit_tokens=10 * 4 * 32, epoch_samples=20, epoch_save=1)


def command(run, folder, **flags):
    # which of two paths is faster, each run would find out for itself
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RWKV_FP32_PRODUCTS": "highest"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *run.argv(folder, **flags)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def phantom(tiny, tmp_path_factory):
    """The folder of an undisturbed run with the meta term."""
    folder = tmp_path_factory.mktemp("phantom") / "out"
    command(tiny, folder, **PHANTOM, **SHORT, ttt_meta=1)
    return folder


def test_the_initial_model_is_told_as_large_as_the_one_that_is_trained(run, tmp_path, capsys):
    """What describes the model in its file is no parameter."""
    assert run(tmp_path / "out", **PHANTOM, train_stage=1) == 0
    wrote = capsys.readouterr().out.rpartition(", ")[2]
    assert run(tmp_path / "out", **PHANTOM, **SHORT, max_steps=1) == 0
    assert wrote.endswith(" M parameters\n") and f", vocabulary 256, {wrote}" in capsys.readouterr().out


def test_it_learns_and_says_what_it_is(phantom, losses, records):
    curve = losses(phantom)
    assert len(curve) == 10 and sum(curve[-3:]) < sum(curve[:3]) - 0.5
    terms = [record["meta_loss"] for record in records(phantom).values()]
    assert all(0 < term < 10 for term in terms) and len(set(terms)) == 10
    log = (phantom / "train_log.txt").read_text()
    assert "'ttt_chunk': 16" in log and "'my_testing': 'phantom'" in log


def test_meta_term_is_trained_but_not_mixed_into_the_loss(run, phantom, losses, tmp_path):
    assert run(tmp_path / "out", **PHANTOM, **SHORT, max_steps=4) == 0
    without, with_term = losses(tmp_path / "out"), losses(phantom)[:4]
    assert without[:1] == pytest.approx(with_term[:1], rel=1e-6) and without[3] != with_term[3]


def test_the_file_says_what_the_shapes_do_not(phantom):
    tensors = load_weights(phantom / "rwkv-final.pth")
    config = read_config(tensors)
    assert (config.model_type, config.core_ratio, config.ttt_chunk, config.n_layer) == ("phantom", 0.5, 16, 2)
    model = build(config)
    load_into(model, tensors)
    assert load_engine(phantom / "rwkv-final.pth", device="cpu").model.state_dict().keys() == tensors.keys()


def test_stopped_and_gone_on_it_is_the_same_run(run, phantom, losses, tmp_path):
    # with as many threads as the other run: torch's own sums may depend on them
    command(run, tmp_path / "out", **PHANTOM, **SHORT, ttt_meta=1, max_steps=3)
    command(run, tmp_path / "out", my_testing="x070_phantom", **SHORT, ttt_meta=1)  # what it is comes from the state
    assert losses(tmp_path / "out") == losses(phantom)
    one, other = (load_weights(folder / "rwkv-final.pth") for folder in (phantom, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "weights").mkdir()
    save_weights(tmp_path / "weights" / "rwkv-0.pth", one)
    assert run(tmp_path / "weights", my_testing="phantom", **SHORT, max_steps=1) == 0, "and from weights alone"


def test_runs_of_before_the_present_memory_go_on(run, losses, tmp_path, monkeypatch, capfd):
    """Their states and files have the sizes of the memory that there was; those that used it are refused."""
    now = PhantomConfig.as_dict
    for kind in ("state", "memory"):
        with monkeypatch.context() as then:
            then.setattr(
                PhantomConfig,
                "as_dict",
                lambda self: {k: v for k, v in now(self).items() if k != "ttt_features"} | {"memory_dim": 32, "memory_rows": 32},
            )
            then.setattr(
                PhantomConfig,
                "carried",
                lambda self: {
                    k: v
                    for k, v in self.as_dict().items()
                    if k in ("core_ratio", "ttt_kind", "ttt_chunk", "ttt_enabled", "memory_dim", "memory_rows")
                },
            )
            assert run(tmp_path / kind, my_testing="phantom", ttt_kind=kind, ttt_chunk=16, **SHORT, max_steps=3) == 0
        capfd.readouterr()
        if kind == "state":
            assert run(tmp_path / kind, my_testing="phantom", **SHORT) == 0 and len(losses(tmp_path / kind)) == 10
            assert read_config(load_weights(tmp_path / kind / "rwkv-final.pth")).steps_on_state
        else:
            assert run(tmp_path / kind, my_testing="phantom", **SHORT) == 2
            assert (
                "error: the model has the memory that there was until November 2026; use the version that wrote it"
                in capfd.readouterr().err
            )


def rwkv7(folder):
    model = build(ModelConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=256))
    init_weights(model, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("output.weight", "value.weight")):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 20)
    save_weights(folder / "rwkv7.pth", model.state_dict())
    return folder / "rwkv7.pth"


def test_the_masks_of_dropout_are_those_of_the_seed(run, losses, tmp_path, monkeypatch):
    """Whatever random numbers this process has drawn before.

    Also where it goes on from a state of another number of processes, whose random numbers are not its own.
    """
    monkeypatch.setattr("rwkvlm.checkpoint.state._set_random_states", lambda states: None)
    flags = dict(my_testing="phantom", ttt_enabled=0, dropout=0.3, max_steps=3, load_model=rwkv7(tmp_path), train_stage=0)
    for name, seed in (("a", 5), ("b", 5), ("other", 6)):
        for stage in (0, 3):
            torch.manual_seed(ord(name[0]))
            assert run(tmp_path / name, **flags | dict(train_stage=stage), random_seed=seed) == 0
    first, same, other = (losses(tmp_path / name) for name in ("a", "b", "other"))
    assert len(first) == 6 and first == same and not {*first} & {*other}
    monkeypatch.setattr("rwkvlm.train.run.rank", lambda: 1)
    assert run(tmp_path / "beside", **flags, random_seed=5) == 0
    assert not {*first} & {*losses(tmp_path / "beside")}, "each process has masks of its own"


def test_rwkv7_is_loaded_as_a_phantom(run, losses, tmp_path):
    path = rwkv7(tmp_path)
    flags = dict(SHORT, train_stage=0, load_model=path, max_steps=3)
    assert run(tmp_path / "x070", **flags) == 0
    assert run(tmp_path / "plain", my_testing="phantom", core_ratio=1, ttt_enabled=0, **flags) == 0
    assert losses(tmp_path / "x070") == losses(tmp_path / "plain")
    assert run(tmp_path / "ghosts", my_testing="phantom", ttt_chunk=16, core_ratio=0.9, **flags) == 0
    assert losses(tmp_path / "ghosts")[0] == pytest.approx(losses(tmp_path / "x070")[0], rel=0.05)
    assert run(tmp_path / "cut", my_testing="phantom", ttt_chunk=16, core_ratio=0.2, **flags) == 0
    a, b = (abs(losses(tmp_path / name)[0] - losses(tmp_path / "x070")[0]) for name in ("ghosts", "cut"))
    assert a < b


def test_switched_off_its_files_are_plain_rwkv7(run, whole, losses, tmp_path):
    assert run(tmp_path / "out", my_testing="phantom", ghost_ratio=0, ttt_enabled=0, max_steps=2) == 0
    assert losses(tmp_path / "out") == losses(whole)[:2]
    assert read_config(load_weights(tmp_path / "out" / "rwkv-init.pth")).model_type == "x070"


BAD = {
    "ratios": (dict(core_ratio=0.5, ghost_ratio=0.6), "do not sum to 1; give only one of them"),
    "ratio": (dict(core_ratio=2), "--core_ratio 2.0 must lie in (0, 1]"),
    "chunk": (dict(ttt_chunk=24), "--ttt_chunk 24 is not a multiple of 16"),
    "context": (
        dict(ttt_chunk=32),
        "--ctx_len 32 is not above --ttt_chunk 32: no token would come after a step, and nothing would train it; "
        "use a longer --ctx_len, a smaller --ttt_chunk",
    ),
    "short context": (dict(ctx_len=16), "nothing would train it; use a longer --ctx_len, or --ttt_enabled 0"),
    "steps": (dict(ttt_steps=0), "--ttt_steps 0 must be at least 1"),
    "switch": (dict(ttt_enabled=2), "--ttt_enabled 2 is not known; use 0 or 1"),
    "matrix": (dict(core_ratios="key=1"), "--core_ratios names 'key'"),
    "kind": (dict(ttt_kind="states"), "--ttt_kind 'states' is not known; choose one of: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(run, tmp_path, capfd, case):
    flags, said = BAD[case]
    assert run(tmp_path / "out", **dict(PHANTOM, **flags) if case != "ratios" else dict(my_testing="phantom", **flags)) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_another_phantom_is_not_mixed_into_a_run(run, phantom, tmp_path, capfd):
    for flags, said in (
        (dict(my_testing="x070"), "holds a model of type phantom; use --my_testing phantom"),
        (dict(my_testing="phantom", core_ratio=0.25), "--core_ratio 0.25, but"),
        (dict(my_testing="phantom", ttt_chunk=64, ctx_len=128), "--ttt_chunk 64, but"),
    ):
        assert run(tmp_path / "out", train_stage=0, load_model=phantom / "rwkv-final.pth", **flags) == 2
        assert said in capfd.readouterr().err


def test_the_prediction_head_neither_goes_nor_comes_unsaid(run, tmp_path, capfd):
    """It is there where something trains it: a change of that names the flag, both values and the cure; the same command always goes on."""
    short = dict(SHORT, max_steps=1)
    with_head, without = dict(PHANTOM, ttt_second_order=1), dict(PHANTOM, ttt_second_order=0, ttt_head=1)
    assert run(tmp_path / "a", **with_head, **short) == 0 and run(tmp_path / "b", **without, **short) == 0
    capfd.readouterr()
    state = tmp_path / "a" / "state" / "step1"
    assert run(tmp_path / "a", **PHANTOM | dict(ttt_second_order=0), **short) == 2
    lost = (
        "was trained with --ttt_second_order 1 and has a prediction head, which nothing would train now; "
        "leave --ttt_second_order out, or add --ttt_meta 1\n"
    )
    assert capfd.readouterr().err == f"error: --ttt_second_order 0, but {state} {lost}"
    assert (
        run(tmp_path / "c", **PHANTOM | dict(ttt_second_order=0), **SHORT, train_stage=0, load_model=tmp_path / "a" / "rwkv-init.pth") == 2
    )
    assert lost in capfd.readouterr().err
    assert run(tmp_path / "a", **PHANTOM | dict(ttt_head=0), **short) == 2
    assert f"--ttt_head 0, but {state} has 1; use --ttt_head 1 or leave it out" in capfd.readouterr().err
    assert run(tmp_path / "b", **PHANTOM | dict(ttt_second_order=1, ttt_head=1), **short) == 2
    assert "--ttt_head 1, but" in (said := capfd.readouterr().err) and " has 0; use --ttt_head 0 or leave it out" in said
    for folder, flags in (
        ("a", with_head),
        ("b", without),
        ("a", dict(PHANTOM, ttt_second_order=0, ttt_meta=1)),
        ("b", dict(PHANTOM, ttt_second_order=1)),
    ):
        assert run(tmp_path / folder, **flags, **short) == 0
    assert run(tmp_path / "a", **dict(PHANTOM, ttt_meta=0), **short) == 2
    assert "--ttt_meta 0, but" in (said := capfd.readouterr().err) and "leave --ttt_meta out, or add --ttt_second_order 1" in said


def test_flags_of_phantom_say_when_they_have_no_effect():
    (line,) = TrainConfig(core_ratio=0.5).flags_without_effect()
    assert line.startswith("--core_ratio 0.5 has no effect: --my_testing x070 has no Ghost layers")
    assert TrainConfig(my_testing="phantom", core_ratio=0.5).flags_without_effect() == []
    with pytest.raises(UserError, match="do not sum to 1"):
        TrainConfig(my_testing="phantom", core_ratio=0.5, ghost_ratio=0.4).own_settings()


IDLE = [
    (dict(ttt_enabled=0, ttt_steps=2), "--ttt_steps 2 has no effect: --ttt_enabled is 0"),
    (dict(ttt_enabled=0, ttt_meta=1), "--ttt_meta 1 has no effect: --ttt_enabled is 0"),
    (dict(ttt_enabled=0, ttt_features=128), "--ttt_features 128 has no effect: --ttt_enabled is 0"),
    (dict(ttt_kind="memory", ttt_chunk=16), "--ttt_chunk 16 has no effect: --ttt_kind is memory"),
    (dict(ttt_kind="memory", ttt_meta=1), "--ttt_meta 1 has no effect: --ttt_kind is memory"),
    (dict(ttt_kind="memory", ttt_core_ratio=0.5), "--ttt_core_ratio 0.5 has no effect: --ttt_kind is memory"),
    (dict(ttt_kind="memory", ttt_head=0), "--ttt_head 0 has no effect: --ttt_kind is memory"),
    (dict(ttt_features=128), "--ttt_features 128 has no effect: --ttt_kind is state"),
    (dict(ttt_anchor=0.5), "--ttt_anchor 0.5 has no effect: --ttt_steps is 1, and before the first step it pulls nowhere"),
    (dict(ttt_loss_weight=0.5), "--ttt_loss_weight 0.5 has no effect: --ttt_meta is 0"),
    (
        dict(ttt_head=1, ttt_second_order=0),
        "--ttt_head 1 has no effect: with --ttt_second_order 0 and without --ttt_meta 1 nothing would train it",
    ),
    (dict(core_ratio=1, ghost_activation="relu"), "--ghost_activation relu has no effect: there are no Ghost layers"),
    (dict(core_ratio=0.99), "--core_ratio 0.99 has no effect: the cores would be so large that every matrix stays as it is"),
    (
        dict(core_ratio=0.5, core_ratios=",".join(f"{name}=0.25" for name in MATRICES)),
        "--core_ratio 0.5 has no effect: --core_ratios names every matrix",
    ),
]
BUSY = [
    dict(ttt_enabled=0, ttt_steps=1, core_ratio=1),
    dict(ttt_kind="memory", ttt_features=32, ttt_lr=0.1),
    dict(ttt_steps=2, ttt_anchor=0.5, ttt_chunk=32, ttt_core_ratio=1),
    dict(ttt_meta=1, ttt_loss_weight=0.5, ttt_second_order=0, ttt_head=0),
    dict(core_ratio=0.5, ghost_activation="relu", core_ratios="ffn.key=1"),
    dict(dropout=0.1, max_depth_iter=2),
]


@pytest.mark.parametrize("flags, line", [*IDLE, *((flags, None) for flags in BUSY)], ids=str)
def test_flags_of_phantom_beside_others_that_leave_them_nothing_to_do(flags, line):
    config = TrainConfig(my_testing="phantom", **flags)
    model = model_config("phantom", n_layer=2, n_embd=64, head_size=32, **config.own_settings())
    assert config.own_without_effect(model) == ([line] if line else [])


def test_a_run_says_which_flags_of_phantom_have_no_effect(run, phantom, tmp_path, capfd):
    """Also where only the file that it begins with says so."""
    said = "--ttt_loss_weight 0.5 has no effect: --ttt_meta is 0\n"
    for n, flags in enumerate(
        (
            dict(SHORT, **PHANTOM),
            dict(SHORT, **PHANTOM, train_stage=1),
            dict(SHORT, my_testing="phantom", train_stage=0, load_model=phantom / "rwkv-final.pth"),
        )
    ):
        assert run(tmp_path / f"{n}", **flags, ttt_loss_weight=0.5, max_steps=1) == 0
        assert capfd.readouterr().err.count(said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(ttt_meta=1), dict(ttt_kind="memory", max_depth_iter=2)], ids=["state", "memory"])
def test_two_processes_give_the_curve_of_one_and_resume(run, forked, losses, tmp_path, monkeypatch, settings):
    """Under every strategy."""
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "highest")
    flags, strategies = dict(SHORT, **PHANTOM, **settings), ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    assert run(tmp_path / "one", **flags) == 0
    jobs = [
        (flags | dict(devices=2, micro_bsz=2, strategy=s, proj_dir=tmp_path / s, max_steps=stop), {})
        for s in strategies
        for stop in (4, None)
    ]
    for result in forked(*jobs):
        assert result["codes"] == [0, 0] and "Traceback" not in result["said"], result
    for strategy in strategies:
        assert losses(tmp_path / strategy) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), strategy
        one, two = (load_weights(tmp_path / name / "rwkv-final.pth") for name in ("one", strategy))
        assert one.keys() == two.keys() and read_config(one) == read_config(two), strategy


@pytest.mark.slow
def test_demo_script_trains_a_phantom(data, tmp_path):
    """On a tiny corpus in the place of the demo's, which scripts/test_demo_run.py makes."""
    from shutil import copy, copytree

    for name in (
        "RWKV-v7",
        "cuda",
        "train.py",
        "make_data.py",
        "requirements.txt",
        "constraints.txt",
        "pyproject.toml",
        *(p.name for p in ROOT.glob("demo-*.sh")),
    ):
        (copytree if (ROOT / name).is_dir() else copy)(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    for end in ("bin", "idx", "val.bin", "val.idx"):
        copy(f"{data}.{end}", tmp_path / "data" / f"demo.{end}")
    knobs = dict(
        MODEL_TYPE="phantom", N_LAYER="2", N_EMBD="64", CTX_LEN="128", M_BSZ="4", EPOCH_SAMPLES="64", EXIT_TOKENS="16384",
        RANDOM_SEED="1", PRECISION="fp32", DATA="demo", ACCELERATOR="cpu", PYTHON=sys.executable,
    )  # fmt: skip
    done = subprocess.run(
        ["sh", "demo-training-run.sh"], cwd=tmp_path, env={**os.environ, **knobs}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "phantom L2 D64" in done.stdout and "ffn.key" in done.stdout and "\ndef " in done.stdout
    assert (tmp_path / "out/L2-D64-phantom/rwkv-final.pth").exists()
