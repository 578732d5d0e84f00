"""ICNet exactly as the paper writes it: the reference of the tests and the baseline of the benchmarks.

The correlation is a convolution whose kernel is the group's SIVs (§3.3); the self-correlation is an HW×HW
tensor, reordered by `argsort`, an index `repeat`ed to that size, and `gather` (§3.4); the sub-module runs twice, on
the SISMs and on their complement. Layers, and so the state dict, are those of `ICNet`; only the computation
of the co-saliency modules differs. Nothing ships from here.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from export.icnet import EPS, CoSaliency, ICNet, resize


class ReferenceCoSaliency(CoSaliency):
    """The co-saliency module, one polarity after the other."""

    def forward(self, features: Tensor, sisms: Tensor) -> Tensor:  # type: ignore[override]  # the paper has no bank
        """[N, C, H, W], [N, 1, 224, 224] → [N, K, H, W]."""
        foreground = self.correlate(features, sisms)  # [N, K, H, W]
        background = self.correlate(features, 1 - sisms)  # [N, K, H, W]
        return self.conv(torch.cat([foreground, background], 1))

    def correlate(self, features: Tensor, sisms: Tensor) -> Tensor:
        """NMAP, CFM and RSCF: [N, C, H, W], [N, 1, 224, 224] → [N, K, H, W]."""
        n, _, height, width = features.shape
        sisms = resize(sisms, height)  # [N, 1, H, W]
        f = F.normalize(features, dim=1, eps=EPS)  # [N, C, H, W]

        # NMAP (eq. 1)
        sivs = F.normalize((f * sisms).mean(dim=(2, 3)), dim=1, eps=EPS)  # [N, C]

        # CFM (eq. 2)
        kernel = sivs[:, :, None, None]  # [N, C, 1, 1]: the number of output channels is the group's size
        maps = F.conv2d(f, weight=kernel).flatten(2)  # [N, N, HW]
        maps = F.normalize(maps, dim=2, eps=EPS)
        agreement = torch.matmul(maps, maps.transpose(1, 2)).sum(2)  # [N, N, N] → [N, N]
        weights = F.softmax(agreement, dim=1)  # [N, N]
        csa = (maps * weights[:, :, None]).sum(1)  # [N, HW]
        low, high = csa.min(1, keepdim=True).values, csa.max(1, keepdim=True).values  # [N, 1]
        csa = (csa - low) / (high - low + EPS)

        # RSCF
        pixels = f.flatten(2)  # [N, C, HW]
        scf = torch.matmul(pixels.transpose(1, 2), pixels)  # [N, HW, HW]
        index = csa.argsort(dim=1, descending=True)  # [N, HW]
        index = index[:, :, None].repeat(1, 1, height * width)  # [N, HW, HW]
        rscf = scf.gather(1, index).view(n, -1, height, width)  # [N, HW, H, W]
        return self.cosal_feat.conv(rscf * csa.view(n, 1, height, width))


class ReferenceICNet(ICNet):
    """ICNet with the paper's co-saliency modules. Arguments and state dict: see `ICNet`."""

    co_saliency = ReferenceCoSaliency

    @classmethod
    def of(cls, network: ICNet) -> Self:
        """The reference with the weights of `network`, in evaluation mode."""
        reference = cls(network.width)
        reference.load_state_dict(network.state_dict())
        return reference.eval()
