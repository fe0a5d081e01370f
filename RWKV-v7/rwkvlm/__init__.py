"""Pretraining of RWKV-7 and its family: text to binidx, ZeRO-sharded training, checkpoints the RWKV ecosystem loads."""

from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).resolve().parents[2] / "cuda").is_dir():
    raise ImportError(
        f"rwkvlm in {Path(__file__).parent} is apart from cuda/, whose kernels it builds; install its checkout with pip install -e ."
    )
