"""ONNX Runtime on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import TensorSpec, check_contract
from runtime.errors import DependencyError, ModelError

NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class OnnxBackend:
    """A session of ONNX Runtime on an exported model.

    Args:
        path: an .onnx file that follows the contract.
        threads: CPU threads for one call; None for one per physical core.

    Attributes:
        group_size: how many images a group must have, or None if any number will do.

    Raises:
        ModelError: not an ONNX file, or not an exported ICNet.
        DependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise DependencyError(
                "onnxruntime is not installed: pip install 'icnet-deploy[cpu]' (or onnxruntime-gpu; not both)"
            ) from error
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such model file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors; they reach the caller as exceptions
        try:
            self.session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise ModelError(f"{self.path}: not an ONNX model that ONNX Runtime can load: {_reason(error)}") from error
        self.group_size = check_contract(
            self.path, [_spec(t) for t in self.session.get_inputs()], [_spec(t) for t in self.session.get_outputs()]
        )

    def run(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, 224, 224, 3], uint8 [N, 224, 224] → float32 [N, 224, 224]."""
        try:
            maps: NDArray[np.float32] = self.session.run(["maps"], {"images": images, "sisms": sisms})[0]
        except Exception as error:
            raise ModelError(f"{self.path}: failed on a group of {len(images)}: {_reason(error)}") from error
        return maps

    def close(self) -> None:
        """Give the session's memory back."""
        del self.session


def _spec(tensor: Any) -> TensorSpec:
    dtype = NUMPY_TYPES.get(tensor.type, tensor.type.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(tensor.name, dtype, tuple(tensor.shape))


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
