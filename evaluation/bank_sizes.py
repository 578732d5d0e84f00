"""`icnet evaluate --bank-sizes`: how large must a bank be?

Groups are made by cut and paste, of classes that the network need not have seen. The first images of a group make banks
of several sizes. The last images are new: each is compared with a bank by itself. The baselines are the SISMs, and the
new images as a group of their own without a bank.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from evaluation.metrics import TITLES, Scores
from evaluation.record import SISMS
from runtime import Bank, InputError, Predictor
from runtime.commands.contact_sheet import contact_sheet
from runtime.commands.device import place
from runtime.contract import SIZE
from runtime.files import bank_files, digest, write_picture
from training.groups import find_material

if TYPE_CHECKING:
    from training.paste import CutPaste, Group

SIZES = (1, 2, 5, 10, 20)
OWN = "their own group"
SHOWN = 6  # new images in the picture


@dataclass(frozen=True)
class Results:
    """The scores of the new images against banks of every size.

    models: SHA-256 of each file, by its name. scores: the bank's size, `SISMS` or `OWN` → `Metrics.numbers`.
    """

    groups: int
    new: int
    distractors: list[int]
    corrupted: float
    seed: int
    models: dict[str, str]
    sizes: list[int]
    scores: dict[str, dict[str, float]]

    def table(self) -> Table:
        """The scores, for a terminal."""
        grid = Table(title=f"{self.groups} groups, {self.new} new images of each, each against a bank by itself")
        grid.add_column("bank of")
        for title in TITLES.values():
            grid.add_column(title, justify="right")
        for label, scores in self.scores.items():
            name = {SISMS: "the SISMs themselves", OWN: f"no bank, {OWN}"}.get(label, label)
            grid.add_row(name, *(f"{scores[key]:.3f}" for key in TITLES))
        return grid

    def draw(self, path: Path) -> None:
        """Max F and MAE against the size of the bank, as a picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), ("max_f", "mae"), strict=True):
            values = [self.scores[str(size)][key] for size in self.sizes]
            axes.plot(self.sizes, values, marker="o", label="each against the bank")
            axes.axhline(self.scores[OWN][key], linestyle=":", color="0.3", label=f"no bank: {OWN} of {self.new}")
            axes.axhline(self.scores[SISMS][key], linestyle="--", color="C1", label=SISMS)
            axes.set(xscale="log", xlabel="images in the bank", title=TITLES[key], ylim=(0, None))
            axes.set_xticks(self.sizes, [str(size) for size in self.sizes])
            axes.minorticks_off()
        axes.legend()
        write_picture(path, figure.savefig, dpi=120)


def measure(args: argparse.Namespace, progress: Progress) -> tuple[Results, Image.Image]:
    """Score the banks, print a table, and show the largest bank at work on one group.

    Raises:
        InputError: an option is out of range, or the material can't be used.
        ModelError: there is no bank export, or it fails.
    """
    maker = find_material(args)
    if args.show is not None and args.show not in maker.names:
        raise InputError(f"{args.cutouts}: no class {args.show} in it")
    where = place(args.device, args.models[0])
    with Predictor(bank_export=bank_files(args.models[0]), threads=args.threads, **where) as predictor:
        results = score(args, maker, predictor, progress)
        picture = show(predictor, _group(args, maker, 0, args.show), results.sizes[-1])
    progress.console.print(results.table())
    return results, picture


def score(args: argparse.Namespace, maker: "CutPaste", predictor: Predictor, progress: Progress) -> Results:
    """Score the new images of every group against banks of every size."""
    sizes = _sizes(args)
    scores = {label: Scores() for label in (SISMS, OWN, *map(str, sizes))}
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
    return Results(
        groups=args.groups,
        new=args.new,
        distractors=list(args.distractors),
        corrupted=args.corrupted,
        seed=args.seed,
        models={path.name: digest(path) for path in bank_files(args.models[0])},
        sizes=sizes,
        scores={label: found.results().numbers() for label, found in scores.items()},
    )


def _sizes(args: argparse.Namespace) -> list[int]:
    return sorted(set(args.bank_sizes)) or list(SIZES)


def _group(args: argparse.Namespace, maker: "CutPaste", i: int, name: str | None = None) -> "Group":
    images = _sizes(args)[-1] + args.new
    return maker.nth(args.seed, i, images, tuple(args.distractors), args.corrupted, name=name)


def _bank(predictor: Predictor, group: "Group", size: int) -> Bank:
    """The bank of a group's first images; SISMs of 0 and 1 alone, which would be refused as masks, become black."""
    sisms = [sism if sism.max() > 1 else np.zeros_like(sism) for sism in group.sisms[:size]]
    return predictor.bank(group.images[:size], sisms)


def show(predictor: Predictor, group: "Group", size: int) -> Image.Image:
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
