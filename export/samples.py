"""Seeded inputs to measure and to compare networks on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.icnet import SIZE

GROUP_SIZES = (1, 2, 5, 10, 17)


@dataclass(frozen=True)
class Sample:
    """A group: uint8 [N, 224, 224, 3] and uint8 [N, 224, 224]."""

    name: str
    images: NDArray[np.uint8]
    sisms: NDArray[np.uint8]


def smooth_group(n: int, seed: int) -> Sample:
    """A group of n smooth random images and SISMs."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, cells: int) -> NDArray[np.uint8]:
        x = torch.rand(n, channels, cells, cells, generator=generator)
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1) * 255
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return Sample(f"N = {n}", smooth(3, 12), smooth(1, 6)[..., 0])


def samples(sizes: Sequence[int] = GROUP_SIZES) -> list[Sample]:
    """Groups of several sizes, and the degenerate inputs that must still give finite, equal maps."""
    group = smooth_group(2, seed=100)
    images, sisms = group.images, group.sisms
    return [
        *(smooth_group(n, seed=n) for n in sizes),
        Sample("one black image", np.stack([images[0], np.zeros_like(images[1])]), sisms),
        Sample("SISMs all 0", images, np.zeros_like(sisms)),
        Sample("SISMs all 1", images, np.full_like(sisms, 255)),
        Sample("N = 1, all black", np.zeros_like(images[:1]), np.zeros_like(sisms[:1])),
    ]
