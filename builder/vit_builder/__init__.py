"""Build a Triton model repository from a birder ViT checkpoint."""

__version__ = "0.1.0"

from .build import build
from .checkpoint import Checkpoint, CheckpointError, load, random, save
from .images import CalibrationError
from .repository import RepositoryError, Settings
from .verify import VerificationError

__all__ = [
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "RepositoryError",
    "Settings",
    "VerificationError",
    "__version__",
    "build",
    "load",
    "random",
    "save",
]
