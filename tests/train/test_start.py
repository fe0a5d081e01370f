"""Where a run begins, what it is asked by signals, and what --precision auto means."""

import contextlib
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rwkvlm.checkpoint import ranks
from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import ModelConfig, TrainConfig, UserError, env
from rwkvlm.config.locks import try_lock
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.models import build, init_weights
from rwkvlm.train import matmul, signals
from rwkvlm.train import plan as planning
from rwkvlm.train.hold import HELD
from rwkvlm.train.position import Position
from rwkvlm.train.signals import Agreement, Signals
from rwkvlm.train.start import build_model, find_start, initial_weights
from rwkvlm.train.strategy import Launch


def config(folder, **flags) -> TrainConfig:
    return TrainConfig(
        **(
            dict(proj_dir=str(folder), n_layer=2, n_embd=32, head_size=16, vocab_size=64, epoch_samples=40, train_stage=3, random_seed=1)
            | flags
        )
    )


def put(folder, name, **sizes):
    model = build(ModelConfig(**(dict(n_layer=2, n_embd=32, head_size=16, vocab_size=64) | sizes)))
    init_weights(model, 0)
    save_weights(folder / name, model.state_dict())
    return folder / name


@pytest.mark.parametrize(
    "names, name, samples, warmup",
    [
        (["rwkv-init.pth"], "rwkv-init.pth", 0, 0),
        (["rwkv-init.pth", "rwkv-0.pth"], "rwkv-0.pth", 40, 10),
        (["rwkv-init.pth", "rwkv-9.pth", "rwkv-10.pth", "rwkv-final.pth"], "rwkv-10.pth", 440, 10),
    ],
)
def test_the_official_scan(tmp_path, names, name, samples, warmup):
    for each in names:
        put(tmp_path, each)
    start = find_start(config(tmp_path), 101, [])
    assert start.path == tmp_path / name and start.position == Position(samples=samples) and not start.fresh
    assert start.warmup_steps == warmup and find_start(config(tmp_path, warmup_steps=3), 101, []).warmup_steps == 3


def test_nothing_there_is_a_fresh_start(tmp_path):
    start = find_start(config(tmp_path), 101, [])
    assert start.fresh and start.path == tmp_path / "rwkv-init.pth" and start.warmup_steps == 0 and start.model.n_embd == 32


def test_weights_of_another_name_are_not_passed_over_without_a_word(run, tmp_path, capsys):
    """Nor by stage 1, which the scripts begin with. What a run finds by its name is no such file."""
    base = put(tmp_path, "RWKV-x070-World.pth")
    for stage in (0, 3, 1):
        if stage == 1:
            assert run(tmp_path, train_stage=1) == 0
        else:
            assert find_start(config(tmp_path, train_stage=stage), 101, []).fresh
        assert f"{base} is not used" in (said := "".join(capsys.readouterr())) and f"--load_model {base}" in said
    base.unlink()
    (tmp_path / "folder.pth").mkdir()
    assert find_start(config(tmp_path, train_stage=0), 101, []).fresh and (tmp_path / "rwkv-init.pth").exists()
    assert "is not used" not in "".join(capsys.readouterr())
    base = put(tmp_path / "folder.pth", "RWKV-x070-World.pth")
    assert find_start(config(tmp_path / "folder.pth", load_model=str(base)), 101, []).path == base
    assert "is not used" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("flags", [{}, {"load_model": "rwkv-final.pth"}])
def test_a_final_file_alone_is_not_overwritten(tmp_path, flags):
    """Someone has kept it and deleted the rest. With anything else to go on from it is an earlier end of this run."""
    final = put(tmp_path, "rwkv-final.pth")
    with pytest.raises(
        UserError,
        match=f"nothing to go on from in {tmp_path} but rwkv-final.pth, which a new run would overwrite; "
        f".* --load_model {final} to train it further",
    ):
        find_start(config(tmp_path, **flags), 101, [])
    put(tmp_path, "rwkv-0.pth")
    assert find_start(config(tmp_path, **flags), 101, []).path == tmp_path / "rwkv-0.pth"


def test_an_initial_file_from_elsewhere_is_not_overwritten(run, tmp_path, capfd):
    """Someone has put weights there under the name from which stage 3 begins. Its own, untrained, a folder may have anew."""
    there = put(tmp_path / "out", "rwkv-init.pth").read_bytes()
    for stage in (0, 1):
        assert run(tmp_path / "out", train_stage=stage) == 2
        assert "it holds rwkv-init.pth, which no run in this folder has made); continue it with --train_stage 3" in capfd.readouterr().err
    assert (tmp_path / "out" / "rwkv-init.pth").read_bytes() == there
    for seed in (1, 2):
        assert run(tmp_path / "own", train_stage=1, random_seed=seed) == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_load_model_and_epoch_begin(tmp_path, stage):
    path = put(tmp_path, "other.pth")
    out = tmp_path / "out"
    start = find_start(config(out, train_stage=stage, load_model=str(path), epoch_begin=2), 101, [])
    assert start.path == path and start.position.samples == 80 and start.warmup_steps == 10
    assert find_start(config(out, train_stage=stage, load_model=str(path)), 101, []).warmup_steps == 0


def test_weights_from_elsewhere_that_would_begin_behind_the_end_are_refused(run, tmp_path, capfd):
    assert run(tmp_path / "other", train_stage=1) == 0
    assert run(tmp_path / "out", train_stage=0, load_model=tmp_path / "other" / "rwkv-init.pth", epoch_begin=7, my_exit_tokens=1000) == 2
    assert "--epoch_begin 7 begins after 8960 tokens, and the training ends at 1000: nothing would be trained" in capfd.readouterr().err


def test_stage_0_from_a_later_mini_epoch_keeps_the_earlier_files(tmp_path):
    path = put(tmp_path, "rwkv-4.pth")
    assert find_start(config(tmp_path, train_stage=0, load_model=str(path), epoch_begin=5), 101, []).path == path
    with pytest.raises(UserError, match="would overwrite"):
        find_start(config(tmp_path, train_stage=0, load_model=str(path), epoch_begin=4), 101, [])


def test_load_partial_grows_a_model(tmp_path):
    path = put(tmp_path, "small.pth")
    flags = config(tmp_path / "out", train_stage=0, load_model=str(path), load_partial=1, n_layer=3)
    start = find_start(flags, 101, [])
    assert start.model.n_layer == 3
    grown, small = build_model(flags, start.model, path).state_dict(), torch.load(path)
    assert all(torch.equal(grown[name], small[name].float()) for name in small)
    assert float(grown["blocks.2.att.key.weight"].std()) > 0
    with pytest.raises(UserError, match="--n_layer 3, but"):
        find_start(config(tmp_path / "out", train_stage=0, load_model=str(path), n_layer=3), 101, [])


def test_a_file_without_block_0s_unused_tensors(tmp_path):
    path = put(tmp_path, "x.pth")
    tensors = {name: t for name, t in torch.load(path).items() if name not in {f"blocks.0.att.v{i}" for i in range(3)}}
    save_weights(path, tensors)
    model = build_model(config(tmp_path), ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=64), path)
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())


def test_initial_weights_follow_the_seed(tmp_path, capsys):
    sizes = ModelConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=64)
    one, two, three = (initial_weights(config(tmp_path, random_seed=seed), sizes)["emb.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    new = initial_weights(config(tmp_path, random_seed=-1), sizes)["emb.weight"]
    seed = int(capsys.readouterr().err.split("--random_seed ")[1])
    assert torch.equal(new, initial_weights(config(tmp_path, random_seed=seed), sizes)["emb.weight"])


def test_the_official_prepare_script_needs_neither_gpu_nor_deepspeed(run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    flags = dict(train_stage=1, precision="bf16", strategy="deepspeed_stage_2", grad_cp=1, epoch_count=1, adam_eps=1e-8)
    assert run(tmp_path / "out", **flags) == 0 and run(tmp_path / "out", **flags) == 0  # again: an untrained file may be replaced
    assert (tmp_path / "out" / "rwkv-init.pth").exists()


def test_a_dry_run_of_stage_1_checks_all_and_leaves_nothing(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc" * 1000)
    flags = dict(train_stage=1, dry_run=True, data_file=tmp_path / "text.txt", data_type="utf-8", vocab_size=None)
    assert run(tmp_path / "not" / "yet", **flags) == 0
    assert f"would write {tmp_path}/not/yet/rwkv-init.pth: x070 L2 D64, 0." in capsys.readouterr().out
    assert (
        run(tmp_path / "not" / "yet", **flags | dict(vocab_size=3)) == 2
        and run(tmp_path / "not" / "yet", **flags | dict(load_model=tmp_path / "text.txt")) == 2
    )
    assert [*tmp_path.rglob("*")] == [tmp_path / "text.txt"]


def test_stage_1_takes_the_sizes_of_the_weights_that_it_copies(run, tmp_path):
    path = put(tmp_path, "other.pth", vocab_size=256)
    sizes = dict.fromkeys(("n_layer", "n_embd", "head_size", "vocab_size"))
    assert run(tmp_path / "out", train_stage=1, load_model=path, **sizes) == 0
    made, given = torch.load(tmp_path / "out" / "rwkv-init.pth"), torch.load(path)
    assert made.keys() == given.keys() and all(torch.equal(made[name], given[name]) for name in given)


@pytest.mark.parametrize("max_steps, steps", [(0, 30), (7, 7), (100, 30)])
def test_no_more_steps_than_are_left(run, tmp_path, max_steps, steps):
    assert planning.make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", max_steps=max_steps), "train.py")).steps == steps


def test_steps_are_counted_on_with_batches_of_another_size(run, tmp_path):
    assert run(tmp_path / "out", max_steps=3) == 0
    position = planning.make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", micro_bsz=2), "train.py")).start.position
    assert (position.step, position.samples) == (3, 12)


@contextlib.contextmanager
def held(out):
    """While another run has the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / HELD, "a") as file:
        assert try_lock(file)
        yield


def test_processes_that_begin_apart_because_of_another_run_are_told_so(run, tmp_path, monkeypatch):
    """Two runs within a second: what one has put into the folder is seen by some processes of the other."""
    out = tmp_path / "new" / "out"
    plan = planning.make_plan(parse_flags(TrainConfig, run.argv(out), "train.py"))
    plan = replace(plan, start=replace(plan.start, state=SimpleNamespace(path=out / "state" / "step5")))
    monkeypatch.setattr(planning, "check", lambda state: pytest.fail("the others, who have no state, would not take part"))
    monkeypatch.setattr(ranks, "gather", lambda value, group=None: [value, value if isinstance(value, tuple) else "out/rwkv-init.pth"])
    monkeypatch.setattr(planning.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="begin at different places .*--proj_dir must be shared"):
        planning.checked(plan)
    assert not out.exists()
    with held(out), pytest.raises(UserError, match=f"another run is writing to {out}"):
        planning.checked(plan)
    monkeypatch.setattr(ranks, "rank", lambda: 1)  # the first process alone asks: they would hold it against each other
    with held(out), pytest.raises(UserError, match="begin at different places"):
        planning.checked(plan)


def test_precision_auto_is_measured_once_handed_on_and_kept(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_PRECISION", "")
    monkeypatch.setattr(planning, "bf16_is_faster", lambda: True)
    assert run(tmp_path / "out", precision="auto", max_steps=1) == 0
    assert env.decided_precision() == "bf16"
    monkeypatch.setenv("RWKV_PRECISION", "")
    monkeypatch.setattr(planning, "bf16_is_faster", lambda: pytest.fail("the state says it"))
    assert run(tmp_path / "out", precision="auto", max_steps=1) == 0
    for asked, handed_on, meant in (("auto", "fp32", "fp32"), ("bf16", "fp32", "bf16"), ("fp32", "", "fp32")):
        monkeypatch.setenv("RWKV_PRECISION", handed_on)
        assert planning.decide_precision(TrainConfig(precision=asked), Launch("cpu", 2, 1, "ddp"), SimpleNamespace(state=None)) == meant


def test_processes_that_see_other_files_do_not_begin(tmp_path, monkeypatch):
    """A --proj_dir that is another folder on each node: told after a minute, in which NFS would have shown what is new."""
    plan = SimpleNamespace(
        start=find_start(config(tmp_path), 617, []),
        proj_dir=tmp_path,
        config=None,
        data=SimpleNamespace(order=617),
        identity=[],
        held_out=None,
    )
    waited = []
    monkeypatch.setattr(planning.time, "sleep", waited.append)
    monkeypatch.setattr(planning, "make_plan", lambda config, damaged: plan)
    monkeypatch.setattr(planning.ranks, "gather", lambda value, group=None: [value, value])
    assert planning.checked(plan) is plan and not waited
    monkeypatch.setattr(planning.ranks, "gather", lambda value, group=None: [value, "out/rwkv-3.pth" if isinstance(value, str) else value])
    with pytest.raises(
        UserError,
        match=f"different places .fresh weights, to be saved as {tmp_path}/rwkv-init.pth; out/rwkv-3.pth.; "
        "--proj_dir must be shared by all nodes",
    ):
        planning.checked(plan)
    assert 60 < sum(waited) < 120


def test_nodes_with_other_data_do_not_begin(run, tmp_path, monkeypatch):
    """Data on the disk of each node, one of which has an older copy: each trained on its own, in its own order."""
    seen = []
    with BinIdxWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(np.roll(BinIdx(run.data).tokens, 1))  # as many
    for data in (run.data, tmp_path / "data"):
        monkeypatch.setattr(ranks, "gather", lambda value, group=None: seen.append(value) or [value, value])
        planning.checked(planning.make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", data_file=data), "train.py")))
    monkeypatch.setattr(ranks, "gather", lambda value, group=None: [seen[0], value])
    for flags in (dict(data_file=tmp_path / "data"), dict(data_file=run.data, val_file=tmp_path / "data")):
        with pytest.raises(
            UserError,
            match=f"--data_file {flags['data_file']} holds other data, or has others held out, for rank 1 than for rank 0; "
            "copy the same files to all nodes",
        ):
            planning.checked(planning.make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", **flags), "train.py")))


@pytest.mark.parametrize(
    "other",
    [
        dict(data=SimpleNamespace(order=619)),
        dict(identity=[(10, 2), (11, 3)]),
        dict(identity=[(10, 2), (10, 4)]),
        dict(identity=[(9, 2), (10, 3)]),
        dict(held_out=range(3)),
    ],
    ids=str,
)
def test_each_way_in_which_data_may_differ_is_seen(tmp_path, monkeypatch, other):
    """Of two files: the order of the samples; tokens, or documents, of one of them; what is held out."""
    told = []

    def plan(data=SimpleNamespace(order=617), identity=((10, 2), (10, 3)), held_out=range(4)):
        files = [dict(tokens=tokens, documents=documents) for tokens, documents in identity]
        return SimpleNamespace(
            start=find_start(config(tmp_path), 617, []),
            proj_dir=tmp_path,
            config=SimpleNamespace(data_file="data"),
            data=data,
            identity=files,
            held_out=held_out,
        )

    monkeypatch.setattr(
        planning.ranks, "gather", lambda value, group=None: told.append(value) or [told[0] if isinstance(value, tuple) else value, value]
    )
    assert planning.checked(plan()).held_out == range(4)
    with pytest.raises(UserError, match="holds other data, or has others held out, for rank 1"):
        planning.checked(plan(**other))


def test_a_process_that_looked_before_another_had_written_looks_again(run, tmp_path, monkeypatch):
    """A node that comes first, while rank 0 still writes rwkv-init.pth."""
    out = tmp_path / "out"
    plan = planning.make_plan(parse_flags(TrainConfig, run.argv(out), "train.py"))
    assert plan.start.fresh
    monkeypatch.setattr(
        ranks, "gather", lambda value, group=None: [value, str(out / "rwkv-init.pth")] if isinstance(value, str) else [value, value]
    )
    monkeypatch.setattr(planning.time, "sleep", lambda seconds: run(out, train_stage=1))
    agreed = planning.checked(plan)
    assert not agreed.start.fresh and agreed.start.path == out / "rwkv-init.pth"


@pytest.mark.parametrize("able, meant", [(True, "bf16"), (False, "tf32")])
def test_precision_auto_on_a_gpu_is_bf16_where_it_has_that(monkeypatch, able, meant):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    assert planning.decide_precision(TrainConfig(precision="auto"), Launch("gpu", 1, 1, "auto"), SimpleNamespace(state=None)) == meant


def test_a_second_request_counts_only_after_a_while(monkeypatch):
    now, killed = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "kill", lambda pid, signum: killed.append(signum))
    before = signal.getsignal(signal.SIGTERM)
    asked = Signals()
    asked.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # `timeout` sends it twice
    assert asked.stop == signal.SIGTERM and not killed
    now[0] += 4
    signal.raise_signal(signal.SIGINT)
    assert killed == [signal.SIGINT] and asked.stop == signal.SIGTERM
    signal.raise_signal(signal.SIGUSR1)
    assert asked.take_save() and not asked.take_save()
    asked.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_alone_the_agreement_is_immediate():
    assert Agreement(10).exchange(15, 0) == [15, 0]


def _agree(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    agreement = Agreement(60)
    wishes = [(0, 0), (15 * rank, 1 - rank), (0, 0)]
    assert [tuple(agreement.exchange(*w)) for w in wishes] == [(0, 0), (0, 0), (15, 1)]
    agreement.finish()
    ranks.leave()


def test_two_processes_agree_one_step_later(tmp_path):
    """Not forked: this process may have threads, and from a run under DeepSpeed a process group."""
    mp.spawn(_agree, (str(tmp_path / "meeting"),), nprocs=2)


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_fp32_products_are_measured_once_handed_on_and_kept(run, tmp_path, monkeypatch, capsys, setting):
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "")
    line = f"fp32 matrix products: {setting} (as measured)"
    monkeypatch.setattr(matmul, "fp32_matmul_choice", lambda: (setting, line))
    assert run(tmp_path / "out", max_steps=1) == 0
    assert torch.get_float32_matmul_precision() == setting == env.decided_fp32_products() and line in capsys.readouterr().out
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(matmul, "fp32_matmul_choice", lambda: pytest.fail("it is decided"))
    assert run(tmp_path / "other", max_steps=1) == 0, "a process that another one has started"
    assert torch.get_float32_matmul_precision() == setting
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "")
    assert run(tmp_path / "out", max_steps=1) == 0
    assert torch.get_float32_matmul_precision() == setting and f"{setting}, as the run began" in capsys.readouterr().out


def test_fp32_products_are_left_alone_in_bf16_and_where_nothing_can_be_handed_on(monkeypatch, capsys):
    monkeypatch.setattr(matmul, "fp32_matmul_choice", lambda: pytest.fail("nothing is to be measured"))
    monkeypatch.setenv("RWKV_FP32_PRODUCTS", "")
    before = torch.get_float32_matmul_precision()

    def plan(precision, devices, nodes=1):
        return SimpleNamespace(
            config=SimpleNamespace(precision=precision), launch=Launch("cpu", devices, nodes, "ddp"), start=SimpleNamespace(state=None)
        )

    matmul.settle_fp32_products(plan("bf16", 1))
    assert capsys.readouterr().out == ""
    torch.set_float32_matmul_precision("medium")
    matmul.settle_fp32_products(plan("fp32", 1, nodes=2))  # the first process of each node would measure for its own
    assert torch.get_float32_matmul_precision() == "highest" and "must agree" in capsys.readouterr().out
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    torch.set_float32_matmul_precision("medium")
    matmul.settle_fp32_products(plan("fp32", 2))
    assert torch.get_float32_matmul_precision() == "highest" and "must agree" in capsys.readouterr().out
    torch.set_float32_matmul_precision(before)
