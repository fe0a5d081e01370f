"""How fp32 matrix products are computed in a run on the CPU: decided once, then the same in every process and after every resumption."""

from __future__ import annotations

import torch

from ..config import env
from ..ops.precision import fp32_matmul_choice
from .plan import Plan
from .strategy import started_apart


def settle_fp32_products(plan: Plan) -> None:
    """Sets torch's mode of fp32 matrix products for an fp32 run on the CPU; the first process says which it is, and its error.

    As the run began; else the fastest whose error is fp32's, measured here and handed on to the processes that this one will start.
    Where nothing can be handed on, on several nodes and under a launcher, all take the plain path, "highest".
    """
    if plan.config.precision != "fp32" or plan.launch.accelerator != "cpu":
        return
    if plan.start.state is not None:
        setting = plan.start.state.meta["fp32_products"]
        line = f"fp32 matrix products: {setting}, as the run began"
    elif setting := env.decided_fp32_products():
        line = f"fp32 matrix products: {setting}, as decided by the process that started this one"
    elif started_apart(plan.launch):
        setting, line = (
            "highest",
            "fp32 matrix products: highest, not measured, since the processes of several nodes or of a launcher must agree",
        )
    else:
        setting, line = fp32_matmul_choice()
        env.hand_on_fp32_products(setting)
    torch.set_float32_matmul_precision(setting)
    if env.first_process():
        print(line, flush=True)
