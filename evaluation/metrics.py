"""The accuracy of co-saliency maps: MAE, max F-measure, S-measure and max E-measure, as the field computes them.

The details on which toolboxes differ are those of PySODMetrics, and so of the MATLAB code that papers report: a ground
truth is foreground above 128 of 255; every map is stretched to [0, 1] by its own minimum and maximum (one of a single
value is left as it is), for all four metrics; a curve has 256 thresholds, is averaged over the images, and then its
maximum is taken; every image counts the same, whatever its group. The E-measure divides by one pixel less than there
are, so a perfect map scores a trifle more than 1.

Only where PySODMetrics has no sound answer does this differ: an image whose ground truth has no foreground counts for
MAE alone (its F-measure would be 0 for every map), and is counted; the S-measure is also defined where the
foreground's centre lies in the last row or column, and does not depend on the rounding of a mean.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

BETA2 = 0.3  # weight of precision in the F-measure
FOREGROUND = 128  # of 255; a ground truth's pixel above it is foreground
LEVELS = 256
TITLES = {"s": "S ↑", "max_f": "max F ↑", "max_e": "max E ↑", "mae": "MAE ↓"}  # the scores, as tables head them

Counts = NDArray[np.int64]
Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The scores of one set of maps, means over images.

    images: number of images; of these `empty` have a ground truth without foreground and count for `mae` only.
    mae: mean absolute error, 0 the best.
    max_f: maximum of the F-measure over thresholds, β² = 0.3 (Achanta et al., CVPR 2009).
    s: structure measure, α = 0.5 (Fan et al., ICCV 2017).
    max_e: maximum of the enhanced-alignment measure over thresholds (Fan et al., IJCAI 2018).
    precision, recall, f: float64 [256]; entry t is of the pixels whose stretched map is at least t of 255.
    """

    images: int
    empty: int
    mae: float
    max_f: float
    s: float
    max_e: float
    precision: Curve
    recall: Curve
    f: Curve

    def numbers(self) -> dict[str, float]:
        """The four scores by their names in `TITLES`."""
        return {name: getattr(self, name) for name in TITLES}


class Scores:
    """Adds up the scores of maps one by one; its memory does not grow with their number.

    scores = Scores()
    for map_, gt in ...:
        scores.add(map_, gt)
    print(scores.results().max_f)
    """

    def __init__(self) -> None:
        self._images = self._empty = 0
        self._mae = self._s = 0.0
        self._precision, self._recall, self._f, self._e = np.zeros((4, LEVELS))

    def add(self, map_: NDArray[np.generic], gt: NDArray[np.generic], name: str = "ground truth") -> None:
        """Score one map.

        Args:
            map_: [H, W], uint8, or float in [0, 1], which is rounded to 8 bits as `icnet predict` writes it.
            gt: its ground truth, bool or uint8 [H, W].
            name: what messages call the ground truth.

        Raises:
            InputError: wrong dtype or values, or shapes that differ.
        """
        levels, foreground = _levels(map_, name), _foreground(gt, name)
        if levels.shape != foreground.shape:
            raise InputError(
                f"{name}: {_size(foreground)} pixels, but the map has {_size(levels)}; a map must be of its size"
            )
        quadrants = _quadrant_histograms(levels, foreground)
        histogram = np.sum([counts for _, counts in quadrants], axis=0)
        background, found = histogram
        low, high = int(levels.min()), int(levels.max())
        if low == high:
            low, high = 0, LEVELS - 1  # nothing to stretch
        values = _stretched(low, high)
        self._images += 1
        self._mae += float(background @ values + found @ (1 - values)) / levels.size
        if not found.any():
            self._empty += 1
            return
        highest = (values * 255).astype(np.uint8)  # the highest threshold that each level reaches
        true, false = _at_least(found, highest), _at_least(background, highest)
        precision, recall, f = _f_measure(true, false)
        self._precision += precision
        self._recall += recall
        self._f += f
        self._e += _e_measure(true, false)
        self._s += _s_measure(histogram, values, quadrants, low, high - low)

    def merge(self, other: "Scores") -> None:
        """Add what another has added."""
        for name, sum_ in vars(other).items():
            setattr(self, name, getattr(self, name) + sum_)

    def numbers(self) -> dict[str, float]:
        """The four scores, as `Metrics.numbers` has them; the MAE alone if no ground truth has foreground."""
        return self.results().numbers() if self._images > self._empty else {"mae": self._mae / self._images}

    def results(self) -> Metrics:
        """The scores of what was added so far.

        Raises:
            InputError: nothing was added, or no ground truth has foreground.
        """
        counted = self._images - self._empty
        if counted == 0:
            raise InputError(f"no foreground in any of {self._images} ground truths: there is nothing to score")
        return Metrics(
            images=self._images,
            empty=self._empty,
            mae=self._mae / self._images,
            max_f=float(self._f.max()) / counted,
            s=self._s / counted,
            max_e=float(self._e.max()) / counted,
            precision=self._precision / counted,
            recall=self._recall / counted,
            f=self._f / counted,
        )


def _stretched(low: int, high: int) -> Curve:
    """The value of each level when `low` … `high` becomes 0 … 1.

    In PySODMetrics' order of roundings, which decides on which side of a threshold a level falls.
    """
    levels = np.arange(LEVELS) / 255
    values: Curve = (levels - levels[low]) / (levels[high] - levels[low])
    return values.clip(0, 1)


def _f_measure(true: Curve, false: Curve) -> tuple[Curve, Curve, Curve]:
    """Precision, recall and F-measure per threshold, from the true and false positives."""
    precision = true / np.maximum(true + false, 1)
    recall = true / true[0]
    f = (1 + BETA2) * precision * recall / np.where(true == 0, 1, BETA2 * precision + recall)
    return precision, recall, f


def _e_measure(true: Curve, false: Curve) -> Curve:
    """Enhanced-alignment measure per threshold: how well deviations from the mean agree, over all pixels."""
    foreground, pixels = true[0], true[0] + false[0]
    positive = true + false
    if foreground == pixels:  # nothing deviates from its mean: what is left is the share that was found
        aligned = positive
    else:
        map_mean, gt_mean = positive / pixels, foreground / pixels
        counts = {(1, 1): true, (1, 0): false, (0, 1): foreground - true, (0, 0): pixels - positive - foreground + true}
        aligned = np.zeros(LEVELS)
        for (in_map, in_gt), count in counts.items():
            a, b = in_map - map_mean, in_gt - gt_mean
            aligned += count * (2 * a * b / (a**2 + b**2) + 1) ** 2 / 4
    return aligned / max(pixels - 1, 1)


def _s_measure(
    histogram: Counts,
    values: Curve,
    quadrants: list[tuple[float, Counts]],
    low: int,
    span: int,
) -> float:
    """Structure measure: half of it looks at the object, half at the regions around its centre."""
    background, foreground = histogram
    share = foreground.sum() / histogram.sum()
    if share == 1:
        return float(foreground @ values / foreground.sum())
    objects = share * _likeness(foreground, values) + (1 - share) * _likeness(background, 1 - values)
    regions = sum(weight * _similarity(h, low, span) for weight, h in quadrants)
    return max(0.0, float(objects + regions) / 2)


def _likeness(counts: Counts, values: Curve) -> float:
    """How close to 1, and how even, pixels are, given how many have each value."""
    n = counts.sum()
    mean = counts @ values / n
    deviation = np.sqrt(counts @ (values - mean) ** 2 / max(n - 1, 1))
    return float(2 * mean / (mean**2 + 1 + deviation))


def _similarity(histogram: Counts, low: int, span: int) -> float:
    """Structural similarity of map and ground truth in one region.

    In Python's integers, so that a variance of 0 is exactly 0: it decides between a score of 1 and 0.
    """
    levels = np.arange(LEVELS) - low
    both = histogram.sum(axis=0)
    n, gt, gt_map = int(both.sum()), int(histogram[1].sum()), int(histogram[1] @ levels)
    map_, map_map = int(both @ levels), int(both @ levels**2)
    variances = (n * map_map - map_**2) + (n * gt - gt**2) * span**2  # n (n - 1) span² times too large
    covariance = n * gt_map - map_ * gt  # n (n - 1) span times too large
    if variances == 0:
        return 1.0
    return 4 * map_ * gt * span**2 * covariance / ((map_**2 + gt**2 * span**2) * variances)


def _quadrant_histograms(levels: NDArray[np.uint8], foreground: NDArray[np.bool_]) -> list[tuple[float, Counts]]:
    """The image cut in up to four at the centre of its foreground: each part's share of the area, and its pixels.

    Pixels are int64 [2, 256]: how many have each level, in the background and in the foreground.
    """
    height, width = levels.shape
    rows, columns = foreground.sum(axis=1), foreground.sum(axis=0)
    n = max(int(rows.sum()), 1)
    y = round(int(rows @ np.arange(height)) / n) + 1  # the centre itself belongs to the upper left
    x = round(int(columns @ np.arange(width)) / n) + 1
    codes = levels + foreground.astype(np.uint16) * LEVELS
    return [
        (part.size / codes.size, np.bincount(part.ravel(), minlength=2 * LEVELS).reshape(2, LEVELS))
        for part in (codes[:y, :x], codes[:y, x:], codes[y:, :x], codes[y:, x:])
        if part.size
    ]


def _at_least(counts: Counts, highest: NDArray[np.uint8]) -> Curve:
    """How many pixels reach each threshold, given how many have each level and the highest that each level reaches."""
    at = np.zeros(LEVELS)
    np.add.at(at, highest, counts)
    return at[::-1].cumsum()[::-1]


def _levels(map_: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    _check_axes(map_, "the map", name)
    if map_.dtype == np.uint8:
        return map_.astype(np.uint8, copy=False)
    if map_.dtype.kind != "f" or not (map_.min() >= 0 and map_.max() <= 1):  # NaN fails both
        raise InputError(f"{name}: its map is {map_.dtype}, or leaves [0, 1]; expected uint8, or float in [0, 1]")
    return np.rint(map_.astype(np.float32, copy=False) * 255).astype(np.uint8)


def _foreground(gt: NDArray[np.generic], name: str) -> NDArray[np.bool_]:
    _check_axes(gt, "the ground truth", name)
    if gt.dtype == np.bool_:
        return gt.astype(np.bool_, copy=False)
    if gt.dtype != np.uint8:
        raise InputError(f"{name}: dtype {gt.dtype}, expected bool or uint8")
    if gt.max() == 1:
        raise InputError(f"{name}: its values are 0 and 1 of 255; a mask must be bool, or 0 and 255")
    return gt.astype(np.uint8, copy=False) > FOREGROUND


def _check_axes(array: NDArray[np.generic], what: str, name: str) -> None:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.size == 0:
        shape = getattr(array, "shape", type(array).__name__)
        raise InputError(f"{name}: {what} must be an array [height, width], got {shape}")


def _size(array: NDArray[np.generic]) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"
