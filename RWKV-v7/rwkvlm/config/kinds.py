"""Model types: the settings of each, and which flags of train.py are its own."""

from __future__ import annotations

from .hybrid import HybridConfig
from .model import ModelConfig
from .phantom import PhantomConfig
from .rosa import RosaConfig

CONFIGS = {"phantom": PhantomConfig, "hybrid": HybridConfig, "x080": RosaConfig, "rosa": RosaConfig}  # of all others ModelConfig
# Who has flags of its own, and what the types without them lack.
OWNERS = {
    "Phantom": (PhantomConfig, "no Ghost layers and no test-time training"),
    "Hybrid": (HybridConfig, "no attention"),
    "ROSA": (RosaConfig, "no ROSA"),
}


def config_type(model_type: str) -> type[ModelConfig]:
    return CONFIGS.get(model_type, ModelConfig)


def model_config(model_type: str = "x070", **sizes: object) -> ModelConfig:
    """The sizes of a model of this type."""
    return config_type(model_type)(model_type=model_type, **sizes)
