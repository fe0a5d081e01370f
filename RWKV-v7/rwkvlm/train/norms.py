"""Norms of the gradient by part of the model (emb, att, ffn, ln, head, ...), under every strategy, without making the device wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoint.shards import pieces
from ..ops.adamw import gradient_norms


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, all blocks together: "blocks.3.att.w0" is att, every LayerNorm is ln."""
    words = name.split(".")
    part = words[2] if words[0] == "blocks" else words[0]
    return "ln" if part.startswith("ln") else part


class GradientNorms:
    """Of gradients that every process has whole: under all strategies but DeepSpeed's.

    parts: names, in the order of the model. last: [parts], fp32, on the device: the norms of the last step before
    clipping; None before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parts = list(dict.fromkeys(part_of(name) for name, _ in self._named))
        self.last: torch.Tensor | None = None
        self._graded: tuple[str, ...] = ()
        self._part_of: torch.Tensor | None = None

    def measure(self) -> torch.Tensor:
        """The norm of the whole gradient; `last` becomes its norms by part."""
        names, grads = zip(*((name, parameter.grad) for name, parameter in self._named if parameter.grad is not None))
        if names != self._graded:
            self._graded, self._part_of = names, self._places(names, grads[0].device)
        norms = gradient_norms(list(grads))
        self.last = self._by_part(norms, self._part_of).sqrt()
        return torch.linalg.vector_norm(norms)

    def _places(self, names: Sequence[str], device: torch.device) -> torch.Tensor:
        return torch.tensor([self.parts.index(part_of(name)) for name in names], device=device)

    def _by_part(self, norms: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Sums of squares."""
        return norms.new_zeros(len(self.parts)).index_add_(0, part, norms.square())


class ShardedNorms(GradientNorms):
    """Under ZeRO: looks at the flat pieces that DeepSpeed hands to the optimizer inside it, a group at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model)
        found: dict[torch.Tensor, list[tuple[str, slice]]] = {}
        for piece in pieces(model, optimizer):
            if piece.adam is not None:
                flat, view = piece.adam[1], piece.values["master"]
                begin = view.storage_offset() - flat.storage_offset()
                found.setdefault(flat, []).append((piece.name, slice(begin, begin + piece.numel)))
        self._segments = {
            flat: ([where for _, where in named], self._places([name for name, _ in named], flat.device)) for flat, named in found.items()
        }
        self._squares = torch.zeros(len(self.parts), device=self._named[0][1].device)
        optimizer.optimizer.register_step_pre_hook(self._look)

    @torch.no_grad()
    def _look(self, inner: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for flat in (p for group in inner.param_groups for p in group["params"] if p.grad is not None and p in self._segments):
            segments, part = self._segments[flat]
            norms = torch.stack(torch._foreach_norm([flat.grad.view(-1)[where] for where in segments]))
            self._squares += self._by_part(norms, part).to(self._squares.device)

    def finish(self, total: torch.Tensor | float | None, most: float) -> None:
        """After a step, collective. total: the norm before clipping; most: what it was clipped to, 0: not."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self._squares)
        clipped = 1.0 if total is None or not most else torch.as_tensor(total, device=self._squares.device).div(most).clamp(min=1.0)
        self.last = self._squares.sqrt() * clipped  # NaN where DeepSpeed has skipped the step
        self._squares = torch.zeros_like(self._squares)
