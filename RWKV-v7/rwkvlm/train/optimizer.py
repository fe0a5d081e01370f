"""AdamW with the model's groups, the same numbers under every strategy and on every device.

    make_optimizer(model, config, strategy) -> torch.optim.Optimizer       for configure_optimizers

Group keys: `lr`, `weight_decay`, `my_lr_scale` (the schedule sets lr = its value * my_lr_scale), `names`.

Outside DeepSpeed: MasterAdamW. bf16 parameters have fp32 masters. Under DeepSpeed its ZeRO optimizer holds the fp32 masters and steps
the optimizer made here on flat fp32 pieces of them.
"""

from __future__ import annotations

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, Strategy
from torch import nn

from .. import models
from ..checkpoint.ranks import say
from ..config import TrainConfig, UserError
from ..ops.adamw import adamw_


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with fp32 moments for fp32 parameters, and for bf16 parameters, which are fp32 master weights rounded.

    Gradients may be bf16 or fp32 (computed with in fp32); with accumulate, `grad` of bf16 parameters becomes fp32 (`grad_dtype`), so that
    backward adds up micro batches in fp32. State per parameter: step (fp32 scalar), exp_avg, exp_avg_sq, and master for bf16 parameters.
    As in torch's own AdamW, a tensor `found_inf` that holds 1 makes a step change nothing.
    """

    def __init__(
        self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, accumulate: bool = False
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
            }
            if p.dtype != torch.float32:
                self.state[p]["master"] = p.detach().to(torch.float32, copy=True)
                p.grad_dtype = torch.float32 if accumulate else None  # None: any

    def clip(self, norm: torch.Tensor, most: float) -> None:
        """Before a step. norm: of the whole gradient; the step clips it to `most` (0: not), and changes nothing where it is not finite.

        `grad` itself stays as it is: the factor is applied where the gradient is read anyway.
        """
        self.scale = (most / (norm + 1e-6)).clamp(max=1.0) if most else None
        self.found_inf = (~torch.isfinite(norm)).float()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            adamw_(
                [s.get("master", p) for s, p in zip(states, params)],
                [p for s, p in zip(states, params) if "master" in s],
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["step"] for s in states],
                self.scale,
                self.found_inf,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def make_optimizer(model: nn.Module, config: TrainConfig, strategy: Strategy) -> torch.optim.Optimizer:
    """The optimizer of model (the bare LanguageModel, already cast to strategy.param_dtype and on its device)."""
    groups = [{**group, "lr": config.lr_init * group["my_lr_scale"]} for group in models.param_groups(model, config.weight_decay)]
    settings = dict(lr=config.lr_init, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    if isinstance(strategy, DeepSpeedStrategy):
        return _under_deepspeed(groups, settings, strategy)
    dtypes = {p.dtype for group in groups for p in group["params"]}
    if dtypes in ({torch.float32}, {torch.bfloat16}):
        return MasterAdamW(groups, **settings, accumulate=config.accumulate_grad_batches > 1)
    raise UserError(
        f"--precision {config.precision} needs --strategy deepspeed_stage_1, 2 or 3; use bf16 with --strategy {config.strategy}"
    )


def _under_deepspeed(groups: list[dict], settings: dict, strategy: DeepSpeedStrategy) -> torch.optim.Optimizer:
    """FusedAdam on a GPU, DeepSpeedCPUAdam for optimizer states offloaded from one; torch's fused AdamW where they do not build.

    On a CPU always torch's: building DeepSpeed's takes more than a minute and gains nothing there.
    """
    if strategy.root_device.type == "cuda":
        offload = "offload_optimizer" in strategy.config["zero_optimization"]
        try:
            if offload:
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                return DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, **settings, adam_w_mode=True)
        except Exception as error:  # whatever a compiler, a missing header or a wrong CUDA version raises
            name = "DeepSpeedCPUAdam" if offload else "FusedAdam"
            say(f"DeepSpeed's {name} cannot be built here ({(str(error).splitlines() or ['?'])[0][:120]}); using torch's fused AdamW")
    return torch.optim.AdamW(groups, **settings, fused=True)
