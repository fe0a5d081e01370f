"""What happens around the steps of a run, in one place and one order: rate, counting, logs, validation, saving, stopping."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl

from ..checkpoint.ranks import say
from ..checkpoint.state import load_state
from ..config import UserError
from .banner import show_plan
from .diagnosis import diagnose
from .health import Health
from .hold import Hold
from .logs import make_logs
from .logs.report import NAME as REPORT
from .meter import Meter
from .module import TrainModule
from .plan import Plan, checked
from .planner import decide_by_memory
from .saver import Saver
from .signals import Agreement, Signals
from .start import FINAL_NAME, what_goes_on
from .validation import Validation
from .watch import Watch


class Conductor(pl.Callback):
    """Drives a plan through Lightning's loop. After `fit`, exit_code says how the run ended.

    All processes decide the same at every step: what differs between them (signals, clocks) goes through an Agreement.
    """

    def __init__(self, plan: Plan, watch: Watch | None, hold: Hold) -> None:
        self.plan, self.watch, self.hold = plan, watch, hold
        self.exit_code = 0
        self.steps_made = 0
        self.signals = Signals()
        self.saver: Saver | None = None

    def setup(self, trainer: pl.Trainer, module: TrainModule, stage: str) -> None:
        """Before the model is built; the processes can talk to each other."""
        if self.watch is not None:
            self.watch.connect(trainer.strategy.cluster_environment.main_address, one_node=trainer.num_nodes == 1)
        module.plan = self.plan = plan = decide_by_memory(checked(self.plan))
        module.config = plan.config
        self.position = replace(plan.start.position)
        if trainer.is_global_zero:
            show_plan(plan)

    def on_train_start(self, trainer: pl.Trainer, module: TrainModule) -> None:
        plan, optimizer = self.plan, trainer.strategy.optimizers[0]
        self.signals.install()
        if plan.start.state is not None:
            load_state(plan.start.state, module.model, optimizer)
        if self.watch is not None:
            self.watch.training_begins()
        self.agreement = Agreement(plan.config.dist_timeout)
        self.saver = Saver(plan, self.position, module.model, optimizer)
        module.watch_gradients()
        self.health = Health(plan, self.position, module.model, optimizer)
        logs = make_logs(plan, trainer.strategy) if trainer.is_global_zero else []
        self.meter = Meter(plan, self.position, self.health, module.norms.parts, logs)
        self.validation = Validation(plan, trainer)
        self.lr = 0.0
        if plan.finished:  # only rwkv-final.pth is missing
            self.saver.save([FINAL_NAME], state=False, last=True)
            trainer.should_stop = True
        elif plan.start.state is None or self.position.unvalidated:
            self._stop(trainer, self._validate())  # what the run begins with is there already

    def on_train_batch_start(self, trainer: pl.Trainer, module: TrainModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.plan.config.accumulate_grad_batches:
            return
        tokens = self.position.samples * self.plan.config.ctx_len
        self.lr = self.plan.schedule.lr(tokens, self.position.warmup_step)
        for group in trainer.strategy.optimizers[0].param_groups:
            group["lr"] = self.lr * group["my_lr_scale"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.plan.config.accumulate_grad_batches == 0:
            self._after_step(trainer, module)

    def _after_step(self, trainer: pl.Trainer, module: TrainModule) -> None:
        plan, position = self.plan, self.position
        position.advance(plan.batch)
        self.steps_made += 1
        norm = module.gradient_norm()
        self.meter.step(module.step_loss, module.step_terms, norm, module.norms.last, self.lr)
        self.health.keep()

        ended = plan.schedule.finished(position.samples * plan.config.ctx_len)
        mini_epoch_ends = plan.mini_epoch_ends(position.samples)
        mini_epoch = plan.mini_epoch(position.samples) - mini_epoch_ends
        stop, save, hopeless = self.agreement.exchange(
            self.signals.stop, self.signals.take_save() or self.saver.minutes_due(), self.health.hopeless
        )
        if hopeless:
            self._give_up(trainer, module)

        if mini_epoch_ends or ended:
            self.meter.close_mini_epoch(mini_epoch)
        if ended:
            self._validate(to_its_end=True)
        elif self.validation.due(position.step, mini_epoch_ends):
            stop = self._validate() or stop
        weights = (
            [f"rwkv-{mini_epoch}.pth"] if mini_epoch_ends and plan.config.epoch_save and mini_epoch % plan.config.epoch_save == 0 else []
        )
        if ended:
            weights.append(FINAL_NAME)
        last = bool(stop) or ended or self.steps_made == plan.steps
        state = last or bool(save) or self.saver.state_due(mini_epoch_ends)
        if weights or state:
            self.hold.check()
            self.meter.drain()
            if self.health.fit_to_save():
                self.saver.save(weights, state, last)
            elif last:
                self._give_up(trainer, module)
        if not ended:
            self._stop(trainer, stop)

    def _stop(self, trainer: pl.Trainer, stop: int) -> None:
        """By the signal of this number; 0: goes on."""
        if stop:
            self.exit_code = 128 + stop
            trainer.should_stop = True

    def _validate(self, to_its_end: bool = False) -> int:
        """The signal that has stopped it before its end; 0: none."""
        self.meter.drain()  # the time of the steps is not that of the validation
        loss, stop = self.validation.loss(lambda: 0 if to_its_end else self.signals.stop)
        self.position.unvalidated = bool(stop)
        if loss is not None:
            self.meter.validated(loss)
        return stop

    def _give_up(self, trainer: pl.Trainer, module: TrainModule) -> None:
        """Nothing is saved: whatever has gone wrong, the newest state is from before it, or from between steps that changed nothing."""
        self.meter.close()
        self.saver.wait()
        step, samples = self.health.last_ill
        raise UserError(
            f"{self.health.in_a_row} steps in a row were skipped or undone (--max_skips {self.plan.config.max_skips}), "
            f"the last one step {step}: {diagnose(self.plan, trainer, module, samples)}"
        )

    def on_exception(self, trainer: pl.Trainer, module: TrainModule, exception: BaseException) -> None:
        if self.watch is not None:
            self.watch.report(exception)

    def close(self) -> None:
        """After `fit`, however it has ended: what is being saved is on the disk. Where there are several processes the Watch ends them."""
        self.signals.restore()
        if self.saver is not None and self.watch is None:
            self.saver.close()

    def on_train_end(self, trainer: pl.Trainer, module: TrainModule) -> None:
        self.agreement.finish()
        self.meter.close()
        self.signals.restore()
        if self.exit_code:
            saved = "the training state is saved" if self.steps_made else "no step has been made"
            say(
                f"stopped by {signal.Signals(self.exit_code - 128).name} at step {self.position.step}; "
                f"{saved}, {what_goes_on(self.plan.config)} goes on from it"
            )
        elif not self.plan.schedule.finished(self.position.samples * self.plan.config.ctx_len):
            say(f"stopped after --max_steps {self.plan.config.max_steps} at step {self.position.step}; the training state is saved")
        else:
            say(
                f"finished at step {self.position.step}: the weights are {self.plan.proj_dir / FINAL_NAME}, "
                f"the curves {self.plan.proj_dir / REPORT}"
            )
