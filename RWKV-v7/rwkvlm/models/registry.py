"""Which recipe and which table belong to a model type (`--my_testing`).

A recipe is a module with build, config_of and TABLE; where a file's weights need a change, with `adapted`; where there
is something to say, with `costs`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..config import ModelConfig
from ..ops import rosa as rosa_op
from ..ops import wkv4, wkv7
from . import hybrid, phantom, rosa, rwkv4, rwkv7
from .lm import LanguageModel
from .table import groups_from_table, init_from_table

RECIPES = {"x070": rwkv7, "phantom": phantom, "hybrid": hybrid, "x080": rosa, "rosa": rosa, "x040": rwkv4}

DESCRIBING = (phantom.CARRIED, rosa.CARRIED)  # tensors that say what the shapes of a file do not


def build(config: ModelConfig) -> LanguageModel:
    """The model of config.model_type with uninitialised weights: follow with init_weights or a checkpoint."""
    return RECIPES[config.model_type].build(config)


def read_config(tensors: Mapping[str, torch.Tensor], rosa_bits: int = 0) -> ModelConfig:
    """Type and sizes of the model whose weights these are. Raises UserError naming what is missing.

    rosa_bits: of a ROSA's symbols, where the weights do not say it.
    """
    if rosa.is_rosa(tensors):
        return rosa.config_of(tensors, rosa_bits)
    recipe = rwkv4 if rwkv4.DECAY in tensors else hybrid if hybrid.attention_layers(tensors) else rwkv7
    return recipe.config_of(tensors)


def init_weights(model: LanguageModel, seed: int) -> None:
    """Fills the model with its initial values, a pure function of the seed (a non-negative integer)."""
    init_from_table(model, RECIPES[model.config.model_type].TABLE, seed)


def param_groups(model: LanguageModel, weight_decay: float) -> list[dict]:
    """Optimizer groups: lists `params` and `names`, with `weight_decay` and `my_lr_scale` (factor on the learning rate)."""
    return groups_from_table(model, RECIPES[model.config.model_type].TABLE, weight_decay)


def adapted(tensors: Mapping[str, torch.Tensor], model: LanguageModel) -> Mapping[str, torch.Tensor]:
    """A file's weights in the form that the model has them: an RWKV-7 becomes a Phantom or a hybrid, an official file a ROSA."""
    recipe = RECIPES[model.config.model_type]
    return recipe.adapted(tensors, model) if hasattr(recipe, "adapted") else tensors


def operators(config: ModelConfig) -> list[str]:
    """Those that a model needs; the first carries its state."""
    return {"x040": ["wkv4"], "rosa": ["rosa"], "x080": ["wkv7", "rosa"]}.get(config.model_type, ["wkv7"])


def recurrence(config: ModelConfig) -> str:
    """The operator that carries the state of a model."""
    return operators(config)[0]


def kernel_of(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Who computes the recurrence here: "cuda", "cpu" or "torch". UserError for a kernel asked for that cannot run.

    Builds what is missing, for all of the model's operators.
    """
    known = {"wkv4": wkv4, "wkv7": wkv7, "rosa": rosa_op}
    return [known[name].backend_for(device, dtype) for name in operators(config)][0]


def costs(config: ModelConfig) -> list[str]:
    """Lines of a table of parameters and FLOPs, for models whose matrices are not all dense; what the attention of a hybrid remembers."""
    recipe = RECIPES[config.model_type]
    return recipe.costs(config) if hasattr(recipe, "costs") else []


def count_parameters(model: nn.Module | Mapping[str, torch.Tensor]) -> int:
    """Numbers in a checkpoint of the model, the first block's unused value residual included, what describes the model left out."""
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return sum(t.numel() for name, t in tensors.items() if name not in DESCRIBING and not name.endswith(".order"))
