"""Families of detectors: how their authors normalise pixels, at which size they run, and what they do to the map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalisation:
    """(pixels / divisor − mean) / std, per channel; the divisor None is the largest value in the image."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    divisor: float | None = 255
    bgr: bool = False

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Float32 [height, width, 3] of RGB uint8."""
        divisor = max(int(pixels.max()), 1) if self.divisor is None else self.divisor
        found = pixels[:, :, ::-1] if self.bgr else pixels
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled: NDArray[np.float32] = (found.astype(np.float32) / np.float32(divisor) - mean) / std
        return scaled


PRESETS = {
    "imagenet": Normalisation(*IMAGENET),
    "unit": Normalisation((0, 0, 0), (1, 1, 1)),  # 0 … 1
    "half": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # −1 … 1
    "isnet": Normalisation((0.5, 0.5, 0.5), (1, 1, 1)),
    "u2net": Normalisation(*IMAGENET, divisor=None),
    "egnet": Normalisation((104.00699, 116.66877, 122.67892), (1, 1, 1), divisor=1, bgr=True),
}


@dataclass(frozen=True)
class Family:
    """Detectors that are alike, as their authors run them.

    Attributes:
        name: of the family.
        pattern: matches the names of its files.
        preset: its normalisation.
        side: of the images it sees, in pixels, where a file leaves that open; None for the image's own size.
        minmax: its maps are stretched to 0 … 1.
    """

    name: str
    pattern: str
    preset: str
    side: int | None
    minmax: bool = False


U2NET = Family("U²-Net", r"u2-?net|silueta", "u2net", 320, True)
FAMILIES = (
    U2NET,
    Family("IS-Net", r"is-?net|rmbg-?1", "isnet", 1024, True),
    Family("BiRefNet", r"birefnet|rmbg-?2", "imagenet", 1024),
    Family("InSPyReNet", r"inspyrenet", "imagenet", 1024),
    Family("MODNet", r"modnet", "half", 512),
    Family("EGNet", r"egnet", "egnet", None),
)


def normalisation(given: str | Sequence[object]) -> Normalisation:
    """A normalisation from what a caller says.

    Args:
        given: a name in `PRESETS`; "MEAN,STD" with two numbers or six; or (mean, std), each a number or three.

    Raises:
        InputError: it is not that.
    """
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    try:
        if isinstance(given, str):
            numbers = np.array([float(part) for part in given.split(",")]).reshape(2, -1)
            mean, std = (np.broadcast_to(part, 3) for part in numbers)
        else:
            mean, std = (np.broadcast_to(np.asarray(part, dtype=np.float64), 3) for part in given)
    except (TypeError, ValueError):
        mean = std = np.zeros(3)
    if not (np.isfinite([mean, std]).all() and (std > 0).all()):
        raise InputError(
            f"normalisation {given!r}: expected {', '.join(PRESETS)}, or MEAN,STD of pixels in [0, 1]: two numbers or "
            "six (three means, three deviations above 0)"
        )
    return Normalisation(
        (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))
    )
