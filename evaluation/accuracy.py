"""python evaluation/accuracy.py: how good are the maps of models, or ready maps, on data sets with ground truths?

MAE, max F-measure, S-measure and max E-measure (see metrics.py), with the SISMs as the baseline. Maps are scored with 8
bits, at the size of their image, as `icnet predict` writes them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet evaluate`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))

import argparse
import datetime
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evaluation.dataset import BUILTIN, Dataset, evaluate, find_dataset
from evaluation.metrics import BETA2, Metrics
from evaluation.record import SISMS, labels, versions
from runtime import DependencyError, InputError, OutputError, Predictor
from runtime.errors import how_to_install
from runtime.files import digest, replacing, same_file, write_json

PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")  # scores hang on them
COLUMNS = {"S ↑": "s", "max F ↑": "max_f", "max E ↑": "max_e", "MAE ↓": "mae"}
PLOTS = {".png", ".pdf", ".svg"}

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet evaluate`."""
    parser.add_argument(
        "data", type=Path, nargs="+", metavar="DATA", help="a data set with img/GROUP/, gt/GROUP/ and sism/GROUP/"
    )
    parser.add_argument(
        "--models",
        type=Path,
        nargs="+",
        default=[],
        metavar="MODEL",
        help="exported models, engines, or folders of ready maps GROUP/NAME.png (several data sets: DATA/GROUP/...)",
    )
    parser.add_argument(
        "--sisms",
        metavar="DIR",
        help="folder with GROUP/NAME.png (several data sets: DATA/GROUP/NAME.png); default: sism in each data set; "
        f"or '{BUILTIN}': OpenCV's static saliency, a weak stand-in",
    )
    parser.add_argument("--output", type=Path, help="write the results, with the precision-recall curves, as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the precision-recall curves")
    parser.add_argument("--threads", type=int, help="CPU threads of a model (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Score every model on every data set, print a table of each, and write the results.

    Raises:
        ICNetError: something is missing, can't be read or does not match; no image is ever left out of a mean.
        OutputError: the results can't be written.
    """
    _check_paths(args)
    datasets = [find_dataset(path, _sisms(path, args)) for path in args.data]
    for dataset in datasets:
        for model in args.models:
            if model.is_dir():  # name a missing map now rather than when its turn comes
                dataset.maps_in(_folder_of(dataset.path, model, args))
    console = Console()
    with ExitStack() as outputs:
        output, plot = (outputs.enter_context(replacing(p)) if p else None for p in (args.output, args.plot))
        results: Results = {
            "date": datetime.date.today().isoformat(),
            "versions": versions(PACKAGES),
            "beta2": BETA2,
            "datasets": [],
        }
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for dataset in datasets:
                for _ in progress.track(dataset.check(), len(dataset.groups), description=f"reading {_text(dataset)}"):
                    pass
            for dataset in datasets:
                results["datasets"].append(measure(dataset, args, progress))
                console.print(table(results["datasets"][-1]))
        if output:
            write_json(output, results)
        if plot:
            draw(results, plot)
    return 0


def measure(dataset: Dataset, args: argparse.Namespace, progress: Progress) -> Results:
    """The scores of the SISMs and of every model on one data set."""

    def score(label: str, maps: Any) -> Metrics:
        text = f"{_text(dataset)}, {escape(label)}"
        return evaluate(dataset, progress.track(maps, len(dataset.groups), description=text))

    rows = []
    if dataset.sisms is not None:
        sisms = dataset.read(sisms for _, sisms in dataset.inputs())
        rows.append(_row(SISMS, str(dataset.sisms), None, score(SISMS, sisms)))
    for label, model in zip(labels(args.models), args.models, strict=True):
        if model.is_dir():
            maps = dataset.read(dataset.maps_in(_folder_of(dataset.path, model, args)))
            rows.append(_row(label, str(model), None, score(label, maps)))
        else:
            with Predictor(model, threads=args.threads) as predictor:
                sha256 = digest(model)
                found = score(label, predictor.predict_groups(dataset.inputs()))
                rows.append(_row(label, str(model), sha256, found))
    return {
        "name": dataset.name,
        "path": str(dataset.path),
        "groups": len(dataset.groups),
        "images": dataset.images,
        "empty_ground_truths": rows[0]["empty"],
        "maps": [{key: value for key, value in row.items() if key not in ("images", "empty")} for row in rows],
    }


def table(dataset: Results) -> Table:
    """The results of one data set, for a terminal."""
    empty = dataset["empty_ground_truths"]
    grid = Table(
        title=f"{escape(dataset['name'])}: {dataset['groups']} groups, {dataset['images']} images",
        caption=f"ground truths without foreground, which count for MAE only: {empty}" if empty else None,
    )
    grid.add_column("maps", overflow="fold")
    for column in COLUMNS:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in dataset["maps"]:
        grid.add_row(escape(row["name"]), *(f"{row[key]:.4f}" for key in COLUMNS.values()))
    return grid


def draw(results: Results, path: Path) -> None:
    """Precision over recall: a panel per data set, a line per model, the SISMs dashed."""
    from matplotlib.figure import Figure

    datasets = results["datasets"]
    figure = Figure(figsize=(5 * len(datasets), 4.5), layout="constrained")
    for axes, dataset in zip(np.atleast_1d(figure.subplots(1, len(datasets))), datasets, strict=True):
        for row in dataset["maps"]:
            style = {"linestyle": "--", "color": "grey"} if row["name"] == SISMS else {}
            axes.plot(row["recall"], row["precision"], **style)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        legend = axes.legend(axes.lines, ["-"] * len(axes.lines), loc="lower left")
        texts = [axes.set_title("-"), *legend.get_texts()]
        for text, name in zip(texts, [dataset["name"], *(row["name"] for row in dataset["maps"])], strict=True):
            text.set(text=name, parse_math=False)  # a name may hold a $, or start with the _ that hides a line
    figure.savefig(path, dpi=150)


def _row(label: str, source: str, sha256: str | None, metrics: Metrics) -> Results:
    curves = {"precision": metrics.precision.tolist(), "recall": metrics.recall.tolist()}
    return {"name": label, "path": source, "sha256": sha256, **asdict(metrics), **curves}


def _text(dataset: Dataset) -> str:
    return escape(dataset.name)


def _sisms(path: Path, args: argparse.Namespace) -> Path | str | None:
    """Where the SISMs of a data set are; None if there are none and nothing needs them."""
    if args.sisms == BUILTIN:
        return BUILTIN
    if args.sisms is not None:
        return _folder_of(path, Path(args.sisms), args)
    if (path / "sism").is_dir():
        return path / "sism"
    if not path.is_dir() or (args.models and all(model.is_dir() for model in args.models)):
        return None
    raise InputError(f"{path}: no SISMs: name their folder with --sisms DIR, or take --sisms {BUILTIN}")


def _folder_of(path: Path, folder: Path, args: argparse.Namespace) -> Path:
    """The part of a folder of maps or SISMs that belongs to a data set."""
    part = folder / path.absolute().name
    return part if len(args.data) > 1 or part.is_dir() else folder


def _check_paths(args: argparse.Namespace) -> None:
    for what, paths in (("model", args.models), ("data set", args.data)):
        for path in paths:
            if not path.exists():
                kind = "data set" if what == "data set" else "model file or folder of maps"
                raise InputError(f"{path}: no such {kind}")
        for one, other in combinations(paths, 2):
            if same_file(one, other):
                raise InputError(f"{other}: the same {what} twice; name each once")
    for path in filter(None, (args.output, args.plot)):
        if any(same_file(path, model) for model in args.models):
            raise OutputError(f"{path}: is one of the models; choose another name for the results")
    if args.plot:
        if args.plot.suffix.lower() not in PLOTS:
            raise InputError(f"{args.plot}: --plot writes {', '.join(sorted(PLOTS))}")
        if args.output and same_file(args.output, args.plot):
            raise InputError(f"{args.plot}: --output and --plot are the same file")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise DependencyError(f"--plot needs matplotlib: {how_to_install('evaluate')}") from error
