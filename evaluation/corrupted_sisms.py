"""python evaluation/corrupted_sisms.py: how much do wrong SISMs cost?

ICNet's authors say that a minority of wrong SISMs in a group is tolerated and a majority is not (§4.4). Here groups are
made by cut and paste, of classes that the network need not have seen, and scored with a growing share of their SISMs
corrupted: the images stay the same, and every share corrupts the SISMs of the share before, and more. Beside the models
stand the SISMs themselves, and each model *blind*: with SISMs of 1 everywhere, so that only the images speak.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet robustness`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["robustness", *sys.argv[1:]]))

import argparse
import datetime
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evaluation.accuracy import PACKAGES
from evaluation.metrics import Metrics, Scores
from evaluation.record import SISMS, labels, versions
from runtime import InputError, Predictor
from runtime.files import digest, replacing, write_json
from training.paste import CutPaste

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
BLIND = "SISM = 1"
TITLES = {"max_f": "max F ↑", "mae": "MAE ↓"}

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet robustness`."""
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="MODEL", help="exports or engines")
    parser.add_argument("--cutouts", type=Path, required=True, help="folder with CLASS/NAME.png, RGBA")
    parser.add_argument("--backgrounds", type=Path, required=True, help="photographs, in folders of any depth")
    parser.add_argument("--groups", type=int, default=60, help="each of another class, if there are as many")
    parser.add_argument("--images", type=int, default=10, help="per group")
    parser.add_argument("--distractors", type=int, nargs=2, default=(2, 3), metavar=("MIN", "MAX"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw max F and MAE against the share")


def run(args: argparse.Namespace) -> int:
    """Score the models, print a table and write the results.

    Raises:
        InputError: options out of range, or material that can't be used.
        ModelError: a model fails.
        OutputError: the results can't be written.
    """
    if min(args.groups, args.images) < 1 or not 0 <= args.distractors[0] <= args.distractors[1] or args.seed < 0:
        raise InputError("--groups and --images take numbers from 1, --distractors MIN and MAX, --seed from 0")
    with ExitStack() as outputs:
        output, plot = (outputs.enter_context(replacing(p)) if p else None for p in (args.output, args.plot))
        results = measure(args)
        Console().print(table(results))
        if output:
            write_json(output, results)
        if plot:
            draw(results, plot)
    return 0


def measure(args: argparse.Namespace) -> Results:
    """Score everything at every share."""
    maker = CutPaste(args.cutouts, args.backgrounds)
    names = dict(zip(labels(args.models), args.models, strict=True))
    blind = [f"{name}, {BLIND}" for name in names]
    scores = {label: [Scores() for _ in SHARES] for label in (SISMS, *names, *blind)}
    console = Console(stderr=True)
    with (
        ExitStack() as models,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        predictors = {name: models.enter_context(Predictor(path)) for name, path in names.items()}
        for i in progress.track(range(args.groups), description="groups"):
            for k, share in enumerate(SHARES):
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
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(PACKAGES),
        "groups": args.groups,
        "images": args.images,
        "distractors": list(args.distractors),
        "seed": args.seed,
        "models": {name: digest(path) for name, path in names.items()},
        "shares": SHARES,
        "scores": {
            label: [_numbers(s.results()) for s in (row[:1] if label in blind else row)]
            for label, row in scores.items()
        },
    }


def _numbers(metrics: Metrics) -> dict[str, float]:
    return {name: getattr(metrics, name) for name in ("s", "max_f", "max_e", "mae")}


def table(results: Results) -> Table:
    """Max F and MAE at every share, for a terminal."""
    grid = Table(title=f"{results['groups']} groups of {results['images']}, by the share of corrupted SISMs")
    grid.add_column("maps")
    grid.add_column("score")
    for share in results["shares"]:
        grid.add_column(f"{share:.0%}", justify="right")
    for label, row in results["scores"].items():
        for key, name in TITLES.items():
            grid.add_row(label, name, *(f"{scores[key]:.3f}" for scores in row))
    return grid


def draw(results: Results, path: Path) -> None:
    """Max F and MAE against the share, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        for label, row in results["scores"].items():
            values = [s[key] for s in row]
            if len(values) == 1:  # blind: no SISMs to corrupt
                axes.axhline(values[0], linestyle=":", color="0.5", label=label)
            else:
                style = "--" if label == SISMS else "-"
                axes.plot([100 * s for s in results["shares"]], values, style, marker="o", label=label)
        axes.set(xlabel="corrupted SISMs in a group, %", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
