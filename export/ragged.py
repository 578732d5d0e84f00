"""Groups as a server joins them: the bytes of all requests, one after the other, and their shapes."""

import torch
from torch import Tensor, nn

from export.icnet import ICNet, Packed
from runtime.contract import SIZE


class Ragged(nn.Module):
    """Many groups in one batch, as Triton's ragged batching hands them over.

    An image and its SISM are one array of four channels, so that a request can't have more of one than of the other.
    """

    def __init__(self, network: ICNet) -> None:
        super().__init__()
        self.packed = Packed(network)

    def forward(self, rgbs: Tensor, shapes: Tensor) -> Tensor:
        """uint8 [200704·N], int32 [B, 4] → float32 [N, 224, 224].

        Args:
            rgbs: N images of 224 × 224 × 4 bytes, RGB and the SISM, group after group.
            shapes: (n, 224, 224, 4) per group; n may be 0. The sum of all n is N.
        """
        pixels = rgbs.to(torch.float32).reshape(-1, SIZE, SIZE, 4)  # TensorRT takes uint8 only into a Cast
        return self.packed(pixels[..., :3], pixels[..., 3], groups_of(shapes, pixels.shape[0]))


def groups_of(shapes: Tensor, images: int) -> Tensor:
    """The number of each image's group, int32 [N]: how many groups end at or before the image."""
    ends = shapes[:, 0].cumsum(0, dtype=torch.int32)  # [B]: the index behind each group's last image
    index = torch.arange(images, dtype=torch.int32)  # [N]
    return (index.unsqueeze(1) >= ends.unsqueeze(0)).to(torch.int32).sum(1, dtype=torch.int32)
