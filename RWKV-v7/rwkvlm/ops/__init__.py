"""Operators: one folder each, holding its contract and dispatch, a slow reference, a plain PyTorch form and the native kernel's face."""
