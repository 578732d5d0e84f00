"""A data set with ground truths, and the scores of maps for it, group by group.

DATA/img/GROUP/NAME.jpg, DATA/gt/GROUP/NAME.png, DATA/sism/GROUP/NAME.png
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import FOREGROUND, Metrics, Scores
from runtime.detector import Detector, Undetected, finished
from runtime.errors import ICNetError, InputError
from runtime.grey import made_here, save_grey
from runtime.groups import Group, find_groups, matching
from runtime.preprocess import ImageSource, grey_image, reads, rgb_image
from runtime.threads import Workers

BUILTIN = "builtin"

Maps = Sequence[NDArray[np.generic]]
Follow = Callable[[int, Maps, Sequence[Scores]], object]


@dataclass(frozen=True)
class Dataset:
    """A data set in the paper's layout.

    sisms is the folder of the SISMs, "builtin", or None if there are none; ground_truths has the files of each group,
    or is empty if nothing is to be scored.
    """

    path: Path
    sisms: Path | str | None
    groups: tuple[Group, ...]
    ground_truths: tuple[tuple[Path, ...], ...]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return Path(os.path.abspath(self.path)).name  # noqa: PTH100  (a link keeps its own name)

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(len(group.images) for group in self.groups)

    def inputs(self) -> Iterator[tuple[Sequence[ImageSource], Sequence[ImageSource]]]:
        """(images, SISMs) of every group, for `Predictor.predict_groups`.

        Raises:
            InputError: the data set was listed without SISMs.
        """
        if self.sisms is None:
            raise InputError(
                f"{self.path}: listed without SISMs, which a model needs; "
                "give find_dataset a folder of SISMs, or 'builtin'"
            )
        with Workers() as workers:
            for group in self.groups:
                if group.sisms is not None:
                    yield group.images, group.sisms
                else:
                    yield group.images, [pixels.sism for pixels in workers.run(reads(group.images, None))]

    def detect(self, detector: Detector, folder: Path) -> Iterator[None]:
        """Write the SISM that a detector makes of every image, group by group, to `folder`/GROUP/NAME.png.

        Raises:
            ICNetError: an image can't be read, or the detector fails; the message names the image.
        """
        with Workers() as workers:
            for group in self.groups:
                seen = workers.run([partial(detector.look, image) for image in group.images])
                maps = detector(seen)
                (folder / group.name).mkdir()

                def save(path: Path, image: Undetected, tensor: NDArray[np.float32]) -> None:
                    save_grey(finished(image, tensor), path)

                files = [folder / group.name / f"{image.stem}.png" for image in group.images]
                workers.run([partial(save, *one) for one in zip(files, seen, maps, strict=True)])
                yield

    def with_sisms(self, folder: Path) -> Self:
        """The same images with the SISMs in `folder`, which has GROUP/NAME.png.

        Raises:
            InputError: an image has none.
        """
        groups = (replace(g, sisms=matching(g.images, folder / g.name, "SISM")) for g in self.groups)
        return replace(self, sisms=folder, groups=tuple(groups))

    def maps_in(self, folder: Path) -> tuple[tuple[Path, ...], ...]:
        """The map of every image in `folder`, which has GROUP/NAME.png.

        Raises:
            InputError: an image has none.
        """
        return tuple(matching(group.images, folder / group.name, "map") for group in self.groups)

    def read(self, files: Iterable[Sequence[ImageSource]]) -> Iterator[list[NDArray[np.uint8]]]:
        """Maps or SISMs, uint8 [H, W], of every group; one of another size than its ground truth's is resized to it.

        Raises:
            InputError: a file can't be read.
        """
        for group, ground_truths in zip(files, self.ground_truths, strict=True):
            yield [grey_image(file, _size(gt)) for file, gt in zip(group, ground_truths, strict=True)]

    def check(self) -> Iterator[None]:
        """Read every image and ground truth, group by group, to find a bad one before hours of computing.

        Raises:
            InputError: one can't be read, or they differ in size.
        """
        for group, ground_truths in zip(self.groups, self.ground_truths, strict=True):
            for image, gt in zip(group.images, ground_truths, strict=True):
                size, expected = _size(gt), rgb_image(image).size
                if size != expected:
                    raise InputError(
                        f"{gt}: {size[0]}×{size[1]} pixels, but {image} has {expected[0]}×{expected[1]}; "
                        "a ground truth must be of its image's size"
                    )
            yield


def find_dataset(path: Path, sisms: Path | str | None, scored: bool = True) -> Dataset:
    """List a data set; every image has a ground truth, and a SISM if there is a folder of them.

    Args:
        path: the data set's folder.
        sisms: the folder of GROUP/NAME.png SISMs; "builtin" for OpenCV's static saliency; None for none.
        scored: False for whatever `icnet predict` takes, without ground truths.

    Raises:
        InputError: a folder or file is missing; the message names it.
    """
    for folder in ("img", "gt"):
        if scored and path.is_dir() and not (path / folder).is_dir():
            raise InputError(f"{path}: no {folder} folder in it: expected {path / folder}/GROUP/NAME.png")
    groups = find_groups(path, None if sisms is None or sisms == BUILTIN else Path(sisms))
    for group in groups:
        if group.problem is not None:
            raise group.problem
    ground_truths = (matching(g.images, path / "gt" / g.name, "ground truth") for g in groups if scored)
    return Dataset(path, sisms, tuple(groups), tuple(ground_truths))


def evaluate(dataset: Dataset, maps: Iterable[Maps], follow: Follow | None = None) -> Metrics:
    """Score a data set's maps, reading them as they come.

        with Predictor("icnet.onnx") as predictor:
            print(evaluate(dataset, predictor.predict_groups(dataset.inputs())).max_f)

    Args:
        dataset: the data set.
        maps: for each of its groups, in order, one map per image (see `Scores.add`).
        follow: called after each group, with its number, its maps, and the scores of each of its images.

    Raises:
        ICNetError: a group can't be scored; the message names it. No group is ever left out.
    """
    scores, source = Scores(), iter(maps)
    for number, (group, ground_truths) in enumerate(zip(dataset.groups, dataset.ground_truths, strict=True)):
        try:
            found = next(source, None)
            if found is None or len(found) != len(ground_truths):
                raise InputError(f"{len(found or ())} maps for {len(ground_truths)} images")
            of_images = []
            for map_, gt in zip(found, ground_truths, strict=True):
                levels = grey_image(gt)
                of_images.append(Scores())
                # A map that serves as ground truth may have no value but 0 and 1 of 255.
                of_images[-1].add(map_, levels > FOREGROUND if made_here(gt) else levels, str(gt))
                scores.merge(of_images[-1])
            if follow is not None:
                follow(number, found, of_images)
        except ICNetError as error:
            raise type(error)(f"{dataset.name}, group {group.name}: {error}") from error
    try:
        return scores.results()
    except InputError as error:
        raise InputError(f"{dataset.path}: {error}") from error


def _size(file: Path) -> tuple[int, int]:
    height, width = grey_image(file).shape
    return width, height
