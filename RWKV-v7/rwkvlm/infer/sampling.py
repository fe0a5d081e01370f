"""Choosing the next token from logits."""

from __future__ import annotations

import torch

from ..config import UserError

LARGEST = 1e30  # of a temperature or a penalty: much more is infinite in fp32, and infinite by infinite is no number
NEAR = 1024  # tokens among which top_p looks first: to sort a vocabulary of 65536 takes a CPU longer than a small model's step


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

    temperature 0 takes the likeliest token. top_k keeps the k likeliest; of these top_p keeps the smallest set whose
    probability among them (at temperature 1) reaches top_p; the temperature acts on what is left. Without top_k that is
    the official sampler's top_p; with both, the official one takes the probability among all tokens.
    """
    logits = logits.float()
    if temperature < 1e-30:  # less is 0 in fp32, and nothing but the likeliest would be left
        return logits.argmax(-1)
    tokens = None
    if top_p < 1 or 0 < top_k < logits.shape[-1]:
        logits, tokens = _likeliest(logits, top_p, top_k)
    logits = logits - logits.amax(-1, keepdim=True)  # what is divided by a small number may overflow downwards only
    chosen = torch.multinomial((logits / min(temperature, LARGEST)).softmax(-1), 1, generator=generator)
    return (chosen if tokens is None else tokens.gather(-1, chosen))[:, 0]


def _likeliest(logits: torch.Tensor, top_p: float, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [B, V]. Returns those that top_k and top_p leave, the likeliest first, padded with -inf, and their tokens: [B, n] both."""
    among = logits
    if 0 < top_k < logits.shape[-1]:
        ordered, tokens = logits.topk(top_k, -1)
        among = ordered
    else:
        ordered, tokens = logits.topk(min(NEAR, logits.shape[-1]), -1)
        if (ordered.logsumexp(-1) - logits.logsumexp(-1)).exp().min() < top_p:
            ordered, tokens = logits.sort(-1, descending=True)
    if top_p < 1:
        p = (ordered - among.logsumexp(-1, keepdim=True)).exp()
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return ordered, tokens


class Penalties:
    """Tokens that have come already become less likely: by `presence` once, by `frequency` for each time.

    The times fade by `decay` with each token. The numbers and their order are those of RWKV's chat programs
    (BlinkDL/ChatRWKV, API_DEMO_CHAT.py): penalise, choose, fade, count. Raises UserError for values outside their range.
    """

    def __init__(self, presence: float = 0.0, frequency: float = 0.0, decay: float = 0.996) -> None:
        for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
            if not abs(value) <= LARGEST:
                raise UserError(f"--{name} {value} must lie in [-{LARGEST:g}, {LARGEST:g}]; 0 is no penalty")
        if not 0 <= decay <= 1:
            raise UserError(f"--penalty_decay {decay} must lie in [0, 1]; 1 forgets nothing")
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.reset()

    def reset(self) -> None:
        """Nothing has come yet."""
        self._times: torch.Tensor | None = None  # [V]
        self._seen: torch.Tensor | None = None  # [V]: times may fade to 0

    def penalise(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [1, V]. Returns them in fp32, penalised."""
        logits = logits.float()
        return logits if self._times is None else logits - self.presence * self._seen - self.frequency * self._times

    def count(self, token: int, logits: torch.Tensor) -> None:
        """The token has come; logits: those it was chosen from."""
        if self._times is None:
            self._times = torch.zeros(logits.shape[-1], device=logits.device)
            self._seen = torch.zeros_like(self._times)
        self._times *= self.decay
        self._times[token] += 1
        self._seen[token] = 1
