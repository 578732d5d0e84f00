"""python calibration/calibrate.py: an exported model to INT8, calibrated on groups of images.

The output is an ONNX file with explicit Q/DQ (see graph.py) for one engine: ONNX Runtime runs it on a CPU, OpenVINO and
TensorRT build theirs from it. Layers that are not INT8 keep the precision of the calibrated model.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet calibrate`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["calibrate", *sys.argv[1:]]))

import argparse
import importlib.util
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import onnx
import onnxruntime
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calibration.graph import ENGINES, ExportedModel, int8_share
from calibration.groups import CalibrationSet, Feeds, open_groups
from calibration.ranges import METHODS, PERCENTILE, Ranges, collect, read_cache, write_cache
from calibration.sensitivity import (
    CURVE,
    PrecisionPlan,
    draw,
    opened,
    read_precision_plan,
    record,
    scorer,
    search,
    table,
)
from evaluation.agreement import DatasetAgreement, compare
from evaluation.dataset import Dataset, find_dataset
from evaluation.metrics import Metrics
from evaluation.record import labels
from export.onnx_file import save_model
from runtime import __version__
from runtime.commands.detector import BUILTIN, sism_folder
from runtime.contract import CALIBRATED_FOR
from runtime.errors import DependencyError, InputError, how_to_install
from runtime.files import check_outputs, digest, replacing, same_file, write_json
from runtime.predictor import MAX_THREADS

ENOUGH = 8  # groups; see the table in docs/int8.md
DEFAULT_METHOD = "entropy"
NOT_REACHED = 1  # exit code: a model was written, but its accuracy drops by more than --max-drop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet calibrate`."""
    add = parser.add_argument
    add("--onnx", type=Path, required=True, help="an export with uint8 inputs, FP32 or FP16")
    add("--groups", type=Path, required=True, help="a folder of images (one group), or a data set with img/GROUP/")
    add("-s", "--sisms", metavar="DIR", help=f"as for icnet predict (default GROUPS/sism), or '{BUILTIN}'")
    add("-o", "--output", type=Path, required=True, help="the .onnx file to write")
    add("--engine", choices=ENGINES, help="what the file is for (default: onnxruntime; tensorrt for an FP16 export)")
    add("--method", choices=METHODS, default=DEFAULT_METHOD, help=f"where to cut ranges off (default {DEFAULT_METHOD})")
    add("--percentile", type=float, default=PERCENTILE, help=f"of --method percentile (default {PERCENTILE})")
    add("--rest", choices=("fp32", "fp16"), help="precision of the other layers, which must be the model's")
    add("--max-drop", type=float, help="how much S-measure and max F may drop on --validation; searches layer by layer")
    other = "other images, to compare the maps with the export's; for --max-drop a data set with img/, gt/ and sism/"
    add("--validation", type=Path, metavar="DATA", help=other)
    add("--precision-plan", type=Path, metavar="JSON", help="apply a plan that --max-drop wrote, without searching")
    add("--plot", type=Path, metavar="PNG", help="of --max-drop: draw accuracy against the share of int8 operations")
    add("--cache", type=Path, metavar="JSON", help="ranges, reused if model, groups and method are the same")
    add("--skip-bad", action="store_true", help="leave out groups with files that can't be read")
    add("-t", "--threads", type=int, help="CPU threads (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Calibrate `args.onnx` on `args.groups`.

    Returns:
        0; or 1 if every model drops by more than `args.max_drop`, and the best one was written.

    Raises:
        InputError: options that don't go together, or groups that can't be used.
        ModelError: the model can't be read, is quantised already or not an export of ours, or fails.
        OutputError: a file can't be written.
    """
    _check(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    model = ExportedModel(args.onnx, args.engine)
    if args.rest not in (None, model.precision):
        raise InputError(
            f"{args.onnx}: is {model.precision}, so what is not int8 can't be {args.rest}: calibrate an export with "
            f"--precision {args.rest} (only the exporter can scale activations to fit FP16)"
        )
    there = model.engine == "openvino" and importlib.util.find_spec("openvino") is not None
    engine = "openvino" if there else "onnxruntime"  # that runs the file here
    if model.engine == "openvino" and args.max_drop is not None and not there:
        raise DependencyError(
            f"--max-drop: openvino, which measures it, is not installed: {how_to_install('openvino')}"
        )
    int8 = [layer.name for layer in model.candidates]
    if args.precision_plan:
        kept = read_precision_plan(args.precision_plan, model)
        int8 = [name for name in int8 if name not in kept]
    validation: Dataset | None = None
    if args.validation is not None:
        sisms = sism_folder(args.validation, BUILTIN if args.sisms == BUILTIN else None) or BUILTIN
        validation = find_dataset(args.validation, sisms, scored=args.max_drop is not None)
    with ExitStack() as files:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        progress = files.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        output = files.enter_context(replacing(args.output))
        groups = open_groups(
            args.groups,
            sism_folder(args.groups, args.sisms),
            args.skip_bad,
            lambda found: iter(progress.track(found, description="reading")),
        )
        for line in groups.skipped:
            console.print(f"icnet calibrate: {line}", markup=False)
        if len(groups.groups) < ENOUGH:
            console.print(
                f"icnet calibrate: warning: {len(groups.groups)} groups to calibrate on; {ENOUGH} are enough, and with "
                "fewer the ranges may not cover what comes later",
                markup=False,
            )
        ranges = _ranges(args, model, groups, progress)
        plan: PrecisionPlan | None = None
        if args.max_drop is not None and validation is not None:
            if model.engine == "tensorrt":
                console.print("icnet calibrate: --max-drop is measured by ONNX Runtime on the CPU, for TensorRT too")
            score, steps = scorer(validation, args.threads, engine), len(int8) + 2 + len(CURVE)
            bar = progress.add_task("searching", total=steps)

            def tracked(candidate: Path | onnx.ModelProto, what: str) -> Metrics:
                progress.update(bar, description=what)
                metrics = score(candidate, what)
                progress.advance(bar)
                return metrics

            plan = search(model, ranges, args.max_drop, tracked)
            int8 = [name for name in int8 if name not in plan.found.float_layers]
        quantised = model.quantised(ranges, int8)
        share = int8_share(quantised)
        agreement = _agreement(args, quantised, engine, validation or groups, progress)
        _describe(quantised, args, model, groups, int8, share)
        save_model(quantised, output)
        if plan is not None:
            _write_plan(args, model, plan, files)
    code = _report(args, model, plan, share)
    which = f"{agreement.images} images{'' if validation else ', which it was calibrated on'}"
    print(f"{agreement.models[1].describe(agreement.models[0], which)}; run by {engine}")
    if warning := agreement.models[1].warning(agreement.models[0]):
        console.print(f"icnet calibrate: {warning}", markup=False)
    return code


def _agreement(
    args: argparse.Namespace,
    quantised: onnx.ModelProto,
    engine: str,
    images: Dataset | CalibrationSet,
    progress: Progress,
) -> DatasetAgreement:
    """How the maps of the file agree with the export's."""
    if isinstance(images, CalibrationSet):
        images = Dataset(args.groups, sism_folder(args.groups, args.sisms) or BUILTIN, images.groups, ())
    reference, name = labels([args.onnx, args.output])
    models = {
        reference: partial(opened, args.onnx, args.threads, "onnxruntime"),
        name: partial(opened, quantised, args.threads, engine),
    }
    return compare(images, models, progress)[0]


def _ranges(args: argparse.Namespace, model: ExportedModel, groups: CalibrationSet, progress: Progress) -> Ranges:
    """The ranges of all tensors, from the cache if it has them."""
    tensors = model.tensors()
    key = {"model": digest(args.onnx), "data": groups.sha256, "method": _method(args)}
    if args.cache:
        cached, reason = read_cache(args.cache, key)
        if cached is not None and {*tensors} <= {*cached}:
            print(f"{args.cache}: ranges reused: same model, groups and method")
            return cached
        print(f"{args.cache}: calibrating anew: {reason or 'it lacks tensors'}")

    def passes(what: str) -> Iterable[Feeds]:
        return progress.track(groups.feeds(), len(groups.groups), description=what)

    ranges = collect(args.onnx, model.model, tensors, passes, args.method, args.percentile, args.threads)
    if args.cache:
        write_cache(args.cache, key, ranges)
    return ranges


def _method(args: argparse.Namespace) -> str:
    return f"percentile {args.percentile:g}" if args.method == "percentile" else str(args.method)


def _describe(
    quantised: onnx.ModelProto,
    args: argparse.Namespace,
    model: ExportedModel,
    groups: CalibrationSet,
    int8: Collection[str],
    share: float,
) -> None:
    """Note in the file what it was made from."""
    notes = {p.key: p.value for p in quantised.metadata_props}
    kept = [layer.name for layer in model.candidates if layer.name not in int8]
    notes |= {
        "producer": f"icnet-deploy {__version__}",
        "precision": "int8",
        CALIBRATED_FOR: model.engine,
        "rest": model.precision,
        "source": args.onnx.name,
        "source_sha256": digest(args.onnx),
        "calibration_method": _method(args),
        "calibration_groups": str(len(groups.groups)),
        "calibration_images": str(groups.images),
        "calibration_sha256": groups.sha256,
        "int8_share": f"{share:.4f}",
        "float_layers": " ".join(kept),
        "opset": str(quantised.opset_import[0].version),
        "onnxruntime": onnxruntime.__version__,
    }
    onnx.helper.set_model_props(quantised, notes)


def _write_plan(args: argparse.Namespace, model: ExportedModel, plan: PrecisionPlan, files: ExitStack) -> None:
    content: dict[str, Any] = {
        "producer": f"icnet-deploy {__version__}",
        "model": args.onnx.name,
        "model_sha256": digest(args.onnx),
        "method": _method(args),
        "validation": str(args.validation),
        **record(plan, model),
    }
    path = files.enter_context(replacing(_plan_file(args)))
    write_json(path, content)
    if args.plot:
        draw(plan, model, files.enter_context(replacing(args.plot)))


def _plan_file(args: argparse.Namespace) -> Path:
    output: Path = args.output
    return output.with_name(output.name + ".json")


def _report(args: argparse.Namespace, model: ExportedModel, plan: PrecisionPlan | None, share: float) -> int:
    size = args.output.stat().st_size
    if plan is not None:
        Console().print(table(plan, model))
    print(
        f"{args.output}: {size / 1e6:.1f} MB, {size / args.onnx.stat().st_size:.0%} of the {model.precision} export; "
        f"{share:.1%} of the convolutions' operations in int8, {_method(args)}, for {model.engine}"
    )
    if plan is None or plan.reached:
        return 0
    print(
        f"icnet calibrate: error: --max-drop {args.max_drop:g} was not reached: the best model loses "
        f"{plan.found.loss:.4f}, and was written; try another --method or more groups",
        file=sys.stderr,
    )
    return NOT_REACHED


def _check(args: argparse.Namespace) -> None:
    if args.max_drop is not None and args.validation is None:
        raise InputError("--max-drop and --validation go together: the drop is that of the scores on a data set")
    if args.max_drop is not None and args.precision_plan:
        raise InputError("--max-drop makes a precision plan, --precision-plan applies one: give one or the other")
    if args.max_drop is not None and not 0 <= args.max_drop < 1:
        raise InputError(f"--max-drop {args.max_drop:g}: expected 0 to 1, how much S-measure and max F may drop")
    if not 0 < args.percentile <= 100:
        raise InputError(f"--percentile {args.percentile:g}: expected more than 0, at most 100")
    if args.threads is not None and not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--threads {args.threads}: expected 1 to {MAX_THREADS}")
    if args.plot and args.max_drop is None:
        raise InputError("--plot draws what --max-drop found: give both")
    if args.validation and same_file(args.validation, args.groups):
        raise InputError(f"{args.validation}: is what the model is calibrated on; validate on other groups")
    written = [args.output, args.cache, args.plot, _plan_file(args) if args.max_drop is not None else None]
    sisms = None if args.sisms in (None, BUILTIN) else Path(args.sisms)
    check_outputs(written, [args.onnx, args.precision_plan, args.groups, sisms, args.validation])
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise DependencyError(f"--plot needs matplotlib: {how_to_install('calibrate')}") from error
