"""EGNet to ONNX (`icnet export --network egnet`), with dynamic batch, height and width, proved before the file appears.

The file is run by ONNX Runtime and compared with the PyTorch network in FP32, at several sizes. EGNet has no
discontinuity like ICNet's order of pixels, so the bound is that of `proof.py` without its allowance for swapped pixels:
the file may differ from the network by a few noise floors. The floor of an FP32 file is the network in FP32 against
FP64. The floor of an FP16 file is the network that rounds its weights, and what goes into and comes out of every
convolution, to 11 bits. That rounding leaves the range alone, so a file whose activations overflow FP16 fails.
"""

import argparse
import copy
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import nn

from export.egnet import EGNet, load_egnet
from export.fp16 import TARGET
from export.noise import vary
from export.onnx_file import cpu_session
from export.proof import Difference, Result, Subject, check, pooled, table
from export.trace import provenance_of, trace
from runtime.contract import TensorSpec
from runtime.errors import InputError
from runtime.files import check_outputs, replacing

INPUT = TensorSpec("images", "uint8", ("B", "H", "W", 3))  # RGB, any height and width
OUTPUT = TensorSpec("sisms", "float32", ("B", "H", "W"))  # in [0, 1]

# 1e-6: the rounding of a sigmoid, of a network with hardly any floor.
SISMS = Subject("SISMs", "the PyTorch network", "images", 1e-6, 1e-6)


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


def write_onnx(network: EGNet, path: Path, provenance: dict[str, str] | None = None) -> onnx.ModelProto:
    """Trace a network and write it as one ONNX file, weights inside, with dynamic axes B, H and W ≥ 1.

    Args:
        network: in evaluation mode, in FP32 or from `half_precision`.
        path: the file to write.
        provenance: notes for the model's `metadata_props`; the file's digest comes beside them.

    Returns:
        The model that was written.
    """
    example = (torch.zeros(3, 70, 90, 3, dtype=torch.uint8),)
    return trace(network, example, [INPUT], [OUTPUT], [0, 1, 2], path, provenance or {})


def compare(
    path: Path,
    network: EGNet,
    precision: str = "fp32",
    inputs: dict[str, NDArray[np.uint8]] | None = None,
    step: Callable[[], object] = lambda: None,
) -> list[Difference]:
    """Run a file in ONNX Runtime beside the PyTorch network.

    Args:
        path: an ONNX file from `write_onnx`.
        network: the network in FP32 that it was made from.
        precision: "fp32" or "fp16"; decides what the noise floor is.
        inputs: batches of images by name; None for `samples()`.
        step: called after every batch.

    Returns:
        One difference per batch, and last the one over all pixels of all. A SISM that is not finite, or not of the
        image's size, has a difference of infinity.
    """
    # An optimised FP16 graph skips roundings on a CPU that a GPU makes, and so hides an overflow.
    session = cpu_session(path, optimised=precision != "fp16")
    rounding = copy.deepcopy(network)
    vary(rounding, precision)

    def results() -> Iterator[Result]:
        for name, images in (samples() if inputs is None else inputs).items():
            with torch.inference_mode():
                expected, rounded = (each(torch.from_numpy(images)).numpy() for each in (network, rounding))
            found = session.run([OUTPUT.name], {INPUT.name: images})[0]
            yield name, found if found.shape == expected.shape else np.full_like(expected, np.nan), expected, rounded

    return pooled(results(), step)


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint`, an EGNet, to `args.output`; the file appears only once it is proved.

    Raises:
        InputError: an option that is ICNet's alone.
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the file can't be written.
        ModelError: the proof failed; no file is left.
    """
    kinds = {"--packed": args.packed, "--ragged": args.ragged, "--banked": args.banked}
    for option, given in (kinds | {"--io float32": args.io != "uint8"}).items():
        if given:
            raise InputError(f"{option}: not with --network egnet, which takes single images as uint8")
    check_outputs([args.output], [args.checkpoint])
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision's operators are not there
    network = load_egnet(args.checkpoint)
    inputs = samples()
    with replacing(args.output) as file:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("tracing", total=len(inputs) + 1)
            typed = half_precision(network) if args.precision == "fp16" else network
            provenance = provenance_of(args.checkpoint, network, network.width, args.precision, network="egnet")
            write_onnx(typed, file, provenance)
            progress.update(bar, description="proving", advance=1)
            differences = compare(file, network, args.precision, inputs, lambda: progress.advance(bar))
        console.print(table(differences, args.precision, SISMS))
        check(args.output, differences, args.precision, SISMS)
    console.print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, EGNet, {args.precision}, width {network.width:g}, "
        "any batch, height and width",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
