"""python evaluation/bank_sizes.py: how large must a bank be?

Groups are made by cut and paste, of classes that the network need not have seen. The first images of each make a bank,
once of one image, once of two, and so on; the last ones are new, and each is compared with the bank by itself. Beside
the banks stand the SISMs themselves, and the new images as a group of their own, without a bank.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet bank-curve`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["bank-curve", *sys.argv[1:]]))

import argparse
import datetime
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evaluation.accuracy import PACKAGES
from evaluation.metrics import Scores
from evaluation.record import SISMS, versions
from runtime import Bank, InputError, Predictor
from runtime.commands.contact_sheet import contact_sheet
from runtime.contract import SIZE
from runtime.files import bank_files, digest, replacing, write_json
from training.paste import CutPaste, Group

OWN = "their own group"
TITLES = {"s": "S ↑", "max_f": "max F ↑", "max_e": "max E ↑", "mae": "MAE ↓"}
SHOWN = 6  # new images in the picture

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bank-curve`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="NAME.onnx: NAME.intra.onnx and NAME.banked.onnx are used")
    add("--cutouts", type=Path, required=True, help="folder with CLASS/NAME.png, RGBA")
    add("--backgrounds", type=Path, required=True, help="photographs, in folders of any depth")
    add("--sizes", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="images in the bank (default 1 2 5 10 20)")
    add("--new", type=int, default=10, help="new images per group (default 10)")
    add("--groups", type=int, default=60, help="each of another class, if there are as many")
    add("--distractors", type=int, nargs=2, default=(2, 3), metavar=("MIN", "MAX"))
    add("--corrupted", type=float, default=0.2, help="share of SISMs that are plainly wrong (default 0.2)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="write the results as JSON")
    add("--plot", type=Path, metavar="PNG", help="draw max F and MAE against the size of the bank")
    add("--picture", type=Path, metavar="JPG", help="show the largest bank at work on one group")
    add("--show", metavar="CLASS", help="the class in the picture (default: that of the first group)")


def run(args: argparse.Namespace) -> int:
    """Score the banks, print a table and write the results.

    Raises:
        InputError: options out of range, or material that can't be used.
        ModelError: there is no bank export, or it fails.
        OutputError: the results can't be written.
    """
    low, high = args.distractors
    if (
        min(args.groups, args.new, *args.sizes) < 1
        or not 0 <= low <= high
        or args.seed < 0
        or not 0 <= args.corrupted <= 1
    ):
        raise InputError(
            "--groups, --new and --sizes take numbers from 1, --distractors MIN and MAX, --corrupted from 0 to 1, "
            "--seed from 0"
        )
    maker = CutPaste(args.cutouts, args.backgrounds)
    if args.show is not None and args.show not in maker.names:
        raise InputError(f"{args.cutouts}: no class {args.show} in it")
    paths = (args.output, args.plot, args.picture)
    with ExitStack() as stack, Predictor(bank=bank_files(args.model)) as predictor:
        output, plot, picture = (stack.enter_context(replacing(path)) if path else None for path in paths)
        results = measure(args, maker, predictor)
        Console().print(table(results))
        if output:
            write_json(output, results)
        if plot:
            draw(results, plot)
        if picture:
            group = _group(args, maker, 0, args.show)
            show(predictor, group, len(group.images) - args.new).save(picture, quality=90)
    return 0


def _group(args: argparse.Namespace, maker: CutPaste, i: int, name: str | None = None) -> Group:
    images = max(args.sizes) + args.new
    return maker.nth(args.seed, i, images, tuple(args.distractors), args.corrupted, name=name)


def measure(args: argparse.Namespace, maker: CutPaste, predictor: Predictor) -> Results:
    """Score the new images against banks of every size."""
    sizes = sorted(set(args.sizes))
    scores = {label: Scores() for label in (SISMS, OWN, *map(str, sizes))}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for i in progress.track(range(args.groups), description="groups"):
            group = _group(args, maker, i)
            images, sisms, masks = (t[-args.new :] for t in (group.images, group.sisms, group.masks))
            bank = _bank(predictor, group, sizes[-1])
            maps: dict[str, NDArray[Any]] = {SISMS: sisms, OWN: predictor.predict_tensors(images, sisms)}
            for size in sizes:
                maps[str(size)] = predictor.predict_tensors(images, sisms, bank[:size])
            for label, of_group in maps.items():
                for map_, mask in zip(of_group, masks, strict=True):
                    scores[label].add(map_, mask)
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(PACKAGES),
        "groups": args.groups,
        "new": args.new,
        "distractors": list(args.distractors),
        "corrupted": args.corrupted,
        "seed": args.seed,
        "models": {path.name: digest(path) for path in bank_files(args.model)},
        "sizes": sizes,
        "scores": {label: {key: getattr(s.results(), key) for key in TITLES} for label, s in scores.items()},
    }


def _bank(predictor: Predictor, group: Group, size: int) -> Bank:
    """The bank of a group's first images; SISMs of 0 and 1 alone, which would be taken for a mistake, are black."""
    sisms = [sism if sism.max() > 1 else np.zeros_like(sism) for sism in group.sisms[:size]]
    return predictor.bank(group.images[:size], sisms)


def table(results: Results) -> Table:
    """The scores, for a terminal."""
    grid = Table(
        title=f"{results['groups']} groups, {results['new']} new images of each, each against a bank by itself"
    )
    grid.add_column("bank of")
    for title in TITLES.values():
        grid.add_column(title, justify="right")
    for label, scores in results["scores"].items():
        name = {SISMS: "the SISMs themselves", OWN: f"no bank, {OWN}"}.get(label, label)
        grid.add_row(name, *(f"{scores[key]:.3f}" for key in TITLES))
    return grid


def draw(results: Results, path: Path) -> None:
    """Max F and MAE against the size of the bank, as a picture."""
    from matplotlib.figure import Figure

    scores, sizes = results["scores"], results["sizes"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("max_f", "mae"), strict=True):
        axes.plot(sizes, [scores[str(size)][key] for size in sizes], marker="o", label="each against the bank")
        axes.axhline(scores[OWN][key], linestyle=":", color="0.3", label=f"no bank: {OWN} of {results['new']}")
        axes.axhline(scores[SISMS][key], linestyle="--", color="C1", label=SISMS)
        axes.set(xscale="log", xlabel="images in the bank", title=TITLES[key], ylim=(0, None))
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def show(predictor: Predictor, group: Group, size: int) -> Image.Image:
    """Images of a bank of `size`, and new images with their maps against it."""
    bank = _bank(predictor, group, size)
    images, sisms = group.images[size:][:SHOWN], group.sisms[size:][:SHOWN]
    maps = predictor.predict_tensors(images, sisms, bank)
    sheet = contact_sheet(images, sisms, maps, [(SIZE, SIZE)] * len(images), f"new, bank of {size}")
    side, gap = 100, 6
    columns = max((sheet.width - gap) // (side + gap), 1)
    rows = -(-size // columns)
    picture = Image.new("RGB", (sheet.width, rows * (side + gap) + gap + sheet.height), (255, 255, 255))
    for i, pixels in enumerate(group.images[:size]):
        place = gap + i % columns * (side + gap), gap + i // columns * (side + gap)
        picture.paste(Image.fromarray(np.asarray(pixels)).resize((side, side), Image.Resampling.LANCZOS), place)
    picture.paste(sheet, (0, picture.height - sheet.height))
    return picture
