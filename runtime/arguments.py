"""What a caller of `Predictor` gives: paths, sequences with one entry per image, groups, tensors."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.contract import INPUTS, TensorSpec
from runtime.errors import InputError
from runtime.preprocess import EXPECTED, ImageSource

# Iterable, perhaps, but no sequence of images.
UNORDERED = (str, bytes, bytearray, memoryview, io.IOBase, os.PathLike, set, frozenset, dict)


def path_of(file: object, argument: str) -> Path:
    """A path; anything else is an InputError that names the argument."""
    if not isinstance(file, str | os.PathLike) or not isinstance(os.fspath(file), str):
        raise InputError(f"{argument}: expected a path, got {type(file).__name__}")
    if not os.fspath(file):
        raise InputError(f"{argument}: the path is empty")
    return Path(os.fspath(file))


def images_alone(group: object) -> bool:
    """Whether a group is its images, and no pair (images, SISMs)."""
    if not isinstance(group, tuple | list) or len(group) != 2:
        return isinstance(group, Iterable) and not isinstance(group, UNORDERED)
    first = group[0]
    return isinstance(first, (*UNORDERED, Image.Image)) or (isinstance(first, np.ndarray) and first.ndim < 4)


def listed(sources: Iterable[ImageSource], what: str, ndim: int) -> list[ImageSource]:
    """A list with one entry per image; an array must have `ndim` axes at least, or it is one image and no group.

    Raises:
        InputError: it is no sequence of images; the message calls it `what`.
    """
    if isinstance(sources, UNORDERED) or not isinstance(sources, Iterable):
        raise InputError(f"{what}: expected a sequence with one entry per image, got {type(sources).__name__}")
    if isinstance(sources, np.ndarray) and sources.ndim < ndim:
        raise InputError(
            f"{what}: expected a sequence with one entry per image, got one array of shape {sources.shape}"
        )
    entries = list(sources)
    for index, source in enumerate(entries):
        if source is None:  # which inside the package asks for a built-in SISM
            raise InputError(f"{what}[{index}]: {EXPECTED}, got NoneType")
    return entries


def check_groups(groups: object, on_error: object) -> None:
    """Raise InputError unless these are groups, and a way to meet errors."""
    if isinstance(groups, UNORDERED) or not isinstance(groups, Iterable):
        raise InputError(f"groups: expected (images, sisms) for each group, got {type(groups).__name__}")
    if on_error not in ("raise", "return"):
        raise InputError(f"on_error={on_error!r}: expected 'raise' or 'return'")


def check_pair(index: int, group: object) -> None:
    """Raise InputError unless a group is a pair (images, SISMs)."""
    if not (isinstance(group, tuple | list) and len(group) == 2):
        kind = f"{len(group)} entries" if isinstance(group, tuple | list) else type(group).__name__
        raise InputError(f"groups[{index}]: expected (images, sisms), got {kind}")


def check_tensors(*arrays: object) -> None:
    """Raise InputError unless these are a group's images and SISMs at the network's size."""
    for spec, array in zip(INPUTS, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise InputError(f"{spec.name}: expected a NumPy array, got {type(array).__name__}")
        found = TensorSpec(spec.name, str(array.dtype), array.shape)
        if len(array.shape) != len(spec.shape) or not spec.accepts(found):
            raise InputError(f"expected {spec}, got {found}")
