"""ONNX Runtime, on the CPU or through any of its execution providers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import TensorSpec, check_contract
from runtime.errors import DependencyError, ModelError, one_line

CPU = "CPUExecutionProvider"
Provider = str | tuple[str, dict[str, Any]]

NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class Finished:
    """A group that has been computed: ONNX Runtime returns when it is done."""

    maps: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        """Float32 [N, 224, 224]."""
        return self.maps


class OnnxBackend:
    """A session of ONNX Runtime on an exported model.

    Args:
        path: an .onnx file that follows the contract.
        threads: CPU threads for one call; None for one per physical core.
        providers: execution providers in order of preference, each a name or (name, options), as ONNX Runtime takes
            them. The CPU comes last in any case, for what the others can't compute.

    Raises:
        ModelError: not an ONNX file, or not an exported ICNet; or a provider that was asked for is not used.
        DependencyError: ONNX Runtime is not installed, or not with these providers.
    """

    slots = 1  # groups at once that one caller can have in work

    def __init__(self, path: Path, threads: int | None = None, providers: Sequence[Provider] = (CPU,)) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise DependencyError(
                "onnxruntime is not installed: pip install 'icnet-deploy[cpu]' (or onnxruntime-gpu; not both)"
            ) from error
        self.path = path
        if not self.path.is_file():
            raise ModelError(f"{self.path}: {'not a model file' if self.path.exists() else 'no such model file'}")
        wanted = [p if isinstance(p, str) else p[0] for p in providers]
        if absent := [name for name in wanted if name not in ort.get_available_providers()]:
            raise DependencyError(
                f"{', '.join(absent)}: not in this onnxruntime, which has {', '.join(ort.get_available_providers())}; "
                "for NVIDIA GPUs replace onnxruntime by onnxruntime-gpu (never both)"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors; they reach the caller as exceptions
        try:
            self._session = ort.InferenceSession(self.path, options, providers=[*providers])
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise ModelError(f"{self.path}: not an ONNX model that ONNX Runtime can load: {_reason(error)}") from error
        # ONNX Runtime only warns of a provider whose libraries or device are missing, and goes on with the next.
        if unused := [name for name in wanted if name not in self._session.get_providers()]:
            raise ModelError(
                f"{self.path}: {', '.join(unused)} was asked for but could not be started; are its libraries (CUDA, "
                "cuDNN, TensorRT) and a GPU there? Leave it out of providers to do without"
            )
        self._group_size = check_contract(
            self.path, [_spec(t) for t in self._session.get_inputs()], [_spec(t) for t in self._session.get_outputs()]
        )

    def check_group(self, images: int) -> None:
        """Raise ModelError if the model was built for groups of another size."""
        if self._group_size not in (None, images):
            raise ModelError(
                f"{self.path}: built for groups of exactly {self._group_size} images, got {images}; "
                "export it with a dynamic group axis (icnet export does)"
            )

    def submit(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> Finished:
        """Run a group: uint8 [N, 224, 224, 3], uint8 [N, 224, 224] → float32 [N, 224, 224]."""
        try:
            maps: NDArray[np.float32] = self._session.run(["maps"], {"images": images, "sisms": sisms})[0]
        except Exception as error:
            if "allocate memory" in str(error) or isinstance(error, MemoryError):
                raise ModelError(f"{self.path}: out of memory for a group of {len(images)}; split the group") from error
            raise ModelError(f"{self.path}: failed on a group of {len(images)}: {_reason(error)}") from error
        return Finished(maps)

    def close(self) -> None:
        """Give the session's memory back."""
        del self._session


def _spec(tensor: Any) -> TensorSpec:
    dtype = NUMPY_TYPES.get(tensor.type, tensor.type.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(tensor.name, dtype, tuple(tensor.shape))


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
