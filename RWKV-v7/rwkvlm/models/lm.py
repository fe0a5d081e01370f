"""The language model around the blocks: embedding -> blocks -> features -> head."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..layers.packed import Packed

State = list  # one entry per block
Terms = dict[str, tuple[float, torch.Tensor]]  # of a training loss beside the cross entropy: name -> weight, scalar


class LanguageModel(nn.Module):
    """A stack of blocks between an embedding and a head; parameter names are those of the official checkpoints.

    The loss is not part of the model: a chunked head with loss needs `features` and `head.weight` (ops/cross_entropy).
    """

    def __init__(self, config: ModelConfig, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(blocks)
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_state(self, batch: int) -> State:
        """The state before the first token, for a batch of sequences."""
        return [block.init_state(batch, self.emb.weight.device, self.emb.weight.dtype) for block in self.blocks]

    def beside(self, idx: torch.Tensor) -> object:
        """What the blocks hand on beside the residual stream: the first one's value, once it is there."""
        return None

    def features(
        self, idx: torch.Tensor, state: State | None = None, return_state: bool = False, grad_cp: bool = False, packed: Packed | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, State]:
        """What the head reads.

        idx: [B, T] int64 tokens. state: from init_state or an earlier call; None at the beginning.
        packed: idx is one row of documents, each of which begins anew; not together with states.
        grad_cp: keep only each block's input and compute its inside again in the backward pass.
        Returns [B, T, C], and the new state with return_state. Tokens fed one by one, in pieces or at once give the same.
        """
        x = self.emb(idx)
        beside = self.beside(idx)
        new_state: State = []
        for i, block in enumerate(self.blocks):
            args = (x, beside, state[i] if state is not None else None, return_state, *([] if packed is None else [packed]))
            if grad_cp and torch.is_grad_enabled():
                x, beside, block_state = checkpoint(block, *args, use_reentrant=False)
            else:
                x, beside, block_state = block(*args)
            new_state.append(block_state)
        x = self.ln_out(x)
        return (x, new_state) if return_state else x

    def for_training(self, idx: torch.Tensor, grad_cp: bool = False) -> tuple[torch.Tensor, Terms]:
        """The features, and what training lowers besides the cross entropy."""
        return self.features(idx, grad_cp=grad_cp), {}

    def forward(
        self, idx: torch.Tensor, state: State | None = None, return_state: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, State]:
        """idx: [B, T] int64. Returns logits [B, T, V], and the new state with return_state."""
        if return_state:
            x, state = self.features(idx, state, return_state=True)
            return self.head(x), state
        return self.head(self.features(idx, state))
