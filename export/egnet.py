"""EGNet (VGG16): the single-image detector whose maps ICNet's paper takes as SISMs.

"EGNet: Edge Guidance Network for Salient Object Detection", Zhao et al., ICCV 2019. PSFEM, NLSEM and O2OGM below are
the paper's modules. Module and parameter names are those of the authors' checkpoint.

The input contract is ICNet's: uint8 RGB images, normalised inside. An image runs at its own size, and the images of a
batch have nothing to do with each other. The SISMs are float32 in [0, 1], not bytes: a caller turns the
SISMs of any detector into bytes by one rule, that of the files, `round(255 · SISM)`, at the image's own size and before
any resize. Then a SISM that stayed in memory and one that went through a file are the same bytes.

With FP16 weights (see `egnet_onnx.half_precision`) convolutions, pools and sums run in FP16; the normalisation of the
input, the last resize and the sigmoid stay in FP32.

Shape comments: B images, H×W pixels; C channels at width 1.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.checkpoint import check_state, read_state, width_of

MEAN_BGR = (104.00699, 116.66877, 122.67892)  # of the input, which is not scaled: BGR, 0 to 255


def up(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize of [B, C, h, w] to the height and width of `like`, corners aligned."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


def convolutions(channels: int, kernel: int) -> nn.Sequential:
    """Three k×k convolutions, each with ReLU; channels and size stay."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers)


def transfer(channels: int, out: int) -> nn.Sequential:
    """1×1 convolution without bias, and ReLU: [B, channels, H, W] → [B, out, H, W]."""
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.ReLU())


class Extra(nn.Module):
    """The sixth stage, behind VGG16's last pool: three 3×3 convolutions without bias, each with ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.ReLU()]
        self.ex = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return self.ex(x)


class Base(nn.Module):
    """VGG16 with a sixth stage. Its pools are 3×3 with stride 2 and padding 1: sizes are halved, rounded up."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # index, in `base`, of the last ReLU of stages 2 to 5
        channels = 3
        for stage in self.STAGES:
            for base in stage:
                out = int(base * width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
                channels = out
            self.taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        del self.taps[0]  # conv1_2 is not taken out
        self.base = nn.Sequential(*layers)
        self.base_ex = Extra(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → conv2_2, conv3_3, conv4_3, conv5_3 and the sixth stage, at 1/2 … 1/32 of the size."""
        outputs = []
        for index, layer in enumerate(self.base):
            x = layer(x)
            if index in self.taps:
                outputs.append(x)
        return [*outputs, self.base_ex(x)]


class Progressive(nn.Module):
    """Salient object features, from the top down (PSFEM), and salient edge features (NLSEM)."""

    def __init__(self, width: float) -> None:
        super().__init__()
        c = [int(base * width) for base in (128, 256, 512, 512, 512)]
        # The first `trans` and every `score` are for the side losses of training; the maps don't depend on them.
        self.trans = nn.ModuleList([transfer(c[1], c[0]), transfer(c[2], c[1]), transfer(c[4], c[0])])
        self.up = nn.ModuleList([convolutions(n, kernel) for n, kernel in zip(c, (3, 3, 5, 5, 7), strict=True)])
        self.score = nn.ModuleList([nn.Conv2d(n, 1, 3, padding=1) for n in c])

    def forward(self, x: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The base's five features → edge features [B, 128, H/2, W/2]; s1 … s4, C = 256, 512, 512, 512 at 1/4 … 1/32.

        s4, the location of the object, is the top; every s below adds its own stage's features.
        """
        s4 = self.up[4](x[4])  # [B, 512, H/32, W/32]
        s3 = self.up[3](x[3] + up(s4, x[3]))  # [B, 512, H/16, W/16]
        s2 = self.up[2](x[2] + up(s3, x[2]))  # [B, 512, H/8, W/8]
        s1 = self.up[1](x[1] + up(self.trans[1](s2), x[1]))  # [B, 256, H/4, W/4]
        edge = self.up[0](x[0] + up(self.trans[2](s4), x[0]))  # [B, 128, H/2, W/2]
        return edge, [s1, s2, s3, s4]


class OneToOneGuidance(nn.Module):
    """One-to-one guidance (O2OGM): the edge features refine each of the object features; then all are fused."""

    def __init__(self, width: float) -> None:
        super().__init__()
        edge, *c = [int(base * width) for base in (128, 256, 512, 512, 512)]
        # Lists of one list, because the authors have one more per kind of edge features.
        self.trans = nn.ModuleList([nn.ModuleList([transfer(n, edge) for n in c])])
        self.up = nn.ModuleList([nn.ModuleList([convolutions(edge, kernel) for kernel in (3, 5, 5, 7)])])
        self.score = nn.ModuleList([nn.ModuleList([nn.Conv2d(edge, 1, 3, padding=1) for _ in c])])  # side losses only
        self.final_score = nn.Sequential(
            nn.Conv2d(edge, edge, 5, padding=2), nn.ReLU(), nn.Conv2d(edge, 1, 3, padding=1)
        )

    def forward(self, edge: Tensor, features: list[Tensor]) -> Tensor:
        """[B, 128, H/2, W/2] and s1 … s4 → scores [B, 1, H/2, W/2]; a SISM is their sigmoid."""
        guided = []
        for s, trans, convs in zip(features, self.trans[0].children(), self.up[0].children(), strict=True):
            guided.append(convs(up(trans(s), edge) + edge))  # [B, 128, H/2, W/2]
        # The authors resize each to the first. All have the size of the edge features already.
        fused = guided[0]
        for t in guided[1:]:
            fused = F.relu(fused + t)
        return self.final_score(fused)


class EGNet(nn.Module):
    """EGNet with VGG16.

    Args:
        width: factor of all channels; 1 is the paper's network, 108 M parameters.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        self.base = Base(width)
        self.merge1 = Progressive(width)
        self.merge2 = OneToOneGuidance(width)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, H, W, 3] → BGR minus the mean [B, 3, H, W], in FP32 (FP64 if the weights are)."""
        x = images.to(torch.promote_types(next(self.parameters()).dtype, torch.float32))
        # TensorRT takes uint8 only into a Cast: cast first, then transpose.
        x = x.permute(0, 3, 1, 2).flip(1)
        return x - torch.tensor(MEAN_BGR, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, H, W, 3], any height and width → SISMs, float32 [B, H, W], in [0, 1]."""
        x = self.normalise(images)
        features = self.base(x.to(next(self.parameters()).dtype))
        scores = self.merge2(*self.merge1(features))  # [B, 1, H/2, W/2]
        return torch.sigmoid(up(scores.to(x.dtype), x)).squeeze(1)


def load_egnet(path: str | os.PathLike[str]) -> EGNet:
    """Load the authors' `EGNet.pth` (a bare state dict), or one of another width.

    Returns:
        The network, on the CPU, in FP32 and evaluation mode; its width is that of the tensors.

    Raises:
        CheckpointError: the file can't be read, needs pickled code, is another network's, or has missing, extra,
            misshapen or non-finite tensors; the message names them.
    """
    state = read_state(path)
    width = width_of(path, state, "EGNet")
    with torch.device("meta"):  # shapes first: a file that lies about its width must not fill the memory
        check_state(path, EGNet(width), state)
    network = EGNet(width)
    network.load_state_dict(state)
    return network.eval()
