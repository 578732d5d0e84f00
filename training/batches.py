"""The batches of training: images of one group, their SISMs and their ground truths, read as for prediction.

A batch depends on the seed and its number alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import ICNetError, InputError
from runtime.groups import find_groups, matching
from runtime.preprocess import read_pixels, sism_tensor, upright_size
from training.paste import CutPaste, Pixels


@dataclass(frozen=True)
class Batch:
    """Images of one group.

    name: the group. images: RGB, uint8 [N, 224, 224, 3]. sisms, masks: uint8 [N, 224, 224].
    """

    name: str
    images: Tensor
    sisms: Tensor
    masks: Tensor


class PastedBatches(Dataset[Batch]):
    """Groups made by cut and paste, a new one for every step."""

    def __init__(self, maker: CutPaste, seed: int, steps: int, images: int) -> None:
        self._maker, self._seed, self._steps, self._images = maker, seed, steps, images

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        group = self._maker.group([self._seed, step], self._images)
        return Batch(group.name, *map(torch.from_numpy, (group.images, group.sisms, group.masks)))


class DataSetBatches(Dataset["Batch | ICNetError"]):
    """A data set in the paper's layout: every epoch sees each group's images once, in batches, in a new order.

    A batch of one image is skipped: batch norm has no statistics then.

    Args:
        data: folder with `img/GROUP/NAME.ext`, `gt/GROUP/NAME.png` and `sism/GROUP/NAME.png`.
        seed: of the order and the flips.
        images: most images per batch.
        epochs: times that the data set is seen.
        steps: batches in all, instead of epochs.

    Raises:
        InputError: a mask or SISM is missing, or of another size than its image; or no group can be used.
    """

    def __init__(self, data: Path, seed: int, images: int, epochs: int, steps: int | None = None) -> None:
        self._seed, self._images = seed, images
        self.skipped: list[str] = []
        self._groups: dict[str, list[tuple[Path, Path, Path]]] = {}
        if not (data / "img").is_dir():
            raise InputError(f"{data}: not a data set: it has no folder 'img' of groups")
        for group in find_groups(data, data / "sism"):
            if group.problem:
                raise group.problem
            assert group.sisms is not None  # they were asked for
            masks = matching(group.images, data / "gt" / group.name, "ground truth")
            files = [*zip(group.images, group.sisms, masks, strict=True)]
            for image, *others in files:
                for other in others:
                    if (found := upright_size(other)) != (expected := upright_size(image)):
                        raise InputError(
                            f"{other}: {'×'.join(map(str, found))} pixels, but its image {image} has "
                            f"{'×'.join(map(str, expected))}; save it at the image's size"
                        )
            if len(files) == 1:
                self.skipped.append(group.name)
            else:
                self._groups[group.name] = files
        if not self._groups:
            raise InputError(f"{data}: no group has two images; training takes groups of two or more")
        self._epoch: tuple[int, list[tuple[str, list[int]]]] = (-1, [])
        self.per_epoch = len(self._order(0))
        self._steps = steps or epochs * self.per_epoch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch | ICNetError:
        """The batch of a step; an error is returned, since a worker process can't raise it as it is."""
        name, chosen = self._order(step // self.per_epoch)[step % self.per_epoch]
        flip = np.random.default_rng([self._seed, 1, step]).random(len(chosen)) < 0.5
        try:
            samples = [_sample(self._groups[name][i], f) for i, f in zip(chosen, flip, strict=True)]
        except ICNetError as error:
            return error
        return Batch(name, *(torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True)))

    def _order(self, epoch: int) -> list[tuple[str, list[int]]]:
        """The batches of an epoch: a group, and which of its images."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self._seed, 0, epoch])
            order = []
            for name, files in self._groups.items():
                shuffled = rng.permutation(len(files)).tolist()
                parts = (shuffled[i : i + self._images] for i in range(0, len(files), self._images))
                order += [(name, part) for part in parts if len(part) > 1]
            self._epoch = (epoch, [order[i] for i in rng.permutation(len(order))])
        return self._epoch[1]


def _sample(files: tuple[Path, Path, Path], flip: bool) -> tuple[Pixels, Pixels, Pixels]:
    """Image, SISM and mask, read as for prediction and mirrored together."""
    image, sism, mask = files
    pixels = read_pixels(image, sism)
    step = -1 if flip else 1
    return pixels.image[:, ::step], pixels.sism[:, ::step], sism_tensor(mask)[:, ::step]
