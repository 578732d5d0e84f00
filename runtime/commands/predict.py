"""`icnet predict`: folders of images in, folders of co-saliency maps and contact sheets out."""

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.backends.opening import OPENVINO_SUFFIX, OTHER_SUFFIXES
from runtime.bank import Bank
from runtime.commands import outputs
from runtime.commands.detector import add_detector_arguments, sism_source, speaking
from runtime.commands.device import add_device_argument, place
from runtime.commands.report import Report
from runtime.commands.results import DETECTOR, GroupResults
from runtime.commands.summary import Summary
from runtime.errors import ICNetError, InputError, ModelError, printable
from runtime.files import bank_files, bundled, model_digest
from runtime.groups import Group, find_groups
from runtime.predictor import BUILTIN, Predictor
from runtime.stream import Task

ENGINES = {
    ".onnx": "ONNX Runtime",
    ".mnn": "MNN",
    OPENVINO_SUFFIX: "OpenVINO",
}  # by a model file's suffix; of others, TensorRT
Following = Callable[..., list[Callable[[], outputs.Fullness | None]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet predict`."""
    parser.add_argument(
        "path", type=Path, help="a folder of images (one group), one image, or a data set with img/GROUP/ folders"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for GROUP/NAME.png maps and GROUP/contact_sheet.jpg"
    )
    outputs.add_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="keep the groups that are finished there and would come out the same"
    )
    parser.add_argument("--report", action="store_true", help="a page to look at and to mail, OUTPUT/report.html")
    parser.add_argument(
        "--keep-sisms",
        action="store_true",
        help="also write the detector's SISMs, GROUP/sisms/NAME.png; later runs use them",
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--pack", action="store_true", help="several groups in one call; takes a model from icnet export --packed"
    )
    several.add_argument("--bank", type=Path, help="compare each image with this bank, from icnet bank, not its group")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `icnet bank` has too."""
    parser.add_argument(
        "-m",
        "--model",
        type=Path,
        help="an exported model, e.g. icnet.onnx; icnet.intra.onnx and icnet.banked.onnx beside it are its bank export "
        "(default: the one that comes with this package, if there is one)",
    )
    parser.add_argument(
        "-s",
        "--sisms",
        metavar="DIR",
        help="folder with a SISM NAME.png per image (a data set: GROUP/NAME.png; default PATH/sism); "
        f"or '{BUILTIN}': OpenCV's static saliency, a weak stand-in. Without SISMs a detector makes them",
    )
    add_detector_arguments(parser.add_argument)
    parser.add_argument("-t", "--threads", type=int, help="CPU threads (default: one per core)")
    add_device_argument(parser.add_argument)


def run(args: argparse.Namespace) -> int:
    """Predict every group at `args.path`; a group that fails is reported and does not stop the others.

    Returns:
        0, or 2 if any group failed.

    Raises:
        ICNetError: nothing could be started.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with speaking(console, "icnet predict"):
        return _run(args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    asked = outputs.chosen(args)
    folder, detector = sism_source(args.path, args.sisms, args.sism_model)
    if args.keep_sisms and (detector is None or detector == BUILTIN):
        raise InputError("--keep-sisms keeps the SISMs of a detector: name its file with --sism-model")
    groups = find_groups(args.path, folder)
    bank = None if args.bank is None else Bank.load(args.bank)
    summary = Summary(groups, asked)
    with open_predictor(args, detector, banks_only=bank is not None) as predictor:
        work = Work(args, predictor, asked)
        facts = [model_of(args).name, engine_of(model_of(args)), args.device or "cpu"]
        report = Report(args.output, facts) if args.report else None
        in_work: deque[int] = deque()  # the numbers of the groups whose outcomes are to come

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(groups))

            def tasks() -> Iterator[Task[outputs.Fullness | None] | ICNetError]:
                for number, group in enumerate(groups):
                    progress.update(bar, description=escape(group.name))
                    try:
                        results = work.results(group)
                        if args.resume and results.finished():
                            if report is not None:
                                report.add_finished(number, group, results.folder)
                            summary.finished += 1
                            progress.advance(bar)
                            continue
                        task = work.begin(
                            group, results, None if report is None else partial(report.following, number, group)
                        )
                    except ICNetError as error:
                        in_work.append(number)
                        yield error
                    else:
                        in_work.append(number)
                        yield task

            for outcome in predictor.pipeline.stream(tasks(), bank=bank, pack=args.pack):
                number = in_work.popleft()
                if isinstance(outcome, ICNetError):
                    summary.failed += 1
                    if report is not None:
                        report.add_failed(number, groups[number].name, outcome)
                    console.print(f"icnet predict: error: {outcome}", style="red", markup=False)
                else:
                    summary.add(outcome)
                progress.advance(bar)
        card = predictor.card
    if summary.failed and len(groups) > 1:
        console.print(f"{summary.failed} of {len(groups)} groups failed; mend them and go on with --resume")
    if summary.failed < len(groups):
        for line in summary.lines(args.output, model_of(args), card):
            print(printable(line))
    if report is not None:
        print(printable(f"report: {report.write()}"))
    return 2 if summary.failed else 0


def engine_of(model: Path) -> str:
    """What runs a model's file."""
    return ENGINES.get(model.suffix.lower(), "TensorRT")


class Work:
    """What is done for every group of a run: the models compute its maps, and its files are written.

    Args:
        args: with the options of `add_model_arguments`, and `output`, `pack`, `bank` and `keep_sisms`.
        predictor: from `open_predictor`.
        asked: what is written.

    Raises:
        InputError: --pack, and the model is not packed.
    """

    def __init__(self, args: argparse.Namespace, predictor: Predictor, asked: outputs.Outputs) -> None:
        if args.pack and not predictor.packed:
            raise InputError(
                f"{predictor.path}: takes one group at a time; --pack takes a model from icnet export --packed"
            )
        self._args, self._predictor, self._asked = args, predictor, asked
        banked = args.bank is not None
        used = model_files(model_of(args), banks_only=banked) | ({"bank": args.bank} if banked else {})
        self._models = {role: (path, model_digest(path)) for role, path in used.items()}
        self._detected, self._with_detector = "", self._models
        if (detector := predictor.detector) is not None:
            self._detected = detector.settings
            self._with_detector = self._models | {DETECTOR: (detector.path, model_digest(detector.path))}

    def results(self, group: Group) -> GroupResults:
        """The results of a group, of which some may be there already.

        Raises:
            InputError: the group can't be used.
        """
        if group.problem is not None:
            raise group.problem
        models, detected = (self._models, "") if group.sisms else (self._with_detector, self._detected)
        folder = self._args.output / group.name
        return GroupResults(folder, group, models, self._asked, detected, self._args.keep_sisms)

    def begin(
        self, group: Group, results: GroupResults, following: Following | None = None
    ) -> Task[outputs.Fullness | None]:
        """Clear the way for a group's results: its task.

        Args:
            group: the group.
            results: from `results`.
            following: takes what follows on its maps, and the maps, and adds to it; as `Report.following`.

        Raises:
            ICNetError: as `Pipeline.reads` and `GroupResults.begin`.
        """
        follow = partial(outputs.writes, group, results.write, self._asked)
        task = Task(
            self._predictor.pipeline.reads(
                group.images, group.sisms or results.kept_sisms or None, kept=self._args.bank is not None
            ),
            follow if following is None else partial(following, follow),
            results.keep_sism if self._args.keep_sisms else None,
        )
        results.begin()
        return task


def model_of(args: argparse.Namespace) -> Path:
    """The file that --model names, or the model that comes with this package.

    Raises:
        InputError: there is neither.
    """
    model: Path | None = args.model or bundled("icnet.onnx")
    if model is None:
        raise InputError("no model: name one with --model, e.g. icnet.onnx from icnet export")
    return model


def open_predictor(args: argparse.Namespace, detector: str | Path | None, banks_only: bool) -> Predictor:
    """The Predictor of --model and of the bank export beside it, if there is one.

    Args:
        args: with the options of `add_model_arguments`. --model may be the name that a bank export was given, which
            has no file of that name.
        detector: what makes the SISMs, as `sism_source` has it.
        banks_only: leave the model itself out.

    Raises:
        InputError: the files don't run on the device.
        ModelError: no such files, or they can't be used.
    """
    files = model_files(model_of(args), banks_only)
    banks = (files["intra"], files["banked"]) if "banked" in files else None
    model = model_of(args)
    suffixes = (model.suffix.lower(), "" if detector is None else Path(detector).suffix.lower())
    beside = detector in (None, BUILTIN) or suffixes[0] == OPENVINO_SUFFIX or suffixes[1] in OTHER_SUFFIXES
    return Predictor(
        files.get("model"),
        bank_export=banks,
        threads=args.threads,
        sism_model=detector,
        sism_normalise=args.sism_normalise,
        sism_minmax=args.sism_minmax,
        **place(args.device, model if beside else Path(detector or "")),
    )


def model_files(model: Path, banks_only: bool) -> dict[str, Path]:
    """The files that `open_predictor` opens, by their roles: "model"; "intra" and "banked" of a bank export.

    Raises:
        ModelError: `banks_only`, and a file of the bank export is missing.
    """
    banks = dict(zip(("intra", "banked"), bank_files(model), strict=True))
    missing = [file for file in banks.values() if not file.exists()]
    if banks_only and missing:
        raise ModelError(f"{missing[0]}: no such file; make it with icnet export --banked --output {model}")
    plain = {} if banks_only or (not model.exists() and not missing) else {"model": model}
    return plain | ({} if missing else banks)
