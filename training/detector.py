"""`icnet data detector`: the demo's detector of salient objects, which makes SISMs of single images.

Half of the training images are made by cut and paste (see `photographic.py`), and their masks are exact: all objects
that were pasted. The other half are views of photographs with the maps of another detector (from `icnet data targets`).
The encoder begins with ImageNet's features. The loss is binary cross-entropy plus 1 − soft IoU.
"""

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from export.checkpoint import read_checkpoint, save_checkpoint
from export.detector import Detector, load_detector, load_encoder
from runtime.commands.options import number, positive
from runtime.contract import SIZE
from runtime.errors import CheckpointError, InputError
from runtime.files import check_outputs
from runtime.groups import image_files
from runtime.preprocess import grey_image, rgb_image
from training.groups import add_material_arguments
from training.paste import AREA, Pixels, Plane, lit, photographed
from training.photographic import PhotographicPaste
from training.progress import Steps, half_cosine
from training.train import TrainingError, ignore_interrupts, interrupts, soft_iou

OTHERS = (0.5, 0.35, 0.15)  # probability of none, one and two more objects in an image made by cut and paste
CROP = (0.65, 1.0)  # sides of a crop of a view, as shares of the view's
FROZEN = 3  # blocks of a pretrained encoder that stay as they are, and the stem: they see edges and colours
CLIP = 1.0  # largest norm of a gradient
CARD = "SISMs of photographs and drawings (a demo)"  # what the weights are for
SETTINGS = ("width", "steps", "batch", "lr", "encoder_lr", "seed")  # a run is resumed only with the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data detector`."""
    add_material_arguments(parser.add_argument)
    parser.add_argument("--views", type=Path, required=True, metavar="DIR", help="from `icnet data targets`")
    parser.add_argument("--encoder", type=Path, help="EfficientNet-Lite0's weights (default: begin with random ones)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint, written every --save-every steps")
    parser.add_argument("--weights", type=Path, help="write the weights alone as well, in FP16, when training is done")
    parser.add_argument("--resume", action="store_true", help="go on from --output, if it is there")
    parser.add_argument("--width", type=float, default=1, help="of the network, a multiple of 1/8 (default 1)")
    parser.add_argument("--steps", type=number(), default=3000)
    parser.add_argument("--batch", type=number(), default=16, help="images per step (default 16)")
    parser.add_argument("--lr", type=positive, default=1e-3, help="highest learning rate; falls to 0 by a half cosine")
    parser.add_argument("--encoder-lr", type=positive, default=1e-4, help="likewise, of the encoder (default 1e-4)")
    parser.add_argument("--save-every", type=number(), default=100, help="steps (default 100)")
    parser.add_argument("--seed", type=number(0), default=0)


class Scenes(PhotographicPaste):
    """Makes single images by cut and paste; arguments and errors are those of `CutPaste`."""

    def scene(self, rng: np.random.Generator) -> tuple[Pixels, Plane]:
        """An image, uint8 [224, 224, 3], and what objects cover of it, float32 [224, 224] in [0, 1]."""
        names = [self.names[i] for i in rng.integers(len(self.names), size=1 + int(rng.choice(len(OTHERS), p=OTHERS)))]
        image, _, visible = self._scene(rng, names[0], names[1:])
        return image, np.max(visible, axis=0)


class SingleImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of single images, uint8 [B, 224, 224, 3], and targets, uint8 [B, 224, 224].

    A batch depends on the seed and its number alone.
    """

    def __init__(self, scenes: Scenes, views: list[tuple[Path, Path]], seed: int, steps: int, batch: int) -> None:
        self._scenes, self._views, self._seed, self._steps, self._batch = scenes, views, seed, steps, batch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        pairs = []
        for i in range(self._batch):
            rng = np.random.default_rng([self._seed, step, i])
            image, target = (
                crop(rng, *self._views[rng.integers(len(self._views))]) if i % 2 else self._scenes.scene(rng)
            )
            pairs.append((image, np.rint(target.clip(0, 1) * 255).astype(np.uint8)))
        images, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return images, targets


def crop(rng: np.random.Generator, image: Path, target: Path) -> tuple[Pixels, Plane]:
    """A crop of a view, mirrored or not, in another light: uint8 [224, 224, 3], and its target, in [0, 1]."""
    pixels, levels = np.asarray(rgb_image(image)), grey_image(target)
    height, width = (round(side * rng.uniform(*CROP)) for side in levels.shape)
    top, left = (int(rng.integers(n + 1)) for n in (levels.shape[0] - height, levels.shape[1] - width))
    both = np.dstack([pixels, levels])[top : top + height, left : left + width, :]
    both = np.ascontiguousarray(both[:, :: 1 if rng.random() < 0.5 else -1])
    both = np.asarray(cv2.resize(both, (SIZE, SIZE), interpolation=AREA), np.float32)
    return photographed(rng, lit(rng, both[..., :3], 0.2)), np.asarray(both[..., 3] / 255, np.float32)


def find_views(folder: Path) -> list[tuple[Path, Path]]:
    """The images and targets in a folder from `icnet data targets`.

    Raises:
        InputError: there are none.
    """
    folders = sorted((folder / "img").iterdir()) if (folder / "img").is_dir() else []
    images = [image for each in folders for image in image_files(each)]
    pairs = [(image, folder / "sism" / image.parent.name / f"{image.stem}.png") for image in images]
    found = [pair for pair in pairs if pair[1].is_file()]
    if not found:
        raise InputError(f"{folder}: no img/NAME/K.jpg with sism/NAME/K.png; make them with icnet data targets")
    return found


def loss_of(network: Detector, images: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy plus 1 − soft IoU: uint8 [B, 224, 224, 3] and [B, 224, 224] → scalar."""
    truth = (targets / 255).unsqueeze(1)
    scores = network.scores(images).unsqueeze(1)
    return F.binary_cross_entropy_with_logits(scores, truth) + 1 - soft_iou(torch.sigmoid(scores), truth).mean()


def run(args: argparse.Namespace) -> int:
    """Train, and write the checkpoint.

    Raises:
        InputError: the material or the views can't be used, or --output is there already.
        CheckpointError: the encoder's weights, or the checkpoint to resume, do not fit.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        OutputError: a file can't be written.
    """
    if args.output.exists() and not args.resume:
        raise InputError(f"{args.output}: is there already; --resume to go on with it, or choose another --output")
    check_outputs([args.output, args.weights], [args.encoder, args.cutouts, args.backgrounds, args.views])
    torch.manual_seed(args.seed)
    network, losses = _network(args), list[float]()
    optimizer = torch.optim.Adam(
        [
            {"params": [p for name, p in network.named_parameters() if not name.startswith("encoder.")]},
            {"params": list(network.encoder.parameters()), "lr": args.encoder_lr},
        ],
        args.lr,
    )
    highest = [group["lr"] for group in optimizer.param_groups]
    if args.resume and args.output.exists():
        losses = _resume(args, network, optimizer)
    batches = SingleImages(
        Scenes(args.cutouts, args.backgrounds), find_views(args.views), args.seed, args.steps, args.batch
    )
    sampler = range(len(losses), args.steps)
    loader = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=1, worker_init_fn=ignore_interrupts)
    with Steps("training", args.steps, len(losses)) as progress, interrupts() as interrupted:
        for images, targets in loader:
            for group, lr in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = lr * half_cosine(len(losses), args.steps)
            loss = loss_of(network, images, targets)
            if not loss.isfinite():
                raise TrainingError(f"loss {loss.item()} in step {len(losses) + 1}; try a lower --lr")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
            progress.advance(loss=losses[-1])
            if len(losses) % args.save_every == 0 or len(losses) == args.steps or interrupted:
                settings = {name: getattr(args, name) for name in SETTINGS}
                save_checkpoint(args.output, network, optimizer, {"losses": losses, "settings": settings})
            if interrupted:
                break
    if args.weights:
        save_checkpoint(args.weights, network.half(), card=CARD)
    return 0


def _network(args: argparse.Namespace) -> Detector:
    try:
        network = Detector(args.width)
    except ValueError as error:
        raise InputError(f"--width: {error}") from error
    if args.encoder:
        load_encoder(network, args.encoder)
        for frozen in (network.encoder.stem, *network.encoder.blocks[:FROZEN]):
            frozen.requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.train()


def _resume(args: argparse.Namespace, network: Detector, optimizer: torch.optim.Optimizer) -> list[float]:
    """Load what `run` wrote; the losses so far."""
    load_detector(args.output)  # its tensors are checked by name and shape
    checkpoint = read_checkpoint(args.output)
    training: Any = checkpoint.get("training")
    if not isinstance(training, dict) or "optimizer" not in checkpoint:
        raise CheckpointError(f"{args.output}: has no state of a training to resume; choose another --output")
    if training["settings"] != (given := {name: getattr(args, name) for name in SETTINGS}):
        raise InputError(f"{args.output}: was trained with {training['settings']}, not with {given}")
    network.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    losses: list[float] = training["losses"]
    return losses
