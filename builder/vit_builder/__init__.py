"""Build a Triton model repository from a birder ViT checkpoint."""

from .checkpoint import Checkpoint, CheckpointError, load, random, save
from .cli import build
from .repository import RepositoryError, Settings
from .verify import VerificationError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "RepositoryError",
    "Settings",
    "VerificationError",
    "build",
    "load",
    "random",
    "save",
]
