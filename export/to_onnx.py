"""python export/to_onnx.py: a checkpoint to one ONNX file with a dynamic group axis, proved before it appears."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet export`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["export", *sys.argv[1:]]))

import argparse
import logging
import warnings
from functools import partial

import onnx
import torch
from rich.console import Console
from rich.progress import Progress

from export.checkpoint import load_checkpoint
from export.fp16 import half_precision
from export.icnet import ICNet, Uint8Interface
from export.proof import ALLOWED_FLOORS, check, compare, table
from export.samples import samples
from runtime import __version__
from runtime.contract import FLOAT_INPUTS, FLOAT_OUTPUTS, INPUTS, OUTPUTS
from runtime.errors import ModelError, OutputError
from runtime.files import digest, replacing, same_file

OPSET = 18
INTERFACES = {"uint8": (INPUTS, OUTPUTS), "float32": (FLOAT_INPUTS, FLOAT_OUTPUTS)}


def write_onnx(
    network: ICNet, path: Path, interface: str = "uint8", provenance: dict[str, str] | None = None
) -> onnx.ModelProto:
    """Trace a network and write it as one ONNX file, weights inside, with a dynamic group axis N ≥ 1.

    Args:
        network: in evaluation mode, in FP32 or from `half_precision`.
        path: the file to write.
        interface: "uint8", the file contract; or "float32", the authors' (ImageNet-normalised float32
            [N, 3, 224, 224] and [N, 1, 224, 224] → [N, 1, 224, 224]).
        provenance: notes for the model's `metadata_props`.

    Returns:
        The model that was written.
    """
    inputs, outputs = INTERFACES[interface]
    module = Uint8Interface(network) if interface == "uint8" else network
    n = torch.export.Dim("N", min=1)
    example = tuple(torch.zeros((3, *spec.sizes), dtype=getattr(torch, spec.dtype)) for spec in inputs)
    with warnings.catch_warnings(action="ignore"):  # deprecations inside the exporter
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple({0: n} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the exporter of old returns None
    model = program.model_proto
    onnx.helper.set_model_props(model, provenance or {})
    onnx.save(model, path)
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet export`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="ICNet_vgg16.pth, or a checkpoint of this project"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument(
        "--io",
        choices=INTERFACES,
        default="uint8",
        help="uint8 (default): resized bytes in, normalisation in the graph; float32: the authors' normalised tensors",
    )
    parser.add_argument(
        "--precision",
        choices=ALLOWED_FLOORS,
        default="fp32",
        help="fp16: convolutions and products in half precision, for GPUs; half the file (default fp32)",
    )


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint` to `args.output`; the file appears only once it is proved.

    Raises:
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the file can't be written.
        ModelError: the proof failed; no file is left.
    """
    if same_file(args.checkpoint, args.output):
        raise OutputError(f"{args.output}: is the checkpoint itself; choose another --output")
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision's operators are not there
    network = load_checkpoint(args.checkpoint)
    provenance = {
        "producer": f"icnet-deploy {__version__}",
        "checkpoint": args.checkpoint.name,
        "checkpoint_sha256": digest(args.checkpoint),
        "width": f"{network.width:g}",
        "precision": args.precision,
        "io": args.io,
        "opset": str(OPSET),
        "torch": torch.__version__,
    }
    with replacing(args.output) as temporary:
        groups = samples()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("tracing", total=len(groups) + 1)
            typed = half_precision(network) if args.precision == "fp16" else network
            write_onnx(typed, temporary, args.io, provenance)
            progress.update(bar, advance=1, description="proving")
            step = partial(progress.advance, bar)
            differences = compare(temporary, network, args.io, args.precision, groups, step)
        try:
            check(args.output, differences, args.precision)
        except ModelError:
            console.print(table(differences, args.precision))
            raise
    console.print(table(differences, args.precision))
    size = args.output.stat().st_size / 1e6
    console.print(
        f"{args.output}: {size:.1f} MB, {args.precision}, width {network.width:g}, any group size",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
