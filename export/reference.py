"""ICNet exactly as the paper writes it: the reference of the tests and the baseline of the benchmarks.

"ICNet: Intra-saliency Correlation Network for Co-Saliency Detection", Jin et al., NeurIPS 2020. Every operation is
written out here from the paper's text and formulas, and nothing is taken from `icnet.py`: a mistake in one of the two
shows as a difference. Only the names are the same, those of the authors' checkpoint, so that a state dict fits both.

The correlation is a convolution whose kernel is the group's SIVs (§3.3). The self-correlation is an HW×HW tensor,
reordered by `argsort`, an index `repeat`ed to that size, and `gather` (§3.4). The sub-module runs twice, on the SISMs
and on their complement. Nothing ships from here.

Shape comments: N images of one group, C channels, H×W pixels, K channels of the result. Numbers of channels are those
at width 1; all of them scale with the width.
"""

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from export.icnet import ICNet

EPS = 1e-12  # of every division (§3.2, §3.3)


def resize(x: Tensor, side: int) -> Tensor:
    """[N, C, H, W] → [N, C, side, side], bilinear; the corner pixels of both lie upon each other."""
    if x.shape[2] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)


def conv3x3(channels: int, out: int) -> nn.Conv2d:
    """[N, C, H, W] → [N, K, H, W], with one ring of zeros around the image."""
    return nn.Conv2d(channels, out, kernel_size=3, stride=1, padding=1)


def conv1x1(channels: int, out: int) -> nn.Conv2d:
    """[N, C, H, W] → [N, K, H, W], every pixel on its own."""
    return nn.Conv2d(channels, out, kernel_size=1)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """(x - mean) / √(variance + 1e-5) · weight + bias, per channel."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)


class Backbone(nn.Module):
    """VGG16's convolutions, five stages of them; a pooling before each stage but the first."""

    def __init__(self, c64: int, c128: int, c256: int, c512: int) -> None:
        super().__init__()
        # The layers' numbers are those of torchvision's VGG16.
        self.vgg = nn.Sequential(
            *(conv3x3(3, c64), nn.ReLU()),  # 0: conv1_1
            *(conv3x3(c64, c64), nn.ReLU()),  # 2: conv1_2
            nn.MaxPool2d(kernel_size=2, stride=2),  # 4
            *(conv3x3(c64, c128), nn.ReLU()),  # 5: conv2_1
            *(conv3x3(c128, c128), nn.ReLU()),  # 7: conv2_2
            nn.MaxPool2d(kernel_size=2, stride=2),  # 9
            *(conv3x3(c128, c256), nn.ReLU()),  # 10: conv3_1
            *(conv3x3(c256, c256), nn.ReLU()),  # 12: conv3_2
            *(conv3x3(c256, c256), nn.ReLU()),  # 14: conv3_3
            nn.MaxPool2d(kernel_size=2, stride=2),  # 16
            *(conv3x3(c256, c512), nn.ReLU()),  # 17: conv4_1
            *(conv3x3(c512, c512), nn.ReLU()),  # 19: conv4_2
            *(conv3x3(c512, c512), nn.ReLU()),  # 21: conv4_3
            nn.MaxPool2d(kernel_size=2, stride=2),  # 23
            *(conv3x3(c512, c512), nn.ReLU()),  # 24: conv5_1
            *(conv3x3(c512, c512), nn.ReLU()),  # 26: conv5_2
            *(conv3x3(c512, c512), nn.ReLU()),  # 28: conv5_3
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[N, 3, 224, 224] → the last output of each stage, after its ReLU."""
        conv1_2 = self.vgg[0:4](images)  # [N, 64, 224, 224]
        conv2_2 = self.vgg[4:9](conv1_2)  # [N, 128, 112, 112]
        conv3_3 = self.vgg[9:16](conv2_2)  # [N, 256, 56, 56]
        conv4_3 = self.vgg[16:23](conv3_3)  # [N, 512, 28, 28]
        conv5_3 = self.vgg[23:30](conv4_3)  # [N, 512, 14, 14]
        return conv1_2, conv2_2, conv3_3, conv4_3, conv5_3


class ReferenceResidual(nn.Module):
    """Res(C): the input, plus two convolutions of it, through a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(channels, channels), batch_norm(channels), nn.ReLU(), conv3x3(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H, W]."""
        return torch.relu(x + self.conv(x))


class SubModule(nn.Module):
    """NMAP, CFM and RSCF: what is shared by foreground and background."""

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv1x1(size * size, out), ReferenceResidual(out))

    def forward(self, features: Tensor, sisms: Tensor) -> Tensor:
        """[N, C, H, W], [N, 1, 224, 224] → [N, K, H, W]."""
        n, _, height, width = features.shape
        sisms = resize(sisms, height)  # [N, 1, H, W]
        f = F.normalize(features, p=2, dim=1, eps=EPS)  # [N, C, H, W], unit vectors

        # NMAP (§3.2, eq. 1): normalised masked average pooling.
        sivs = F.normalize((f * sisms).mean(dim=(2, 3)), p=2, dim=1, eps=EPS)  # [N, C]

        # CFM (§3.3, eq. 2): correlation fusion.
        kernel = sivs[:, :, None, None]  # [N, C, 1, 1]: the number of output channels is the group's size
        maps = F.conv2d(f, weight=kernel).flatten(2)  # [N, N, HW]: image, SIV, pixel
        maps = F.normalize(maps, p=2, dim=2, eps=EPS)
        agreement = torch.matmul(maps, maps.transpose(1, 2)).sum(2)  # [N, N, N] → [N, N]
        weights = F.softmax(agreement, dim=1)  # [N, N]: over the SIVs
        csa = (maps * weights[:, :, None]).sum(1)  # [N, HW]
        low, high = csa.min(1, keepdim=True).values, csa.max(1, keepdim=True).values  # [N, 1]
        csa = (csa - low) / (high - low + EPS)  # [N, HW], co-salient attention in [0, 1]

        # RSCF (§3.4): rearranged self-correlation features.
        pixels = f.flatten(2)  # [N, C, HW]
        scf = torch.matmul(pixels.transpose(1, 2), pixels)  # [N, HW, HW]
        index = csa.argsort(dim=1, descending=True)  # [N, HW]
        index = index[:, :, None].repeat(1, 1, height * width)  # [N, HW, HW]
        rscf = scf.gather(1, index).view(n, -1, height, width)  # [N, HW, H, W]
        return self.conv(rscf * csa.view(n, 1, height, width))  # [N, K, H, W]


class ReferenceCoSaliency(nn.Module):
    """The co-saliency module (§3.1): foreground, then background, merged."""

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.cosal_feat = SubModule(channels, out, size)
        self.conv = nn.Sequential(conv1x1(2 * out, out), ReferenceResidual(out))

    def forward(self, features: Tensor, sisms: Tensor) -> Tensor:
        """[N, C, H, W], [N, 1, 224, 224] → [N, K, H, W]."""
        foreground = self.cosal_feat(features, sisms)  # [N, K, H, W]
        background = self.cosal_feat(features, 1 - sisms)  # [N, K, H, W]
        return self.conv(torch.cat([foreground, background], dim=1))


class Map(nn.Module):
    """A co-saliency map of features: 1×1 convolution to one channel, sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pred = nn.Sequential(conv1x1(channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, 1, H, W], in [0, 1]."""
        return self.pred(x)


class ReferenceDecoder(nn.Module):
    """Decoder block: low-level features under the coarse map, under the SISM, and the block before."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.cmprs = conv1x1(channels, out)
        self.merge_conv = nn.Sequential(
            *(conv3x3(3 * out, 3 * out), batch_norm(3 * out), nn.ReLU()),
            *(conv3x3(3 * out, out), batch_norm(out), nn.ReLU()),
        )
        self.pred = Map(out)

    def forward(self, low_level: Tensor, map_4: Tensor, sisms: Tensor, previous: Tensor) -> Tensor:
        """[N, C, H, W], [N, 1, 28, 28], [N, 1, 224, 224], [N, K, H/2, W/2] → [N, K, H, W]."""
        side = low_level.shape[2]
        c = self.cmprs(low_level)  # [N, K, H, W]
        by_map = c * resize(map_4, side)  # [N, K, H, W]
        by_sism = c * resize(sisms, side).to(c.dtype)  # [N, K, H, W]; autocast leaves SISMs in FP32
        return self.merge_conv(torch.cat([by_map, by_sism, resize(previous, side)], dim=1))  # 3·K → K channels


class ReferenceICNet(nn.Module):
    """The paper's network (figure 2). Its state dict is that of `ICNet` with the same width."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width
        c32, c64, c128, c256, c512 = (round(c * width) for c in (32, 64, 128, 256, 512))
        self.vgg = Backbone(c64, c128, c256, c512)
        self.Co6 = ReferenceCoSaliency(c128, c128, 7)
        self.Co5 = ReferenceCoSaliency(c256, c128, 14)
        self.Co4 = ReferenceCoSaliency(c256, c128, 28)
        self.conv6_cmprs = nn.Sequential(
            nn.MaxPool2d(kernel_size=2, stride=2),
            conv1x1(c512, c128),
            *(conv3x3(c128, c128), batch_norm(c128), nn.ReLU()),
            *(conv3x3(c128, c128), batch_norm(c128), nn.ReLU()),
            conv3x3(c128, c128),
        )
        self.conv5_cmprs = conv1x1(c512, c256)
        self.conv4_cmprs = conv1x1(c512, c256)
        self.merge_co_56 = ReferenceResidual(c128)
        self.merge_co_45 = nn.Sequential(ReferenceResidual(c128), conv1x1(c128, c32))
        self.get_pred_4 = Map(c32)
        self.refine_3 = ReferenceDecoder(c256, c32)
        self.refine_2 = ReferenceDecoder(c128, c32)
        self.refine_1 = ReferenceDecoder(c64, c32)

    @classmethod
    def of(cls, network: "ICNet") -> Self:
        """The reference with the weights of `network`, in FP32 and evaluation mode."""
        reference = cls(network.width)
        reference.load_state_dict(network.state_dict())
        return reference.eval()

    def forward(self, images: Tensor, sisms: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Co-saliency maps of one group.

        Args:
            images: [N, 3, 224, 224], RGB, ImageNet-normalised, in the precision of the weights; N ≥ 1.
            sisms: [N, 1, 224, 224], in [0, 1], in the precision of the weights.

        Returns:
            In evaluation mode map_1, [N, 1, 224, 224] in [0, 1]. In training mode (map_4, map_3, map_2, map_1), with
            sides 28, 56, 112 and 224.
        """
        conv1_2, conv2_2, conv3_3, conv4_3, conv5_3 = self.vgg(images)
        co6 = self.Co6(self.conv6_cmprs(conv5_3), sisms)  # [N, 128, 7, 7]
        co5 = self.Co5(self.conv5_cmprs(conv5_3), sisms)  # [N, 128, 14, 14]
        co4 = self.Co4(self.conv4_cmprs(conv4_3), sisms)  # [N, 128, 28, 28]
        feat_56 = self.merge_co_56(co5 + resize(co6, 14))  # [N, 128, 14, 14]
        feat_45 = self.merge_co_45(co4 + resize(feat_56, 28))  # [N, 32, 28, 28]
        map_4 = self.get_pred_4(feat_45)  # [N, 1, 28, 28]
        feat_3 = self.refine_3(conv3_3, map_4, sisms, feat_45)  # [N, 32, 56, 56]
        feat_2 = self.refine_2(conv2_2, map_4, sisms, feat_3)  # [N, 32, 112, 112]
        feat_1 = self.refine_1(conv1_2, map_4, sisms, feat_2)  # [N, 32, 224, 224]
        map_1 = self.refine_1.pred(feat_1)  # [N, 1, 224, 224]
        if not self.training:
            return map_1
        map_3 = self.refine_3.pred(feat_3)  # [N, 1, 56, 56]
        map_2 = self.refine_2.pred(feat_2)  # [N, 1, 112, 112]
        return map_4, map_3, map_2, map_1
