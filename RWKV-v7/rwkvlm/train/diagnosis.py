"""Why a run had to stop: which samples of the last bad step, alone, give numbers that are not finite, and in which parameters."""

from __future__ import annotations

import math

import numpy as np
import pytorch_lightning as pl
import torch

from ..checkpoint import ranks
from .module import TrainModule, on_device
from .norms import part_of
from .plan import Plan

SHOWN = 3  # names of each kind


def diagnose(plan: Plan, trainer: pl.Trainer, module: TrainModule, samples: int) -> str:
    """One line about the step that consumed the samples up to `samples`, with the weights as they are now. Collective.

    Every process runs its samples one by one, forward and backward, without touching gradients, optimizer or data order.
    """
    masters = [name for name, p in module.model.named_parameters() if not torch.isfinite(getattr(p, "ds_tensor", p).detach()).all()]
    bad = _bad_samples(plan, trainer, module, samples)
    weights = sorted(set(sum(ranks.gather(masters), [])))
    if weights:
        return f"the weights themselves are not finite ({_some(weights)}): go on from an older training state"
    bad = sorted(sum(ranks.gather(bad), []))
    if not bad:
        return (
            "none of its samples does this alone, with the weights as they are: "
            "the numbers grow too large together (a lower lr_init), or the machine miscalculates"
        )
    which = [f"{ii} ({plan.samples.where(ii)})" for ii, _, _ in bad[:SHOWN]]
    ii, loss, names = bad[0]
    grads = (
        f"; gradients of {len(names)} parameters, in {', '.join(dict.fromkeys(map(part_of, names)))}, are not: {_some(names)}"
        if names
        else ""
    )
    return (
        f"{len(bad)} of its {plan.batch} samples do this alone: {', '.join(which)}{' ...' * (len(bad) > SHOWN)}; "
        f"the loss of sample {ii} is {loss}{grads}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + " ..." * (len(names) > SHOWN)


def _bad_samples(plan: Plan, trainer: pl.Trainer, module: TrainModule, samples: int) -> list[tuple[int, str, list[str]]]:
    """Sample number, loss and names of the parameters with bad gradients, of this process's share."""
    named = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
    found = []
    for ii in range(samples - plan.batch + 1 + trainer.global_rank, samples + 1, trainer.world_size):
        batch = on_device(plan.samples[np.array([ii])], trainer.strategy.root_device)
        loss, _ = module.loss(batch)
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        names = [name for (name, _), grad in zip(named, grads) if grad is not None and not torch.isfinite(grad).all()]
        if names or not math.isfinite(loss.item()):
            found.append((ii, f"{loss.item():g}", names))
    return found
