"""An estimate of the memory that a training process will take: counted from sizes, with the activations of a block measured on one.

Terms, for P trained parameters of A in all, W processes, b bytes of a parameter (what each strategy keeps:
train/optimizer.py, DeepSpeed 0.19):

    parameters   b A; ZeRO-3: b A / W, and those that are gathered at a time, up to LIVE numbers
    gradients    b P, of several micro batches 4 P; DDP: its buckets too, b P; the optimizer in plain PyTorch copies them, 4 P.
                 ZeRO-1: 4 P, and in bf16 b P.  ZeRO-2, 3: 4 P / W, and the reduction's bucket
    optimizer    fp32: 8 P, bf16: 12 P; ZeRO: 12 P / W, in both precisions
    activations  what the forward pass keeps for the backward pass: of a token in a block, and of a token outside the blocks; with
                 --grad_cp the blocks' inputs and one block, on a CPU also HOLES of each block
    graphs       CUDA graphs: gradients where they are written, b P of the blocks, and in each block those of x and v_first
    head         its gradient, summed in fp32, and the logits of a chunk of tokens
    saving       on a CPU: the copy that is written while training goes on, 12 P / W and 2 A (weights, the first process)
    snapshots    on a CPU: those that --spike_guard goes back to, 12 P each; ZeRO: 12 P / W (on a GPU they lie in the host's
                 memory, which is not counted)
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .. import models
from ..config import HybridConfig, ModelConfig, TrainConfig
from ..config.volume import volume
from .freeze import freeze
from .health import SNAPSHOTS
from .strategy import Launch, param_dtype

PROBED_TOKENS = 64
LOGITS = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes: what cuda/loss/head_ce.cpp keeps; a chunk's logits by ops/cross_entropy/chunked.py
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters
HOLES = 1 / 4  # of a block, between the inputs kept by --grad_cp, in glibc's heap: records/2026-11-29-cpu-memory
FULL = 0.9  # of the memory that is there, at most


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. program: libraries and the like, on a CPU only."""

    program: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    graphs: int
    head: int
    saving: int
    snapshots: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {volume(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name))
        return f"{volume(self.total)} ({parts})"


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass for each token: in one block (of a hybrid: on average over its blocks), and outside the blocks."""

    block: float
    outside: float


@dataclass(eq=False)
class _Saved:
    """What autograd saves in place of a tensor: it ends with the part of the graph that saved it, which a model may drop on the way."""

    tensor: torch.Tensor


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def measure_activations(sizes: ModelConfig, config: TrainConfig, device: torch.device) -> Activations:
    """From forward passes of two and of three blocks of the real width over a few tokens: what autograd saves, each storage once.

    Of a hybrid a block of either kind is added to one of both; a window is taken for as narrow as it would be in the
    run: shorter than the text or not.
    """

    def of_a_token(**layers: object) -> float:
        with torch.device("meta"):  # at real widths drawing initial values would take minutes
            model = models.build(sizes.with_(vocab_size=256, **layers)).to(param_dtype(config))
        own = model.to_empty(device=device).state_dict().values()
        for tensor in own:
            tensor.zero_()
        places = {tensor.untyped_storage().data_ptr() for tensor in own}

        def saved(tokens: int) -> int:
            alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

            def note(tensor: torch.Tensor) -> _Saved:
                alive.add(saved := _Saved(tensor))
                return saved

            with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
                kept = model.features(torch.zeros(1, tokens, dtype=torch.int64, device=device))
            storages = {storage.data_ptr(): storage.nbytes() for storage in (saved.tensor.untyped_storage() for saved in alive)}
            del kept
            return sum(nbytes for place, nbytes in storages.items() if place not in places)

        return (saved(2 * PROBED_TOKENS) - saved(PROBED_TOKENS)) / PROBED_TOKENS

    if not isinstance(sizes, HybridConfig):
        two, three = (of_a_token(n_layer=depth) for depth in (2, 3))
        return Activations(three - two, two - 2 * (three - two))
    window = PROBED_TOKENS // 2 if 0 < sizes.attention_window < config.ctx_len else 0
    both, more_attention, more_time_mixing = (
        of_a_token(n_layer=depth, attention_layers=layers, attention_window=window) for depth, layers in ((2, "1"), (3, "1,2"), (3, "2"))
    )
    attention, time_mixing = more_attention - both, more_time_mixing - both
    share = len(sizes.attention) / sizes.n_layer
    return Activations(share * attention + (1 - share) * time_mixing, both - attention - time_mixing)


def trained(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def estimate(sizes: ModelConfig, config: TrainConfig, run: Launch, activations: Activations, program: int, copies: bool = False) -> Memory:
    """Of each process. program: its bytes before there is a model; copies: whether the optimizer copies gradients (outside DeepSpeed)."""
    with torch.device("meta"):
        model = models.build(sizes)
    freeze(model, config.freeze)
    A, P, in_blocks = models.count_parameters(model), trained(model), trained(model.blocks)
    C, V, W, b = sizes.n_embd, sizes.vocab_size, run.world_size, param_dtype(config).itemsize
    stage = int(run.strategy.split("_")[2]) if run.strategy.startswith("deepspeed") else 0
    cpu, offload = run.accelerator == "cpu", run.strategy.endswith("_offload")
    tokens = config.micro_bsz * config.ctx_len

    bucket = min(P, config.ds_bucket_mb * 1_000_000)
    each = (b if config.accumulate_grad_batches == 1 else 4) * P
    gradients = {0: each + b * P * (W > 1), 1: 4 * P + (b * P if b == 2 else 0), 2: 4 * P // W + b * bucket, 3: 4 * P // W + b * bucket}[
        stage
    ]
    optimizer = 12 * P // W if stage else (8 if b == 4 else 12) * P
    kept = activations.outside * tokens
    if config.grad_cp:
        kept += sizes.n_layer * C * b * tokens + activations.block * tokens
        if cpu:  # what lies between the inputs that are kept comes back to the heap in pieces
            kept += HOLES * sizes.n_layer * activations.block * tokens
    else:
        kept += (sizes.n_layer + 0.5) * activations.block * tokens  # the backward pass of a block needs some room of its own
    logits = 2 * 4 * V * config.head_chunk
    if cpu or not config.head_chunk:
        logits = max(logits, LOGITS["cpu" if cpu else "cuda"])
    head = (4 + b) * V * C + b * C * tokens + min(logits, 2 * 4 * V * tokens)
    if copies and not stage:
        gradients += max(0, 4 * P - int(kept) - head)  # made when the activations are gone
    return Memory(
        program=program if cpu else 0,
        parameters=b * A // W + b * min(A, LIVE) if stage == 3 else b * A,
        gradients=gradients,
        optimizer=0 if offload and not cpu else optimizer,
        activations=int(kept),
        graphs=b * (in_blocks + 2 * sizes.n_layer * C * tokens) if config.cuda_graphs else 0,
        head=head,
        saving=12 * P // W + 2 * A if cpu else 0,
        snapshots=SNAPSHOTS * 12 * P // (W if stage else 1) if cpu and config.spike_guard else 0,
    )
