"""What people make of maps: masks, cut-outs with soft edges, boxes."""

import os
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.contract import SIZE
from runtime.errors import DependencyError, InputError, how_to_install
from runtime.preprocess import ImageSource, rgb_image

MIN_LEVEL = 0.1  # of Otsu's: a map that is dark everywhere has an empty mask, not a mask of its noise
MIN_AREA = 0.001  # of the image: smaller components get no box
# Of the guided filter: a compromise. On coarse maps with displaced or dilated edges the error falls by a fifth or more;
# on coarse maps with edges in the right place it is a fifth above that of more contrast alone. Larger radii move both.
RADIUS = 2  # pixels of the network's map
SMOOTHNESS = 1e-2  # ε: variance of colours in [0, 1] that counts as flat
TAIL = 0.3  # the filter blurs: what is below this becomes 0, what is this near to 1 becomes 1
COARSE_RADIUS = 8  # pixels, at least: where the radius is this, the filter computes its coefficients
STRIP_PIXELS = 1 << 21  # pixels of an image that are filtered at once, without the margins
Map = NDArray[np.float32] | NDArray[np.uint8]


class Box(NamedTuple):
    """A box around one connected component of a mask.

    Attributes:
        bbox: (x, y, width, height) in pixels of the upright image; x and y are those of the upper left corner.
        area: the component's own pixels.
        score: the map's mean over the component, in [0, 1]; 1 without a map.
    """

    bbox: tuple[int, int, int, int]
    area: int
    score: float


def mask(map_: Map, level: float | None = None) -> NDArray[np.bool_]:
    """The salient pixels of a map.

    Args:
        map_: float [H, W] in [0, 1], or uint8 [H, W] as `icnet predict` writes it.
        level: in [0, 1]; pixels from this value on are salient. None for `otsu_level`. Floats are rounded to 8 bits
            first, so that a map and its PNG file have the same mask.

    Returns:
        bool [H, W].

    Raises:
        InputError: not such a map, or not such a level.
    """
    grey = _grey(map_)
    if level is None:
        level = otsu_level(grey)
    elif not (isinstance(level, int | float) and 0 <= level <= 1):
        raise InputError(f"level={level!r}: expected a number from 0 to 1, or None for Otsu's")
    return grey >= level * 255


def otsu_level(map_: Map) -> float:
    """The level that parts a map's pixels into two classes of the least variance, but at least 0.1.

    Otsu, "A threshold selection method from gray-level histograms", 1979. Without an object, both classes would be
    noise; hence the lower limit.

    Args:
        map_: as for `mask`.

    Returns:
        The level, in [0.1, 1].

    Raises:
        InputError: not such a map.
    """
    counts = np.bincount(_grey(map_).ravel(), minlength=256)
    below, total = counts.cumsum(), counts.sum()  # pixels up to each value
    sums = (counts * np.arange(256)).cumsum()
    classes = below * (total - below).astype(np.float64)
    between = (sums[-1] * below - sums * total).astype(np.float64) ** 2 / np.maximum(classes, 1)
    return max((float(between.argmax()) + 0.5) / 255, MIN_LEVEL)


def cutout(image: ImageSource, map_: Map, name: str = "image") -> NDArray[np.uint8]:
    """The common object of an image on a transparent background, at full resolution.

    The map is refined to the image's edges and becomes the alpha channel; see `refine`.

    Args:
        image: as for the Predictor; a file is turned upright by its EXIF orientation.
        map_: its map, of the upright image's size: float [H, W] in [0, 1], or uint8 [H, W].
        name: what messages call an image that has no path.

    Returns:
        RGBA uint8 [H, W, 4]; all four are 0 where nothing of the object is.

    Raises:
        InputError: the image can't be read, or the map is none or of another size.
        DependencyError: OpenCV with its contrib modules is not installed.
    """
    pixels = np.asarray(rgb_image(image, name))
    grey, (height, width) = _grey(map_), pixels.shape[:2]
    if grey.shape != (height, width):
        raise InputError(
            f"{image if isinstance(image, str | os.PathLike) else name}: {width}×{height} pixels (upright), but its "
            f"map has {grey.shape[1]}×{grey.shape[0]}; the Predictor's maps have the size of their images"
        )
    rgba = np.empty((height, width, 4), np.uint8)
    rgba[:, :, 3] = refine(grey, pixels)
    np.multiply(pixels, rgba[:, :, 3:] > 0, out=rgba[:, :, :3])
    return rgba


def refine(map_: Map, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A map whose edges follow those of its image: OpenCV's guided filter, with the image as guide.

    He et al., "Guided image filtering", 2010, and "Fast guided filter", 2015. Its result is blurred along the edges, so
    its contrast is raised. The image is filtered in strips: memory beside arguments and result does not grow with the
    image's height.

    Args:
        map_: float [H, W] in [0, 1], or uint8 [H, W].
        image: RGB uint8 [H, W, 3].

    Returns:
        uint8 [H, W].

    Raises:
        InputError: the map is none, or of another size.
        DependencyError: OpenCV with its contrib modules is not installed.
    """
    grey = _grey(map_)
    height, width = image.shape[:2]
    if grey.shape != (height, width):
        raise InputError(f"map: shape {grey.shape}, but its image has {image.shape}")
    guided = _opencv("cut-outs", "ximgproc").ximgproc.guidedFilter
    radius = max(1, round(RADIUS * max(height, width) / SIZE))
    step = 1 << max((radius // COARSE_RADIUS).bit_length() - 1, 0)  # a power of 2, so that 1 / step is exact
    # A pixel of the result depends on those up to 2·radius away. Strips begin at multiples of `step`, so that all have
    # the same coarse pixels.
    margin = (2 * radius // step + 2) * step
    rows = max(STRIP_PIXELS // width // step * step, margin)
    refined = np.empty_like(grey)
    for top in range(0, height, rows):
        start, stop = max(top - margin, 0), min(top + rows + margin, height)
        source = grey[start:stop].astype(np.float32)
        strip = guided(image[start:stop], source, radius // step, SMOOTHNESS * 255**2, scale=1 / step)
        strip = (strip[top - start : top - start + rows] - TAIL * 255) / (1 - 2 * TAIL)
        refined[top : top + rows] = np.rint(strip.clip(0, 255))
    return refined


def boxes(mask: NDArray[np.bool_], map_: Map | None = None, min_area: float = MIN_AREA) -> list[Box]:
    """A box around each connected component of a mask, the largest component first.

    Args:
        mask: bool [H, W], as from `runtime.mask`. Pixels that touch, also at a corner, are connected.
        map_: the map, as for `runtime.mask`, for the boxes' scores.
        min_area: the share of the image below which a component gets no box.

    Raises:
        InputError: not a mask, or the map is of another size.
        DependencyError: OpenCV is not installed.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
        raise InputError(f"mask: expected bool [H, W], got {_kind(mask)}")
    grey = None if map_ is None else _grey(map_)
    if grey is not None and grey.shape != mask.shape:
        raise InputError(f"map: shape {grey.shape}, but its mask has {mask.shape}")
    count, labels, statistics, _ = _opencv("boxes").connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    found = []
    for label in range(1, count):
        x, y, width, height, area = map(int, statistics[label])
        if area < min_area * mask.size:
            continue
        inside = (slice(y, y + height), slice(x, x + width))
        score = 1.0 if grey is None else float(grey[inside][labels[inside] == label].mean()) / 255
        found.append(Box((x, y, width, height), area, score))
    return sorted(found, key=lambda box: -box.area)


def check_opencv(what: str) -> None:
    """Raise DependencyError unless OpenCV and its guided filter are there for `what`."""
    _opencv(what, "ximgproc")


def _opencv(what: str, module: str = "") -> Any:
    """OpenCV, with one of its contrib modules."""
    try:
        import cv2

        if module and not isinstance(getattr(cv2, module, None), ModuleType):
            raise ImportError(module)
    except ImportError as error:
        raise DependencyError(
            f"{what} need OpenCV with its contrib modules: {how_to_install('opencv')} "
            "(uninstall other opencv-python packages first)"
        ) from error
    return cv2


def _grey(map_: Map) -> NDArray[np.uint8]:
    """A map in 8 bits, rounded as in its file."""
    if isinstance(map_, np.ndarray) and map_.ndim == 2 and map_.size:
        if map_.dtype == np.uint8:
            return map_.astype(np.uint8, copy=False)
        if map_.dtype.kind == "f" and map_.min() >= 0 and map_.max() <= 1:  # both are false of NaN
            return np.rint(map_ * 255).astype(np.uint8)
    raise InputError(f"map: expected float [H, W] in [0, 1] or uint8 [H, W], got {_kind(map_)}")


def _kind(value: object) -> str:
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    span = f" in [{value.min():g}, {value.max():g}]" if value.size and value.dtype.kind == "f" else ""
    return f"{value.dtype} {list(value.shape)}{span}"
