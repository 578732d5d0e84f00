"""A network in half precision that computes the same maps.

Convolutions and products are FP16 because their weights are; `ICNet` itself keeps the norms, the softmax, the min–max,
the sort key and every ε in FP32. What is left is FP16's range, which ends at 65 504: one checkpoint's activations reach
the hundreds, another's the hundred thousands. But convolution, ReLU and max-pooling commute with a positive factor, so
every layer of the backbone may compute its output times a factor of its own, if the next layer's weights take it back.
With powers of two that is exact.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.icnet import ICNet, Uint8Interface
from export.samples import samples

# Largest activation after scaling, on the inputs below. FP16 ends 128 times above it, for images that excite a layer
# more than these do, and keeps its full 11 bits down to 8 million times below.
TARGET = 512.0


def half_precision(network: ICNet) -> ICNet:
    """A copy of a network in FP16, scaled so that its activations fit.

    Args:
        network: in FP32 and evaluation mode; it is not changed.

    Returns:
        The copy, batch norms folded. It takes and returns what `network` does.
    """
    network = copy.deepcopy(network).eval()
    fold_batch_norms(network)
    _scale(network, _largest_outputs(network))
    return network.half()


def fold_batch_norms(network: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for i in range(1, len(module)):
                conv, norm = module[i - 1], module[i]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[i - 1], module[i] = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _largest_outputs(network: ICNet) -> dict[nn.Conv2d, float]:
    """The largest absolute output of every convolution, over groups of smooth, black and noisy images."""
    largest: dict[nn.Conv2d, float] = {}

    def note(conv: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        largest[conv] = max(largest.get(conv, 0.0), output.abs().max().item())

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    noise = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    groups = [(torch.from_numpy(g.images), torch.from_numpy(g.sisms)) for g in samples(sizes=(4,))]
    interface = Uint8Interface(network)
    with torch.inference_mode():
        for images, sisms in [*groups, (noise, noise[..., 0])]:
            interface(images, sisms)
    for hook in hooks:
        hook.remove()
    return largest


def _scale(network: ICNet, largest: dict[nn.Conv2d, float]) -> None:
    """Give every layer before the co-saliency modules' normalisation a factor, and undo it where it matters."""
    taps: list[float] = []  # the factor of each stage's output
    factor = 1.0
    for index, layer in enumerate(network.vgg.vgg):
        if isinstance(layer, nn.Conv2d):
            factor = _rescale(layer, factor, largest[layer])
        if index in network.vgg.taps:
            taps.append(factor)

    for decoder, tap in zip((network.refine_1, network.refine_2, network.refine_3), taps, strict=False):
        decoder.cmprs.weight.data /= tap
    # These end in features that are normalised before anything else happens to them: any factor will do.
    for conv, tap in ((network.conv4_cmprs, taps[3]), (network.conv5_cmprs, taps[4])):
        _rescale(conv, tap, largest[conv])
    factor = taps[4]
    for layer in network.conv6_cmprs:
        if isinstance(layer, nn.Conv2d):
            factor = _rescale(layer, factor, largest[layer])


def _rescale(conv: nn.Conv2d, before: float, largest: float) -> float:
    """Make a convolution take inputs that are `before` times the true ones; returns the factor of its outputs."""
    after = 2.0 ** math.floor(math.log2(TARGET / largest)) if largest else 1.0
    conv.weight.data *= after / before
    if conv.bias is not None:
        conv.bias.data *= after
    return after


def round_to_half(x: Tensor) -> Tensor:
    """Round to FP16's 11 significant bits, without its limits of range."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
