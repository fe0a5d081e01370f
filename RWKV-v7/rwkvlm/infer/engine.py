"""A model, its tokenizer, and the loop that turns a prompt into text."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint.pth import load_weights, model_from
from ..config import UserError
from ..data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, tokenizer_of
from ..models import LanguageModel
from ..ops import backend, rwkv7_step
from .sampling import check_sampling, sample

PREFILL = 512  # tokens of a prompt read at once: bounds the memory of a long prompt, changes no number beyond rounding


class Engine:
    """Recurrent inference with one model, whose weights stay as they are.

    Memory does not grow with the length of the text, but for attention without a window and the symbols that ROSA has seen.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def read(self, tokens: list[int], state: list | None = None) -> tuple[torch.Tensor, list]:
        """Feeds tokens (at least one). Returns the logits after the last one, [1, V], and the new state."""
        if len(tokens) == 1 and state is not None and self._step is not None:
            return self._read_one(tokens[0], state)
        idx = torch.tensor([tokens], device=self.model.emb.weight.device)
        for piece in idx.split(PREFILL, dim=1):
            x, state = self.model.features(piece, state, return_state=True)
        return self.model.head(x[:, -1]), state

    def prepare(self) -> None:
        """Builds and loads what single tokens need: at the first of them its messages would stand in the middle of a text."""
        _ = self._step

    @functools.cached_property
    @torch.inference_mode(False)
    def _step(self) -> rwkv7_step.Rwkv7Step | None:
        """The native step for single tokens, where there is one for this model here."""
        config, weight = self.model.config, self.model.emb.weight
        if config.model_type != "x070" or config.ranks or weight.device.type != "cpu" or weight.dtype == torch.float64:
            return None
        if backend.choose("rwkv7_step", weight.device, {"cpu": rwkv7_step.why_not}) == "torch":
            return None
        return rwkv7_step.Rwkv7Step(self.model.state_dict(keep_vars=True), config.n_layer, config.head_size)

    def _read_one(self, token: int, state: list) -> tuple[torch.Tensor, list]:
        weight = self.model.emb.weight
        att_x, wkv, ffn_x = zip(*state)
        logits, att_x, wkv, ffn_x = self._step(weight[token].float(), [x.float() for x in att_x], wkv, [x.float() for x in ffn_x])
        after = zip(att_x.to(weight.dtype).unbind(), wkv.unbind(), ffn_x.to(weight.dtype).unbind())
        return logits.unsqueeze(0), [block._make(tensors) for block, tensors in zip(state, after)]

    def tokens(
        self, prompt: str | list[int], length: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None
    ) -> Iterator[int]:
        """Up to `length` sampled tokens; stops at the end of the document. prompt: text, or its tokens; an empty one starts a new document.

        Raises UserError, before the first token, for values outside their range and for prompts with tokens outside the model's vocabulary,
        and where the model's logits are not numbers.
        """
        check_sampling(temperature, top_p, top_k)
        if length < 0:
            raise UserError(f"--length {length} must be at least 0")
        generator = self.generator(seed)
        ids = self.encode(prompt) if isinstance(prompt, str) else self._known(prompt)
        return self._tokens(ids or [END_OF_DOCUMENT], length, (temperature, top_p, top_k, generator))

    def generator(self, seed: int | None) -> torch.Generator:
        """Random numbers for sampling; None: others each time. UserError for a seed that is too large."""
        generator = torch.Generator(device=self.model.emb.weight.device)
        if seed is None:
            generator.seed()
        elif -(1 << 63) <= seed < 1 << 63:
            generator.manual_seed(seed)
        else:
            raise UserError(f"--seed {seed} has more than 63 bits; use a smaller number")
        return generator

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of the text; UserError for tokens outside the model's vocabulary."""
        return self._known(self.tokenizer.encode(text))

    def misread(self, text: str) -> str | None:
        """What the model reads in the place of a text that the tokenizer does not know all of; None: the text, but for spaces around it."""
        read = self.tokenizer.decode(self.encode(text))
        return read if read.strip() != text.strip() else None

    def _known(self, ids: list[int]) -> list[int]:
        vocab_size = self.model.config.vocab_size
        if unknown := [token for token in ids if not 0 <= token < vocab_size]:
            raise UserError(
                f"the text has token {max(unknown)}, but the model's vocabulary has {vocab_size}; "
                "use the tokenizer it was trained with (--tokenizer)"
            )
        return ids

    def _tokens(self, ids: list[int], length: int, how: tuple) -> Iterator[int]:
        logits, state = self.read(ids)
        for left in range(length - 1, -1, -1):
            check_finite(logits)
            token = int(sample(logits, *how))
            if token == END_OF_DOCUMENT:
                return
            yield token
            if left:
                logits, state = self.read([token], state)

    def generate(self, prompt: str | list[int], length: int, **sampling) -> Iterator[str]:
        """As `tokens`, but text, as soon as it is whole characters; joined, the pieces are the continuation."""
        return self.text(self.tokens(prompt, length, **sampling))

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Whole characters of the tokens, as soon as there are any."""
        stream = self.tokenizer.stream()
        for token in tokens:
            if text := stream.push(token):
                yield text
        if text := stream.finish():
            yield text


def check_finite(logits: torch.Tensor) -> None:
    """UserError for a model whose logits, or what was computed from them, are not numbers."""
    if not logits.isfinite().all():
        raise UserError(
            "the model's logits are not finite numbers: its weights are damaged, or its training diverged; use an earlier checkpoint"
        )


def load_engine(path: str | Path, tokenizer: str = "", device: str = "auto", dtype: torch.dtype | None = None) -> Engine:
    """An engine from an official-format .pth file. device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...

    tokenizer "": the model's own, see tokenizer_of. dtype None: bf16 on a GPU, fp32 on the CPU.
    Raises UserError for files and devices that cannot be used.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["auto", "cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if device not in known:
        raise UserError(
            f"--device {device} is not known here{'' if gpus else ', where torch sees no GPU'}; choose one of: {', '.join(known)}"
        )
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if not tokenizer and (tokenizer := tokenizer_of(path)) != "world":
        print(f"tokenizer {tokenizer}, which is beside the model; --tokenizer world for another", file=sys.stderr, flush=True)
    return Engine(model_from(load_weights(path), device, dtype), load_tokenizer(tokenizer))
