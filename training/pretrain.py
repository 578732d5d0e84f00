"""`icnet data pretrain`: a VGG16 of any width that knows the classes of the cut-outs, to start training from.

The paper starts from a VGG16 trained on ImageNet, which exists at width 1 only. This backbone replaces it at other
widths. The thirteen convolutions learn to tell the training classes apart, on small pictures of one object each, with
batch normalisation, without which thirteen layers hardly train, and a linear classifier. Afterwards the normalisation
is folded into the weights, the classifier is dropped, and the rest is written like `vgg16_feat.pth`, for
`icnet train --backbone`.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from export.fp16 import fold_batch_norms
from export.icnet import MEAN, STD, VGG16
from runtime.commands.options import number, positive
from runtime.errors import InputError
from runtime.files import check_outputs, encoded, replacing, write_bytes
from training.groups import add_material_arguments
from training.paste import CutPaste
from training.progress import Steps, half_cosine

SIDE = 64  # of a training picture, pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data pretrain`."""
    add_material_arguments(parser.add_argument)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the backbone's weights")
    parser.add_argument("--width", type=float, default=0.25, help="multiple of 1/32; 1 is VGG16")
    parser.add_argument("--steps", type=number(), default=3000)
    parser.add_argument("--batch", type=number(), default=96, help="pictures per step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="highest learning rate; falls to 0 by a half cosine")
    parser.add_argument("--seed", type=number(0), default=0)


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Batches of single objects; the batch of a step follows from the seed and the step."""

    def __init__(self, maker: CutPaste, seed: int, steps: int, batch: int) -> None:
        self.maker, self.seed, self.steps, self.batch = maker, seed, steps, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """uint8 [B, 64, 64, 3] and int64 [B]."""
        images, labels = zip(*(self.maker.single([self.seed, step, i], SIDE) for i in range(self.batch)), strict=True)
        return torch.stack([torch.from_numpy(image) for image in images]), torch.tensor(labels)


class Classifier(nn.Module):
    """VGG16 with batch normalisation, and a linear classifier of its mean features."""

    def __init__(self, width: float, classes: int) -> None:
        super().__init__()
        self.features = with_batch_norms(width)
        self.head = nn.Linear(int(VGG16.STAGES[-1][-1] * width), classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → logits [B, classes]."""
        logits: Tensor = self.head(self.features(normalised(images)).mean((2, 3)))
        return logits


def normalised(images: Tensor) -> Tensor:
    """RGB in [0, 255], [B, H, W, 3] → what the network takes, [B, 3, H, W]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def with_batch_norms(width: float) -> nn.Sequential:
    """The layers of VGG16 with a batch norm after every convolution, initialised for training from nothing."""
    layers: list[nn.Module] = []
    for layer in VGG16(width).vgg:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)


def run(args: argparse.Namespace) -> int:
    """Train and write the backbone.

    Raises:
        InputError: the width is not a multiple of 1/32, or the cut-outs or backgrounds can't be used.
        OutputError: the backbone can't be written.
    """
    check_outputs([args.output], [args.cutouts, args.backgrounds])
    torch.manual_seed(args.seed)
    maker = CutPaste(args.cutouts, args.backgrounds)
    try:
        model = Classifier(args.width, len(maker.names))
    except ValueError as error:
        raise InputError(f"--width: {error}") from error
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-2)
    loader = DataLoader(Pictures(maker, args.seed, args.steps, args.batch), batch_size=None, num_workers=1)
    with replacing(args.output) as temporary, Steps("pretraining", args.steps) as progress:
        for step, (images, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * half_cosine(step, args.steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            progress.advance(loss=loss.item(), right=(logits.argmax(1) == labels).float().mean().item())
        write_bytes(temporary, encoded(partial(torch.save, backbone(model.features, args.width).state_dict())))
    return 0


def backbone(features: nn.Sequential, width: float) -> nn.Sequential:
    """The thirteen convolutions with the batch norms folded into them, as VGG16 has them."""
    fold_batch_norms(features.eval())
    plain = VGG16(width).vgg
    trained = (layer for layer in features if isinstance(layer, nn.Conv2d))
    for layer in plain:
        if isinstance(layer, nn.Conv2d):
            layer.load_state_dict(next(trained).state_dict())
    return plain
