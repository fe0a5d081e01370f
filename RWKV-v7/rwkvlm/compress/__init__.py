"""Smaller models from trained ones: two factors for a matrix, fewer hidden units; always really smaller tensors, in a file that trains on."""

from .run import compress_file, report_lines

__all__ = ["compress_file", "report_lines"]
