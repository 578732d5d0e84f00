"""MNN on the CPU: Winograd convolutions, for .mnn files from `icnet build --backend mnn`.

One session serves calls of all lengths. A change of length plans the memory anew; the transformed weights, which take
long to compute, stay. A call uses all of the session's threads, so calls from several threads take turns.
"""

import json
import mmap
import struct
import threading
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import check_sizes
from runtime.backends.onnx import Finished
from runtime.contract import SIZE, WEIGHTS, Contract, ExportKind, TensorSpec, card_of, check_contract
from runtime.errors import DependencyError, ICNetError, ModelError, how_to_install, one_line
from runtime.files import check_model_file, utf8_name
from runtime.silence import STDOUT, silenced
from runtime.threads import cores, native_calls

OUT_OF_MEMORY = 1  # MNN's ErrorCode
# MNN counts a tensor's bytes in 32 bits: beyond that it computes wrong maps without an error, or crashes. The largest
# tensors are refine_1's joined features and Co4's correlation maps.
MAX_BYTES = 2**31 - 1
FEATURES, PADDED = 96, 16  # channels at width 1, at 224×224 pixels; to a multiple of which MNN may pad them
PROBED = 64  # side of an image, in pixels, while a file that takes any is opened
PAIR_BYTES = 4 * 2 * 28 * 28  # of one image with one image of its group, or of the bank: two maps


class MnnBackend:
    """A session of MNN on an exported model.

    Args:
        path: an .mnn file that follows the contract.
        threads: CPU threads for one call; None for one per CPU that this process may use.
        contract: what its tensors must be; of another network than ICNet, another check.

    Raises:
        ModelError: not an MNN file, or not what `contract` asks for.
        DependencyError: MNN is not installed.
    """

    slots = 1  # groups at once that one caller can have in work

    def __init__(self, path: Path, threads: int | None = None, contract: Contract = check_contract) -> None:
        self.path = path
        check_model_file(path)
        with silenced(STDOUT), native_calls:  # MNN's C++ prints when it is imported and when it refuses a file
            try:
                import MNN
            except ImportError as error:
                raise DependencyError(f"MNN is not installed: {how_to_install('mnn')}") from error
            try:
                self._interpreter = MNN.Interpreter(str(self.path))
            except Exception as error:  # MNN raises Exception itself, and prints the reason
                if not utf8_name(path):
                    raise ModelError(f"{path}: MNN takes names of files that are UTF-8 only; rename it") from error
                raise ModelError(
                    f"{self.path}: not an MNN model, or one for a newer MNN than is installed here: {one_line(error)}"
                ) from error
        # "normal" is FP32 on x86 and ARM alike; only "low" would round to 16 bits.
        config = {"backend": "CPU", "numThread": threads or cores(), "precision": "normal"}
        try:
            self._session = self._interpreter.createSession(config)
            inputs, outputs = self._tensors()
        except Exception as error:
            raise ModelError(f"{self.path}: not a model that this MNN can run: {one_line(error)}") from error
        of_file = _notes(self.path)
        if isinstance(batch := of_file.get("batch"), int):  # which MNN alone does not tell
            inputs = [replace(spec, shape=(batch, *spec.shape[1:])) for spec in inputs]
        self.interface = contract(self.path, inputs, outputs)
        self.largest = self.interface.size
        self.name = f"{of_file.get('graph', '')} {of_file.get('onnx', '')}"
        found = of_file.get("onnx_metadata")
        notes = found if isinstance(found, dict) else {}
        weights = notes.get(WEIGHTS)
        self.weights_digest = weights if isinstance(weights, str) else None
        self.card = card_of(notes)
        self._image_bytes = 4 * SIZE**2 * PADDED * ceil(FEATURES * _width(notes) / PADDED)
        self._planned: list[tuple[int, ...]] | None = None  # the inputs' shapes
        self._lock = threading.Lock()
        self._closed = False

    def check_group(self, images: int, bank_size: int = 1) -> None:
        """Raise ModelError if the model is for groups or banks of another size, or if tensors get too large for MNN."""
        kind = self.interface.kind
        check_sizes(self.path, self.interface, images, bank_size, "icnet build --backend mnn")
        pairs = {ExportKind.INTRA: 0, ExportKind.BANKED: images * bank_size}.get(kind, images**2)
        if max(images * self._image_bytes, pairs * PAIR_BYTES) > MAX_BYTES:
            beside = f" with a bank of {bank_size}" if kind is ExportKind.BANKED else ""
            raise ModelError(
                f"{self.path}: {images} images{beside} are too many at once for MNN, which has 2 GB per tensor; run "
                "fewer at once (max_images; a large group takes the two files of a bank export), or run the ONNX file"
            )

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> Finished:
        """Run a call: a tensor for each of the interface's inputs.

        The session keeps the memory of its largest call, even after the `last`.
        """
        with self._lock:
            if self._closed:
                raise ICNetError(f"{self.path}: this Predictor is closed")
            with native_calls:
                return Finished(self._run(tensors))

    def close(self) -> None:
        """Give the session's memory back, after the call in work; those that wait for their turn are refused."""
        self._closed = True
        with self._lock:
            self._session = self._interpreter = None

    def _tensors(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The inputs and the outputs; a session plans memory for images of any size only once they have one."""
        inputs = self._interpreter.getSessionInputAll(self._session)
        shapes = {name: tuple(tensor.getShape()) for name, tensor in inputs.items()}
        if any(n < 0 for shape in shapes.values() for n in shape):
            for name, tensor in inputs.items():
                self._interpreter.resizeTensor(tensor, tuple(PROBED if n < 0 else n for n in shapes[name]))
            self._interpreter.resizeSession(self._session)
            inputs = self._interpreter.getSessionInputAll(self._session)
        return _specs(inputs, shapes), _specs(self._interpreter.getSessionOutputAll(self._session))

    def _run(self, arrays: tuple[NDArray[Any], ...]) -> NDArray[np.float32]:
        of_session = self._interpreter.getSessionInputAll(self._session)
        tensors = [of_session[spec.name] for spec in self.interface.inputs]
        n, shapes = len(arrays[0]), [array.shape for array in arrays]
        planned, self._planned = self._planned, None
        if shapes != planned:
            for tensor, array in zip(tensors, arrays, strict=True):
                self._interpreter.resizeTensor(tensor, array.shape)
            self._interpreter.resizeSession(self._session)
        for spec, tensor, array in zip(self.interface.inputs, tensors, arrays, strict=True):
            view = _view(tensor)
            if view.shape != array.shape:  # MNN could not plan it, and has said so on standard output only
                raise ModelError(f"{self.path}: MNN can't run it on a group of {n}: {spec.name} becomes {view.shape}")
            np.copyto(view, array)
        code = self._interpreter.runSession(self._session)
        if code == OUT_OF_MEMORY:
            raise ModelError(f"{self.path}: out of memory for a group of {n}; split the group")
        if code != 0:
            raise ModelError(f"{self.path}: failed on a group of {n}: MNN's error {code}")
        self._planned = shapes
        return _view(self._interpreter.getSessionOutput(self._session, self.interface.output.name)).copy()


def _specs(tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None) -> list[TensorSpec]:
    """Names, types and shapes, which may be given where tensors have others for now.

    MNN gives a dynamic first axis as 1, so a first axis of 1 is taken to be dynamic, and other dynamic axes as -1.
    """
    views = {name: _view(tensor) for name, tensor in tensors.items()}
    shapes = {name: view.shape for name, view in views.items()} | (shapes or {})
    return [
        TensorSpec(name, str(view.dtype), tuple(None if n < 0 or (i, n) == (0, 1) else n for i, n in enumerate(shape)))
        for (name, view), shape in zip(views.items(), shapes.values(), strict=True)
    ]


def _view(tensor: Any) -> NDArray[Any]:
    """The memory of a session's tensor; it is valid until the session is resized or freed."""
    view: NDArray[Any] = tensor.getNumpyData()
    return view


def _notes(path: Path) -> dict[str, Any]:
    """The notes of `icnet build` (see `export.to_mnn`), if `bizCode` in the file holds them; else none.

    MNN's Python has no access to it but by loading the model a second time. The file is a FlatBuffer, whose root table
    has `bizCode` as its first field (MNN's schema, `Net`); MNN has verified it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def at(kind: str, position: int) -> int:
            return int(struct.unpack_from(kind, data, position)[0])

        try:
            root = at("<I", 0)
            vtable = root - at("<i", root)
            field = root + at("<H", vtable + 4)
            text = field + at("<I", field)
            notes = json.loads(data[text + 4 : text + 4 + at("<I", text)])
        except (struct.error, ValueError):  # another's file
            return {}
    return notes if isinstance(notes, dict) else {}


def _width(notes: dict[str, Any]) -> float:
    """The network's width; the paper's where the notes don't tell."""
    try:
        return float(notes["width"])
    except (KeyError, TypeError, ValueError):
        return 1.0
