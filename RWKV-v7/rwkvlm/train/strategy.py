"""How a run is spread over devices: settings for the Lightning Trainer, DeepSpeed's configuration, ZeRO on the CPU.

    launch(config) -> Launch(accelerator, devices, num_nodes, strategy)    what "auto" means here; world_size
    make_strategy(config) -> Strategy                                      Trainer(strategy=...)
    lightning_precision(config) -> str                                     Trainer(precision=...)
    param_dtype(config) -> torch.dtype                                     cast the model to it before training starts

The model is built whole in every process (never under zero.Init, which loses in-place edits of initial values); ZeRO-3 partitions it
when training starts. bf16 is bf16 parameters and activations with fp32 masters, moments and gradient sums everywhere: never autocast.
config.precision must be resolved ("auto" is the caller's to decide).
"""

from __future__ import annotations

import atexit
import io
import logging
import os
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

from ..checkpoint import ranks
from ..config import TrainConfig, UserError, env
from ..config.errors import pip_install

# seconds: processes may take long to come, to build kernels and to read their files; --dist_timeout counts from the first step
START_TIMEOUT = 1800.0
CPU_PROCESS = 1 << 28  # bytes, at least: libraries alone
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Launch:
    """accelerator: "gpu" or "cpu"; devices: processes per node; strategy: as flag, with "auto" decided."""

    accelerator: str
    devices: int
    num_nodes: int
    strategy: str

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")


def launch(config: TrainConfig) -> Launch:
    """What accelerator, devices and strategy mean on this machine and under this launcher. Raises UserError for what is not there."""
    gpus = torch.cuda.device_count()
    accelerator = {"auto": "gpu" if gpus else "cpu", "cuda": "gpu"}.get(config.accelerator, config.accelerator)
    if accelerator == "gpu" and not gpus:
        raise UserError(
            f"--accelerator {config.accelerator}: PyTorch sees no GPU here; use --accelerator cpu, or install a CUDA build of torch"
        )
    by_variables, launched = env.launched_by_variables(), launched_here()
    nodes = env.launched_nodes() if by_variables else _nodes_of_srun()
    devices = int(config.devices) if config.devices != "auto" else launched or (gpus if accelerator == "gpu" else 1)
    if accelerator == "gpu" and gpus < launched == devices:
        raise UserError(
            f"the launcher started {launched} processes on this node, and this one sees {gpus} GPU{'s' * (gpus > 1)}; "
            "let each see all of them (SLURM: --gpus-per-node in place of --gpus-per-task and --gpu-bind), "
            f"or start {gpus}"
        )
    if accelerator == "gpu" and devices > gpus:
        raise UserError(f"--devices {devices}: this machine has {gpus} GPU{'s' * (gpus > 1)}; use --devices {gpus} or auto")
    if accelerator == "cpu" and devices > (most := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // CPU_PROCESS):
        raise UserError(
            f"--devices {devices}: without a GPU these are processes, "
            f"and this machine's memory has no room for more than {most}; use --devices 1, 2, ..."
        )
    if launched and launched != devices:
        raise UserError(
            f"--devices {devices}, but the launcher started {launched} processes on this node; make them equal or leave --devices out"
        )
    if nodes and nodes != config.num_nodes:
        raise UserError(f"--num_nodes {config.num_nodes}, but the launcher started processes on {nodes} nodes; use --num_nodes {nodes}")
    if by_variables and (processes := env.launched_processes()) != devices * config.num_nodes:
        raise UserError(
            f"{devices} device{'s' * (devices > 1)} on --num_nodes {config.num_nodes}, but WORLD_SIZE={processes} is set, "
            "as by a launcher of so many processes; make them equal, or unset RANK, LOCAL_RANK and WORLD_SIZE: "
            "then this one starts the others"
        )
    if not by_variables and not nodes and config.num_nodes == 1 and (node := env.node_rank()):
        raise UserError(
            f"NODE_RANK={node} is set, but of --num_nodes 1 the only one is 0; unset NODE_RANK, or give --num_nodes (the scripts: N_NODE)"
        )
    strategy = config.strategy
    if strategy == "auto" and devices * config.num_nodes > 1:
        strategy = "ddp"
    return Launch(accelerator, devices, config.num_nodes, strategy)


def launched_here() -> int:
    """Processes that torchrun, deepspeed or srun started on this node; 0 when Lightning shall start them."""
    if env.launched_by_variables():
        return env.launched_per_node()
    return env.slurm_tasks_per_node() if SLURMEnvironment.detect() else 0


def _nodes_of_srun() -> int:
    """Nodes on which srun started the processes of this run; 0 when it has not. UserError: not as many on each as it said."""
    if not SLURMEnvironment.detect():
        return 0
    tasks, here = env.slurm_tasks(), env.slurm_tasks_per_node()
    if not here:
        raise UserError(f"srun started {tasks} tasks without saying how many on each node; give it --ntasks-per-node, also for one node")
    if tasks % here:
        raise UserError(f"srun started {tasks} tasks, not {here} on each node, as its --ntasks-per-node says; give it that option alone")
    return tasks // here


def started_apart(run: Launch) -> bool:
    """Whether the other processes of this run are not all started by its first one, which then cannot hand its decisions on to them."""
    return run.num_nodes > 1 or (run.world_size > 1 and (env.launched_by_variables() or launched_here() > 0))


def param_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of parameters and activations."""
    return DTYPES[config.precision]


def lightning_precision(config: TrainConfig) -> str:
    """Trainer(precision=...).

    Outside DeepSpeed Lightning shall do nothing: the model has param_dtype already, MasterAdamW has the masters.
    """
    if config.strategy.startswith("deepspeed"):
        return {"fp32": "32-true", "tf32": "32-true", "fp16": "16-true", "bf16": "bf16-true"}[config.precision]
    return "32-true"


def make_strategy(config: TrainConfig) -> Strategy:
    """The Lightning strategy; also sets the process-wide mode of fp32 matrix products (tf32 or exact)."""
    run = launch(config)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.precision == "fp16" and (run.accelerator == "cpu" or not run.strategy.startswith("deepspeed")):
        raise UserError("--precision fp16 needs a GPU and --strategy deepspeed_stage_1, 2 or 3 (it scales the loss); use --precision bf16")
    if run.strategy.startswith("deepspeed"):
        return _deepspeed(config, run)
    if run.strategy == "ddp":
        summing = config.accumulate_grad_batches > 1 and param_dtype(config) != torch.float32
        return (SummingDdp if summing else DDPStrategy)(**_distributed(config, run), broadcast_buffers=False)
    return SingleDeviceStrategy(torch.device("cuda", 0) if run.accelerator == "gpu" else torch.device("cpu"))


def _distributed(config: TrainConfig, run: Launch) -> dict:
    atexit.register(ranks.leave)
    return dict(
        process_group_backend="nccl" if run.accelerator == "gpu" else "gloo",
        timeout=timedelta(seconds=start_timeout(config)),
        # Where ranks come from. The deepspeed launcher sets torchrun's variables, but Lightning does not recognise it by itself.
        cluster_environment=TorchElasticEnvironment() if env.launched_by_variables() else None,
    )


def start_timeout(config: TrainConfig) -> float:
    """Seconds that a collective operation may take until the first step."""
    return max(config.dist_timeout, START_TIMEOUT)


class SummingDdp(DDPStrategy):
    """DDP that adds up micro batches in fp32 when parameters are bf16.

    DDP reduces gradients in the parameters' dtype. They are lifted to fp32 after every backward pass, and added up there; so each micro
    batch is reduced on its own.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._held: dict[torch.nn.Parameter, torch.Tensor] = {}

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        super().pre_backward(closure_loss)
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad_dtype = None  # bf16 from DDP, fp32 afterwards
                if p.grad is not None:
                    self._held[p], p.grad = p.grad, None

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        for p in self.model.parameters():
            if p.grad is not None:
                grad = p.grad.float()
                p.grad = self._held.pop(p).add_(grad) if p in self._held else grad

    def block_backward_sync(self):
        return nullcontext()


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy, with gradients that are averages over micro batches, and without what DeepSpeed prints."""

    def backward(self, *args, **kwargs) -> torch.Tensor:
        """Lightning divides the loss by the number of micro batches; DeepSpeed must not do it again (it would shift gradient clipping)."""
        return super().backward(*args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, *args, **kwargs):
        """Lightning's, but a step that DeepSpeed has skipped leaves no gradients behind.

        With the optimizer offloaded, 0.19.8 would add the next gradients to those that are not finite.
        """
        result = super().optimizer_step(*args, **kwargs)
        zero = self.deepspeed_engine.optimizer
        if getattr(zero, "overflow", False) and getattr(zero, "cpu_offload", False):
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        return result

    def _setup_model_and_optimizer(self, *args, **kwargs):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after its import, which sets it; skipped steps are told by Health
        with redirect_stdout(io.StringIO()):
            return super()._setup_model_and_optimizer(*args, **kwargs)


class CpuDeepSpeed(DeepSpeed):
    """DeepSpeed on CPU processes: Lightning's strategy without its check for CUDA. DeepSpeed itself needs DS_ACCELERATOR=cpu."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def _init_deepspeed_distributed(self) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling, for inference only
        super()._init_deepspeed_distributed()


def _deepspeed(config: TrainConfig, run: Launch) -> DeepSpeedStrategy:
    if run.accelerator == "cpu":
        env.use_deepspeed_on_cpu()
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--strategy {config.strategy}: {error.name} is not installed; run: {pip_install('deepspeed')}, or use --strategy ddp or auto"
        ) from error
    except Exception as error:  # its checks of CUDA, compilers and accelerators run at import
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--strategy {config.strategy}: deepspeed does not work here ({reason}); reinstall it, or use --strategy ddp or auto"
        ) from error
    settings = dict(config=deepspeed_config(config, run.accelerator), **_distributed(config, run))
    if run.accelerator == "gpu":
        return DeepSpeed(**settings)
    return CpuDeepSpeed(parallel_devices=[torch.device("cpu", i) for i in range(run.devices)], **settings)


def deepspeed_config(config: TrainConfig, accelerator: str) -> dict:
    """DeepSpeed's own configuration, as logged in train_log.txt. Buckets: ds_bucket_mb million elements, as officially.

    Lightning adds gradient_accumulation_steps.
    """
    bucket = config.ds_bucket_mb * 1_000_000
    zero = {
        "stage": int(config.strategy.split("_")[2]),
        "contiguous_gradients": True,
        "overlap_comm": accelerator == "gpu",
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": bucket,
        "reduce_bucket_size": bucket,
    }
    if config.strategy.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": accelerator == "gpu"}
        if zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": accelerator == "gpu"}
    settings = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": config.micro_bsz,
        "gradient_clipping": config.grad_clip,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif config.precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    return settings
