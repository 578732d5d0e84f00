"""Which layers stay in floating point: what each layer costs in int8, and the fewest to keep for a given drop.

The cost of a layer is the drop of S-measure or max F, whichever is larger, on a data set with ground truths, when that
layer alone is int8. The costliest layers return to floating point, one after the other, until the model with all others
in int8 drops by at most `max_drop`. Then each of them goes back to int8 if the drop stays within that.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.table import Table

from calibration.graph import ExportedModel
from calibration.ranges import Ranges
from evaluation.dataset import Dataset, evaluate
from evaluation.metrics import Metrics
from export.onnx_file import load_model
from runtime.errors import InputError
from runtime.files import write_picture
from runtime.predictor import Predictor

CURVE = (0.25, 0.5, 0.75)  # the plot shows models with at most these shares of int8 operations
LEAST_SHARE = 0.5  # of int8 convolution operations; a search that goes below has failed

Score = Callable[[Path | onnx.ModelProto, str], Metrics]


@dataclass(frozen=True)
class Point:
    """A model with some layers in floating point.

    share: of convolution operations that are int8. s, max_f, max_e, mae: on the validation set. loss: the larger of
    what S and max F lose against the model without int8.
    """

    float_layers: tuple[str, ...]
    share: float
    s: float
    max_f: float
    max_e: float
    mae: float
    loss: float


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of every layer, and the models that led to it.

    found: the chosen model; its loss is at most `max_drop` if `reached`. costs: per layer, the model in which it alone
    is int8. path: the models tried, from all layers in int8 on. curve: models of growing share, with the cheapest
    layers in int8.
    """

    max_drop: float
    reached: bool
    baseline: Point
    found: Point
    costs: dict[str, Point]
    path: tuple[Point, ...]
    curve: tuple[Point, ...]


@contextmanager
def opened(model: Path | onnx.ModelProto, threads: int | None, engine: str) -> Iterator[Predictor]:
    """An ONNX model in a Predictor: run by OpenVINO for "openvino", else by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = model if isinstance(model, Path) else Path(folder) / "icnet.onnx"
        if engine == "openvino":
            from export.to_openvino import convert

            path = Path(folder) / "icnet.xml"
            convert(load_model(model) if isinstance(model, Path) else model, path, path.with_suffix(".bin"))
        elif not isinstance(model, Path):
            onnx.save(model, path)
        with Predictor(path, threads=threads) as predictor:
            yield predictor


def scorer(dataset: Dataset, threads: int | None = None, engine: str = "onnxruntime") -> Score:
    """A function that scores a model on a data set, run as by `opened`."""

    def score(model: Path | onnx.ModelProto, what: str) -> Metrics:
        with opened(model, threads, engine) as predictor:
            return evaluate(dataset, predictor.predict_groups(dataset.inputs()))

    return score


def search(model: ExportedModel, ranges: Ranges, max_drop: float, score: Score) -> PrecisionPlan:
    """Find the fewest layers to keep in floating point.

    Args:
        model: the model.
        ranges: of all its `tensors()`.
        max_drop: how much S-measure and max F may drop, each.
        score: scores a model; its second argument says what the model is.
    """
    names = [layer.name for layer in model.candidates]
    reference = score(model.path, "without int8")

    def point(int8: Collection[str], what: str) -> Point:
        m = score(model.quantised(ranges, int8), what)
        rest = tuple(name for name in names if name not in int8)
        loss = max(reference.s - m.s, reference.max_f - m.max_f)
        return Point(rest, model.share(int8), m.s, m.max_f, m.max_e, m.mae, loss)

    def without(layers: Collection[str]) -> Point:
        return point([name for name in names if name not in layers], f"{len(layers)} layers in floating point")

    baseline = Point(tuple(names), 0, reference.s, reference.max_f, reference.max_e, reference.mae, 0)
    costs = {name: point([name], f"{name} alone") for name in names}
    worst = sorted(names, key=lambda name: -costs[name].loss)
    path = [without(())]
    while path[-1].loss > max_drop and path[-1].share >= LEAST_SHARE and len(path) <= len(worst):
        path.append(without(worst[: len(path)]))
    found = min(path, key=lambda p: p.loss) if path[-1].loss > max_drop or path[-1].share < LEAST_SHARE else path[-1]
    reached = found.loss <= max_drop and found.share >= LEAST_SHARE
    # The last layer is needed: with it in int8 the drop was too large.
    for name in worst[len(found.float_layers) - 2 :: -1] if reached and len(found.float_layers) > 1 else ():
        fewer = without([other for other in found.float_layers if other != name])
        path.append(fewer)
        if fewer.loss <= max_drop:
            found = fewer
    ends = [next((k for k in range(len(names)) if model.share(worst[k:]) <= share), 0) for share in CURVE]
    curve = [without(worst[:k]) for k in ends]
    return PrecisionPlan(max_drop, reached, baseline, found, costs, tuple(path), tuple(curve))


def read_precision_plan(path: Path, model: ExportedModel) -> list[str]:
    """The layers that a plan's file keeps in floating point.

    Raises:
        InputError: not a precision plan, or a plan for a network with other layers.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("not a regular file")
        layers = json.loads(path.read_text(encoding="utf-8"))["float_layers"]
        if not isinstance(layers, list):
            raise TypeError("float_layers is no list")
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a precision plan; icnet calibrate --max-drop writes one") from error
    known = {layer.name for layer in model.candidates}
    if other := {*map(str, layers)} - known:
        raise InputError(f"{path}: a precision plan for another network: {model.path} has no layer {min(other)}")
    return layers


def record(plan: PrecisionPlan, model: ExportedModel) -> dict[str, Any]:
    """The plan as it is written to a file."""
    return {
        "max_drop": plan.max_drop,
        "reached": plan.reached,
        "float_layers": list(plan.found.float_layers),
        "without_int8": asdict(plan.baseline),
        "found": asdict(plan.found),
        "path": [asdict(p) for p in plan.path],
        "curve": [asdict(p) for p in plan.curve],
        "layers": {
            name: {"share": model.share([name]), **{k: v for k, v in asdict(p).items() if k not in HIDDEN}}
            for name, p in plan.costs.items()
        },
    }


HIDDEN = ("float_layers", "share")  # of a layer's own model, where they are known


def table(plan: PrecisionPlan, model: ExportedModel, rows: int = 12) -> Table:
    """The costliest layers and the outcome, for a terminal."""
    grid = Table(title="What layers cost when they alone are int8")
    grid.add_column("layer")
    for column in ("operations", "S ↑", "max F ↑", "loss"):
        grid.add_column(column, justify="right")

    def add(label: str, share: float, p: Point) -> None:
        grid.add_row(label, f"{share:.1%}", f"{p.s:.4f}", f"{p.max_f:.4f}", f"{p.loss:+.4f}")

    add("without int8", 0, plan.baseline)
    ranked: Sequence[str] = sorted(plan.costs, key=lambda name: -plan.costs[name].loss)
    for name in ranked[:rows]:
        add(name, model.share([name]), plan.costs[name])
    if len(ranked) > rows:
        grid.add_row(f"… {len(ranked) - rows} that cost less")
    grid.add_section()
    add("all int8", plan.path[0].share, plan.path[0])
    kept = len(plan.found.float_layers)
    add(f"chosen: {kept} in floating point", plan.found.share, plan.found)
    return grid


def draw(plan: PrecisionPlan, model: ExportedModel, path: Path) -> None:
    """Plot accuracy against the share of int8 operations, and the layers' costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = sorted([plan.baseline, *plan.curve, *plan.path], key=lambda p: p.share)
    for key, label in (("s", "S"), ("max_f", "max F")):
        line = left.plot([100 * p.share for p in points], [getattr(p, key) for p in points], "o-", label=label)
        limit = getattr(plan.baseline, key) - plan.max_drop
        left.axhline(limit, linestyle=":", color=line[0].get_color())
    left.axvline(100 * plan.found.share, color="0.7", zorder=0)
    left.set(xlabel="int8 convolution operations, %", title="accuracy; dotted: max_drop")
    left.legend()
    costs = plan.costs.items()
    right.scatter([100 * model.share([n]) for n, _ in costs], [p.loss for _, p in costs], s=12)
    right.axhline(0, color="0.7", zorder=0)
    right.set(xlabel="a layer's share of the operations, %", title="loss when it alone is int8", xscale="log")
    write_picture(path, figure.savefig, dpi=120)
