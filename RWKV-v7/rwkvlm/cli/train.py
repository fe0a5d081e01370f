"""`python train.py` or `python -m rwkvlm train`: write initial weights, train, resume."""

from __future__ import annotations

import signal

from ..config import TrainConfig, env
from .flags import parse_flags


def main(argv: list[str]) -> int:
    """Exit code: 0 at the last token (or after --max_steps), 130 or 143 when stopped by SIGINT or SIGTERM with everything saved."""
    env.forget_launchers_of_others()
    config = parse_flags(TrainConfig, argv, "train.py")
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a training (train/signals.py) there is nothing to save
    try:
        from ..train.run import run  # torch and Lightning take seconds to import: wrong flags are answered before

        return run(config)
    finally:
        signal.signal(signal.SIGUSR1, before if before is not None else signal.SIG_DFL)
