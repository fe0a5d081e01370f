"""ZeRO 1, 2, 3 and DDP in two real processes (gloo), against one process; exact resume; states moved between strategies and world sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights
from rwkvlm.config import TrainConfig, UserError
from rwkvlm.train import strategy
from rwkvlm.train.strategy import deepspeed_config, launch, lightning_precision, make_strategy, param_dtype

WORKER = Path(__file__).with_name("strategy_worker.py")
ZERO = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
LAUNCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "RWKV_KERNEL": "torch", "OMP_NUM_THREADS": "1", **changes}


def train(folder: Path, processes: int, jobs: list[dict]) -> list[dict]:
    """Runs the worker in so many processes that torchrun starts; 1 is plain python (where Lightning may start more)."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "results.json").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(WORKER), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def close(a: list[float], b: list[float], relative: float = 1e-5) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= relative * abs(y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """fp32 curves of every strategy in two processes, saved after step 3 and continued; the folders of the states."""
    folder = tmp_path_factory.mktemp("two")
    jobs = []
    for name in ("ddp", *ZERO):
        common = dict(strategy=name, precision="fp32", proj_dir=str(folder / name))
        jobs += [dict(common, steps=6, save_at=[3]), dict(common, steps=3, resume=1)]
    common = dict(strategy="deepspeed_stage_1", precision="bf16", noise=1, proj_dir=str(folder / "bf16"))
    jobs += [dict(common, steps=6, save_at=[3]), dict(common, steps=3, resume=1)]
    results = train(folder, 2, jobs)
    return folder, {(job["strategy"], job["precision"], "resume" in job): result for job, result in zip(jobs, results)}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, two_processes):
    """The curve of one process with the same global batch, and continuations of the states of two processes."""
    states, folder = two_processes[0], tmp_path_factory.mktemp("one")
    moves = [("deepspeed_stage_3", "auto"), ("deepspeed_stage_1", "deepspeed_stage_3"), ("ddp", "deepspeed_stage_2")]
    jobs = [dict(strategy="auto", precision="fp32", steps=6)]
    jobs += [dict(strategy=to, precision="fp32", steps=3, resume=1, proj_dir=str(states / source)) for source, to in moves]
    curve, *moved = train(folder, 1, jobs)
    return curve["losses"], dict(zip(moves, moved))


@pytest.mark.parametrize("name", ["ddp", *ZERO])
def test_two_processes_give_the_curve_of_one(two_processes, one_process, name):
    losses = two_processes[1][name, "fp32", False]["losses"]
    assert losses[0] > losses[1] and close(losses, one_process[0]), (losses, one_process[0])


@pytest.mark.parametrize("name, precision", [*((name, "fp32") for name in ("ddp", *ZERO)), ("deepspeed_stage_1", "bf16")])
def test_resumed_training_has_the_same_bits(two_processes, name, precision):
    whole, rest = (two_processes[1][name, precision, resumed] for resumed in (False, True))
    assert whole["losses"][3:] == rest["losses"] and whole["numbers"] == rest["numbers"]


@pytest.mark.parametrize("name", ["ddp", *ZERO, "bf16"])
def test_published_weights_are_the_masters_rounded(two_processes, name):
    """What full_weights gathers against the pieces that all ranks saved."""
    folder = two_processes[0] / name
    weights = load_weights(folder / "rwkv-0.pth")
    masters = {key: torch.full((tensor.numel(),), torch.nan) for key, tensor in weights.items()}
    for file in sorted(folder.glob("state/step3/rank*.pt")):
        for key, entry in torch.load(file)["tensors"].items():
            values = entry["master"] if "master" in entry else entry["value"]
            masters[key][entry["start"] : entry["start"] + values.numel()] = values.float()
    for key, tensor in weights.items():
        assert torch.equal(tensor, masters[key].bfloat16().view_as(tensor)), key


def test_states_of_two_processes_go_on_in_one_under_another_strategy(one_process):
    losses, moved = one_process
    for move, result in moved.items():
        assert close(result["losses"], losses[3:]), move


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_state_goes_on_everywhere(tmp_path, processes):
    """{1, 2} processes x {DDP or one device, ZeRO 1, 2, 3, offload} x {fp32, bf16}: the same bits in place, the same curve elsewhere.

    An fp32 state goes to all strategies, a bf16 one to one that is not its own.
    """
    names = ("auto", *ZERO, "deepspeed_stage_2_offload", "deepspeed_stage_3_offload")
    sources, moves = [], []
    for name in names:
        for precision in ("fp32", "bf16"):
            common = dict(strategy=name, precision=precision, proj_dir=str(tmp_path / f"{name}-{precision}"))
            sources += [dict(common, steps=6, save_at=[3]), dict(common, steps=3, resume=1)]
            targets = ("auto", "deepspeed_stage_2", "deepspeed_stage_3")
            if precision == "bf16":
                targets = (targets[(names.index(name) + 1) % 3],)
            moves += [dict(common, strategy=to, steps=3, resume=1) for to in targets]
    here, curves = train(tmp_path, processes, sources), {}
    for job, whole, rest in zip(sources[::2], here[::2], here[1::2]):
        assert whole["losses"][3:] == rest["losses"] and whole["numbers"] == rest["numbers"], job
        curves[job["proj_dir"]] = whole["losses"]
    for there in (1, 2):
        for job, result in zip(moves, train(tmp_path, there, moves)):
            assert close(result["losses"], curves[job["proj_dir"]][3:], 1e-5 if job["precision"] == "fp32" else 2e-3), (there, job)


@pytest.mark.slow
def test_micro_batches_give_the_curve_of_the_whole_batch(tmp_path):
    jobs = [
        dict(strategy=name, precision=precision, steps=6, accumulate_grad_batches=k)
        for name in ("ddp", *ZERO)
        for precision in ("fp32", "bf16")
        for k in (1, 2)
    ]
    results = train(tmp_path, 2, jobs)
    for job, whole, parts in zip(jobs[::2], results[::2], results[1::2]):
        means = [(a + b) / 2 for a, b in zip(parts["losses"][::2], parts["losses"][1::2])]
        assert close(means, whole["losses"], 1e-5 if job["precision"] == "fp32" else 1e-3), job


@pytest.mark.slow
def test_lightning_slurm_and_deepspeed_launches_agree(tmp_path, free_port):
    """Two processes started by Lightning itself, by srun's variables and by the deepspeed launcher's."""
    job = dict(strategy="deepspeed_stage_2", precision="fp32", steps=3, devices="2")
    curves = [train(tmp_path, 1, [job])[0]["losses"]]
    # Lightning makes the port of the job's number, 15000 and its last four digits.
    slurm = dict(
        SLURM_STEP_ID="0",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NAME="job",
        SLURM_NODEID="0",
        SLURM_NODELIST="localhost",
    )
    deepspeed = dict(WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port)
    for common, ranks in ((slurm, ("SLURM_PROCID", "SLURM_LOCALID")), (deepspeed, ("RANK", "LOCAL_RANK"))):
        (tmp_path / "results.json").unlink()
        command = [sys.executable, str(WORKER), str(tmp_path / "jobs.json"), str(tmp_path / "results.json")]
        started = [subprocess.Popen(command, env=environment(**common, **{name: str(rank) for name in ranks})) for rank in range(2)]
        assert [process.wait(timeout=120) for process in started] == [0, 0]
        curves.append(json.loads((tmp_path / "results.json").read_text())[0]["losses"])
    assert curves[0] == curves[1] == curves[2]


def test_deepspeed_config():
    config = TrainConfig(strategy="deepspeed_stage_3_offload", ds_bucket_mb=2, micro_bsz=7, grad_clip=0.5, precision="bf16")
    settings = deepspeed_config(config, "gpu")
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 2_000_000
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert settings["bf16"] == {"enabled": True} and "fp16" not in settings
    assert settings["gradient_clipping"] == 0.5 and settings["train_micro_batch_size_per_gpu"] == 7
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["zero_force_ds_cpu_optimizer"] is False
    assert deepspeed_config(TrainConfig(strategy="deepspeed_stage_1", precision="fp16"), "gpu")["fp16"]["enabled"]
    json.dumps(settings)


def test_what_auto_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch(TrainConfig()) == strategy.Launch("cpu", 1, 1, "auto")
    assert launch(TrainConfig(devices="2")) == strategy.Launch("cpu", 2, 1, "ddp")
    assert launch(TrainConfig(num_nodes=2)) == strategy.Launch("cpu", 1, 2, "ddp"), "one process on each node"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch(TrainConfig(num_nodes=2, strategy="deepspeed_stage_2")) == strategy.Launch("gpu", 4, 2, "deepspeed_stage_2")
    assert launch(TrainConfig(num_nodes=2)).world_size == 8
    assert launch(TrainConfig(accelerator="cpu")).accelerator == "cpu"
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert launch(TrainConfig()).devices == 2
    with pytest.raises(UserError, match="--devices 4, but the launcher started 2"):
        launch(TrainConfig(devices="4"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="started 2 processes on this node, and this one sees 1 GPU; let each see all of them .*--gpus-per-node"
    ):
        launch(TrainConfig())  # as under srun --gpus-per-task=1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launch(TrainConfig(num_nodes=3)).world_size == 6
    with pytest.raises(UserError, match="use --num_nodes 3"):
        launch(TrainConfig())


def test_precision_is_never_autocast():
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        assert param_dtype(TrainConfig(precision=precision)) == dtype
        for name in ("auto", "ddp", "deepspeed_stage_2"):
            assert lightning_precision(TrainConfig(precision=precision, strategy=name)).endswith("-true")
    make_strategy(TrainConfig(precision="tf32", accelerator="cpu"))
    assert torch.get_float32_matmul_precision() == "high"
    make_strategy(TrainConfig(precision="fp32", accelerator="cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_cannot_be_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refusals = [
        (dict(accelerator="gpu"), "--accelerator gpu"),
        (dict(precision="fp16"), "--precision fp16"),
        (dict(devices="1000000"), "--devices 1000000: without a GPU these are processes"),
        (dict(precision="fp16", strategy="deepspeed_stage_2"), "--precision fp16"),
    ]
    for flags, what in refusals:
        with pytest.raises(UserError, match=what) as caught:
            make_strategy(TrainConfig(**flags))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="deepspeed is not installed"):
        make_strategy(TrainConfig(strategy="deepspeed_stage_2"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for flags, what in (
        (dict(devices="2"), "this machine has 1 GPU;"),
        (dict(precision="fp16"), "--precision fp16 needs a GPU and --strategy deepspeed"),
    ):
        with pytest.raises(UserError, match=what):
            make_strategy(TrainConfig(**flags))


def test_collectives_give_up_after_dist_timeout():
    for name in ("ddp", "deepspeed_stage_2"):
        # until the first step processes may take longer; the Watch counts dist_timeout
        for given, meant in ((7777.0, 7777), (20.0, strategy.START_TIMEOUT)):
            assert make_strategy(TrainConfig(strategy=name, accelerator="cpu", dist_timeout=given))._timeout.total_seconds() == meant
