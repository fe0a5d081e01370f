"""The lines that a run prints before it starts: model, data, batch, schedule, machine."""

from __future__ import annotations

import torch

from ..config import RosaConfig
from ..models import build, costs, count_parameters, recurrence
from ..ops.backend import BACKENDS
from .freeze import frozen_names
from .plan import Plan


def show_plan(plan: Plan) -> None:
    config, model, run, schedule = plan.config, plan.start.model, plan.launch, plan.schedule
    with torch.device("meta"):
        built = build(model)
    parameters, sizes = count_parameters(built), {name: parameter.numel() for name, parameter in built.named_parameters()}
    frozen = sum(sizes[name] for name in frozen_names(config.freeze, list(sizes)))
    mixers = [] if "head_size" in model.unused else [f"{model.n_head} head{'s' * (model.n_head > 1)} of {model.head_size}"]
    if isinstance(model, RosaConfig):
        mixers.append(
            f"ROSA of {model.rosa_bits} bit{'s' * (model.rosa_bits > 1)}{f' (--rosa_grad {model.rosa_grad})' * (model.rosa_grad != 'flip')}"
        )
    held_out = f"held out {plan.held_out.name}" if plan.held_out is not None else "nothing held out"
    left = schedule.steps_left(plan.tokens)
    mini_epochs = -(-schedule.exit_tokens // (config.ctx_len * config.epoch_samples))
    accumulated = f" x {config.accumulate_grad_batches} accumulated" if config.accumulate_grad_batches > 1 else ""
    devices = f"{f'{run.num_nodes} nodes x ' if run.num_nodes > 1 else ''}{run.devices} {run.accelerator}"
    strategy = "one process" if run.strategy == "auto" else run.strategy
    fall = {"cosine": "", "wsd": f" over the last {100 * config.wsd_decay:g}%", "constant": ""}[config.lr_schedule]
    rate = f"lr {config.lr_init:g}" + (" constant" if config.lr_schedule == "constant" else f" to {config.lr_final:g}{fall}")
    lines = {
        "model": f"{model.model_type} L{model.n_layer} D{model.n_embd}, "
        f"{''.join(f'{mixer}, ' for mixer in mixers)}vocabulary {model.vocab_size}, "
        f"{parameters / 1e6:.6f} M parameters{f', {frozen / 1e6:.6f} M of them frozen' * (frozen > 0)}",
        **({"costs": f"\n{'':10}".join(table)} if (table := costs(model)) else {}),
        "data": f"{_files(plan)}, {held_out}",
        "order": f"{plan.data.chunks:,} chunks of {config.ctx_len} tokens{' (magic_prime)' * (len(plan.data.parts) == 1)}, "
        f"mini-epochs of {config.epoch_samples:,} samples",
        "batch": f"{run.world_size} x {config.micro_bsz}{accumulated} = {plan.batch} samples, {schedule.tokens_per_step:,} tokens a step",
        "schedule": f"{schedule.exit_tokens:,} tokens, {mini_epochs} mini-epoch{'s' * (mini_epochs != 1)}, "
        f"{rate}, warm-up {schedule.warmup_steps} steps",
        "machine": f"{devices}, {config.precision}, {strategy}{', grad_cp' * config.grad_cp}"
        f"{', blocks compiled' * config.compile}{', blocks in CUDA graphs' * bool(config.cuda_graphs)}, "
        f"{recurrence(model)} in {BACKENDS[plan.kernel]}",
        "start": f"{plan.start}; {left:,} step{'s' * (left != 1)} to go"
        f"{f', {plan.steps:,} of them now (--max_steps)' * (plan.steps < left)}",
        "output": f"{plan.proj_dir}",
    }
    for name, text in lines.items():
        print(f"{name:9} {text}", flush=True)


def _files(plan: Plan) -> str:
    """The one file, or a line for each of several: its share of the samples, and how often the run reads it."""
    samples = plan.schedule.exit_tokens / plan.config.ctx_len
    lines = []
    for part, seen in zip(plan.data.parts, plan.token_ranges):
        share = (
            ""
            if len(plan.data.parts) == 1
            else f"{100 * float(part.share):.4g}% of the samples, {samples * part.share / part.prime:.3g} passes, "
        )
        lines.append(f"{part.data.prefix}: {share}{part.data.n_tokens:,} tokens, {seen}")
    return f",\n{'':10}".join(lines)
