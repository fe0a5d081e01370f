"""Tasks of lm-evaluation-harness (the package lm_eval, which is optional): what it asks of a model, answered by an Engine."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from ..config import UserError
from ..config.errors import pip_install
from ..data.tokenizer import END_OF_DOCUMENT
from ..infer.engine import Engine
from ..infer.stops import StopText
from .score import continuations, scores

LONGEST = 256  # tokens that are generated where a task names no number, as the library's own models do


class Answers:
    """The three questions that the library asks a model; a request has its arguments in `args`, as the library's Instance.

    A text is read after a token 0. Context and continuation are tokenised each by itself, so that all continuations of a
    context begin from one state (RWKV's tokens are greedy: it matters only where a token would reach over the border);
    spaces at the end of a context belong to the continuation, as in the library.
    """

    def __init__(self, engine: Engine, batch: int) -> None:
        super().__init__()
        self.engine, self.batch = engine, batch

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the logarithm of its probability, and whether greedy decoding would give it."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            spaces = context[len(stripped) :]
            pairs.append(([END_OF_DOCUMENT, *self.engine.encode(stripped)], self.engine.encode(spaces + continuation)))
        return continuations(self.engine, pairs, self.batch)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): the logarithm of its probability, however long it is."""
        rows = [[END_OF_DOCUMENT, *self.engine.encode(request.args[0])] for request in requests]
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        for at in range(0, len(order), self.batch):
            numbers = order[at : at + self.batch]
            for part in scores(self.engine, [rows[n] for n in numbers], [1] * len(numbers)):
                for row, nats in zip(part.row.tolist(), part.nats.tolist()):
                    found[numbers[row]] -= nats
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the text up to the first of settings["until"], or of max_gen_toks tokens."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stop, text = StopText([until] if isinstance(until, str) else until), ""
        temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
        how = dict(temperature=temperature, top_p=float(settings.get("top_p", 1)), top_k=int(settings.get("top_k", 0)), seed=0)
        prompt = [END_OF_DOCUMENT, *self.engine.encode(context)]
        for piece in self.engine.generate(prompt, int(settings.get("max_gen_toks", LONGEST)), **how):
            text += stop.push(piece)
            if stop.stopped:
                return text
        return text + stop.finish()


def model_of(engine: Engine, batch: int) -> Any:
    """The engine as a model of the library."""
    base = _library("lm_eval.api.model").LM
    return type("Rwkvlm", (Answers, base), {})(engine, batch)


def check_library() -> None:
    """UserError where the library is missing, before the long work."""
    _library("lm_eval")


def run_tasks(
    engine: Engine, names: Sequence[str], batch: int = 8, limit: int = 0, tasks_path: str = "", few_shots: int | None = None
) -> dict[str, Any]:
    """The library's results by task: metric -> number. tasks_path: a folder with tasks of one's own (its YAML files).

    UserError for a missing library, an unknown task, and data that the library cannot fetch.
    """
    library = _library("lm_eval")
    model = model_of(engine, batch)
    manager = _library("lm_eval.tasks").TaskManager(include_path=tasks_path or None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]} is not known to lm_eval; lm_eval ls tasks lists them, --tasks_path names a folder with yours"
        )
    try:
        found = library.simple_evaluate(
            model=model,
            tasks=list(names),
            limit=limit or None,
            num_fewshot=few_shots,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except OSError as error:
        raise UserError(f"--tasks {','.join(names)}: lm_eval cannot fetch the data: {' '.join(str(error).split())[:200]}") from None
    return {
        task: {name: value for name, value in metrics.items() if name != "sample_len" and _is_number(value)}
        for task, metrics in found["results"].items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--tasks needs the package lm_eval, which cannot be imported ({error}); run: {pip_install('lm-eval')}") from None
