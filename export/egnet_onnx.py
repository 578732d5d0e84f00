"""What EGNet's export needs: inputs that it is proved on, and a copy in half precision (see `detector_onnx.py`)."""

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.egnet import EGNet
from export.fp16 import TARGET


def smooth_images(batch: int, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Smooth random images with noise on them, uint8 [batch, height, width, 3]."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 3, 6, 6, generator=rng)
    x = nn.functional.interpolate(x, size=(height, width), mode="bicubic") * 255
    x = x + 8 * torch.randn(batch, 3, height, width, generator=rng)
    return x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def samples() -> dict[str, NDArray[np.uint8]]:
    """What a file is proved on: batches at several sizes, odd ones too, and black, white and noisy images."""
    rng = np.random.default_rng(0)
    flat = np.stack([np.zeros((64, 48, 3), np.uint8), np.full((64, 48, 3), 255, np.uint8)])
    noise = rng.integers(0, 256, (1, 64, 48, 3), dtype=np.uint8)
    return {
        "2 of 97×131": smooth_images(2, 97, 131, 0),
        "1 of 224×224": smooth_images(1, 224, 224, 1),
        "1 of 320×240": smooth_images(1, 320, 240, 2),
        "1 of 33×200": smooth_images(1, 33, 200, 3),
        "3 of 64×48: black, white, noise": np.concatenate([flat, noise]),
    }


def half_precision(network: EGNet) -> EGNet:
    """A copy of a network in FP16, scaled so that its activations fit.

    VGG16's activations on inputs that are not scaled reach the thousands, and FP16 ends at 65 504. Convolution, ReLU,
    max-pooling and resizing commute with a positive factor: every convolution may compute its output times a factor
    of its own, if those that read it take the factor back. Terms of one sum share a factor. Powers of two are exact.

    Args:
        network: in FP32 and evaluation mode; it is not changed.

    Returns:
        The copy. It takes and returns what `network` does.
    """
    network = copy.deepcopy(network).eval()
    largest = dict.fromkeys((m for m in network.modules() if isinstance(m, nn.Conv2d)), 0.0)

    def note(conv: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        largest[conv] = max(largest[conv], output.abs().max().item())

    hooks = [conv.register_forward_hook(note) for conv in largest]
    with torch.inference_mode():
        for images in samples().values():
            network(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()

    reads, sums = _wiring(network)
    for terms in sums:
        most = max(largest[conv] for conv in terms)
        largest.update(dict.fromkeys(terms, most))
    factors: dict[nn.Conv2d | None, float] = {
        conv: 2.0 ** math.floor(math.log2(TARGET / most)) if most else 1.0 for conv, most in largest.items()
    }
    factors[None] = 1.0  # the normalised image
    factors[_conv(network.merge2.final_score[-1])] = 1.0  # the scores: a sigmoid follows
    for conv, before in reads.items():
        conv.weight.data *= factors[conv] / factors[before]
        if conv.bias is not None:
            conv.bias.data *= factors[conv]
    return network.half()


def _wiring(network: EGNet) -> tuple[dict[nn.Conv2d, nn.Conv2d | None], list[list[nn.Conv2d]]]:
    """Which convolution's output each convolution reads (None: the image); and whose outputs are added up.

    A convolution that reads a sum is said to read one of its terms.
    """
    reads: dict[nn.Conv2d, nn.Conv2d | None] = {}

    def chain(layers: nn.Module, before: nn.Conv2d | None) -> nn.Conv2d:
        for conv in (m for m in layers.modules() if isinstance(m, nn.Conv2d)):
            reads[conv] = before
            before = conv
        assert before is not None
        return before

    base, one, two = network.base, network.merge1, network.merge2
    chain(base.base, None)
    x = [_conv(base.base[tap - 1]) for tap in base.taps]
    s4 = chain(one.up[4], chain(base.base_ex, x[3]))
    s3 = chain(one.up[3], x[3])
    s2 = chain(one.up[2], x[2])
    s2_narrow = chain(one.trans[1], s2)
    s1 = chain(one.up[1], x[1])
    s4_narrow = chain(one.trans[2], s4)
    edge = chain(one.up[0], x[0])
    narrow = [chain(trans, s) for trans, s in zip(two.trans[0].children(), (s1, s2, s3, s4), strict=True)]
    guided = [chain(convs, edge) for convs in two.up[0].children()]
    chain(two.final_score, guided[0])
    return reads, [[x[3], s4], [x[2], s3], [x[1], s2_narrow], [x[0], s4_narrow], [edge, *narrow], guided]


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module
