"""Run an exported ICNet in production: no torch, and no engine until a `Predictor` is made."""

from runtime.bank import Bank
from runtime.errors import (
    CheckpointError,
    DependencyError,
    ICNetError,
    InputError,
    ModelError,
    OutputError,
)
from runtime.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "CheckpointError",
    "DependencyError",
    "ICNetError",
    "InputError",
    "ModelError",
    "OutputError",
    "Predictor",
]
