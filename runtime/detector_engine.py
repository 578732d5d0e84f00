"""A detector's network, in whichever engine its file is for."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from runtime.backends import Backend
from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import reason, session_tensors, start_session
from runtime.backends.opening import CHECKPOINT_SUFFIXES, OPENVINO_SUFFIX, OTHER_SUFFIXES, open_backend
from runtime.backends.tensorrt import TensorRTBackend
from runtime.contract import Interface
from runtime.detector_contract import candidates, channels_first, check_detector
from runtime.errors import ICNetError, ModelError
from runtime.files import check_model_file, check_seal
from runtime.threads import native_calls

Limits = tuple[tuple[int, ...], tuple[int, ...]]


class DetectorEngine(Protocol):
    """A network that takes images.

    Attributes:
        interface: its tensors.
        names: what its file and those that it was made from are called.
        maps: the outputs that may be the map.
        limits: the smallest and the largest shape of its input; None for any that its fixed axes allow.
    """

    interface: Interface
    names: str
    maps: Sequence[str]
    limits: Limits | None

    def run(self, images: NDArray[Any], outputs: Sequence[str]) -> list[Any]:
        """Those outputs, of `maps`, for one call's images.

        Raises:
            ModelError: it fails.
            ICNetError: it is closed.
        """
        ...

    def close(self) -> None:
        """Give its memory back, after the call in work."""
        ...


def open_engine(
    path: Path,
    threads: int | None,
    providers: Sequence[Provider],
    device: int | str | None,
    allow_host_code: bool,
    verify: bool,
) -> DetectorEngine:
    """The engine with a detector; the arguments are those of `Detector`.

    Raises:
        ModelError: not a detector, or not of this engine, or damaged.
        InputError: it is an exported ICNet.
        DependencyError: the engine is not installed.
    """
    check_model_file(path)
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        onnx = path.with_suffix(".onnx").name
        raise ModelError(
            f"{path}: a checkpoint; export it first: icnet export --network egnet --checkpoint {path} --output {onnx}"
        )
    if suffix not in OTHER_SUFFIXES:
        if verify:
            check_seal(path)
        return _Onnx(path, threads, providers)
    takes = str if suffix == OPENVINO_SUFFIX else int
    backend = open_backend(
        path,
        threads=threads,
        device=device if isinstance(device, takes) else None,
        slots=1,
        allow_host_code=allow_host_code,
        verify=verify,
        contract=check_detector,
    )
    return _Other(backend)


class _Onnx:
    """A session of ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None, providers: Sequence[Provider]) -> None:
        self._path = path
        self._session: Any = start_session(path, threads, providers).session  # None: closed
        self.interface = check_detector(path, *session_tensors(self._session))
        self.maps: Sequence[str] = candidates(self.interface)
        self.limits: Limits | None = None
        self.names = f"{path.stem} {self._session.get_modelmeta().graph_name}"
        self._lock = threading.Lock()

    def run(self, images: NDArray[Any], outputs: Sequence[str]) -> list[Any]:
        with self._lock, native_calls:
            if self._session is None:
                raise ICNetError(f"{self._path}: this Predictor is closed")
            try:
                found: list[Any] = self._session.run([*outputs], {self.interface.inputs[0].name: images})
            except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
                height, width = images.shape[2:] if channels_first(self.interface.inputs[0]) else images.shape[1:3]
                raise ModelError(
                    f"{self._path}: the detector failed on images of {width}×{height} pixels: {reason(error)}"
                ) from error
        return found

    def close(self) -> None:
        with self._lock:
            self._session = None


class _Other:
    """A backend of ICNet's: it checks the tensors as a detector's, and gives the first map alone."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.interface, self.close = backend.interface, backend.close
        self.maps: Sequence[str] = [self.interface.output.name]
        self.names = f"{backend.path.stem} {backend.name}"
        self.limits = backend.limits if isinstance(backend, TensorRTBackend) else None
        self._lock = threading.Lock()

    def run(self, images: NDArray[Any], outputs: Sequence[str]) -> list[Any]:
        with self._lock:  # calls take turns, for their memory's sake
            return [self._backend.submit(images).result()]
