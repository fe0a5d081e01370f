"""Weights & Biases, with the official keys and run name; offline, with one line, where nobody is logged in or nothing is reached."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ...checkpoint.ranks import say
from ..plan import Plan
from .log import Log

RUN_ID = "run_id"  # in proj_dir/wandb


class WeightsAndBiases(Log):
    """A run of wandb, in which a training that goes on from a training state goes on.

    That run leaves out the steps that it has already. From weights, which may lie far behind its last step and train
    otherwise than it did, there is a new one. Offline each process has a run of its own: of several with one id,
    `wandb sync` would leave the last (https://github.com/wandb/wandb/issues/5865).
    """

    def __init__(self, plan: Plan, now: datetime) -> None:
        import wandb

        model, config = plan.start.model, plan.config
        self.wd = config.weight_decay
        mode = wandb.setup().settings.mode
        if mode == "online" and not _logged_in(wandb.setup().settings):
            mode = "offline"
            say(f"wandb: nobody is logged in; logging offline into {plan.proj_dir}/wandb (to upload: wandb login, then wandb sync)")

        place = plan.proj_dir / "wandb" / RUN_ID
        known = place.read_text() if mode == "online" and plan.start.state is not None and place.exists() else ""  # also of a full disk

        def begin(mode: str, known: str = ""):
            return wandb.init(
                project=config.wandb,
                name=None if known else f"{model.vocab_size} ctx{config.ctx_len} L{model.n_layer} D{model.n_embd} {now:%Y-%m-%d-%H-%M-%S}",
                id=known or None,
                resume="allow" if known else None,
                config=plan.settings(),
                dir=str(plan.proj_dir),
                mode=mode,
                settings=wandb.Settings(silent=True),
            )

        try:
            self.run = begin(mode, known)
        except wandb.errors.Error as error:
            say(
                f"wandb: {str(error).splitlines()[0]}; logging offline into {plan.proj_dir}/wandb"
                f"{f' (if run {known} is gone for good, remove {place}: the next start has a new one)' * bool(known)}"
            )
            self.run = begin("offline")
        else:
            if mode == "online":
                place.parent.mkdir(exist_ok=True)
                place.write_text(self.run.id)

    def step(self, record: dict[str, Any]) -> None:
        numbers = {
            "loss": record["loss"],
            "lr": record["lr"],
            "wd": self.wd,
            "Gtokens": record["tokens"] / 1e9,
            "kt/s": record["tokens_per_s"] / 1000,
        }
        self.run.log(numbers, step=record["step"])

    def validation(self, record: dict[str, Any]) -> None:
        # of a resumed run, one further: there a validation that was stopped is made
        self.run.log({"val_loss": record["val_loss"]}, step=max(record["step"], self.run.step))

    def close(self) -> None:
        self.run.finish()


def _logged_in(settings: Any) -> bool:
    """Whether wandb.init would find credentials; asking it would prompt."""
    from requests.utils import get_netrc_auth  # requests comes with wandb

    return bool(settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url))
