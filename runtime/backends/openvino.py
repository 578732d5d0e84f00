"""OpenVINO, for .xml files from `icnet build --backend openvino`: on CPUs, and on Intel's GPUs and NPUs.

The model is compiled once, for calls of all lengths. Every call has an infer request to itself, so the inputs of one
are copied while another computes. The calls of one Predictor share one stream of OpenVINO's, which is all threads.
"""

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import check_sizes, warn_of_other_engine
from runtime.backends.onnx import Finished
from runtime.contract import CALIBRATED_FOR, WEIGHTS, Contract, card_of, check_contract
from runtime.errors import DependencyError, ICNetError, ModelError, how_to_install
from runtime.files import check_model_file, utf8_name
from runtime.openvino_library import BIN_DIGEST, COMPOSED, CPU, PRECISION, compiled, read_notes, reason, specs
from runtime.threads import native_calls


class OpenVinoBackend:
    """A compiled model of OpenVINO.

    Args:
        path: an .xml file that follows the contract, with its .bin beside it.
        threads: CPU threads for one call; None for OpenVINO's choice, one per physical core.
        device: OpenVINO's name for it: "CPU", "GPU", "GPU.1", "NPU", "AUTO" or the like.
        verify: whether the .bin is compared with its digest in the .xml.
        contract: what its tensors must be; of another network than ICNet, another check.

    Raises:
        ModelError: not an OpenVINO model, or not what `contract` asks for, or the .bin is missing or another model's.
        DependencyError: OpenVINO is not installed, or has no such device here.
    """

    slots = 1  # groups at once that one caller can have in work

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        device: str = CPU,
        verify: bool = True,
        contract: Contract = check_contract,
    ) -> None:
        self.path = path
        check_model_file(path)
        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise ModelError(f"{path}: its weights are not beside it, as {weights.name}; the two files go together")
        if not utf8_name(path):
            raise ModelError(f"{path}: OpenVINO takes names of files that are UTF-8 only; rename it")
        try:
            import openvino
        except ImportError as error:
            raise DependencyError(f"openvino is not installed: {how_to_install('openvino')}") from error
        with native_calls:
            core = openvino.Core()
            try:
                model = core.read_model(str(path), str(weights))
            except Exception as error:  # RuntimeError, mostly
                raise ModelError(
                    f"{path}: not an OpenVINO model, or one for a newer OpenVINO than is installed here, or "
                    f"{weights.name} is another's: {reason(error)}"
                ) from error
            self.interface = contract(path, specs(model.inputs), specs(model.outputs))
            notes, onnx_notes = read_notes(model)
            self.name = f"{model.friendly_name} {notes.get('onnx', '')}"
            if verify and BIN_DIGEST in notes and notes[BIN_DIGEST] != _digest(weights):
                raise ModelError(
                    f"{path}: {weights.name} is damaged, or another model's: copy both files, or build them again"
                )
            _check_device(core, device)
            self._model: Any = compiled(core, model, notes.get(PRECISION), threads, device, path)
        warn_of_other_engine(path, onnx_notes.get(CALIBRATED_FOR), "openvino")
        self.largest = self.interface.size
        self.weights_digest: str | None = onnx_notes.get(WEIGHTS)
        self.card = card_of(onnx_notes)
        self._free: list[Any] = []  # infer requests
        self._working = 0
        self._changed = threading.Condition()

    def check_group(self, images: int, bank_size: int = 1) -> None:
        """Raise ModelError if the model is for groups or banks of another size."""
        check_sizes(self.path, self.interface, images, bank_size, "icnet build --backend openvino")

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> Finished:
        """Run a call: a tensor for each of the interface's inputs; after the `last` the CPU's memory is given back."""
        with self._changed:
            if self._model is None:
                raise ICNetError(f"{self.path}: this Predictor is closed")
            request = self._free.pop() if self._free else self._model.create_infer_request()
            self._working += 1
        try:
            with native_calls:
                return Finished(self._run(request, tensors))
        finally:
            with self._changed:
                self._working -= 1
                self._free.append(request)
                if last and not self._working and self._model is not None:
                    self._free.clear()
                    self._model.release_memory()
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse further calls, wait for those in work, and free everything."""
        with self._changed:
            model, self._model = self._model, None
            self._changed.wait_for(lambda: not self._working)
            self._free.clear()
            del model

    def _run(self, request: Any, tensors: tuple[NDArray[Any], ...]) -> NDArray[np.float32]:
        try:
            request.infer({spec.name: array for spec, array in zip(self.interface.inputs, tensors, strict=True)})
            # The request's own memory: the next call through it writes there.
            output: NDArray[np.float32] = request.get_tensor(self.interface.output.name).data.copy()
        except Exception as error:
            n, why = len(tensors[0]), reason(error)
            if isinstance(error, MemoryError) or "alloc" in why:
                raise ModelError(f"{self.path}: out of memory for a group of {n}; split the group") from error
            raise ModelError(f"{self.path}: failed on a group of {n}: {why}") from error
        return output


def _check_device(core: Any, device: str) -> None:
    there = core.available_devices
    if device.partition(":")[0] in COMPOSED or any(name == device or name.startswith(f"{device}.") for name in there):
        return
    raise DependencyError(f"device {device}: OpenVINO has no such device here; it has {', '.join(there)}")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
