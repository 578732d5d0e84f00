"""`icnet predict`: folders of images in, folders of co-saliency maps and contact sheets out."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.contact_sheet import contact_sheet
from runtime.errors import ICNetError, InputError
from runtime.files import digest
from runtime.groups import Group, find_groups
from runtime.predictor import Predictor
from runtime.preprocess import image_tensor, restore_map, sism_tensor
from runtime.results import SHEET, GroupResults
from runtime.sisms import builtin_sism

BUILTIN = "builtin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet predict`."""
    parser.add_argument("path", type=Path, help="a folder of images (one group), or a data set with img/GROUP/ folders")
    parser.add_argument("--model", type=Path, required=True, help="an exported model, e.g. icnet.onnx")
    parser.add_argument(
        "--sisms",
        metavar="DIR",
        help="folder with a SISM NAME.png per image (a data set: GROUP/NAME.png; default PATH/sism); "
        f"or '{BUILTIN}': OpenCV's static saliency, a weak stand-in",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for GROUP/NAME.png maps and GROUP/contact_sheet.jpg"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the groups that are finished there and would come out the same"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Predict every group at `args.path`; a group that fails is reported and does not stop the others.

    Returns:
        0, or 2 if any group failed.

    Raises:
        ICNetError: nothing could be started.
    """
    groups = find_groups(args.path, sism_folder(args.path, args.sisms))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    failed = skipped = 0
    with Predictor(args.model, threads=args.threads) as predictor:
        model = args.model, digest(args.model)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(groups))
            for group in groups:
                progress.update(bar, description=escape(group.name))
                try:
                    if group.problem is not None:
                        raise group.problem
                    results = GroupResults(args.output / group.name, group, model)
                    if args.resume and results.finished():
                        skipped += 1
                    else:
                        predict_group(predictor, group, results)
                except ICNetError as error:
                    failed += 1
                    console.print(f"icnet predict: error: {error}", style="red", markup=False)
                progress.advance(bar)
    if skipped:
        print(f"{skipped} of {len(groups)} groups were finished already")
    if failed and len(groups) > 1:
        console.print(f"{failed} of {len(groups)} groups failed; mend them and go on with --resume")
    if failed < len(groups):
        folder = args.output / (groups[0].name if len(groups) == 1 else "GROUP")
        print(f"maps: {folder}/*.png, to look at: {folder / SHEET}")
    return 2 if failed else 0


def predict_group(predictor: Predictor, group: Group, results: GroupResults) -> None:
    """Write a map for every image (8-bit grey, of its own size), then the group's contact sheet."""
    results.begin()
    images, sizes = zip(*map(image_tensor, group.images), strict=True)
    sisms = [builtin_sism(i) for i in images] if group.sisms is None else [sism_tensor(s) for s in group.sisms]
    maps = predictor.predict_tensors(np.stack(images), np.stack(sisms))
    for source, tensor, size in zip(group.images, maps, sizes, strict=True):
        grey = np.rint(restore_map(tensor, size) * 255).astype(np.uint8)
        results.write(f"{source.stem}.png", Image.fromarray(grey).save)
    sheet = contact_sheet(np.stack(images), np.stack(sisms), maps, sizes, group.name)
    results.write(SHEET, partial(sheet.save, quality=90))
    results.finish()


def sism_folder(path: Path, sisms: str | None) -> Path | None:
    """The folder of the SISMs of what is at `path`, given --sisms; None for built-in ones.

    Raises:
        InputError: there is none.
    """
    if sisms == BUILTIN:
        return None
    if sisms is not None:
        return Path(sisms)
    if (path / "img").is_dir() and (path / "sism").is_dir():
        return path / "sism"
    raise InputError(f"{path}: no SISMs: name their folder with --sisms DIR, or take --sisms {BUILTIN}")
