"""Detectors of salient objects to ONNX (`icnet export --network egnet` or `detector`), proved before the file appears.

The file is run by ONNX Runtime and compared with the PyTorch network in FP32, on several batches. These networks have
no discontinuity like ICNet's order of pixels, so the bound is that of `proof.py` without its allowance for swapped
pixels: the file may differ from the network by a few noise floors. The floor of an FP32 file is the network in FP32
against FP64. The floor of an FP16 file is the network that rounds its weights, and what goes into and comes out of
every convolution, to 11 bits. That rounding leaves the range alone, so a file whose activations overflow FP16 fails.
"""

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from export import egnet_onnx
from export.checkpoint import read_card
from export.detector import Detector, load_detector
from export.egnet import EGNet, load_egnet
from export.noise import vary
from export.onnx_file import cpu_session
from export.proof import Difference, Result, Subject, check, pooled, table
from export.trace import provenance_of, trace
from runtime.contract import CARD, SIZE, TensorSpec
from runtime.detector_contract import INPUT as ANY_SIZE
from runtime.detector_contract import OUTPUT
from runtime.errors import InputError
from runtime.files import check_outputs, replacing

INPUT = TensorSpec("images", "uint8", ("B", SIZE, SIZE, 3))  # RGB; of the demo detector

# 1e-6: the rounding of a sigmoid, of a network with hardly any floor.
SISMS = Subject("SISMs", "the PyTorch network", "images", 1e-6, 1e-6)


def samples() -> dict[str, NDArray[np.uint8]]:
    """What a file of the demo detector is proved on: batches of several sizes; black, white and noisy images."""
    rng = np.random.default_rng(0)
    flat = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (0, 255)])
    noise = rng.integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    return {
        "1 image": egnet_onnx.smooth_images(1, SIZE, SIZE, 0),
        "2 images": egnet_onnx.smooth_images(2, SIZE, SIZE, 1),
        "5 images": egnet_onnx.smooth_images(5, SIZE, SIZE, 2),
        "black, white, noise": np.concatenate([flat, noise]),
    }


def half_precision(network: Detector) -> Detector:
    """A copy of a network in FP16. Its activations fit as they are: ReLU6 and normalised features bound them."""
    return copy.deepcopy(network).half()


@dataclass(frozen=True)
class Kind:
    """What exports of different detectors do differently.

    Attributes:
        title: the network's name, for messages.
        load: a network out of a checkpoint.
        half_precision: a copy in FP16.
        samples: what a file is proved on.
        input: the input's name, type and axes.
        dynamic: its dynamic axes.
        example: the shape of an input while tracing; no dynamic axis may be 1 long.
        takes: the images that a file takes, for messages.
    """

    title: str
    load: Callable[[Path], Any]
    half_precision: Callable[[Any], Any]
    samples: Callable[[], dict[str, NDArray[np.uint8]]]
    input: TensorSpec
    dynamic: tuple[int, ...]
    example: tuple[int, ...]
    takes: str


KINDS = {
    "egnet": Kind(
        "EGNet", load_egnet, egnet_onnx.half_precision, egnet_onnx.samples, ANY_SIZE, (0, 1, 2), (3, 70, 90, 3),
        "any batch, height and width",
    ),
    "detector": Kind(
        "demo detector", load_detector, half_precision, samples, INPUT, (0,), (3, SIZE, SIZE, 3), "any batch"
    ),
}  # fmt: skip


def kind_of(network: EGNet | Detector) -> Kind:
    """How this network is exported."""
    return KINDS["egnet" if isinstance(network, EGNet) else "detector"]


def write_onnx(
    network: EGNet | Detector, path: Path, provenance: dict[str, str] | None = None, compact: bool = False
) -> onnx.ModelProto:
    """Trace a network and write it as one ONNX file, weights inside, with dynamic axes ≥ 1.

    Args:
        network: in evaluation mode, in FP32 or from its kind's `half_precision`.
        path: the file to write.
        provenance: notes for the model's `metadata_props`; the file's digest comes beside them.
        compact: as for `trace`.

    Returns:
        The model that was written.
    """
    kind = kind_of(network)
    example = (torch.zeros(kind.example, dtype=torch.uint8),)
    return trace(network, example, [kind.input], [OUTPUT], kind.dynamic, path, provenance or {}, compact)


def compare(
    path: Path,
    network: EGNet | Detector,
    precision: str = "fp32",
    inputs: dict[str, NDArray[np.uint8]] | None = None,
    step: Callable[[], object] = lambda: None,
) -> list[Difference]:
    """Run a file in ONNX Runtime beside the PyTorch network.

    Args:
        path: an ONNX file from `write_onnx`.
        network: the network in FP32 that it was made from.
        precision: "fp32" or "fp16"; decides what the noise floor is.
        inputs: batches of images by name; None for its kind's `samples`.
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
        for name, images in (kind_of(network).samples() if inputs is None else inputs).items():
            with torch.inference_mode():
                expected, rounded = (each(torch.from_numpy(images)).numpy() for each in (network, rounding))
            found = session.run([OUTPUT.name], {"images": images})[0]
            yield name, found if found.shape == expected.shape else np.full_like(expected, np.nan), expected, rounded

    return pooled(results(), step)


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint`, of `args.network`, to `args.output`; the file appears only once it is proved.

    Raises:
        InputError: an option that is ICNet's alone.
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the file can't be written.
        ModelError: the proof failed; no file is left.
    """
    kinds = {"--packed": args.packed, "--ragged": args.ragged, "--banked": args.banked}
    for option, given in (kinds | {"--io float32": args.io != "uint8"}).items():
        if given:
            raise InputError(f"{option}: not with --network {args.network}, which takes single images as uint8")
    check_outputs([args.output], [args.checkpoint])
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision's operators are not there
    kind = KINDS[args.network]
    network = kind.load(args.checkpoint)
    inputs = kind.samples()
    with replacing(args.output) as file:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("tracing", total=len(inputs) + 1)
            typed = kind.half_precision(network) if args.precision == "fp16" else network
            provenance = provenance_of(args.checkpoint, network, network.width, args.precision, network=args.network)
            if card := read_card(args.checkpoint):
                provenance[CARD] = card
            write_onnx(typed, file, provenance, args.compact)
            progress.update(bar, description="proving", advance=1)
            differences = compare(file, network, args.precision, inputs, lambda: progress.advance(bar))
        console.print(table(differences, args.precision, SISMS))
        check(args.output, differences, args.precision, SISMS)
    console.print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {kind.title}, {args.precision}, "
        f"width {network.width:g}, {kind.takes}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
