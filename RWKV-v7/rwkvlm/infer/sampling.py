"""Choosing the next token from logits."""

from __future__ import annotations

import torch

from ..config import UserError


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises UserError for values outside their range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature} must be 0 (always the likeliest token) or a positive number")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p} must lie in (0, 1]; 1 keeps every token")
    if top_k < 0:
        raise UserError(f"--top_k {top_k} must be at least 0; 0 keeps every token")


def sample(
    logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """logits: [B, V]. Returns [B] int64.

    temperature 0 takes the likeliest token. top_p keeps the smallest set of tokens whose probability (at temperature 1)
    reaches top_p, as the official sampler does; top_k keeps the k likeliest; the temperature acts on what is left.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, where = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, where, outside), -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
