"""`icnet evaluate`: how accurate are the maps of models, or ready maps, on data sets with ground truths?

The scores are MAE, max F-measure, S-measure and max E-measure (metrics.py), with the SISMs as the baseline. Maps are
scored with 8 bits, at the size of their image, as `icnet predict` writes them. With --corrupt-sisms or --bank-sizes,
groups made by cut and paste take the place of data sets. With --reference, models are compared with one of them, on
photographs without ground truths (agreement.py).
"""

import argparse
import datetime
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from evaluation import agreement, bank_sizes, corrupted_sisms
from evaluation.dataset import BUILTIN, Dataset, Maps, evaluate, find_dataset
from evaluation.metrics import BETA2, TITLES, Metrics
from evaluation.record import SISMS, labels, recording, versions
from evaluation.report import EvaluationReport
from runtime import DependencyError, InputError, Predictor
from runtime.commands.detector import add_detector_arguments, sism_source, speaking
from runtime.commands.device import add_device_argument, place
from runtime.commands.options import number, share
from runtime.commands.predict import engine_of
from runtime.commands.report import REPORT
from runtime.detector import Detector
from runtime.errors import how_to_install, printable
from runtime.files import bank_files, bundled, check_outputs, digest, same_file, write_picture
from training.groups import add_group_arguments, add_material_arguments

PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")  # scores depend on them
PLOTS = {".png", ".pdf", ".svg"}
PICTURES = {".jpg", ".jpeg", ".png"}
USAGE = """icnet evaluate DATA [DATA ...] [--models MODEL [MODEL ...]] [options]
       icnet evaluate PHOTOS [PHOTOS ...] --models MODEL [MODEL ...] --reference MODEL [options]
       icnet evaluate --corrupt-sisms [SHARE ...] --cutouts DIR --backgrounds DIR --models MODEL [MODEL ...] [options]
       icnet evaluate --bank-sizes [N ...] --cutouts DIR --backgrounds DIR --models NAME.onnx [options]"""


@dataclass(frozen=True)
class MapScores:
    """The scores of the SISMs, of a folder of maps, or of a model, which has a SHA-256; see `Metrics`."""

    name: str
    path: str
    sha256: str | None
    mae: float
    max_f: float
    s: float
    max_e: float
    precision: list[float]
    recall: list[float]


@dataclass(frozen=True)
class DatasetScores:
    """All scores on one data set."""

    name: str
    path: str
    groups: int
    images: int
    empty_ground_truths: int
    maps: list[MapScores]

    def table(self) -> Table:
        """The scores, for a terminal."""
        empty = self.empty_ground_truths
        grid = Table(
            title=f"{escape(self.name)}: {self.groups} groups, {self.images} images",
            caption=f"ground truths without foreground, which count for MAE only: {empty}" if empty else None,
        )
        grid.add_column("maps", overflow="fold")
        for title in TITLES.values():
            grid.add_column(title, justify="right", no_wrap=True)
        for row in self.maps:
            grid.add_row(escape(row.name), *(f"{getattr(row, key):.4f}" for key in TITLES))
        return grid


@dataclass(frozen=True)
class Results:
    """The scores on data sets."""

    beta2: float
    datasets: list[DatasetScores]

    def draw(self, path: Path) -> None:
        """Precision over recall: a panel per data set, a line per model, the SISMs dashed."""
        from matplotlib.figure import Figure

        count = len(self.datasets)
        figure = Figure(figsize=(5 * count, 4.5), layout="constrained")
        for axes, dataset in zip(np.atleast_1d(figure.subplots(1, count)), self.datasets, strict=True):
            for row in dataset.maps:
                style = {"linestyle": "--", "color": "grey"} if row.name == SISMS else {}
                axes.plot(row.recall, row.precision, **style)
            axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            legend = axes.legend(axes.lines, ["-"] * len(axes.lines), loc="lower left")
            texts = [axes.set_title("-"), *legend.get_texts()]
            for text, name in zip(texts, [dataset.name, *(row.name for row in dataset.maps)], strict=True):
                text.set(text=name, parse_math=False)  # a name may hold a $, or start with the _ that hides a line
        write_picture(path, figure.savefig, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet evaluate`."""
    parser.usage = USAGE
    add = parser.add_argument
    add("data", type=Path, nargs="*", metavar="DATA", help="a data set with img/GROUP/, gt/GROUP/ and sism/GROUP/")
    models = "exported models and engines; on data sets also folders of ready maps GROUP/NAME.png (several data sets: "
    add("-m", "--models", type=Path, nargs="+", default=[], metavar="MODEL", help=f"{models}DATA/GROUP/NAME.png)")
    reference = "compare the other models' maps with this one's, without ground truths; DATA is as for icnet predict"
    add("-r", "--reference", type=Path, metavar="MODEL", help=reference)
    sisms = "folder with GROUP/NAME.png (several data sets: DATA/GROUP/NAME.png); default: sism in each data set; or "
    add("-s", "--sisms", metavar="DIR", help=f"{sisms}'{BUILTIN}': OpenCV's static saliency, a weak stand-in")
    add_detector_arguments(add)
    add("-t", "--threads", type=int, metavar="N", help="CPU threads of a model (default: one per core)")
    add_device_argument(add)
    add("-o", "--output", type=Path, metavar="JSON", help="write the results, with all curves")
    add(
        "--report", type=Path, metavar="DIR", help="pages to look at and to mail, DIR/report.html: the worst maps first"
    )
    add("--plot", type=Path, metavar="PNG", help="draw the curves: precision over recall, or max F and MAE")
    shown = "with --reference: the images that agree least; with --bank-sizes: the largest bank at work on one group"
    add("--picture", type=Path, metavar="JPG", help=shown)
    modes = parser.add_argument_group(
        "groups made by cut and paste, in place of DATA", "needs --cutouts, --backgrounds and --models"
    )
    mode = modes.add_mutually_exclusive_group()
    shares, sizes = (" ".join(map(str, values)) for values in (corrupted_sisms.SHARES, bank_sizes.SIZES))
    wrong = f"score with these shares of the SISMs plainly wrong (default {shares})"
    mode.add_argument("--corrupt-sisms", type=share, nargs="*", metavar="SHARE", help=wrong)
    banks = f"score new images against banks of so many images (default {sizes}); MODEL is NAME.onnx of a bank export"
    mode.add_argument("--bank-sizes", type=number(), nargs="*", metavar="N", help=banks)
    add_material_arguments(modes.add_argument, required=False)
    add_group_arguments(modes.add_argument)
    add = parser.add_argument_group("with --bank-sizes, where --images is not used").add_argument
    add("--new", type=number(), default=10, metavar="N", help="new images per group (default 10)")
    add("--show", metavar="CLASS", help="the class in the picture (default: that of the first group)")


def run(args: argparse.Namespace) -> int:
    """Score every model on every data set, or on groups made by cut and paste; print tables, and write the results.

    Raises:
        ICNetError: something is missing, can't be read or does not match. No image is ever left out of a mean.
        OutputError: the results can't be written.
    """
    _check_options(args)
    _check_paths(args)
    datasets = _find_datasets(args)
    named = len(args.data) > 1 or len(args.models) > 1
    runs = [f"{path.name}, {engine_of(path)}, {args.device or 'cpu'}" for path in args.models if path.is_file()]
    report = EvaluationReport(args.report, runs, named) if args.report else None
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": versions(PACKAGES)}
    results: Results | corrupted_sisms.Results | bank_sizes.Results
    picture: Image.Image
    others: dict[Path, Callable[[Path], object]] = {}
    if args.plot:
        others[args.plot] = lambda path: results.draw(path)
    if args.picture:
        others[args.picture] = lambda path: write_picture(path, picture.save, quality=90)
    with recording(record, args.output, inputs=_inputs(datasets, args), others=others) as progress:
        if args.reference is not None:
            agreed, picture = measure_agreement(datasets, args, progress)
            record |= asdict(agreed)
            return 0
        if args.corrupt_sisms is not None:
            results = corrupted_sisms.measure(args, progress)
        elif args.bank_sizes is not None:
            results, picture = bank_sizes.measure(args, progress)
        else:
            results = measure(datasets, args, progress, report)
        record |= asdict(results)
        page = report.write() if report is not None else None
    if page is not None:
        print(printable(f"report: {page}"))
    return 0


def measure(
    datasets: list[Dataset], args: argparse.Namespace, progress: Progress, report: EvaluationReport | None = None
) -> Results:
    """Score the SISMs and every model on every data set, print a table of each, and add the maps to the report."""
    for dataset in datasets:
        for _ in progress.track(dataset.check(), len(dataset.groups), description=f"reading {escape(dataset.name)}"):
            pass
    results = Results(BETA2, [])

    def one(dataset: Dataset, detector: Detector | None) -> None:
        results.datasets.append(_measure_one(dataset, detector, args, progress, report))
        progress.console.print(results.datasets[-1].table())

    _with_sisms(datasets, args, progress, one)
    return results


def measure_agreement(
    datasets: list[Dataset], args: argparse.Namespace, progress: Progress
) -> tuple[agreement.Results, Image.Image]:
    """Compare every model with the reference on every data set, and print a line for each; with the sheet."""
    models = _models(args)
    names = labels(models)
    files = {name: {"path": str(path), "sha256": digest(path)} for name, path in zip(names, models, strict=True)}
    opens = {name: partial(_predictor, path, args) for name, path in zip(names, models, strict=True)}
    results = agreement.Results(names[0], files, [])
    shown: list[agreement.Shown] = []

    def one(dataset: Dataset, _: Detector | None) -> None:
        found, worst = agreement.compare(dataset, opens, progress)
        results.datasets.append(found)
        shown.extend(worst)
        for row in found.models[1:]:
            which = f"{found.images} images of {found.name}"
            for line in filter(None, (row.describe(found.models[0], which), row.warning(found.models[0]))):
                progress.console.print(line, markup=False, soft_wrap=True, highlight=False)

    _with_sisms(datasets, args, progress, one)
    return results, agreement.picture(shown, names[0])


def _with_sisms(
    datasets: list[Dataset],
    args: argparse.Namespace,
    progress: Progress,
    one: Callable[[Dataset, Detector | None], None],
) -> None:
    """Call `one` for every data set and what made its SISMs; a detector makes those that are to come from it."""
    with ExitStack() as opened:
        detector: Detector | None = None
        if (path := _detector_file(datasets, args)) is not None:
            opened.enter_context(speaking(progress.console, "icnet evaluate"))
            options = {"normalise": args.sism_normalise, "minmax": args.sism_minmax}
            detector = Detector(path, args.threads, **place(args.device, path), **options)
            opened.callback(detector.close)
        for dataset in datasets:
            if detector is None or dataset.sisms is not None:
                one(dataset, None)
                continue
            with TemporaryDirectory() as folder:  # every model gets the SISMs that are scored
                text = f"{escape(dataset.name)}, detector"
                steps = dataset.detect(detector, Path(folder))
                for _ in progress.track(steps, len(dataset.groups), description=text):
                    pass
                one(dataset.with_sisms(Path(folder)), detector)


def _detector_file(datasets: list[Dataset], args: argparse.Namespace) -> Path | None:
    """The detector's file, if one is named, or --reference needs the one that comes with this package."""
    if args.sism_model not in (None, BUILTIN):
        return Path(args.sism_model)
    needed = args.reference is not None and any(dataset.sisms is None for dataset in datasets)
    return bundled("detector.onnx") if needed else None


def _predictor(model: Path, args: argparse.Namespace) -> Predictor:
    return Predictor(model, threads=args.threads, **place(args.device, model))


def _measure_one(
    dataset: Dataset,
    detector: Detector | None,
    args: argparse.Namespace,
    progress: Progress,
    report: EvaluationReport | None,
) -> DatasetScores:
    """Score the SISMs, which are the detector's if there is one, and every model. The report has the models' maps."""
    rows: list[MapScores] = []
    metrics: dict[str, Metrics] = {}
    empty = 0

    def score(label: str, source: str, maps: Iterable[Maps], sha256: str | None = None) -> None:
        nonlocal empty
        text = f"{escape(dataset.name)}, {escape(label)}"
        shown = report if label != SISMS or not args.models else None
        follow = partial(shown.add, dataset, label) if shown is not None else None
        found = evaluate(dataset, progress.track(maps, len(dataset.groups), description=text), follow)
        metrics[label], empty = found, found.empty
        curves = found.precision.tolist(), found.recall.tolist()
        rows.append(MapScores(label, source, sha256, found.mae, found.max_f, found.s, found.max_e, *curves))

    if dataset.sisms is not None:
        made_by = (str(dataset.sisms), None) if detector is None else (str(detector.path), digest(detector.path))
        score(SISMS, made_by[0], dataset.read(sisms for _, sisms in dataset.inputs()), made_by[1])
    for label, model in zip(labels(args.models), args.models, strict=True):
        if model.is_dir():
            score(label, str(model), dataset.read(dataset.maps_in(_folder_of(dataset.path, model, args))))
        else:
            with _predictor(model, args) as predictor:
                score(label, str(model), predictor.predict_groups(dataset.inputs()), digest(model))
    if report is not None:
        report.finish(dataset.name, metrics)
    return DatasetScores(dataset.name, str(dataset.path), len(dataset.groups), dataset.images, empty, rows)


def _find_datasets(args: argparse.Namespace) -> list[Dataset]:
    if args.reference is not None:
        return [find_dataset(path, _sisms_of_photographs(path, args), scored=False) for path in args.data]
    datasets = [find_dataset(path, _sisms(path, args)) for path in args.data]
    for dataset in datasets:
        for model in args.models:
            if model.is_dir():  # name a missing map now rather than when its turn comes
                dataset.maps_in(_folder_of(dataset.path, model, args))
    return datasets


def _sisms(path: Path, args: argparse.Namespace) -> Path | str | None:
    """Where the SISMs of a data set are; None if there are none and nothing needs them."""
    if BUILTIN in (args.sisms, args.sism_model):
        return BUILTIN
    if args.sism_model is not None:
        return None
    if args.sisms is not None:
        return _folder_of(path, Path(args.sisms), args)
    if (path / "sism").is_dir():
        return path / "sism"
    if not path.is_dir() or (args.models and all(model.is_dir() for model in args.models)):
        return None
    raise InputError(
        f"{path}: no SISMs: name their folder with --sisms DIR, or a detector with --sism-model FILE, or take --sisms "
        f"{BUILTIN}"
    )


def _sisms_of_photographs(path: Path, args: argparse.Namespace) -> Path | str | None:
    """Where SISMs are, as for `icnet predict`; None if a detector makes them."""
    named = args.sisms if args.sisms in (None, BUILTIN) else str(_folder_of(path, Path(args.sisms), args))
    folder, maker = sism_source(path, named, args.sism_model)
    return folder or (BUILTIN if maker == BUILTIN else None)


def _folder_of(path: Path, folder: Path, args: argparse.Namespace) -> Path:
    """The part of a folder of maps or SISMs that belongs to a data set."""
    part = folder / path.absolute().name
    return part if len(args.data) > 1 or part.is_dir() else folder


def _check_options(args: argparse.Namespace) -> None:
    made = args.corrupt_sisms is not None or args.bank_sizes is not None
    if made == bool(args.data):
        raise InputError("give either DATA, or --corrupt-sisms or --bank-sizes with --cutouts and --backgrounds")
    if made and not (args.cutouts and args.backgrounds and args.models):
        raise InputError("--corrupt-sisms and --bank-sizes need --cutouts, --backgrounds and --models")
    if made and (args.sisms or args.sism_model):
        raise InputError("--sisms and --sism-model are of data sets; groups made by cut and paste have their own SISMs")
    if args.sisms and args.sism_model:
        raise InputError("--sisms and --sism-model: give one, the SISMs or the detector that makes them")
    if not args.sism_model and (args.sism_normalise is not None or args.sism_minmax is not None):
        raise InputError("--sism-normalise and --sism-minmax are for a detector: name its file with --sism-model")
    if not made and (args.cutouts or args.backgrounds):
        raise InputError("--cutouts and --backgrounds go with --corrupt-sisms or --bank-sizes, not with DATA")
    if made and args.report:
        raise InputError("--report shows the maps of data sets: give DATA")
    if args.reference is not None and (made or args.plot or args.report):
        raise InputError("--reference compares models on DATA, without curves: no cut and paste, --plot or --report")
    if args.bank_sizes is None and (args.show or (args.picture and args.reference is None)):
        raise InputError("--picture goes with --bank-sizes or --reference, --show with --bank-sizes")
    if args.bank_sizes is not None and len(args.models) > 1:
        raise InputError("--bank-sizes takes one model: a bank export")


def _models(args: argparse.Namespace) -> list[Path]:
    """The files and folders that --models stands for."""
    if args.reference is not None:  # the reference first, whether it is named among the others or not
        return [args.reference, *(model for model in args.models if not same_file(model, args.reference))]
    return args.models if args.bank_sizes is None else [*bank_files(args.models[0])]


def _inputs(datasets: list[Dataset], args: argparse.Namespace) -> list[Path | None]:
    """Everything that is read."""
    sisms = [Path(dataset.sisms) for dataset in datasets if dataset.sisms is not None]
    sisms += [] if args.sism_model in (None, BUILTIN) else [Path(args.sism_model)]
    kinds = ("img", "gt") if args.reference is None else ("",)
    folders = [dataset.path / kind for dataset in datasets for kind in kinds]
    return [*_models(args), *folders, *sisms, args.cutouts, args.backgrounds]


def _check_paths(args: argparse.Namespace) -> None:
    model = "model file or folder of maps" if args.data else "model file"
    for what, paths in ((model, _models(args)), ("data set", args.data)):
        for path in paths:
            if not path.exists():
                raise InputError(f"{path}: no such {what}")
        for one, other in combinations(paths, 2):
            if same_file(one, other):
                raise InputError(f"{other}: the same {what.split(' file')[0]} twice; name each once")
    if args.reference is not None:
        if folders := [model for model in _models(args) if model.is_dir()]:
            raise InputError(f"{folders[0]}: a folder of maps; --reference compares model files")
        if len(_models(args)) < 2:
            raise InputError("--reference: name the models to compare with it with --models")
    outputs = {"--output": args.output, "--plot": args.plot, "--picture": args.picture}
    named = {option: path for option, path in outputs.items() if path}
    for option, suffixes in {"--plot": PLOTS, "--picture": PICTURES}.items():
        if option in named and named[option].suffix.lower() not in suffixes:
            raise InputError(f"{named[option]}: {option} writes {', '.join(sorted(suffixes))}")
    pages = args.report / REPORT if args.report else None
    check_outputs([*outputs.values(), pages], _models(args))
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise DependencyError(f"--plot needs matplotlib: {how_to_install('evaluate')}") from error
