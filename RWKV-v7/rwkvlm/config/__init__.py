"""Settings: model shapes, training flags, environment variables. Imports nothing of the package."""

from .errors import UserError
from .hybrid import HybridConfig
from .kinds import model_config
from .model import HEAD_SIZES, MODEL_TYPES, ModelConfig, low_rank
from .phantom import PhantomConfig
from .rosa import RosaConfig
from .train import MINI_EPOCH, TrainConfig

__all__ = [
    "HEAD_SIZES", "HybridConfig", "MINI_EPOCH", "MODEL_TYPES", "ModelConfig", "PhantomConfig", "RosaConfig", "TrainConfig",
    "UserError", "low_rank", "model_config",
]  # fmt: skip
