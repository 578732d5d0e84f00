"""The groups that a model is calibrated on: checked, known by a digest, and read one at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.files import digest
from runtime.groups import Group, find_groups
from runtime.preprocess import reads, stack
from runtime.threads import Workers

Feeds = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class CalibrationSet:
    """Groups of which every image can be read.

    groups: in any order. sha256: of their images and SISMs; the order of the groups and their names do not count.
    skipped: why groups were left out, a line each.
    """

    groups: tuple[Group, ...]
    sha256: str
    skipped: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(len(group.images) for group in self.groups)

    def feeds(self) -> Iterator[Feeds]:
        """What the model takes, group by group; one group is in memory at a time."""
        with Workers() as workers:
            for group in self.groups:
                yield read(group, workers)


def read(group: Group, workers: Workers) -> Feeds:
    """A group as uint8 `images` [N, 224, 224, 3] and `sisms` [N, 224, 224].

    Raises:
        InputError: an image or SISM can't be read; the message names it.
    """
    if group.problem is not None:
        raise group.problem
    pixels = stack(workers.run(reads(group.images, group.sisms)))
    return {"images": pixels.images, "sisms": pixels.sisms}


def open_groups(
    path: Path, sisms: Path | None, skip_bad: bool = False, track: Callable[[Sequence[Group]], Iterator[Group]] = iter
) -> CalibrationSet:
    """List the groups at `path` and read each once, so that a bad file is named before anything is computed.

    Args:
        path: a folder of images, or a data set with `img/GROUP/`, as `icnet predict` takes them.
        sisms: the folder of their SISMs; None for OpenCV's static saliency.
        skip_bad: leave out groups that can't be read, whole.
        track: shows progress over the groups.

    Raises:
        InputError: no groups, or one that can't be read and `skip_bad` is not set.
    """
    good, digests, skipped = [], [], []
    with Workers() as workers:
        for group in track(find_groups(path, sisms)):
            try:
                read(group, workers)
            except InputError as error:
                if not skip_bad:
                    raise InputError(f"{error} (group {group.name}; --skip-bad leaves such groups out)") from error
                skipped.append(f"group {group.name} is left out: {error}")
                continue
            files = [*group.images, *(group.sisms or ())]
            digests.append("".join(map(digest, files)) if group.sisms else "builtin" + "".join(map(digest, files)))
            good.append(group)
    if not good:
        raise InputError(f"{path}: none of its {len(skipped)} groups can be read: there is nothing to calibrate on")
    total = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    return CalibrationSet(tuple(good), total, tuple(skipped))
