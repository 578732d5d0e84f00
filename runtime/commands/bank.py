"""`icnet bank`: a folder of images to a bank of their SIVs, for `icnet predict --bank`."""

import argparse
from pathlib import Path

from runtime.commands.predict import add_model_arguments, model_files, open_predictor, sism_folder
from runtime.errors import InputError, printable
from runtime.files import check_outputs
from runtime.groups import find_groups


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
    (group,) = find_groups(args.path, sism_folder(args.path, args.sisms))
    models = model_files(args.model, banks_only=True).values()
    check_outputs([args.output], [args.model, *models, *group.images, *(group.sisms or ())])
    with open_predictor(args.model, args.threads, True, args.device) as predictor:
        pixels = predictor.pipeline.read(group.images, group.sisms, kept=True)
        bank = predictor.bank(pixels.images, pixels.sisms)
    bank.save(args.output)
    print(f"{printable(args.output)}: {len(bank)} image{'s' * (len(bank) != 1)}, for icnet predict --bank")
    return 0
