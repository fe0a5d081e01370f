"""Where the numbers of a training run live: a view of every strategy's memory by parameter name.

The master weights and Adam moments of a run are, on each process, a list of pieces: a contiguous range of one named tensor,
flattened, with views of the live memory behind it. That is all that saving and loading know of ZeRO 1, 2, 3, DDP or one device.
Read off DeepSpeed 0.19: DeepSpeedZeroOptimizer, BF16_Optimizer (stage 1 in bf16), DeepSpeedZeroOptimizer_Stage3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Piece:
    """Elements start .. start + numel of the flattened tensor `name`.

    values: flat views of live memory, each [numel]: "master", "exp_avg", "exp_avg_sq" (fp32) of a trained parameter, or "value"
    of a tensor that is not trained. adam: the inner optimizer and the tensor whose `step` counts for this piece, or None.
    shared: every process keeps all of it, so that one copy is enough to be saved.
    """

    name: str
    start: int
    numel: int
    values: dict[str, torch.Tensor]
    adam: tuple[torch.optim.Optimizer, torch.Tensor] | None = None
    shared: bool = False

    def cut(self, start: int, stop: int) -> Piece:
        """The part of this piece between two positions in the flattened tensor."""
        start, stop = max(start, self.start), min(stop, self.start + self.numel)
        views = {key: view[start - self.start : stop - self.start] for key, view in self.values.items()}
        return Piece(self.name, start, stop - start, views, self.adam, self.shared)

    @property
    def step(self) -> float:
        """Adam steps taken."""
        return float(_state(*self.adam)["step"]) if self.adam else 0.0

    def set_step(self, step: float) -> None:
        """Gives the piece a counter of its own, of the kind that it had.

        DeepSpeed's own loading has one tensor count for several pieces, which then runs too fast.
        """
        state = _state(*self.adam)
        counter = state["step"]
        state["step"] = torch.full_like(counter, step) if isinstance(counter, torch.Tensor) else type(counter)(step)


def pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """The pieces that this process keeps.

    model: the bare module, whose names are the official ones; optimizer: Lightning's strategy.optimizers[0].
    """
    trained = list(_trained(model, optimizer))
    known = {piece.name for piece in trained}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in known and not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            trained.append(_fixed(name, tensor))
    return trained


def share(all_pieces: list[Piece], rank: int, world_size: int) -> list[Piece]:
    """The pieces that this rank saves: its own, and its fair part of what every rank keeps."""
    own = [piece for piece in all_pieces if not piece.shared]
    shared = [piece for piece in all_pieces if piece.shared]
    total = sum(piece.numel for piece in shared)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    position = 0
    for piece in shared:
        cut = piece.cut(piece.start + first - position, piece.start + last - position)
        position += piece.numel
        if cut.numel > 0:
            own.append(cut)
    return own


def write_back(optimizer: torch.optim.Optimizer) -> None:
    """Makes the model's weights equal to the masters that have been changed. Every rank calls."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if "master" in optimizer.state[p]:
                    p.data.copy_(optimizer.state[p]["master"])


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    names = {param: name for name, param in model.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _zero3(names, optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _zero12(names, optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _zero12(names, optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    else:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = _state(optimizer, p)
                values = {"master": state.get("master", p)} | {key: state[key] for key in MOMENTS}
                flat = {key: value.detach().view(-1) for key, value in values.items()}
                yield Piece(names[p], 0, p.numel(), flat, (optimizer, p), shared=True)


def _zero12(names: dict, optimizer: torch.optim.Optimizer, groups: list, partitions: list[torch.Tensor]) -> Iterator[Piece]:
    """Each group is one flat tensor cut into equal parts, one per rank; a parameter's piece is where its range and ours overlap."""
    for params, partition in zip(groups, partitions):
        for p in params:
            if p._hp_mapping is not None:
                inside, ours = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                yield _flat_piece(names[p], inside.start, inside.numel, optimizer.optimizer, partition, ours.start)


def _zero3(names: dict, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Each parameter is cut into equal parts, one per rank, the last ones padded; sub-groups hold parts one after the other."""
    for params in optimizer.fp16_groups:
        for p in params:
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(p)]
            start = part * ranks.rank()
            numel = min(part, p.ds_numel - start)
            if numel > 0:
                yield _flat_piece(names[p], start, numel, optimizer.optimizer, optimizer.fp32_partitioned_groups_flat[group], offset)


def _flat_piece(name: str, start: int, numel: int, inner: torch.optim.Optimizer, flat: torch.Tensor, offset: int) -> Piece:
    state = _state(inner, flat)
    views = {"master": flat.detach()} | {key: state[key] for key in MOMENTS}
    return Piece(name, start, numel, {key: view[offset : offset + numel] for key, view in views.items()}, (inner, flat))


def _fixed(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that is not trained: a buffer or a frozen parameter, which ZeRO-3 has cut up as well."""
    if not hasattr(tensor, "ds_id"):
        return Piece(name, 0, tensor.numel(), {"value": tensor.detach().view(-1)}, shared=True)
    part = tensor.ds_tensor.numel()
    start = part * ranks.rank()
    numel = max(0, min(part, tensor.ds_numel - start))
    return Piece(name, start, numel, {"value": tensor.ds_tensor.detach().view(-1)[:numel]})


def _state(adam: torch.optim.Optimizer, tensor: torch.Tensor) -> dict:
    """The Adam state of a tensor, made as the optimizer would at its first step when there is none yet."""
    state = adam.state[tensor]
    if "exp_avg" not in state:
        if isinstance(adam, torch.optim.AdamW):
            group = next((g for g in adam.param_groups if any(p is tensor for p in g["params"])), adam.defaults)
            on_device = group["fused"] or group["capturable"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else None)
        else:
            state["step"] = 0  # DeepSpeed's FusedAdam and DeepSpeedCPUAdam count in Python
        for key in MOMENTS:
            state[key] = torch.zeros_like(tensor, dtype=torch.float32).detach()
    return state
