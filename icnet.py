"""The Python API under the project's own name, `from icnet import Predictor, Bank, ICNetError`: that of `runtime`."""

from icnet_cli import shadowed

if problem := shadowed("runtime"):
    raise ImportError(problem)

from runtime import (
    Bank,
    CheckpointError,
    DependencyError,
    ICNetError,
    InputError,
    ModelError,
    OutputError,
    Predictor,
    __version__,
)

__all__ = [
    "Bank",
    "CheckpointError",
    "DependencyError",
    "ICNetError",
    "InputError",
    "ModelError",
    "OutputError",
    "Predictor",
    "__version__",
]
