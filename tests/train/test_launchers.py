"""Variables of torchrun, SLURM and others: heeded where they have started this process, passed over or refused elsewhere."""

import contextlib
import os
from types import SimpleNamespace

import pytest

from rwkvlm.config import TrainConfig, UserError, env
from rwkvlm.train import plan as planning
from rwkvlm.train.strategy import Launch

TORCHRUN = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
SLURM = dict(
    SLURM_NTASKS="2",
    SLURM_NTASKS_PER_NODE="2",
    SLURM_JOB_NAME="job",
    SLURM_PROCID="0",
    SLURM_LOCALID="0",
    SLURM_NODEID="0",
    SLURM_JOB_ID="1",
)


STEP = SLURM | dict(SLURM_STEP_ID="0")  # what srun has started; without it: a batch script


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    "variables",
    [
        SLURM,
        without(SLURM, "SLURM_NTASKS_PER_NODE"),
        STEP | dict(SLURM_NTASKS="1"),
        STEP | dict(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"),
        dict(SLURM_PROCID="1"),
        dict(RANK="1"),
        dict(LOCAL_RANK="1"),
    ],
    ids=lambda variables: " ".join(variables),
)
def test_launchers_that_have_started_nothing_are_passed_over(run, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path / "out", max_steps=1) == 0
    assert (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1"])
def test_one_process_meets_itself_on_its_machine(run, tmp_path, monkeypatch, strategy):
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert run(tmp_path / "out", strategy=strategy, max_steps=1) == 0


def test_nodes_that_are_not_told_which_they_are_would_all_be_the_first(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert run(tmp_path / "out", num_nodes=2) == 2
    assert "no place to meet is given; set MASTER_ADDR (node 0), MASTER_PORT and NODE_RANK (0, 1, ...)" in capfd.readouterr().err


def test_the_number_of_a_pod_is_no_process_of_a_launcher(monkeypatch):
    """A PyTorchJob's variables. Lightning adds LOCAL_RANK for the processes that it starts, and none of them must be taken for RANK 0."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="pod").items():
        monkeypatch.setenv(name, value)
    env.forget_launchers_of_others()
    assert "RANK" not in os.environ
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    env.forget_launchers_of_others()
    assert TORCHRUN.items() <= os.environ.items()


@pytest.mark.parametrize(
    "variables, said",
    [
        (without(STEP, "SLURM_NTASKS_PER_NODE"), "srun started 2 tasks without saying how many on each node; give it --ntasks-per-node"),
        (STEP | dict(SLURM_NTASKS="3"), "srun started 3 tasks, not 2 on each node, as its --ntasks-per-node says"),
        (STEP | dict(SLURM_NTASKS="many"), "SLURM_NTASKS=many is set, which is no number; unset it"),
        (STEP | dict(SLURM_NTASKS_PER_NODE="1"), "the launcher started processes on 2 nodes; use --num_nodes 2"),
        (dict(NODE_RANK="1"), "NODE_RANK=1 is set, but of --num_nodes 1 the only one is 0; unset NODE_RANK, or give --num_nodes"),
        (TORCHRUN, "WORLD_SIZE=2 is set, as by a launcher of so many processes; make them equal, or unset RANK, LOCAL_RANK and WORLD_SIZE"),
    ],
)
def test_launchers_of_another_number_of_processes_are_one_line(run, tmp_path, monkeypatch, capfd, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path / "out", max_steps=1) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "variables, processes, nodes, refused",
    [({}, 2, 1, False), (TORCHRUN, 1, 1, False), (TORCHRUN, 2, 1, True), (SLURM, 2, 1, True), ({}, 1, 2, True)],
)
def test_precision_auto_is_not_measured_where_processes_would_not_tell_each_other(monkeypatch, variables, processes, nodes, refused):
    monkeypatch.setenv("RWKV_PRECISION", "")
    monkeypatch.setattr(planning, "bf16_is_faster", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked, run = TrainConfig(precision="auto"), Launch("cpu", processes, nodes, "ddp")
    with pytest.raises(UserError, match="give --precision bf16 or fp32") if refused else contextlib.nullcontext():
        assert planning.decide_precision(asked, run, SimpleNamespace(state=None)) == "bf16"
