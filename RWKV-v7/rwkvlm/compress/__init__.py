"""Smaller models from trained ones, in files that train on: two factors for a matrix, fewer hidden units; always smaller tensors."""

from .run import compress_file, report_lines

__all__ = ["compress_file", "report_lines"]
