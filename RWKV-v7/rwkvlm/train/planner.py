"""Estimates of a run's memory and time before it starts, for --grad_cp -1, --cuda_graphs -1 and train.py --dry_run.

They decide --grad_cp -1 and take part in deciding --cuda_graphs -1, and refuse what cannot fit; --dry_run prints them. Nothing is left
behind.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import torch

from .. import models
from ..checkpoint import ranks
from ..checkpoint.place import nearest
from ..config import ModelConfig, TrainConfig, UserError, cgroups, env
from ..config.volume import volume
from ..ops import adamw
from .banner import show_plan
from .guarded import guarded
from .logs.progress import clock
from .memory import FULL, Activations, Memory, estimate, measure_activations, resident
from .plan import Plan
from .start import SIZES
from .strategy import make_strategy, param_dtype

TRAIN = Path(__file__).resolve().parents[3] / "train.py"  # which runs where the package is neither installed nor on the PYTHONPATH
PROBE_STEPS, PROBE_SECONDS, PATIENCE = 8, 5.0, 600.0  # at least so many steps and so long; at most so long in all
LARGEST = 1024  # micro_bsz that is thought about
# of the free memory: up to there nothing is recomputed. Peaks on a GPU were 0.8 and 1.5 % below the estimate (records/2026-11-26-gpu)
ROOM = 0.8
OWN = [f.name for f in fields(TrainConfig) if f.metadata["of"]]  # flags of some model types only


def dry_run(plan: Plan) -> int:
    """Prints the plan; exit code 0, or 1 when the run would not fit into memory. Every process calls, the first one works and speaks."""
    if not env.first_process():
        return 0
    _load_libraries(plan)
    show_plan(plan)  # before the memory is measured, which of a large model takes a while
    plan = decide_by_memory(plan)
    memory, available = _memories(plan), memory_available(plan)
    fits = memory[plan.config.micro_bsz, plan.config.grad_cp].total <= FULL * available
    lines = {
        "epoch": f"{plan.config.epoch_samples * plan.config.ctx_len:,} tokens in a mini-epoch, "
        f"{math.ceil(plan.config.epoch_samples / plan.batch):,} steps",
        "memory": f"{memory[plan.config.micro_bsz, plan.config.grad_cp]} of {volume(available)} for each process"
        f"{', with grad_cp' * plan.config.grad_cp}: {'fits' if fits else 'does not fit'}",
        "advice": _advice(plan, memory, available),
    }
    for name, text in lines.items():
        print(f"{name:9} {text}", flush=True)
    print(f"{'time':9} {_time(plan) if fits else 'not tried: it would not fit'}", flush=True)
    return 0 if fits else 1


def refuse_too_much(plan: Plan) -> None:
    """UserError where even a low estimate is more than there is, swap included: the system would end the process without a word.

    Of a run on the CPU: a GPU says itself that its memory has run out. The first process of a node answers for all, before they
    take any. Not with --freeze: how much less that takes depends on what it names.
    """
    config, run, sizes = plan.config, plan.launch, plan.start.model
    if run.accelerator != "cpu" or config.freeze or not env.first_of_node():
        return
    memory = estimate(sizes, config, run, least_activations(sizes, param_dtype(config).itemsize), program=0)
    least, there = memory.total - memory.saving, memory_available(plan) + cgroups.swap_free() // run.devices
    if least > there:
        batch = memory.activations > memory.parameters + memory.gradients + memory.optimizer
        given = f"--micro_bsz {config.micro_bsz}" if batch else f"--n_layer {sizes.n_layer} --n_embd {sizes.n_embd}"
        raise UserError(
            f"{given}: a step takes {volume(least)} at least, and {volume(there)} of memory are free for each process; "
            "--dry_run says what fits"
        )


def least_activations(sizes: ModelConfig, itemsize: int) -> Activations:
    """Below what measure_activations would find, at once: at great widths it takes minutes. x070 takes about four times as much."""
    return Activations(itemsize * (4 * sizes.n_embd + sizes.dim_ffn), 0.0)


def refuse_too_large(sizes: ModelConfig) -> None:
    """The same of initial weights, which are made in fp32."""
    with torch.device("meta"):
        needed = 4 * models.count_parameters(models.build(sizes))
    there = min([cgroups.memory_free(), *cgroups.memory_left()]) + cgroups.swap_free()
    if needed > there:
        raise UserError(
            f"--n_layer {sizes.n_layer} --n_embd {sizes.n_embd}: the weights alone take {volume(needed)}, "
            f"and {volume(there)} of memory are free; use a smaller model"
        )


def decide_by_memory(plan: Plan) -> Plan:
    """The plan with --grad_cp -1 decided, and --cuda_graphs -1 where memory decides it. Collective.

    Activations are recomputed where the run would otherwise take more than ROOM of what is free; --cuda_graphs -1 becomes
    0 where the run would take more than that with graphs.
    """
    config = plan.config
    if config.grad_cp != -1 and config.cuda_graphs != -1:
        return plan
    compiled_graphs = config.compile and config.cuda_graphs  # which recompute nothing (graphs.py)
    gpus = [torch.cuda.current_device()] if plan.launch.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):  # what is built to be measured draws random numbers
        of, room = _estimator(plan), ROOM * memory_available(plan)

    def fits(grad_cp: int, graphs: bool) -> bool:
        memory = of(config.micro_bsz, grad_cp)
        return all(ranks.gather(memory.total - (0 if graphs else memory.graphs) <= room))

    if config.grad_cp == -1:
        config = replace(config, grad_cp=int(not (compiled_graphs or fits(0, config.cuda_graphs == 1))))
    if config.cuda_graphs == -1 and not fits(config.grad_cp, True):
        config = replace(config, cuda_graphs=0)
    return replace(plan, config=config)


def memory_available(plan: Plan) -> int:
    """Bytes for each process: what is free on its GPU, or its share of what this machine, or its container, has free."""
    if plan.launch.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min([cgroups.memory_free(), *cgroups.memory_left()]) // plan.launch.devices


def _memories(plan: Plan) -> dict[tuple[int, int], Memory]:
    """By micro_bsz (powers of two, and the one asked for) and grad_cp."""
    batches = {plan.config.micro_bsz} | {2**n for n in range(LARGEST.bit_length())}
    of = _estimator(plan)
    return {(batch, cp): of(batch, cp) for batch in sorted(batches) for cp in (0, 1)}


def _estimator(plan: Plan) -> Callable[[int, int], Memory]:
    """Of micro_bsz and grad_cp, for a run that is otherwise this one."""
    program = resident()
    activations = measure_activations(plan.start.model, plan.config, plan.launch.device)
    copies = adamw.backend_for(plan.launch.device) == "torch"
    return lambda batch, cp: estimate(
        plan.start.model, replace(plan.config, micro_bsz=batch, grad_cp=cp), plan.launch, activations, program, copies
    )


def _load_libraries(plan: Plan) -> None:
    """What a training process imports; refuses what it would refuse."""
    make_strategy(plan.config)
    if plan.launch.strategy.startswith("deepspeed"):
        with suppress(ImportError):
            # its engine looks for this one, and torch's compiler comes with it
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _advice(plan: Plan, memory: dict[tuple[int, int], Memory], available: int) -> str:
    most = {
        cp: max((batch for batch, how in memory if how == cp and memory[batch, cp].total <= FULL * available), default=0) for cp in (0, 1)
    }
    tried = max(batch for batch, _ in memory)
    largest = "the largest micro_bsz is {} without grad_cp, {} with it".format(
        *(f"{'at least' if most[cp] == tried else 'about'} {most[cp]}" for cp in (0, 1))
    )
    now = plan.config
    head = ""
    if memory[now.micro_bsz, now.grad_cp].head > 0.3 * available and not now.head_chunk:
        head = ", --head_chunk 128"
    if not most[1]:
        return f"no micro_bsz fits{head}: --strategy deepspeed_stage_3 on more devices, or a smaller model"
    if now.micro_bsz > most[now.grad_cp]:
        cp = 0 if most[0] else 1
        batch = min(most[cp], now.micro_bsz)
        rounds = math.ceil(plan.batch / (plan.launch.world_size * batch))
        return f"--micro_bsz {batch} --grad_cp {cp}{head} fits; with --accumulate_grad_batches {rounds} the batch is about the same"
    if now.grad_cp and now.micro_bsz <= most[0]:
        return f"--grad_cp 0 fits too, and is faster{head}; {largest}"
    return f"{largest}{head}"


def _time(plan: Plan) -> str:
    if env.launched_by_variables() or plan.launch.num_nodes > 1:
        return "not tried: --dry_run makes its probe when it is started without a launcher, for one node"
    print(
        f"{'probe':9} the first steps of this run, in a folder of its own that is deleted; up to ten minutes where a step is slow",
        flush=True,
    )
    try:
        speed = probe(plan)
    except UserError as error:
        return f"the probe failed: {error}"
    seconds = expected_seconds(plan, speed)
    return f"about {clock(seconds)} for {plan.steps:,} steps, at {speed / 1000:.2f} kt/s in a probe"


def expected_seconds(plan: Plan, tokens_per_s: float) -> float:
    """Of training and validation; a validation batch takes a third of a training batch. Saves are written beside the training."""
    step = plan.schedule.tokens_per_step / tokens_per_s
    every = plan.config.val_every or max(1, plan.config.epoch_samples // plan.batch)
    validations = plan.steps // every + 1 if plan.held_out is not None else 0
    batch = step / plan.config.accumulate_grad_batches / 3
    return plan.steps * step + validations * batch * math.ceil(plan.config.val_batches / plan.launch.world_size)


def probe(plan: Plan) -> float:
    """Tokens a second, of all devices: the run itself for a few steps, in a folder of its own that is deleted."""
    env.share_threads(plan.launch.devices)  # the probe finds OMP_NUM_THREADS set, and so shares nothing out
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=nearest(plan.proj_dir)) as folder:
        command = [sys.executable, str(TRAIN), *probe_flags(plan, folder)]
        with open(Path(folder) / "said", "w") as said, guarded(command, folder, stdout=subprocess.DEVNULL, stderr=said) as process:
            return _watch(process, Path(folder))


def probe_flags(plan: Plan, folder: str) -> list[str]:
    """Those of a run of the same model: with the weights of the same file, which says what no flag does, or with fresh ones."""
    model, start = plan.start.model, plan.start
    changes = {name: getattr(model, name) for name in SIZES if name not in model.unused} | {
        name: getattr(model, name) for name in OWN if hasattr(model, name)
    }
    changes |= dict(
        proj_dir=folder, load_model="" if start.fresh or start.path is None else str(start.path), load_partial=0, train_stage=0,
        epoch_begin=0, dry_run=False, wandb="", tensorboard=0, enable_progress_bar=False, save_steps=10**9, save_minutes=0.0,
        epoch_save=0, val_every=10**9, val_batches=1, max_steps=0, random_seed=0,
    )  # fmt: skip
    default = TrainConfig().as_dict()
    values = {name: int(value) if isinstance(value, bool) and type(default[name]) is int else value for name, value in changes.items()}
    config = replace(plan.config, **values).as_dict()
    return [word for name, value in config.items() if value != default[name] for word in (f"--{name}", str(value))]


def _watch(process: subprocess.Popen, folder: Path) -> float:
    deadline = time.monotonic() + PATIENCE
    metrics, seen = folder / "metrics.jsonl", []
    while True:
        ended = process.poll() is not None
        if metrics.exists():
            lines = metrics.read_bytes().split(b"\n")[:-1]
            seen = [(r["seconds"], r["tokens"]) for r in map(json.loads, lines) if "loss" in r][1:]  # the first step warms up
            if len(seen) > PROBE_STEPS and (seen[-1][0] - seen[0][0] >= PROBE_SECONDS or ended):
                return _median_rate(seen)
        if ended or time.monotonic() > deadline:
            if len(seen) > 1:
                return _median_rate(seen)
            said = [line for line in (folder / "said").read_text().splitlines() if line]
            raise UserError(said[-1].removeprefix("error: ") if said else f"no step was made in {PATIENCE:.0f} seconds")
        time.sleep(0.1)


def _median_rate(seen: list[tuple[float, int]]) -> float:
    """Of the intervals between two looks at the device, the slow and the fast ones left out."""
    points = list(dict(seen).items())  # steps that were read from the device together have one time
    if len(points) < 2:
        raise UserError("the steps of the probe are too fast to be timed")
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:]))
