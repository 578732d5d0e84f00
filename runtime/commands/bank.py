"""`icnet bank`: a folder of images to a bank of their SIVs, for `icnet predict --bank`."""

import argparse
from pathlib import Path

from rich.console import Console

from runtime.commands.detector import sism_source, speaking
from runtime.commands.predict import add_model_arguments, model_files, model_of, open_predictor
from runtime.errors import InputError, printable
from runtime.files import check_outputs
from runtime.groups import find_groups
from runtime.predictor import BUILTIN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bank`."""
    parser.add_argument("path", type=Path, help="a folder with the images of one group")
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .npz file to write: a row per image")


def run(args: argparse.Namespace) -> int:
    """Make the bank of the group at `args.path`.

    Raises:
        InputError: the group can't be used, or there are several.
        ModelError: there is no bank export, or it fails.
        OutputError: the bank can't be written, or is an input.
    """
    if (args.path / "img").is_dir():
        raise InputError(f"{args.path}: a data set; name the folder of one group, e.g. {args.path / 'img'}/GROUP")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with speaking(console, "icnet bank"):
        folder, detector = sism_source(args.path, args.sisms, args.sism_model)
        (group,) = find_groups(args.path, folder)
        model = model_of(args)
        used = [model, *model_files(model, banks_only=True).values()]
        used += [] if detector in (None, BUILTIN) else [Path(detector or "")]
        check_outputs([args.output], [*used, *group.images, *(group.sisms or ())])
        with open_predictor(args, detector, banks_only=True) as predictor:
            pixels = predictor.pipeline.read(group.images, group.sisms, kept=True)
            bank = predictor.bank(pixels.images, pixels.sisms)
    bank.save(args.output)
    print(f"{printable(args.output)}: {len(bank)} image{'s' * (len(bank) != 1)}, for icnet predict --bank")
    return 0
