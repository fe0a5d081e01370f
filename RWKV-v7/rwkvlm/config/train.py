"""Every flag of train.py: one typed, documented field each. The command line is generated from this class.

Names and defaults follow the official trainer (RWKV-LM, RWKV-v7/train_temp/train.py) so that its scripts run unchanged;
flags of our own are in the last group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from .errors import UserError
from .kinds import OWNERS, config_type
from .model import MODEL_TYPES, UNUSED, ModelConfig
from .phantom import ACTIVATIONS, TTT_KINDS, TTT_TARGETS, core_ratio_of
from .rosa import GRADS

PRECISIONS = ("auto", "fp32", "tf32", "fp16", "bf16")
STRATEGIES = (
    "auto",
    "ddp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
)
DATA_TYPES = ("binidx", "numpy", "utf-8", "bytes")
LR_SCHEDULES = ("cosine", "wsd", "constant")
KERNELS = ("", "auto", "cuda", "cpu", "torch", "@rwkv3")
MINI_EPOCH = 40320  # samples in an official mini-epoch


def flag(
    default: Any, help: str, choices: tuple | None = None, least: int | None = None, of: str = "", idle: str = "", unset: str = ""
) -> Any:
    """A flag with its default and its line in --help.

    choices, least: what is accepted. of: the one of kinds.OWNERS whose flag it is, if it is not everybody's. idle: why it is accepted
    and changes nothing. unset: what --help gives as the default, where the field's own only means "not given".
    """
    help = f"{of}: {help}" if of else help
    return field(default=default, metadata=dict(help=help, choices=choices, least=least, of=of, idle=idle, unset=unset))


def no_effect(why: str) -> Any:
    return flag(0, f"no effect: {why}", idle=why)


of_phantom, of_hybrid, of_rosa = (partial(flag, of=name) for name in OWNERS)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    Raises UserError naming the flag, its value and the cure.
    """

    # files
    load_model: str = flag("", 'weights to start from, a .pth file ("" or "0": none; train_stage 2 and 3 find the newest in proj_dir)')
    proj_dir: str = flag("out", "folder of this run: checkpoints, logs, training state")
    data_file: str = flag(
        "",
        "prefix of the training data, DATA_FILE.bin and DATA_FILE.idx; several are mixed: A:0.7,B:0.3, or A,B in proportion to their sizes",
    )
    data_type: str = flag(
        "binidx",
        "format of the training data; other than binidx, DATA_FILE is a file: a .npy of tokens, a text by characters, anything by bytes",
        DATA_TYPES,
    )
    load_partial: int = flag(0, "1: parameters missing in load_model keep their initial values instead of being an error", choices=(0, 1))
    freeze: str = flag("", "parts of the model that are not trained, by name, separated by commas: emb,head or blocks.0,blocks.*.ffn")
    train_stage: int = flag(
        0, "1: write rwkv-init.pth and stop; 2 or 3: train, resuming from what proj_dir holds; 0: train from load_model or from scratch"
    )

    # model
    my_testing: str = flag("x070", "model type", (*MODEL_TYPES, "x070_phantom"))
    vocab_size: int = flag(0, "vocabulary size; 0: from the checkpoint, else 65536", least=0)
    n_layer: int = flag(0, "number of blocks; 0: from the checkpoint, else 6", least=0)
    n_embd: int = flag(0, "width; 0: from the checkpoint, else 512", least=0)
    dim_att: int = flag(0, "width of time mixing; must equal n_embd; 0: n_embd", least=0)
    dim_ffn: int = flag(0, "hidden size of channel mixing; 0: from the checkpoint, else 4 * n_embd", least=0)
    head_size: int = flag(0, "channels per head: 16, 32, 64 or 128; 0: from the checkpoint, else 64", least=0)
    rank_w: int = flag(0, "low rank of the decay; 0: from the checkpoint, else derived from n_embd")
    rank_a: int = flag(0, "low rank of the in-context learning rate; 0: found like rank_w")
    rank_v: int = flag(0, "low rank of the value residual; 0: found like rank_w")
    rank_g: int = flag(0, "low rank of the gate; 0: found like rank_w")

    # Phantom (--my_testing phantom); -1 and "": from the checkpoint, else the default in [config/phantom.py]
    core_ratio: float = of_phantom(
        -1.0, "share of each large matrix's rows that are trained in full, in (0, 1]; 1: no Ghost layers", unset="0.2"
    )
    ghost_ratio: float = of_phantom(-1.0, "1 - core_ratio")
    core_ratios: str = of_phantom("", "other core ratios for some matrices: ffn.key=1,att.output=0.5")
    ghost_activation: str = of_phantom("", "between core and ghost", ("", *ACTIVATIONS), unset="identity")
    ttt_enabled: int = of_phantom(-1, "1: test-time training, 0: none", unset="1")
    ttt_kind: str = of_phantom("", "steps on the wkv state, or a memory beside it", ("", *TTT_KINDS), unset="state")
    ttt_lr: float = of_phantom(-1.0, "first step size per token, learned from there", unset="0.01 (memory: 0.5)")
    ttt_features: int = of_phantom(-1, "features of each key of the memory: 16, 32, 64 or 128", unset="twice head_size, at most 128")
    ttt_chunk: int = of_phantom(-1, "tokens between two steps on the state, a multiple of 16", unset="64")
    ttt_steps: int = of_phantom(-1, "steps at each segment's end", unset="1")
    ttt_core_ratio: float = of_phantom(-1.0, "share of the state's value rows that are stepped on", unset="0.25")
    ttt_head: int = of_phantom(-1, "1: a prediction head in the inner loss", unset="1")
    ttt_target: str = of_phantom(
        "", "what a key shall recall: what the delta rule has stored, or the value", ("", *TTT_TARGETS), unset="stored"
    )
    ttt_anchor: float = of_phantom(-1.0, "pull towards the state before the steps; without effect when ttt_steps is 1", unset="0.01")
    ttt_second_order: int = of_phantom(-1, "1: the loss is differentiated through the inner gradient", unset="1")
    ttt_meta: int = of_phantom(-1, "1: adds the inner loss on the segment after each step to the loss", unset="0")
    ttt_loss_weight: float = of_phantom(-1.0, "weight of ttt_meta's term", unset="0.1")
    max_depth_iter: int = of_phantom(-1, "passes through each block with the same weights", unset="1")
    dropout: float = of_phantom(-1.0, "share of each branch's outputs set to zero in training", unset="0")
    layer_norm_eps: float = of_phantom(-1.0, "epsilon of the LayerNorms", unset="1e-5")

    # hybrid (--my_testing hybrid); -1 and "": from the checkpoint, else the default in [config/hybrid.py]
    attention_layers: str = of_hybrid(
        "", "blocks with attention in the place of time mixing, from 1 on: 3,7,11, or 1/4: the last of each four", unset="1/4"
    )
    attention_kv_heads: int = of_hybrid(-1, "heads of keys and values, a divisor of the number of heads; 0: as many", unset="0")
    attention_window: int = of_hybrid(-1, "tokens that a token's attention sees, which bounds the memory of generation; 0: all", unset="0")
    # ROSA (--my_testing x080 and rosa); -1 and "": from the checkpoint, else the default in [config/rosa.py]
    rosa_bits: int = of_rosa(-1, "channels that make a symbol together, 1 or 4", unset="4")
    rosa_grad: str = of_rosa(
        "",
        "gradient of a bit: exact, by flipping it, or a soft surrogate, of which a tenth reaches the residual stream; "
        "none: q, k and v stay as they are, for less time",
        ("", *GRADS),
        unset="flip",
    )
    rosa_tau: float = of_rosa(-1.0, "least size of an activation in the gradient of its bit", unset="0.1")
    deep_embed: int = of_rosa(-1, "1: channel mixing's output is multiplied by a learned vector of each token (DeepEmbed)", unset="0")

    # batches and their order
    ctx_len: int = flag(1024, "tokens per sample", least=1)
    micro_bsz: int = flag(12, "samples per device and step", least=1)
    accumulate_grad_batches: int = flag(1, "micro batches per optimizer step", least=1)
    doc_reset: int = flag(
        0,
        "1: state and token shift begin anew with each document of the data (officially only with each sample); not with ttt_meta",
        choices=(0, 1),
    )
    magic_prime: int = flag(0, "prime that orders the samples; 0: computed from data_file and ctx_len", least=0)
    my_exit_tokens: int = flag(0, "tokens at which the schedule and the training end; 0: one pass over the data", least=0)
    epoch_begin: int = flag(0, "first mini-epoch; found by itself with train_stage 2 or 3", least=0)
    epoch_save: int = flag(5, "save rwkv-{n}.pth every so many mini-epochs; 0: only at the end", least=0)
    random_seed: int = flag(-1, "seed of the initial weights, and of dropout; -1: new weights each time, their seed printed", least=-1)

    # optimizer and schedule
    lr_init: float = flag(6e-4, "learning rate after warm-up", least=0)
    lr_final: float = flag(1e-5, "learning rate at my_exit_tokens", least=0)
    lr_schedule: str = flag(
        "cosine",
        "from lr_init to lr_final: cosine all along, wsd: lr_init until the last wsd_decay of the tokens; constant: lr_init to the end",
        LR_SCHEDULES,
    )
    wsd_decay: float = flag(0.2, "share of my_exit_tokens over which --lr_schedule wsd falls to lr_final")
    warmup_steps: int = flag(-1, "optimizer steps of linear warm-up; -1: 10 when resuming from a .pth, else 0", least=-1)
    beta1: float = flag(0.9, "Adam beta1")
    beta2: float = flag(0.99, "Adam beta2")
    adam_eps: float = flag(1e-18, "Adam epsilon", least=0)
    weight_decay: float = flag(0.0, "decoupled weight decay, on the large matrices only", least=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping", least=0)

    # machine
    accelerator: str = flag("auto", "auto, gpu or cpu")
    devices: str = flag("auto", "devices (or CPU processes) per node; auto: all GPUs, or one CPU process")
    num_nodes: int = flag(1, "number of nodes", least=1)
    precision: str = flag(
        "bf16",
        "number format of weights and activations (bf16, fp16: with fp32 master weights); auto: the faster of bf16 and fp32 here",
        PRECISIONS,
    )
    strategy: str = flag("auto", "how the training is spread over devices", STRATEGIES)
    grad_cp: int = flag(
        0, "1: recompute activations in the backward pass (less memory, slower); -1: only where the memory would not be enough otherwise"
    )
    compile: int = flag(
        0, "1: the blocks through torch.compile; not with deepspeed_stage_3, test-time training and plain PyTorch's wkv7", choices=(0, 1)
    )
    cuda_graphs: int = flag(
        0,
        "1: each block's forward and backward pass as a CUDA graph, so that a small model on a GPU does not wait for Python; "
        "takes more memory; not with doc_reset, deepspeed_stage_3, dropout and ttt_meta; "
        "-1: where it helps, on one GPU, and compared with the blocks as they are",
    )
    head_chunk: int = flag(0, "tokens per chunk of head and loss; 0: chosen here (logits are never whole in memory)", least=0)
    kernel: str = flag(
        "",
        "native kernels (cuda, cpu) or plain PyTorch (torch), with an error where that cannot run; "
        '"" (as RWKV_KERNEL says, if set), auto and @rwkv3: the best there is',
        KERNELS,
    )
    check_kernels: int = flag(1, "0: the kernels are not compared with plain PyTorch before the first step", choices=(0, 1))
    ds_bucket_mb: int = flag(200, "DeepSpeed bucket size in MB", least=1)

    # logs
    wandb: str = flag("", "Weights & Biases project; without a login the run is logged offline")
    tensorboard: int = flag(0, "1: also log for TensorBoard, into proj_dir/tensorboard", choices=(0, 1))
    enable_progress_bar: bool = flag(True, "show a progress bar")

    # ours
    epoch_samples: int = flag(MINI_EPOCH, "samples per mini-epoch (officially 40320)", least=1)
    save_steps: int = flag(0, "save the full training state every so many optimizer steps; 0: at the end of each mini-epoch", least=0)
    save_minutes: float = flag(0.0, "also save the full training state after so many minutes; 0: no", least=0)
    keep_last: int = flag(2, "number of training states kept", least=1)
    val_file: str = flag("", "prefix of held-out data, several separated by commas; default: DATA_FILE.val, where it exists")
    val_every: int = flag(0, "optimizer steps between validations; 0: at the end of each mini-epoch", least=0)
    val_batches: int = flag(16, "batches of micro_bsz samples, over all devices, per validation", least=1)
    dry_run: bool = flag(
        False,
        "only tell what the run would be: parameters, memory of each process, steps, and after a short probe the time; trains nothing",
    )
    max_steps: int = flag(0, "stop after so many optimizer steps of this run, saving the training state; 0: no limit", least=0)
    max_skips: int = flag(
        10,
        "stop, with a diagnosis, after so many steps in a row whose loss or gradient is not finite (each is skipped) "
        "or that spike_guard undid",
        least=1,
    )
    spike_guard: float = flag(
        0.0,
        "undo a step whose loss lies so many standard deviations above its running mean, and leave out its samples; 0: off; try 8",
        least=0,
    )
    spike_snapshot: int = flag(100, "optimizer steps between the copies in host memory (two) that spike_guard goes back to", least=1)
    dist_timeout: float = flag(1800.0, "seconds after which a collective operation with a silent rank gives up")

    # accepted for older scripts, without effect
    epoch_steps: int = no_effect("follows from epoch_samples and the batch")
    epoch_count: int = no_effect("the end is set by my_exit_tokens")
    my_pile_stage: int = flag(0, "older name of train_stage")
    my_pile_edecay: int = no_effect("the decay of the learning rate follows my_exit_tokens")
    pre_ffn: int = no_effect("not part of RWKV-7")
    head_qk: int = no_effect("not part of RWKV-7")
    head_size_a: int = flag(0, "older name of head_size")
    local_rank: int = flag(-1, "what the deepspeed launcher adds to every command; its variables say the same")

    def __post_init__(self) -> None:
        self._rename("my_pile_stage", "train_stage")
        self._rename("head_size_a", "head_size")
        if self.my_testing == "x070_phantom":
            object.__setattr__(self, "my_testing", "phantom")
        if self.load_model == "0":
            object.__setattr__(self, "load_model", "")
        for f in fields(self):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices == (0, 1) and value not in choices:
                raise UserError(f"--{f.name} {value} is not known; use 0 or 1")
            if choices and value not in choices:
                shown = ", ".join(c or '""' for c in choices)
                raise UserError(f"--{f.name} {value!r} is not known; choose one of: {shown}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name} {value} is not a finite number")
            if least is not None and value < least:
                raise UserError(f"--{f.name} {value} must be at least {least}")
        if not 0 < self.dist_timeout <= 1e8:  # torch's timers overflow far beyond that
            raise UserError(f"--dist_timeout {self.dist_timeout:g} must be above 0 and at most 1e8 seconds")
        if self.train_stage not in (0, 1, 2, 3):
            raise UserError(f"--train_stage {self.train_stage} is not known; use 0 (begin a run), 1 (write rwkv-init.pth), 2 or 3 (train)")
        if self.grad_cp not in (-1, 0, 1):
            raise UserError(f"--grad_cp {self.grad_cp} is not known; use 0, 1, or -1 (decided by the memory there is)")
        if self.cuda_graphs not in (-1, 0, 1):
            raise UserError(f"--cuda_graphs {self.cuda_graphs} is not known; use 0, 1, or -1 (where it helps)")
        if not 0 < self.wsd_decay <= 1:
            raise UserError(f"--wsd_decay {self.wsd_decay} must lie in (0, 1]: a share of the training")
        for name in ("lr_init", "lr_final"):
            if getattr(self, name) > 1:
                raise UserError(f"--{name} {getattr(self, name):g} must be at most 1: a usual one is 6e-4")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must lie in [0, 1)")
        if self.accelerator not in ("auto", "gpu", "cuda", "cpu"):
            raise UserError(f"--accelerator {self.accelerator!r} is not known; choose one of: auto, gpu, cpu")
        if self.devices != "auto" and not (self.devices.isdecimal() and int(self.devices) >= 1):
            raise UserError(f"--devices {self.devices!r} is not a number of devices; use auto, 1, 2, ...")
        if self.dim_att and self.n_embd and self.dim_att != self.n_embd:
            raise UserError(
                f"--dim_att {self.dim_att} differs from --n_embd {self.n_embd}; "
                f"--my_testing {self.my_testing} needs them equal (leave dim_att out)"
            )

    def _rename(self, old: str, new: str) -> None:
        if getattr(self, old):
            if getattr(self, new) and getattr(self, new) != getattr(self, old):
                raise UserError(f"--{old} {getattr(self, old)} and --{new} {getattr(self, new)} contradict each other; give only --{new}")
            object.__setattr__(self, new, getattr(self, old))

    def own_settings(self) -> dict[str, Any]:
        """Those fields of the model type's own config (PhantomConfig, ...) that flags were given for."""
        kind = config_type(self.my_testing)
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if (of := f.metadata["of"]) and OWNERS[of][0] is kind and getattr(self, f.name) != f.default
        }
        ratio = core_ratio_of(given.get("core_ratio"), given.pop("ghost_ratio", None))
        for name in given:
            if isinstance(getattr(kind, name), bool):
                if given[name] not in (0, 1):
                    raise UserError(f"--{name} {given[name]} is not known; use 0 or 1")
                given[name] = bool(given[name])
        return given if ratio is None else given | {"core_ratio": ratio}

    def own_without_effect(self, model: ModelConfig) -> list[str]:
        """As flags_without_effect, for those of the model's own type, which are known when the model is: a checkpoint may decide it."""
        return [
            f"--{name} {int(value) if isinstance(value, bool) else value} has no effect: {reason}"
            for name, value in self.own_settings().items()
            if (reason := model.idle(name))
        ]

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def flags_without_effect(self) -> list[str]:
        """One line for each flag that was given but changes nothing, with the reason."""
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return [
            f"--{f.name} {getattr(self, f.name)} has no effect: {reason}"
            for f in given
            if (reason := f.metadata["idle"] or self._idle(f.name, f.metadata["of"]))
        ]

    def _idle(self, name: str, of: str) -> str:
        """Why a flag has no effect beside the others; "" where it may have one."""
        if of and OWNERS[of][0] is not config_type(self.my_testing):
            return f"--my_testing {self.my_testing} has {OWNERS[of][1]}"
        if name in UNUSED.get(self.my_testing, ()):
            return f"--my_testing {self.my_testing} has no heads and no low ranks"
        if name == "ds_bucket_mb" and not self.strategy.startswith("deepspeed"):
            return f"--strategy {self.strategy} is not DeepSpeed's"
        if name == "lr_final" and self.lr_schedule == "constant":
            return "--lr_schedule constant stays at lr_init"
        if name == "wsd_decay" and self.lr_schedule != "wsd":
            return f"--lr_schedule is {self.lr_schedule}"
        if name == "spike_snapshot" and not self.spike_guard:
            return "--spike_guard is off"
        if name == "load_partial" and not self.load_model and self.train_stage < 2:
            return "there is no --load_model"
        return ""
