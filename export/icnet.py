"""ICNet: the network, one definition for training, tracing and export.

"ICNet: Intra-saliency Correlation Network for Co-Saliency Detection", Jin et al., NeurIPS 2020. Section and
equation numbers below are the paper's. Module and parameter names are those of the authors' checkpoint.

The paper writes the correlation as a convolution whose kernel is known only at run time, and reorders an HW×HW
self-correlation with `argsort`, `repeat` and `gather` (see `reference.py`). Here the same function is computed
along its algebra, without either:

- the correlation is one matrix product of the group's SIVs with the features;
- reordering the rows of the self-correlation is reordering the columns of the features *before* the product;
- the 1×1 convolution that follows is linear, so the product is associated in the cheaper order.

In FP32 every cast below is none. With FP16 weights (`fp16.py`) convolutions and the products of RSCF run in FP16. What
leads to the order of the pixels stays in FP32: norms, SIVs, correlation maps, softmax and min–max. FP16 overflows there
(‖F‖² of VGG features), has no number (ε = 1e-12), and rounds cosines near 1 to steps of 5e-4: in a flat part of an
image hundreds of pixels become equal and their order arbitrary, and a trained network's maps were off by up to 0.8.

All that an image needs of its group is the group's SIVs. So `ICNet` computes a group by itself; or, given a *bank* of
SIVs, each image on its own; or several groups in one batch, with a mask that says which SIVs are of an image's group.

Shape comments: N images in the batch, M SIVs in the bank (M = N for a group on its own), P = 2 polarities
(foreground, background), C channels, HW = H·W pixels, K channels out of the 1×1 convolution, S = 1280·width numbers in
the SIVs of one image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 224  # side of the network's input, pixels (§4.1)
EPS = 1e-12  # keeps every division finite; FP32 only, it is zero in FP16
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB
STD = (0.229, 0.224, 0.225)
WIDTH_STEPS = 32  # channels of the narrowest layer at width 1
SIVS_PER_WIDTH = 1280  # numbers in the SIVs of one image at width 1: 2 polarities, 128 + 256 + 256 channels
MASKED = -1e9  # agreement with another group's map: in the softmax, its weight is 0


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear resize of [N, C, H, W] to [N, C, size, size] with corners aligned, as everywhere in ICNet."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)


def at_least_fp32(x: Tensor) -> Tensor:
    """FP16 and bfloat16 as FP32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l2_normalise(x: Tensor, dim: int) -> Tensor:
    """Divide by max(‖x‖₂, ε) along `dim`, in FP32 at least; a zero vector stays zero."""
    x = at_least_fp32(x)
    return x / x.norm(dim=dim, keepdim=True).clamp_min(EPS)


def min_max(x: Tensor) -> Tensor:
    """Stretch every row (last axis) to [0, 1]; a constant row becomes 0."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # Not "+ EPS" as the paper has it: ONNX optimisers take an addition of 1e-12 for an addition of zero and drop it.
    return (x - low) / (high - low).clamp_min(EPS)


class VGG16(nn.Module):
    """VGG16's thirteen 3×3 convolutions, each with ReLU; taps are the last output of each stage."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # index, in `vgg`, of each stage's last ReLU
        channels = 3
        for stage in self.STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for base in stage:
                out = int(base * width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
                channels = out
            self.taps.append(len(layers) - 1)
        self.vgg = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 3, 224, 224] → conv1_2, conv2_2, conv3_3, conv4_3, conv5_3."""
        outputs = []
        for index, layer in enumerate(self.vgg):
            x = layer(x)
            if index in self.taps:
                outputs.append(x)
        return outputs


class Residual(nn.Module):
    """ReLU(x + [3×3, BN, ReLU, 3×3](x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H, W]."""
        return F.relu(x + self.conv(x))


class CorrelationFusion(nn.Module):
    """The sub-module of the co-saliency module: NMAP, CFM and RSCF for both polarities at once.

    Args:
        channels: C, channels of the features.
        out: K, channels of the result.
        size: H = W of the features.
    """

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.channels = channels
        self.size = size
        pixels = size * size
        self.conv = nn.Sequential(nn.Conv2d(pixels, out, 1), Residual(out))
        # Multiplications of W·(f_sortedᵀ·f) against (W·f_sortedᵀ)·f, per image and polarity:
        # HW²·(C + K) against 2·K·C·HW.
        self.weights_first = 2 * out * channels < pixels * (channels + out)

    def normalise(self, features: Tensor) -> Tensor:
        """[N, C, H, W] → f, FP32 [N, C, HW]: unit vectors at every pixel, shared by both polarities."""
        return l2_normalise(features.flatten(2), 1)

    def sivs(self, f: Tensor, sisms: Tensor) -> Tensor:
        """NMAP (§3.2, eq. 1): the single-image vectors.

        Args:
            f: normalised features, FP32 [N, C, HW].
            sisms: [N, 1, 224, 224], in [0, 1], FP32.

        Returns:
            FP32 [N, P, C]: one unit vector per image for what its SISM marks, one for what it leaves.
        """
        s = torch.cat([sisms, 1 - sisms], 1)  # [N, P, 224, 224]; a SISM of all 1 leaves an exact 0 to resize
        s = resize(s, self.size).flatten(2)  # [N, P, HW]
        v = s @ f.transpose(1, 2)  # [N, P, C]
        return l2_normalise(v / f.shape[2], 2)

    def attention(self, f: Tensor, bank: Tensor, member_mask: Tensor | None = None) -> Tensor:
        """CFM (§3.3, eq. 2): the co-salient attention (CSA) of each image, given its group's SIVs.

        Args:
            f: normalised features, FP32 [N, C, HW].
            bank: SIVs of the whole group, FP32 [M, P, C].
            member_mask: bool [N, M], which SIVs of the bank belong to an image's group, at least one; None for all.

        Returns:
            FP32 [N, P, HW], each row in [0, 1].
        """
        maps = bank.transpose(0, 1) @ f.unsqueeze(1)  # [P, M, C] @ [N, 1, C, HW] = [N, P, M, HW]
        maps = l2_normalise(maps, 3)
        if member_mask is not None:
            member_mask = member_mask.view(-1, 1, bank.shape[0], 1)  # [N, 1, M, 1]
            maps = torch.where(member_mask, maps, 0.0)  # not a product: NaN of another group would get through
        # Σ_k ⟨c_m, c_k⟩ = ⟨c_m, Σ_k c_k⟩: no M×M matrix per image.
        agreement = maps @ maps.sum(2).unsqueeze(3)  # [N, P, M, HW] @ [N, P, HW, 1] = [N, P, M, 1]
        if member_mask is not None:
            agreement = torch.where(member_mask, agreement, MASKED)
        weights = agreement.softmax(2).transpose(2, 3)  # [N, P, 1, M]
        return min_max((weights @ maps).squeeze(2))  # [N, P, HW]

    def rscf(self, f: Tensor, csa: Tensor) -> Tensor:
        """RSCF (§3.4) through its 1×1 convolution: W·(rows of fᵀf, by CSA, highest first)·CSA + b.

        Args:
            f: normalised features, FP32 [N, C, HW]; multiplied in the precision of the weights.
            csa: FP32 [N, P, HW].

        Returns:
            [N, P, K, HW].
        """
        images, channels, pixels = f.shape
        order = csa.argsort(-1, descending=True)  # [N, P, HW]
        first_row = torch.arange(images, device=f.device).view(-1, 1, 1) * pixels  # [N, 1, 1]
        weight, bias = self.conv[0].parameters()  # [K, HW, 1, 1], [K]
        f = f.to(weight.dtype)
        rows = f.transpose(1, 2).reshape(-1, channels)  # [N·HW, C]
        f_sorted = rows.index_select(0, (order + first_row).flatten())  # [N·P·HW, C]
        f_sorted = f_sorted.view(-1, 2, pixels, channels)  # [N, P, HW, C], which is f_sortedᵀ
        w = weight.flatten(1)  # [K, HW]
        f = f.unsqueeze(1)  # [N, 1, C, HW]
        x = (w @ f_sorted) @ f if self.weights_first else w @ (f_sorted @ f)  # [N, P, K, HW]
        # CSA is one number per pixel, the same for every channel: it commutes with the 1×1 convolution.
        return x * csa.to(x.dtype).unsqueeze(2) + bias.view(-1, 1)

    def forward(
        self, features: Tensor, sisms: Tensor, bank: Tensor | None = None, member_mask: Tensor | None = None
    ) -> Tensor:
        """[N, C, H, W], [N, 1, 224, 224] → [N, P·K, H, W]: foreground channels, then background channels.

        `bank` and `member_mask` are as for `attention`; without a bank the images' own SIVs are the bank.
        """
        f = self.normalise(features)  # FP32 [N, C, HW]
        csa = self.attention(f, self.sivs(f, sisms) if bank is None else bank, member_mask)  # [N, P, HW]
        x = self.rscf(f, csa).unflatten(3, (self.size, self.size))  # [N, P, K, H, W]
        residual = self.conv[1]
        if self.training:  # the paper runs the polarities one after the other: each has its own batch statistics
            return torch.cat([residual(x[:, 0]), residual(x[:, 1])], 1)
        return residual(x.flatten(0, 1)).view(-1, 2 * x.shape[2], self.size, self.size)


class CoSaliency(nn.Module):
    """The co-saliency module (§3): intra- and inter-image cues of foreground and background, merged."""

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.cosal_feat = CorrelationFusion(channels, out, size)
        self.conv = nn.Sequential(nn.Conv2d(2 * out, out, 1), Residual(out))

    def forward(
        self, features: Tensor, sisms: Tensor, bank: Tensor | None = None, member_mask: Tensor | None = None
    ) -> Tensor:
        """[N, C, H, W], [N, 1, 224, 224] → [N, K, H, W]; the others: see `CorrelationFusion.attention`."""
        return self.conv(self.cosal_feat(features, sisms, bank=bank, member_mask=member_mask))


class Prediction(nn.Module):
    """1×1 convolution to one channel, then a sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pred = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, 1, H, W] in [0, 1]."""
        return self.pred(x)


class Decoder(nn.Module):
    """Decoder block: low-level features, gated by the coarse map and by the SISM, joined with the previous block's."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.cmprs = nn.Conv2d(channels, out, 1)
        self.merge_conv = nn.Sequential(
            nn.Conv2d(3 * out, 3 * out, 3, padding=1),
            nn.BatchNorm2d(3 * out),
            nn.ReLU(),
            nn.Conv2d(3 * out, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )
        self.pred = Prediction(out)

    def forward(self, low: Tensor, map_4: Tensor, sisms: Tensor, previous: Tensor) -> Tensor:
        """[N, C, H, W], [N, 1, 28, 28], [N, 1, 224, 224], [N, K, H/2, W/2] → features [N, K, H, W]."""
        size = low.shape[-1]
        low = self.cmprs(low)
        gated = [low * resize(map_4, size), low * resize(sisms, size).to(low.dtype), resize(previous, size)]
        return self.merge_conv(torch.cat(gated, 1))


class ICNet(nn.Module):
    """The whole network.

    Args:
        width: scales the channel count of every layer; a multiple of 1/32, so that every layer has a whole
            number of channels. 1.0 is the paper's network.

    Raises:
        ValueError: `width` is not a positive multiple of 1/32.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        if width <= 0 or width * WIDTH_STEPS != int(width * WIDTH_STEPS):
            raise ValueError(f"width {width} is not a positive multiple of 1/{WIDTH_STEPS}")
        self.width = width
        c32, c64, c128, c256, c512 = (int(c * width) for c in (32, 64, 128, 256, 512))

        # In the order of the authors' checkpoint: an optimiser's state follows it.
        self.vgg = VGG16(width)
        self.Co6 = CoSaliency(c128, c128, 7)
        self.Co5 = CoSaliency(c256, c128, 14)
        self.Co4 = CoSaliency(c256, c128, 28)
        self.conv6_cmprs = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(c512, c128, 1),
            nn.Conv2d(c128, c128, 3, padding=1),
            nn.BatchNorm2d(c128),
            nn.ReLU(),
            nn.Conv2d(c128, c128, 3, padding=1),
            nn.BatchNorm2d(c128),
            nn.ReLU(),
            nn.Conv2d(c128, c128, 3, padding=1),
        )
        self.conv5_cmprs = nn.Conv2d(c512, c256, 1)
        self.conv4_cmprs = nn.Conv2d(c512, c256, 1)
        self.merge_co_56 = Residual(c128)
        self.merge_co_45 = nn.Sequential(Residual(c128), nn.Conv2d(c128, c32, 1))
        self.get_pred_4 = Prediction(c32)
        self.refine_3 = Decoder(c256, c32)
        self.refine_2 = Decoder(c128, c32)
        self.refine_1 = Decoder(c64, c32)

        self.apply(_he_init)

    def forward(
        self, images: Tensor, sisms: Tensor, bank: Tensor | None = None, member_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Co-saliency maps of one group.

        Args:
            images: [N, 3, 224, 224], RGB, ImageNet-normalised; N ≥ 1, all of one group.
            sisms: [N, 1, 224, 224], in [0, 1].
            bank: SIVs from `sivs`, FP32 [M, S], M ≥ 1; each image is then computed on its own, as a member of the
                group with these SIVs. None: the images' own SIVs.
            member_mask: bool [N, M], which SIVs belong to an image's group, at least one; None for all.

        Returns:
            In evaluation mode map_1, [N, 1, 224, 224] in [0, 1]. In training mode (map_4, map_3, map_2, map_1), with
            sides 28, 56, 112 and 224.
        """
        conv1_2, conv2_2, conv3_3, *deep = self.vgg(images.to(self.conv5_cmprs.weight.dtype))
        co_salient = []
        banks = [None] * 3 if bank is None else self._split(bank)
        for (module, features), rows in zip(self._levels(*deep), banks, strict=True):
            given = {} if rows is None and member_mask is None else {"bank": rows, "member_mask": member_mask}
            co_salient.append(module(features, sisms, **given))
        co6, co5, co4 = co_salient  # [N, 128, 7, 7], [N, 128, 14, 14], [N, 128, 28, 28]

        feat_56 = self.merge_co_56(co5 + resize(co6, 14))  # [N, 128, 14, 14]
        feat_45 = self.merge_co_45(co4 + resize(feat_56, 28))  # [N, 32, 28, 28]
        map_4 = self.get_pred_4(feat_45)  # [N, 1, 28, 28]

        feat_3 = self.refine_3(conv3_3, map_4, sisms, feat_45)  # [N, 32, 56, 56]
        feat_2 = self.refine_2(conv2_2, map_4, sisms, feat_3)  # [N, 32, 112, 112]
        feat_1 = self.refine_1(conv1_2, map_4, sisms, feat_2)  # [N, 32, 224, 224]
        map_1 = self.refine_1.pred(feat_1)  # [N, 1, 224, 224]
        if not self.training:
            return at_least_fp32(map_1)
        return map_4, self.refine_3.pred(feat_3), self.refine_2.pred(feat_2), map_1

    def sivs(self, images: Tensor, sisms: Tensor) -> Tensor:
        """The single-image vectors of each image, all that others of its group need of it.

        Args:
            images: [N, 3, 224, 224], RGB, ImageNet-normalised.
            sisms: [N, 1, 224, 224], in [0, 1].

        Returns:
            FP32 [N, S], S = 1280·width: per level (Co6, Co5, Co4) the foreground's unit vector, then the background's,
            of 128, 256 and 256 numbers times the width.
        """
        *_, conv4_3, conv5_3 = self.vgg(images.to(self.conv5_cmprs.weight.dtype))
        found = []
        for module, features in self._levels(conv4_3, conv5_3):
            fusion = module.cosal_feat
            found.append(fusion.sivs(fusion.normalise(features), sisms).flatten(1))  # [N, P·C]
        return torch.cat(found, 1)

    def _levels(self, conv4_3: Tensor, conv5_3: Tensor) -> list[tuple[CoSaliency, Tensor]]:
        """The co-saliency modules and their features: [N, 128, 7, 7], [N, 256, 14, 14], [N, 256, 28, 28]."""
        return [
            (self.Co6, self.conv6_cmprs(conv5_3)),
            (self.Co5, self.conv5_cmprs(conv5_3)),
            (self.Co4, self.conv4_cmprs(conv4_3)),
        ]

    def _split(self, bank: Tensor) -> list[Tensor]:
        """[M, S] → [M, P, C] per level."""
        channels = [module.cosal_feat.channels for module in (self.Co6, self.Co5, self.Co4)]
        return [level.unflatten(1, (2, -1)) for level in bank.split([2 * c for c in channels], 1)]


class Uint8Interface(nn.Module):
    """ICNet behind the file contract: resized uint8 images and SISMs in, maps without a channel axis out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1))

    def normalise(self, images: Tensor, sisms: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 224, 224, 3] and [N, 224, 224] → what `ICNet` takes."""
        # TensorRT takes uint8 only into a Cast: cast first, then transpose.
        x = images.to(self.mean.dtype).permute(0, 3, 1, 2)  # [N, 3, 224, 224]
        s = sisms.to(self.mean.dtype).unsqueeze(1) / 255  # [N, 1, 224, 224]
        return (x - self.mean) / self.std, s

    def forward(
        self, images: Tensor, sisms: Tensor, bank: Tensor | None = None, member_mask: Tensor | None = None
    ) -> Tensor:
        """uint8 [N, 224, 224, 3], uint8 [N, 224, 224] → float32 [N, 224, 224]; the others: see `ICNet`."""
        given = {} if bank is None and member_mask is None else {"bank": bank, "member_mask": member_mask}
        return self.network(*self.normalise(images, sisms), **given).squeeze(1)


class Packed(nn.Module):
    """Many groups in one batch."""

    def __init__(self, network: ICNet) -> None:
        super().__init__()
        self.interface = Uint8Interface(network)

    def forward(self, images: Tensor, sisms: Tensor, groups: Tensor) -> Tensor:
        """uint8 [N, 224, 224, 3], uint8 [N, 224, 224], int32 [N] → float32 [N, 224, 224].

        Images with the same number in `groups`, any number, wherever they stand, are one group.
        """
        return self.interface(images, sisms, member_mask=groups.unsqueeze(1) == groups.unsqueeze(0))


class Intra(nn.Module):
    """Images to SIVs: the rows of a bank."""

    def __init__(self, network: ICNet) -> None:
        super().__init__()
        self.interface = Uint8Interface(network)

    def forward(self, images: Tensor, sisms: Tensor) -> Tensor:
        """uint8 [N, 224, 224, 3], uint8 [N, 224, 224] → float32 [N, S], see `ICNet.sivs`."""
        network = self.interface.network
        assert isinstance(network, ICNet)
        return network.sivs(*self.interface.normalise(images, sisms))


def _he_init(module: nn.Module) -> None:
    """He et al.'s start: an untrained network still passes its signal on, through all 13 layers of VGG16."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None  # every convolution of ICNet has one
        nn.init.zeros_(module.bias)
