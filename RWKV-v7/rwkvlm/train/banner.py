"""What a run is about to do, in a few lines, before it does it."""

from __future__ import annotations

import torch

from ..models import build, count_parameters
from .plan import Plan

KERNELS = {"cuda": "CUDA", "cpu": "C++", "torch": "plain PyTorch"}


def show_plan(plan: Plan) -> None:
    for name, text in describe(plan).items():
        print(f"{name:9} {text}", flush=True)


def describe(plan: Plan) -> dict[str, str]:
    config, model, run, schedule, data = plan.config, plan.start.model, plan.launch, plan.schedule, plan.samples.data
    with torch.device("meta"):
        parameters = count_parameters(build(model))
    heads = f"{model.n_head} head{'s' * (model.n_head > 1)} of {model.head_size}"
    held_out = f"held out {plan.held_out.data.prefix}" if plan.held_out is not None else "nothing held out"
    mini_epochs = -(-schedule.exit_tokens // (config.ctx_len * config.epoch_samples))
    accumulated = f" x {config.accumulate_grad_batches} accumulated" if config.accumulate_grad_batches > 1 else ""
    devices = f"{f'{run.num_nodes} nodes x ' if run.num_nodes > 1 else ''}{run.devices} {run.accelerator}"
    strategy = "one process" if run.strategy == "auto" else run.strategy
    fall = {"cosine": "", "wsd": f" over the last {100 * config.wsd_decay:g}%", "constant": ""}[config.lr_schedule]
    rate = f"lr {config.lr_init:g}" + (" constant" if config.lr_schedule == "constant" else f" to {config.lr_final:g}{fall}")
    return {
        "model": f"{model.model_type} L{model.n_layer} D{model.n_embd}, {heads}, vocabulary {model.vocab_size}, {parameters / 1e6:.6f} M parameters",
        "data": f"{data.prefix}: {data.n_tokens:,} tokens, {plan.token_range}, {held_out}",
        "order": f"{plan.samples.prime:,} chunks of {config.ctx_len} tokens (magic_prime), mini-epochs of {config.epoch_samples:,} samples",
        "batch": f"{run.world_size} x {config.micro_bsz}{accumulated} = {plan.batch} samples, {schedule.tokens_per_step:,} tokens a step",
        "schedule": f"{schedule.exit_tokens:,} tokens, {mini_epochs} mini-epochs, {rate}, warm-up {schedule.warmup_steps} steps",
        "machine": f"{devices}, {config.precision}, {strategy}{', grad_cp' * config.grad_cp}, wkv7 in {KERNELS[plan.kernel]}",
        "start": f"{plan.start}; {schedule.steps_left(plan.tokens):,} steps to go",
        "output": f"{plan.proj_dir}",
    }
