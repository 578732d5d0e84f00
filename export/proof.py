"""Proof that an exported file computes what the paper's network does.

The file is run by ONNX Runtime and compared with the reference, the network as the paper writes it, in FP32. The bound
is a multiple of the precision's noise floor (see `export.noise`).

In FP32 the floor is e(reference), where e(x) = |x - FP64|. The triangle inequality gives |file - reference| ≤ e(file) +
e(reference). A correct file rounds as often as the reference does, so its e is another draw from the distribution of
which the floor is one: expected, |file - reference| ≤ 2 floors. One group alone is no fair draw (with a swap its floor
is 1e-2, without one 1e-6), so both are pooled over all groups. Pooled, |file - reference| of correct files was
0.7 to 2.7 floors in 40 measurements (maximum and mean, 20 networks of random weights), while the mean of wrong formulas
was 200 to 3000 floors away. Hence the bound: twice the triangle's 2. Differences that no 8-bit map can show (a 40th of
a grey level on average, two or three levels in single pixels) pass in any case, because the floor of a network that
happens to have no swap is nearly zero.

An FP16 file is no draw from that distribution: it keeps 11 bits where FP32 keeps 24. The floor is the reference that
rounds to 11 bits against the plain one, beside which the reference's own e is negligible. But the file rounds at more
places than that, so it may be three floors away.

The reference takes one group at a time. A packed file gets two at once, their images mixed; a ragged one gets two
between empty groups; the two files of a bank export get a group in two chunks, with the SIVs of both as the bank. The
maps must be those of the reference, group by group.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from export.icnet import WIDTH_STEPS, ICNet, Uint8Interface
from export.noise import ALLOWED_FLOORS, NEGLIGIBLE_MAX, NEGLIGIBLE_MEAN, reference, variant
from export.onnx_file import cpu_session
from export.samples import Sample, samples
from runtime.contract import ExportKind
from runtime.errors import ModelError


@dataclass(frozen=True)
class Difference:
    """|Δ| of maps in [0, 1] between a file and the reference, and its noise floor, on one group or over all."""

    name: str
    max: float
    mean: float
    floor_max: float
    floor_mean: float


@dataclass(frozen=True)
class Subject:
    """What is proved, in the words of messages and tables, and the differences that pass whatever the floor is."""

    outputs: str
    network: str
    rows: str
    negligible_max: float
    negligible_mean: float


MAPS = Subject("maps", "the paper's network", "group", NEGLIGIBLE_MAX, NEGLIGIBLE_MEAN)

Result = tuple[str, NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]


def pooled(results: Iterable[Result], step: Callable[[], object] = lambda: None) -> list[Difference]:
    """The difference of each result, and last the one over all values of all.

    Args:
        results: a name; what the file computed; what the network did; and what the network did that rounds as the
            file's precision does. The difference of a value that is not finite is infinite.
        step: called after every result.
    """
    found_all, errors, floors = [], [], []
    for name, found, expected, rounded in results:
        error = np.where(np.isfinite(found), np.abs(found - expected), math.inf).ravel()
        floor = np.abs(rounded - expected).ravel()
        found_all.append(_difference(name, error, floor))
        errors.append(error)
        floors.append(floor)
        step()
    return [*found_all, _difference("all", np.concatenate(errors), np.concatenate(floors))]


def compare(
    path: Path,
    network: ICNet,
    kind: ExportKind = ExportKind.PLAIN,
    precision: str = "fp32",
    groups: Sequence[Sample] | None = None,
    step: Callable[[], object] = lambda: None,
    intra: Path | None = None,
) -> list[Difference]:
    """Run a file in ONNX Runtime beside the reference with the network's weights.

    Args:
        path: an ONNX file from `write_onnx`.
        network: the network in FP32 that it was made from.
        kind: as for `write_onnx`.
        precision: "fp32" or "fp16", by which the noise floor is chosen.
        groups: what to compare on; None for `samples()`.
        step: called after every group.
        intra: the intra file, which makes the banks of a banked one.

    Returns:
        One difference per group, and last the one over all images of all groups. The difference
        of a pixel that is not finite is infinite.
    """
    expected_by, rounding = reference(network), variant(network, precision)
    groups = samples() if groups is None else groups

    def results() -> Iterator[Result]:
        for group, maps in zip(groups, _run([path, intra] if intra else [path], groups, kind, precision), strict=True):
            tensors = torch.from_numpy(group.images), torch.from_numpy(group.sisms)
            with torch.inference_mode():
                expected, rounded = expected_by(*tensors).numpy(), rounding(*tensors).numpy()
            yield group.name, maps.reshape(expected.shape), expected, rounded

    return pooled(results(), step)


def _run(
    paths: Sequence[Path], groups: Sequence[Sample], kind: ExportKind, precision: str
) -> Iterator[NDArray[np.float32]]:
    """The files' maps of each group, [N, …]."""
    # An optimised FP16 graph skips roundings on a CPU that a GPU makes, and so hides an overflow.
    sessions = [cpu_session(path, optimised=precision != "fp16") for path in paths]

    def run(session: Any, *tensors: NDArray) -> NDArray[np.float32]:
        names = [tensor.name for tensor in session.get_inputs()]
        return session.run(None, dict(zip(names, tensors, strict=True)))[0]

    if kind in (ExportKind.PACKED, ExportKind.RAGGED):
        for one, other in zip_longest(groups[::2], groups[1::2]):
            both = [one] if other is None else [one, other]
            if kind is ExportKind.RAGGED:
                rgbs = np.concatenate([np.concatenate([g.images, g.sisms[..., None]], -1).ravel() for g in both])
                lengths = [0, *(n for group in both for n in (len(group.images), 0))]
                maps = run(sessions[0], rgbs, np.array([(n, *one.sisms.shape[1:], 4) for n in lengths], np.int32))
                yield from np.split(maps, [len(one.images)])[: len(both)]
                continue
            labels = np.repeat(np.array([7, -3][: len(both)], np.int32), [len(group.images) for group in both])
            order = np.random.default_rng(0).permutation(len(labels))
            images, sisms = (np.concatenate([getattr(group, name) for group in both]) for name in ("images", "sisms"))
            maps = np.empty(sisms.shape, np.float32)
            maps[order] = run(sessions[0], images[order], sisms[order], labels[order])
            yield from np.split(maps, [len(one.images)])[: len(both)]
        return
    normalise = Uint8Interface(ICNet(1 / WIDTH_STEPS)).normalise
    for group in groups:
        tensors: tuple[NDArray, ...] = (group.images, group.sisms)
        if kind is ExportKind.FLOAT32:
            tensors = tuple(t.numpy() for t in normalise(*map(torch.from_numpy, tensors)))
        if kind is not ExportKind.BANKED:
            yield run(sessions[0], *tensors)
            continue
        chunks = list(zip(*(np.array_split(t, min(2, len(t))) for t in tensors), strict=True))
        bank = np.concatenate([run(sessions[1], *chunk) for chunk in chunks])
        yield np.concatenate([run(sessions[0], *chunk, bank) for chunk in chunks])


def _difference(name: str, error: NDArray[np.floating], floor: NDArray[np.floating]) -> Difference:
    return Difference(name, float(error.max()), float(error.mean()), float(floor.max()), float(floor.mean()))


def allowed(overall: Difference, precision: str = "fp32", subject: Subject = MAPS) -> tuple[float, float]:
    """The largest maximum and mean that the noise floor allows (see above)."""
    factor = ALLOWED_FLOORS[precision]
    return (
        max(factor * overall.floor_max, subject.negligible_max),
        max(factor * overall.floor_mean, subject.negligible_mean),
    )


def check(path: object, differences: Sequence[Difference], precision: str = "fp32", subject: Subject = MAPS) -> None:
    """Raise ModelError unless the last difference, the one over all, is within what the noise floor allows."""
    overall = differences[-1]
    most, mean = allowed(overall, precision, subject)
    if not math.isfinite(overall.floor_max):
        raise ModelError(f"{path}: not written: with these weights {subject.network} itself computes NaN or infinity")
    if not (overall.max <= most and overall.mean <= mean):
        remedy = "; for FP16 try --precision fp32" if precision == "fp16" else ""
        raise ModelError(
            f"{path}: not written: its {subject.outputs} differ from {subject.network} by {overall.max:.1e} at most "
            f"and {overall.mean:.1e} on average, where rounding explains {most:.1e} and {mean:.1e}{remedy}"
        )


def table(differences: Sequence[Difference], precision: str = "fp32", subject: Subject = MAPS) -> Table:
    """The differences and the bound, for a terminal."""
    title = f"ONNX Runtime against {subject.network}: |Δ| of the {subject.outputs}, which lie in [0, 1]"
    grid = Table(subject.rows, title=title)
    for column in ("max", "mean", "noise floor, max", "noise floor, mean"):
        grid.add_column(column, justify="right")
    for d in differences:
        grid.add_row(d.name, *(f"{v:.1e}" for v in (d.max, d.mean, d.floor_max, d.floor_mean)))
    grid.add_section()
    grid.add_row("allowed", *(f"{v:.1e}" for v in allowed(differences[-1], precision, subject)))
    return grid
