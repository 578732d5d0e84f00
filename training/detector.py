"""Training the demo detector (`icnet train --network detector`), on single images.

Half of the images are made by cut and paste, and their masks are exact: all objects that were pasted. The other half
are views of photographs, with the maps of another detector as targets (from `icnet data targets`). The loss is binary
cross-entropy plus 1 − soft IoU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from export.detector import Detector, load_detector, load_encoder
from runtime.contract import SIZE
from runtime.errors import InputError
from runtime.groups import image_files
from runtime.preprocess import grey_image, rgb_image
from training.batches import Batch
from training.paste import CutPaste, Pixels, Plane, lit, photographed, place, with_shadow
from training.train import Recipe, soft_iou

LOG_SIDES = (np.log(35), np.log(215))  # of pasted objects' longer sides, pixels
OBJECTS = (0.55, 0.3, 0.15)  # probability of one, two and three in an image
SHADOWS = 0.4  # share of objects that have one
CROP = (0.65, 1.0)  # sides of a crop of a view, as shares of the view's
FROZEN = 3  # blocks of a pretrained encoder that stay as they are, and the stem: they see edges and colours


class Scenes(CutPaste):
    """Makes single images by cut and paste; arguments and errors are those of `CutPaste`."""

    def scene(self, rng: np.random.Generator) -> tuple[Pixels, Plane]:
        """An image, uint8 [224, 224, 3], and what objects cover of it, float32 [224, 224] in [0, 1]."""
        canvas, covered = self._background(rng), np.zeros((SIZE, SIZE), np.float32)
        for _ in range(1 + int(rng.choice(len(OBJECTS), p=OBJECTS))):
            cutout = self._member(rng, self.names[rng.integers(len(self.names))])
            colour, alpha = place(rng, cutout, float(np.exp(rng.uniform(*LOG_SIDES))))
            if rng.random() < SHADOWS:
                canvas = with_shadow(rng, canvas, alpha)
            canvas = canvas * (1 - alpha[..., None]) + colour * alpha[..., None]
            covered = np.maximum(covered, alpha)
        return photographed(rng, canvas), covered


class SingleImages(Dataset[Batch]):
    """Batches of single images; a batch depends on the seed and its number alone.

    Args:
        scenes: makes half of the images, or all if there are no views.
        views: files of images and of their targets.
        seed, steps, images: of the training; its steps; images in each.
    """

    def __init__(self, scenes: Scenes, views: list[tuple[Path, Path]], seed: int, steps: int, images: int) -> None:
        self._scenes, self._views, self._seed, self._steps, self._images = scenes, views, seed, steps, images

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; `sisms` and `masks` are both the targets."""
        pairs = []
        for i in range(self._images):
            rng = np.random.default_rng([self._seed, step, i])
            if self._views and i % 2:
                image, target = view(rng, *self._views[rng.integers(len(self._views))])
            else:
                image, target = self._scenes.scene(rng)
            pairs.append((image, np.round(target * 255).astype(np.uint8)))
        images, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return Batch(f"of step {step + 1}", images, targets, targets)


def view(rng: np.random.Generator, image: Path, target: Path) -> tuple[Pixels, Plane]:
    """A crop of a view, mirrored or not, in another light: uint8 [224, 224, 3], and its target, in [0, 1]."""
    pixels, levels = np.asarray(rgb_image(image)), grey_image(target)
    height, width = (round(side * rng.uniform(*CROP)) for side in levels.shape)
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(levels.shape, (height, width), strict=True))
    step = 1 if rng.random() < 0.5 else -1
    both = np.dstack([pixels, levels])[top : top + height, left : left + width][:, ::step]
    both = cv2.resize(np.ascontiguousarray(both), (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    return photographed(rng, lit(rng, both[..., :3], 0.2)), both[..., 3] / 255


def find_views(folder: Path) -> list[tuple[Path, Path]]:
    """The images and targets in a folder from `icnet data targets`.

    Raises:
        InputError: there are none.
    """
    folders = sorted((folder / "img").iterdir()) if (folder / "img").is_dir() else []
    images = [image for each in folders for image in image_files(each)]
    targets = [folder / "sism" / image.parent.name / f"{image.stem}.png" for image in images]
    found = [pair for pair in zip(images, targets, strict=True) if pair[1].is_file()]
    if not found:
        raise InputError(f"{folder}: no img/NAME/K.jpg with sism/NAME/K.png; make them with icnet data targets")
    return found


def _batches(args: argparse.Namespace) -> SingleImages:
    views = find_views(args.photographs) if args.photographs else []
    return SingleImages(Scenes(args.cutouts, args.backgrounds), views, args.seed, args.steps, args.images)


def _network(args: argparse.Namespace) -> Detector:
    try:
        network = Detector(args.width)
    except ValueError as error:
        raise InputError(f"--width: {error}") from error
    if args.backbone:
        load_encoder(network, args.backbone)
        for frozen in (network.encoder.stem, *network.encoder.blocks[:FROZEN]):
            frozen.requires_grad_(False)
    return network


def _parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    assert isinstance(network, Detector)
    encoder = list(network.encoder.parameters())
    rest = [parameter for name, parameter in network.named_parameters() if not name.startswith("encoder.")]
    return rest, encoder


def _loss(args: argparse.Namespace, network: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    assert isinstance(network, Detector)

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.masks.to(args.device) / 255
        scores = network.scores(batch.images.to(args.device)).float()
        iou = 1 - soft_iou(torch.sigmoid(scores).unsqueeze(1), targets.unsqueeze(1)).mean()
        return iou, iou + F.binary_cross_entropy_with_logits(scores, targets)

    return loss


RECIPE: Recipe[Any] = Recipe(_batches, _network, _parameters, _loss, load_detector)
