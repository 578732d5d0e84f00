"""The Python API under the project's own name, `from icnet import Predictor, Bank, ICNetError`: that of `runtime`."""

from icnet_cli import shadowed

if problem := shadowed("runtime"):
    raise ImportError(problem)

from runtime import (
    Bank,
    Box,
    CheckpointError,
    DependencyError,
    ICNetError,
    InputError,
    ModelError,
    OutputError,
    Predictor,
    __version__,
    boxes,
    cutout,
    mask,
    otsu_level,
)

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
    "__version__",
    "boxes",
    "cutout",
    "mask",
    "otsu_level",
]
