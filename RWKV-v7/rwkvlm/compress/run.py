"""From a weight file to a smaller one, and what it costs: first whole hidden units go, then what is left becomes two factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.pth import load_weights
from ..config import ModelConfig, UserError
from ..models import count_parameters, read_config
from ..train.flops import flops_per_token
from . import measure
from .output import check_output, save_output
from .sparsity import remove_units, units_left
from .svd import check_ratio, factorise_matrices


def compress_file(
    path: str | Path,
    out: str | Path,
    svd_rank_ratio: float = 1.0,
    sparsity_ratio: float = 0.0,
    data: str = "",
    ctx_len: int = 512,
    samples: int = 32,
) -> dict[str, Any]:
    """Writes a smaller model than that of `path`, RWKV-7 or Phantom, to `out` in the official format, and returns a report for JSON.

    svd_rank_ratio in (0, 1] and sparsity_ratio in [0, 1): svd.py and sparsity.py; 1 and 0 change nothing, to the bit. data: prefix of a
    .bin/.idx pair, of which `samples` sequences of ctx_len tokens say how much each hidden unit matters, and as many of DATA.val (of DATA
    where there is none) what the model loses. Raises UserError for what does not fit, before the long work
    wherever it can be known.
    """
    path, out = Path(path), Path(out)
    for name, value in (("ctx_len", ctx_len), ("samples", samples)):
        if value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    check_output(path, out)
    check_ratio(svd_rank_ratio)
    weights = load_weights(path)
    config = read_config(weights)
    if config.model_type not in ("x070", "phantom"):
        raise UserError(f"--model {path} holds a model of type {config.model_type}; compress is made for x070 and phantom")
    units_left(config, sparsity_ratio)
    model = measure.load(path)  # refuses a file that does not fit together
    activity, losses = None, {}
    if data:
        text = measure.Text(measure.held_out(data), ctx_len, samples, config.vocab_size)
        losses["before"] = measure.loss(model, text)
        if units_left(config, sparsity_ratio) < config.dim_ffn:
            activity = measure.activity(model, measure.Text(data, ctx_len, samples, config.vocab_size))
    fewer = remove_units(weights, config, sparsity_ratio, activity)
    smaller, errors = factorise_matrices(fewer, read_config(fewer), svd_rank_ratio)
    save_output(path, out, smaller)
    model = measure.load(out)
    if data:
        losses["after"] = measure.loss(model, text)
    return {
        "model": str(path),
        "out": str(out),
        "svd_rank_ratio": svd_rank_ratio,
        "sparsity_ratio": sparsity_ratio,
        "dim_ffn": {"before": config.dim_ffn, "after": model.config.dim_ffn},
        "ranks": model.config.rank_of(),
        "svd_error": errors,
        "parameters": {"before": count_parameters(weights), "after": count_parameters(smaller)},
        "bytes": {"before": path.stat().st_size, "after": out.stat().st_size},
        "flops_per_token": {"before": _forward(config), "after": _forward(model.config)},
        **({"loss": losses, "loss_data": text.samples.name} if data else {}),
    }


def _forward(config: ModelConfig) -> int:
    """Of reading one token; flops_per_token counts backward as twice forward."""
    return flops_per_token(config) // 3


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report as the lines of a table."""
    lines = [f"{report['model']} -> {report['out']}", f"{'':16} {'before':>16} {'after':>16} {'left':>7}"]
    for name in ("parameters", "bytes", "flops_per_token", "dim_ffn"):
        before, after = report[name]["before"], report[name]["after"]
        lines.append(f"{name:16} {before:16,} {after:16,} {after / before:7.1%}")
    if "loss" in report:
        before, after = report["loss"]["before"], report["loss"]["after"]
        lines.append(f"{'loss':16} {before:16.4f} {after:16.4f} {after - before:+7.4f}  {report['loss_data']}")
    else:
        lines.append(f"{'loss':16} not measured; with --data PREFIX it is")
    lines += [f"{name:24} rank {report['ranks'][name]:5}, relative error {error:.3f}" for name, error in report["svd_error"].items()]
    return lines
