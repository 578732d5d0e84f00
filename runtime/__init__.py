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
from runtime.outputs import Box, boxes, cutout, mask, otsu_level
from runtime.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "Box",
    "CheckpointError",
    "DependencyError",
    "ICNetError",
    "InputError",
    "ModelError",
    "OutputError",
    "Predictor",
    "boxes",
    "cutout",
    "mask",
    "otsu_level",
]
