"""Which recipe and which table belong to a model type (`--my_testing`)."""

from __future__ import annotations

from torch import nn

from ..config import ModelConfig
from . import rwkv7
from .lm import LanguageModel
from .table import groups_from_table, init_from_table

RECIPES = {"x070": rwkv7}


def build(config: ModelConfig) -> LanguageModel:
    """The model of config.model_type with uninitialised weights: follow with init_weights or a checkpoint."""
    return RECIPES[config.model_type].build(config)


def init_weights(model: LanguageModel, seed: int) -> None:
    """Fills the model with its initial values, a pure function of the seed (a non-negative integer)."""
    init_from_table(model, RECIPES[model.config.model_type].TABLE, seed)


def param_groups(model: LanguageModel, weight_decay: float) -> list[dict]:
    """Optimizer groups: lists `params` and `names`, with `weight_decay` and `my_lr_scale` (factor on the learning rate)."""
    return groups_from_table(model, RECIPES[model.config.model_type].TABLE, weight_decay)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a checkpoint of the model, the first block's unused value residual included."""
    return sum(t.numel() for t in model.state_dict().values())
