"""The golden loss curve: thirty steps of a tiny model in fp32, the same numbers on every machine to 1e-6.

Data and initial weights come from integer arithmetic alone, so that no library's random numbers or factorisations are in them. After a
change that is meant to change numbers: `pytest tests/train/test_golden.py --update-golden`, and say why in the commit.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.config import ModelConfig
from rwkvlm.models import build, init_weights

GOLDEN = Path(__file__).resolve().parents[1] / "assets" / "golden_x070.json"
SIZES = dict(n_layer=2, n_embd=64, head_size=32, vocab_size=256)
RANDOM = ("emb.weight", "head.weight", "1", "2", "receptance.weight", "key.weight", "value.weight", "output.weight")  # ends of names


def uniform(shape: torch.Size, name: str) -> torch.Tensor:
    """Numbers in [-1, 1) from a multiplicative hash of name and position."""
    i = torch.arange(shape.numel(), dtype=torch.int64) + zlib.crc32(name.encode())
    for factor in (0x9E3779B1, 0x85EBCA77):
        i = i * factor % 2**32
        i = i ^ (i >> 15)
    return (i % 2**24).double().div(2**23).sub(1).reshape(shape)


def golden_weights() -> dict[str, torch.Tensor]:
    """The table's values, with every matrix, also those that begin as zeros, filled at the scale of training."""
    model = build(ModelConfig(**SIZES))
    init_weights(model, 0)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if tensor.dim() == 2 and name.endswith(RANDOM):
            weights[name] = uniform(tensor.shape, name) * (0.5 if name == "emb.weight" else (3 / tensor.shape[1]) ** 0.5 / 2)
    return weights


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_golden_curve(run, losses, records, tmp_path, request, kernel):
    out = tmp_path / "out"
    save_weights(out / "rwkv-init.pth", golden_weights())
    assert run(out, kernel=kernel, adam_eps=1e-8) == 0
    curve = losses(out)
    held_out = [record["val_loss"] for record in records(out, "val_loss").values()]
    if request.config.getoption("--update-golden", default=False):
        GOLDEN.write_text(json.dumps({"loss": curve, "val_loss": held_out}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert curve == pytest.approx(golden["loss"], rel=1e-6)
    assert held_out == pytest.approx(golden["val_loss"], rel=1e-6)
    assert sum(curve[-5:]) < sum(curve[:5]) - 1.5
