"""From flags and what the disk holds to a complete plan of a run: everything is checked here, before anything is built."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import models
from ..checkpoint import ranks
from ..checkpoint.place import nearest, try_folder
from ..checkpoint.state import check, say_damaged
from ..config import PhantomConfig, TrainConfig, UserError, env
from ..config.errors import pip_install
from ..data.binidx import idx_path
from ..data.dataset import Samples
from ..data.formats import FORMATS
from ..data.mixture import Mixture, held_out, open_mixture, prefixes
from ..data.reset import ResetSamples
from ..data.sampler import order_hash
from ..data.tokenizer import TOKENIZER
from ..data.tokens import TokenRange
from ..ops import backend
from ..ops.precision import bf16_is_faster
from .compiled import check_compile
from .freeze import check_freeze
from .graphs import decide_graphs
from .hold import last_holder, refuse_if_held
from .schedule import Schedule
from .start import Start, find_start
from .strategy import Launch, launch, param_dtype, started_apart

# seconds: until a node sees what another one has just written; NFS remembers for up to a minute what was not there
LOOKS, BETWEEN_LOOKS = 7, 10.0
SCAN_BYTES = 1 << 30  # of tokens whose range is checked at the start: about a second; every sample is checked when read


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know before it is built.

    config: with precision and cuda_graphs decided. kernel: who computes the model's recurrence.
    batch: samples per optimizer step, all devices and micro batches together.
    """

    config: TrainConfig
    launch: Launch
    kernel: str
    start: Start
    data: Mixture
    identity: list[dict]  # of the data (Mixture.identity)
    samples: Samples
    held_out: Samples | None
    token_ranges: tuple[TokenRange, ...] | None  # one a file; the first process alone has them
    batch: int
    schedule: Schedule
    last_holder: str  # of proj_dir when this was planned (hold.py)

    @property
    def proj_dir(self) -> Path:
        return Path(self.config.proj_dir)

    @property
    def tokens(self) -> int:
        """Consumed before the first step of this process."""
        return self.start.position.samples * self.config.ctx_len

    @property
    def finished(self) -> bool:
        return self.schedule.finished(self.tokens)

    @property
    def steps(self) -> int:
        """Optimizer steps that this process shall make."""
        left = self.schedule.steps_left(self.tokens)
        return min(left, self.config.max_steps) if self.config.max_steps else left

    def settings(self) -> dict[str, object]:
        """Flags and what was decided from them, for logs."""
        order = ", ".join(order_hash(part.prime) for part in self.data.parts)
        decided = {
            "real_bsz": self.batch,
            "magic_prime": self.data.order,
            "order_hash": order,
            "my_exit_tokens": self.schedule.exit_tokens,
            "warmup_steps": self.schedule.warmup_steps,
        }
        return self.config.as_dict() | self.start.model.as_dict() | decided

    def mini_epoch(self, samples: int) -> int:
        """The mini-epoch to which the step beginning after `samples` belongs."""
        return samples // self.config.epoch_samples

    def mini_epoch_ends(self, samples: int) -> bool:
        """Whether the step that has just consumed up to `samples` was the last of its mini-epoch."""
        return self.mini_epoch(samples) > self.mini_epoch(samples - self.batch)


def make_plan(config: TrainConfig, damaged: Collection[Path] = ()) -> Plan:
    """Raises UserError for everything that would make the run fail later: data, checkpoints, folders, devices.

    damaged: training states that are not to be used.
    """
    holder = last_holder(Path(config.proj_dir))  # before anything else is read there
    config, data = check_data(config)
    check_folder(config)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb}: wandb is not installed; run: {pip_install('wandb')}, or leave --wandb out")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"--tensorboard 1: tensorboard is not installed; run: {pip_install('tensorboard')}, or leave --tensorboard out")
    run = launch(config)
    backend.set_kernel(config.kernel)
    identity = data.identity()
    start = find_start(config, data.order, identity, damaged)
    check_freeze(config.freeze, start.model)
    config = replace(config, precision=decide_precision(config, run, start))
    if config.doc_reset and isinstance(start.model, PhantomConfig) and start.model.steps_on_state and start.model.ttt_meta:
        raise UserError(
            "--doc_reset 1 is not made for --ttt_meta 1, which asks for the state at the end of each sample; leave one of the two out"
        )
    vocab_size = start.model.vocab_size
    packed = ResetSamples if config.doc_reset else lambda samples: samples
    validation = _held_out(config, data, vocab_size)
    kernel = models.kernel_of(start.model, run.device, param_dtype(config))
    config = replace(config, cuda_graphs=decide_graphs(config, run, start.model, kernel))
    check_compile(config, run, start.model, kernel)
    batch = run.world_size * config.micro_bsz * config.accumulate_grad_batches
    if start.state is None:  # weights know mini-epochs only
        start.position.step = start.position.samples // batch
    exit_tokens = config.my_exit_tokens if config.my_exit_tokens > 0 else data.chunks * config.ctx_len
    as_flags_say = start.fresh or start.path == Path(config.load_model)  # else what proj_dir holds goes on, wherever it is
    if config.epoch_begin and as_flags_say and (tokens := start.position.samples * config.ctx_len) >= exit_tokens:
        # untrained weights would become rwkv-final.pth
        raise UserError(
            f"--epoch_begin {config.epoch_begin} begins after {tokens} tokens, and the training ends at {exit_tokens}: "
            "nothing would be trained; use --epoch_begin 0, or a larger --my_exit_tokens"
        )
    return Plan(
        config=config,
        launch=run,
        kernel=kernel,
        start=start,
        data=data,
        identity=identity,
        samples=packed(data.samples(vocab_size)),
        held_out=packed(validation) if validation is not None else None,
        token_ranges=data.check_token_range(vocab_size, SCAN_BYTES) if env.first_process() else None,
        batch=batch,
        schedule=Schedule(
            config.lr_init, config.lr_final, start.warmup_steps, exit_tokens, batch * config.ctx_len, config.lr_schedule, config.wsd_decay
        ),
        last_holder=holder,
    )


def checked(plan: Plan) -> Plan:
    """The plan, when the checksums of its training state are right, which the processes read together; else one that begins before it.

    Collective. Raises UserError when processes do not see the same files, or other data under one name: each would
    train on samples of its own order, or wait in a validation that others do not make.
    """
    held_out = 0 if plan.held_out is None else len(plan.held_out)
    data = ranks.gather((plan.data.order, *((part["tokens"], part["documents"]) for part in plan.identity), held_out))
    if others := [number for number, seen in enumerate(data) if seen != data[0]]:
        raise UserError(
            f"--data_file {plan.config.data_file} holds other data, or has others held out, "
            f"for rank {others[0]} than for rank 0; copy the same files to all nodes"
        )
    damaged: list[Path] = []
    looks = 0
    while True:
        starts = ranks.gather(str(plan.start))  # first: only those that have a state read its checksums, which is collective too
        if len(set(starts)) > 1:
            # another run, begun at the same moment, has put its files there
            ranks.together(lambda: refuse_if_held(plan.proj_dir) if ranks.rank() == 0 else None)
            if looks == LOOKS:
                raise UserError(
                    f"processes begin at different places ({starts[0]}; "
                    f"{next(s for s in starts if s != starts[0])}); --proj_dir must be shared by all nodes"
                )
            looks += 1
            time.sleep(BETWEEN_LOOKS)
            plan = make_plan(plan.config, damaged)
            continue
        state = plan.start.state
        if state is None or not (problem := check(state)):
            return plan
        say_damaged(state.path, problem)
        damaged.append(state.path)
        plan = make_plan(plan.config, damaged)


def decide_precision(config: TrainConfig, run: Launch, start: Start) -> str:
    """What --precision auto means: as the run began, on a GPU bf16 where it has that, on a CPU the measured faster of bf16 and fp32.

    Processes must agree: the first one measures and hands its answer on to those that it starts.
    """
    if config.precision != "auto":
        return config.precision
    if start.state is not None:
        return start.state.meta["precision"]
    if run.accelerator == "gpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"
    if not env.decided_precision():
        if started_apart(run):
            raise UserError(
                "--precision auto cannot be decided by processes of several nodes or of a launcher, which might differ; "
                "give --precision bf16 or fp32"
            )
        env.hand_on_precision("bf16" if bf16_is_faster() else "fp32")
    return env.decided_precision()


def check_data(config: TrainConfig) -> tuple[TrainConfig, Mixture]:
    """The training data, and the settings with the vocabulary that the data define, if they do and none is given."""
    if not config.data_file:
        raise UserError("--data_file is missing; give the path without .bin/.idx of a pair made by make_data.py")
    data = open_mixture(config.data_file, config.ctx_len, config.magic_prime, FORMATS[config.data_type])
    if env.first_process() and (text := data.parts[0].data.tokenizer_json()):
        path = Path(config.proj_dir) / TOKENIZER
        if path.exists() and path.read_text(encoding="utf-8") != text:  # its tokens mean other characters
            raise UserError(
                f"--data_file {config.data_file} has other characters than {path}, with which this run began; use another --proj_dir"
            )
    return replace(config, vocab_size=config.vocab_size or data.parts[0].data.vocab_size), data


def check_folder(config: TrainConfig) -> None:
    """UserError where proj_dir, or its state/, or the folder where they would be made, cannot be written to.

    They are made with the first file in them: a refused run leaves nothing.
    """
    folder = Path(config.proj_dir)
    states = folder / "state"
    try:
        str(folder).encode()
        try_folder(folder)
        # asked and not tried: a finished run stays as it is, dates included
        if nearest(states) == states and not os.access(states, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError("its state/ may not be read or not be written")
    except UnicodeEncodeError:
        raise UserError(f"--proj_dir {folder}: PyTorch opens no file in a folder whose name is not UTF-8; choose another one") from None
    except OSError as error:
        raise UserError(
            f"--proj_dir {folder} cannot be written: {error.strerror or error}; choose another folder or change its permissions"
        ) from None


def _held_out(config: TrainConfig, data: Mixture, vocab_size: int) -> Samples | None:
    """--val_file, else the DATA_FILE.val that exist, else none."""
    if config.val_file:
        weights = prefixes(config.val_file, "--val_file")
        if any(weights.values()):
            raise UserError(
                f"--val_file {config.val_file}: held-out files are read one after the other, and have no weights; leave them out"
            )
        found = list(weights)
    else:
        found = [val for part in data.parts if idx_path(val := f"{part.data.prefix}.val").is_file()]
    files = [data.parts[0].data.like(prefix) for prefix in found]
    for file in files:
        file.check_token_range(vocab_size, SCAN_BYTES)
    return held_out(files, config.ctx_len, vocab_size) if files else None
