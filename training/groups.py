"""`icnet data paste`: a data set of groups made by cut and paste; and the options by which such groups are made."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.progress import track

from runtime.commands.options import number, share
from runtime.errors import DependencyError, InputError, OutputError, how_to_install
from runtime.files import locked, output_errors, replacing, write_picture

if TYPE_CHECKING:
    from training.paste import CutPaste, Group


def add_material_arguments(add: Callable[..., argparse.Action], required: bool = True) -> None:
    """The options that name what groups are made of, for the `add_argument` of a parser or of a group of options."""
    add("--cutouts", type=Path, required=required, metavar="DIR", help="cut-outs CLASS/NAME.png, RGBA")
    add("--backgrounds", type=Path, required=required, metavar="DIR", help="photographs, in folders of any depth")


def add_group_arguments(add: Callable[..., argparse.Action]) -> None:
    """The options that say which groups are made."""
    add(
        "--groups",
        type=number(),
        default=60,
        metavar="N",
        help="each of another class if there are enough (default 60)",
    )
    add("--images", type=number(), default=10, metavar="N", help="in a group (default 10)")
    add("--distractors", type=number(0), nargs=2, default=(2, 3), metavar=("MIN", "MAX"), help="an image (default 2 3)")
    add(
        "--corrupted",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="of SISMs that are plainly wrong (default 0.2)",
    )
    add("--photographic", action="store_true", help="objects, images and SISMs as in photographs, not in drawings")
    add("--seed", type=number(0), default=0, metavar="N", help="the same seed gives the same groups (default 0)")


def find_material(args: argparse.Namespace) -> "CutPaste":
    """Check --distractors, and read the cut-outs and backgrounds.

    Raises:
        DependencyError: OpenCV is not installed.
        InputError: MIN of --distractors is above MAX, or the material can't be used.
    """
    low, high = args.distractors
    if low > high:
        raise InputError(f"--distractors {low} {high}: expected MIN MAX with MIN ≤ MAX")
    try:
        from training.paste import CutPaste
        from training.photographic import PhotographicPaste
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed: {how_to_install('train')}") from error
    return (PhotographicPaste if args.photographic else CutPaste)(args.cutouts, args.backgrounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data paste`."""
    add = parser.add_argument
    add_material_arguments(add)
    add("-o", "--output", type=Path, required=True, metavar="DATA", help="data set to write: img/, gt/ and sism/")
    add_group_arguments(add)
    add("--classes", nargs="+", metavar="CLASS", help="one group of each, instead of --groups")


def run(args: argparse.Namespace) -> int:
    """Write a data set in the paper's layout.

    Raises:
        InputError: an option is out of range, or the cut-outs or backgrounds can't be used.
        OutputError: a file can't be written.
    """
    if args.output.exists():
        raise InputError(f"{args.output}: is there already; choose another --output")
    maker = find_material(args)
    if unknown := set(args.classes or ()) - set(maker.names):
        raise InputError(f"{args.cutouts}: no class {', '.join(sorted(unknown))} in it")
    classes = args.classes or [None] * args.groups
    console = Console(stderr=True)
    progress = partial(track, description="pasting", console=console, transient=True, disable=not console.is_terminal)
    with _whole(args.output) as folder:
        for i, name in enumerate(progress(classes)):
            group = maker.nth(args.seed, i, args.images, tuple(args.distractors), args.corrupted, name=name)
            turn = 0 if name else i // len(maker.names)
            _write(group, folder, f"{group.name}-{turn + 1}" if turn else group.name)
    print(f"{len(classes)} groups of {args.images} in {args.output}")
    return 0


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write to: renamed to it if the block ends well, deleted if it does not.

    What a killed run left there is deleted first.

    Raises:
        OutputError: it can't be made, or another run is writing to it.
    """
    unfinished = Path(os.path.realpath(folder.with_name(f".{folder.name}.unfinished")))
    with output_errors(folder), ExitStack() as stack:
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(unfinished, wait=False))
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another run is writing it") from error
        stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
        for left in unfinished.iterdir():
            shutil.rmtree(left)
        yield unfinished
        unfinished.rename(folder)


def _write(group: "Group", folder: Path, name: str) -> None:
    for kind, pixels, suffix in ("img", group.images, "jpg"), ("gt", group.masks, "png"), ("sism", group.sisms, "png"):
        for k, image in enumerate(pixels, 1):
            with replacing(folder / kind / name / f"{k:03}.{suffix}") as temporary:
                write_picture(temporary, Image.fromarray(image).save, quality=92)
