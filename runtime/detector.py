"""A detector of salient objects, which makes the SISM of an image that has none: an ONNX file, an image in, a map out.

What can be read from the file is read from it: size, layout, type, batch and output. It does not tell how pixels were
normalised in training, so that is given, or guessed from the families of detectors below, and said. Whether an output
holds logits or probabilities is seen on a test image when the file is opened.

A SISM becomes bytes by one rule: resized to the image's upright size, then round(255·SISM); ICNet's own resize follows.
So a SISM that stays in memory and one that was saved and read again are the same bytes.
"""

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import CPU, reason, session_tensors, start_session
from runtime.backends.opening import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES, MNN_SUFFIX, OPENVINO_SUFFIX
from runtime.contract import Dim, TensorSpec, check_contract
from runtime.detector_families import FAMILIES, PRESETS, U2NET, Family, Normalisation, normalisation
from runtime.errors import ICNetError, InputError, ModelError
from runtime.files import check_model_file, check_seal
from runtime.grey import grey_levels
from runtime.preprocess import (
    BILINEAR,
    TOLERANCE,
    ImageSource,
    name_of,
    resized,
    restore_map,
    rgb_image,
)
from runtime.threads import native_calls

logger = logging.getLogger(__name__)

MAX_SIDE = 640  # pixels, of an image that a detector of any size sees: EGNet was trained on images of up to 400
MULTIPLE = 32  # of pixels, of the sides for a network of unknown kind: most halve an image five times
LARGEST = 8192  # of an axis of fixed size
CALL_PIXELS = 8 * 320 * 320  # in a call of several images, which bounds its memory
FLOATS = {"float32": np.float32, "float16": np.float16}
OTHER_ENGINES = {*ENGINE_SUFFIXES, MNN_SUFFIX, OPENVINO_SUFFIX}
INPUT = TensorSpec("images", "uint8", ("B", "H", "W", 3))  # of our own exports: RGB
OUTPUT = TensorSpec("sisms", "float32", ("B", "H", "W"))  # in [0, 1]


@dataclass(frozen=True)
class Undetected:
    """An image that a detector has yet to see.

    Attributes:
        image: RGB uint8 [224, 224, 3], for ICNet.
        seen: RGB uint8 [height, width, 3], for the detector.
        size: (width, height) of the upright image in pixels.
        name: what messages call it.
    """

    image: NDArray[np.uint8]
    seen: NDArray[np.uint8]
    size: tuple[int, int]
    name: str


class Detector:
    """A session of ONNX Runtime on a detector. Safe from several threads; calls take turns, for their memory's sake.

    Args:
        path: an .onnx file. Its input is one image: [B, 3, H, W] or [B, H, W, 3] of float32, float16 or uint8, any of
            B, H and W fixed or not. Its map is the first output with a single channel. A file from `icnet export
            --network egnet` tells all by itself.
        threads: as for `OnnxBackend`.
        providers: likewise.
        normalise: a name in `PRESETS`; or (mean, std) of pixels in [0, 1], each a number or three; None to guess.
        minmax: whether each map is stretched to 0 … 1; None for what its family does, else not.
        verify: whether a file that has a digest in it is checked.

    Attributes:
        path: the file.
        settings: how it is run, in words: what was read, guessed and seen. The same file with the same settings gives
            the same SISMs.

    Raises:
        ModelError: not a detector, or of unknown normalisation; the message says what to do.
        InputError: `normalise` is not that.
        DependencyError: as for `OnnxBackend`.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        *,
        normalise: str | Sequence[object] | None = None,
        minmax: bool | None = None,
        verify: bool = True,
    ) -> None:
        self.path = path
        given = None if normalise is None else normalisation(normalise)
        _check_file(path, verify)
        self._session: Any = start_session(path, threads, providers).session  # None: closed
        self._lock = threading.Lock()
        self._unsaid = threading.Semaphore()  # that an image is too large is said once
        inputs, outputs = session_tensors(self._session)
        self._outputs = _candidates(path, inputs, outputs)
        self._input = inputs[0]
        own = INPUT.name == self._input.name and self._input.dtype == INPUT.dtype and outputs[0].name == OUTPUT.name
        self._first = _layout(path, self._input)
        self._batch = _fixed(self._input.shape[0])
        self._height, self._width = map(_fixed, self._input.shape[2:] if self._first else self._input.shape[1:3])
        family, by = self._family(len(self._outputs))
        self._normalisation, normalised = self._choose(given, normalise, family)
        self._side = None if family is None or own else family.side
        self._free = self._side is None and not (self._width and self._height)  # to see images of any size
        self._multiple = 1 if own or (family is not None and family.side is None) else MULTIPLE
        self._minmax = minmax if minmax is not None else family is not None and family.minmax and not own
        self._logits = False
        values = "probabilities" if own else self._try()
        self.settings = ", ".join(
            [
                f"its pixels {normalised}" + (f" (taken for {family.name} by its {by})" if family and not own else ""),
                f"at {self._size_text()}",
                *(["one image at a time, as its batch is fixed"] if self._batch == 1 else []),
                values,
                *(["maps stretched to 0 … 1"] if self._minmax else []),
            ]
        )
        logger.info("%s: %s", path, self.settings)

    def look(self, source: ImageSource, name: str = "image") -> Undetected:
        """Decode an image once, for ICNet and for this detector; for a pool of threads.

        Args:
            source: as for `preprocess.image_tensor`.
            name: likewise.

        Raises:
            InputError: it can't be read, or is no image.
        """
        image, name = rgb_image(source, name), name_of(source, name)
        size = self._size_for(*image.size)
        if self._free and max(image.size) > MAX_SIDE and self._unsaid.acquire(blocking=False):
            logger.warning(
                "%s: %d×%d pixels; images of more than %d on a side are resized to that for the detector",
                *(name, *image.size, MAX_SIDE),
            )
        seen = np.asarray(image if size == image.size else image.resize(size, BILINEAR))
        return Undetected(resized(image), seen, image.size, name)

    def __call__(self, images: Sequence[Undetected]) -> list[NDArray[np.float32]]:
        """The maps of images, float32 [h, w] in [0, 1] of the detector's own output size.

        Raises:
            ModelError: the detector fails, or gives what can't be a map; the message names the image.
            ICNetError: it is closed.
        """
        maps: list[NDArray[np.float32]] = []
        for call in self._calls(images):
            (raw,) = self._run([image.seen for image in call], self._outputs)
            if not len(raw):
                raise ModelError(f"{call[0].name}: the detector {self.path} gave no map for it")
            maps += [self._map(*one) for one in zip(raw, (image.name for image in call), strict=True)]
        return maps

    def close(self) -> None:
        """Give the session's memory back, after the call in work."""
        with self._lock:
            self._session = None

    def _calls(self, images: Sequence[Undetected]) -> Iterator[list[Undetected]]:
        """Images that follow each other, are of one size and fit into one call."""
        waiting = [*images]
        while waiting:
            shape = waiting[0].seen.shape
            most = self._batch or max(CALL_PIXELS // (shape[0] * shape[1]), 1)
            same = next((i for i, image in enumerate(waiting) if image.seen.shape != shape), len(waiting))
            count = min(same, most)
            yield waiting[:count]
            del waiting[:count]

    def _run(self, images: Sequence[NDArray[np.uint8]], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Of each output, the raw maps [N, h, w] of N images of one size; none where it has several channels."""
        pixels = np.stack([image if self._normalisation is None else self._normalisation(image) for image in images])
        if self._batch:  # filled up with copies
            pixels = pixels[np.minimum(np.arange(self._batch), len(images) - 1)]
        if self._first:
            pixels = pixels.transpose(0, 3, 1, 2)
        feed = np.ascontiguousarray(pixels, dtype=FLOATS.get(self._input.dtype, np.uint8))
        with self._lock, native_calls:
            if self._session is None:
                raise ICNetError(f"{self.path}: this Predictor is closed")
            try:
                found = self._session.run([*outputs], {self._input.name: feed})
            except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
                height, width = images[0].shape[:2]
                raise ModelError(
                    f"{self.path}: the detector failed on images of {width}×{height} pixels: {reason(error)}"
                ) from error
        return [_single(array, len(pixels))[: len(images)] for array in found]

    def _map(self, raw: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        low, high = float(raw.min()), float(raw.max())  # NaN is carried through both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(f"{name}: the detector {self.path} computed NaN or infinite values for it")
        found = 1 / (1 + np.exp(-raw.clip(-80, 80))) if self._logits else raw
        if self._minmax:
            low, high = float(found.min()), float(found.max())
            found = (found - low) / (high - low) if high > low else found
        elif not self._logits and (low < -TOLERANCE or high > 1 + TOLERANCE):
            raise ModelError(
                f"{name}: the detector {self.path} gave values in [{low:g}, {high:g}], where its test image had "
                "probabilities; have its maps stretched (sism_minmax=True, --sism-minmax)"
            )
        return found.clip(0, 1).astype(np.float32, copy=False)

    def _size_for(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) at which the detector sees an image of that size."""
        if self._side is not None:
            return self._width or self._side, self._height or self._side
        scale = min(1, MAX_SIDE / max(width, height))
        free = (max(round(n * scale / self._multiple), 1) * self._multiple for n in (width, height))
        return tuple(fixed or n for fixed, n in zip((self._width, self._height), free, strict=True))  # type: ignore[return-value]

    def _size_text(self) -> str:
        if self._free:
            return f"their own size, of up to {MAX_SIDE} pixels on a side"
        width, height = self._size_for(MAX_SIDE, MAX_SIDE)
        return f"{width}×{height} pixels"

    def _family(self, maps: int) -> tuple[Family | None, str]:
        """The family of a file, and by what it was known."""
        names = f"{self.path.stem} {self._session.get_modelmeta().graph_name}".lower()
        for family in FAMILIES:
            if re.search(family.pattern, names):
                return family, "name"
        # U²-Net: a map of every decoder's stage, and the fused one before them.
        return (U2NET, "seven maps at 320×320") if (maps, self._height, self._width) == (7, 320, 320) else (None, "")

    def _choose(
        self, given: Normalisation | None, option: object, family: Family | None
    ) -> tuple[Normalisation | None, str]:
        """The normalisation, None for bytes, and how messages call it."""
        if self._input.dtype == "uint8":
            if given is not None:
                raise InputError(f"{self.path}: takes bytes, which it normalises itself; leave out the normalisation")
            return None, "as bytes"
        if given is not None:
            name = option if isinstance(option, str) else f"with mean {given.mean} and std {given.std}"
            return given, f"normalised as '{name}'" if name in PRESETS else f"normalised {name}"
        if family is None:
            raise ModelError(
                f"{self.path}: a detector of unknown kind, and the file does not tell how its pixels are normalised; "
                f"say it (sism_normalise=…, --sism-normalise): {', '.join(PRESETS)}, or MEAN,STD"
            )
        return PRESETS[family.preset], f"normalised as '{family.preset}'"

    def _try(self) -> str:
        """Run a test image: a bright disc on grey. Finds the output with the map, and what its values are."""
        width, height = self._size_for(320, 320)
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        image = np.where((x**2 + y**2 < 0.25)[:, :, None], (230, 200, 40), (90, 100, 110)).astype(np.uint8)
        found = self._run([image], self._outputs)
        maps = [(name, maps[0]) for name, maps in zip(self._outputs, found, strict=True) if len(maps)]
        if not maps:
            raise ModelError(f"{self.path}: no output is a map: none has a single channel on a test image")
        self._outputs = [maps[0][0]]
        low, high = float(maps[0][1].min()), float(maps[0][1].max())
        self._logits = low < -TOLERANCE
        if not self._logits and high > 1 + TOLERANCE and not self._minmax:
            raise ModelError(
                f"{self.path}: its map has values in [{low:g}, {high:g}] on a test image: neither probabilities nor "
                "logits; have its maps stretched (sism_minmax=True, --sism-minmax)"
            )
        return "logits, to which a sigmoid is applied" if self._logits else "probabilities"


def finished(image: Undetected, tensor: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A detector's map as a SISM's file has it: uint8 [height, width] of the image's upright size, round(255·SISM)."""
    sism = grey_levels(restore_map(tensor, image.size))
    if sism.max() - sism.min() < 2:
        logger.warning("%s: nothing stands out in it: its SISM is flat, %d of 255", image.name, sism.max())
    return sism


def network_sism(sism: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A SISM from `finished` at the network's size: uint8 [224, 224], as `preprocess.sism_tensor` gives of its file."""
    return resized(Image.fromarray(sism))


def _check_file(path: Path, verify: bool) -> None:
    check_model_file(path)
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        onnx = path.with_suffix(".onnx").name
        raise ModelError(
            f"{path}: a checkpoint; export it first: icnet export --network egnet --checkpoint {path} --output {onnx}"
        )
    if suffix in OTHER_ENGINES:
        raise ModelError(f"{path}: detectors run in ONNX Runtime; give the ONNX file that this was made from")
    if verify:
        check_seal(path)


def _candidates(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """The outputs that may be a map, after the check that there is one input."""
    if len(inputs) != 1:
        with suppress(ModelError):
            check_contract(path, inputs, outputs)
            raise InputError(f"{path}: ICNet, not a detector: it is for the model (Predictor(MODEL), --model)")
        found = ", ".join(map(str, inputs)) or "none"
        raise ModelError(f"{path}: not a detector: it has {len(inputs)} inputs, and a detector one, an image ({found})")
    names = [spec.name for spec in outputs if _may_be_map(spec)]
    if not names:
        raise ModelError(
            f"{path}: not a detector: no output has a single channel, as a map has ({', '.join(map(str, outputs))})"
        )
    return names


def _may_be_map(spec: TensorSpec) -> bool:
    channels = (spec.shape[1], spec.shape[3]) if len(spec.shape) == 4 else (1,)
    return len(spec.shape) <= 4 and any(n == 1 or not isinstance(n, int) for n in channels)


def _layout(path: Path, spec: TensorSpec) -> bool:
    """Whether the channels of an image come first."""
    first, last = (spec.shape[1], spec.shape[3]) if len(spec.shape) == 4 else (0, 0)
    if spec.dtype not in (*FLOATS, "uint8") or not (3 in (first, last) or None in map(_fixed, (first, last))):
        raise ModelError(
            f"{path}: not a detector: expected an image, [B, 3, H, W] or [B, H, W, 3] of float32, float16 or uint8, "
            f"found {spec}"
        )
    if any(not 1 <= n <= LARGEST for n in spec.shape if isinstance(n, int)):
        raise ModelError(f"{path}: {spec}: an axis outside 1 … {LARGEST}")
    return first == 3 or (last != 3 and _fixed(first) is None)


def _fixed(n: Dim) -> int | None:
    return n if isinstance(n, int) else None


def _single(array: Any, n: int) -> NDArray[np.float32]:
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
