"""Recurrent-mode inference: read a prompt, then sample token by token, in constant memory but for ROSA and attention without a window."""

from .engine import Engine, load_engine

__all__ = ["Engine", "load_engine"]
