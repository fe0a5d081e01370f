"""train.py --dry_run: its numbers against hand-made ones, against the measured peak of real processes, and against the clock."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import MODEL_TYPES, ModelConfig, TrainConfig, cgroups, env, model_config
from rwkvlm.models import LanguageModel, build, count_parameters, init_weights
from rwkvlm.ops.cross_entropy import native
from rwkvlm.train import planner
from rwkvlm.train import run as training
from rwkvlm.train.memory import Activations, estimate, measure_activations, resident
from rwkvlm.train.plan import make_plan
from rwkvlm.train.planner import ROOM, decide_by_memory, expected_seconds, memory_available, probe, probe_flags
from rwkvlm.train.schedule import Schedule
from rwkvlm.train.start import model_sizes
from rwkvlm.train.strategy import Launch, param_dtype

ROOT = Path(__file__).resolve().parents[2]
SIZES = ModelConfig(n_layer=4, n_embd=256, vocab_size=8192)
LARGER = dict(ctx_len=256, head_size=64, n_embd=256, n_layer=4, kernel="auto", my_exit_tokens=10**6, epoch_samples=10**6)


def parameters(sizes: ModelConfig) -> int:
    with torch.device("meta"):
        return count_parameters(build(sizes))


UNUSED = 256 * (1 + 2 * 32)  # v0, v1, v2 of block 0, which are not trained


@pytest.mark.parametrize(
    "flags, run, parts",
    [
        (dict(precision="fp32"), Launch("gpu", 1, 1, "auto"), (4, 4, 8)),
        (dict(precision="bf16"), Launch("gpu", 1, 1, "auto"), (2, 2, 12)),
        (dict(precision="bf16", accumulate_grad_batches=2), Launch("gpu", 1, 1, "auto"), (2, 4, 12)),
        (dict(precision="bf16"), Launch("gpu", 8, 1, "ddp"), (2, 4, 12)),
        (dict(precision="bf16", accumulate_grad_batches=2), Launch("gpu", 8, 1, "ddp"), (2, 6, 12)),
        (dict(precision="bf16"), Launch("gpu", 4, 2, "deepspeed_stage_1"), (2, 6, 1.5)),
        (dict(precision="bf16", ds_bucket_mb=1), Launch("gpu", 4, 2, "deepspeed_stage_2"), (2, 0.5, 1.5)),
        (dict(precision="bf16", ds_bucket_mb=1), Launch("gpu", 4, 2, "deepspeed_stage_3"), (2.25, 0.5, 1.5)),
        (dict(precision="bf16", ds_bucket_mb=1), Launch("gpu", 4, 2, "deepspeed_stage_3_offload"), (2.25, 0.5, 0)),
    ],
    ids=lambda value: value.strategy if isinstance(value, Launch) else None,
)
def test_bytes_for_each_parameter(flags, run, parts):
    P = parameters(SIZES)
    T, memory = P - UNUSED, estimate(SIZES, TrainConfig(**flags), run, Activations(0, 0), program=1 << 30)
    bucket = 2_000_000 if "ds_bucket_mb" in flags else 0
    got = (memory.parameters / P, (memory.gradients - bucket) / T, memory.optimizer / T)
    assert got == pytest.approx(parts, abs=1e-3) and memory.program == memory.saving == 0


def test_what_is_not_trained_has_weights_alone():
    run, config = Launch("cpu", 1, 1, "auto"), TrainConfig(precision="fp32", spike_guard=8.0)
    for sizes, freeze, untrained in (
        (SIZES, "emb,head", 2 * 8192 * 256),
        # q, k, v with biases; norm and blends
        (model_config("x080", n_layer=4, n_embd=256, vocab_size=8192, rosa_grad="none"), "", 4 * (3 * 256 * 256 + 8 * 256)),
    ):
        memory, P = estimate(sizes, replace(config, freeze=freeze), run, Activations(0, 0), 0), parameters(sizes)
        T = P - UNUSED - untrained
        assert (memory.parameters, memory.gradients, memory.optimizer, memory.saving, memory.snapshots) == (
            4 * P,
            4 * T,
            8 * T,
            12 * T + 2 * P,
            24 * T,
        )


def test_what_cuda_graphs_hold():
    """The blocks' gradients where the graphs write them, beside those that autograd has; two gradients [tokens, C] a block."""
    with torch.device("meta"):
        P = sum(p.numel() for p in build(SIZES).blocks.parameters())
    config, run = TrainConfig(precision="bf16", micro_bsz=3, ctx_len=100), Launch("gpu", 1, 1, "auto")
    without, graphs = (estimate(SIZES, replace(config, cuda_graphs=g), run, Activations(60_000, 5_000), 0) for g in (0, 1))
    assert graphs.graphs == graphs.total - without.total == 2 * P + 2 * 4 * 2 * 300 * 256 and "graphs" not in str(without)


def test_copies_of_gradients_come_when_the_activations_are_gone():
    P, config, run = parameters(SIZES), TrainConfig(precision="bf16"), Launch("gpu", 1, 1, "auto")
    none, many = (replace(config, micro_bsz=1, ctx_len=n) for n in (16, 1 << 16))
    more = [
        estimate(SIZES, c, run, Activations(60_000, 5_000), 0, copies=True).total
        - estimate(SIZES, c, run, Activations(60_000, 5_000), 0).total
        for c in (none, many)
    ]
    assert 0 < more[0] < 4 * P and more[1] == 0


def test_activations_are_those_that_autograd_keeps():
    """Of the model itself, with other depth, tokens and rows than the probe's."""
    config = TrainConfig(precision="fp32")
    found = measure_activations(SIZES, config, torch.device("cpu"))
    model, kept = build(SIZES), {}
    for tensor in model.state_dict().values():
        tensor.zero_()
    own = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        model.features(torch.zeros(3, 192, dtype=torch.int64))
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert 3 * 192 * (found.outside + 4 * found.block) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    "flags, run, parts",
    [
        (dict(), Launch("cpu", 2, 1, "ddp"), 0),
        (dict(spike_guard=8.0), Launch("cpu", 1, 1, "auto"), 24),
        (dict(spike_guard=8.0), Launch("cpu", 2, 1, "ddp"), 24),
        (dict(spike_guard=8.0), Launch("cpu", 2, 1, "deepspeed_stage_1"), 12),
        (dict(spike_guard=8.0), Launch("gpu", 1, 1, "auto"), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_snapshots_of_the_spike_guard_are_counted_where_they_lie_in_the_memory_that_is_told(flags, run, parts, precision):
    memory = estimate(SIZES, TrainConfig(precision=precision, **flags), run, Activations(0, 0), 0)
    P = parameters(SIZES)
    T = P - UNUSED
    assert memory.snapshots == parts * T and ("snapshots" in str(memory)) == bool(parts)
    saving = 12 * T // run.world_size + 2 * P if run.accelerator == "cpu" else 0  # each process's share of the state, and whole weights
    assert memory.saving == saving


def test_less_with_grad_cp_and_with_smaller_batches():
    def total(machine="cpu", **flags) -> int:
        return estimate(SIZES, TrainConfig(**flags), Launch(machine, 1, 1, "auto"), Activations(60_000, 5_000), 0).total

    assert total(grad_cp=1) < total() and total(micro_bsz=6) < total(micro_bsz=12)
    assert total(micro_bsz=12) - total(micro_bsz=6) == pytest.approx(6 * 1024 * (4.5 * 60_000 + 5_000 + 2 * 256), rel=0.01)
    inputs, one_block = 4 * 2 * 256, 60_000  # of every block; and what one keeps while it is recomputed
    for machine, holes in (("cpu", 4 * 60_000 / 4), ("gpu", 0)):  # in the heap
        assert total(machine, grad_cp=1, micro_bsz=24) - total(machine, grad_cp=1, micro_bsz=18) == pytest.approx(
            6 * 1024 * (inputs + one_block + holes + 5_000 + 2 * 256), rel=0.01
        )


def test_on_a_cpu_the_optimizer_has_nowhere_else_to_go():
    config, (offload, plain) = TrainConfig(precision="bf16"), (Launch("cpu", 2, 1, f"deepspeed_stage_2{end}") for end in ("_offload", ""))
    assert (
        estimate(SIZES, config, offload, Activations(0, 0), 0).optimizer
        == estimate(SIZES, config, plain, Activations(0, 0), 0).optimizer
        == 6 * (parameters(SIZES) - UNUSED)
    )


def test_what_a_process_has_in_memory_is_what_the_system_says():
    said = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert resident() == pytest.approx(1024 * int(said.split()[1]), rel=0.1)


def test_seconds_by_hand():
    """100 steps of 1000 tokens at 500 tokens/s, and 3 validations of 4 batches at a third of a half step."""
    plan = SimpleNamespace(
        schedule=Schedule(1e-3, 1e-4, 0, 100_000, 1000),
        steps=100,
        held_out=object(),
        launch=SimpleNamespace(world_size=2),
        config=TrainConfig(val_every=50, val_batches=8, accumulate_grad_batches=2),
    )
    assert expected_seconds(plan, 500.0) == pytest.approx(200 + 3 * 4 * 2.0 / 2 / 3)


def test_a_dry_run_tells_all_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    """As train.py, which needs no PYTHONPATH."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "there").mkdir()
    assert main_with_bare_flag(run, tmp_path / "there" / "not" / "yet") == 0
    out = capsys.readouterr().out
    told = {line.split()[0]: line for line in out.splitlines()}
    assert {"model", "data", "schedule", "epoch", "memory", "advice", "time"} <= set(told) and [*told][-2:] == ["probe", "time"]
    assert "1,280 tokens in a mini-epoch, 10 steps" in told["epoch"] and "fits" in told["memory"] and "iB (program" in told["memory"]
    assert "for 30 steps" in told["time"] and " kt/s in a probe" in told["time"]
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_the_largest_batch_that_was_tried_is_not_called_the_largest():
    plan = SimpleNamespace(config=TrainConfig(micro_bsz=4))
    memory = {(n, cp): SimpleNamespace(total=n * (2 - cp), head=0) for n in (1, 4, 1024) for cp in (0, 1)}
    assert planner._advice(plan, memory, 3000) == "the largest micro_bsz is at least 1024 without grad_cp, at least 1024 with it"
    assert planner._advice(plan, memory, 2000) == "the largest micro_bsz is about 4 without grad_cp, at least 1024 with it"
    assert planner._advice(plan, memory, 100) == "the largest micro_bsz is about 4 without grad_cp, about 4 with it"


def test_a_dry_run_says_where_it_could_not_write(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main_with_bare_flag(run, tmp_path / "file" / "out") == 2
    assert f"--proj_dir {tmp_path / 'file' / 'out'} cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        dict(core_ratio=0.5, ttt_chunk=16, ttt_head=False),
        dict(ttt_enabled=False),
        dict(ranks="att.key=8", core_ratio=1.0, ttt_enabled=False, max_depth_iter=2),
    ],
    ids=str,
)
def test_the_probe_is_of_the_model_that_the_file_says(run, tmp_path, settings):
    model = build(model_config("phantom", n_layer=2, n_embd=64, head_size=32, vocab_size=256, **settings))
    init_weights(model, 0)
    save_weights(tmp_path / "m.pth", model.state_dict())
    plan = make_plan(
        parse_flags(TrainConfig, run.argv(tmp_path / "out", my_testing="phantom", train_stage=0, load_model=tmp_path / "m.pth"), "train.py")
    )
    told = plan.settings()
    assert {name: told[name] for name in model.config.as_dict()} == model.config.as_dict()
    config = parse_flags(TrainConfig, probe_flags(plan, str(tmp_path / "probe")), "train.py")
    assert model_sizes(config, Path(config.load_model)) == plan.start.model == model.config
    assert (config.proj_dir, config.train_stage, config.dry_run) == (str(tmp_path / "probe"), 0, False)


def main_with_bare_flag(run, out) -> int:
    from rwkvlm.cli import main

    return main(["train", *run.argv(out), "--dry_run"])


def test_what_does_not_fit_is_said_with_the_cure_and_not_tried(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "memory_available", lambda plan: int(1.2 * 2**30))
    monkeypatch.setattr(planner, "resident", lambda: 300 << 20)
    assert run(tmp_path / "out", dry_run=True, **LARGER | dict(micro_bsz=64)) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "not tried" in out
    assert "advice    --micro_bsz 16 --grad_cp 0 fits; with --accumulate_grad_batches 4 the batch is about the same" in out
    assert run(tmp_path / "out", dry_run=True, **LARGER | dict(micro_bsz=4, vocab_size=10**6)) == 1
    assert "no micro_bsz fits" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n_embd, dim_ffn", [(64, 64), (128, 512)])
@pytest.mark.parametrize(
    "model_type, more",
    [
        *((model_type, {}) for model_type in MODEL_TYPES),
        *((model_type, {"rosa_grad": "none"}) for model_type in ("x080", "rosa")),
        ("hybrid", {"attention_layers": "1", "attention_kv_heads": 1}),
        ("phantom", {"ttt_enabled": False, "core_ratio": 1.0}),
    ],
)
def test_what_refuses_a_run_is_below_what_it_takes(model_type, more, n_embd, dim_ffn, precision):
    sizes = model_config(model_type, n_layer=2, n_embd=n_embd, dim_ffn=dim_ffn, **more)
    config = TrainConfig(my_testing=model_type, precision=precision)
    measured = measure_activations(sizes, config, torch.device("cpu")).block
    assert planner.least_activations(sizes, param_dtype(config).itemsize).block <= measured


@pytest.mark.parametrize("model_type, more", [("rosa", {"rosa_grad": "none"}), ("phantom", {})])
def test_what_is_dropped_on_the_way_is_not_counted(model_type, more):
    """Neither twice nor in the place of what lies there afterwards: the figure does not depend on where memory happens to be free."""
    sizes = model_config(model_type, n_layer=2, n_embd=64, dim_ffn=64, **more)
    found, lie_between = set(), []
    for size in range(1, 20_000, 2_500):
        found.add(measure_activations(sizes, TrainConfig(my_testing=model_type, precision="bf16"), torch.device("cpu")))
        lie_between += [torch.empty(size), torch.empty(3 * size)]
        del lie_between[0]
    assert len(found) == 1


@pytest.mark.parametrize("room, decided", [(2**40, 0), (2**20, 1)])
def test_recomputing_is_decided_by_the_memory(run, losses, tmp_path, capsys, monkeypatch, room, decided):
    """And changes nothing else: no random number is drawn on the way."""
    recomputed, features = set(), LanguageModel.features
    monkeypatch.setattr(planner, "memory_available", lambda plan: room)
    monkeypatch.setattr(cgroups, "swap_free", lambda: 2**40)  # or the run would be refused
    monkeypatch.setattr(LanguageModel, "features", lambda *seen, **how: recomputed.add(how.get("grad_cp")) or features(*seen, **how))
    flags = dict(max_steps=2, my_testing="phantom", ttt_enabled=0, dropout=0.1)
    for name, grad_cp in (("asked", decided), ("decided", -1)):
        torch.manual_seed(1)
        assert run(tmp_path / name, **flags, grad_cp=grad_cp) == 0
        assert (", grad_cp, " in capsys.readouterr().out) == (True in recomputed) == bool(decided)
    assert losses(tmp_path / "asked") == losses(tmp_path / "decided")


def test_a_dry_run_decides_it_too(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "memory_available", lambda plan: 1 << 20)
    assert run(tmp_path / "out", dry_run=True, grad_cp=-1) == 1
    assert ", with grad_cp: does not fit" in capsys.readouterr().out


def test_processes_recompute_together(run, tmp_path, monkeypatch):
    """Under ZeRO-3 a block's parameters are fetched again for it; and compiled graphs never do."""
    monkeypatch.setattr(planner, "memory_available", lambda plan: 2**40)
    monkeypatch.setattr(planner.ranks, "gather", lambda value: [value, False])
    plan = make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", grad_cp=-1), "train.py"))
    assert decide_by_memory(plan).config.grad_cp == 1
    monkeypatch.setattr(planner.ranks, "gather", lambda value: [value])
    assert decide_by_memory(plan).config.grad_cp == 0
    monkeypatch.setattr(planner, "memory_available", lambda plan: 1)
    assert decide_by_memory(plan).config.grad_cp == 1
    decided = {
        given: decide_by_memory(replace(plan, config=replace(plan.config, compile=given[0], cuda_graphs=given[1]))).config.grad_cp
        for given in ((1, 0), (0, 1), (1, 1))
    }
    assert decided == {(1, 0): 1, (0, 1): 1, (1, 1): 0}


def test_recomputing_begins_where_the_run_as_it_is_would_leave_no_room(run, tmp_path, monkeypatch):
    """By the activations that are kept without it, of the batch that is asked for."""
    monkeypatch.setattr(planner, "resident", lambda: 1 << 20)
    plan = make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", **LARGER, grad_cp=-1, micro_bsz=4), "train.py"))
    of = planner._estimator(plan)
    need = of(4, 0).total
    assert max(of(4, 1).total, of(3, 0).total) < 0.95 * need
    for room, decided in ((1.01, 0), (0.99, 1)):
        monkeypatch.setattr(planner, "memory_available", lambda plan: room * need / ROOM)
        assert decide_by_memory(plan).config.grad_cp == decided


@pytest.mark.parametrize("given", [0, 1, -1], ids=["grad_cp 0", "grad_cp 1", "grad_cp -1"])
def test_graphs_that_are_to_be_tried_take_no_room_that_the_run_needs(run, tmp_path, monkeypatch, given):
    """They are left out before anything is recomputed for them, and before the first step runs out of memory. Asked for they stay."""
    monkeypatch.setattr(planner, "resident", lambda: 1 << 20)
    plan = make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out", **LARGER, micro_bsz=4), "train.py"))

    def decided(graphs: int, room: float) -> tuple[int, int]:
        monkeypatch.setattr(planner, "memory_available", lambda plan: room / ROOM)
        config = decide_by_memory(replace(plan, config=replace(plan.config, grad_cp=given, cuda_graphs=graphs))).config
        return config.grad_cp, config.cuda_graphs

    cp = max(given, 0)
    of = planner._estimator(replace(plan, config=replace(plan.config, cuda_graphs=1)))
    need, graphs = of(4, cp).total, of(4, cp).graphs
    assert graphs > 0
    assert decided(-1, need + 1) == (cp, -1) and decided(-1, need - 1) == (cp, 0) and decided(-1, need - graphs + 1) == (cp, 0)
    assert decided(1, need - 1) == (given if given != -1 else 1, 1)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(cgroups.Path, "read_text", lambda path: "MemTotal:  9000 kB\nMemAvailable:    6000 kB\n")
    found = [memory_available(SimpleNamespace(launch=Launch("cpu", devices, nodes, "ddp"))) for devices, nodes in ((1, 1), (3, 1), (3, 4))]
    assert found == [6000 << 10, 2000 << 10, 2000 << 10]


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    def group(path, limit, used=0, cached=0):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("max", limit),
            ("current", used),
            ("stat", f"anon {used - cached}\nactive_file {cached // 4}\ninactive_file {cached - cached // 4}"),
        ):
            (tmp_path / path / f"memory.{name}").write_text(f"{text}\n")

    plan = SimpleNamespace(launch=Launch("cpu", 2, 1, "ddp"))
    monkeypatch.setattr(cgroups, "ALL", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "cgroup")
    of_machine = memory_available(plan)  # no such file
    cgroups.OWN.write_text("12:cpu:/x\n")  # groups of version 1
    assert memory_available(plan) == pytest.approx(of_machine, rel=0.1)
    cgroups.OWN.write_text("12:cpu:/x\n0::/job/step\n")
    group("job/step", "max", used=1 << 20)
    assert memory_available(plan) == pytest.approx(of_machine, rel=0.1), "no limit in the innermost, none further out"
    group("job", 10 << 20, used=6 << 20, cached=2 << 20)
    assert memory_available(plan) == 3 << 20
    group("job/step", 5 << 20, used=4 << 20)
    assert memory_available(plan) == 1 << 19
    group("", 3 << 19, used=1 << 20)  # a container that sees its own group as the topmost one
    assert memory_available(plan) == 1 << 18
    group("job/step", 1 << 20, used=4 << 20)
    assert memory_available(plan) == 0
    (tmp_path / "job/step/memory.stat").write_text("anon 1\n")
    assert memory_available(plan) == 1 << 18, "what cannot be read is no limit"


def test_processes_share_the_threads_that_a_quota_has_time_for(run, tmp_path, monkeypatch):
    """Those of the run, and those of its probe, which finds the number set."""

    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    plan = replace(make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "out"), "train.py")), launch=Launch("cpu", 2, 1, "ddp"))
    monkeypatch.setattr(env, "_threads", 7)
    monkeypatch.setattr(planner, "guarded", begin)
    monkeypatch.setattr(training.pl, "Trainer", begin)
    for start in (lambda: probe(plan), lambda: training.train(plan, None)):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        with pytest.raises(Begun):
            start()
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert torch.get_num_threads() == 3, "this process too, whose torch has read 7"


def test_a_probe_that_fails_says_why(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "probe_flags", lambda plan, folder: [*probe_flags(plan, folder), "--head_size", "7"])
    assert run(tmp_path / "out", dry_run=True) == 0
    assert "time      the probe failed: --head_size 7 is not supported" in capsys.readouterr().out


BF16 = "fp32" if native.why_not(torch.bfloat16, 256) else "bf16"  # without bf16 products a step would take a minute
CONFIGURATIONS = {
    "large vocabulary": dict(precision="fp32", vocab_size=65536, micro_bsz=4),
    "large batch": dict(precision=BF16, n_layer=6, vocab_size=8192, micro_bsz=16),
    "grad_cp": dict(precision=BF16, n_layer=6, vocab_size=8192, micro_bsz=16, grad_cp=1),
    "wide": dict(precision="fp32", n_embd=512, micro_bsz=8),
    "two processes": dict(precision=BF16, vocab_size=8192, micro_bsz=8, devices=2),
    "spike_guard": dict(precision=BF16, vocab_size=65536, micro_bsz=4, spike_guard=8.0, spike_snapshot=1),
    "ZeRO-2": dict(precision=BF16, vocab_size=16384, micro_bsz=8, devices=2, strategy="deepspeed_stage_2"),
    "ZeRO-3": dict(precision="fp32", vocab_size=16384, micro_bsz=8, devices=2, strategy="deepspeed_stage_3"),
}


PREDICT = """
import sys
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import TrainConfig
from rwkvlm.train.run import make_plan
from rwkvlm.train.planner import _estimator, _load_libraries
plan = make_plan(parse_flags(TrainConfig, sys.argv[1:], ""))
_load_libraries(plan)
print(_estimator(plan)(plan.config.micro_bsz, plan.config.grad_cp).total)
"""
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(used.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""  # a small process between: the largest size of a process counts from its parent's on, and pytest has grown by now


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_memory_is_predicted_within_15_percent(run, tmp_path, name):
    """The largest resident size of the first process of a real run, which saves its state while it goes on."""
    argv = run.argv(tmp_path / "out", **LARGER | CONFIGURATIONS[name] | dict(save_steps=1, max_steps=3, val_batches=1))
    predicted = int(
        subprocess.run([sys.executable, "-c", PREDICT, *argv], check=True, capture_output=True, text=True, timeout=300).stdout.split()[-1]
    )
    command = [sys.executable, "-c", MEASURE, sys.executable, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert predicted == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.slow
@pytest.mark.alone
def test_time_is_predicted_within_25_percent(run, records, tmp_path):
    """Of a run of 60 steps between two probes.

    An attempt counts where the probes agree: elsewhere the machine itself has become faster or slower.
    """
    errors, unsteady = [], []
    while len(errors) < 3 and len(unsteady) < 5:
        out = tmp_path / f"{len(errors)}-{len(unsteady)}"
        argv = run.argv(out, **LARGER | dict(n_layer=2, n_embd=128, micro_bsz=4, my_exit_tokens=60 * 1024, val_every=20))
        plan = make_plan(parse_flags(TrainConfig, argv, "train.py"))
        before = probe(plan)
        subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], check=True, capture_output=True, timeout=600)
        took = records(out)[60]["seconds"] - records(out)[1]["seconds"]
        error = expected_seconds(plan, before) * 59 / 60 / took - 1
        if abs(error) < 0.25:
            return
        after = probe(plan)
        (errors if max(before, after) < 1.15 * min(before, after) else unsteady).append((error, before, after))
    assert not errors, (errors, unsteady)
    pytest.skip(f"this machine's speed changes too much to be predicted: {unsteady}")
