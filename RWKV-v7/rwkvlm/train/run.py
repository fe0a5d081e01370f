"""A whole run from its settings: plan, build, train, and the exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import closing, suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.strategies.launchers import subprocess_script

from ..checkpoint.ledger import publish_weights
from ..checkpoint.place import write_atomically
from ..checkpoint.pth import load_weights
from ..checkpoint.ranks import describe, rank, say, together
from ..checkpoint.state import set_aside
from ..config import TrainConfig, UserError, env
from ..config.errors import out_of_memory
from ..data.ahead import Ahead
from ..data.dataset import RankBatches
from ..data.mixture import Mixture
from ..data.tokenizer import TOKENIZER
from ..models import count_parameters
from .compiled import compile_blocks
from .conductor import Conductor
from .graphs import graph_blocks, try_graphs
from .hold import Hold, refuse_if_held
from .matmul import settle_fp32_products
from .module import TrainModule
from .network import choose_interface
from .plan import Plan, check_data, check_folder, make_plan
from .planner import dry_run, refuse_too_large, refuse_too_much
from .selfcheck import check_kernels
from .start import (
    FINAL_NAME,
    INIT_NAME,
    build_model,
    initial_weights,
    model_sizes,
    refuse_to_overwrite,
    tell_of_unused_weights,
    what_goes_on,
)
from .strategy import lightning_precision, make_strategy, param_dtype, start_timeout
from .watch import Watch


def run(config: TrainConfig) -> int:
    """Does what the settings ask for and returns the exit code. Raises UserError.

    0 at the last token or after max_steps, 128 + signal when stopped by one, 1 when memory has run out.
    """
    tell(config.flags_without_effect())
    if env.first_process() and not config.dry_run:
        with suppress(OSError):  # what cannot be written is refused in its turn
            refuse_if_held(Path(config.proj_dir))
    if config.train_stage == 1:
        return write_init(config)
    plan = make_plan(config)
    tell(config.own_without_effect(plan.start.model))
    if plan.finished and _final_weights_there(plan):
        say(
            f"this run is finished: {plan.proj_dir / FINAL_NAME} is there, {plan.tokens} of {plan.schedule.exit_tokens} "
            "tokens are done; nothing to do (a larger --my_exit_tokens trains longer)"
        )
        return 0
    if plan.held_out is None:
        for name in ("val_every", "val_batches"):
            if getattr(config, name) != getattr(TrainConfig, name):
                say(
                    f"--{name} {getattr(config, name)} has no effect: nothing is held out; "
                    f"give --val_file, or put {plan.data.parts[0].data.prefix}.val beside the data"
                )
    quiet()
    if config.dry_run:
        return dry_run(plan)
    strategy = make_strategy(plan.config)
    refuse_too_much(plan)
    settle_fp32_products(plan)
    return train(plan, strategy)


def _final_weights_there(plan: Plan) -> bool:
    """Whether they are there, as far as can be read.

    A file that holds no weights is set aside, but for --dry_run; they are then written again from what the run continues.
    """
    path = plan.proj_dir / FINAL_NAME
    if not (path.is_file() and os.access(path, os.R_OK)):
        return path.exists()
    try:
        load_weights(path)
    except UserError:
        if plan.config.dry_run:
            say(f"{path} is damaged; without --dry_run it is written again")
        elif env.first_process():
            aside = path.with_name(f"{FINAL_NAME}.damaged")
            os.replace(path, aside)
            say(f"{path} was damaged, is now {aside.name}, and is written again")
        return False
    return True


def tell(lines: list[str]) -> None:
    for line in lines:
        say(line)


def write_init(config: TrainConfig) -> int:
    """--train_stage 1: writes rwkv-init.pth. An untrained one that is there is replaced, a run that has begun is not touched.

    With dry_run everything is made and checked, and nothing written.
    """
    check_folder(config)
    refuse_to_overwrite(config)
    path = Path(config.load_model) if config.load_model else None
    data = None
    if config.data_file:
        config, data = check_data(config)
    if path is None:
        tell_of_unused_weights(config.proj_dir)
    sizes = model_sizes(config, path)
    if data is not None:
        data.check_token_range(sizes.vocab_size)
    tell(config.own_without_effect(sizes))
    if env.first_process():
        refuse_too_large(sizes)
        with closing(Hold(Path(config.proj_dir))) as hold:
            if not config.dry_run:
                hold.take()
                refuse_to_overwrite(config)  # what another process has put there in the meantime
            weights = initial_weights(config, sizes)
            if not config.dry_run:
                if data is not None:
                    save_tokenizer(config, data)
                publish_weights(config.proj_dir, INIT_NAME, weights)
        done = "would write" if config.dry_run else "wrote"
        print(
            f"{done} {config.proj_dir}/{INIT_NAME}: {sizes.model_type} L{sizes.n_layer} D{sizes.n_embd}, "
            f"{count_parameters(weights) / 1e6:.6f} M parameters"
        )
    return 0


def save_tokenizer(config: TrainConfig, data: Mixture) -> None:
    """For data that define their vocabulary; check_data has refused them where another one is there."""
    if env.first_process() and (text := data.parts[0].data.tokenizer_json()):
        Path(config.proj_dir).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.proj_dir) / TOKENIZER, text)


def train(plan: Plan, strategy: Strategy) -> int:
    config = plan.config
    if threads := env.share_threads(plan.launch.devices):
        torch.set_num_threads(threads)
    trainer = pl.Trainer(
        accelerator=plan.launch.accelerator,
        devices=plan.launch.devices,
        num_nodes=plan.launch.num_nodes,
        strategy=strategy,
        precision=lightning_precision(config),
        max_epochs=1,  # to Lightning the run is one epoch of exactly the batches that are left; mini-epochs are ours
        accumulate_grad_batches=config.accumulate_grad_batches,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning broadcasts a flag before every batch and waits for it; the Conductor's Agreement does this without waiting.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    # Its handler of SIGTERM, there before ours, would answer with a broadcast in the middle of whatever the processes are doing. Until the
    # first step there is nothing to save: a signal ends the process as usual, and the Watch the others.
    trainer._signal_connector.register_signal_handlers = lambda: None
    # Its observer kills everything, without a word, some seconds after a process that it started has ended; the Watch says which and why.
    subprocess_script._launch_process_observer = lambda processes: None
    watch = watch_over(trainer, config)
    hold = Hold(plan.proj_dir)
    conductor = Conductor(plan, watch, hold)
    trainer.callbacks.append(conductor)
    module = PlannedModule(plan, hold)
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module)
    except SystemExit as stop:  # what Lightning makes of a Ctrl-C before the first step; later ones are the Conductor's
        signal.signal(signal.SIGINT, before)  # Lightning has the next one ignored
        raise KeyboardInterrupt from stop
    except Exception as error:
        if watch is not None:
            watch.end(error)
        if not any(map(out_of_memory, (error, error.__cause__))):  # `together` makes a UserError of it
            raise
        print(
            f"error: out of memory: {describe(error)}; "
            f"--dry_run tells what fits (less --micro_bsz, or --grad_cp 1), and {what_goes_on(config)} goes on",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        conductor.close()
        hold.close()
    if watch is None:
        return conductor.exit_code
    watch.close()
    return 0 if watch.parent else conductor.exit_code  # the process that has started others speaks for them


def watch_over(trainer: pl.Trainer, config: TrainConfig) -> Watch | None:
    """The Watch of this process, begun, and the interface by which it meets the others; none when it trains alone."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one process alone has it too, in a group of its own
    if environment and trainer.num_nodes == 1 and not environment.creates_processes_externally:
        env.meet_on_this_machine()
    if trainer.world_size == 1:
        return None
    started_here = isinstance(environment, LightningEnvironment)
    if started_here and trainer.num_nodes > 1 and not env.meeting_place_given():
        raise UserError(
            f"--num_nodes {trainer.num_nodes}: no place to meet is given; set MASTER_ADDR (node 0), MASTER_PORT and NODE_RANK (0, 1, ...) "
            "on each node, or start them with torchrun or srun; for this machine alone leave --num_nodes out"
        )
    choose_interface(environment.main_address, trainer.num_nodes)
    if trainer.num_nodes > 1 and trainer.local_rank == 0:
        where = f"{environment.main_address}:{environment.main_port}"
        print(
            f"node {trainer.node_rank} waits for {trainer.num_nodes} nodes to meet at {where}, "
            f"{start_timeout(config) / 60:g} minutes at most",
            file=sys.stderr,
            flush=True,
        )
    if trainer.local_rank == 0:
        env.hand_on_starter()
    watch = Watch(
        config.dist_timeout,
        trainer.global_rank,
        trainer.local_rank,
        processes=lambda: getattr(trainer.strategy.launcher, "procs", ()),
        started=started_here and trainer.local_rank > 0,
        cure=f"{what_goes_on(config)} goes on from the last training state",
    )
    watch.start()
    return watch


class PlannedModule(TrainModule):
    """Builds model and data of a plan inside the processes that train, after they have been launched."""

    def __init__(self, plan: Plan, hold: Hold) -> None:
        super().__init__(plan.config)
        self.plan, self.hold = plan, hold

    def setup(self, stage: str) -> None:
        plan, start = self.plan, self.plan.start
        if plan.config.check_kernels and not plan.finished:
            together(lambda: check_kernels(start.model, param_dtype(plan.config), self.trainer.strategy.root_device))
        if start.fresh:
            self.hold.take(plan.last_holder)
            publish_weights(plan.proj_dir, INIT_NAME, initial_weights(plan.config, start.model) if rank() == 0 else {})
        self.attach(build_model(plan.config, start.model, start.path).to(param_dtype(plan.config)))
        self.hold.take(plan.last_holder)
        save_tokenizer(plan.config, plan.data)
        if start.state is None:
            set_aside(plan.proj_dir)
        seed = max(plan.config.random_seed, 0) * self.trainer.world_size + rank()
        torch.manual_seed(seed % 2**63)  # of dropout, other masks in each process; a state of as many processes has its own
        if plan.config.compile:
            compile_blocks(self.model, bool(plan.config.doc_reset), bool(plan.config.cuda_graphs))

    def on_train_start(self) -> None:
        """After the Conductor's, which loads the training state: the model lies where it stays."""
        config = self.plan.config
        if config.compile or self.trainer.should_stop:
            return
        batches = config.micro_bsz, config.ctx_len, bool(config.grad_cp)
        if config.cuda_graphs == 1:
            graph_blocks(self.model, *batches)
        elif config.cuda_graphs == -1:
            try:
                reason = try_graphs(self.model, *batches)
            except RuntimeError as error:
                raise UserError(
                    f"--cuda_graphs -1: the GPU has failed while CUDA graphs were tried: {describe(error)}; use --cuda_graphs 0"
                ) from error
            if reason:
                say(f"the blocks run without CUDA graphs: {reason}")

    def train_dataloader(self) -> Ahead:
        plan, trainer = self.plan, self.trainer
        steps = max(1, plan.steps)  # Lightning would skip an empty epoch with all its hooks, and a run may have only its last file to write
        batches = RankBatches(
            trainer.global_rank,
            trainer.world_size,
            plan.config.micro_bsz,
            steps * plan.config.accumulate_grad_batches,
            plan.start.position.samples,
        )
        return Ahead(plan.samples, batches, pin_memory=plan.launch.device.type == "cuda")


def quiet() -> None:
    """Silence what the libraries print on every start; their warnings are about choices that are made on purpose here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "deepspeed", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
