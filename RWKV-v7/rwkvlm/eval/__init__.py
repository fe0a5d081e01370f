"""What a trained model can do: a file per method, all of them over an Engine."""

from .harness import run_tasks
from .lambada import lambada
from .loss import text_loss

__all__ = ["lambada", "run_tasks", "text_loss"]
