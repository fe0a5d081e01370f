"""Pretraining of RWKV-7 and its family: text to binidx, ZeRO-sharded training, checkpoints the RWKV ecosystem loads."""

__version__ = "0.1.0"
