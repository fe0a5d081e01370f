"""What a run is about to do, in a few lines, before it does it."""

from __future__ import annotations

import torch

from ..models import build, count_parameters
from .plan import Plan

KERNELS = {"cuda": "CUDA", "cpu": "C++", "torch": "plain PyTorch"}


def show_plan(plan: Plan) -> None:
    config, model, run, schedule = plan.config, plan.start.model, plan.launch, plan.schedule
    with torch.device("meta"):
        parameters = count_parameters(build(model))
    held_out = f", held out {plan.held_out.data.prefix}" if plan.held_out is not None else ", nothing held out"
    epochs = -(-schedule.exit_tokens // (config.ctx_len * config.epoch_samples))
    accumulated = f" x {config.accumulate_grad_batches} accumulated" if config.accumulate_grad_batches > 1 else ""
    nodes = f"{run.num_nodes} nodes x " if run.num_nodes > 1 else ""
    lines = {
        "model": f"{model.model_type} L{model.n_layer} D{model.n_embd}, {model.n_head} heads of {model.head_size}, vocabulary {model.vocab_size}, {parameters / 1e6:.6f} M parameters",
        "data": f"{plan.samples.data.prefix}: {plan.samples.data.n_tokens:,} tokens, {plan.token_range}{held_out}",
        "order": f"{plan.samples.prime:,} chunks of {config.ctx_len} tokens (magic_prime), mini-epochs of {config.epoch_samples:,} samples",
        "batch": f"{run.world_size} x {config.micro_bsz}{accumulated} = {plan.batch} samples, {schedule.tokens_per_step:,} tokens a step",
        "schedule": f"{schedule.exit_tokens:,} tokens, {epochs} mini-epochs, lr {config.lr_init:g} to {config.lr_final:g}, warm-up {schedule.warmup_steps} steps",
        "machine": f"{nodes}{run.devices} {run.accelerator}, {config.precision}, {run.strategy}{', grad_cp' if config.grad_cp else ''}, wkv7 in {KERNELS[plan.kernel]}",
        "start": f"{plan.start}; {schedule.steps_left(plan.tokens):,} steps to go",
        "output": f"{plan.proj_dir}",
    }
    for name, text in lines.items():
        print(f"{name:9} {text}", flush=True)
