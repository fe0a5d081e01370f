"""Settings: model shapes, training flags, environment variables. Imports nothing of the package."""

from .errors import UserError
from .model import HEAD_SIZES, MODEL_TYPES, ModelConfig, low_rank
from .train import MINI_EPOCH, TrainConfig

__all__ = ["HEAD_SIZES", "MINI_EPOCH", "MODEL_TYPES", "ModelConfig", "TrainConfig", "UserError", "low_rank"]
