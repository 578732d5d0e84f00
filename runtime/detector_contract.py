"""What a detector's tensors must be: one image in, and a map with a single channel out.

Unlike ICNet's, their names, types, layouts and sizes are the detector's own. What `icnet export` makes of EGNet and of
the demo's detector has `INPUT` and `OUTPUT`, with the normalisation inside.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import Dim, ExportKind, Interface, TensorSpec, check_contract
from runtime.errors import InputError, ModelError

LARGEST = 8192  # of an axis of fixed size
FLOATS = {"float32": np.float32, "float16": np.float16}
INPUT = TensorSpec("images", "uint8", ("B", "H", "W", 3))  # of our own exports: RGB
OUTPUT = TensorSpec("sisms", "float32", ("B", "H", "W"))  # in [0, 1]


def check_detector(path: object, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Interface:
    """Check that a model's tensors are a detector's.

    Args:
        path: the model's file, for the message.
        inputs: the model's inputs: one image, [B, 3, H, W] or [B, H, W, 3] of float32, float16 or uint8.
        outputs: its outputs.

    Returns:
        Its tensors. `output` is the first that may be a map, and `size` the number of images in every call, if fixed.

    Raises:
        InputError: it is an exported ICNet.
        ModelError: it is no detector; the message says why.
    """
    if len(inputs) != 1:
        with suppress(ModelError):
            check_contract(path, inputs, outputs)
            raise InputError(f"{path}: ICNet, not a detector: it is for the model (Predictor(MODEL), --model)")
        found = ", ".join(map(str, inputs)) or "none"
        raise ModelError(f"{path}: not a detector: it has {len(inputs)} inputs, and a detector one, an image ({found})")
    maps = [spec for spec in outputs if _may_be_map(spec)]
    if not maps:
        raise ModelError(
            f"{path}: not a detector: no output has a single channel, as a map has ({', '.join(map(str, outputs))})"
        )
    image = inputs[0]
    ends = (image.shape[1], image.shape[3]) if len(image.shape) == 4 else (0, 0)
    if image.dtype not in (*FLOATS, "uint8") or not (3 in ends or None in map(fixed, ends)):
        raise ModelError(
            f"{path}: not a detector: expected an image, [B, 3, H, W] or [B, H, W, 3] of float32, float16 or uint8, "
            f"found {image}"
        )
    if any(not 1 <= n <= LARGEST for n in image.shape if isinstance(n, int)):
        raise ModelError(f"{path}: {image}: an axis outside 1 … {LARGEST}")
    others = tuple(spec for spec in outputs if spec is not maps[0])
    return Interface(ExportKind.DETECTOR, (image,), maps[0], fixed(image.shape[0]), others)


def check_any(path: object, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Interface:
    """The tensors of an exported ICNet, or of a detector; arguments and errors are those of the two checks."""
    one_image = len(inputs) == 1 and len(inputs[0].shape) == 4
    return (check_detector if one_image else check_contract)(path, inputs, outputs)


def candidates(interface: Interface) -> list[str]:
    """The outputs that may be a detector's map."""
    return [spec.name for spec in (interface.output, *interface.others) if _may_be_map(spec)]


def channels_first(image: TensorSpec) -> bool:
    """Whether a detector's image is [B, 3, H, W]."""
    first, last = image.shape[1], image.shape[3]
    return first == 3 or (last != 3 and fixed(first) is None)


def fixed(n: Dim) -> int | None:
    """The length of an axis; None for any."""
    return n if isinstance(n, int) else None


def single(array: Any, n: int) -> NDArray[np.float32]:
    """Float32 [n, h, w] of an output with one channel for n images; of any other output, [0, h, w]."""
    if not isinstance(array, np.ndarray):  # ONNX has sequences and dictionaries too
        return np.empty((0, 1, 1), np.float32)
    if array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
        array = array[:, 0] if array.shape[1] == 1 else array[..., 0]
    elif array.ndim == 2 and n == 1:
        array = array[None]
    if array.ndim != 3 or len(array) != n or min(array.shape) == 0:
        return np.empty((0, 1, 1), np.float32)
    maps: NDArray[np.float32] = array.astype(np.float32, copy=False) / np.float32(255 if array.dtype == np.uint8 else 1)
    return maps


def _may_be_map(spec: TensorSpec) -> bool:
    channels = (spec.shape[1], spec.shape[3]) if len(spec.shape) == 4 else (1,)
    return len(spec.shape) <= 4 and any(n == 1 or not isinstance(n, int) for n in channels)
