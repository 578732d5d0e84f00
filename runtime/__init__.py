"""Run an exported ICNet in production: no torch, and no engine until a `Predictor` is made."""

import os

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

# ONNX Runtime's wheels for Linux send data on sessions and models to Microsoft (1.32 does), and keep a number of the
# device in the home folder. It reads this when it is imported, which is later.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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
