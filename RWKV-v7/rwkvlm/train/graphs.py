"""--cuda_graphs: the forward and the backward pass of each block as one CUDA graph each; and the settings with which that does not work.

A step of a small model waits for Python, which starts some forty kernels a block each way. A graph starts them with one
call. One for each block and direction, not one for all blocks: gradients are there block by block, so that DDP and
DeepSpeed send them while the next block runs, and what a call costs is 24 launches for 12 blocks.

A graph reads and writes the memory with which it was recorded. What a block gives lies where the next one reads it,
forwards and backwards: only the embedding's output, a ROSA's tokens and the gradient of the last block's output are
copied into their places. v_first goes through the blocks, so that the sum of its gradients is made inside, in the order
of autograd. Gradients of parameters are copied out: what autograd takes for `grad` and adds the next micro batch to
must not be overwritten by it (https://github.com/pytorch/pytorch/issues/181723).

All graphs have their memory in common, as on the way through the blocks one's is free when the other begins: they run
in the order in which they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..checkpoint.ranks import describe
from ..config import ModelConfig, PhantomConfig, TrainConfig, UserError
from ..models import LanguageModel
from .flops import flops_per_token, peak_flops
from .strategy import Launch

T = TypeVar("T")
WARM_UP = 3  # passes before a block is recorded, as in torch.cuda.make_graphed_callables
# seconds of a block's arithmetic at the GPU's peak, up to which graphs are tried: its kernels take twice that or more,
# the host 1.2 to 2.3 ms (records/2026-11-26-gpu, -28-cpp-launch)
SHORT = 1e-3
LIMIT = 1e-2  # relative: what blocks may be off by in graphs, where the same kernels run


class Recorder:
    """Makes CUDA graphs of what runs on the current GPU."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def try_out(self, work: Callable[[], object]) -> None:
        """Runs the work where it will be recorded.

        Kernels are loaded, and libraries choose theirs, when they are called first: this must not happen while recording.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What runs the work again, and its results, which lie where each run writes them.

        Other threads may go on, with NCCL's events and pinned memory.
        """
        graph, begun = torch.cuda.CUDAGraph(), False
        try:
            # where a recording fails, torch.cuda.graph leaves its stream the current one: this gives back the one before
            with torch.cuda.stream(self.stream):
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    begun = True
                    results = work()
        except Exception:
            if begun and torch.__version__ < (2, 14):
                self._leave_pool(graph)
            raise
        return graph.replay, results

    def _leave_pool(self, graph: torch.cuda.CUDAGraph) -> None:
        """A graph gives its memory back when it goes; before torch 2.14 not one whose recording was broken off by CUDA.

        It is counted as a user of the pool for good: nobody else would ever get what the graphs before it had, either.
        """
        try:
            graph.pool()  # there where the recording has ended as it should
        except RuntimeError:
            for leave in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with suppress(RuntimeError, AttributeError):  # 2.13 has said the first itself; the error that led here is the one to tell
                    getattr(torch._C, leave)(self.stream.device_index, self.pool)


class BlockGraphs:
    """The two graphs of a block, and what stands in the place of its `forward`.

    inputs: x and what blocks hand on beside it, leaf by leaf as form has them, where the graph reads them; None where
    there is nothing, as for v_first in the first block. outputs: the same for the next block; of the last one x alone.
    recompute: as --grad_cp: the backward pass begins with the forward pass, of which only inputs are kept.
    """

    def __init__(
        self, block: nn.Module, inputs: list[Tensor | None], form: TreeSpec, last: bool, recompute: bool, recorder: Recorder
    ) -> None:
        self.block, self.eager, self.inputs, self.form, self.last = block, block.forward, inputs, form, last
        self.recompute, self.recorder = recompute, recorder
        named = dict(block.named_parameters())
        self.parameters = list(named.values())
        self.addresses = [p.data_ptr() for p in self.parameters]
        # The same memory, other leaves: those of the parameters have hooks of DDP or DeepSpeed, and streams of their
        # own, that must not be recorded.
        self.aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in named.items()}
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.passes = 0  # forward and backward passes so far
        for _ in range(WARM_UP):
            recorder.try_out(self._both_ways)
        self.run_forward, outputs = recorder.record(self._run)
        self.outputs = [None if o is None else o.detach().requires_grad_(o.requires_grad) for o in outputs]
        self._recorded = None if recompute else outputs  # with what autograd has kept

    def record_backward(self, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """grad_outputs: gradients of the outputs, where the graph shall read them. Returns those of the inputs, where it writes them."""
        self.grad_outputs = [g if _trained(o) else None for g, o in zip(grad_outputs, self.outputs, strict=True)]
        if all(g is None for g in self.grad_outputs):  # nothing to train up to here
            return [None] * len(self.inputs)

        def work() -> list[Tensor | None]:
            return self._gradients(self._run() if self.recompute else self._recorded, self.grad_outputs)

        self.run_backward, gradients = self.recorder.record(work)
        self._recorded = None
        self.grad_inputs, self.grad_parameters = gradients[: len(self.inputs)], gradients[len(self.inputs) :]
        return self.grad_inputs

    def _run(self) -> list[Tensor | None]:
        x, beside, _ = torch.func.functional_call(self.block, self.aliases, tree_unflatten(self.inputs, self.form))
        x, *beside = tree_leaves((x, beside))
        return [x, *([None] * len(beside) if self.last else beside)]

    def _both_ways(self) -> None:
        outputs = self._run()
        if any(map(_trained, outputs)):
            self._gradients(outputs, [torch.zeros_like(o) if _trained(o) else None for o in outputs])

    def _gradients(self, outputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of all inputs and of the trained parameters; None for an input that needs none."""
        outputs, grad_outputs = zip(*((o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None))
        trained = [a for a in self.aliases.values() if a.requires_grad]
        found = list(torch.autograd.grad(outputs, [*filter(_trained, self.inputs), *trained], grad_outputs, allow_unused=True))
        return [found.pop(0) if _trained(t) else None for t in self.inputs] + found

    def forward(self, x: Tensor, beside: object, state: object = None, return_state: bool = False, *packed: object) -> tuple:
        """The block's: by the graph where it is what was recorded, else, as in validation, by the block itself."""
        recorded = (
            self.block.training
            and torch.is_grad_enabled()
            and state is None
            and not return_state
            and not packed
            and x.shape == self.inputs[0].shape
        )
        if not recorded:
            return self.eager(x, beside, state, return_state, *packed)
        return *tree_unflatten(_Graphed.apply(self, *tree_leaves((x, beside)), *self.trained), self.form), None

    def replay_forward(self, inputs: Sequence[Tensor | None]) -> int:
        if [p.data_ptr() for p in self.parameters] != self.addresses:
            raise RuntimeError("parameters do not lie any more where the CUDA graphs of their block read them")
        _put(inputs, self.inputs)
        self.run_forward()
        self.passes += 1
        return self.passes

    def replay_backward(self, made: int, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """made: what replay_forward returned."""
        if made != self.passes:
            raise RuntimeError(
                "the CUDA graphs of a block have run since this forward pass: what it has kept for the backward pass is gone"
            )
        self.passes += 1
        _put(grad_outputs, self.grad_outputs)
        self.run_backward()
        out = [None if g is None else torch.empty_like(p, dtype=g.dtype) for p, g in zip(self.trained, self.grad_parameters, strict=True)]
        torch._foreach_copy_([o for o in out if o is not None], [g for g in self.grad_parameters if g is not None])
        return [*(None if g is None else g.detach() for g in self.grad_inputs), *out]


class _Graphed(torch.autograd.Function):
    """A block as autograd sees it."""

    @staticmethod
    def forward(ctx, graphs: BlockGraphs, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.graphs, ctx.made = graphs, graphs.replay_forward(tensors[: len(graphs.inputs)])
        return tuple(None if o is None else o.detach() for o in graphs.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphs.replay_backward(ctx.made, grad_outputs)


def _trained(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _put(tensors: Sequence[Tensor | None], places: Sequence[Tensor | None]) -> None:
    """Copies tensors into their places (None: zeros); one that lies there already, as what a neighbour gives, is left."""
    for tensor, place in zip(tensors, places, strict=True):
        if place is not None and tensor is None:
            place.zero_()
        elif place is not None and tensor.data_ptr() != place.data_ptr():
            place.copy_(tensor)


@torch.enable_grad()
def graph_blocks(model: LanguageModel, batch: int, tokens: int, recompute: bool = False, recorder: Recorder | None = None) -> None:
    """Puts graphs in the place of the blocks' forward, for training on [batch, tokens].

    To be called once the model is on its GPU and what shares its parameters out (DDP, DeepSpeed) has them. Values,
    gradients, random numbers and buffers are afterwards what they were. Raises UserError where a block cannot be recorded.
    """
    weight, recorder = model.emb.weight, recorder or Recorder()
    last, made = len(model.blocks) - 1, []
    x = torch.zeros(batch, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=weight.requires_grad)
    places, form = tree_flatten((x, model.beside(torch.zeros(batch, tokens, dtype=torch.int64, device=weight.device))))
    try:
        for i, block in enumerate(model.blocks):
            made.append(BlockGraphs(block, places, form, i == last, recompute, recorder))
            places = made[-1].outputs
        grad_outputs = [None if o is None else torch.zeros_like(o) for o in places]
        for graphs in reversed(made):
            grad_outputs = graphs.record_backward(grad_outputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"--cuda_graphs 1: a block cannot be recorded here: {describe(error)[:200]}; leave --cuda_graphs out") from error
    for graphs in made:
        graphs.block.forward = graphs.forward


@torch.enable_grad()
def try_graphs(model: LanguageModel, batch: int, tokens: int, recompute: bool = False, recorder: Recorder | None = None) -> str:
    """graph_blocks, where it can be done and gives what the blocks give. Returns "", or why the blocks are left as they were.

    Compared are the features of random tokens, and the gradient of each parameter of the blocks. RuntimeError where the
    GPU cannot be used any more.
    """
    weight = model.emb.weight
    rng = torch.Generator(weight.device).manual_seed(0)
    idx = torch.randint(len(weight), (batch, tokens), generator=rng, device=weight.device)
    slope = torch.randn(batch, tokens, weight.shape[1], generator=rng, device=weight.device).to(weight.dtype)
    trained = [p for p in model.blocks.parameters() if p.requires_grad]
    zeros = [p for p in trained if p.dim() == 2 and not p.any()]  # of a new model, which would hide what comes before them
    on_gpu = weight.device.type == "cuda"
    if not trained:
        return "nothing in them is trained"

    def answers() -> list[Tensor]:
        x = model.features(idx, grad_cp=recompute)
        return [x.detach(), *torch.autograd.grad(x, trained, slope, materialize_grads=True)]

    try:
        with torch.no_grad():
            for p in zeros:
                p.normal_(std=0.3 / p.shape[1] ** 0.5, generator=rng)
        expected = answers()
        if on_gpu:
            torch.cuda.empty_cache()  # the graphs have memory of their own
        graph_blocks(model, batch, tokens, recompute, recorder)
        if all(all(map(_near, answers(), expected)) for _ in range(2)):  # the second reads memory that the first has used
            return ""
        reason = "they give other numbers with them"
    except torch.OutOfMemoryError:
        reason = "too little memory"
    except (UserError, RuntimeError) as error:
        reason = describe(error).removeprefix("--cuda_graphs 1: ").removesuffix("; leave --cuda_graphs out")
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
    for block in model.blocks:
        vars(block).pop("forward", None)  # and with it the graphs and their memory
    if on_gpu:
        torch.cuda.synchronize()  # what is broken for good shall be said here
        torch.cuda.empty_cache()
    return reason


def _near(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).double().norm() <= LIMIT * wanted.double().norm())


def decide_graphs(config: TrainConfig, run: Launch, model: ModelConfig, kernel: str) -> int:
    """--cuda_graphs, of -1 what is left of it: 0 where graphs would not work or not help, -1 where they are to be tried.

    UserError for a 1 that would not work.
    """
    if config.cuda_graphs != -1:
        check_graphs(config, run, model, kernel)
        return config.cuda_graphs
    try:
        check_graphs(replace(config, cuda_graphs=1), run, model, kernel)
    except UserError:
        return 0
    peak = peak_flops(run.device)
    if config.compile or run.world_size > 1 or peak is None:
        return 0
    return -1 if flops_per_token(model, config.ctx_len) * config.micro_bsz * config.ctx_len / model.n_layer < SHORT * peak else 0


def check_graphs(config: TrainConfig, run: Launch, model: ModelConfig, kernel: str) -> None:
    """UserError where --cuda_graphs 1 would not work. kernel: who computes the model's recurrence."""
    if not config.cuda_graphs:
        return
    if config.compile and config.grad_cp == 1:
        raise UserError("--cuda_graphs 1 with --compile 1 is not made for --grad_cp 1; use --grad_cp 0, or leave --compile out")
    if config.compile and config.accumulate_grad_batches > 1:
        # torch.compile's graphs write gradients where autograd keeps those of the micro batch before:
        # https://github.com/pytorch/pytorch/issues/181723
        raise UserError(
            f"--cuda_graphs 1 with --compile 1 would lose gradients of --accumulate_grad_batches {config.accumulate_grad_batches}; "
            "use --accumulate_grad_batches 1, or leave --compile out"
        )
    if config.doc_reset:
        raise UserError("--cuda_graphs 1 needs batches of one shape, and with --doc_reset 1 they differ; leave one of the two out")
    if run.strategy.startswith("deepspeed_stage_3"):
        raise UserError(
            f"--cuda_graphs 1 does not work with --strategy {run.strategy}, "
            "which has a block's parameters in other memory each time; "
            "use deepspeed_stage_2 or ddp, or leave --cuda_graphs out"
        )
    if isinstance(model, PhantomConfig) and model.dropout:
        raise UserError(
            f"--cuda_graphs 1 is not made for --dropout {model.dropout:g}, "
            "whose random numbers a graph would draw otherwise; use --dropout 0, or leave --cuda_graphs out"
        )
    if isinstance(model, PhantomConfig) and model.steps_on_state and model.ttt_meta:
        raise UserError(
            "--cuda_graphs 1 is not made for --ttt_meta 1, which asks the blocks for their states; "
            "use --ttt_meta 0, or leave --cuda_graphs out"
        )
    if (
        isinstance(model, PhantomConfig)
        and model.max_depth_iter > 1
        and config.accumulate_grad_batches > 1
        and config.precision == "bf16"
        and run.strategy == "auto"
    ):
        # several uses of a parameter: MasterAdamW has autograd sum them in fp32, a graph sums them before it hands them out
        raise UserError(
            f"--cuda_graphs 1 would sum gradients over the passes of --max_depth_iter {model.max_depth_iter} in bf16, "
            f"and with --accumulate_grad_batches {config.accumulate_grad_batches} that is done in fp32; "
            "use --accumulate_grad_batches 1, or leave --cuda_graphs out"
        )
    if run.accelerator != "gpu":
        raise UserError("--cuda_graphs 1 needs a GPU; leave --cuda_graphs out")
    if kernel == "torch":
        raise UserError("--cuda_graphs 1 needs the CUDA kernels; python -m rwkvlm doctor says what they need, or leave --cuda_graphs out")
