"""Weights & Biases, with the official keys and run name; offline, with one line, where nobody is logged in."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ...checkpoint.ranks import say
from ..plan import Plan
from .log import Log


class WeightsAndBiases(Log):
    def __init__(self, plan: Plan, now: datetime) -> None:
        import wandb

        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.api.api_key:
            mode = "offline"
            say(f"wandb: nobody is logged in; logging offline to {plan.proj_dir}/wandb (wandb login, then wandb sync)")
        model, config = plan.start.model, plan.config
        self.config, self.wd = config, config.weight_decay
        self.run = wandb.init(
            project=config.wandb,
            name=f"{model.vocab_size} ctx{config.ctx_len} L{model.n_layer} D{model.n_embd} {now:%Y-%m-%d-%H-%M-%S}",
            config=plan.settings(),
            dir=str(plan.proj_dir),
            mode=mode,
            save_code=False,
            settings=wandb.Settings(silent=True),
        )

    def step(self, record: dict[str, Any]) -> None:
        self.run.log(
            {
                "loss": record["loss"],
                "lr": record["lr"],
                "wd": self.wd,
                "Gtokens": record["tokens"] / 1e9,
                "kt/s": record["tokens_per_s"] / 1000,
            },
            step=record["step"],
        )

    def validation(self, record: dict[str, Any]) -> None:
        self.run.log({"val_loss": record["val_loss"]}, step=record["step"])

    def close(self) -> None:
        self.run.finish()
