"""python export/to_onnx.py: a checkpoint to ONNX with a dynamic group axis, proved before it appears.

It writes one file for whole groups, or one for several groups in a batch (`--packed`; `--ragged` as a server joins
them), or two for images against a bank of SIVs (`--banked`).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet export`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["export", *sys.argv[1:]]))

import argparse
import logging
from contextlib import ExitStack
from functools import partial

import onnx
import torch
from rich.console import Console
from rich.progress import Progress

from export.checkpoint import load_checkpoint, read_card
from export.fp16 import half_precision
from export.icnet import SIVS_PER_WIDTH, ICNet, Intra, Packed, Uint8Interface
from export.onnx_file import TAKES
from export.proof import check, compare, table
from export.ragged import Ragged
from export.reference import ReferenceICNet
from export.samples import samples
from export.trace import provenance_of, trace
from runtime.contract import (
    BANK,
    CARD,
    FLOAT_INPUTS,
    FLOAT_OUTPUTS,
    GROUPS,
    IMAGE_BYTES,
    INPUTS,
    OUTPUTS,
    RAGGED_INPUTS,
    RGBS,
    SIVS,
    Dim,
    ExportKind,
)
from runtime.errors import InputError, ModelError, OutputError
from runtime.files import bank_files, check_outputs, replacing

EXPORTS = {  # inputs, outputs, and what is traced
    ExportKind.PLAIN: (INPUTS, OUTPUTS, Uint8Interface),
    ExportKind.FLOAT32: (FLOAT_INPUTS, FLOAT_OUTPUTS, lambda network: network),
    ExportKind.PACKED: ((*INPUTS, GROUPS), OUTPUTS, Packed),
    ExportKind.RAGGED: (RAGGED_INPUTS, OUTPUTS, Ragged),
    ExportKind.INTRA: (INPUTS, (SIVS,), Intra),
    ExportKind.BANKED: ((*INPUTS, BANK), OUTPUTS, Uint8Interface),
}
# Lengths of the dynamic axes while tracing.
EXAMPLE: dict[Dim, int] = {"N": 3, "M": 4, "B": 2, RGBS.shape[0]: 3 * IMAGE_BYTES}


def write_onnx(
    network: ICNet | ReferenceICNet,
    path: Path,
    kind: ExportKind = ExportKind.PLAIN,
    provenance: dict[str, str] | None = None,
    compact: bool = False,
) -> onnx.ModelProto:
    """Trace a network and write it as one ONNX file, weights inside, with dynamic axes N ≥ 1 and M ≥ 1.

    Args:
        network: in evaluation mode, in FP32 or from `half_precision`; the reference only as `PLAIN` or `FLOAT32`.
        path: the file to write.
        kind: one of the file contract's; or `FLOAT32`, the authors' interface (ImageNet-normalised float32
            [N, 3, 224, 224] and [N, 1, 224, 224] → [N, 1, 224, 224]); or `RAGGED`, see `Ragged`.
        provenance: notes for the model's `metadata_props`; the file's digest comes beside them.
        compact: as for `trace`.

    Returns:
        The model that was written.
    """
    inputs, outputs, make = EXPORTS[kind]
    module = make(network)  # type: ignore[arg-type]  # a bank is ICNet's alone; the reference has none
    lengths = EXAMPLE | {"S": round(SIVS_PER_WIDTH * network.width)}
    shapes = [[d if isinstance(d, int) else lengths[d] for d in spec.shape] for spec in inputs]
    example = tuple(torch.zeros(s, dtype=getattr(torch, spec.dtype)) for s, spec in zip(shapes, inputs, strict=True))
    return trace(module, example, inputs, outputs, [0], path, provenance or {}, compact)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet export`."""
    parser.add_argument(
        "-c",
        "--checkpoint",
        type=Path,
        required=True,
        help="ICNet_vgg16.pth, EGNet.pth, or a checkpoint of this project",
    )
    parser.add_argument(
        "--network",
        choices=("icnet", "egnet", "detector"),
        default="icnet",
        help="those that make SISMs of single images: egnet (VGG16), for images of any size, and the small detector "
        "of `icnet data detector` (default icnet)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument(
        "--io",
        choices=("uint8", "float32"),
        default="uint8",
        help="uint8 (default): resized bytes in, normalisation in the graph; float32: the authors' normalised tensors",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="fp16: convolutions and products in half precision, for GPUs; half the file (default fp32)",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="store in FP16 the weights that it holds exactly, as those of the demo: half the file, the same maps",
    )

    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--packed", action="store_true", help="several groups in one batch: a third input names each image's group"
    )
    kinds.add_argument(
        "--ragged", action="store_true", help="for Triton: several groups in one batch, as it joins requests"
    )
    kinds.add_argument(
        "--banked",
        action="store_true",
        help="two files, NAME.intra.onnx (images to SIVs) and NAME.banked.onnx (images and SIVs to maps), for groups "
        "of any size in bounded memory and for images against a bank",
    )


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint` to `args.output`; the file appears (of a bank export, both) only once it is proved.

    Raises:
        InputError: options that exclude each other.
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the file can't be written.
        ModelError: the proof failed; no file is left.
    """
    if args.network != "icnet":
        from export.detector_onnx import run as run_detector

        return run_detector(args)
    kind = ExportKind.FLOAT32 if args.io == "float32" else ExportKind.PLAIN
    asked = {ExportKind.PACKED: args.packed, ExportKind.RAGGED: args.ragged, ExportKind.BANKED: args.banked}
    if any(asked.values()):
        kind = next(each for each, given in asked.items() if given)
        if args.io != "uint8":
            raise InputError(f"--io {args.io}: a --{kind} export takes uint8 only")
    outputs = {kind: args.output}
    if args.banked:
        if args.output.is_dir():
            raise OutputError(f"{args.output}: can't be written: it is a folder")
        outputs = dict(zip((ExportKind.INTRA, ExportKind.BANKED), bank_files(args.output), strict=True))
    check_outputs(outputs.values(), [args.checkpoint])
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not installed
    network = load_checkpoint(args.checkpoint)
    provenance = provenance_of(args.checkpoint, network, network.width, args.precision, io=args.io)
    if card := read_card(args.checkpoint):
        provenance[CARD] = card
    with ExitStack() as stack:
        files = {each: stack.enter_context(replacing(output)) for each, output in outputs.items()}
        groups = samples()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("tracing", total=len(groups) + len(files))
            typed = half_precision(network) if args.precision == "fp16" else network
            for each, temporary in files.items():
                write_onnx(typed, temporary, each, provenance, args.compact)
                progress.advance(bar)
            progress.update(bar, description="proving")
            step = partial(progress.advance, bar)
            intra = files.get(ExportKind.INTRA)
            differences = compare(files[kind], network, kind, args.precision, groups, step, intra)
        try:
            check(outputs[kind], differences, args.precision)
        except ModelError:
            console.print(table(differences, args.precision))
            raise
    console.print(table(differences, args.precision))
    for each, output in outputs.items():
        console.print(
            f"{output}: {output.stat().st_size / 1e6:.1f} MB, {args.precision}, width {network.width:g}, {TAKES[each]}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return 0
