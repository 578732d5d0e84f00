"""A detector of salient objects, which makes the SISM of an image that has none: an image in, a map out.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import CPU
from runtime.detector_contract import FLOATS, INPUT, LARGEST, OUTPUT, candidates, channels_first, fixed, single
from runtime.detector_engine import open_engine
from runtime.detector_families import FAMILIES, PRESETS, U2NET, Family, Normalisation, normalisation
from runtime.errors import InputError, ModelError
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

logger = logging.getLogger(__name__)

MAX_SIDE = 640  # pixels, of an image that a detector of any size sees: EGNet was trained on images of up to 400
MULTIPLE = 32  # of pixels, of the sides for a network of unknown kind: most halve an image five times
CALL_PIXELS = 8 * 320 * 320  # in a call of several images, which bounds its memory


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
    """A detector in its engine. Safe from several threads; calls take turns, for their memory's sake.

    Args:
        path: an .onnx file, or an .xml, .mnn or engine file from `icnet build` or another builder. Its input is one
            image: [B, 3, H, W] or [B, H, W, 3] of float32, float16 or uint8, any of B, H and W fixed or not. Its map is
            the first output with a single channel. A file from `icnet export --network egnet` tells all by itself.
        threads: as for `Predictor`.
        providers: likewise.
        device: likewise; only what the file's engine takes is heeded.
        allow_host_code: likewise.
        normalise: a name in `PRESETS`; or (mean, std) of pixels in [0, 1], each a number or three; None to guess.
        minmax: whether each map is stretched to 0 … 1; None for what its family does, else not.
        verify: whether a file that has a digest in it is checked.

    Attributes:
        path: the file.
        settings: how it is run, in words: what was read, guessed and seen. The same file with the same settings gives
            the same SISMs.

    Raises:
        ModelError: not a detector, or of unknown normalisation; the message says what to do.
        InputError: `normalise` is not that, or the file is an exported ICNet.
        DependencyError: the engine's packages are not installed, or there is no GPU.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        *,
        device: int | str | None = None,
        allow_host_code: bool = False,
        normalise: str | Sequence[object] | None = None,
        minmax: bool | None = None,
        verify: bool = True,
    ) -> None:
        self.path = path
        given = None if normalise is None else normalisation(normalise)
        self._engine = open_engine(path, threads, providers, device, allow_host_code, verify)
        self._unsaid = threading.Semaphore()  # that an image is too large is said once
        try:
            self.settings = self._understand(given, normalise, minmax)
        except BaseException:
            self._engine.close()
            raise
        logger.info("%s: %s", path, self.settings)

    def _understand(self, given: Normalisation | None, normalise: object, minmax: bool | None) -> str:
        """Settle how the network is run; that in words."""
        interface = self._engine.interface
        self._outputs = [*self._engine.maps]
        self._input = interface.inputs[0]
        names = (self._input.name, interface.output.name)
        own = self._input.dtype == INPUT.dtype and names == (INPUT.name, OUTPUT.name)
        self._first = channels_first(self._input)
        self._batch = interface.size
        self._height, self._width = map(fixed, self._input.shape[2:] if self._first else self._input.shape[1:3])
        family, by = self._family(len(candidates(interface)))
        self._normalisation, normalised = self._choose(given, normalise, family)
        self._side = None if family is None or own else family.side
        self._free = self._side is None and not (self._width and self._height)  # to see images of any size
        self._multiple = 1 if own or (family is not None and family.side is None) else MULTIPLE
        low, high = self._engine.limits or ((1,) * 4, (LARGEST,) * 4)
        sides = slice(2, 4) if self._first else slice(1, 3)
        self._most = high[0]  # images in a call
        self._least_sides = [-(-n // self._multiple) * self._multiple for n in low[sides]]  # height, width
        self._most_sides = [n // self._multiple * self._multiple or n for n in high[sides]]
        self._max_side = min(MAX_SIDE, max(self._most_sides))
        self._minmax = minmax if minmax is not None else family is not None and family.minmax and not own
        self._logits = False
        values = "probabilities" if own else self._try()
        said = [
            f"its pixels {normalised}" + (f" (taken for {family.name} by its {by})" if family and not own else ""),
            f"at {self._size_text()}",
            *(["one image at a time, as its batch is fixed"] if self._batch == 1 else []),
            values,
            *(["maps stretched to 0 … 1"] if self._minmax else []),
        ]
        return ", ".join(said)

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
        if self._free and max(image.size) > self._max_side and self._unsaid.acquire(blocking=False):
            logger.warning(
                "%s: %d×%d pixels; images of more than %d on a side are resized to that for the detector",
                *(name, *image.size, self._max_side),
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
        """Give the engine's memory back, after the call in work."""
        self._engine.close()

    def _calls(self, images: Sequence[Undetected]) -> Iterator[list[Undetected]]:
        """Images that follow each other, are of one size and fit into one call."""
        waiting = [*images]
        while waiting:
            shape = waiting[0].seen.shape
            most = self._batch or min(max(CALL_PIXELS // (shape[0] * shape[1]), 1), self._most)
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
        found = self._engine.run(feed, outputs)
        return [single(array, len(pixels))[: len(images)] for array in found]

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
        scale = min(1, self._max_side / max(width, height))
        wanted = (max(round(n * scale / self._multiple), 1) * self._multiple for n in (height, width))
        within = zip(self._least_sides, wanted, self._most_sides, strict=True)
        free_height, free_width = (min(max(low, self._side or n), high) for low, n, high in within)
        return self._width or free_width, self._height or free_height

    def _size_text(self) -> str:
        if self._free:
            least = min(self._least_sides)
            sides = f"{least} to {self._max_side}" if least > self._multiple else f"up to {self._max_side}"
            return f"their own size, of {sides} pixels on a side"
        width, height = self._size_for(MAX_SIDE, MAX_SIDE)
        return f"{width}×{height} pixels"

    def _family(self, maps: int) -> tuple[Family | None, str]:
        """The family of a file, and by what it was known."""
        for family in FAMILIES:
            if re.search(family.pattern, self._engine.names.lower()):
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
