"""Model recipes: architecture, initial values and optimizer groups. No data, no environment, no compiling."""

from .lm import LanguageModel
from .registry import DESCRIBING, adapted, build, costs, count_parameters, init_weights, kernel_of, param_groups, read_config, recurrence

__all__ = [
    "DESCRIBING",
    "LanguageModel",
    "adapted",
    "build",
    "costs",
    "count_parameters",
    "init_weights",
    "kernel_of",
    "param_groups",
    "read_config",
    "recurrence",
]
