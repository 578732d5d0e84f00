"""Agreement without ground truths: how far are models' maps from those of a reference model, on any photographs?

The maps are compared with 8 bits as the network gives them, 224×224. The reference's mask (its map from 0.5 on) is the
truth: IoU with the other map's mask, and the S-measure. The reference's own S-measure is below 1, as its maps are no
masks; it is what the others' are to be held against.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.markup import escape
from rich.progress import Progress

from evaluation.dataset import Dataset
from evaluation.metrics import Scores
from runtime.commands.contact_sheet import sheet
from runtime.errors import ICNetError, InputError
from runtime.grey import grey_levels
from runtime.outputs import MIN_AREA, mask
from runtime.predictor import Predictor
from runtime.preprocess import Pixels, read_pixels
from runtime.stream import Task

LEVEL = 0.5  # of the masks
MIN_IOU = 0.5  # an image below it is poor: less than half of the object is the same
WORST = 12  # rows of a sheet
NAMED = 3  # images that a line names

Opens = Callable[[], AbstractContextManager[Predictor]]
Map = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageAgreement:
    """One image, GROUP/NAME: IoU of the masks, and mean |Δ| of the maps in [0, 1]."""

    name: str
    iou: float
    mean_difference: float


@dataclass(frozen=True)
class ModelAgreement:
    """One model's maps against the reference's.

    Attributes:
        name: the model's.
        iou: mean over the images.
        s: S-measure, with the reference's masks as ground truths; None if all of them are empty.
        mean_difference: mean |Δ| of the maps in [0, 1].
        images: the image with the lowest IoU first.
    """

    name: str
    iou: float
    s: float | None
    mean_difference: float
    images: list[ImageAgreement]

    def describe(self, reference: Self, images: str) -> str:
        """All in a line; `images` says on which."""
        worst = ", ".join(f"{image.iou:.3f} ({image.name})" for image in self.images[:NAMED])
        s = "" if self.s is None else f"; S {self.s:.3f} ({reference.name} itself {reference.s:.3f})"
        return (
            f"{self.name}: against {reference.name}, {images}: IoU at {LEVEL} {self.iou:.3f}, the lowest {worst}{s}; "
            f"mean |Δ| {self.mean_difference:.4f}"
        )

    def warning(self, reference: Self) -> str | None:
        """A line that says so if the model is poor: an image has an IoU below `MIN_IOU`."""
        poor = sum(image.iou < MIN_IOU for image in self.images)
        of = f"of {len(self.images)} images {poor} have an IoU below {MIN_IOU} with {reference.name}"
        return f"warning: {self.name}: {of} ({self.images[0].name}: {self.images[0].iou:.2f})" if poor else None


@dataclass(frozen=True)
class Shown:
    """An image on a sheet, as the network takes it, the reference's map, and the map of the model in the caption."""

    iou: float
    caption: str
    pixels: Pixels
    expected: Map
    found: Map


@dataclass(frozen=True)
class DatasetAgreement:
    """All models on one folder or data set; the reference is the first."""

    name: str
    path: str
    groups: int
    images: int
    models: list[ModelAgreement]


@dataclass(frozen=True)
class Results:
    """How models agree with `reference`; `models` has the path and SHA-256 of each file."""

    reference: str
    models: dict[str, dict[str, str]]
    datasets: list[DatasetAgreement]


def compare(
    photographs: Dataset, models: Mapping[str, Opens], progress: Progress
) -> tuple[DatasetAgreement, list[Shown]]:
    """Run models on the same images, one after the other, and compare their maps with the first one's.

    Args:
        photographs: the images, with SISMs; 50 KB of memory are taken for each.
        models: what opens each, by its name; the first is the reference.
        progress: shows how far it is.

    Returns:
        How the models agree; and the images with the lowest IoU of all models, to be shown.

    Raises:
        ICNetError: an image can't be read, or a model fails.
    """
    files = [
        (f"{group.name}/{image.stem}", image, sism)
        for group in photographs.groups
        for image, sism in zip(group.images, group.sisms or [None] * len(group.images), strict=True)
    ]
    expected: list[Map] = []
    rows: list[ModelAgreement] = []
    worst: list[tuple[float, int, str, Map]] = []
    for label, opens in models.items():
        scores, images = Scores(), []
        with opens() as predictor:
            text = f"{escape(photographs.name)}, {escape(label)}"
            groups = progress.track(_maps(photographs, predictor), len(photographs.groups), description=text)
            for index, found in enumerate(chain.from_iterable(groups)):
                if not rows:
                    expected.append(found)
                truth, name = mask(expected[index], LEVEL), files[index][0]
                scores.add(found, truth, name)
                difference = float(np.abs(found.astype(np.int16) - expected[index]).mean()) / 255
                images.append(ImageAgreement(name, iou(mask(found, LEVEL), truth), difference))
                if rows:
                    worst = sorted([*worst, (images[-1].iou, index, label, found)], key=lambda one: one[0])[:WORST]
        mean_iou, mean = (float(np.mean([getattr(i, key) for i in images])) for key in ("iou", "mean_difference"))
        images.sort(key=lambda image: (image.iou, -image.mean_difference))
        rows.append(ModelAgreement(label, mean_iou, _s(scores), mean, images))
    shown = [
        Shown(value, f"{files[i][0]}, {label}: IoU {value:.2f}", read_pixels(*files[i][1:]), expected[i], found)
        for value, i, label, found in worst
    ]
    path, counts = str(photographs.path), (len(photographs.groups), photographs.images)
    return DatasetAgreement(photographs.name, path, *counts, rows), shown


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 if both together are less than a thousandth of the image: nothing."""
    union = np.count_nonzero(one | other)
    return 1.0 if union < MIN_AREA * one.size else np.count_nonzero(one & other) / union


def picture(shown: list[Shown], reference: str) -> Image.Image:
    """A sheet of the images with the lowest IoU: image, SISM, the reference's map and the other's."""
    shown = sorted(shown, key=lambda one: one.iou)[:WORST]
    rows = (
        [Image.fromarray(array) for array in (one.pixels.image, one.pixels.sism, one.expected, one.found)]
        for one in shown
    )
    columns = "image", "SISM", reference, "compared"
    captions = [one.caption for one in shown]
    return sheet(rows, columns, [one.pixels.size for one in shown], "lowest IoU", captions)


def _maps(photographs: Dataset, predictor: Predictor) -> Iterator[Map]:
    """The maps of every group, uint8 [N, 224, 224]."""
    pipeline = predictor.pipeline
    tasks = (Task(pipeline.reads(*g), lambda _, maps: [lambda: grey_levels(maps)]) for g in photographs.inputs())
    for outcome in pipeline.stream(tasks):
        if isinstance(outcome, ICNetError):
            raise outcome
        yield outcome[0]


def _s(scores: Scores) -> float | None:
    try:
        return scores.results().s
    except InputError:  # every mask of the reference is empty
        return None
