"""`icnet evaluate --corrupt-sisms`: how much do wrong SISMs cost?

ICNet's authors say that a minority of wrong SISMs in a group is tolerated and a majority is not (§4.4). Here groups are
made by cut and paste, of classes that the network need not have seen, and scored with a growing share of their SISMs
corrupted. The images stay the same; a larger share corrupts the same SISMs and more. The baselines are the SISMs, and
each model *blind*: with SISMs of 1 everywhere, so that it sees only the images.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from evaluation.metrics import TITLES, Scores
from evaluation.record import SISMS, labels
from runtime import Predictor
from runtime.commands.device import place
from runtime.files import digest, write_picture
from training.groups import find_material

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
BLIND = "SISM = 1"
SHOWN = ("max_f", "mae")  # in the table and the plot


@dataclass(frozen=True)
class Results:
    """The scores of each kind of maps at every share; blind ones have one entry.

    models: SHA-256 of each file, by its label. scores: label → per share, `Metrics.numbers`.
    """

    groups: int
    images: int
    distractors: list[int]
    seed: int
    models: dict[str, str]
    shares: list[float]
    scores: dict[str, list[dict[str, float]]]

    def table(self) -> Table:
        """Max F and MAE at every share, for a terminal."""
        grid = Table(title=f"{self.groups} groups of {self.images}, by the share of corrupted SISMs")
        grid.add_column("maps")
        grid.add_column("score")
        for share in self.shares:
            grid.add_column(f"{share:.0%}", justify="right")
        for label, row in self.scores.items():
            for key in SHOWN:
                grid.add_row(escape(label), TITLES[key], *(f"{scores[key]:.3f}" for scores in row))
        return grid

    def draw(self, path: Path) -> None:
        """Max F and MAE against the share, as a picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), SHOWN, strict=True):
            for label, row in self.scores.items():
                values = [scores[key] for scores in row]
                if label.endswith(f", {BLIND}"):  # no SISMs to corrupt
                    axes.axhline(values[0], linestyle=":", color="0.5", label=label)
                else:
                    style = "--" if label == SISMS else "-"
                    axes.plot([100 * s for s in self.shares], values, style, marker="o", label=label)
            axes.set(xlabel="corrupted SISMs in a group, %", title=TITLES[key], ylim=(0, None))
        axes.legend()
        write_picture(path, figure.savefig, dpi=120)


def measure(args: argparse.Namespace, progress: Progress) -> Results:
    """Score everything at every share, and print a table.

    Raises:
        InputError: MIN of --distractors is above MAX, or the material can't be used.
        ModelError: a model fails.
    """
    shares = sorted(set(args.corrupt_sisms)) or list(SHARES)
    maker = find_material(args)
    names = dict(zip(labels(args.models), args.models, strict=True))
    blind = [f"{name}, {BLIND}" for name in names]
    scores = {label: [Scores() for _ in shares] for label in (SISMS, *names)} | {label: [Scores()] for label in blind}
    with ExitStack() as models:
        predictors = {
            name: models.enter_context(Predictor(path, threads=args.threads, **place(args.device, path)))
            for name, path in names.items()
        }
        for i in progress.track(range(args.groups), description="groups"):
            for k, share in enumerate(shares):
                group = maker.nth(args.seed, i, args.images, tuple(args.distractors), share)
                maps: dict[str, NDArray[Any]] = {SISMS: group.sisms}
                for name, predictor in predictors.items():
                    maps[name] = predictor.predict_tensors(group.images, group.sisms)
                    if k == 0:  # the images are the same at every share
                        ones = np.full_like(group.sisms, 255)
                        maps[f"{name}, {BLIND}"] = predictor.predict_tensors(group.images, ones)
                for label, of_group in maps.items():
                    for map_, mask in zip(of_group, group.masks, strict=True):
                        scores[label][k].add(map_, mask)
    results = Results(
        groups=args.groups,
        images=args.images,
        distractors=list(args.distractors),
        seed=args.seed,
        models={name: digest(path) for name, path in names.items()},
        shares=shares,
        scores={label: [s.results().numbers() for s in row] for label, row in scores.items()},
    )
    progress.console.print(results.table())
    return results
