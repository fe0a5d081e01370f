"""Settings: model shapes, training flags, environment variables. Imports nothing of the package."""

from .errors import UserError
from .model import HEAD_SIZES, MODEL_TYPES, ModelConfig, low_rank
from .phantom import PhantomConfig, model_config
from .rosa import RosaConfig
from .train import MINI_EPOCH, TrainConfig

__all__ = ["HEAD_SIZES", "MINI_EPOCH", "MODEL_TYPES", "ModelConfig", "PhantomConfig", "RosaConfig", "TrainConfig", "UserError", "low_rank", "model_config"]
