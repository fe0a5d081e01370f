"""Bad steps: those whose loss or gradient is not finite change nothing; loss spikes are undone, where --spike_guard asks for it.

Every process judges the same numbers, means over all devices. Skipping itself happens on the device: see TrainModule and, under
ZeRO, DeepSpeed. Here it is noticed, counted and told, up to a second later on a GPU; so the end of a hopeless run goes through the
Agreement.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import nn

from ..checkpoint import ranks
from ..checkpoint.shards import pieces, write_back
from .plan import Plan
from .position import Position

WINDOW = 50  # steps over which mean and variance of the loss run, and before which nothing is called a spike
SNAPSHOTS = 2  # kept in host memory
LEAST_SPREAD = 0.01  # of the mean: the least standard deviation that is assumed


class Snapshot:
    """Masters and moments of this process in host memory, as they are after `position`."""

    def __init__(self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.samples = position.step, position.samples
        self._kept = [
            ({key: view.to("cpu", copy=True) for key, view in piece.values.items()}, piece.step) for piece in pieces(model, optimizer)
        ]

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Collective."""
        for piece, (values, step) in zip(pieces(model, optimizer), self._kept, strict=True):
            for key, view in piece.values.items():
                view.copy_(values[key])
            if piece.adam is not None:
                piece.set_step(step)
        write_back(optimizer)


class Health:
    """Judges every step, and undoes spikes.

    in_a_row: steps up to the last one judged that were skipped or undone. last_ill: the last such step, and the samples
    consumed after it.
    guarded: spikes are looked for; then every step must be judged before the next one begins. Snapshots are not part of a
    training state, which they would make three times as large: a spike soon after a resumption goes back to what the run
    resumed from.
    """

    def __init__(self, plan: Plan, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.plan, self.position, self.model, self.optimizer = plan, position, model, optimizer
        self.guarded = plan.config.spike_guard > 0
        self.in_a_row = 0
        self.last_ill = (0, 0)
        self._snapshots: deque[Snapshot] = deque()
        self.keep()

    @property
    def hopeless(self) -> bool:
        return self.in_a_row >= self.plan.config.max_skips

    def fit_to_save(self) -> bool:
        """Collective. False, with one line, when weights are not finite; they are looked at when the last step was not well."""
        if not self.in_a_row:
            return True
        fit = all(
            ranks.gather(all(bool(view.isfinite().all()) for piece in pieces(self.model, self.optimizer) for view in piece.values.values()))
        )
        if not fit:
            ranks.say(f"nothing is saved at step {self.position.step}: the weights are not finite")
        return fit

    def keep(self) -> None:
        """At the beginning and after every step: what spikes go back to, when it is time for that and the step was well."""
        if self.guarded and not self.in_a_row and (not self._snapshots or self.position.step % self.plan.config.spike_snapshot == 0):
            if len(self._snapshots) == SNAPSHOTS:
                self._snapshots.popleft()  # first, so that there are never three
            self._snapshots.append(Snapshot(self.position, self.model, self.optimizer))

    def judge(self, step: int, samples: int, loss: float, norm: float | None, by_part: dict[str, float] | None) -> dict[str, object]:
        """What the logs shall say about a step besides its numbers; samples: consumed after it."""
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            if math.isfinite(loss) and self.plan.config.precision == "fp16":
                return {"skipped": True}  # DeepSpeed looks for a loss scale
            self.position.skipped += 1
            parts = [part for part, value in (by_part or {}).items() if not math.isfinite(value)]
            where = f" ({', '.join(parts)})" if 0 < len(parts) < len(by_part) else ""
            self._ill(
                step,
                samples,
                f"is skipped: loss {loss:g}, gradient norm {'?' if norm is None else f'{norm:g}'}{where}",
                samples - self.plan.batch,
            )
            return {"skipped": True}
        if self.guarded and self._is_spike(loss):
            return {"undone_to": self._undo(step, samples, loss)}
        if not self.hopeless:  # once it is, the run ends: other processes, and on a GPU this one, learn it a little later
            self.in_a_row = 0
        return {}

    def _ill(self, step: int, samples: int, what: str, after: int) -> None:
        self.in_a_row += 1
        self.last_ill = (step, samples)
        p = self.position
        ranks.say(f"step {step} {what}; samples {after + 1} to {samples} are lost; {self.in_a_row} in a row, {p.skipped + p.undone} in all")

    def _spread(self) -> float:
        return max(math.sqrt(self.position.loss_variance), LEAST_SPREAD * abs(self.position.loss_mean))

    def _is_spike(self, loss: float) -> bool:
        p = self.position
        difference = loss - p.loss_mean
        if p.loss_steps >= WINDOW and difference > self.plan.config.spike_guard * self._spread():
            return True
        p.loss_steps += 1
        rate = max(1 / p.loss_steps, 2 / WINDOW)
        p.loss_mean += rate * difference
        p.loss_variance = (1 - rate) * (p.loss_variance + rate * difference * difference)
        return False

    def _undo(self, step: int, samples: int, loss: float) -> int:
        """Goes back to the newest snapshot and on with the samples that follow (PaLM, arXiv 2204.02311, section 5.1).

        Should a spike come again before there is a new snapshot, it was too late already: then to the one before.
        """
        snapshot = self._snapshots.pop() if len(self._snapshots) > 1 else self._snapshots[0]
        snapshot.restore(self.model, self.optimizer)
        self.position.undone += 1
        why = (
            f"its loss {loss:.4f} is {(loss - self.position.loss_mean) / self._spread():.1f} "
            f"standard deviations above {self.position.loss_mean:.4f}"
        )
        self._ill(step, samples, f"is undone, back to the weights of step {snapshot.step}: {why}", snapshot.samples)
        return snapshot.step
